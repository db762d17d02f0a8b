"""The wider field beside MAML: what docs/results/wider-field.md shows, cell by cell.

Run from the root of the project: python docs/studies/wider_field.py

Every variant is meta-trained for 400 iterations on 5-way 1-shot tasks, at two inner learning rates,
with three seeds, on the embedded letters and on all of Omniglot. A cell is one small file in
docs/studies/wider_field/, written when it is finished, so a study that was stopped goes on, here or
elsewhere. Nothing is selected: the last weights are tested. Test tasks are the same for every
variant of one seed, so differences from MAML are taken task by task.

`--table` only prints. `--data`, `--variants`, `--rates` and `--seeds` compute or print a part.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from dataclasses import dataclass, field
from functools import cache
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from metaplug import EvaluationResult, MetaLearner, RequestError, RunError
from metaplug.experiments.json_values import environment, to_json
from metaplug.experiments.variant_texts import parse_variant
from metaplug.files import replacing
from metaplug.models.conv4 import Conv4
from metaplug.random_streams import mix, stream
from metaplug.tasks import Folder, Glyphs


@dataclass(frozen=True)
class Variant:
    """A row of the table.

    Attributes:
        text: preset and plugins, as `metaplug compare --variant` takes them.
        learner: arguments of MetaLearner that this variant has other than the rest.
    """

    text: str
    learner: dict[str, Any] = field(default_factory=dict)


VARIANTS = {
    # The family, as a scale for what follows.
    "maml": Variant("maml"),
    "maml+gs": Variant("maml+gradient-sharing"),
    "anil": Variant("anil"),
    "meta-sgd": Variant("meta-sgd"),
    # Regularisers of the outer loop.
    "taml-entropy": Variant("taml"),
    "taml-theil": Variant("maml+taml:measure=theil"),
    "mr-maml": Variant("mr-maml"),
    "meta-mix": Variant("maml+meta-mix"),
    "sharp-maml": Variant("maml+sharp-maml"),
    # Other ways to adapt.
    "imaml": Variant("maml+imaml:strength=0.5", {"inner_steps": 8}),
    "aruba": Variant("maml+aruba"),
    "alfa": Variant("alfa"),
    "l2f": Variant("l2f"),
    "metal": Variant("maml+metal"),
    "proto-maml": Variant("proto-maml"),
    "cavia": Variant("cavia"),
    "warp-grad": Variant("warp-grad"),
    "warp-grad-loop": Variant("maml+warp-grad:objective=through-loop"),
    "drop-grad": Variant("maml+drop-grad"),
    "lora": Variant("maml+lora"),
    # A regulariser of the inner loop together with those of the outer loop, and with others.
    "taml-theil+gs": Variant("maml+taml:measure=theil+gradient-sharing"),
    "mr-maml+gs": Variant("mr-maml+gradient-sharing"),
    "meta-mix+gs": Variant("maml+meta-mix+gradient-sharing"),
    "sharp-maml+gs": Variant("maml+sharp-maml+gradient-sharing"),
    "alfa+gs": Variant("alfa+gradient-sharing"),
    "l2f+gs": Variant("l2f+gradient-sharing"),
}
"""By the name of the row and of its files. gs is gradient sharing."""

BASELINE = "maml"
DATA = ("letters", "omniglot")
RATES = (0.1, 0.4)
SEEDS = (0, 1, 2)
TEST_TASKS = 200
FORM = {"ways": 5, "shots": 1, "queries": 5}
QUERIES = FORM["ways"] * FORM["queries"]
MODEL = {"filters": 16, "pooling": "stride"}
LEARNER = {"inner_steps": 3, "meta_optimizer": "adam", "meta_lr": 1e-3}
TASKS_PER_BATCH = 4
ITERATIONS = 400

RESULTS = Path(__file__).parent / "wider_field"
OMNIGLOT = Path("../shared/data/omniglot-full")
ALPHABETS = RESULTS / "alphabets.json"
"""Whole alphabets by split: 24 and 6 of the background set, and the 20 of the evaluation set."""


@cache
def source(data: str, seed: int) -> Glyphs | Folder:
    """Make the tasks of one data set, drawn by one seed."""
    if data == "letters":
        return Glyphs(**FORM, seed=seed)
    return Folder(OMNIGLOT, **FORM, seed=seed, splits=ALPHABETS)


def make_learner(variant: Variant, rate: float, seed: int, tasks: Glyphs | Folder) -> MetaLearner:
    """Make the learner of a cell, its first weights decided by the seed alone."""
    preset, plugins = parse_variant(variant.text)
    with stream(mix(seed, -1), torch.device("cpu")):
        model = Conv4(tasks.input_shape, tasks.outputs, **MODEL)
    settings = {**LEARNER, "inner_lr": rate, **variant.learner}
    return MetaLearner(model, preset=preset, plugins=plugins, seed=seed, **settings)


def compute(given: argparse.Namespace, data: str, seed: int, rate: float, name: str) -> None:
    """Compute one cell, unless a file has it with the same settings."""
    variant, file = VARIANTS[name], place(given, data, seed, rate, name)
    tasks = source(data, seed)
    learner = make_learner(variant, rate, seed, tasks)
    settings = {
        "data": data,
        "tasks": FORM,
        "model": MODEL,
        "variant": variant.text,
        "learner": learner.settings.model_dump(),
        "tasks_per_batch": TASKS_PER_BATCH,
        "iterations": given.iterations,
        "test_tasks": TEST_TASKS,
        "seed": seed,
    }
    if file.exists() and json.loads(file.read_text())["settings"] == settings:
        return
    cell: dict[str, Any] = {"settings": settings}
    try:
        cell["start"] = figures(learner.evaluate(tasks.test, num_tasks=TEST_TASKS))
        started = time.process_time()
        history = learner.fit(
            tasks.train, iterations=given.iterations, tasks_per_batch=TASKS_PER_BATCH
        )
        cell["seconds"] = round(time.process_time() - started, 2)
        result = learner.evaluate(tasks.test, num_tasks=TEST_TASKS)
        cell["test"] = figures(result)
        cell["logged"] = history.records[-1].step.figures
        told = f"{100 * result.mean:.1f} % in {cell['seconds']:.0f} s"
    except RunError as error:
        cell["failed"] = told = str(error)
    cell["environment"] = environment(learner)
    file.parent.mkdir(parents=True, exist_ok=True)
    with replacing(file) as written:
        written.write(f"{to_json(cell)}\n".encode())
    say(f"{data}, {name}, inner rate {rate}, seed {seed}: {told}")


def figures(result: EvaluationResult) -> dict[str, Any]:
    """Mean and interval; and the right answers of every task, for differences task by task."""
    right = [round(float(score) * QUERIES) for score in result.per_task]
    return {"mean": result.mean, "interval": result.interval, "right": right}


def place(given: argparse.Namespace, data: str, seed: int, rate: float, name: str) -> Path:
    """Name the file of a cell; other numbers of iterations are trials, and go elsewhere."""
    trial = Path("runs/wider_field") / str(given.iterations)
    root = RESULTS if given.iterations == ITERATIONS else trial
    return root / data / f"{name}-{rate}-{seed}.json"


def table(given: argparse.Namespace, data: str) -> None:
    """Print the table of one data set, in Markdown."""
    cells = {
        (name, rate, seed): json.loads(file.read_text())
        for name in {BASELINE, *given.variants}
        for rate in given.rates
        for seed in given.seeds
        if (file := place(given, data, seed, rate, name)).exists()
    }
    titles = ["variant", "accuracy", "above its start", "above MAML", "seconds", "of MAML's"]
    for rate in given.rates:
        print(f"\n{data}, inner rate {rate}\n")
        print(f"| {' | '.join(titles)} |\n|---|---|---|---|---|---|")
        for name in given.variants:
            own, maml = (
                {
                    seed: cells[which, rate, seed]
                    for seed in given.seeds
                    if (which, rate, seed) in cells
                }
                for which in (name, BASELINE)
            )
            if own:
                columns = row(own, {} if name == BASELINE else maml)
                print(f"| {' | '.join([name, *columns])} |")


def row(own: dict[int, Any], maml: dict[int, Any]) -> list[str]:
    """The figures of a variant at one inner rate: means over the seeds that finished."""
    failed = [seed for seed, cell in own.items() if "failed" in cell]
    own = {seed: cell for seed, cell in own.items() if seed not in failed}
    if not own:
        return ["diverged", "", "", "", ""]
    paired = [seed for seed in own if seed in maml and "failed" not in maml[seed]]
    seconds = fmean(cell["seconds"] for cell in own.values())
    note = f" ({len(failed)} diverged)" if failed else ""
    columns = [
        pooled([scores(cell, "test") for cell in own.values()], sign="") + note,
        pooled([scores(cell, "test") - scores(cell, "start") for cell in own.values()]),
        pooled([scores(own[seed], "test") - scores(maml[seed], "test") for seed in paired]),
        f"{seconds:.0f}",
    ]
    beside = fmean(maml[seed]["seconds"] for seed in paired) if paired else math.nan
    return [*columns, f"{seconds / beside:.2f}" if paired else ""]


def scores(cell: dict[str, Any], when: str) -> torch.Tensor:
    """Every test task's accuracy, "test" after training or at the "start"; (tasks,)."""
    return torch.tensor(cell[when]["right"], dtype=torch.float64) / QUERIES


