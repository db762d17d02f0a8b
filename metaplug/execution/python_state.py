"""What Python decides in a step, and a trace would freeze: noted, to see a change, or refused."""

from __future__ import annotations

import dis
import inspect
import logging
import math
import types
from collections import deque
from collections.abc import Iterator, Mapping
from functools import cache
from itertools import chain
from typing import Any

import numpy as np
from torch import Tensor, nn

from metaplug.core.function_mode import FunctionMode
from metaplug.core.functional_model import PLAIN
from metaplug.execution.engine import Engine

MOST_ITEMS = 10_000
"""Items of a container that are looked at in every step; of a larger one, their number alone."""

MOST_BYTES = 2**20
"""Of an array of NumPy whose contents are looked at."""


class NothingRead(FunctionMode):
    """Refuses to give Python the numbers of a tensor, past which no trace sees.

    Of a single number, as by Tensor.item, the trace itself refuses it.
    """

    def call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func in _READING:
            raise TypeError(
                f"it reads a tensor's numbers by Tensor.{func.__name__}, which a compiled or "
                "captured step would freeze at its first values"
            )
        return func(*args, **kwargs)


_READING = frozenset({Tensor.numpy, Tensor.tolist, Tensor.__array__, Tensor.__dlpack__})


def python_state(engine: Engine) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What hooks and the loss may read beside registered tensors.

    Returns:
        The numbers and texts that plugins keep, which are part of a trace's key; and by name an
        image of everything else, which is not to change.
    """
    numbers: list[Any] = []
    kept: dict[str, Any] = {}
    for plugin in engine.chain.plugins:
        for path, module in plugin.named_modules():
            for name, value in vars(module).items():
                if name in _STRUCTURE:
                    continue
                if isinstance(value, PLAIN):
                    numbers.append(value)
                elif name not in _MODULES_OWN:
                    where = f"{path}.{name}".lstrip(".")
                    kept[f"'{where}' of plugin '{plugin.name}'"] = _image(value)
    for hook in engine.chain.order():
        for link in engine.chain.links(hook):
            for name, value in _outside(link.function):
                kept[f"'{name}', which plugin '{link.plugin.name}' reads in {hook},"] = _image(
                    value
                )
    loss = engine.inner.loss
    kept["the loss"] = _image(vars(loss)) if hasattr(loss, "__dict__") else None
    for name, value in _outside(loss):
        kept[f"'{name}', which the loss reads,"] = _image(value)
    return tuple(numbers), kept


_MODULES_OWN = frozenset(vars(nn.Module())) | {"config"}

_STRUCTURE = frozenset(
    name for name, value in vars(nn.Module()).items() if isinstance(value, dict | set)
)
"""Of these the attributes that are never numbers or texts."""


def _outside(function: Any, seen: frozenset[Any] = frozenset()) -> Iterator[tuple[str, Any]]:
    """The variables that a function reads from around it, by name.

    So do the functions of its module that it reads.
    """
    function = getattr(function, "__func__", function)
    if hasattr(function, "__wrapped__"):
        function = inspect.unwrap(function)
    if not isinstance(function, types.FunctionType) or function in seen:
        return
    for name, value in _own_outside(function):
        yield name, value
        if isinstance(value, types.ModuleType):  # of which even a look at its names takes long
            continue
        if getattr(value, "__module__", None) == function.__module__:
            yield from _outside(value, seen | {function})


def _own_outside(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    code = function.__code__
    for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=False):
        try:
            yield name, cell.cell_contents
        except ValueError:  # not bound yet
            continue
    for name in _globals_of(code):
        if name in function.__globals__:
            yield name, function.__globals__[name]


@cache
def _globals_of(code: types.CodeType) -> tuple[str, ...]:
    """The global names that code reads, and the code within it, as of comprehensions."""
    names = [each.argval for each in dis.get_instructions(code) if each.opname == "LOAD_GLOBAL"]
    within = [each for each in code.co_consts if isinstance(each, types.CodeType)]
    return tuple(dict.fromkeys([*names, *chain.from_iterable(map(_globals_of, within))]))


def _image(value: Any, depth: int = 4) -> Any:
    """Something that is equal for as long as a value is what it was."""
    if isinstance(value, _BY_IDENTITY):
        return id(value)
    if isinstance(value, float) and math.isnan(value):
        return "NaN"
    if value is None or isinstance(value, PLAIN):
        return value
    if isinstance(value, Tensor):
        return id(value), 0 if value.is_inference() else value._version
    if isinstance(value, np.ndarray) and value.nbytes <= MOST_BYTES and not value.dtype.hasobject:
        return id(value), value.shape, hash(value.tobytes())
    if depth == 0:
        return id(value)
    if isinstance(value, _CONTAINERS) and len(value) > MOST_ITEMS:
        return id(value), len(value)  # to look at each would cost more than the step
    if isinstance(value, Mapping):
        return [(_image(key, depth - 1), _image(each, depth - 1)) for key, each in value.items()]
    if isinstance(value, list | tuple | deque):
        return [_image(each, depth - 1) for each in value]
    if isinstance(value, set | frozenset):
        return sorted(map(id, value))
    return id(value), [_image(each, depth - 1) for each in getattr(value, "__dict__", {}).values()]


_BY_IDENTITY = (types.ModuleType, types.FunctionType, type, logging.Logger)
"""What is the same while it is the same object; a logger notes by itself which levels are on."""

_CONTAINERS = (Mapping, list, tuple, deque)
