"""The hook reference: every hook as plain values, in a table, and on a page of its own."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.text import Text

from metaplug.contract import hookspecs
from metaplug.contract.hookspecs import KINDS, WHEN
from metaplug.report.catalogue import entries
from metaplug.report.console import new_table
from metaplug.report.tables import paragraph


@dataclass(frozen=True)
class HookEntry:
    """One hook, described.

    Attributes:
        name: of the hook, and of the method that implements it.
        kind: "fold", "choose", "collect" or "notify".
        when: it is called, in words.
        signature: with one argument a line.
        documentation: its docstring.
        plugins: the names of the installed plugins that implement it.
    """

    name: str
    kind: str
    when: str
    signature: str
    documentation: str
    plugins: tuple[str, ...]

    @property
    def summary(self) -> str:
        """The first paragraph of the documentation."""
        return self.documentation.split("\n\n")[0].replace("\n", " ")

    def values(self) -> dict[str, Any]:
        """The JSON values."""
        return asdict(self)


def hook_entries() -> list[HookEntry]:
    """Describe every hook, in the order of a meta-step; loads the installed plugins."""
    plugins = entries("plugin")
    return [
        HookEntry(
            name,
            kind,
            WHEN[name],
            signature_text(name),
            inspect.getdoc(getattr(hookspecs, name)) or "",
            tuple(plugin.name for plugin in plugins if name in plugin.hooks),
        )
        for name, kind in KINDS.items()
    ]


def signature_text(hook: str) -> str:
    """A hook's signature, one argument a line."""
    signature = inspect.signature(getattr(hookspecs, hook))
    arguments = "".join(f"\n    {argument}," for argument in signature.parameters.values())
    return f"{hook}({arguments}\n) -> {signature.return_annotation}".replace("'", "")


def hook_table(found: Sequence[HookEntry]) -> RenderableType:
    """List hooks under the moment at which they are called."""
    table = new_table("Hooks, in the order of a meta-step", "hook", "kind", "what it is for")
    table.columns[0].no_wrap = True
    moment = ""
    for entry in found:
        if entry.when != moment:
            moment = entry.when
            table.add_section()
            table.add_row("", "", Text(moment, style="bold"))
        table.add_row(entry.name, entry.kind, entry.summary)
    return table


def hook_page(entry: HookEntry) -> RenderableType:
    """Show one hook in full."""
    plugins = ", ".join(entry.plugins) or "none"
    return Group(
        Text.assemble((entry.name, "bold"), f": {entry.kind}, {entry.when}"),
        Padding(Text(entry.signature), (1, 0, 1, 2)),
        *map(paragraph, entry.documentation.split("\n\n")),
        Text.assemble("\n", ("installed plugins that implement it: ", "bold"), plugins, "\n"),
    )
