"""The shortest forms of a plugin: a module of functions marked `@hookimpl`, or one function."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import FunctionType, ModuleType
from typing import Any, TypeAlias, cast

from metaplug.contract.hookspecs import KINDS
from metaplug.contract.naming import is_kebab, kebab
from metaplug.contract.plugin import Plugin, hookimpl
from metaplug.errors import RequestError, did_you_mean

Shortest: TypeAlias = ModuleType | Callable[..., Any]
"""A module, or a function; not a class, nor any other object that can be called."""

_DECLARATIONS = ("runs_after", "conflicts_with", "couples_tasks")


def is_shortest(part: Any) -> bool:
    """Whether `plugin_of` takes `part`."""
    return isinstance(part, FunctionType | ModuleType)


def plugin_of(part: Shortest) -> type[Plugin]:
    """Make a plugin's class, without configuration, of a module or function.

    A module gives its last name in kebab-case, a function its own. What a class would declare
    (`runs_after`, `conflicts_with`, `couples_tasks`) stands in the module, or is an attribute of
    the function.

    Args:
        part: a module with at least one function marked `@hookimpl`; or a function that has the
            name of a hook, or is marked `@hookimpl(specname=HOOK)`.

    Raises:
        RequestError: it has no hook, one twice, or `setup` or `commit`, without a place for state.

    >>> def transform_inner_losses(losses): return losses * 2
    >>> plugin_of(transform_inner_losses).kind()
    'transform-inner-losses'
    """
    is_module = isinstance(part, ModuleType)
    name, hooks = kebab(part.__name__.rpartition(".")[2]), dict[str, Any]()
    for function in _of_module(part) if isinstance(part, ModuleType) else [_of_function(part)]:
        hook = getattr(function, "metaplug_impl", {}).get("specname") or function.__name__
        if hook in ("setup", "commit"):
            raise RequestError(
                f"plugin '{name}': function {function.__name__} is for meta-parameters and "
                f"statistics, for which a {'module' if is_module else 'function'} has no place: "
                "write a subclass of metaplug.Plugin"
            )
        if hook in hooks:
            both = f"{hooks[hook].__name__} and {function.__name__}"
            fault = f"plugin '{name}': functions {both} both implement {hook}"
            raise RequestError(f"{fault}: make one of the two")
        hooks[hook] = function
    place = part.__name__ if is_module else part.__module__
    namespace = {
        **{hook: staticmethod(function) for hook, function in hooks.items()},
        **{key: value for key, value in vars(part).items() if key in _DECLARATIONS},
        "__doc__": inspect.getdoc(part) or "",
        "__module__": place,
        # As entry points have it.
        "written_as": place if is_module else f"{place}:{getattr(part, '__qualname__', '')}",
    }
    kind = name if is_kebab(name) else kebab(next(iter(hooks)))
    return cast("type[Plugin]", type(kind, (Plugin,), namespace))


def _of_module(module: ModuleType) -> list[FunctionType]:
    """Its marked functions, and its own that lack the mark, which are refused as in a class."""
    functions = [value for value in vars(module).values() if isinstance(value, FunctionType)]
    if not any(hasattr(function, "metaplug_impl") for function in functions):
        raise RequestError(
            f"the module {module.__name__} is no plugin, as no function of it is marked @hookimpl: "
            f"mark its hooks, or name a class as {module.__name__}:CLASS"
        )
    return [
        function
        for function in functions
        if hasattr(function, "metaplug_impl")
        or (function.__module__ == module.__name__ and function.__name__ in KINDS)
    ]


def _of_function(function: Any) -> FunctionType:
    if not hasattr(function, "metaplug_impl"):
        if function.__name__ not in KINDS:
            raise RequestError(
                f"the function {function.__name__} is no plugin, as no hook has its name "
                f"({did_you_mean(function.__name__, KINDS)}): name it as a hook, or mark it "
                "@hookimpl(specname=HOOK)"
            )
        hookimpl(function)
    return cast("FunctionType", function)
