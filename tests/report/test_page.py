"""The HTML page of a study or runs: its words and figures, its pictures, and what it refuses."""

from __future__ import annotations

import doctest
import json
import re
import shutil
from html import unescape
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml
from support.tiny_runs import tiny
from support.written_runs import STUDY, TEST, write_run, write_study

from metaplug.cli.main import main
from metaplug.errors import MetaplugError
from metaplug.experiments.configuration import ExperimentConfig
from metaplug.experiments.runs import train
from metaplug.experiments.study.cells import cells_of
from metaplug.experiments.study.schema import Study
from metaplug.report.page import panels, scales
from metaplug.report.page.drawing import LOOKS, draw, draw_key
from metaplug.report.page.panels import Key, Line, Panel
from metaplug.report.page.writing import _file, write_page

INNER = {
    "support_losses": [1.0, 0.5, 0.25],
    "query_losses": [1.0, 0.75, 0.875],
    "cosines": [0.5, None],
    "learning_rates": [0.1, 0.2],
}


def page(*folders: Path) -> str:
    out = folders[0].parent / "page.html"
    write_page(folders, out)
    return out.read_text(encoding="utf-8")


def words(html: str) -> str:
    """The text of a page without pictures, tags and style."""
    bare = re.sub(r"<(style|svg|head)\b.*?</\1>", " ", html, flags=re.DOTALL)
    return " ".join(unescape(re.sub(r"<[^>]*>", " ", bare)).split())


def rows(html: str) -> list[list[str]]:
    """The cells of all tables."""
    return [
        [words(cell) for cell in re.findall(r"<t[hd]\b.*?</t[hd]>", row, flags=re.DOTALL)]
        for row in re.findall(r"<tr\b.*?</tr>", html, flags=re.DOTALL)
    ]


def headings(html: str) -> list[str]:
    return [words(text) for text in re.findall(r"<h[1-3].*?</h[1-3]>", html)]


def said(*folders: Path) -> str:
    with pytest.raises(MetaplugError) as error:
        page(*folders)
    return str(error.value).replace(str(folders[0].parent), "HERE")


def test_a_study(tmp_path: Path) -> None:
    html = page(write_study(tmp_path / "study", inner=INNER))
    text = words(html)
    assert headings(html) == [
        "maml and maml+gradient-sharing on sinusoid",
        "Results",
        "Learning curves",
        "Every setting",
        "Over training",
        "Training batches, smoothed",
        "What plugins learn and log",
        "From inner step to inner step",
        "Support and query loss",
        "Beside each other",
        "Sensitivity",
        "inner_lr",
        "Repeat it",
    ]
    assert (
        "2 variants × 2 values of inner_lr × 2 seeds; 3-shot sinusoid; mlp; 2 inner steps; "
        "30 iterations of 4 tasks." in text
    )
    assert (
        "maml+gradient-sharing is better than maml by 20.00 ± 0.00 pp over 8 paired test tasks, "
        "and in each of 2 seeds. maml+gradient-sharing at inner_lr 0.01: 70.50 ± 6.34 %; "
        "maml at inner_lr 0.01: 50.50 ± 6.34 %." in text
    )
    columns = ["Variant", "Setting", "Test accuracy", "By seed", "Minus maml"]
    columns += ["Acceleration in iterations", "Acceleration in seconds", "Seconds"]
    maml = ["maml", "inner_lr 0.01", "50.50 ± 6.34 %", "50.00 · 51.00", "reference"]
    shared = ["maml+gradient-sharing", "inner_lr 0.01", "70.50 ± 6.34 %", "70.00 · 71.00"]
    shared += ["+20.00 ± 0.00 pp"]
    rest = ["+200 %", "+200 %", "6.0"]
    best = [
        [*columns[:5], "The same by seed", "p (Holm)", *columns[5:]],
        [*maml, "", "", "", "", "6.0"],
        [*shared, "+20.00 · +20.00", "< 0.001", *rest],
    ]
    whole = [
        columns,
        [*maml, "", "", "6.0"],
        ["maml", "inner_lr 0.1", "40.50 ± 6.34 %", "40.00 · 41.00", "reference", "", "", "6.0"],
        [*shared, *rest],
        [
            *("maml+gradient-sharing", "inner_lr 0.1", "60.50 ± 6.34 %", "60.00 · 61.00"),
            *("+20.00 ± 0.00 pp", "+200 %", "+200 %", "6.0"),
        ],
    ]
    early = rows(html)[len(best + whole) :]
    assert rows(html) == best + whole + early
    assert early[0][2:] == [
        "Query loss − support loss after the last step",
        "The same by seed",
        "Query loss before the first step and after each",
    ]
    losses = ["0.625", "0.625 · 0.625", "1.000 → 0.750 → 0.875"]
    assert early[1] == ["maml", "inner_lr 0.01", *losses]
    assert "by the weights that validated best. Higher is better. The 95 %" in text
    assert "Where some seeds reach it" not in text  # all do
    assert "corrected by Holm's method for 1 comparison." in unescape(text)
    assert "of another training run they say nothing" in text
    assert "finished runs 8 seeds 0 and 1 test tasks of a run 4 validation tasks 200" in text
    assert "This command trained it: metaplug study cells" in text
    assert "versions metaplug 0.1.0, torch 2.14.1 device cpu threads 1 precision float32" in text
    assert "Late, the query loss is lowest at step 1 of 2, and rises after it." in text
    assert STUDY.split("\n")[6] in unescape(html)  # the study itself is there
    assert "maml+gradient-sharing, inner_lr 0.01, seed 0 preset: maml plugins:" in text


