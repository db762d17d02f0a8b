"""What the recipes reach, as far as they were run, and the page that shows it.

    metaplug train docs/studies/recipes/NAME.yaml       # Ctrl-C ends it, and it can go on
    metaplug evaluate runs/NAME --inner-steps 10 --json > test.json
    python docs/studies/recipes_page.py runs/NAME < test.json

keeps a run in recipes.jsonl, a line for each recipe; `python docs/studies/tables.py recipes` makes
the page.
"""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from metaplug.experiments.runs.layout import CONFIG
from metaplug.experiments.runs.reading import read_metrics
from metaplug.experiments.runs.sessions import read_sessions
from metaplug.report.figures import COLOURS, DPI, GREY, WIDTH, save, style
from metaplug.yaml_text import read_yaml

STUDIES = Path(__file__).parent
RECIPES, RESULTS = STUDIES / "recipes", STUDIES / "recipes.jsonl"

Line = dict[str, Any]

_TOLD = ("iteration", "mean", "interval", "num_tasks", "inner_steps", "device", "threads")
_QUESTION = """\
# What do published recipes reach at a part of their budget?

Each is run by its published settings until the budget of this project ends, seed 0, and is tested
by the weights that validated best. A part of the budget cannot reach the published accuracy: what
this shows is whether the implementation is on the way to it. Validation and test tasks are of
other classes, so a curve need not end at its test."""


def kept() -> dict[str, Line]:
    """The runs that are kept, by recipe."""
    if not RESULTS.exists():
        return {}
    lines = map(json.loads, RESULTS.read_text(encoding="utf-8").splitlines())
    return {line["recipe"]: line for line in lines}


def keep(run: Path, test: Line) -> Line:
    """Keep a run and its test in the place of an earlier one of the same recipe."""
    metrics, sessions = read_metrics(run), read_sessions(run)
    line = {
        "recipe": run.name,
        "done": metrics[-1]["iteration"],
        "budget": read_yaml(run / CONFIG)["training"]["iterations"],
        "test": {name: test[name] for name in _TOLD},
        "validations": [
            [each["iteration"], each["validation"]["mean"], each["validation"]["interval"]]
            for each in metrics
            if each.get("validation")
        ],
        "began": [session["began"] for session in sessions],
        "torch": sessions[-1]["versions"]["torch"],
    }
    lines = {**kept(), run.name: line}
    RESULTS.write_text("".join(f"{json.dumps(each)}\n" for each in lines.values()), "utf-8")
    return line


def page() -> str:
    """The page of results: the table of all recipes, the picture, and what each recipe is."""
    rows = [
        "| recipe | published | here | after iterations |",
        "|---|---|---|---|",
        *(
            f"| {name} | {published(name)} % | {_percent(line['test'])} "
            f"| {line['done']:,} of {line['budget']:,} |"
            for name, line in kept().items()
        ),
    ]
    picture = "![Accuracy of the recipes](../images/recipes-gains.png)"
    own = [part for name, line in kept().items() for part in _section(name, line)]
    return "\n\n".join([_QUESTION, "\n".join(rows), picture, *own]) + "\n"


def draw(path: Path) -> None:
    """Draw validation accuracy over iterations, with the published test as a line."""
    lines = kept()
    rows = math.ceil(len(lines) / 2)
    figure = Figure(figsize=(WIDTH, 3.4 * rows), dpi=DPI, layout="constrained")
    for place, (name, line) in enumerate(lines.items(), 1):
        axes = figure.add_subplot(rows, min(len(lines), 2), place)
        style(axes, "meta-iterations", "accuracy (%)", name)
        at, means, halves = zip(*line["validations"], strict=True)
        below, above = (
            [100 * (mean + side * half) for mean, half in zip(means, halves, strict=True)]
            for side in (-1, 1)
        )
        axes.fill_between(at, below, above, color=COLOURS[1], alpha=0.2, linewidth=0)
        axes.plot(at, [100 * mean for mean in means], color=COLOURS[1], label="here, validation")
        test = line["test"]
        axes.errorbar(
            [test["iteration"]],
            [100 * test["mean"]],
            yerr=[100 * test["interval"]],
            color=COLOURS[2],
            marker="o",
            markersize=4,
            capsize=2,
            label="here, test",
        )
        told = float(published(name).split()[0])
        axes.axhline(
            told,
            color=GREY,
            linestyle=(0, (4, 3)),
            label=f"published, {line['budget']:,} iterations",
        )
        axes.legend(frameon=False, fontsize=9, loc="center left")
    save(figure, path)


def published(name: str) -> str:
    """The accuracy in the recipe's head, in per cent.

    >>> published("cifar_fs_1shot_maml")
    '58.9 ± 1.9'
    """
    found = re.search(r"# Published: ([\d.]+(?: ± [\d.]+)?) %", _text(name))
    assert found is not None, name
    return found[1]


def _section(name: str, line: Line) -> list[str]:
    comment = re.match(r"(?:#.*\n)+", _text(name))
    assert comment is not None, name
    title, *paragraphs = re.sub("^# ?", "", comment[0], flags=re.MULTILINE).strip().split("\n\n")
    code = [f"```sh\n{re.sub('^  ', '', each, flags=re.MULTILINE)}\n```" for each in paragraphs[1:]]
    test, best = line["test"], max(mean for _, mean, _ in line["validations"])
    ran = (
        f"{line['done']:,} iterations, begun {line['began'][0][:10]}, torch {line['torch']}, "
        f"{test['device']}, threads: {test['threads']}. The best validation, {100 * best:.2f} %, "
        f"is that after {test['iteration']:,}; by these weights {_percent(test)} on "
        f"{test['num_tasks']} test tasks (95 % interval over tasks), "
        f"{test['inner_steps']} inner steps."
    )
    return [f"## {title.rstrip('.')}", paragraphs[0], *code, ran]


def _text(name: str) -> str:
    return (RECIPES / f"{name}.yaml").read_text(encoding="utf-8")


def _percent(test: Line) -> str:
    return f"{100 * test['mean']:.2f} ± {100 * test['interval']:.2f} %"


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    print(json.dumps(keep(Path(sys.argv[1]), json.load(sys.stdin))))
