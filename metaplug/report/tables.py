"""Tables and pages of a configuration and of installed parts."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import groupby, pairwise
from operator import itemgetter
from textwrap import dedent
from typing import Any

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.text import Text

from metaplug.contract.chain import Chain
from metaplug.contract.hookspecs import KINDS
from metaplug.contract.inner_step import InnerStep
from metaplug.errors import MetaplugError
from metaplug.experiments.configuration import flatten
from metaplug.experiments.resolving import Resolved
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
    loop = new_table("Inner loop", "part", "what it is")
    for what, answer in inner_loop(resolved, chain).items():
        loop.add_row(what, answer)
    name = resolved.config.algorithm
    algorithm = Text.assemble((name, "bold"), f": {summary}" if summary else "", "\n")
    if not chain.plugins:
        plain_maml = "No plugins: plain MAML, meta-gradients through every inner step."
        return Group(algorithm, Text(plain_maml), config)
    return Group(algorithm, *([hooks] if order else []), loop, plugins, config)


def inner_loop(resolved: Resolved, chain: Chain) -> dict[str, str]:
    """Say what adapts, from where, by which update, and how it is differentiated."""
    order, learner = chain.order(), resolved.config.learner
    by = {hook: " → ".join(names) for hook, names in order.items()}
    selects, starts = by.get("select_adapted"), by.get("initialize_parameters")
    updates = by.get("update_parameters")
    found = {
        "adapts": f"the parameters that {selects} selects"
        if selects
        else "every trainable parameter of the model",
        "starts": f"the shared values, as {starts} changes them for each task"
        if starts
        else "the shared values, in every task",
        "update": f"{updates}, in the place of {learner.inner_optimizer}"
        if updates
        else f"the inner optimizer, {learner.inner_optimizer}",
        "derivative order": _orders(
            chain, learner.inner_steps, resolved.config.training.iterations
        ),
        "meta-gradients": by.get("compute_meta_gradients", "through the loop"),
    }
    if names := order.get("task_parameters"):
        variables = ", ".join(f"{name}.*" for name in names)
        found["adapts"] += f", and the task parameters {variables}"
    return found


_SAMPLES = 200
"""Iterations that are asked at first; between two that differ, the change is searched."""


def _orders(chain: Chain, steps: int, iterations: int) -> str:
    """Say the derivative order of every step, and the iterations from which it is another one."""

    @cache
    def orders(iteration: int) -> tuple[int, ...]:
        loop = [InnerStep(k, steps, steps, iteration, iterations, True) for k in range(steps)]
        return tuple(chain.choose("derivative_order", 2, step=step) for step in loop)

    try:
        asked = sorted({0, iterations - 1, *range(0, iterations, -(-iterations // _SAMPLES))})
        changes = [0]
        for before, after in pairwise(asked):
            if orders(before) != orders(after):
                between = range(before + 1, after + 1)
                place = bisect_left(between, True, key=lambda each: orders(each) != orders(before))
                changes.append(between[place])
    except MetaplugError:  # a plugin that needs what its setup creates
        return f"as {' → '.join(chain.order()['derivative_order'])} decides in the run"
    words = []
    for change in changes:
        since = f" from iteration {change + 1} on" if len(changes) > 1 else ""
        words.append(f"{_by_step(orders(change))}{since}")
    return "; ".join(words)


def _by_step(orders: Sequence[int]) -> str:
    """Say 2 for all steps of order 2, and 0 (steps 0 to 3), 1 (step 4) for others."""
    runs = [
        (order, [k for k, _ in run]) for order, run in groupby(enumerate(orders), itemgetter(1))
    ]
    if len(runs) < 2:
        return str(runs[0][0] if runs else 2)
    return ", ".join(
        f"{order} (step{f's {run[0]} to {run[-1]}' if len(run) > 1 else f' {run[0]}'})"
        for order, run in runs
    )


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
    parts = [title, *map(paragraph, entry.documentation.split("\n\n"))]
    parts += [Text.assemble((f"{fact}: ", "bold"), value) for fact, value in entry.facts.items()]
    if entry.fields:
        parts.append(Text("\nSettings", style="bold"))
    for field in entry.fields:
        form = ", ".join(filter(None, (field.type, field.bounds, f"default {field.default}")))
        parts.append(Text.assemble((field.name, "cyan"), f"  {form}"))
        parts.append(Padding(Text(field.description), (0, 0, 0, 4)))
    return Group(*parts, Text(""))


def paragraph(block: str) -> RenderableType:
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
