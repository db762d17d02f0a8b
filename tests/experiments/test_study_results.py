"""The arithmetic of a study, on curves made by hand."""

from __future__ import annotations

import io
import math
from dataclasses import replace

import pytest
from rich.console import Console
from support.studies import curve, result, row

from metaplug.evaluation.curves import Point, best_point, first_reaching
from metaplug.evaluation.results import Metric
from metaplug.experiments.study.acceleration import Acceleration, accelerate
from metaplug.experiments.study.over_fitting import over_fitting
from metaplug.experiments.study.results import StudyResult
from metaplug.experiments.study.tuned import comparisons
from metaplug.experiments.study.values import to_values
from metaplug.report.comparing import mean_text
from metaplug.report.console import show
from metaplug.report.page.chosen import flat, heading
from metaplug.report.study import seeds_notes, study_tables


def iterations(found: Acceleration) -> tuple[tuple[float, ...], list[int | None], list[int | None]]:
    """The targets, and the iterations that baseline and variant need."""
    needed = [
        [None if point is None else point.iteration for point in points]
        for points in (found.baseline, found.reached)
    ]
    return found.targets, needed[0], needed[1]


def test_acceleration_is_the_ratio_of_iterations_minus_one() -> None:
    baseline = curve(0.30, 0.42, 0.55, 0.60, 0.63, 0.66, 0.68, 0.693)
    faster = curve(0.40, 0.60, 0.70, 0.72, 0.74, 0.75, 0.76, 0.767)
    found = accelerate("accuracy", [(baseline, faster)])
    assert iterations(found) == ((0.693,), [400], [150])
    assert found.percent == (pytest.approx(100 * (400 / 150 - 1)),)
    assert found.mean_percent == pytest.approx(166.6667, abs=1e-4)


def test_acceleration_in_seconds_counts_what_an_iteration_costs() -> None:
    baseline = curve(0.5, 0.6, 0.7)
    slow = tuple(Point(p.iteration, 0.7, 0.01, 2.0 * p.iteration) for p in baseline)
    found = accelerate("accuracy", [(baseline, slow)])
    assert (found.percent, found.percent_of_seconds) == ((200.0,), (50.0,))
    unknown = tuple(Point(p.iteration, p.mean, p.interval) for p in slow)
    assert accelerate("accuracy", [(baseline, unknown)]).percent_of_seconds == (None,)


def test_the_target_is_the_best_value_and_its_first_iteration() -> None:
    found = accelerate("accuracy", [(curve(0.5, 0.7, 0.7, 0.6), curve(0.6, 0.65, 0.7, 0.9))])
    assert iterations(found) == ((0.7,), [100], [150])
    assert found.percent == (pytest.approx(-100 / 3),)


def test_a_given_target_may_be_out_of_the_baselines_reach() -> None:
    found = accelerate("accuracy", [(curve(0.5, 0.7), curve(0.8, 0.9))], 0.75)
    assert iterations(found) == ((0.75,), [None], [50])
    assert (found.percent, found.seeds_reached, found.mean_percent) == ((None,), 1, None)


@pytest.mark.parametrize("metric", ["mean squared error", "perplexity"])
def test_for_an_error_less_is_better(metric: Metric) -> None:
    found = accelerate(metric, [(curve(4.0, 2.0, 1.0, 1.5), curve(1.0, 3.0, 0.5, 0.4))])
    assert iterations(found) == ((1.0,), [150], [50])
    assert found.percent == (200.0,)


def test_a_baseline_is_as_fast_as_itself() -> None:
    line = curve(0.5, 0.7, 0.6)
    assert accelerate("accuracy", [(line, line)]).percent == (0.0,)


def test_a_seed_that_never_reaches_the_target_has_no_acceleration_and_is_counted() -> None:
    baseline = curve(0.5, 0.6, 0.7, 0.8)
    found = accelerate(
        "accuracy", [(baseline, curve(0.8, 0.8, 0.8, 0.8)), (baseline, curve(0.1, 0.2, 0.3, 0.4))]
    )
    assert found.percent == (300.0, None)
    assert (found.seeds_reached, found.mean_percent) == (1, 300.0)
    never = accelerate("accuracy", [(baseline, curve(0.1, 0.2, 0.3, 0.4))])
    assert (never.percent, never.seeds_reached, never.mean_percent) == ((None,), 0, None)


