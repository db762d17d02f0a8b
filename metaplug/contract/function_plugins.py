"""The shortest forms of a plugin: a module of functions that are marked `@hookimpl`, or one function."""

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

_STATEFUL = ("setup", "commit")


def is_shortest(part: Any) -> bool:
    """Whether `part` is of a form that `plugin_of` takes."""
    return isinstance(part, FunctionType | ModuleType)


def plugin_of(part: Shortest) -> type[Plugin]:
    """The plugin that a module or a function is, as a class without configuration.

    A module is called as its last part in kebab-case, a function as itself. What a class would declare (`runs_after`, `conflicts_with`,
    `couples_tasks`) stands in the module, or is an attribute of the function.

    Args:
        part: a module with at least one function that is marked `@hookimpl`; or a function that is named as a hook, which marks it, or is
            marked `@hookimpl(specname=HOOK)`.

    Raises:
        RequestError: there is no hook in it; two functions implement one hook; or it has `setup` or `commit`, and no place for state.
    """
    functions = _of_module(part) if isinstance(part, ModuleType) else [_of_function(part)]
    name = kebab(part.__name__.rpartition(".")[2])
    hooks: dict[str, Any] = {}
    for function in functions:
        hook = _hook(function)
        if hook in _STATEFUL:
            raise RequestError(
                f"plugin '{name}': function {function.__name__} is for meta-parameters and statistics, for which a {_noun(part)} has no "
                "place: write a subclass of metaplug.Plugin"
            )
        if hook in hooks:
            both = f"{hooks[hook].__name__} and {function.__name__}"
            raise RequestError(
                f"plugin '{name}': functions {both} both implement {hook}: make one of the two"
            )
        hooks[hook] = function
    declared = {
        key: value
        for key, value in vars(part).items()
        if key in ("runs_after", "conflicts_with", "couples_tasks")
    }
    namespace = {
        **{hook: staticmethod(function) for hook, function in hooks.items()},
        **declared,
        "__doc__": inspect.getdoc(part) or "",
        "__module__": part.__name__ if isinstance(part, ModuleType) else part.__module__,
        "written_as": part.__name__
        if isinstance(part, ModuleType)
        else f"{part.__module__}:{part.__qualname__}",  # as entry points have it
    }
    return cast(
        "type[Plugin]",
        type(name if is_kebab(name) else kebab(next(iter(hooks))), (Plugin,), namespace),
    )


def _of_module(module: ModuleType) -> list[FunctionType]:
    """Its marked functions, and those of its own that should be, which are refused with every other plugin's."""
    functions = [value for value in vars(module).values() if isinstance(value, FunctionType)]
    if not any(hasattr(function, "metaplug_impl") for function in functions):
        raise RequestError(
            f"the module {module.__name__} is no plugin, as no function of it is marked @hookimpl: mark its hooks, "
            f"or name a class as {module.__name__}:CLASS"
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
                f"the function {function.__name__} is no plugin, as no hook has its name ({did_you_mean(function.__name__, KINDS)}): "
                "name it as a hook, or mark it @hookimpl(specname=HOOK)"
            )
        hookimpl(function)
    return cast("FunctionType", function)


def _hook(function: FunctionType) -> str:
    specname: str | None = getattr(function, "metaplug_impl", {}).get("specname")
    return specname or function.__name__


def _noun(part: Shortest) -> str:
    return "module" if isinstance(part, ModuleType) else "function"