def mean_and_half(by_seed: list[torch.Tensor]) -> tuple[float, float]:
    """Mean over seeds, and half its 95 % interval: over tasks, other ones for each seed."""
    results = [
        EvaluationResult("accuracy", per_task, LEARNER["inner_steps"]) for per_task in by_seed
    ]
    half = math.sqrt(sum(each.interval**2 for each in results)) / len(results)
    return fmean(each.mean for each in results), half


def pooled(by_seed: list[torch.Tensor], sign: str = "+") -> str:
    """Write `mean_and_half` in percent."""
    if not by_seed:
        return ""
    mean, half = mean_and_half(by_seed)
    return f"{100 * mean:{sign}.1f} ± {100 * half:.1f}"


def compute_all(given: argparse.Namespace) -> None:
    """Compute the missing cells, and say what cannot be had here."""
    if "omniglot" in given.data and not OMNIGLOT.is_dir():
        say(f"omniglot is skipped: {OMNIGLOT} is no folder here")
        given.data.remove("omniglot")
    for cell in product(given.data, given.seeds, given.rates, given.variants):
        try:
            compute(given, *cell)
        except RequestError as error:
            say(f"{', '.join(map(str, cell))} is skipped: {error}")


def say(text: str) -> None:
    """Tell on standard error, so standard output has the tables alone."""
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    """Compute what is missing, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    several: dict[str, Any] = {"nargs": "+", "metavar": "NAME"}
    parser.add_argument("--data", choices=DATA, default=list(DATA), **several)
    parser.add_argument("--variants", choices=VARIANTS, default=list(VARIANTS), **several)
    parser.add_argument("--rates", nargs="+", type=float, default=RATES)
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    parser.add_argument("--iterations", type=int, default=ITERATIONS, help="other ones: a trial")
    parser.add_argument("--table", action="store_true", help="compute nothing")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if not given.table:
        compute_all(given)
    for data in given.data:
        table(given, data)


if __name__ == "__main__":
    main()