def test_values_that_are_not_finite_are_never_the_best_and_reach_nothing() -> None:
    line = curve(math.nan, 3.0, math.nan, 2.0)
    assert best_point("mean squared error", line).iteration == 200
    assert best_point("accuracy", curve(math.nan, 0.1)).iteration == 100
    found = first_reaching("mean squared error", curve(math.nan, math.inf, 2.0), 2.0)
    assert found is not None
    assert found.iteration == 150


def test_mean_curves_and_their_interval() -> None:
    both = result(
        "accuracy",
        {
            "maml": [curve(0.4, 0.6), curve(0.6, 0.8)],
            "anil": [curve(0.7, 0.7), curve(0.7, 0.9)],
        },
    )
    maml, anil = both.rows
    assert maml.mean_curve == (
        Point(50, 0.5, pytest.approx(math.sqrt(2 * 0.01**2) / 2), 50.0),
        Point(100, pytest.approx(0.7), pytest.approx(math.sqrt(2 * 0.01**2) / 2), 100.0),
    )
    means = both.acceleration_of_means(anil, maml)
    assert means is not None
    assert means.percent == (100.0,)
    assert both.acceleration(anil, maml).percent == (100.0, 0.0)
    assert both.acceleration(anil, maml).mean_percent == 50.0


def test_tests_are_pooled_over_seeds_and_differences_taken_task_by_task() -> None:
    tests = {"maml": [[0.2, 0.4], [0.6, 0.8]], "anil": [[0.3, 0.5], [0.7, 0.9]]}
    both = result("accuracy", {"maml": [curve(0.5)] * 2, "anil": [curve(0.5)] * 2}, tests)
    maml, anil = both.rows
    assert (anil.test.num_tasks, anil.test.mean) == (4, pytest.approx(0.6))
    difference = both.difference(anil, maml)
    assert difference is not None
    assert difference.mean == pytest.approx(0.1)
    assert difference.interval == pytest.approx(0.0, abs=1e-6)


def test_a_variant_extends_the_longest_list_of_plugins_that_it_begins_with() -> None:
    bases = {
        "maml": None,
        "maml++": None,
        "maml+gradient-sharing": "maml",
        "maml+gradient-sharing+meta-sgd": "maml+gradient-sharing",
        "maml+meta-sgd+gradient-sharing": "maml",
        "maml+++gradient-sharing": "maml++",
    }
    curves = {label: [curve(0.2, 0.4, 0.6), curve(0.3, 0.6, 0.5)] for label in bases}
    curves["maml++"] = [curve(0.3, 0.5, 0.7), curve(0.4, 0.7, 0.7)]
    curves["maml+++gradient-sharing"] = [curve(0.7, 0.7, 0.7), curve(0.4, 0.5, 0.6)]
    made = result("accuracy", curves)
    found = {each.label: made.base_of(each) for each in made.rows}
    assert {label: base and base.label for label, base in found.items()} == bases
    both, own, base = (row(made, each) for each in ("maml+++gradient-sharing", "maml", "maml++"))
    assert made.acceleration(both, own).percent == (200.0, pytest.approx(-100 / 3))
    assert made.acceleration(both, base).percent == (200.0, None)
    values = {each["label"]: each for each in to_values(made)["rows"]}
    assert values["maml"]["base"] is None
    assert values["maml"]["acceleration_over_base_percent"] is None


RATES = {"slow": {"learner.inner_lr": 0.1}, "fast": {"learner.inner_lr": 0.4}}


def test_rows_are_compared_at_the_same_setting() -> None:
    curves = {
        "maml@slow": [curve(0.5, 0.8)],
        "maml@fast": [curve(0.4, 0.5)],
        "anil@slow": [curve(0.5, 0.6)],
        "anil@fast": [curve(0.5, 0.7)],
    }
    axes = {"learner.inner_lr": [0.1, 0.4]}
    made = result("accuracy", curves, settings=RATES, axes=axes)
    found = {each.label: made.baseline_of(each) for each in made.rows}
    assert {label: base and base.label for label, base in found.items()} == {
        "maml, inner_lr 0.1": "maml, inner_lr 0.1",
        "maml, inner_lr 0.4": "maml, inner_lr 0.4",
        "anil, inner_lr 0.1": "maml, inner_lr 0.1",
        "anil, inner_lr 0.4": "maml, inner_lr 0.4",
    }
    assert made.tuned == ("learner.inner_lr",)
    [best] = made.best_rows()
    assert [each.label for each in best] == ["maml, inner_lr 0.1", "anil, inner_lr 0.4"]


