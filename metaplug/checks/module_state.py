"""What a forward pass keeps on the modules of its model: the model is left without it, and what is kept may not matter to a later pass."""

from __future__ import annotations

import copy
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from metaplug.checks.model_changes import PLAIN

Place = tuple[str, str]
"""A module's path in its model, and the name of an attribute."""

_CONTAINERS = (list, set, deque, dict, OrderedDict, defaultdict)
_TORCHS_OWN = frozenset(vars(nn.Module()))


@contextmanager
def left_as_it_was(model: nn.Module, *, only_after_errors: bool = False) -> Iterator[set[Place]]:
    """Inside, modules may be written to; then they are as before, and the set that this gives holds where something was written.

    Args:
        only_after_errors: let what was written stand if no error is raised inside.
    """
    places, kept = list(model.named_modules(remove_duplicate=False)), set[Place]()
    before = {id(module): (module, dict(vars(module))) for _, module in places}
    attributes = [value for _, values in before.values() for value in values.values()]
    contents = {
        id(value): (value, copy.copy(value)) for value in attributes if type(value) in _CONTAINERS
    }
    stays = False
    try:
        yield kept
        stays = only_after_errors
    finally:
        if not stays:
            written = {
                at
                for at, pair in contents.items()
                if len({tuple(map(id, _flat(each))) for each in pair}) > 1
            }
            for path, module in places:
                then, now = before[id(module)][1], vars(module)
                kept |= {
                    (path, key)
                    for key in {**then, **now}
                    if now.get(key, kept) is not then.get(key, kept)
                }
                kept |= {(path, key) for key, value in then.items() if id(value) in written}
            for container, content in contents.values():
                container.clear()
                container.extend(content) if isinstance(
                    container, list | deque
                ) else container.update(content)
            for module, then in before.values():
                vars(module).clear()
                vars(module).update(then)


def separate(patched: nn.Module, places: Collection[Place]) -> None:
    """Give a patched model containers of its own at these places: patching leaves it those of the model, which it would write to."""
    copies: dict[int, Any] = {}
    for path, module in patched.named_modules(remove_duplicate=False):
        for key, value in vars(module).items():
            if (path, key) in places and key not in _TORCHS_OWN and type(value) in _CONTAINERS:
                vars(module)[key] = copies.setdefault(id(value), copy.copy(value))


def numbers(model: nn.Module, places: Collection[Place]) -> dict[Place, Any]:
    """The numbers and texts that stand at these places."""
    modules = model.named_modules(remove_duplicate=False)
    found = {(path, key): value for path, module in modules for key, value in vars(module).items()}
    return {
        place: value
        for place, value in found.items()
        if place in places and isinstance(value, PLAIN)
    }


def changed(before: dict[Place, Any], after: dict[Place, Any]) -> list[Place]:
    """Where another number or text stands than before; NaN is the same as NaN."""
    return [
        place
        for place, value in after.items()
        if place not in before or not _same(before[place], value)
    ]


def is_read(model: nn.Module, place: Place, forward: Callable[[], object]) -> bool:
    """Whether a forward pass, which writes this number, does anything with the last one but to add to it."""
    with left_as_it_was(model):
        attributes = vars(model.get_submodule(place[0]))
        attributes[place[1]] = given = _Tally()
        try:
            forward()
        except Exception:
            return True
        return attributes.get(place[1]) is given


class _Tally:
    """A number that can be added to, and that does not show what it is."""

    def __add__(self, other: object) -> _Tally:
        return _Tally() if isinstance(other, int | float) else NotImplemented

    __radd__ = __sub__ = __add__

    def _refuse(self, *_: object) -> Any:
        raise TypeError("a number that is only counted is not to be read")

    __bool__ = __eq__ = __ne__ = __hash__ = __repr__ = __format__ = _refuse


def _flat(container: Any) -> list[Any]:
    return (
        [each for pair in container.items() for each in pair]
        if isinstance(container, dict)
        else list(container)
    )


def _same(one: Any, other: Any) -> bool:
    return bool(one is other or one == other or (one != one and other != other))  # noqa: PLR0124 -- NaN
