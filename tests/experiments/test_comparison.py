"""The arithmetic of a comparison on curves made by hand, and one comparison of tiny runs."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from metaplug import EvaluationResult, RequestError, RunError
from metaplug.evaluation.results import Metric
from metaplug.experiments.build import build
from metaplug.experiments.comparison import (
    Comparison,
    Curve,
    Point,
    SeedRun,
    Variant,
    accelerate,
    best_point,
    compare,
    first_reaching,
    to_values,
)
from metaplug.experiments.configuration import ExperimentConfig
from metaplug.experiments.json_values import to_json


def curve(*means: float, every: int = 50) -> Curve:
    return tuple(Point(every * (index + 1), mean, 0.01) for index, mean in enumerate(means))


def comparison(
    metric: Metric,
    curves: dict[str, list[Curve]],
    tests: dict[str, list[list[float]]] | None = None,
) -> Comparison:
    """A comparison from curves by label and seed."""

    def run(seed: int, line: Curve, values: list[float]) -> SeedRun:
        return SeedRun(
            seed, line, EvaluationResult(metric, torch.tensor(values).double(), 1), {}, 1.0, {}
        )

    runs = {
        label: tuple(
            run(seed, line, (tests or {}).get(label, [[0.0, 1.0]] * 9)[seed])
            for seed, line in enumerate(lines)
        )
        for label, lines in curves.items()
    }
    seeds = tuple(range(len(next(iter(curves.values())))))
    return Comparison(
        metric, tuple(Variant(label, ExperimentConfig()) for label in curves), seeds, runs
    )


def test_acceleration_is_the_ratio_of_iterations_minus_one() -> None:
    # the first row of the trial runs: 0.693 after 400 iterations, reached after 150
    baseline = curve(0.30, 0.42, 0.55, 0.60, 0.63, 0.66, 0.68, 0.693)
    faster = curve(0.40, 0.60, 0.70, 0.72, 0.74, 0.75, 0.76, 0.767)
    found = accelerate("accuracy", [(baseline, faster)])
    assert (found.targets, found.baseline_iterations, found.iterations) == (
        (0.693,),
        (400,),
        (150,),
    )
    assert found.percent == (pytest.approx(100 * (400 / 150 - 1)),)
    assert found.mean_percent == pytest.approx(166.6667, abs=1e-4)


def test_the_target_is_the_best_value_and_its_first_iteration() -> None:
    found = accelerate("accuracy", [(curve(0.5, 0.7, 0.7, 0.6), curve(0.6, 0.65, 0.7, 0.9))])
    assert (found.targets, found.baseline_iterations, found.iterations, found.percent) == (
        (0.7,),
        (100,),
        (150,),
        (pytest.approx(-100 / 3),),
    )


@pytest.mark.parametrize("metric", ["mean squared error", "perplexity"])
def test_for_an_error_less_is_better(metric: Metric) -> None:
    found = accelerate(metric, [(curve(4.0, 2.0, 1.0, 1.5), curve(1.0, 3.0, 0.5, 0.4))])
    assert (found.targets, found.baseline_iterations, found.iterations, found.percent) == (
        (1.0,),
        (150,),
        (50,),
        (200.0,),
    )


def test_a_baseline_is_as_fast_as_itself() -> None:
    line = curve(0.5, 0.7, 0.6)
    assert accelerate("accuracy", [(line, line)]).percent == (0.0,)


def test_a_seed_that_never_reaches_the_target_has_no_acceleration_and_is_counted() -> None:
    baseline = curve(0.5, 0.6, 0.7, 0.8)
    found = accelerate(
        "accuracy", [(baseline, curve(0.8, 0.8, 0.8, 0.8)), (baseline, curve(0.1, 0.2, 0.3, 0.4))]
    )
    assert found.percent == (300.0, None)
    assert (found.reached, found.mean_percent) == (1, 300.0)
    never = accelerate("accuracy", [(baseline, curve(0.1, 0.2, 0.3, 0.4))])
    assert (never.percent, never.reached, never.mean_percent) == ((None,), 0, None)


def test_values_that_are_not_finite_are_never_the_best_and_reach_nothing() -> None:
    line = curve(math.nan, 3.0, math.nan, 2.0)
    assert best_point("mean squared error", line) == Point(200, 2.0, 0.01)
    assert best_point("accuracy", curve(math.nan, 0.1)).iteration == 100
    assert first_reaching("mean squared error", curve(math.nan, math.inf, 2.0), 2.0) == 150


def test_mean_curves_and_their_interval() -> None:
    both = comparison(
        "accuracy",
        {"b": [curve(0.4, 0.6), curve(0.6, 0.8)], "c": [curve(0.7, 0.7), curve(0.7, 0.9)]},
    )
    assert both.mean_curve("b") == (
        Point(50, 0.5, pytest.approx(math.sqrt(2 * 0.01**2) / 2)),
        Point(100, pytest.approx(0.7), pytest.approx(math.sqrt(2 * 0.01**2) / 2)),
    )
    assert both.acceleration_of_means("c").percent == (100.0,)
    assert both.acceleration("c").percent == (100.0, 0.0)
    assert both.acceleration("c").mean_percent == 50.0


def test_tests_are_pooled_over_seeds_and_differences_taken_task_by_task() -> None:
    tests = {"b": [[0.2, 0.4], [0.6, 0.8]], "c": [[0.3, 0.5], [0.7, 0.9]]}
    both = comparison("accuracy", {"b": [curve(0.5)] * 2, "c": [curve(0.5)] * 2}, tests)
    assert (both.test("c").num_tasks, both.test("c").mean) == (4, pytest.approx(0.6))
    assert both.difference("c").mean == pytest.approx(0.1)
    assert both.difference("c").interval == pytest.approx(0.0, abs=1e-6)


TINY: dict[str, Any] = {
    "model": {"name": "mlp", "settings": {"hidden": [4]}},
    "tasks": {"source": "sinusoid", "shots": 3, "queries": 3},
    "learner": {"inner_lr": 0.01, "inner_steps": 1},
    "training": {"iterations": 4, "tasks_per_batch": 2, "validate_every": 2, "test_tasks": 5},
    "runtime": {"threads": 1, "device": "cpu"},
}


def variant(label: str, *plugins: str, **changes: Any) -> Variant:
    return Variant(label, ExperimentConfig.model_validate({**TINY, "plugins": plugins, **changes}))


def test_variants_see_the_same_tasks_and_begin_with_the_same_weights() -> None:
    seen: list[tuple[str, int, int, float]] = []
    variants = [variant("maml"), variant("same"), variant("shared", "gradient-sharing")]
    found = compare(
        variants,
        [3, 4],
        on_record=lambda one, seed, record: seen.append(
            (one.label, seed, record.step.iteration, record.step.outer_loss)
        ),
    )
    assert [entry[:3] for entry in seen] == [
        (label, seed, iteration)
        for seed in (3, 4)
        for label in ("maml", "same", "shared")
        for iteration in range(1, 5)
    ]
    assert found.seeds == (3, 4)
    for baseline, same, shared in zip(
        *(found.runs[label] for label in ("maml", "same", "shared")), strict=True
    ):
        assert baseline.curve == same.curve
        assert torch.equal(baseline.test.per_task, same.test.per_task)
        assert [point.iteration for point in shared.curve] == [2, 4]
        assert shared.curve != baseline.curve
    assert found.acceleration("same").percent == (0.0, 0.0)
    assert found.runs["maml"][0].curve != found.runs["maml"][1].curve
    values = json.loads(to_json(to_values(found)))
    assert values["baseline"] == "maml"
    assert values["variants"][1]["acceleration_percent"] == {
        "mean_over_seeds_that_reached": 0.0,
        "seeds_that_reached": 2,
        "of_mean_curve": 0.0,
    }
    assert values["variants"][2]["plugins"]["transform_gradients"] == ["gradient-sharing"]
    assert values["variants"][0]["runs"][1]["curve"][0][0] == 2
    assert values["variants"][0]["runs"][1]["versions"]["torch"] == torch.__version__


def test_the_test_is_by_the_weights_that_validated_best() -> None:
    changes: dict[
        str, Any
    ] = {  # so high a meta learning rate that the last validation is not the best
        "learner": {"inner_lr": 0.01, "inner_steps": 1, "meta_lr": 1.0},
        "training": {**TINY["training"], "iterations": 8},
    }
    found = compare([variant("b", **changes), variant("c", **changes)], [0]).runs["b"][0]
    best = best_point("mean squared error", found.curve).iteration
    assert best < 8
    short = build(variant("b", **changes).config)
    short.learner.fit(short.tasks.train, iterations=best, tasks_per_batch=2)
    assert torch.equal(
        short.learner.evaluate(short.tasks.test, num_tasks=5).per_task, found.test.per_task
    )


@pytest.mark.parametrize(
    ("variants", "seeds", "message"),
    [
        (
            [variant("a")],
            [0],
            "a comparison needs at least two variants, not 1: give the baseline first, then "
            "another",
        ),
        (
            [variant("a"), variant("a")],
            [0],
            "the variant 'a' stands twice, and would be compared with itself: leave one out",
        ),
        (
            [variant("a"), variant("b")],
            [1, 1],
            "a comparison needs at least one seed and no seed twice, not [1, 1]: give "
            "different ones",
        ),
        (
            [variant("a"), variant("b")],
            [],
            "a comparison needs at least one seed and no seed twice, not []: give different ones",
        ),
        (
            [
                variant("a", training={"validation_tasks": 50}),
                variant("b", training={"validation_tasks": 50}),
            ],
            [0],
            "training.validation_tasks = 50: too few to compare by, as the target would be "
            "mostly noise; use at least 200",
        ),
        (
            [variant("a"), variant("b", training={**TINY["training"], "iterations": 5})],
            [0],
            "variants 'a' and 'b' differ in training.iterations (4 and 5), so a comparison "
            "would not be fair: "
            "set training.iterations for both",
        ),
    ],
)
def test_what_cannot_be_compared(variants: list[Variant], seeds: list[int], message: str) -> None:
    with pytest.raises(RequestError) as error:
        compare(variants, seeds)
    assert str(error.value) == message


def test_a_run_that_fails_is_named() -> None:
    diverging = variant("wild", learner={"inner_lr": 1000.0, "inner_steps": 8})
    with pytest.raises(
        RunError, match=r"^variant 'wild', seed 7: iteration 1 stopped, nothing was updated: "
    ):
        compare([diverging, variant("calm")], [7])


def test_learner_settings_may_differ(tmp_path: Path) -> None:
    found = compare([variant("a"), variant("b", learner={"inner_lr": 0.02, "inner_steps": 2})], [0])
    assert found.runs["b"][0].test.inner_steps == 2


def test_a_variant_extends_the_longest_list_of_plugins_that_it_begins_with() -> None:
    configs = {
        "maml": ExperimentConfig(),
        "maml++": ExperimentConfig(preset="maml++"),
        "maml+sharing": ExperimentConfig(plugins=("gradient-sharing",)),
        "maml+sharing+sgd": ExperimentConfig(plugins=("gradient-sharing", "meta-sgd")),
        "maml+sgd+sharing": ExperimentConfig(plugins=("meta-sgd", "gradient-sharing")),
        "maml+++sharing": ExperimentConfig(preset="maml++", plugins=("gradient-sharing",)),
    }
    curves = {label: [curve(0.2, 0.4, 0.6), curve(0.3, 0.6, 0.5)] for label in configs}
    curves["maml++"] = [curve(0.3, 0.5, 0.7), curve(0.4, 0.7, 0.7)]
    curves["maml+++sharing"] = [curve(0.7, 0.7, 0.7), curve(0.4, 0.5, 0.6)]
    made = comparison("accuracy", curves)
    made = replace(
        made, variants=tuple(Variant(label, config) for label, config in configs.items())
    )
    assert {label: made.base(label) for label in configs} == {
        "maml": None,
        "maml++": None,
        "maml+sharing": "maml",
        "maml+sharing+sgd": "maml+sharing",
        "maml+sgd+sharing": "maml",
        "maml+++sharing": "maml++",
    }
    assert made.acceleration("maml+++sharing").percent == (200.0, pytest.approx(-100 / 3))
    assert made.acceleration("maml+++sharing", "maml++").percent == (200.0, None)
    values = {variant["label"]: variant for variant in to_values(made)["variants"]}
    assert values["maml"]["base"] is None
    assert values["maml"]["acceleration_over_base_percent"] is None
    assert values["maml+++sharing"]["base"] == "maml++"
    assert values["maml+++sharing"]["acceleration_over_base_percent"] == [200.0, None]