def test_a_study_may_say_which_axes_are_tuned() -> None:
    settings = {
        f"{rate}{steps}": {**RATES[rate], "learner.inner_steps": steps}
        for rate in RATES
        for steps in (1, 5)
    }
    reached = {"slow1": 0.5, "slow5": 0.9, "fast1": 0.6, "fast5": 0.8}
    curves = {f"maml@{setting}": [curve(value)] for setting, value in reached.items()}
    axes = {"learner.inner_lr": [0.1, 0.4], "learner.inner_steps": [1, 5]}
    by_both = result("accuracy", curves, settings=settings, axes=axes)
    by_rate = result("accuracy", curves, settings=settings, axes=axes, tuned=("learner.inner_lr",))
    assert [[each.label for each in rows] for rows in by_both.best_rows()] == [
        ["maml, inner_lr 0.1, inner_steps 5"]
    ]
    assert [[each.label for each in rows] for rows in by_rate.best_rows()] == [
        ["maml, inner_lr 0.4, inner_steps 1"],
        ["maml, inner_lr 0.1, inner_steps 5"],
    ]


def test_an_axis_of_one_variants_plugin_leaves_the_others_to_compare_with() -> None:
    gates = {"low": {"plugins.gradient-sharing.gate": 0.2}}
    curves = {"maml": [curve(0.5)], "maml+gradient-sharing@low": [curve(0.6)]}
    axes = {"plugins.gradient-sharing.gate": [0.2, 0.5]}
    made = result("accuracy", curves, settings=gates, axes=axes)
    base = made.baseline_of(made.rows[1])
    assert base is made.rows[0]


def test_no_row_of_the_baseline_is_picked_where_an_axis_concerns_it_alone() -> None:
    gates = {each: {"plugins.gradient-sharing.gate": each} for each in ("a", "b")}
    curves = {
        "maml+gradient-sharing@a": [curve(0.5)],
        "maml+gradient-sharing@b": [curve(0.6)],
        "maml": [curve(0.4)],
    }
    axes = {"plugins.gradient-sharing.gate": ["a", "b"]}
    made = result("accuracy", curves, settings=gates, axes=axes)
    assert [base and base.label for base in map(made.baseline_of, made.rows)] == [
        "maml+gradient-sharing, gate a",
        "maml+gradient-sharing, gate b",
        None,
    ]
    assert [each.label for each in made.best_rows()[0]] == ["maml+gradient-sharing, gate b", "maml"]


def test_a_variant_that_an_axis_does_not_concern_stands_at_each_of_its_values() -> None:
    rate, gate = "learner.inner_lr", "plugins.gradient-sharing.gate"
    gates = {f"{each}{lr}": {rate: lr, gate: each} for each in ("a", "b") for lr in (0.1, 0.4)}
    reached = {"a0.1": 0.5, "a0.4": 0.6, "b0.1": 0.8, "b0.4": 0.7}
    curves = {f"maml+gradient-sharing@{name}": [curve(value)] for name, value in reached.items()}
    made = result(
        "accuracy",
        {"maml@slow": [curve(0.5)], "maml@fast": [curve(0.4)], **curves},
        settings={**RATES, **gates},
        axes={rate: [0.1, 0.4], gate: ["a", "b"]},
        tuned=(rate,),
    )
    groups = made.best_rows()
    assert [[each.label for each in rows] for rows in groups] == [
        ["maml, inner_lr 0.1", "maml+gradient-sharing, inner_lr 0.4, gate a"],
        ["maml, inner_lr 0.1", "maml+gradient-sharing, inner_lr 0.1, gate b"],
    ]
    assert [comparisons(made, rows).count for rows in groups] == [1, 1]
    assert [heading(made, rows) for rows in groups] == ["gate a", "gate b"]
    assert len(flat(groups)) == 3


