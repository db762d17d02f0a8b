"""Few-shot intents by meta-learning MiniLM: what docs/results/intents.md shows, cell by cell.

Run from the root of the project: python docs/studies/intents.py MODEL_FOLDER CLINC150 BANKING77

Every cell is one `metaplug train`, and its figures are one small file in docs/studies/intents/, so
a study that was stopped goes on, here or elsewhere. Learning rates are chosen on validation tasks,
for each variant by itself, before any test task is looked at. `--only VARIANT` computes one
variant, `--table` only prints.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "intents"
RUNS = Path("runs/intents")
SEEDS = (0, 1, 2)
TEST_TASKS = 200

FORM = "--ways 5 --shots 1 --queries 2 --inner-steps 3 --tasks-per-batch 4"
VALIDATION = "--set training.validation_tasks=100 --set runtime.threads=1"
HEAD = "--set model.settings.train=head --set runtime.cache_frozen=true"
LORA = "--set model.settings.train=lora --set model.settings.rank=4"
VARIANTS = {
    "head": HEAD,
    "lora": LORA,
    "lora+gradient-sharing": f"{LORA} --with gradient-sharing",
}
ITERATIONS = {"head": (60, 160), "lora": (40, 80), "lora+gradient-sharing": (40, 80)}
"""Of a tuning cell, and of a final one."""
GRID = {
    "head": [(0.3, 1e-2), (1.0, 1e-2), (3.0, 1e-2), (1.0, 1e-3)],
    "lora": [(0.05, 1e-3), (0.15, 1e-3), (0.5, 1e-3), (1.5, 1e-3), (4.0, 1e-3), (0.15, 3e-3)],
}
"""Inner and meta learning rates that are tried with seed 0."""
GRID["lora+gradient-sharing"] = GRID["lora"]


def train(given: argparse.Namespace, cell: str, variant: str, rates: Any, seed: int) -> Any:
    """Compute one cell, if no file has it, and return its figures."""
    file = RESULTS / f"{cell}.json"
    if file.exists():
        return json.loads(file.read_text())
    tuning = cell.startswith("tune-")
    iterations = ITERATIONS[variant][0 if tuning else 1]
    rest = f"--inner-lr {rates[0]} --meta-lr {rates[1]} --iterations {iterations} --seed {seed}"
    tests = 2 if tuning else TEST_TASKS
    command = f"train {FORM} {rest} {VALIDATION} {VARIANTS[variant]} --out {RUNS} --name {cell}"
    command += f" --set training.test_tasks={tests}"
    command += f" --set training.validate_every={20 if tuning else 40}"
    places = ["--tasks", f"text:{given.clinc}", "--model", f"transformers:{given.model}"]
    resumed = ["--resume"] if (RUNS / cell / "last.safetensors").exists() else []
    if not resumed:
        shutil.rmtree(RUNS / cell, ignore_errors=True)  # stopped before its first checkpoint
    metaplug(*command.split(), *places, *resumed)
    summary = json.loads((RUNS / cell / "summary.json").read_text())
    figures = {
        "command": f"metaplug {command}",
        "validation": summary["best_validation"],
        "seconds": summary["seconds"],
    }
    if not tuning:
        figures["test"] = summary["test"]
        figures["no adaptation"] = evaluated(cell, "--inner-steps", "0")
        figures["banking77"] = evaluated(
            cell,
            "--tasks",
            f"text:{given.banking}",
            "--set",
            "tasks.settings.fractions=[0.1,0.1,0.8]",
        )
    file.write_text(json.dumps(figures, indent=1) + "\n")
    return figures


def metaplug(*arguments: str) -> str:
    """Run a command of metaplug; return what it prints on standard output."""
    command = [sys.executable, "-m", "metaplug", *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def evaluated(cell: str, *options: str) -> Any:
    number = ("--num-tasks", str(TEST_TASKS), "--json")
    return json.loads(metaplug("evaluate", str(RUNS / cell), *number, *options))


def prototypes(given: argparse.Namespace) -> None:
    """Score nearest class means, by cosine, of the body's frozen embeddings, on the same tasks."""
    if (RESULTS / "prototypes.json").exists():
        return
    import torch  # noqa: PLC0415 -- the table needs none of it

    from metaplug.models.factories import make_model  # noqa: PLC0415
    from metaplug.tasks.text.source import Text  # noqa: PLC0415

    torch.set_num_threads(1)
    found = {}
    for name, path, settings in (
        ("test", given.clinc, {}),
        ("banking77", given.banking, {"fractions": (0.1, 0.1, 0.8)}),
    ):
        tasks = Text(path, ways=5, shots=1, queries=2, seed=0, tokenizer=given.model, **settings)
        model: Any = make_model(
            f"transformers:{given.model}", tasks.input_shape, 5, {"train": "head"}
        ).eval()
        scores = []
        with torch.no_grad():
            for index in range(TEST_TASKS):
                batch = tasks.test.batch(0, [index])
                support, query = (
                    torch.nn.functional.normalize(
                        model.features(**{key: each[0] for key, each in x.items()})
                    )
                    for x in (batch.support_x, batch.query_x)
                )
                means = torch.stack(
                    [support[batch.support_y[0] == way].mean(0) for way in range(5)]
                )
                right = (query @ means.T).argmax(1) == batch.query_y[0]
                scores.append(float(right.float().mean()))
        mean = sum(scores) / TEST_TASKS
        spread = math.sqrt(sum((score - mean) ** 2 for score in scores) / (TEST_TASKS - 1))
        found[name] = {"mean": mean, "interval": 1.968 * spread / math.sqrt(TEST_TASKS)}
    (RESULTS / "prototypes.json").write_text(json.dumps(found, indent=1) + "\n")


