"""What a learner's state must have in common with the learner that takes it, found out before anything is loaded."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as registration

from metaplug.errors import RunError, one_line, quoted


def check_tensors(
    saved: Mapping[str, Any],
    own: Mapping[str, Any],
    what: str,
    mend: str = "build the model as it was",
) -> None:
    """Refuse saved tensors of other names, shapes or dtypes than `own`; `what` begins the sentence."""
    missing, extra = (
        [name for name in own if name not in saved],
        [name for name in saved if name not in own],
    )
    if missing or extra:
        raise RunError(
            f"{what}: it lacks {quoted(missing[:3])} and has {quoted(map(one_line, extra[:3]))} beside; {mend}"
        )
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
    if repr([group.get("params") for group in saved["param_groups"]]) != repr(
        [group["params"] for group in own]
    ):
        raise RunError(f"{what}: it has other groups of parameters; {mend}")
    for theirs, ours in zip(saved["param_groups"], own, strict=True):
        if differing := [
            key for key, value in theirs.items() if not _same_setting(key, value, ours)
        ]:
            raise RunError(
                f"{what}: its setting {quoted([one_line(differing[0])])} is another one; {mend}"
            )
    parameters = dict(
        enumerate(parameter for group in optimizer.param_groups for parameter in group["params"])
    )
    known = (
        {"step", "exp_avg", "exp_avg_sq"}
        if isinstance(optimizer, torch.optim.Adam)
        else {"momentum_buffer"}
    )
    for index, values in saved["state"].items():
        if index not in parameters or set(values) not in (known, set()):
            raise RunError(f"{what}: it has moments of another kind for parameter {index}; {mend}")
        for name, value in values.items():
            if not _is_moment(name, value, parameters[index]):
                raise RunError(f"{what}: '{name}' of parameter {index} has another form; {mend}")


def _same_setting(key: str, value: Any, ours: Mapping[str, Any]) -> bool:
    if key == "lr":  # which a schedule changes
        return type(value) in (int, float) and 0 <= value < math.inf
    if key in (
        "foreach",
        "fused",
        "capturable",
        "differentiable",
    ):  # how it computes, which may differ; it is not taken over
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
    tensors = [
        value
        for part in (state["model"], *state["plugin_states"].values())
        for value in part.values()
        if isinstance(value, Tensor)
    ]
    # What is replaced while a model is made counts too, hence some room.
    room = {
        "tensors": 8 * len(tensors) + 64,
        "elements": 8 * sum(map(Tensor.numel, tensors)) + 2**20,
        "modules": 64 * len(tensors) + 1024,
    }

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
        raise RunError(
            f"{what}: it asks for more weights than it has; use another one of the run"
        ) from None
    except Exception:  # of tensors without values, or of wrong settings: what is real comes up, in the same words, where it is built next
        pass
    finally:
        for hook in hooks:
            hook.remove()
