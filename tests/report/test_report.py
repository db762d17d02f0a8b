"""Texts, tables, progress and pictures for people."""

from __future__ import annotations

import io
import math
import os
import re
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import torch
from PIL import Image
from pydantic import BaseModel, Field
from rich.console import Console, Group, RenderableType
from rich.text import Text
from support import studies
from support.studies import curve

from metaplug import EvaluationResult, Record
from metaplug.evaluation.results import Metric
from metaplug.execution.engine import MetaStep
from metaplug.experiments.study.results import StudyResult
from metaplug.report import figures
from metaplug.report.catalogue import Entry, SettingRow, rows
from metaplug.report.console import (
    CONSOLE,
    RESULTS,
    emit,
    line,
    lost_output,
    new_table,
    quiet,
    result,
    show,
)
from metaplug.report.figures import _wrapped, run_figure, study_figure
from metaplug.report.study import study_tables
from metaplug.report.tables import catalogue_table
from metaplug.report.terminal import TrainingProgress, result_line, value_text


def shown(what: RenderableType, width: int = 80) -> str:
    file = io.StringIO()
    Console(file=file, width=width).print(what)
    return "\n".join(text.rstrip() for text in file.getvalue().splitlines()).strip("\n")


LINES = {
    "maml": [curve(0.3, 0.4, 0.5, 0.6, every=100), curve(0.3, 0.4, 0.6, 0.5, every=100)],
    "maml+meta-sgd": [curve(0.5, 0.6, 0.7, 0.7, every=100), curve(0.5, 0.5, 0.5, 0.5, every=100)],
    "anil": [curve(0.2, 0.2, 0.3, 0.3, every=100), curve(0.1, 0.1, 0.1, 0.1, every=100)],
}


def study(metric: Metric = "accuracy", seeds: int = 2, **given: Any) -> StudyResult:
    lines = {label: found[:seeds] for label, found in given.pop("lines", LINES).items()}
    tests = {
        label: [[0.4 + shift + seed / 10, 0.6 + shift + seed / 10] for seed in range(seeds)]
        for label, shift in zip(lines, (0.0, 0.1, 0.2), strict=True)
    }
    seen = dict.fromkeys(lines, ("batch norm sees the batch",))
    return studies.result(metric, lines, tests, **{"transductive": seen, **given})


def test_values_in_words() -> None:
    assert value_text("accuracy", 0.767, 0.012) == "76.70 ± 1.20 %"
    assert value_text("accuracy", 0.767) == "76.70 %"
    assert value_text("mean squared error", 0.12345, 0.01) == "0.1235 ± 0.0100"
    assert value_text("mean IoU", 0.5) == "50.00 %"
    assert value_text("perplexity", 12.3456) == value_text("own", 12.3456) == "12.3456"
    assert value_text("accuracy", None) == "not finite"
    result = {
        "metric": "accuracy",
        "mean": 0.5,
        "interval": 0.1,
        "num_tasks": 600,
        "inner_steps": 3,
    }
    assert (
        result_line(result)
        == "accuracy 50.00 ± 10.00 % (95 % interval over 600 tasks, 3 inner steps)"
    )


def test_the_table_of_a_study() -> None:
    # The pooled tests of both seeds are 0.4, 0.6, 0.5, 0.7:
    # t(0.975; 3) s / √4 = 3.1824 · 0.12910 / 2 = 0.2054
    assert (
        shown(study_tables(study()))
        == """\
 variant        acceleration         test accuracy    minus maml        seconds
 ──────────────────────────────────────────────────────────────────────────────
 maml           baseline             55.00 ± 20.54 %                    1
   seed 0       best after 400       50.00 %                            1
   seed 1       best after 300       60.00 %                            1

 maml+meta-sgd  +100 % (1 of 2       65.00 ± 20.54 %  +10.00 ± 0.00 pp  1
                seeds)
   seed 0       +100 % (400 → 200)   60.00 %                            1
   seed 1       not reached          70.00 %                            1

 anil           not reached          75.00 ± 20.54 %  +20.00 ± 0.00 pp  1
   seed 0       not reached          70.00 %                            1
   seed 1       not reached          80.00 %                            1

Target: the best validation accuracy that maml reaches; 60.00 %, 60.00 % for
seed 0, 1.
Acceleration: (iterations that it needs / iterations that the other needs − 1) ·
100 %, mean over the seeds that get there.
Test: unseen tasks, by the weights that validated best; 95 % intervals over the
tasks of all seeds, differences task by task.
Seconds: of meta-training and its validations, for one seed.
Transductive: batch norm sees the batch."""
    )


def test_a_table_says_of_each_variant_whether_it_is_transductive() -> None:
    assert shown(study_tables(study(transductive={}))).endswith("\nTransductive: no.")
    mixed = study(transductive={"anil": ("batch norm sees the batch",)})
    assert shown(study_tables(mixed)).endswith(
        "\nmaml: transductive: no.\nmaml+meta-sgd: transductive: no.\nanil: transductive: "
        "batch norm sees the batch."
    )


