"""The matrix of plugins that go together, and the reasons: for a terminal and for a page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from rich.console import Group, RenderableType
from rich.text import Text

from metaplug.experiments.compositions import Compositions, Pair, Verdict
from metaplug.report.console import new_table

MARKS: Mapping[Verdict, str] = {"composes": "·", "order matters": "⇄", "refused": "✗"}
LEGEND = "· composes, the order means nothing; ⇄ the order matters; ✗ refused"
_STYLES: Mapping[Verdict, str] = {"composes": "dim", "order matters": "yellow", "refused": "red"}

Reason = tuple[str, list[str], Verdict, str]
"""A plugin, those beside which it has the same verdict for the same reason, and these two."""


def composition_table(found: Compositions, name: str | None = None) -> RenderableType:
    """Show the matrix with the reasons below it; or, by name, what stands beside one plugin."""
    shown: list[RenderableType] = []
    if name is None:
        rows = list(matrix(found))
        numbers = (number for number, *_ in rows)
        table = new_table("Which plugins go together", "", "plugin", *numbers)
        table.collapse_padding, table.padding = False, (0, 1, 0, 0)
        for column in table.columns:
            column.no_wrap = True
        for number, plugin, marks in rows:
            table.add_row(number, plugin, *(_marked(verdict) for verdict in marks))
        shown += [table, Text(f"{LEGEND}\n")]
        reasons = new_table("Why", "plugin", "beside", "verdict", "reason")
        for plugin, others, verdict, text in why(found.pairs):
            reasons.add_row(plugin, ", ".join(others), Text(verdict, _STYLES[verdict]), Text(text))
    else:
        reasons = new_table(f"Beside {name}", "plugin", "verdict", "reason")
        for pair in found.pairs:
            other = pair.second if pair.first == name else pair.first
            words = Text("\n".join(pair.reasons))
            reasons.add_row(other, Text(pair.verdict, _STYLES[pair.verdict]), words)
    shown += [reasons] if reasons.rows else []
    left_out = new_table("Cannot be tried", "plugin", "reason")
    for plugin, fault in found.left_out.items():
        if name in (None, plugin):
            left_out.add_row(plugin, Text(fault, "red"))
    return Group(*shown, *([left_out] if left_out.rows else []))


def matrix(found: Compositions) -> Iterator[tuple[str, str, list[Verdict | None]]]:
    """Give the rows of the matrix: number, plugin, and the verdict beside each; None for itself."""
    verdicts = {frozenset((pair.first, pair.second)): pair.verdict for pair in found.pairs}
    for number, name in enumerate(found.plugins, 1):
        marks = [verdicts.get(frozenset((name, other))) for other in found.plugins]
        yield str(number), name, marks


def why(pairs: Sequence[Pair]) -> list[Reason]:
    """Gather the pairs that do not just compose, by their first plugin, verdict and reason."""
    grouped: dict[tuple[str, Verdict, str], list[str]] = {}
    for pair in pairs:
        if pair.verdict != "composes":
            key = (pair.first, pair.verdict, "\n".join(pair.reasons))
            grouped.setdefault(key, []).append(pair.second)
    ordered = sorted(grouped.items(), key=lambda each: each[0][1] != "refused")
    return [(first, others, verdict, text) for (first, verdict, text), others in ordered]


def _marked(verdict: Verdict | None) -> Text:
    return Text() if verdict is None else Text(MARKS[verdict], _STYLES[verdict])
