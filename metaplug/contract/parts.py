"""What an installed part must be: one check for each kind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from metaplug.contract.function_plugins import is_shortest, plugin_of
from metaplug.contract.plugin import Plugin
from metaplug.contract.plugin_rules import check_plugin
from metaplug.contract.presets import Preset
from metaplug.errors import RunError


def checked(kind: str, name: str, value: Any, origin: str) -> Any:
    """What an entry point named, as a part of its kind: the class of a plugin or a task source, a Preset, or what makes a model.

    Args:
        origin: the distribution that it comes from.

    Raises:
        RunError: it is something else.
        RequestError: it is a plugin that breaks the contract.
    """
    expected, check = _KINDS[kind]
    part = check(name, value)
    if part is None:
        found = (
            f"the class {value.__name__}"
            if isinstance(value, type)
            else f"of type {type(value).__name__}"
        )
        raise RunError(
            f"the {kind} '{name}' of {origin} is {found}, not {expected}: correct its entry point, or uninstall it"
        )
    return part


def _plugin(name: str, value: Any) -> type[Plugin] | None:
    if is_shortest(value):
        value = plugin_of(value)
    if not isinstance(value, type) or not issubclass(value, Plugin) or value is Plugin:
        return None
    check_plugin(value, name)
    return value


def _preset(_: str, value: Any) -> Preset | None:
    return value if isinstance(value, Preset) else None


def _source(_: str, value: Any) -> type | None:
    # TaskSource stands above the contract; its mark is known here, so that the arrow need not run up.
    marked = getattr(value, "part_kind", None) == "task source"
    return value if isinstance(value, type) and marked else None


def _model(name: str, value: Any) -> Any:
    return value if callable(value) else None


_KINDS: dict[str, tuple[str, Callable[[str, Any], Any]]] = {
    "plugin": ("a subclass of metaplug.Plugin or a module with hooks", _plugin),
    "preset": ("a metaplug.Preset", _preset),
    "task source": ("a subclass of metaplug.tasks.TaskSource", _source),
    "model": ("a class or function that makes a model", _model),
}
