"""Rules that a plugin's class must keep, most of which pluggy would pass over in silence."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

from pydantic.errors import PydanticUndefinedAnnotation, PydanticUserError
from torch import nn

from metaplug.contract import hookspecs
from metaplug.contract.hookspecs import KINDS
from metaplug.contract.plugin import Plugin
from metaplug.errors import RequestError, did_you_mean

VERSION = version("metaplug")


def implementations(plugin: type[Plugin]) -> dict[str, Callable[..., Any]]:
    """Map the hooks that a class implements, in the order of a meta-step, to their functions.

    >>> from metaplug_plugins.meta_sgd import MetaSgd
    >>> list(implementations(MetaSgd))
    ['setup', 'transform_learning_rates', 'end_meta_step']
    """
    members = inspect.getmembers(plugin, callable)
    marked = {_hook(name, function): function for name, function in members if _marks(function)}
    return {hook: marked[hook] for hook in KINDS if hook in marked}


def check_plugin(plugin: type[Plugin], name: str) -> None:
    """Refuse unmarked and misspelt hooks, arguments that no hook fills, and wrong declarations.

    Errors name the plugin by `name`, and the method or function.
    """
    seen: dict[str, str] = {}
    for attribute, function in inspect.getmembers(plugin, callable):
        marks, hook = _marks(function), _hook(attribute, function)
        if not marks and attribute not in KINDS:
            continue
        raw = inspect.getattr_static(plugin, attribute)
        is_static = isinstance(raw, staticmethod)
        member = f"function {function.__name__}" if is_static else f"method {attribute}"
        where = f"plugin '{name}': {member}"
        if not marks:
            raise RequestError(
                f"{where} overrides a hook but is not marked: put @hookimpl above it, or rename it"
            )
        if hook not in KINDS and marks["optionalhook"]:
            continue
        if hook not in KINDS:
            raise RequestError(
                f"{where} is marked @hookimpl, but metaplug {VERSION} has no hook '{hook}' "
                f"({did_you_mean(hook, KINDS)}): rename it, or install a newer metaplug, which may "
                "have it"
            )
        if hook in seen:
            both = f"{seen[hook]} and {member} both implement {hook}"
            raise RequestError(f"plugin '{name}': {both}: make one of the two")
        seen[hook] = member
        if marks["tryfirst"] or marks["trylast"] or marks["hookwrapper"] or marks["wrapper"]:
            raise RequestError(
                f"{where} asks for a place of its own: the order is the configured list; "
                "take tryfirst, trylast and wrapper out"
            )
        _check_arguments(where, hook, function, owned=inspect.isfunction(raw))
    own = [
        key
        for key, value in vars(plugin).items()
        if inspect.isfunction(value) and not key.startswith("_") and not _marks(value)
    ]
    if own and not seen:
        raise RequestError(
            f"plugin '{name}' implements no hook, so that nothing would call its method {own[0]} "
            f"({did_you_mean(own[0], KINDS)}): name it as a hook and put @hookimpl above it"
        )
    for declared in ("runs_after", "conflicts_with"):
        names = getattr(plugin, declared)
        if isinstance(names, property):
            continue  # as the settings say, which a class does not have
        if not isinstance(names, tuple) or not all(isinstance(each, str) for each in names):
            fault = f"plugin '{name}': {declared} = {names!r} is no tuple of names"
            raise RequestError(f"{fault}: write it as in ('gradient-sharing',)")
    try:
        plugin.Config.model_rebuild()
    except (PydanticUserError, PydanticUndefinedAnnotation) as error:
        raise RequestError(
            f"plugin '{name}': its Config cannot be made ({str(error).splitlines()[0]}): "
            "import there, when the module runs, what its fields are annotated with"
        ) from None


def check_registered(plugin: Plugin) -> None:
    """Refuse parameters in a container of Python's, where no optimizer or checkpoint finds them."""
    own = {id(parameter) for parameter in plugin.parameters()}
    for attribute, value in vars(plugin).items():
        held = value.values() if isinstance(value, dict) else value
        if not isinstance(value, list | tuple | dict) or attribute in _TORCHS_OWN:
            continue
        found = [
            parameter
            for each in held
            for parameter in _parameters_of(each)
            if parameter.requires_grad and id(parameter) not in own
        ]
        if found:
            raise RequestError(
                f"plugin '{plugin.name}' has parameters in the {type(value).__name__} "
                f"'{attribute}', where nothing would train or save them: make it an "
                "nn.ParameterList, nn.ParameterDict or nn.ModuleList, or call "
                "requires_grad_(False) on what shall not learn"
            )


def _parameters_of(value: object) -> list[nn.Parameter]:
    if isinstance(value, nn.Module):
        return list(value.parameters())
    return [value] if isinstance(value, nn.Parameter) else []


_TORCHS_OWN = frozenset(vars(nn.Module()))


def _check_arguments(where: str, hook: str, function: Callable[..., Any], *, owned: bool) -> None:
    """`owned`: the first argument is the instance."""
    known = list(inspect.signature(getattr(hookspecs, hook)).parameters)
    parameters = list(inspect.signature(function).parameters.values())
    if owned and (not parameters or parameters[0].name in known):
        raise RequestError(
            f"{where} has no self, so that it would get the plugin as its first argument: "
            "write self before the others"
        )
    for parameter in parameters[owned:]:
        if parameter.default is not parameter.empty:
            fault = f"{where} gives an argument a default, so that the hook would never fill it"
            raise RequestError(f"{fault}: take the default out")
        if parameter.kind not in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
            raise RequestError(
                f"{where} has the argument {parameter.name} after a star, which the hook would "
                f"never fill: name those that you need of {', '.join(known)}"
            )
        if parameter.name not in known:
            raise RequestError(
                f"{where} asks for '{parameter.name}', which {hook} does not have in metaplug "
                f"{VERSION} ({did_you_mean(parameter.name, known)}): rename it, or install a newer "
                "metaplug, which may have it"
            )


def _marks(function: Any) -> dict[str, Any]:
    marks: dict[str, Any] | None = getattr(function, "metaplug_impl", None)
    return marks or {}


def _hook(attribute: str, function: Any) -> str:
    """The hook that a member implements, if it is marked."""
    return _marks(function).get("specname") or attribute