def test_a_variant_stands_beside_the_one_that_it_extends(tmp_path: Path) -> None:
    text = STUDY.replace("[maml,", "[maml, anil, anil+gradient-sharing,")
    html = page(write_study(tmp_path / "study", text))
    head = ["Variant", "Setting", "Test accuracy", "By seed", "Its base", "Minus its base"]
    head += ["The same by seed", "p (Holm)"]
    place = [row[: len(head)] for row in rows(html)].index(head)
    maml, anil = (each[: len(head)] for each in sorted(rows(html)[place + 1 : place + 3])[::-1])
    differs = ["+20.00 ± 0.00 pp", "+20.00 · +20.00", "< 0.001"]
    assert (maml[0], maml[5:], anil[0]) == (
        "maml+gradient-sharing",
        differs,
        "anil+gradient-sharing",
    )
    assert anil[4:] == ["anil, inner_lr 0.01", *differs]
    assert "corrected by Holm's method for 4 comparisons." in unescape(words(html))


def test_pictures_are_well_formed_and_say_what_they_show(tmp_path: Path) -> None:
    html = page(write_study(tmp_path / "study", inner=INNER))
    pictures = [
        ElementTree.fromstring(each) for each in re.findall(r"<svg.*?</svg>", html, re.DOTALL)
    ]
    shown = [each for each in pictures if each.get("role") == "img"]
    said = {each.findtext("title"): each.findtext("desc") for each in shown}
    assert said["By tasks seen"] == (
        "validation accuracy (%) against training tasks. maml, inner_lr 0.01: 30.5 at 40, 50.5 at "
        "120; maml+gradient-sharing, inner_lr 0.01: 50.5 at 40, 70.5 at 120."
    )
    assert said["By seconds"] == said["By tasks seen"].replace("training tasks", "seconds").replace(
        "at 40", "at 2"
    ).replace("at 120", "at 6")
    assert said["gradient-sharing.gate"] == (
        "gate against meta-iterations. 0: 0.5 at 1, 0.5 at 30; 1: 0.6 at 1, 0.6 at 30."
    )
    assert said["maml, inner_lr 0.01"] == (
        "loss against inner step. support, early: 1 at 0, 0.25 at 2; support, late: 1 at 0, 0.25 "
        "at 2; query, early: 1 at 0, 0.875 at 2; query, late: 1 at 0, 0.875 at 2."
    )
    assert said["Do the tasks agree?"].count("0.5 at 0;") == 3  # a null is a gap
    assert "mean learning rate against inner step." in said["Inner learning rates"]
    assert said["Test by inner_lr"] == (
        "test accuracy (%) against inner_lr. maml: 50.5 at 0.01, 40.5 at 0.1; "
        "maml+gradient-sharing: 70.5 at 0.01, 60.5 at 0.1."
    )
    assert said["Difference by inner_lr"] == (
        "test minus maml (pp) against inner_lr. maml+gradient-sharing: 20 at 0.01, 20 at 0.1."
    )
    for each in shown:
        named = each.get("aria-labelledby", "").split()
        assert named == [each[0].get("id"), each[1].get("id")]
    names = re.findall(r' id="([^"]+)"', html)
    assert len(set(names)) == len(names)
    assert set(re.findall(r'href="#([^"]+)"', html)) <= set(names)