def test_of_a_given_target_the_seeds_that_count_are_those_of_both() -> None:
    curves = {
        "maml": [curve(0.5, 0.7), curve(0.4, 0.5), curve(0.4, 0.5)],
        "anil": [curve(0.7, 0.7), curve(0.7, 0.8), curve(0.2, 0.3)],
    }
    made = result("accuracy", curves, target=0.7)
    maml, anil = made.rows
    assert mean_text(made.acceleration(anil, maml)) == "+100 % (1 of 3 seeds)"
    assert mean_text(made.acceleration(maml, anil)) == "-50 % (1 of 3 seeds)"
    text = io.StringIO()
    show(study_tables(made), Console(file=text, width=120))
    shown = text.getvalue()
    assert ("best after" in shown, "seed 0  after 100 " in shown) == (False, True)
    assert shown.count("not reached") == 3
    assert "50; the baseline never" in shown
    none = result("accuracy", {"maml": [curve(0.5)] * 2, "anil": [curve(0.9)] * 2}, target=0.8)
    assert mean_text(none.acceleration(none.rows[1], none.rows[0])) == "the baseline never"
    neither = result("accuracy", {"maml": [curve(0.5)], "anil": [curve(0.6)]}, target=0.8)
    assert mean_text(neither.acceleration(neither.rows[1], neither.rows[0])) == "not reached"


def test_two_rows_that_extend_each_other_both_ways_are_tested_once() -> None:
    curves = {"maml": [curve(0.5)], "maml+gradient-sharing": [curve(0.6)], "anil": [curve(0.4)]}
    tests = {
        "maml": [[0.2, 0.5, 0.4, 0.4]],
        "maml+gradient-sharing": [[0.3, 0.4, 0.6, 0.6]],
        "anil": [[0.2, 0.3, 0.3, 0.1]],
    }
    axes = {"learner.inner_lr": [0.1]}
    made = result("accuracy", curves, tests, axes=axes, baseline="maml+gradient-sharing")
    found = comparisons(made, made.rows)
    own, extending = found.with_baseline["maml"], found.with_base["maml+gradient-sharing"]
    assert found.count == 2
    assert (own.p_value, own.p_holm) == (extending.p_value, extending.p_holm)
    assert own.p_holm == own.p_value  # the larger of two


def with_seeds(found: StudyResult, **seeds: tuple[int, ...]) -> StudyResult:
    """The result with only these seeds of some variants or settings."""
    rows = tuple(
        replace(each, runs=tuple(each.runs[seed] for seed in wanted))
        for each in found.rows
        for wanted in [next((seeds[name] for name in seeds if name in each.label), each.seeds)]
    )
    return replace(found, rows=rows)


def test_means_of_other_seeds_are_not_compared() -> None:
    # Seed 1 has the harder tasks.
    lines = [curve(0.6, 0.8), curve(0.3, 0.4)]
    whole = result("accuracy", {"maml": lines, "anil": lines})
    part = with_seeds(whole, maml=(1,))
    maml, anil = part.rows
    means = part.acceleration_of_means(anil, maml)
    assert means is not None
    assert (means.targets, means.percent) == ((0.4,), (0.0,))
    none = with_seeds(whole, maml=(1,), anil=(0,))
    maml, anil = none.rows
    assert none.acceleration_of_means(anil, maml) is None
    [_, values] = to_values(none)["rows"]
    assert (values["acceleration_percent"], values["test_minus_baseline"]) == (None, None)
    text = io.StringIO()
    show(study_tables(none), Console(file=text, width=120))
    assert "other seeds" in text.getvalue()
    assert "The rows have different seeds, whose tasks differ in difficulty:" in text.getvalue()
    assert seeds_notes(whole) == []
    assert "not reached" not in text.getvalue()


def test_the_best_setting_is_chosen_in_the_seeds_that_all_have() -> None:
    # The slow one validates worse in each seed, and lacks the harder one.
    curves = {
        "maml@slow": [curve(0.7), curve(0.3)],
        "maml@fast": [curve(0.8), curve(0.4)],
    }
    axes = {"learner.inner_lr": [0.1, 0.4]}
    part = with_seeds(
        result("accuracy", curves, settings=RATES, axes=axes), **{"inner_lr 0.1": (0,)}
    )
    assert [each.label for each in part.best_rows()[0]] == ["maml, inner_lr 0.4"]
    few = with_seeds(part, **{"inner_lr 0.4": (1,)})
    text = io.StringIO()
    show(study_tables(few), Console(file=text, width=120))
    assert "maml, inner_lr 0.1 (1 of 2 seeds)" in text.getvalue()


