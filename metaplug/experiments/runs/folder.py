"""The folder of a run: its files, the order in which they are written, and the one process that may write them.

What a crash at any moment leaves is a run to resume, as everything that a checkpoint counts on is on the disk before it, and everything
that is there beyond the checkpoint is cut away:

    config.yaml, run.json, metrics.jsonl (empty)  →  lines of metrics  →  best.safetensors  →  last.safetensors  →  …  →  summary.json
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from filelock import FileLock, Timeout

from metaplug import checkpoint
from metaplug.errors import RequestError, RunError
from metaplug.experiments.configuration import ExperimentConfig, flatten, to_yaml
from metaplug.experiments.experiment import to_json
from metaplug.experiments.runs.layout import BEST, CONFIG, LAST, LOCK, METRICS, SUMMARY
from metaplug.experiments.runs.sessions import RECORD, read_sessions
from metaplug.files import append, make_folder, replacing
from metaplug.settings import validated
from metaplug.yaml_text import parse_yaml, read_yaml


class RunFolder:
    """The folder at `path`, as one process of a run has it. A context: at its end the folder is let go."""

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
        """Refuse a folder that is taken, or holds another run than the one to resume; take hold of an unfinished one.

        Returns:
            Whether the run in the folder is finished.

        Raises:
            RequestError: as said, or another process is writing there.
        """
        if not self.path.exists():
            return False
        if not self.path.is_dir():
            raise RequestError(
                f"{self.path} is a file, not a folder for a run: give another --name or --out"
            )
        taken = any(not entry.name.startswith(".") for entry in self.path.iterdir())
        if not resume and taken:
            raise RequestError(
                f"the run folder {self.path} already exists: give another --name or --out, or --resume to go on with it"
            )
        saved = self.path / CONFIG
        if not saved.exists():
            if taken:
                raise RequestError(
                    f"{self.path} holds no run to resume, as it has no {CONFIG}: give another --name or --out"
                )
            return False
        self._check_same(begun_as(self.path), config, f"{self.path} was begun with")
        if (self.path / SUMMARY).exists():  # and may be read, though nobody could write there
            return True
        self._hold()
        return (self.path / SUMMARY).exists()  # or the process that held it has finished

    def begin(self, config: ExperimentConfig) -> tuple[Path, dict[str, Any]] | None:
        """Make the folder, or clear up in it, and hold it; the checkpoint to go on from, where there is one.

        That is the last; where it is gone, the best, which has all that the last one had when it was written.

        Raises:
            RequestError: another process has taken the folder meanwhile, or the checkpoint was trained with another configuration.
            RunError: the folder cannot be written, or a file in it is damaged.
        """
        try:
            make_folder(self.path)
        except OSError as error:
            raise RunError(
                f"cannot make the run folder {self.path}: {error.strerror}; give another --out"
            ) from error
        if self._lock is None:
            self._hold()
            self.check(
                config, resume=False
            )  # since it was looked at, another process may have begun and ended here
        for left in self.path.glob(".*.tmp"):  # of a process that was killed while it wrote
            with suppress(OSError):
                left.unlink()
        saved = self.path / CONFIG
        if not saved.exists() or read_yaml(saved) != config.model_dump(mode="json"):
            self._write_text(CONFIG, to_yaml(config))  # resumed with other settings of the runtime
        file = next((file for name in (LAST, BEST) if (file := self.path / name).exists()), None)
        if file is None:
            self._write_text(METRICS, "")
            return None
        try:
            state = checkpoint.read(file)
        except RunError as error:
            other = (
                f"; or remove it, and --resume goes on from {BEST}"
                if file.name == LAST and (self.path / BEST).exists()
                else ""
            )
            raise RunError(f"{error}{other}") from error
        if state.get("config") is None:
            raise RunError(
                f"{file} holds a learner without its experiment, which no run wrote: put the run's own file there"
            )
        trained = validated(
            ExperimentConfig,
            parse_yaml(state["config"], f"the configuration in {file}"),
            f"the configuration in {file}",
        )
        self._check_same(
            flatten(trained.model_dump(mode="json")), config, f"{file} was trained with"
        )
        return file, state

    def cut(self, iterations: int) -> None:
        """Leave exactly the lines of the first `iterations` iterations.

        Raises:
            RunError: some of them are not there.
        """
        path = self.path / METRICS
        lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
        if len(lines) < iterations:
            raise RunError(
                f"{path} lacks lines of the {iterations} iterations that its checkpoint has done: bring them back, or train the run anew; "
                "its weights are whole"
            )
        self._write(METRICS, b"".join(line + b"\n" for line in lines[:iterations]))

    def record(self, session: Mapping[str, Any]) -> None:
        """Add the session that begins to run.json."""
        self._write_text(
            RECORD, to_json({"sessions": [*read_sessions(self.path), session]}, indent=2) + "\n"
        )

    def log(self, values: Mapping[str, Any], *, durable: bool) -> None:
        """Add a line of metrics; `durable` where a checkpoint that counts on it follows."""
        self._check_hold()
        append(self.path / METRICS, to_json(values) + "\n", durable=durable)

    def save(self, name: str, state: dict[str, Any]) -> None:
        """Write a checkpoint."""
        self._check_hold()
        checkpoint.write(self.path / name, state)

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Write the summary."""
        self._check_hold()
        self._write_text(SUMMARY, to_json(summary, indent=2) + "\n")

    def _hold(self) -> None:
        lock = FileLock(self.path / LOCK)
        try:
            lock.acquire(blocking=False)
        except Timeout:
            raise RequestError(
                f"the run folder {self.path} is in the hands of another process{self._holder()}: wait for it, or give another --name"
            ) from None
        except OSError as error:
            raise RunError(
                f"cannot write into the run folder {self.path}: {error.strerror}; give another --out"
            ) from error
        self._lock, self._held = lock, _identity(self.path / LOCK)

    def _check_hold(self) -> None:
        """Write no more where the lock is another file than the one that this process holds, so that somebody else may be writing."""
        if (
            self._held is not None
            and (self.path / METRICS).exists()
            and _identity(self.path / LOCK) != self._held
        ):
            raise RunError(
                f"somebody removed {self.path / LOCK} while this process was training there, and another may have begun: stopped, and "
                "nothing more was written; let the lock be, and go on with --resume"
            )

    def _holder(self) -> str:
        try:
            process = read_sessions(self.path)[-1]["process"]
            return f" ({process['pid']} on {process['host']})"
        except (RunError, LookupError, TypeError):  # it has only just begun
            return ""

    def _check_same(self, begun: Mapping[str, Any], config: ExperimentConfig, what: str) -> None:
        asked = flatten(config.model_dump(mode="json"))
        for field in differing(begun, asked):
            raise RequestError(
                f"{what} {field} = {_shown(begun, field)}, which cannot become {_shown(asked, field)}: "
                f"resume it as it was begun ({self.path / CONFIG}), or give another --name"
            )

    def _write_text(self, name: str, text: str) -> None:
        self._write(name, text.encode())

    def _write(self, name: str, content: bytes) -> None:
        with replacing(self.path / name) as file:
            file.write(content)


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
    if not read_yaml(saved):
        raise RequestError(
            f"{saved} is empty, though a run has begun there: bring it back, or give another --name"
        )
    return flatten(
        validated(ExperimentConfig, read_yaml(saved), str(saved)).model_dump(mode="json")
    )


def differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """The fields of two flat configurations that differ and change results: all but those of the runtime, of which precision does."""
    return [
        field
        for field in {**one, **other}
        if one.get(field) != other.get(field)
        and not (field.startswith("runtime.") and field != "runtime.precision")
    ]


def _shown(values: Mapping[str, Any], field: str) -> str:
    return repr(values[field]) if field in values else "not set"
