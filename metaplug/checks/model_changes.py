"""What is changed of a model after its learner was made.

The learner runs a clone of the model's structure, which would not follow.
"""

from __future__ import annotations

from collections.abc import Collection
from operator import itemgetter
from typing import Any

from torch import Tensor, nn

from metaplug.checks.model_hooks import hooked
from metaplug.core.functional_model import PLAIN, Place
from metaplug.errors import RequestError

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


class ModelChanges:
    """A model as its learner was made with it.

    Values of parameters and buffers may change, and `train` and `eval` may be called: the learner
    follows the first, and sets the mode itself.
    """

    def __init__(self, model: nn.Module) -> None:
        modules = list(model.named_modules(remove_duplicate=False))
        self._held = [
            (path, holder, dict(holder), [*map(id, holder.values())])
            for path, module in modules
            for holder in (module._parameters, module._modules)
        ]
        # Other buffers are followed, as long as there are as many.
        self._buffers = [(path, module._buffers, {*module._buffers}) for path, module in modules]
        self._parameters = [
            (name, parameter, parameter.requires_grad, parameter.dtype)
            for name, parameter in model.named_parameters()
        ]
        self._watch([(path, vars(module), _settings(module)) for path, module in modules])
        self._hooks = [vars(module)[kind] for _, module in modules for kind in _HOOKS]
        self.accept(())

    def accept(self, written: Collection[Place]) -> None:
        """Take the present hooks for tried, and leave out what forward passes write themselves."""
        self._hooked = [*map(tuple, self._hooks)]
        self._watch(
            [
                (path, at, {key: each for key, each in held.items() if (path, key) not in written})
                for path, at, held, *_ in self._settings
            ]
        )

    def check(self) -> bool:
        """Return whether other hooks stand at the model than were tried, or any at a parameter.

        Raises:
            RequestError: something else was changed; it is named.
        """
        for path, holder, before, identities in self._held:
            if [*map(id, holder.values())] != identities:
                names = {**before, **holder}
                name = next(key for key in names if holder.get(key) is not before.get(key))
                raise _changed(
                    f"the model's '{_join(path, name)}' was replaced, added or taken away"
                )
        for path, buffers, known in self._buffers:
            if buffers.keys() != known:
                name = next(iter(known ^ buffers.keys()))
                raise _changed(f"the model's '{_join(path, name)}' was added or taken away")
        for name, parameter, trained, dtype in self._parameters:
            if parameter.requires_grad is not trained:
                change = f"from {trained} to {not trained}"
                raise _changed(f"requires_grad of the model's '{name}' was changed {change}")
            if parameter.dtype is not dtype:
                change = f"from {dtype} to {parameter.dtype}"
                raise _changed(f"dtype of the model's '{name}' was changed {change}")
        for path, attributes, held, get, values in self._settings:
            try:
                same = bool(get(attributes) == values)
            except (KeyError, RuntimeError, TypeError, ValueError):
                same = False  # one is gone, or cannot be compared
            if not same:
                _compare(path, attributes, held)
        if any(hooked(parameter) for _, parameter, *_ in self._parameters):
            return True
        return self._hooked != [*map(tuple, self._hooks)]

    def _watch(self, places: list[tuple[str, dict[str, Any], dict[str, Any]]]) -> None:
        self._settings = [
            (path, attributes, held, get := itemgetter(*held), get(held))
            for path, attributes, held in places
            if held
        ]


def _settings(module: nn.Module) -> dict[str, Any]:
    """What a forward pass may read of a module beside its tensors, by name."""
    return {
        key: value
        for key, value in vars(module).items()
        if key != "training"
        and (
            isinstance(value, PLAIN)
            or not (key.startswith("_") or value is None or isinstance(value, Tensor))
        )
    }


def _compare(path: str, attributes: dict[str, Any], held: dict[str, Any]) -> None:
    for key, value in held.items():
        now = attributes.get(key)
        plain = isinstance(value, PLAIN) and isinstance(now, PLAIN)
        nan = now != now and value != value if plain else False  # noqa: PLR0124
        if now is not value and not (plain and type(now) is type(value) and (nan or now == value)):
            change = f" from {value!r} to {now!r}" if plain else ""
            raise _changed(f"the model's '{_join(path, key)}' was changed{change}")


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _changed(what: str) -> RequestError:
    return RequestError(
        f"{what} after the learner was made, which goes on as it was: "
        "make a new learner of the changed model"
    )