def test_numbers_stay_where_labels_are_longer_than_the_terminal_is_wide() -> None:
    label = f"maml, {'long ' * 20}"
    made = result("accuracy", {"maml": [curve(0.5)]}, {"maml": [[0.2, 0.6]]})
    long = replace(made, rows=(replace(made.rows[0], setting={"a.b": label}),))
    text = io.StringIO()
    show(study_tables(long), Console(file=text, width=80, force_terminal=True))
    assert "40.00" in text.getvalue()


def test_one_variant_alone_is_shown_at_its_best_setting_too() -> None:
    curves = {"maml@slow": [curve(0.7)], "maml@fast": [curve(0.8)]}
    made = result("accuracy", curves, settings=RATES, axes={"learner.inner_lr": [0.1, 0.4]})
    text = io.StringIO()
    show(study_tables(made), Console(file=text, width=120))
    best = text.getvalue().partition("Each variant at its best setting")[2]
    assert "maml, inner_lr 0.4  80.00 %" in best
    assert "inner_lr 0.1" not in best


@pytest.mark.parametrize("metric", ["accuracy", "mean squared error"])
def test_a_setting_without_a_finite_validation_is_never_the_best(metric: Metric) -> None:
    curves = {"maml@slow": [curve(math.nan, math.nan)], "maml@fast": [curve(0.5, 0.6)]}
    axes = {"learner.inner_lr": [0.1, 0.4]}
    made = result(metric, curves, settings=RATES, axes=axes)
    assert [each.label for each in made.best_rows()[0]] == ["maml, inner_lr 0.4"]


def test_no_best_is_chosen_over_other_tasks() -> None:
    shots = {"one": {"tasks.shots": 1}, "five": {"tasks.shots": 5}}
    curves = {f"{each}@{shot}": [curve(0.5)] for each in ("maml", "anil") for shot in shots}
    made = result("accuracy", curves, settings=shots, axes={"tasks.shots": [1, 5]})
    assert made.best_rows() == ()
    both = result(
        "accuracy",
        {
            "maml@slow1": [curve(0.5)],
            "maml@slow5": [curve(0.6)],
            "maml@fast1": [curve(0.7)],
            "maml@fast5": [curve(0.1)],
        },
        settings={
            f"{rate}{shot}": {**RATES[rate], "tasks.shots": shot}
            for rate in RATES
            for shot in (1, 5)
        },
        axes={"learner.inner_lr": [0.1, 0.4], "tasks.shots": [1, 5]},
    )
    assert [[each.label for each in rows] for rows in both.best_rows()] == [
        ["maml, inner_lr 0.4, shots 1"],
        ["maml, inner_lr 0.1, shots 5"],
    ]


BASED = {
    "maml@slow": [curve(0.5, 0.8), curve(0.6, 0.7)],
    "maml@fast": [curve(0.4, 0.5), curve(0.4, 0.5)],
    "maml++@slow": [curve(0.1, 0.2), curve(0.1, 0.2)],
    "maml++@fast": [curve(0.3, 0.9), curve(0.3, 0.9)],
    "maml+++gradient-sharing@slow": [curve(0.8, 0.95), curve(0.9, 0.95)],
}


def based() -> StudyResult:
    tests = {label: [[0.1, 0.5, 0.6], [0.2, 0.4, 0.6]] for label in BASED}
    tests["maml+++gradient-sharing@slow"] = [[0.3, 0.6, 0.6], [0.3, 0.6, 0.6]]
    axes = {"learner.inner_lr": [0.1, 0.4]}
    return result("accuracy", BASED, tests, settings=RATES, axes=axes)


def test_best_settings_are_compared_with_each_other() -> None:
    made = based()
    [rows] = made.best_rows()
    found = comparisons(made, rows)
    shared = "maml+++gradient-sharing, inner_lr 0.1"
    # MAML's best of 0.8 and 0.7 after 100, MAML++'s of 0.9 after 100 at the other rate.
    assert found.with_baseline[shared].acceleration.percent == (100.0, 100.0)
    base = found.with_base[shared]
    assert (base.over.label, base.acceleration.percent) == ("maml++, inner_lr 0.4", (0.0, 100.0))
    assert base.by_seed == (pytest.approx(0.1), pytest.approx(0.1))
    # Two with MAML's, and this one: t = √6 · 0.1 / 0.08944 = 2.7386, of 5 degrees of freedom.
    assert found.count == 3
    assert base.p_value == pytest.approx(0.040859, abs=1e-6)
    assert base.p_holm == pytest.approx(3 * 0.040859, abs=3e-6)
    values = to_values(made)["best"][0][2]
    assert values["minus_base"]["over"] == "maml++, inner_lr 0.4"
    assert values["minus_base"]["p_value_holm"] == base.p_holm
    assert values["minus_base"]["comparisons"] == 3
    assert values["acceleration_over_baseline_percent"] == [100.0, 100.0]
    text = io.StringIO()
    show(study_tables(made), Console(file=text, width=140))
    lines = text.getvalue().partition("Each variant beside the one that it extends")[2]
    assert f"{shared}  maml++, inner_lr 0.4  +10.00 ± 9.39 pp  +10.00, +10.00  0.123" in lines
    assert "corrected by Holm's method for 3 comparisons." in lines
    assert "for the 2 training runs of a row" in lines


