"""What a run keeps of its data, so that no other data pass for them in silence."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from metaplug.errors import RequestError
from metaplug.experiments.configuration import TaskSettings
from metaplug.tasks.identities import TrainedOn, digest_of_stream
from metaplug.tasks.sources import TaskSource

TRAINED = ("train", "val")
"""The splits that decide a checkpoint."""


def kept_of(tasks: TaskSource) -> dict[str, Any]:
    """The resolved settings and the digests of a source, for a checkpoint.

    The test split has no part in it: a checkpoint is the same whatever that is.
    """
    return {"settings": tasks.resolved(), "splits": digests_of(tasks, TRAINED)}


def digests_of(tasks: TaskSource, splits: tuple[str, ...]) -> dict[str, str]:
    """By split, the digest of its classes; without those whose streams do not say theirs."""
    found = {split: digest_of_stream(getattr(tasks, split)) for split in splits}
    return {split: digest for split, digest in found.items() if digest is not None}


def agree(one: Mapping[str, str], other: Mapping[str, str]) -> bool:
    """Whether no split that both know has another digest in one than in the other."""
    return all(one[split] == other[split] for split in one.keys() & other.keys())


def check_same_data(state: Mapping[str, Any], file: Path, tasks: TaskSource, source: str) -> None:
    """Refuse to go on with a run on other data than its checkpoint is of.

    Nothing is known of a checkpoint of an older version, nor of a stream that says nothing.

    Args:
        state: of the checkpoint.
        file: where it is from, for errors.
        tasks: of the run, as they are now.
        source: their name.

    Raises:
        RequestError: the training or the validation classes are others.
    """
    then, now = (state.get("data") or {}).get("splits", {}), digests_of(tasks, TRAINED)
    for split in TRAINED:
        if {split} <= then.keys() & now.keys() and then[split] != now[split]:
            raise RequestError(
                f"{file} is of other {split} data than {source} has now, and one run cannot be of "
                "both: bring the data back as they were, or give another --name"
            )


def as_trained(state: Mapping[str, Any], own: TaskSettings) -> TaskSettings:
    """The tasks of a run, with the settings that were resolved when it was trained."""
    return own.model_copy(update={"settings": {**own.settings, **_resolved(state)}})


def settings_for(source: str, state: Mapping[str, Any], own: TaskSettings) -> dict[str, Any]:
    """The settings that another place of a run's data is read with: those that were resolved.

    A source of another kind has other settings, and takes none over.
    """
    is_kind = source.partition(":")[0] == own.source.partition(":")[0]
    return _resolved(state) if is_kind else {}


def claimed(trained_on: TrainedOn, state: Mapping[str, Any], own: TaskSettings) -> TrainedOn:
    """The classes trained on, without a claim that others are unseen where that is not known.

    Older versions took the digests of a folder's images after their inversion.
    """
    is_older = state.get("data") is None and own.source.startswith("folder:")
    return replace(trained_on, complete=False) if is_older else trained_on


def _resolved(state: Mapping[str, Any]) -> dict[str, Any]:
    kept = (state.get("data") or {}).get("settings", {})
    # Whatever a file says, nothing is fetched because of it.
    return {name: value for name, value in kept.items() if name != "download"}
