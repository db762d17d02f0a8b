"""Names of parts: what is a valid one, and how those of classes, modules and functions are written in kebab-case."""

from __future__ import annotations

import re

_KEBAB = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")


def is_kebab(name: str) -> bool:
    """Whether a name is lower-case letters, digits and single hyphens, with a letter first."""
    return _KEBAB.fullmatch(name) is not None


def kebab(name: str) -> str:
    """CamelCase or snake_case in kebab-case: "GradientSharing" and "gradient_sharing" are "gradient-sharing"."""
    return (
        re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "-", name)
        .lower()
        .replace("_", "-")
        .strip("-")
    )


def camel(name: str) -> str:
    """kebab-case in CamelCase: "gradient-sharing" is "GradientSharing"."""
    return "".join(part[:1].upper() + part[1:] for part in name.split("-"))