@pytest.mark.parametrize("metric", ["accuracy", "mean squared error"])
@pytest.mark.parametrize("seeds", [1, 2])
def test_the_figure_of_a_study(tmp_path: Path, metric: Metric, seeds: int) -> None:
    study_figure(study(metric, seeds), tmp_path / "curves.png")
    with Image.open(tmp_path / "curves.png") as picture:
        assert (picture.format, picture.size) == ("PNG", (1200, 736))


def metrics(figures: dict[str, float], validated: bool) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = [
        {"iteration": i, "outer_loss": math.exp(-i), "meta_gradient_norm": 1.0, "figures": figures}
        for i in range(1, 9)
    ]
    if validated:
        lines[3]["validation"] = {"metric": "accuracy", "mean": 0.5, "interval": 0.1}
        lines[7]["validation"] = {"metric": "accuracy", "mean": None, "interval": None}
    return lines


@pytest.mark.parametrize(
    ("figures", "validated", "height"),
    [
        ({}, True, 736),
        ({}, False, 736),
        ({"sharing.gate/0": 0.5, "sharing.gate/1": None, "sharing.norm": 1.0}, True, 1408),
        ({f"rates.{name}/0": 0.5 for name in "abcdefgh"}, True, 2752),
    ],
)
def test_the_figure_of_a_run(
    tmp_path: Path, figures: dict[str, float], validated: bool, height: int
) -> None:
    run_figure(metrics(figures, validated), tmp_path / "curves.png")
    with Image.open(tmp_path / "curves.png") as picture:
        assert (picture.format, picture.size) == ("PNG", (1200, height))


def test_the_figure_of_a_run_whose_figures_were_fetched_now_and_then_shows_the_last_plugins(
    tmp_path: Path,
) -> None:
    lines = metrics(
        {f"{plugin}.figure/{step}": 0.5 for plugin in "abcdefghij" for step in range(2)}, True
    )
    for place, values in enumerate(lines):
        values["figures"] = values["figures"] if place % 3 == 2 else {}
    titles: list[str] = []
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(figures, "style", lambda axes, x, y, title: titles.append(title))
        run_figure(lines, tmp_path / "curves.png")
    assert titles[2:] == [f"{plugin}.figure" for plugin in "abcdefghij"][-figures.MOST_GROUPS :]


def record(iteration: int, validation: EvaluationResult | None = None) -> Record:
    return Record(MetaStep(iteration, 1.5, 1.0, 1e-3, {}), validation)


def test_progress_off_a_terminal_is_a_plain_line_for_each_validation() -> None:
    file = io.StringIO()
    with TrainingProgress(Console(file=file, width=40), 2) as progress:
        progress.record(record(1), "maml, seed 0")
        progress.record(
            record(2, EvaluationResult("accuracy", torch.tensor([0.5, 0.7]).double(), 3)),
            "maml, seed 0",
        )
    assert (
        file.getvalue() == "maml, seed 0: iteration 2  loss 1.5000  validation 60.00 ± 127.06 %\n"
    )


def test_progress_on_a_terminal_is_a_bar() -> None:
    file = io.StringIO()
    with TrainingProgress(
        Console(file=file, width=120, force_terminal=True, color_system=None), 12
    ) as progress:
        progress.begin(10)
        progress.record(
            record(11, EvaluationResult("accuracy", torch.tensor([0.5, 0.5]).double(), 3))
        )
        progress.record(record(12))
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", file.getvalue())
    assert re.search(r"training ━+ +12/12 0:00:00 loss 1\.5000  validation 50\.00 ± 0\.00 %", text)


def test_a_line_is_one_line_on_the_narrowest_terminal() -> None:
    file = io.StringIO()
    line("[bold]one\n   and the same[/bold] " + "x" * 100, console=Console(file=file, width=20))
    assert file.getvalue() == "[bold]one and the same[/bold] " + "x" * 100 + "\n"


def test_a_word_between_colons_is_no_emoji() -> None:
    file = io.StringIO()
    line("a:b:c is no MODULE:FACTORY: write both", console=Console(file=file))
    assert file.getvalue() == "a:b:c is no MODULE:FACTORY: write both\n"
    with CONSOLE.capture() as captured:
        CONSOLE.print("a:b:c")
    assert captured.get() == "a:b:c\n"


def test_results_go_to_standard_output_and_all_else_to_standard_error(
    capsys: pytest.CaptureFixture[str],
) -> None:
    line("training")
    result("[test] 50.00 ± 1.00 %")
    show(Text("a table"))
    emit("{}")
    assert capsys.readouterr() == ("[test] 50.00 ± 1.00 %\na table\n{}\n", "training\n")
    quiet()
    result("of another rank")
    emit("of another rank")
    quiet(False)
    assert capsys.readouterr() == ("", "")


class _Stream(io.StringIO):
    """A standard output that can write ASCII alone, or nothing at all."""

    encoding = "ascii"

    def __init__(self, fault: OSError | None = None) -> None:
        super().__init__()
        self._fault = fault

    def write(self, text: str) -> int:
        if self._fault is not None:
            raise self._fault
        text.encode("ascii")
        return super().write(text)