def chosen(variant: str) -> Any:
    """The rates of a variant that validated best."""
    tuned = {
        rates: json.loads((RESULTS / f"tune-{variant}-{rates[0]}-{rates[1]}.json").read_text())
        for rates in GRID[variant]
    }
    return max(tuned, key=lambda rates: tuned[rates]["validation"]["mean"])


def table() -> None:
    """Print the table, in Markdown."""
    rows = [
        ("prototypes of frozen embeddings", [json.loads((RESULTS / "prototypes.json").read_text())])
    ]
    for variant in VARIANTS:
        files = [RESULTS / f"{variant}-seed{seed}.json" for seed in SEEDS]
        rows.append((variant, [json.loads(file.read_text()) for file in files if file.exists()]))
    print("| variant | seeds | CLINC150 test | no adaptation | Banking77 | minutes |")
    print("|---|---|---|---|---|---|")
    for name, cells in rows:
        columns = [name, str(len(cells))]
        for key in ("test", "no adaptation", "banking77"):
            columns.append(_mean([cell[key] for cell in cells if key in cell]))
        times = [cell["seconds"] / 60 for cell in cells if "seconds" in cell]
        columns.append(f"{sum(times) / len(times):.1f}" if times else "")
        print(f"| {' | '.join(columns)} |")


def _mean(results: list[Any]) -> str:
    """Mean over seeds; the interval is over tasks and seeds, the tasks being other ones by seed."""
    if not results:
        return ""
    mean = sum(each["mean"] for each in results) / len(results)
    half = math.sqrt(sum(each["interval"] ** 2 for each in results)) / len(results)
    return f"{100 * mean:.2f} ± {100 * half:.2f} %"


def main() -> None:
    """Compute what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="folder of all-MiniLM-L6-v2")
    parser.add_argument("clinc", help="CSV of CLINC150, splits.json beside it")
    parser.add_argument("banking", help="CSV of Banking77")
    parser.add_argument("--only", choices=list(VARIANTS))
    parser.add_argument("--table", action="store_true")
    given = parser.parse_args()
    RESULTS.mkdir(exist_ok=True)
    if not given.table:
        for variant in [given.only] if given.only else list(VARIANTS):
            for rates in GRID[variant]:
                train(given, f"tune-{variant}-{rates[0]}-{rates[1]}", variant, rates, seed=0)
            best = chosen(variant)
            for seed in SEEDS:
                train(given, f"{variant}-seed{seed}", variant, best, seed)
        prototypes(given)
    table()


if __name__ == "__main__":
    main()
