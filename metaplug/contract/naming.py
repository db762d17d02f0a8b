"""Names of parts in kebab-case, and how classes, modules and functions are written in it."""

from __future__ import annotations

import re


def is_kebab(name: str) -> bool:
    """Whether a name is lower-case letters, digits and single hyphens, with a letter first.

    >>> is_kebab("meta-sgd"), is_kebab("MetaSgd")
    (True, False)
    """
    return re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", name) is not None


def kebab(name: str) -> str:
    """Write CamelCase or snake_case in kebab-case.

    >>> kebab("GradientSharing"), kebab("gradient_sharing")
    ('gradient-sharing', 'gradient-sharing')
    """
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "-", name)
    return words.lower().replace("_", "-").strip("-")


def camel(name: str) -> str:
    """Write kebab-case in CamelCase.

    >>> camel("gradient-sharing")
    'GradientSharing'
    """
    return "".join(part[:1].upper() + part[1:] for part in name.split("-"))