def test_a_result_that_cannot_be_written_is_remembered_and_ends_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    full = OSError(28, "No space left on device")
    for stream in (_Stream(full), None):
        monkeypatch.setattr(sys, "stdout", stream)
        result("one")
        emit("two")
        fault = lost_output()
        assert fault is not None
        assert fault.strerror == ("No space left on device" if stream else os.strerror(9))
        assert lost_output() is None


def test_an_output_without_utf_8_has_escapes_that_json_reads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "stdout", output := _Stream())
    emit('{"±": "𝛂"}')
    RESULTS.print("→", end="")
    assert output.getvalue() == '{"\\u00b1": "\\ud835\\udec2"}\n\\u2192'


class Example(BaseModel):
    rate: float = Field(0.5, gt=0, le=1, description="A rate.")
    mode: Literal["a", "b"] = Field("a", description="A mode.")
    bound: int | None = Field(None, ge=1, description="A bound.")
    pair: tuple[float, float] = Field((0.0, 1.0), description="A pair.")
    widths: tuple[Annotated[int, Field(ge=1)], ...] = Field((40, 40), description="Widths.")
    on: bool = Field(True, description="A switch.")
    more: dict[str, Any] = Field(default_factory=dict, description="More.")
    path: Path = Field(description="A path.")


def test_settings_in_words() -> None:
    assert rows(Example) == (
        SettingRow("rate", "float", "> 0, ≤ 1", "0.5", "A rate."),
        SettingRow("mode", "a | b", "", "a", "A mode."),
        SettingRow("bound", "int or null", "≥ 1", "null", "A bound."),
        SettingRow("pair", "[float, float]", "", "[0.0, 1.0]", "A pair."),
        SettingRow("widths", "list of int", "", "[40, 40]", "Widths."),
        SettingRow("on", "bool", "", "true", "A switch."),
        SettingRow("more", "dict", "", "{}", "More."),
        SettingRow("path", "path", "", "required", "A path."),
    )


def test_a_table_has_a_column_over_the_base_where_it_says_something_else() -> None:
    renamed = ("maml", "meta-sgd", "meta-sgd+gradient-sharing")
    lines = dict(zip(renamed, LINES.values(), strict=True))
    shown_lines = shown(study_tables(study(lines=lines)), width=160).splitlines()
    assert shown_lines[0].split("  ")[0].strip() == "variant"
    assert "over its base" in shown_lines[0]
    seeds = [line for line in shown_lines if line.startswith("   seed 0")]
    assert seeds[2].count("not reached") == 2
    assert any(
        line.startswith(
            "Over its base: the same against the variant that this one extends by plugins"
        )
        for line in shown_lines
    )
    assert "over its base" not in shown(study_tables(study()))


def test_a_table_of_several_settings_has_another_of_the_best() -> None:
    settings = {"slow": {"learner.inner_lr": 0.1}, "fast": {"learner.inner_lr": 0.4}}
    lines = {
        "maml@slow": [curve(0.5, 0.8)],
        "maml@fast": [curve(0.4, 0.5)],
        "anil@fast": [curve(0.5, 0.7)],
    }
    made = studies.result(
        "accuracy", lines, settings=settings, axes={"learner.inner_lr": [0.1, 0.4]}
    )
    text = shown(study_tables(made), width=120)
    assert "Each variant at its best setting, chosen on validation tasks" in text
    best = text.partition("validation tasks\n\n")[2].partition("\n\n")[0].splitlines()
    assert [line.split("  ")[0].strip() for line in best[2:]] == [
        "maml, inner_lr 0.1",
        "anil, inner_lr 0.4",
    ]


def test_names_of_parts_are_never_broken() -> None:
    entry = Entry("plugin", "a-plugin-with-a-long-name", "a-distribution-with-a-long-name", "0.1.0")
    assert "a-plugin-with-a-long-name" in shown(catalogue_table([entry], "Installed"), width=50)


def test_long_variants_are_broken_before_their_plugins() -> None:
    assert _wrapped("maml+++gradient-sharing") == "maml+++gradient-sharing"
    assert (
        _wrapped("maml+per-step-learning-rates+multi-step-loss:floor=0.1+cosine-meta-lr", 40)
        == "maml+per-step-learning-rates\n  +multi-step-loss:floor=0.1\n  +cosine-meta-lr"
    )


@pytest.mark.parametrize("terminal", [True, False])
def test_a_table_is_as_wide_as_it_needs_where_no_terminal_bounds_it(terminal: bool) -> None:
    label = f"maml + ./{'long_' * 20}idea.py"
    table = new_table("", "variant", "acceleration", "test accuracy")
    table.columns[0].no_wrap = True
    table.add_row(label, "12.3 %", "76.70 ± 1.20 %")
    file = io.StringIO()
    console = Console(file=file, width=80, force_terminal=terminal, color_system=None)
    show(Group(table, Text("notes " * 40)), console)
    lines = [each.rstrip() for each in file.getvalue().splitlines()]
    row = f"{label} 12.3 % 76.70 ± 1.20 %".split()
    assert any(each.split() == row for each in lines) == (not terminal)
    assert max(map(len, lines)) <= (80 if terminal else 160)
    assert console.width == 80
