"""The live curve of a run on a terminal."""

from __future__ import annotations

import io
import math
import re
from pathlib import Path

import pytest
import torch
from rich.console import Console

from metaplug import EvaluationResult, Record
from metaplug.cli.train import _validations
from metaplug.execution.engine import MetaStep
from metaplug.report.sparkline import WIDTH, drawn_by, sparkline
from metaplug.report.terminal import TrainingProgress, curve_text

NAN = math.nan


@pytest.mark.parametrize(
    ("values", "width", "line"),
    [
        ([], 8, ""),
        ([3.0], 8, "▄"),
        ([3.0, 3.0], 8, "▄▄"),
        ([0, 1, 2, 3, 4, 5, 6, 7], 8, "▁▂▃▄▅▆▇█"),
        ([7, 0], 8, "█▁"),
        ([0.2, 0.4, NAN, 0.6], 8, "▁▅ █"),
        ([math.inf, 1.0, 2.0, -math.inf], 8, " ▁█ "),
        ([NAN, NAN], 8, "  "),
        # Neighbours share a block by their mean, of those that are finite.
        ([0, 2, 3, NAN, NAN, NAN, 7, 9], 4, "▁▃ █"),
        ([*range(99)], 5, "▁▃▄▆█"),
    ],
)
def test_blocks_from_the_least_to_the_greatest(values: list[float], width: int, line: str) -> None:
    assert sparkline(values, width) == line


def test_the_first_the_best_and_the_last_stand_beside_it() -> None:
    assert curve_text("accuracy", [0.2, 0.612, 0.601]) == (
        "▁██  first 20.00 %, best 61.20 %, last 60.10 %"
    )
    assert curve_text("mean squared error", [NAN, 4.0, 0.5, 2.25]) == (
        " █▁▅  first not finite, best 0.5000, last 2.2500"
    )
    assert curve_text("accuracy", [NAN]) == (
        "   first not finite, best not finite, last not finite"
    )
    assert len(curve_text("accuracy", [*range(1000)]).partition("  ")[0]) == WIDTH


def test_a_terminal_without_utf_8_has_no_blocks() -> None:
    assert drawn_by("utf-8")
    assert not any(map(drawn_by, ("ascii", "iso-8859-1", "no-such-encoding")))


def shown(means: list[float], *, encoding: str = "utf-8", width: int = 120) -> str:
    """What a terminal gets of a run with these validations, and of another run after it."""
    bytes_out = io.BytesIO()
    file = io.TextIOWrapper(bytes_out, encoding=encoding, errors="backslashreplace")
    console = Console(file=file, width=width, force_terminal=True, color_system=None)
    with TrainingProgress(console, 20) as progress:
        progress.begin(2, validations=[0.25, 0.5])
        for place, mean in enumerate(means):
            result = EvaluationResult("accuracy", torch.tensor([mean, mean]).double(), 3)
            progress.record(Record(MetaStep(place + 3, 1.5, 1.0, 1e-3, {}), result))
            progress._bar.refresh()
    file.flush()
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", bytes_out.getvalue().decode(encoding))


def test_the_curve_of_a_run_goes_on_below_the_bar() -> None:
    text = shown([0.75, 0.5])
    assert "\nvalidation  ▁▅█  first 25.00 %, best 75.00 %, last 75.00 %" in text
    assert "\nvalidation  ▁▅█▅  first 25.00 %, best 75.00 %, last 50.00 %" in text
    assert "\nvalidation  ▁▅█  first 25.00 %, b…" in shown([0.75], width=34)


def test_it_is_left_out_where_it_cannot_be_drawn() -> None:
    text = shown([0.75, 0.5], encoding="ascii")
    assert "validation 50.00" in text
    assert "first" not in text
    file = io.StringIO()
    with TrainingProgress(Console(file=file, width=120), 2) as progress:
        progress.begin(0, validations=[0.25, 0.5])
        result = EvaluationResult("accuracy", torch.tensor([0.5, 0.5]).double(), 3)
        progress.record(Record(MetaStep(1, 1.5, 1.0, 1e-3, {}), result))
    assert file.getvalue() == "training: iteration 1  loss 1.5000  validation 50.00 ± 0.00 %\n"


def test_another_run_begins_another_curve() -> None:
    console = Console(file=io.StringIO(), width=120, force_terminal=True, color_system=None)
    with TrainingProgress(console, 4) as progress:
        for label, mean in (("a", 0.1), ("a", 0.2), ("b", 0.3), ("b", 0.4)):
            result = EvaluationResult("accuracy", torch.tensor([mean, mean]).double(), 3)
            progress.record(Record(MetaStep(1, 1.5, 1.0, 1e-3, {}), result), label)
    assert progress._bar.below == "validation  ▁█  first 30.00 %, best 40.00 %, last 40.00 %"


def test_the_validations_before_a_resume_are_read(tmp_path: Path) -> None:
    start = '{"iteration": %d, "outer_loss": 1.0, "meta_gradient_norm": 1.0, "meta_lr": 1.0, '
    start += '"figures": {}'
    line = start + ', "validation": {"metric": "accuracy", "mean": %s, "interval": null}}\n'
    lines = [line % (1, "0.5"), (start + "}\n") % 2, line % (3, "null"), line % (4, "0.7")]
    (tmp_path / "metrics.jsonl").write_text("".join(lines))
    first, second = _validations(tmp_path, 3)
    assert first == 0.5
    assert math.isnan(second)
    assert _validations(tmp_path / "none", 0) == []
    (tmp_path / "metrics.jsonl").write_text("{")  # no reason to end a run
    assert _validations(tmp_path, 3) == []
