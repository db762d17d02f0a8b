"""What a running mean is worth on other tasks than those that made it, and in a changing stream.

Run from the root of the project: python docs/studies/change_of_tasks.py

A learner is meta-trained on some tasks, and then on others, from the weights of the first: letters
from fonts, Omniglot's characters and CIFAR-FS's objects, each grey and 28 x 28, so one model fits
all. From the change on, gates, momenta and the meta-optimizer begin anew, and variants differ in
the mean alone:

    maml    no sharing, before or after: the plain stream
    keep    the mean of the tasks before goes on, as in a stream whose change nobody announces
    forget  the mean begins anew
    frozen  the mean of the tasks before stays for good

Statistics carry over if keep or frozen beat forget; a changing stream does harm if keep falls
behind forget. Where the tasks stay the same, nothing changes but the optimizer: that is the
control.

A cell, one of 144 of about 25 s, is a line of docs/studies/change_of_tasks.jsonl, appended when it
is finished, so a study that was stopped goes on. `--table` only prints. `--before`, `--after`,
`--rates` and `--seeds` compute or print a part; with another number of `--iterations` nothing is
kept.
"""

from __future__ import annotations

import argparse
import json
import time
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from change_of_tasks_page import (
    DATA,
    FORM,
    RATES,
    RESULTS,
    SEEDS,
    VARIANTS,
    Key,
    finished,
    tables,
    wanted,
)
from wider_field import figures, say

from metaplug import MetaLearner
from metaplug.experiments.json_values import environment
from metaplug.experiments.variant_texts import parse_variant
from metaplug.models.conv4 import Conv4
from metaplug.random_streams import mix, stream
from metaplug.tasks import Folder, Glyphs

SHARED = Path("../shared/data")
FOLDERS = {"characters": SHARED / "omniglot-full", "objects": SHARED / "cifar-fs"}
MODEL = {"filters": 16, "pooling": "stride"}
INNER_STEPS = 3
TASKS_PER_BATCH = 8
ITERATIONS = 150
VALIDATE_EVERY = 25
VALIDATION_TASKS = 100
TEST_TASKS = 400


@cache
def source(data: str, seed: int) -> Glyphs | Folder:
    """Make the tasks of one kind, drawn by one seed."""
    if data == "letters":
        return Glyphs(**FORM, seed=seed)
    return Folder(FOLDERS[data], **FORM, seed=seed, mode="grey", size=28)


def make_learner(text: str, model: Conv4, rate: float, seed: int) -> MetaLearner:
    """Make the learner of a variant around a model."""
    preset, plugins = parse_variant(text)
    return MetaLearner(
        model,
        preset=preset,
        plugins=plugins,
        inner_lr=rate,
        inner_steps=INNER_STEPS,
        seed=seed,
    )


def train_before(text: str, key: Key, iterations: int, path: Path) -> None:
    """Meta-train on the tasks before, and save the learner."""
    before, _, _, rate, seed = key
    tasks = source(before, seed)
    with stream(mix(seed, -1), torch.device("cpu")):
        model = Conv4(tasks.input_shape, tasks.outputs, **MODEL)
    learner = make_learner(text, model, rate, seed)
    learner.fit(tasks.train, iterations=iterations, tasks_per_batch=TASKS_PER_BATCH)
    learner.save(path)


def compute(key: Key, iterations: int, folder: Path) -> dict[str, Any]:
    """Compute a cell; `folder` keeps the learners of the tasks before."""
    before, after, variant, rate, seed = key
    begun = "maml" if variant == "maml" else "forget"
    path = folder / f"{begun}-{before}-{rate}-{seed}.safetensors"
    if not path.exists():
        train_before(VARIANTS[begun], key, iterations, path)
    model = MetaLearner.load(path).model
    learner = make_learner(VARIANTS[variant].format(path), model, rate, seed + 1000)
    tasks = source(after, seed + 1000)  # other tasks where before and after are the same
    started = time.process_time()
    history = learner.fit(
        tasks.train,
        iterations=iterations,
        tasks_per_batch=TASKS_PER_BATCH,
        validation=tasks.val,
        validate_every=VALIDATE_EVERY,
        validation_tasks=VALIDATION_TASKS,
    )
    return {
        "key": key,
        "curve": [(iteration, result.mean) for iteration, result in history.validations],
        "test": figures(learner.evaluate(tasks.test, num_tasks=TEST_TASKS)),
        "logged": history.records[-1].step.figures,
        "seconds": round(time.process_time() - started, 2),
        "environment": environment(learner),
    }


def main() -> None:
    """Compute what is missing, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    several: dict[str, Any] = {"nargs": "+", "metavar": "VALUE"}
    parser.add_argument("--before", choices=DATA, default=list(DATA), **several)
    parser.add_argument("--after", choices=DATA, default=list(DATA), **several)
    parser.add_argument("--rates", type=float, default=RATES, **several)
    parser.add_argument("--seeds", type=int, default=SEEDS, **several)
    parser.add_argument("--iterations", type=int, default=ITERATIONS, help="other ones: a trial")
    parser.add_argument("--table", action="store_true", help="compute nothing")
    given = parser.parse_args()
    torch.set_num_threads(1)
    cells = finished() if given.iterations == ITERATIONS else {}
    these = list(wanted(given.seeds, given.rates, given.before, given.after))
    with TemporaryDirectory() as folder:
        for key in () if given.table else these:
            if absent := [one for one in key[:2] if one in FOLDERS and not FOLDERS[one].is_dir()]:
                say(f"{key} is skipped: {FOLDERS[absent[0]]} is no folder here")
            elif key not in cells:
                cells[key] = compute(key, given.iterations, Path(folder))
                say(f"{key}: {100 * cells[key]['test']['mean']:.1f} % in {cells[key]['seconds']} s")
                if given.iterations == ITERATIONS:
                    with RESULTS.open("a", encoding="utf-8") as file:
                        file.write(f"{json.dumps(cells[key], allow_nan=False)}\n")
    print(tables({key: cells[key] for key in these if key in cells}))


if __name__ == "__main__":
    main()
