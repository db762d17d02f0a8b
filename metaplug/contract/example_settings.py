"""Settings under which a plugin does something, as its Config itself gives them."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel


def example_settings(config: type[BaseModel]) -> dict[str, Any]:
    """Return the first example of every field that has any; the others keep their defaults.

    A field without a default needs one, and so does a field by whose default a plugin is off:
    `Field(examples=[0.1], ...)`. Tables and documentation make a plugin with these.

    >>> from metaplug_plugins.gradient_clipping import GradientClipping
    >>> example_settings(GradientClipping.Config)
    {'max_norm': 0.1}
    """
    fields = config.model_fields.items()
    return {name: info.examples[0] for name, info in fields if info.examples}