def test_over_fitting_is_the_query_loss_above_the_support_loss_early() -> None:
    made = based()
    for place, run in enumerate(made.rows[0].runs):
        vars(run)["metrics"] = [
            {
                "iteration": iteration,
                "validation": {
                    "inner": {
                        "support_losses": [1.6, 0.2, 0.1 * place],
                        "query_losses": [1.6, 1.0, late],
                    }
                },
            }
            for iteration, late in ((25, 0.8), (50, None if place else 0.6), (225, 9.0))
        ]
    [found] = over_fitting(made)
    assert (found.row.label, found.iterations) == ("maml, inner_lr 0.1", (25, 50))
    assert found.gaps == (pytest.approx(0.75), pytest.approx(math.nan, nan_ok=True))
    assert found.gap_by_seed == (pytest.approx(0.7), pytest.approx(math.nan, nan_ok=True))
    assert found.query_by_step[:2] == (1.6, 1.0)
    assert found.support_by_step == pytest.approx((1.6, 0.2, 0.05))
    assert over_fitting(made, until=20) == ()
    assert to_values(made)["over_fitting"][0]["gap"] == [
        pytest.approx(0.75),
        pytest.approx(math.nan, nan_ok=True),
    ]


def with_data(found: StudyResult, label: str, *digests: str) -> StudyResult:
    """The runs of a row with a digest of their test classes; "" for one of an older version."""
    old = row(found, label)
    runs = tuple(
        replace(run, summary={**run.summary, **({"data": {"test": each}} if each else {})})
        for run, each in zip(old.runs, digests, strict=True)
    )
    return replace(
        found, rows=tuple(replace(each, runs=runs) if each is old else each for each in found.rows)
    )


def test_runs_of_other_data_are_no_pair() -> None:
    lines = (curve(0.5, 0.6), curve(0.5, 0.7))
    tests = {"maml": [[0.2, 0.4], [0.0, 0.0]], "anil": [[0.5, 0.6], [1.0, 1.0]]}
    whole = result("accuracy", {"maml": lines, "anil": lines}, tests)
    known = with_data(whole, "maml", "a", "a")
    for digests, count in ((("a", "a"), 4), (("", ""), 4), (("a", "b"), 2)):
        found = with_data(known, "anil", *digests)
        difference = found.difference(row(found, "anil"), row(found, "maml"))
        assert difference is not None
        assert difference.num_tasks == count
        assert len(found.acceleration(row(found, "anil"), row(found, "maml")).targets) == count / 2
    assert found.on_other_data == ("anil, seed 1",)
    assert difference.per_task.tolist() == pytest.approx([0.3, 0.2])
    found = with_data(known, "anil", "b", "b")
    assert found.difference(row(found, "anil"), row(found, "maml")) is None
    text = io.StringIO()
    show(study_tables(found), Console(file=text, width=120))
    assert text.getvalue().count("other data") == 2  # in the table, and in the note


def test_the_best_setting_is_chosen_on_the_same_data() -> None:
    lines = {"maml@low": (curve(0.4), curve(0.9)), "maml@high": (curve(0.5), curve(0.1))}
    settings = {"low": {"learner.inner_lr": 0.1}, "high": {"learner.inner_lr": 0.2}}
    axes = {"learner.inner_lr": [0.1, 0.2]}
    found = result("accuracy", lines, settings=settings, axes=axes)
    assert found.best_validated(found.rows).setting == settings["low"]
    for place, digests in ((0, ("a", "a")), (1, ("a", "b"))):
        found = with_data(found, found.rows[place].label, *digests)
    assert found.best_validated(found.rows).setting == settings["high"]
