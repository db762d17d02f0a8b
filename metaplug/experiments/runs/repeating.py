"""Whether a run, trained again, gives the same: every figure of every iteration, and the test."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from metaplug.errors import RequestError, names_code
from metaplug.experiments.configuration import ExperimentConfig, flatten
from metaplug.experiments.plugin_files import comparable
from metaplug.experiments.runs.folder import begun_as, differing
from metaplug.experiments.runs.layout import CONFIG, METRICS, RECORD, SUMMARY
from metaplug.experiments.runs.reading import read_metrics, read_summary
from metaplug.experiments.runs.sessions import read_sessions
from metaplug.models.factories import is_own

_SETTING = ("versions", "device", "threads", "precision", "deterministic", "ranks", "platform")
"""The fields of a session that may change the last digits of a run."""


@dataclass(frozen=True)
class Repetition:
    """How two runs compare.

    Attributes:
        iterations: how many were compared: those that both have.
        tested: whether both are finished, so their tests were compared too.
        fault: the first difference and the largest, in words; None where both runs are the same bit
            for bit.
        changes: what differs between the machines that they ran on, and between their data where
            both are finished, in words; empty for nothing.
    """

    iterations: int
    tested: bool
    fault: str | None
    changes: tuple[str, ...]


def configuration_of(source: Path) -> Path:
    """The file that configured the run in the folder `source`, whose other files are readable.

    Raises:
        RequestError: no iteration of a run is there.
        RunError: a file that `compare_runs` reads is damaged, and training would be in vain.
    """
    files = source / CONFIG, source / METRICS
    if not all(file.is_file() for file in files) or not read_metrics(source):
        what = f"--from {source}: no iteration of a run is there to repeat"
        raise RequestError(f"{what}; give a folder that metaplug train wrote")
    read_sessions(source)
    if (source / SUMMARY).is_file():
        read_summary(source)
    return source / CONFIG


def check_same(source: Path, config: ExperimentConfig, model: str | None) -> None:
    """Refuse to repeat a run as another one, or with code that nobody named but its files.

    Args:
        source: the folder of the run.
        model: the model that the command line names, if it does.

    Raises:
        RequestError: `config` differs from the run's beyond the runtime, or its model is
            MODULE:FACTORY and not `model`.
    """
    saved, name = source / CONFIG, config.model.name
    if is_own(name) and name != model:
        raise RequestError(f"--from {source}: {names_code(saved, name)}")
    if fields := differing(begun_as(source), comparable(config)):
        mend = f"leave that option out, or train a new run from {saved}"
        raise RequestError(
            f"--from {source}: with another {fields[0]} it would be another run; {mend}"
        )


def compare_runs(source: Path, folder: Path) -> Repetition:
    """The run in `folder` against the one in `source` that it repeats.

    Raises:
        RunError: a file of either is damaged.
    """
    pairs = list(zip(read_metrics(source), read_metrics(folder), strict=False))
    pairs = [_alike(*pair) for pair in pairs]
    first = next((place for place, (there, here) in enumerate(pairs, 1) if there != here), None)
    values = [(_flat(there), _flat(here)) for there, here in pairs if there != here]
    tested = (source / SUMMARY).is_file() and (folder / SUMMARY).is_file()
    if tested:
        there, here = (flatten(read_summary(one)["test"]) for one in (source, folder))
        values += [(there, here)] if there != here else []
    fault = None
    if values:
        where = f"iteration {first} is the first to differ" if first else "the test alone differs"
        field = _differing(*values[0])[0]
        said = f"{field} {values[0][0].get(field)} there, {values[0][1].get(field)} here"
        largest = max(_distance(*pair) for pair in values)
        fault = f"{where} ({said}; largest relative difference {largest:.1e})"
    return Repetition(len(pairs), tested, fault, _changes(source, folder))


def _alike(there: dict[str, Any], here: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Two lines, without the profile of the inner loop where one of them has none.

    Runs of an earlier version have none, and it changes nothing else.
    """
    known = [line.get("validation") or {} for line in (there, here)]
    if all("inner" in each for each in known):
        return there, here
    without = [{name: each[name] for name in each if name != "inner"} for each in known]
    there, here = (
        {**line, "validation": own} if "validation" in line else line
        for line, own in zip((there, here), without, strict=True)
    )
    return there, here


def _flat(line: Mapping[str, Any]) -> dict[str, Any]:
    """A line by dotted path; of lists of numbers, each by its place."""
    flat: dict[str, Any] = {}
    for path, value in flatten(line).items():
        own = value if isinstance(value, list) and path.startswith("validation.inner.") else None
        flat |= (
            {path: value} if own is None else {f"{path}.{k}": each for k, each in enumerate(own)}
        )
    return flat


def _differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    return [field for field in {**one, **other} if one.get(field) != other.get(field)]


def _distance(there: Mapping[str, Any], here: Mapping[str, Any]) -> float:
    """The largest relative difference of two numbers; infinite where one of them is missing."""
    pairs = [(there.get(field), here.get(field)) for field in _differing(there, here)]
    return max(
        abs(a - b) / max(abs(a), abs(b), 1e-30)
        if isinstance(a, int | float) and isinstance(b, int | float)
        else float("inf")
        for a, b in pairs
    )


def _changes(source: Path, folder: Path) -> tuple[str, ...]:
    """The differences between the sessions that finished two runs, and between their data."""
    sessions = [read_sessions(one)[-1:] for one in (source, folder)]
    if not all(sessions):
        return (f"{source} has no {RECORD}",)
    there, here = (flatten({key: one[0].get(key) for key in _SETTING}) for one in sessions)
    return tuple(
        f"{field.removeprefix('versions.')} {there.get(field)} there, {here.get(field)} here"
        for field in _differing(there, here)
    ) + tuple(f"other {split} data" for split in _other_data(source, folder))


def _other_data(source: Path, folder: Path) -> list[str]:
    """The splits whose classes differ, of two finished runs that both say theirs."""
    if not all((one / SUMMARY).is_file() for one in (source, folder)):
        return []
    there, here = (read_summary(one).get("data") or {} for one in (source, folder))
    return [split for split in there if there[split] != here.get(split, there[split])]
