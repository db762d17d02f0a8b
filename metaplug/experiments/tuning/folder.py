"""The folder of a search, and the one process that may write there.

    tuning.yaml  →  trials/0000, trials/0001, …  →  a line of trials.log, tuning.json, best.yaml

A trial is in trials.log once it has ended, whole or not at all. A process that is killed leaves a
run to resume, which the next one finds by its number.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import yaml
from filelock import FileLock, Timeout
from pydantic import Field

from metaplug.errors import RequestError, RunError, reason
from metaplug.experiments.configuration import ExperimentConfig, to_yaml
from metaplug.experiments.json_values import to_json
from metaplug.experiments.plugin_files import comparable
from metaplug.experiments.runs.data import agree
from metaplug.experiments.runs.folder import differing
from metaplug.experiments.runs.layout import CONFIG
from metaplug.experiments.tuning.outcome import Outcome, to_values
from metaplug.experiments.tuning.space import Space, value_at
from metaplug.files import make_folder, replacing
from metaplug.settings import Settings, validated
from metaplug.yaml_text import read_yaml

BEGUN, LOG, BEST, VALUES, TRIALS = "tuning.yaml", "trials.log", "best.yaml", "tuning.json", "trials"
_LOCK = ".lock"
_OTHER = "give another --name"


class TuningFolder:
    """The folder at `path`, locked while the context lasts.

    Raises:
        RequestError: another process searches there, or something else is there.
        RunError: it cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = FileLock(path / _LOCK)

    def __enter__(self) -> Self:
        path = self.path
        if path.exists() and not path.is_dir():
            raise RequestError(f"{path} is a file, not a folder for a search: {_OTHER}")
        if path.exists() and not (path / BEGUN).exists() and self._entries():
            raise RequestError(f"{path} holds no search to go on with: {_OTHER}")
        try:
            make_folder(path)
            self._lock.acquire(blocking=False)
        except Timeout:
            raise RequestError(
                f"another process searches in {path}: wait for it, or {_OTHER}"
            ) from None
        except OSError as error:
            said = f"cannot write into {path}: {reason(error)}"
            raise RunError(f"{said}; give another --out") from error
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    @property
    def log(self) -> Path:
        """Optuna's journal of the trials that have ended."""
        return self.path / LOG

    def trial(self, number: int) -> Path:
        """The folder of a trial's run."""
        return self.path / TRIALS / f"{number:04d}"

    def begin(
        self, config: ExperimentConfig, search: Mapping[str, str], data: Mapping[str, str]
    ) -> None:
        """Write what is searched, and make the journal whole after a process that was killed.

        Args:
            config: what all trials share.
            search: the range of each field, by path.
            data: by split, the digest of the classes that trials draw on, where it is known.

        Raises:
            RequestError: another configuration, other ranges or other data are searched there.
        """
        if (self.path / BEGUN).exists():
            self._check_same(config, search, data)
        begun = {
            "search": dict(search),
            "config": config.model_dump(mode="json"),
            "data": dict(data),
        }
        self._write(BEGUN, yaml.safe_dump(begun, sort_keys=False, allow_unicode=True, width=10_000))
        for left in self.path.glob(f"{LOG}.lock*"):  # Optuna's own lock, which a kill leaves behind
            left.unlink(missing_ok=True)
        content = self.log.read_bytes() if self.log.exists() else b""
        whole = content[: content.rfind(b"\n") + 1]
        if whole != content:  # the trial whose line is cut goes on from its run
            self._write(LOG, whole)

    def begun(self, number: int, space: Space) -> dict[str, Any] | None:
        """The values with which an earlier process began a trial; None where none did."""
        path = self.trial(number) / CONFIG
        if not path.exists():
            return None
        config = validated(ExperimentConfig, read_yaml(path), str(path))
        return {field: value_at(config, field) for field in space}

    def keep(self, outcome: Outcome, best: ExperimentConfig | None) -> None:
        """Write what is known so far.

        Args:
            outcome: of the search.
            best: the whole configuration of the best trial; None where there is none yet.
        """
        self._write(VALUES, to_json(to_values(outcome), indent=2) + "\n")
        if best is not None:
            self._write(BEST, to_yaml(best))

    def _check_same(
        self, config: ExperimentConfig, search: Mapping[str, str], data: Mapping[str, str]
    ) -> None:
        where = self.path / BEGUN
        begun = validated(_Begun, read_yaml(where), str(where))
        then, asked = _flat(begun.config, begun.search), _flat(config, search)
        for field in differing(then, asked):
            one, other = (
                repr(values[field]) if field in values else "not set" for values in (then, asked)
            )
            raise RequestError(
                f"{self.path} was begun with {field} = {one}, which cannot become {other}: go on "
                f"with it as it was begun ({where}), or {_OTHER}"
            )

        if not agree(begun.data, data):
            raise RequestError(
                f"{self.path} was begun with other data than {config.tasks.source} has now, and "
                f"its trials could not be compared: bring the data back as they were, or {_OTHER}"
            )

    def _entries(self) -> list[Path]:
        return [entry for entry in self.path.iterdir() if not entry.name.startswith(".")]

    def _write(self, name: str, content: str | bytes) -> None:
        with replacing(self.path / name) as file:
            file.write(content.encode() if isinstance(content, str) else content)


class _Begun(Settings):
    """What a search was begun with."""

    search: dict[str, str] = Field(description="The range of each field, by path.")
    config: ExperimentConfig = Field(description="What all trials share.")
    data: dict[str, str] = Field({}, description="By split, the digest of its classes.")


def _flat(config: ExperimentConfig, search: Mapping[str, str]) -> dict[str, Any]:
    """The whole of a search by field, to be compared."""
    return {**{f"search.{path}": text for path, text in search.items()}, **comparable(config)}
