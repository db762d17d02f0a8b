"""Tables and pages of a configuration and of installed parts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from textwrap import dedent
from typing import Any

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.text import Text

from metaplug.contract.chain import Chain
from metaplug.contract.hookspecs import KINDS
from metaplug.experiments.configuration import Resolved, flatten
from metaplug.report.catalogue import Entry, plain
from metaplug.report.console import new_table
from metaplug.settings import own_first


def explanation(resolved: Resolved, chain: Chain, summary: str) -> RenderableType:
    """Show the algorithm, the plugins at every hook, and every setting with its origin."""
    order = chain.order()
    hooks = new_table(
        "Hooks, in the order in which a meta-step calls them",
        *("hook", "kind", "plugins, in the order of application"),
    )
    for hook in (hook for hook in KINDS if hook in order):
        hooks.add_row(hook, KINDS[hook], " → ".join(order[hook]))
    plugins = new_table("Plugins, in the order of the list", "plugin", "setting", "value", "origin")
    for plugin in chain.plugins:
        name, values = plugin.name, plugin.config.model_dump(mode="json")
        for row, field in enumerate(own_first(type(plugin.config))):
            origin = _origin(resolved, f"plugins.{name}.{field}")
            plugins.add_row("" if row else name, field, _shown(values[field]), origin)
        if not values:
            plugins.add_row(name, "no settings")
        plugins.add_section()
    config = new_table("Configuration", "field", "value", "origin")
    fields = resolved.config.model_dump(mode="json", exclude={"preset", "plugins"})
    for path, value in {"preset": resolved.config.algorithm, **flatten(fields)}.items():
        config.add_row(path, _shown(value), _origin(resolved, path))
    name = resolved.config.algorithm
    algorithm = Text.assemble((name, "bold"), f": {summary}" if summary else "", "\n")
    if not chain.plugins:
        plain_maml = "No plugins: plain MAML, meta-gradients through every inner step."
        return Group(algorithm, Text(plain_maml), config)
    return Group(algorithm, *([hooks] if order else []), plugins, config)


def _origin(resolved: Resolved, path: str) -> Text:
    origin = resolved.origins.get(path, "default")
    return Text(origin, style="dim" if origin == "default" else "bold")


def catalogue_table(entries: Sequence[Entry], title: str) -> RenderableType:
    """List installed parts. Names are never broken: they are what a reader copies."""
    table = new_table(title, "name", "kind", "from", "summary")
    table.columns[0].no_wrap = True
    for entry in entries:
        text = Text(entry.error, style="red") if entry.error else Text(entry.summary)
        table.add_row(entry.name, entry.kind, entry.origin, text)
    return table


def catalogue_page(entry: Entry) -> RenderableType:
    """Show one installed part: its documentation, hooks and settings."""
    title = Text(f"{entry.name}: a {entry.kind} of {entry.origin}\n", style="bold")
    if entry.error:
        return Group(title, Text(entry.error, style="red"))
    parts = [title, *map(_paragraph, entry.documentation.split("\n\n"))]
    parts += [Text.assemble((f"{fact}: ", "bold"), value) for fact, value in entry.facts.items()]
    if entry.fields:
        parts.append(Text("\nSettings", style="bold"))
    for field in entry.fields:
        form = ", ".join(filter(None, (field.type, field.bounds, f"default {field.default}")))
        parts.append(Text.assemble((field.name, "cyan"), f"  {form}"))
        parts.append(Padding(Text(field.description), (0, 0, 0, 4)))
    return Group(*parts, Text(""))


def _paragraph(block: str) -> RenderableType:
    """Wrap a paragraph of a docstring anew, but keep the lines of indented equations."""
    if block.startswith(" "):
        return Padding(Text(dedent(block) + "\n"), (0, 0, 0, 2))
    return Text(" ".join(block.split()) + "\n")


def values_table(title: str, values: Mapping[str, Any]) -> RenderableType:
    """List nested values, a row each."""
    table = new_table(title, "field", "value")
    for path, value in flatten(values).items():
        table.add_row(path, _shown(value))
    return table


def _shown(value: Any) -> Text:
    return Text(plain(value))
