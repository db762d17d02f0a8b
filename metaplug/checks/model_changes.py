"""What is changed of a model after its learner was made: the learner runs a copy of the model's structure, and would not see it."""

from __future__ import annotations

from collections.abc import Collection
from operator import itemgetter
from typing import Any

from torch import Tensor, nn

from metaplug.errors import RequestError

PLAIN: tuple[type, ...] = (bool, int, float, complex, str)
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


class Unchanged:
    """A model as its learner was made with it.

    Values of parameters and buffers may change, and `train` and `eval` may be called: the learner follows the first, and sets the mode
    itself.
    """

    def __init__(self, model: nn.Module) -> None:
        modules = list(model.named_modules(remove_duplicate=False))
        holders = [
            (name, holder)
            for name, module in modules
            for holder in (module._parameters, module._modules)
        ]
        self._held = [
            (name, holder, dict(holder), [*map(id, holder.values())]) for name, holder in holders
        ]
        self._parameters = [
            (name, parameter, parameter.requires_grad, parameter.dtype)
            for name, parameter in model.named_parameters()
        ]
        settled = [
            (name, vars(module), held) for name, module in modules if (held := settings(module))
        ]
        self._settings = [
            (*place, get := itemgetter(*place[2]), get(place[2])) for place in settled
        ]
        self._hooks = [vars(module)[kind] for _, module in modules for kind in _HOOKS]
        self.accept()

    def accept(self) -> None:
        """Take the hooks that the model has now for tried."""
        self._hooked = [*map(tuple, self._hooks)]

    def put_back(self) -> None:
        """Give the modules the attributes that they were made a learner of with; not for long: see left_as_it_was."""
        for _, attributes, held, *_ in self._settings:
            attributes.update(held)

    def leave_out(self, places: Collection[tuple[str, str]]) -> None:
        """Look no longer at what forward passes themselves write, by module and attribute."""
        kept = [
            (name, at, {key: value for key, value in held.items() if (name, key) not in places})
            for name, at, held, *_ in self._settings
        ]
        self._settings = [
            (*place, get := itemgetter(*place[2]), get(place[2])) for place in kept if place[2]
        ]

    def check(self) -> bool:
        """Whether other hooks stand at the model than were tried, so that it is to be tried again.

        Raises:
            RequestError: something else was changed; it is named.
        """
        for name, holder, before, identities in self._held:
            if [*map(id, holder.values())] != identities:
                changed = next(
                    key
                    for key in {**before, **holder}
                    if holder.get(key, holder) is not before.get(key, before)
                )
                raise _changed(
                    f"the model's '{_join(name, changed)}' was replaced, added or taken away"
                )
        for name, parameter, trained, dtype in self._parameters:
            if parameter.requires_grad is not trained or parameter.dtype is not dtype:
                was, now = (
                    (trained, not trained)
                    if parameter.requires_grad is not trained
                    else (dtype, parameter.dtype)
                )
                raise _changed(
                    f"{'dtype' if was is dtype else 'requires_grad'} of the model's '{name}' was changed from {was} to {now}"
                )
        for name, attributes, held, get, values in self._settings:
            try:
                same = bool(get(attributes) == values)
            except (
                KeyError,
                RuntimeError,
                TypeError,
                ValueError,
            ):  # one is gone, or is now what cannot be compared
                same = False
            if not same:
                _compare(name, attributes, held)
        return self._hooked != [*map(tuple, self._hooks)]


def settings(module: nn.Module) -> dict[str, Any]:
    """What a forward pass may read of a module beside its tensors, by name: numbers and text, and what else is public and no tensor."""
    return {
        key: value
        for key, value in vars(module).items()
        if key != "training"
        and (
            isinstance(value, PLAIN)
            or not (key.startswith("_") or value is None or isinstance(value, Tensor))
        )
    }


def _compare(name: str, attributes: dict[str, Any], held: dict[str, Any]) -> None:
    for key, value in held.items():
        now = attributes.get(key)
        if now is not value and (
            type(now) is not type(value) or not isinstance(value, PLAIN) or now != value
        ):
            was = (
                f" from {value!r} to {now!r}"
                if isinstance(value, PLAIN) and isinstance(now, PLAIN)
                else ""
            )
            raise _changed(f"the model's '{_join(name, key)}' was changed{was}")


def _join(name: str, key: str) -> str:
    return f"{name}.{key}" if name else key


def _changed(what: str) -> RequestError:
    return RequestError(
        f"{what} after the learner was made, which goes on as it was: make a new learner of the changed model"
    )
