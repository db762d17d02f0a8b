"""The fields of a state, with their types and bounds."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

import torch
from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    StrictBool,
    StrictInt,
    StrictStr,
    model_validator,
)
from torch import Tensor

from metaplug.errors import RequestError, RunError, one_line, quoted
from metaplug.evaluation.score_names import ScoreName
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
    is_bytes = isinstance(others, Tensor) and others.dtype is torch.uint8
    if others is not None and not (is_bytes and others.shape[1:] == (16,)):
        raise ValueError("no digests of 16 bytes each")
    return others


Name = Annotated[StrictStr, Field(min_length=1, max_length=200), AfterValidator(_printable)]
ModelName = Annotated[  # with the path of a folder
    StrictStr, Field(min_length=1, max_length=4200), AfterValidator(_printable)
]
Count = Annotated[StrictInt, Field(ge=0, lt=2**53)]
"""How often something happened: below 2**53, where other readers of JSON begin to round."""
Length = Annotated[StrictInt, Field(ge=1, lt=2**31)]
Plain = Annotated[dict[StrictStr, Any], BeforeValidator(_plain)]


class ModelSpec(Settings):
    """How an installed model, or one of a zoo, is built."""

    name: ModelName
    input_shape: list[Length] = Field(max_length=8)
    outputs: Length
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
    """What was trained on, as TrainedOn.to_state has it."""

    classes: dict[StrictStr, StrictStr]
    others: Annotated[Any, BeforeValidator(_digests)] = None
    complete: StrictBool


class SavedData(Settings):
    """What a run keeps of its data: resolved settings, and by split the digest of its classes."""

    settings: Plain
    splits: dict[Literal["train", "val"], StrictStr]


class Best(Settings):
    """The best validation of a run."""

    iteration: Count
    mean: float
    interval: float | None = Field(allow_inf_nan=True)


class State(Settings):
    """The content of a checkpoint: a learner's state, and after `skipped` what a run adds."""

    iteration: Count
    total: Count
    kind: Literal["classification", "regression"]
    seed: StrictInt
    settings: Annotated[LearnerSettings, BeforeValidator(_plain)]
    task_batching: Literal["auto", "vectorized", "sequential"]
    score: ScoreName | None = None
    custom_score: StrictBool = False
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
    data: SavedData | None = None
    seconds: float = Field(0.0, ge=0)
    clock: list[Annotated[float, Field(ge=0)]] = Field([])

    @model_validator(mode="after")
    def _check_plugins(self) -> State:
        names = [plugin.name for plugin in self.plugins]
        if len(set(names)) < len(names) or set(names) != self.plugin_states.keys():
            raise ValueError("its plugins are not those whose states it has")
        return self


def check_form(state: Any, origin: str) -> None:
    """Refuse what is no State.

    Args:
        state: a mapping of any content.
        origin: where it is from, for errors.

    Raises:
        RunError: names `origin`, and what is wrong.
    """
    lacks = [n for n, f in State.model_fields.items() if f.is_required() and n not in state]
    if lacks:
        raise not_whole(origin, f"it lacks {quoted(lacks)}")
    try:
        validated(State, state, "its content")
    except RequestError as error:
        raise not_whole(origin, str(error)) from None


def not_whole(origin: object, reason: str) -> RunError:
    """The error about a file that is damaged or forged: names `origin`, and shortens `reason`."""
    said = one_line(reason, 400)
    return RunError(
        f"{origin} is not a whole metaplug checkpoint ({said}): use another one of the run"
    )