def test_the_page_needs_nothing_beside_itself_and_is_the_same_every_time(tmp_path: Path) -> None:
    study = write_study(tmp_path / "study", inner=INNER)
    html = page(study)
    assert html == page(study)
    for outer in ("http", "<script", "<link", "<img", "url(", "@import", "src="):
        assert outer not in re.sub(r">[^<]*<", "><", html), outer
    assert re.findall(r"<[^>]* on\w+=", html) == []
    assert re.findall(r'href="[^#]', html) == []
    assert html.startswith('<!doctype html>\n<html lang="en">')


def test_foreign_words_stay_words(tmp_path: Path) -> None:
    evil = "<script>alert('1')</script>\"&amp;"
    variants = (
        f"variants: [{{label: maml}}, {{label: {json.dumps(evil)}, plugins: [gradient-sharing]}}]"
    )
    text = STUDY.replace("variants: [maml, maml+gradient-sharing]", variants)
    html = page(write_study(tmp_path / "a&b<i>", text, inner=INNER))
    assert "<script" not in html
    assert "<i>" not in html
    assert f"maml and {evil} on sinusoid" in headings(html)
    ElementTree.fromstring(f"<a>{''.join(re.findall(r'<svg.*?</svg>', html, re.DOTALL))}</a>")


def test_no_difference_is_told_where_the_interval_holds_0(tmp_path: Path) -> None:
    study = write_study(tmp_path / "study", STUDY.replace("[0.01, 0.1]", "[0.01]"))
    for summary in study.glob("cells/*/summary.json"):
        values = json.loads(summary.read_text())
        shares = values["test"]["mean"] > 0.6
        values["per_task"] = [0.5, 0.7, 0.4, 0.6] if shares else [0.6, 0.5, 0.5, 0.6]
        summary.write_text(json.dumps(values))
    text = words(page(study))
    assert (
        "No difference can be told between maml+gradient-sharing and maml: 0.00 ± "
        in text.replace("+0.00", "0.00").replace("−0.00", "0.00")
    )
    assert "All variants and settings" in text
    assert "Each variant at its best setting" not in text
    assert "Sensitivity" not in text


@pytest.mark.parametrize(
    ("worse", "sentence"),
    [
        (
            (0.1, 0.1),
            "maml+gradient-sharing is worse than maml by 10.00 ± 0.00 pp over 8 paired test tasks, "
            "and in each of 2 seeds.",
        ),
        (
            (0.4, -0.01),
            "maml+gradient-sharing is worse than maml by 19.50 ± 18.32 pp over 8 paired test "
            "tasks, but only in 1 of 2 seeds.",
        ),
    ],
)
def test_a_loss_is_told_too_and_seeds_that_disagree(
    tmp_path: Path, worse: tuple[float, float], sentence: str
) -> None:
    study = write_study(tmp_path / "study", STUDY.replace("[0.01, 0.1]", "[0.01]"))
    for summary in study.glob("cells/*/summary.json"):
        values = json.loads(summary.read_text())
        seed = int("seed: 1" in (summary.parent / "config.yaml").read_text())
        loss = worse[seed] if values["test"]["mean"] > 0.6 else 0
        values["per_task"] = [value - loss for value in TEST]
        summary.write_text(json.dumps(values))
    assert sentence in words(page(study))


