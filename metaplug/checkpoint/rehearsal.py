"""Try on the meta device whether a state fits the learner that a file asks for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as registration

from metaplug.checkpoint.fit import check_fit
from metaplug.checkpoint.state import Learner
from metaplug.errors import RunError


class _TooLargeError(Exception):
    """A model became larger than what was saved of it."""


def rehearse(make: Callable[[], Learner], state: Mapping[str, Any], origin: str) -> None:
    """Refuse a state that does not fit the learner that `make` makes, before that takes memory.

    A forged file may ask for any model: here its tensors have no values, and what is made may not
    become much larger than what was saved. What cannot be made like this is refused where it is.

    Args:
        make: makes the learner of the file, here under the meta device; is called once.
        state: as State has it.
        origin: where the state is from, for errors.

    Raises:
        RunError: as `give_state`.
    """
    parts = [state["model"], *state["plugin_states"].values()]
    sizes = [one.numel() for part in parts for one in part.values() if isinstance(one, Tensor)]
    room = [64 * len(sizes) + 1024, 8 * sum(sizes) + 2**20]  # of registrations, and of elements

    def took(_: nn.Module, __: str, value: object) -> None:
        room[0] -= 1
        room[1] -= value.numel() if isinstance(value, Tensor) else 0
        if min(room) < 0:
            raise _TooLargeError

    hooks = [
        registration.register_module_parameter_registration_hook(took),
        registration.register_module_buffer_registration_hook(took),
        registration.register_module_module_registration_hook(took),
    ]
    learner = None
    what = f"{origin} belongs to another model: it asks for more weights than it has"
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            learner = make()
    except Exception:  # tensors without values cannot be computed with
        if min(room) < 0:  # whoever made something else of the error
            raise RunError(f"{what}; use another one of the run") from None
    finally:
        for hook in hooks:
            hook.remove()
    if learner is not None:
        check_fit(learner, state, origin)
