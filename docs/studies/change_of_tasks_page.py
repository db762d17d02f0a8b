"""The cells of change_of_tasks.py that are kept, and the page that shows them."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterable, Iterator
from itertools import permutations, product
from pathlib import Path
from statistics import fmean
from textwrap import fill
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor
from wider_field import mean_and_half, pooled

from metaplug.report.figures import COLOURS, DPI, FAINT, GREY, INK, WIDTH, save, style

DATA = ("letters", "characters", "objects")
VARIANTS = {
    "maml": "maml",
    "keep": "maml+gradient-sharing:start={}",
    "forget": "maml+gradient-sharing",
    "frozen": "maml+gradient-sharing:start={},statistics=frozen",
}
"""By name; {} is the checkpoint of the tasks before."""

FORM = {"ways": 5, "shots": 1, "queries": 5}
QUERIES = FORM["ways"] * FORM["queries"]
RATES = (0.1, 0.4)
SEEDS = (0, 1)

STUDY = Path(__file__).with_name("change_of_tasks.py")
RESULTS = STUDY.with_suffix(".jsonl")

Key = tuple[str, str, str, float, int]
"""Before, after, variant, inner rate and seed."""

Cells = dict[Key, dict[str, Any]]


def wanted(
    seeds: Iterable[int] = SEEDS,
    rates: Iterable[float] = RATES,
    before: Iterable[str] = DATA,
    after: Iterable[str] = DATA,
) -> Iterator[Key]:
    """The keys of cells, in the order of their turn."""
    for seed, rate, first, then, variant in product(seeds, rates, before, after, VARIANTS):
        yield first, then, variant, rate, seed


def finished() -> Cells:
    """The cells in the file."""
    if not RESULTS.exists():
        return {}
    cells = map(json.loads, RESULTS.read_text(encoding="utf-8").splitlines())
    return {tuple(cell["key"]): cell for cell in cells}


def tables(cells: Cells) -> str:
    """The tables in Markdown, one for each kind of tasks after and rate."""
    return "\n\n".join(
        _table(cells, after, rate)
        for after, rate in product(DATA, RATES)
        if any((key[1], key[3]) == (after, rate) for key in cells)
    )


def _table(cells: Cells, after: str, rate: float) -> str:
    lines = [
        f"## Then {after}, inner rate {rate}\n",
        "| first | mean | accuracy | minus forget | seeds | first validation |",
        "|---|---|---|---|---|---|",
    ]
    for before, mean in product(DATA, VARIANTS):
        own = _by_seed(cells, (before, after, mean, rate))
        if not own:
            continue
        gained = _gained(cells, (before, after, mean, rate))
        first = fmean(cell["curve"][0][1] for cell in own.values())
        columns = [
            before,
            mean,
            pooled([_scores(cell) for cell in own.values()], sign=""),
            "" if mean == "forget" else pooled(gained),
            str(len(own)),
            f"{100 * first:.1f}",
        ]
        lines.append(f"| {' | '.join(columns)} |")
    return "\n".join(lines).replace("-", "−").replace("|−−−", "|---")


def changes(cells: Cells) -> str:
    """The table of what means gain over forgetting, all changes of tasks together."""
    lines = ["| inner rate | keep minus forget | frozen minus forget |", "|---|---|---|"]
    for rate in RATES:
        gained = (
            pooled(
                [
                    each
                    for pair in permutations(DATA, 2)
                    for each in _gained(cells, (*pair, mean, rate))
                ]
            )
            for mean in ("keep", "frozen")
        )
        lines.append(f"| {rate} | {' | '.join(gained)} |")
    return "\n".join(lines).replace("| -", "| −")


def page() -> str:
    """The page of results: what was asked, what was computed, the picture and the tables."""
    cells = finished()
    text = ast.get_docstring(ast.parse(STUDY.read_text(encoding="utf-8"))) or ""
    title, _, rest = text.partition("\n\n")
    asked = rest.partition("A cell, one of")[0].partition("\n\n")[2]
    versions = {f"torch {cell['environment']['versions']['torch']}" for cell in cells.values()}
    hours = sum(cell["seconds"] for cell in cells.values()) / 3600
    ran = (
        f"{len(cells)} of {len(list(wanted()))} cells, {hours:.1f} hours of processor time, "
        f"{', '.join(sorted(versions))}, one thread. Accuracies in per cent, with 95 % intervals "
        "over test tasks; minus forget is taken task by task, and a minus where forgetting is "
        "better; the first validation is that after 25 iterations."
    )
    picture = f"![What the mean of the tasks before is worth](../images/{STUDY.stem}-gains.png)"
    code = f"```sh\npython docs/studies/{STUDY.name}\n```"
    together = f"**All changes of tasks together:**\n\n{changes(cells)}"
    parts = (f"# {title.rstrip('.')}", asked.strip(), code, ran, picture, together, tables(cells))
    return "\n\n".join(parts) + "\n"


def draw(path: Path) -> None:
    """Draw keep and frozen minus forget, for all pairs of tasks, a panel for each rate."""
    cells = finished()
    figure = Figure(figsize=(WIDTH, 4.2), dpi=DPI, layout="constrained")
    pairs = [(before, after) for after in DATA for before in DATA]
    for axes, rate in zip(figure.subplots(1, len(RATES), sharey=True), RATES, strict=True):
        style(axes, "minus forget, test accuracy (points)", "", f"inner rate {rate}")
        axes.axvline(0, color=GREY, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
        for shift, mean, colour in ((-0.14, "keep", COLOURS[1]), (0.14, "frozen", COLOURS[2])):
            for place, pair in enumerate(pairs):
                if gained := _gained(cells, (*pair, mean, rate)):
                    middle, half = mean_and_half(gained)
                    axes.errorbar(
                        [100 * middle],
                        [place + shift],
                        xerr=[100 * half],
                        color=colour,
                        marker="o",
                        markersize=4,
                        capsize=2,
                        label=mean if place == 0 else None,
                    )
        axes.set_yticks(range(len(pairs)), [f"{before}, then {after}" for before, after in pairs])
        axes.tick_params(axis="y", labelcolor=INK, length=0)
        axes.set_ylim(len(pairs) - 0.4, -0.6)
        axes.grid(axis="x", color=FAINT, linewidth=0.6)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=9)
    figure.supxlabel(
        fill("bars: 95 % intervals over test tasks", 125), fontsize=8, color=GREY, x=0.01, ha="left"
    )
    save(figure, path)


def _by_seed(cells: Cells, which: tuple[str, str, str, float]) -> dict[int, dict[str, Any]]:
    return {key[4]: cell for key, cell in cells.items() if key[:4] == which}


def _gained(cells: Cells, which: tuple[str, str, str, float]) -> list[Tensor]:
    """By seed, what each test task gains over forgetting."""
    before, after, _, rate = which
    forgetful = _by_seed(cells, (before, after, "forget", rate))
    own = _by_seed(cells, which)
    return [_scores(own[seed]) - _scores(forgetful[seed]) for seed in own if seed in forgetful]


def _scores(cell: dict[str, Any]) -> Tensor:
    """Every test task's accuracy, (tasks,)."""
    return torch.tensor(cell["test"]["right"], dtype=torch.float64) / QUERIES