def test_a_mean_over_some_seeds_is_said_to_be_too_good(tmp_path: Path) -> None:
    study = write_study(tmp_path / "study")
    for metrics in study.glob("cells/*/metrics.jsonl"):
        text = (metrics.parent / "config.yaml").read_text()
        if "gradient-sharing" in text and "seed: 1" in text:
            metrics.write_text(re.sub(r'"mean": [0-9.]+', '"mean": 0.0', metrics.read_text()))
    text = words(page(study))
    assert "(1 of 2 seeds)" in text
    assert "in half. Where some seeds reach it, it is their mean, and so too good." in text


def test_an_error_is_better_where_it_is_lower(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", config(), metric="mean squared error")
    assert "by the weights that validated best. Lower is better." in words(page(run))


def test_several_variants_are_counted_and_the_best_is_named(tmp_path: Path) -> None:
    text = STUDY.replace("sharing]", "sharing, fomaml]").replace("[0.01, 0.1]", "[0.01]")
    assert (
        "Of 2 variants compared with maml, 1 is better and 1 cannot be told from it. The best test "
        "of them is maml+gradient-sharing: 70.50 ± 6.34 %; maml: 50.50 ± 6.34 %; the difference is "
        "+20.00 ± 0.00 pp over 8 paired test tasks of 2 seeds."
    ) in words(page(write_study(tmp_path / "study", text)))


def config(**changes: Any) -> ExperimentConfig:
    return tiny(plugins=[], **changes)


def test_runs_are_a_small_study(tmp_path: Path) -> None:
    folders = [
        write_run(tmp_path / f"{name}-{seed}", tiny(plugins=plugins, seed=seed), test=test)
        for name, plugins, test in (
            ("plain", [], TEST),
            ("shared", ["gradient-sharing"], tuple(value + 0.1 for value in TEST)),
        )
        for seed in (3, 5)
    ]
    html = page(*folders)
    assert headings(html)[0] == "maml and maml+gradient-sharing on sinusoid"
    assert rows(html)[1:] == [
        ["maml", "50.00 ± 6.32 %", "50.00 · 50.00", "reference", "", "", "6.0"],
        [
            *("maml+gradient-sharing", "60.00 ± 6.32 %", "60.00 · 60.00", "+10.00 ± 0.00 pp"),
            *("+0 %", "+0 %", "6.0"),
        ],
    ]
    assert "study.yaml" not in words(html)
    part = rows(page(*folders[:3]))
    assert [row[0] for row in part[1:]] == ["maml", "maml+gradient-sharing (1 of 2 seeds)"]


def test_one_variant_is_compared_with_its_first_setting(tmp_path: Path) -> None:
    folders = [
        write_run(
            tmp_path / f"{rate}", config(learner__inner_lr=rate), test=[v - rate for v in TEST]
        )
        for rate in (0.01, 0.1, 1.0)
    ]
    html = page(*folders)
    assert [row[:4] for row in rows(html)[-3:]] == [
        ["maml", "inner_lr 0.01", "49.00 ± 12.99 %", "reference"],
        ["maml", "inner_lr 0.1", "40.00 ± 12.99 %", "−9.00 ± 0.00 pp"],
        ["maml", "inner_lr 1.0", "−50.00 ± 12.99 %".replace("−", "-"), "−99.00 ± 0.00 pp"],
    ]
    assert "Sensitivity" in headings(html)


def test_settings_tell_variants_of_one_name_apart_and_own_fields_stand_beside_it(
    tmp_path: Path,
) -> None:
    uses = [{"plugin": "gradient-sharing", "settings": {"gate": gate}} for gate in (0.3, 0.7)]
    folders = [
        write_run(
            tmp_path / str(place),
            tiny(plugins=[use], learner__inner_lr=0.01 * (place + 1)),
        )
        for place, use in enumerate(uses)
    ]
    table = rows(page(*folders))
    assert [row[0] for row in table] == [
        "Variant",
        "maml+gradient-sharing:gate=0.3, inner_lr 0.01",
        "maml+gradient-sharing:gate=0.7, inner_lr 0.02",
    ]
    assert "Setting" not in table[0]


def test_other_tasks_are_not_compared(tmp_path: Path) -> None:
    one = write_run(tmp_path / "one", config())
    other = write_run(tmp_path / "other", tiny(tasks__shots=7))
    text = words(page(one, other))
    assert (
        "shots 3: maml has a test accuracy of 50.00 ± 12.99 % over 4 unseen tasks of 1 seed, and "
        "one seed says nothing about others."
    ) in text
    assert (
        "shots 7: maml+gradient-sharing has a test accuracy of 50.00 ± 12.99 % over 4 unseen tasks "
        "of 1 seed"
    ) in text
    assert "Minus" not in text


def test_a_study_beside_a_run_stands_for_its_runs(tmp_path: Path) -> None:
    study = write_study(tmp_path / "study", STUDY.replace("[0.01, 0.1]", "[0.01]"))
    run = write_run(tmp_path / "one", config())
    assert "finished runs 5" in words(page(study, run))


def test_other_forms_of_tasks_have_pictures_of_their_own(tmp_path: Path) -> None:
    text = STUDY.replace("0.1]}", "0.1], tasks.shots: [1, 5]}")
    html = page(write_study(tmp_path / "study", text, inner=INNER))
    found = headings(html)
    for title in ("Training batches, smoothed", "Support and query loss", "Beside each other"):
        assert [text for text in found if text.startswith(title)] == [
            f"{title}: shots 1",
            f"{title}: shots 5",
        ]
    assert found[-5:-1] == ["Sensitivity", "inner_lr, shots 1", "inner_lr, shots 5", "shots"]
    assert re.findall(r"shots (\d): maml\+gradient-sharing is better", words(html)) == ["1", "5"]


def test_unfinished_runs_are_drawn_as_far_as_they_came(tmp_path: Path) -> None:
    study = write_study(
        tmp_path / "study",
        STUDY.replace("[0.01, 0.1]", "[0.01]"),
        leave_out=["maml, inner_lr 0.01, seed 1"],
    )
    cells = {path.name for path in (study / "cells").iterdir()}
    whole = write_study(tmp_path / "whole", STUDY.replace("[0.01, 0.1]", "[0.01]"))
    [left] = [path for path in (whole / "cells").iterdir() if path.name not in cells]
    shutil.copytree(left, study / "cells" / left.name)
    (study / "cells" / left.name / "summary.json").unlink()
    metrics = study / "cells" / left.name / "metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True)
    metrics.write_text("".join(lines[:20]) + lines[20][:15])  # as a kill may leave it
    html = page(study)
    assert "finished runs 3 of 4" in words(html)
    assert (
        "Not finished, and drawn as far as it came: maml, inner_lr 0.01, seed 1: 20 of 30 "
        "iterations" in words(html)
    )
    metrics.write_text("".join(lines))
    assert "seed 1: 30 of 30 iterations, but no test" in words(page(study))
    assert "Thin dotted lines are unfinished runs" in words(html)
    assert "<title>maml, inner_lr 0.01, seed 1, unfinished</title>" in html


def test_unfinished_runs_alone_have_curves_and_no_table(tmp_path: Path) -> None:
    html = page(write_run(tmp_path / "run", config(), curve=(0.3, 0.4), test=None, inner=INNER))
    assert rows(html) == []
    assert headings(html)[1:3] == ["Learning curves", "Over training"]
    assert "finished runs 0 of 1" in words(html)
    early = page(write_run(tmp_path / "early", config(), curve=(), test=None) / ".." / "run")
    assert "<table" not in early


def test_what_a_run_did_not_log_is_said_or_left_out(tmp_path: Path) -> None:
    html = page(write_run(tmp_path / "run", config()))
    assert headings(html)[1:] == [
        *("Results", "Learning curves", "Over training", "Training batches, smoothed"),
        *("From inner step to inner step", "Repeat it"),
    ]
    assert "These runs have no figures by inner step." in words(html)
    assert "maml has a test accuracy of 50.00 ± 12.99 % over 4 unseen tasks of 1 seed" in words(
        html
    )


def test_a_trained_run(tmp_path: Path) -> None:
    train(tiny(), tmp_path / "run")
    html = page(tmp_path / "run")
    assert "mean squared error" in words(html)
    assert {"gradient-sharing.gate", "gradient-sharing.momentum"} <= set(
        re.findall(r"<strong>(.*?)</strong>", html)
    )


def test_the_page_of_many_long_runs_stays_small(tmp_path: Path) -> None:
    curve = [0.3 + place / 200 for place in range(40)]
    text = STUDY.replace("[0.01, 0.1]", "[0.001, 0.01, 0.1]").replace("seeds: 2", "seeds: 3")
    html = page(write_study(tmp_path / "study", text, curve=curve, inner=INNER))
    assert "finished runs 18" in words(html)
    assert len(html.encode()) < 200_000


def test_wrong_folders_in_a_line_each(tmp_path: Path) -> None:
    assert said(tmp_path / "none") == (
        "there is no folder HERE/none: give the folder of a run or a study"
    )
    (tmp_path / "empty").mkdir()
    assert said(tmp_path / "empty") == (
        "HERE/empty is neither a study (it has no study.yaml) nor a run (no config.yaml): give a "
        "folder that `metaplug train` or `metaplug study` wrote"
    )
    begun = write_run(tmp_path / "begun", config(), curve=(), test=None)
    assert said(begun) == (
        "HERE/begun has no iteration yet, so there is nothing to report: go on with --resume"
    )
    one, other = (write_run(tmp_path / name, config()) for name in ("one", "other"))
    assert said(one, other) == (
        "HERE/one and HERE/other have the same configuration and seed, and would count twice: "
        "leave one out"
    )
    error = write_run(tmp_path / "error", config(seed=1), metric="mean squared error")
    assert said(one, error) == (
        "HERE/one is measured by accuracy and HERE/error by mean squared error, which cannot stand "
        "in one report: report them apart"
    )


def test_a_study_without_a_finished_cell(tmp_path: Path) -> None:
    study = write_study(tmp_path / "study", STUDY, every_label(STUDY))
    assert said(study) == (
        "HERE/study: no run of this study is finished, so there is nothing to report: let "
        "`metaplug study` finish one"
    )
    (study / "cells.json").write_text("{}")
    assert said(study) == (
        "HERE/study/cells.json is not the index of this study that metaplug wrote (KeyError: "
        "'maml, inner_lr 0.01, seed 0'): run the study again, which writes it"
    )


def test_a_study_is_reported_whatever_code_computed_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = write_study(tmp_path / "study")
    before = page(study)
    monkeypatch.setattr("metaplug.experiments.study.cells.digest_of", lambda config: "other")
    assert page(study) == before


def every_label(text: str) -> list[str]:
    """The labels of all cells of a study."""
    study = Study.model_validate(yaml.safe_load(text))
    return [cell.label for cell in cells_of(study, "")]


def test_a_damaged_run_is_named(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", config())
    (run / "metrics.jsonl").write_text("{}\n")
    assert said(run).startswith("HERE/run/metrics.jsonl, line 1, is not what a run writes (")
    (run / "run.json").write_text("[")
    (run / "metrics.jsonl").write_bytes(
        (write_run(tmp_path / "b", config()) / "metrics.jsonl").read_bytes()
    )
    assert said(run).startswith("HERE/run/run.json is not the record of a run")


def test_the_command(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run", config())
    for arguments, status, words in (
        ([], 0, f"the report is {run / 'report.html'}"),
        (["--out", f"{tmp_path}/a.html"], 0, f"the report is {tmp_path}/a.html"),
        (
            ["--out", f"{tmp_path}/none/a.html"],
            2,
            f"metaplug: --out {tmp_path}/none/a.html: it lies in a folder {tmp_path}/none that "
            "does not exist; give a file in a folder that exists",
        ),
        (
            ["--out", str(tmp_path)],
            2,
            f"metaplug: --out {tmp_path}: it is a folder; give a file in a folder that exists",
        ),
    ):
        with pytest.raises(SystemExit) as ended:
            main(["report", str(run), *arguments])
        printed = (f"{words}\n", "") if status == 0 else ("", f"{words}\n")
        assert (ended.value.code, capfd.readouterr()) == (status, printed)
    assert (run / "report.html").read_bytes() == (tmp_path / "a.html").read_bytes()


def test_examples() -> None:
    for module in (scales, panels):
        assert doctest.testmod(module).failed == 0


def test_scales() -> None:
    assert [text for _, text in scales.linear([0, 1]).ticks] == [
        *("0.0", "0.2", "0.4", "0.6", "0.8", "1.0")
    ]
    assert [text for _, text in scales.linear([-3, 12_000]).ticks] == [
        *("−5,000", "0", "5,000", "10,000", "15,000")
    ]
    assert [text for _, text in scales.linear([10, 95], tight=True).ticks] == [
        *("20", "40", "60", "80")
    ]
    flat = scales.linear([0.5, 0.5])
    assert flat.low < 0.5 < flat.high
    zero = scales.linear([0.0])
    assert zero.low < 0 < zero.high
    log = scales.at_values([0.001, 0.01, 0.1], ["0.001", "0.01", "0.1"])
    assert log.is_log
    assert log.at(0.01) == pytest.approx(0.5)
    crowded = scales.at_values(range(40), [f"value {k}" for k in range(40)])
    assert 2 <= len(crowded.ticks) < 10


def test_a_line_with_gaps_a_level_and_names_at_the_ends() -> None:
    nan = float("nan")
    lines = (
        Line("first", ((0, 1.0), (1, nan), (2, 1.0), (3, 1.0)), 0, end="0"),
        Line("second", ((0, 1.0), (3, 1.0)), 8, end="1"),
    )
    drawn = ElementTree.fromstring(draw(Panel("P", "", "x", "y", lines, level=(2.0, "goal")), "p"))
    first, second = drawn.findall("g")
    paths = [each.get("d", "") for each in first if each.get("class") == "line"]
    assert [path.count("L") for path in paths] == [1]  # alone, a point has a marker only
    assert second.get("class") == "c1"
    ends = {each.text: float(each.get("y", "")) for each in drawn.iter("text")}
    assert ends["1"] - ends["0"] >= 13
    assert "goal" in ends


def test_text_and_lines_stand_out_in_every_scheme() -> None:
    schemes = re.findall(r":root \{(.*?)\}", _file("page.css"), re.DOTALL)
    assert len(schemes) == 3  # light, dark and paper
    for scheme in schemes:
        colours = dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", scheme))
        for text in ("ink", "soft", "link"):
            for behind in ("paper", "wash"):
                assert contrast(colours[text], colours[behind]) >= 4.5, (text, behind)
        for line in range(LOOKS):
            assert contrast(colours[f"c{line}"], colours["paper"]) >= 3, line


def contrast(one: str, other: str) -> float:
    """The ratio of two colours by the Web Content Accessibility Guidelines 2."""
    dark, light = sorted(luminance(each) for each in (one, other))
    return (light + 0.05) / (dark + 0.05)


def luminance(colour: str) -> float:
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [
        part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts
    ]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_lines_of_one_colour_have_other_dashes() -> None:
    keys = {str(draw_key(Key("", look))) for look in range(LOOKS**2)}
    assert len(keys) == LOOKS**2
