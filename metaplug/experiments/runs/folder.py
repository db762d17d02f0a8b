"""The folder of a run: its files, the order of writing them, and the one process that may write.

A crash at any moment leaves a run to resume: whatever a checkpoint counts on is on the disk
before it, and what is there beyond the checkpoint is cut away:

    config.yaml, run.json, metrics.jsonl (empty)
    →  lines of metrics  →  best.safetensors  →  last.safetensors  →  …  →  summary.json
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from filelock import FileLock, Timeout

from metaplug import checkpoint
from metaplug.errors import RequestError, RunError
from metaplug.experiments.configuration import ExperimentConfig, from_yaml, to_yaml
from metaplug.experiments.json_values import to_json
from metaplug.experiments.plugin_files import comparable, copies, differing_file
from metaplug.experiments.runs.layout import (
    BEST,
    CONFIG,
    FORMER,
    LAST,
    LOCK,
    METRICS,
    RECORD,
    SUMMARY,
)
from metaplug.experiments.runs.sessions import read_sessions
from metaplug.files import make_folder, replacing
from metaplug.settings import validated
from metaplug.yaml_text import read_yaml


class BusyError(RequestError):
    """Another process trains in the folder of a run."""


class RunFolder:
    """The folder at `path`, as one process of a run has it; a context that releases its lock."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: FileLock | None = None
        self._held: tuple[int, int] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._lock is not None:
            self._lock.release()

    def check(self, config: ExperimentConfig, *, resume: bool) -> bool:
        """Refuse a folder that holds something else than the run to resume; lock an unfinished run.

        Returns:
            Whether the run in the folder is finished.

        Raises:
            RequestError: as said, or another process is writing there.
        """
        if not self.path.exists():
            return False
        mend = "give another --name or --out"
        if not self.path.is_dir():
            raise RequestError(f"{self.path} is a file, not a folder for a run: {mend}")
        taken = bool(self._entries())
        if not resume and taken and self._never_trained():
            self._acquire()
            for name in (CONFIG, RECORD, METRICS):  # of a run refused before its first iteration
                (self.path / name).unlink()
            return False
        if not resume and taken:
            mend = f"{mend}, or --resume to go on with it"
            raise RequestError(f"the run folder {self.path} already exists: {mend}")
        if not (self.path / CONFIG).exists():
            if taken:
                what = f"holds no run to resume, as it has no {CONFIG}"
                raise RequestError(f"{self.path} {what}: {mend}")
            return False
        self._check_same(begun_as(self.path), config, f"{self.path} was begun with")
        if (self.path / SUMMARY).exists():  # read without a lock, as nobody may be able to write
            return True
        self._acquire()
        return (self.path / SUMMARY).exists()  # the process that held it may have finished

    def begin(self, config: ExperimentConfig) -> tuple[Path, dict[str, Any]] | None:
        """Make or clear up the folder, and lock it; the checkpoint to go on from, where there is
        one.

        Without the last checkpoint that is the best, which has all that the last had when it was
        written.

        Raises:
            RequestError: another process took the folder meanwhile, or the checkpoint was trained
                with another configuration.
            RunError: the folder cannot be written, or a file in it is damaged.
        """
        try:
            make_folder(self.path)
        except OSError as error:
            said = f"cannot make the run folder {self.path}: {error.strerror}"
            raise RunError(f"{said}; give another --out") from error
        if self._lock is None:
            self._acquire()
            self.check(config, resume=False)  # another process may have begun and ended here
        for left in self.path.glob(".*.tmp"):  # of a process that was killed while it wrote
            with suppress(OSError):
                left.unlink()
        saved = self.path / CONFIG
        if not saved.exists() or read_yaml(saved) != config.model_dump(mode="json"):
            self._write(CONFIG, to_yaml(config))  # resumed with other settings of the runtime
        for name, source in copies(config).items():
            self._write(name, source)
        files = [self.path / name for name in (LAST, BEST, *FORMER)]
        file = next((file for file in files if file.exists()), None)
        if file is None:
            return None
        try:
            state = checkpoint.read(file)
        except RunError as error:
            if file.name != LAST or not (self.path / BEST).exists():
                raise
            mend = f"or remove it, and --resume goes on from {BEST}"
            raise RunError(f"{error}; {mend}") from error
        if state.get("config") is None:
            what = "holds a learner without its experiment, which no run wrote"
            raise RunError(f"{file} {what}: put the run's own file there")
        trained = comparable(from_yaml(state["config"], f"the configuration in {file}"))
        self._check_same(trained, config, f"{file} was trained with")
        return file, state

    def record(self, session: Mapping[str, Any]) -> None:
        """Add the session that begins to run.json."""
        sessions = [*read_sessions(self.path), session]
        self._write(RECORD, to_json({"sessions": sessions}, indent=2) + "\n")

    def check_lock(self) -> None:
        """Write no more after somebody removed the lock, as another process may hold a new one.

        Raises:
            RunError: somebody did.
        """
        is_own = _identity(self.path / LOCK) == self._held
        if self._held is not None and (self.path / METRICS).exists() and not is_own:
            raise RunError(
                f"somebody removed {self.path / LOCK} while this process was training there, and "
                "another may have begun: stopped, and nothing more was written; "
                "let the lock be, and go on with --resume"
            )

    def save(self, name: str, state: dict[str, Any]) -> None:
        """Write a checkpoint."""
        self.check_lock()
        checkpoint.write(self.path / name, state)

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Write the summary."""
        self.check_lock()
        self._write(SUMMARY, to_json(summary, indent=2) + "\n")

    def _entries(self) -> list[Path]:
        return [entry for entry in self.path.iterdir() if not entry.name.startswith(".")]

    def _never_trained(self) -> bool:
        """Whether the folder holds what a run writes as it begins, and not one iteration."""
        names = {entry.name for entry in self._entries()}
        begun = {CONFIG, RECORD, METRICS}
        copies_alone = all(Path(name).suffix == ".py" for name in names - begun)
        return begun <= names and copies_alone and not (self.path / METRICS).stat().st_size

    def _acquire(self) -> None:
        lock = FileLock(self.path / LOCK)
        try:
            lock.acquire(blocking=False)
        except Timeout:
            who = f"the run folder {self.path} is in the hands of another process{self._holder()}"
            raise BusyError(f"{who}: wait for it, or give another --name") from None
        except OSError as error:
            said = f"cannot write into the run folder {self.path}: {error.strerror}"
            raise RunError(f"{said}; give another --out") from error
        self._lock, self._held = lock, _identity(self.path / LOCK)

    def _holder(self) -> str:
        try:
            process = read_sessions(self.path)[-1]["process"]
            return f" ({process['pid']} on {process['host']})"
        except (RunError, LookupError, TypeError):  # it has only just begun
            return ""

    def _check_same(self, begun: Mapping[str, Any], config: ExperimentConfig, what: str) -> None:
        asked = comparable(config)
        for field in differing(begun, asked):
            if (found := differing_file(field, begun, asked)) is not None:
                label, digests = found
                raise RequestError(
                    f"{what} the plugin file of '{label}' as it was then, and it has changed "
                    f"({digests}): bring it back (from {self.path}, which keeps a copy), or give "
                    "another --name"
                )
            one, other = (
                repr(values[field]) if field in values else "not set" for values in (begun, asked)
            )
            mend = f"resume it as it was begun ({self.path / CONFIG}), or give another --name"
            raise RequestError(f"{what} {field} = {one}, which cannot become {other}: {mend}")

    def _write(self, name: str, content: str | bytes) -> None:
        with replacing(self.path / name) as file:
            file.write(content.encode() if isinstance(content, str) else content)


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def begun_as(folder: Path) -> dict[str, Any]:
    """The configuration of the run in a folder, flat.

    Raises:
        RequestError: it cannot be read, or is none.
    """
    saved = folder / CONFIG
    if not (values := read_yaml(saved)):
        what = f"{saved} is empty, though a run has begun there"
        raise RequestError(f"{what}: bring it back, or give another --name")
    return comparable(validated(ExperimentConfig, values, str(saved)))


def differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """The fields of two flat configurations that differ and change results.

    Of those of the runtime, only precision does.
    """
    return [
        field
        for field in {**one, **other}
        if one.get(field) != other.get(field)
        and (not field.startswith("runtime.") or field == "runtime.precision")
    ]
