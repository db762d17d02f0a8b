"""A plugin: an nn.Module with a validated configuration, whose hooks are marked `@hookimpl`."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any, ClassVar

import pluggy
from pydantic import Field
from torch import nn

from metaplug.contract.naming import is_kebab, kebab
from metaplug.errors import RequestError
from metaplug.settings import Settings, validated

hookimpl = pluggy.HookimplMarker("metaplug")
"""Marks a method of a plugin as the implementation of the hook of that name."""


class PluginConfig(Settings):
    """A plugin's configuration: frozen, without unknown fields. Describe and bound every field.

    >>> class Config(PluginConfig): strength: float = Field(0.1, ge=0, description="How strong.")
    >>> Config(strength=0.5)
    Config(strength=0.5)
    """


class LearnedPluginConfig(PluginConfig):
    """The configuration of a plugin that has meta-parameters.

    >>> LearnedPluginConfig(meta_lr=0.01).meta_lr
    0.01
    """

    meta_lr: float | None = Field(
        None, gt=0, le=10, description="Meta learning rate of the plugin; null: that of the model."
    )


def key_of(name: str) -> str:
    """Write a parameter's name without dots, as nn.ParameterDict and buffers take it.

    >>> key_of("head.weight")
    'head/weight'
    """
    return name.replace(".", "/")


class Plugin(nn.Module):
    """The base of every plugin. A subclass is final: it implements hooks, and has no subclass.

    Its meta-parameters are its `nn.Parameter`s and its statistics its buffers, both created in
    `setup`; devices, checkpoints and the meta-optimizer find them there.

    Args:
        name: of this instance in a chain; default: the class's name, in kebab-case.
        settings: the fields of `Config`; one that is unknown or out of bounds is a RequestError.

    >>> class HalfStep(Plugin):
    ...     @hookimpl
    ...     def transform_gradients(self, gradients):
    ...         return {name: gradient / 2 for name, gradient in gradients.items()}
    >>> HalfStep().name
    'half-step'
    """

    class Config(PluginConfig):
        """No fields."""

    config: PluginConfig

    runs_after: ClassVar[tuple[str, ...]] = ()
    """Plugins that must stand before this one in the list. Checked, never used to reorder."""
    conflicts_with: ClassVar[tuple[str, ...]] = ()
    """Plugins that cannot be used beside this one. A property, where the configuration decides."""
    couples_tasks: bool = False
    """Whether a task's result depends on other tasks of its batch; `task_mean` asks for it. Where
    the configuration decides, it is a property."""

    def __init__(self, *, name: str | None = None, **settings: Any) -> None:
        super().__init__()
        self.is_set_up = False
        self.name = self.kind() if name is None else name
        if not is_kebab(self.name):
            raise RequestError(
                f"'{self.name}' cannot name a plugin: use lower-case letters, digits and single "
                "hyphens, as in 'my-plugin'"
            )
        self.config = validated(self.Config, settings, f"plugin '{self.name}'")

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if Plugin not in cls.__bases__:
            fault = f"{cls.__name__} extends the plugin {cls.__bases__[0].__name__}"
            raise TypeError(f"{fault}: a plugin is final; subclass metaplug.Plugin instead")
        config: Any = cls.Config
        if not isinstance(config, type) or not issubclass(config, PluginConfig):
            raise TypeError(
                f"{cls.__name__}.Config is no subclass of metaplug.PluginConfig, so that settings "
                "would go unchecked: write class Config(PluginConfig)"
            )
        if "name" in config.model_fields:
            raise TypeError(
                f"{cls.__name__}.Config has the field 'name', which is that of the instance in a "
                "chain, so that it would never be set: call it otherwise, such as 'layer'"
            )
        if config.model_config.get("extra") != "forbid" or not config.model_config.get("frozen"):
            raise TypeError(
                f"{cls.__name__}.Config lets unknown fields pass, or its fields be changed, which "
                "no run could tell: take extra and frozen out of its model_config"
            )

    @classmethod
    def kind(cls) -> str:
        """The plugin's own name, whatever an instance is called: "gradient-sharing"."""
        return kebab(cls.__name__)

    @property
    def meta_lr(self) -> float | None:
        """The meta learning rate of this plugin's meta-parameters; None for the learner's."""
        return self.config.meta_lr if isinstance(self.config, LearnedPluginConfig) else None

    @property
    def transductive(self) -> bool:
        """Whether, as configured, adaptation sees query examples, or test tasks share.

        Results are then labelled transductive.
        """
        return False

    def matching(self, field: str, names: Sequence[str], what: str) -> tuple[str, ...]:
        """Return those of `names` that a pattern of a field of Config matches, in their order.

        Args:
            field: of patterns, in which * stands for any text.
            names: to choose from.
            what: they are, in the error.

        Raises:
            RequestError: a pattern that matches none.
        """
        patterns = tuple(getattr(self.config, field))
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in names):
                known = f"{', '.join(names[:6])}{', …' if len(names) > 6 else ''}"
                raise RequestError(
                    f"plugin '{self.name}': the pattern '{pattern}' matches none of the {what} "
                    f"({known or 'there are none'}): correct {field}"
                )
        return tuple(name for name in names if any(fnmatchcase(name, each) for each in patterns))
