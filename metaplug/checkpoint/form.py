"""The form of a learner's state, checked before any of it is used."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated, Any, Literal

import torch
from pydantic import AfterValidator, BeforeValidator, Field, StrictBool, StrictInt, StrictStr
from torch import Tensor

from metaplug.errors import MetaplugError, RequestError, RunError, one_line, quoted
from metaplug.execution.settings import LearnerSettings
from metaplug.settings import Settings, validated


def _printable(name: str) -> str:
    if not name.isprintable():
        raise ValueError("a name has control characters")
    return name


def _plain(values: Any) -> Any:
    try:
        json.dumps(values)
    except TypeError:
        raise ValueError("a setting is no plain value") from None
    return values


def _digests(others: Any) -> Any:
    if others is not None and not (
        isinstance(others, Tensor) and others.dtype is torch.uint8 and others.shape[1:] == (16,)
    ):
        raise ValueError("no digests of 16 bytes each")
    return others


Name = Annotated[StrictStr, Field(min_length=1, max_length=200), AfterValidator(_printable)]
Count = Annotated[StrictInt, Field(ge=0, lt=2**53)]
Plain = Annotated[dict[StrictStr, Any], AfterValidator(_plain)]


class ModelSpec(Settings):
    """How an installed model is built."""

    name: Name
    input_shape: list[Annotated[StrictInt, Field(ge=1, lt=2**31)]] = Field(max_length=8)
    outputs: StrictInt = Field(ge=1, lt=2**31)
    settings: Plain


class SavedPlugin(Settings):
    """A plugin of the chain; `part` is None for one that is not installed."""

    part: Name | None
    name: Name
    settings: Plain


class SavedOptimizer(Settings):
    """As torch's optimizers have it."""

    state: dict[StrictInt, dict[StrictStr, Any]]
    param_groups: list[dict[StrictStr, Any]]


class SavedClasses(Settings):
    """What was trained on; see TrainedOn.to_state."""

    classes: dict[StrictStr, StrictStr]
    others: Annotated[Any, AfterValidator(_digests)] = None
    complete: StrictBool


class Best(Settings):
    """The best validation of a run."""

    iteration: Count
    mean: float
    interval: float | None = Field(allow_inf_nan=True)


class State(Settings):
    """Everything in a checkpoint: what MetaLearner.state_dict gives, and behind `trained_on` what a run adds."""

    format: StrictInt | None = None
    iteration: Count
    total: Count
    kind: Literal["classification", "regression"]
    seed: StrictInt
    settings: Annotated[LearnerSettings, BeforeValidator(_plain)]
    task_batching: Literal["auto", "vectorized", "sequential"]
    custom_loss: StrictBool
    model_spec: ModelSpec | None
    model: dict[StrictStr, Any]
    plugins: list[SavedPlugin]
    plugin_states: dict[StrictStr, dict[StrictStr, Any]]
    optimizer: SavedOptimizer
    trained_on: SavedClasses | None = None
    skipped: list[Count] = Field([0, 0], min_length=2, max_length=2)
    best: Best | None = None
    config: StrictStr | None = None
    seconds: float = Field(0.0, ge=0)


def check_form(state: Mapping[str, Any], origin: str) -> None:
    """Refuse a state of another form than State.

    Raises:
        RunError: says what is wrong; `origin` is named.
    """
    if missing := [
        name
        for name, field in State.model_fields.items()
        if field.is_required() and name not in state
    ]:
        raise not_whole(origin, f"as it lacks {quoted(missing)}", brackets=False)
    if fault := fault_of(state):
        raise not_whole(origin, fault)


def fault_of(state: Mapping[str, Any]) -> str | None:
    """What makes a state one of another form than State; None if nothing does."""
    try:
        validated(State, state, "its content")
    except RequestError as error:
        return str(error)
    names = [plugin["name"] for plugin in state["plugins"]]
    if len(set(names)) < len(names) or set(names) != state["plugin_states"].keys():
        return "its plugins are not those whose states it has"
    return None


@contextmanager
def naming(file: object) -> Iterator[None]:
    """Errors of what is built inside name the file that asked for it."""
    try:
        yield
    except MetaplugError as error:
        if str(file) in str(error):
            raise
        raise type(error)(f"{file}: {error}") from error


def not_whole(origin: object, reason: str, *, brackets: bool = True) -> RunError:
    """The error for a file that is damaged or forged."""
    reason = one_line(reason, 400)
    said = f" ({reason})" if brackets else f", {reason}"
    return RunError(
        f"{origin} is not a whole metaplug checkpoint{said}: use another one of the run"
    )
