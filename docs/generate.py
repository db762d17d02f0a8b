"""Fills the pages that the code knows best, when the site is built: `<!-- hooks -->` becomes the hook reference."""

from __future__ import annotations

import inspect
from typing import Any

from metaplug import hookspecs


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Called by MkDocs for every page."""
    return markdown.replace("<!-- hooks -->", hook_reference())


def hook_reference() -> str:
    """Every hook of the contract: its signature, kind and description, in the order of a meta-step."""
    return "\n\n".join(_section(name, kind) for name, kind in hookspecs.KINDS.items())


def _section(name: str, kind: str) -> str:
    function = getattr(hookspecs, name)
    signature = str(inspect.signature(function)).replace("'", "")
    return f"## `{name}`\n\n*{kind}*\n\n```text\n{name}{signature}\n```\n\n{inspect.getdoc(function)}"
