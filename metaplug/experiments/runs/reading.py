"""The JSON files of a run, read back, or refused in one line where no run wrote them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StrictStr, ValidationError

from metaplug.checkpoint import Count
from metaplug.errors import RunError, one_line
from metaplug.experiments.runs.layout import BEST, METRICS, SUMMARY
from metaplug.tasks.reading import no_number

_MOST_BYTES = 16 * 2**20
"""Of a line of metrics, and of a summary."""
Figure = Annotated[float, Field(strict=True)] | None
"""A number; null stands for NaN and Inf, which JSON does not have."""


class Values(BaseModel):
    """The fields of a JSON object that are read; it may have more."""

    model_config = ConfigDict(extra="ignore", strict=True, allow_inf_nan=False)


class _Inner(Values):
    support_losses: list[Figure]
    query_losses: list[Figure]
    cosines: list[Figure]
    learning_rates: list[Figure]


class Validation(Values):
    """Of a line of metrics.jsonl."""

    metric: StrictStr
    mean: Figure
    interval: Figure
    inner: _Inner | None = None  # of runs before this was kept, or with profile_tasks 0


class _Result(Validation):
    num_tasks: Count
    inner_steps: Count
    transductive: list[StrictStr]


class MetricsLine(Values):
    """A line of metrics.jsonl."""

    iteration: Count
    outer_loss: Figure
    meta_gradient_norm: Figure
    meta_lr: Figure
    figures: dict[StrictStr, Figure]
    validation: Validation | None = None


class _Best(Values):
    iteration: Count
    mean: Figure


class Summary(Values):
    """The content of summary.json."""

    test: _Result
    best_validation: _Best
    iterations: Count
    per_task: list[Figure] | None = None  # of runs before this was kept
    per_class: list[list[Figure]] | None = None
    clock: list[Figure] | None = None
    data: dict[StrictStr, StrictStr] | None = None
    seconds: Figure = None


def read_metrics(folder: Path, *, finished: bool = True) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl, one for each iteration.

    Of a run that was kept small there are the lines with a validation alone.

    Args:
        folder: the run's.
        finished: False leaves out the beginning of a line, as a run writes it or was killed there.

    Raises:
        RunError: the file cannot be read, or a line is not one that a run writes; names the line.
    """
    path = folder / METRICS
    lines: list[dict[str, Any]] = []
    mend = "take it from a backup, or train the run anew"
    with _naming(path), path.open("rb") as file:
        while line := file.readline(_MOST_BYTES):
            if not finished and not line.endswith(b"\n"):
                break
            where = f"{path}, line {len(lines) + 1}"
            lines.append(read_as(line, MetricsLine, f"{where},", mend))
            if (found := lines[-1]["iteration"]) != len(lines) and not _kept_small(lines):
                what = f"is of iteration {found}, so lines are missing or stand twice"
                raise RunError(f"{where} {what}: train the run anew")
    return lines


def _kept_small(lines: Sequence[Mapping[str, Any]]) -> bool:
    """Whether all lines have validations, the last of them a later one than the one before."""
    rises = len(lines) < 2 or lines[-2]["iteration"] < lines[-1]["iteration"]
    return rises and all(line.get("validation") for line in lines)


def read_summary(folder: Path) -> dict[str, Any]:
    """A finished run's summary.json.

    Raises:
        RunError: the file cannot be read, or is not one that a run writes.
    """
    path = folder / SUMMARY
    mend = f"remove it, and --resume makes it anew from {BEST}"
    with _naming(path), path.open("rb") as file:
        return read_as(file.read(_MOST_BYTES), Summary, str(path), mend)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        said = f"cannot read {path}: {error.strerror}"
        raise RunError(f"{said}; it is in the folder of a run that has begun") from None


def read_as(text: bytes, form: type[BaseModel], what: str, mend: str) -> dict[str, Any]:
    """The JSON object in a text, as it is there, once it has a form.

    Args:
        what: the text is, for errors.
        mend: what to do about a damaged one.

    Raises:
        RunError: it is none, or has another form.
    """
    try:
        values: dict[str, Any] = json.loads(text.decode(), parse_constant=no_number)
        form.model_validate(values)
    except ValidationError as error:
        fault = error.errors()[0]
        where = ".".join(map(str, fault["loc"])) or "it"
        reason = f"{where}: {fault['msg'][:1].lower()}{fault['msg'][1:]}"
    except UnicodeDecodeError:
        reason = "not UTF-8 text"
    except RecursionError:
        reason = "nested too deeply"
    except ValueError as error:  # of JSON, or of a number with thousands of digits
        reason = str(error)
    else:
        return values
    raise RunError(f"{what} is not what a run writes ({one_line(reason)}): {mend}")
