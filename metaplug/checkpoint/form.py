"""What a learner's state must be, before any of it is used: its form, and what it must have in common with the learner that takes it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated, Any, Literal

import torch
from pydantic import AfterValidator, BeforeValidator, Field, StrictBool, StrictInt, StrictStr
from torch import Tensor, nn
from torch.nn.modules import module as registration

from metaplug.config import LearnerSettings
from metaplug.errors import MetaplugError, RequestError, RunError, one_line, quoted
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
    """What was trained on; see TrainedOn."""

    classes: dict[StrictStr, StrictStr]
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
    if missing := [name for name, field in State.model_fields.items() if field.is_required() and name not in state]:
        raise not_whole(origin, f"as it lacks {quoted(missing)}", brackets=False)
    try:
        validated(State, state, "its content")
    except RequestError as error:
        raise not_whole(origin, str(error)) from None
    names = [plugin["name"] for plugin in state["plugins"]]
    if len(set(names)) < len(names) or set(names) != state["plugin_states"].keys():
        raise not_whole(origin, "its plugins are not those whose states it has")


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
    return RunError(f"{origin} is not a whole metaplug checkpoint{said}: use another one of the run")


def check_tensors(saved: Mapping[str, Any], own: Mapping[str, Any], what: str, mend: str = "build the model as it was") -> None:
    """Refuse saved tensors of other names, shapes or dtypes than `own`; `what` begins the sentence."""
    missing, extra = [name for name in own if name not in saved], [name for name in saved if name not in own]
    if missing or extra:
        raise RunError(f"{what}: it lacks {quoted(missing[:3])} and has {quoted(map(one_line, extra[:3]))} beside; {mend}")
    for name, value in own.items():
        if there := _difference(saved[name], value):
            raise RunError(f"{what}: '{name}' is {there}; {mend}")


def _difference(saved: Any, own: Any) -> str | None:
    if isinstance(saved, Tensor) != isinstance(own, Tensor):
        return f"a {type(saved).__name__} there and a {type(own).__name__} here"
    if not isinstance(own, Tensor):
        return None
    if saved.shape != own.shape:
        return f"{tuple(saved.shape)} there and {tuple(own.shape)} here"
    return None if saved.dtype == own.dtype else f"{saved.dtype} there and {own.dtype} here"


def check_optimizer(saved: Mapping[str, Any], optimizer: torch.optim.Optimizer, what: str) -> None:
    """Refuse the state of another optimizer, or one of other parameters; `what` begins the sentence."""
    own = optimizer.state_dict()["param_groups"]
    mend = "use the meta-optimizer, model and plugins as they were"
    if repr([group.get("params") for group in saved["param_groups"]]) != repr([group["params"] for group in own]):
        raise RunError(f"{what}: it has other groups of parameters; {mend}")
    for theirs, ours in zip(saved["param_groups"], own, strict=True):
        if differing := [key for key, value in theirs.items() if not _same_setting(key, value, ours)]:
            raise RunError(f"{what}: its setting {quoted([one_line(differing[0])])} is another one; {mend}")
    parameters = dict(enumerate(parameter for group in optimizer.param_groups for parameter in group["params"]))
    known = {"step", "exp_avg", "exp_avg_sq"} if isinstance(optimizer, torch.optim.Adam) else {"momentum_buffer"}
    for index, values in saved["state"].items():
        if index not in parameters or set(values) not in (known, set()):
            raise RunError(f"{what}: it has moments of another kind for parameter {index}; {mend}")
        for name, value in values.items():
            if not _is_moment(name, value, parameters[index]):
                raise RunError(f"{what}: '{name}' of parameter {index} has another form; {mend}")


def _same_setting(key: str, value: Any, ours: Mapping[str, Any]) -> bool:
    if key == "lr":  # which a schedule changes
        return type(value) in (int, float) and 0 <= value < math.inf
    if key in ("foreach", "fused", "capturable", "differentiable"):  # how it computes, which may differ; it is not taken over
        return type(value) in (bool, type(None))
    return key in ours and repr(value) == repr(ours[key])


def _is_moment(name: str, value: Any, parameter: Tensor) -> bool:
    if not isinstance(value, Tensor):
        return value is None and name == "momentum_buffer"
    if name == "step":
        return value.shape == () and value.dtype == torch.float32 and bool(0 <= value < math.inf)
    return value.shape == parameter.shape and value.dtype == parameter.dtype


class _TooMuchError(Exception):
    """A model became larger than what was saved of it."""


@contextmanager
def rehearsal(state: Mapping[str, Any], what: str) -> Iterator[None]:
    """Inside, what is built takes no memory for its tensors, and may not become larger than what `state` has.

    So a state that does not fit is refused before memory is taken for what it asks for. What cannot be built so, such as a model that
    computes with its weights while it is made, ends it in silence, and is refused where it is really built.

    Raises:
        RunError: it does become larger.
    """
    tensors = [value for part in (state["model"], *state["plugin_states"].values()) for value in part.values() if isinstance(value, Tensor)]
    # What is replaced while a model is made counts too, hence some room.
    room = {"tensors": 8 * len(tensors) + 64, "elements": 8 * sum(map(Tensor.numel, tensors)) + 2**20, "modules": 64 * len(tensors) + 1024}

    def took(kind: str, count: int) -> None:
        room[kind] -= count
        if room[kind] < 0:
            raise _TooMuchError

    def tensor(_: nn.Module, __: str, value: Tensor | None) -> None:
        if value is not None:
            took("tensors", 1)
            took("elements", value.numel())

    hooks = [
        registration.register_module_parameter_registration_hook(tensor),
        registration.register_module_buffer_registration_hook(tensor),
        registration.register_module_module_registration_hook(lambda *_: took("modules", 1)),
    ]
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            yield
    except _TooMuchError:
        raise RunError(f"{what}: it asks for more weights than it has; use another one of the run") from None
    except Exception:  # whatever comes of tensors without values, or of wrong settings
        pass
    finally:
        for hook in hooks:
            hook.remove()
