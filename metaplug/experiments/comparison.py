"""Variants of an algorithm, meta-trained on the same tasks at an equal budget, and compared."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass, replace
from statistics import fmean
from typing import Any

import torch

from metaplug.errors import MetaplugError, RequestError
from metaplug.evaluation.history import Record
from metaplug.evaluation.results import EvaluationResult, Metric
from metaplug.evaluation.scores import as_score, better
from metaplug.experiments.build import Experiment, build, build_tasks
from metaplug.experiments.configuration import ExperimentConfig, flatten
from metaplug.experiments.json_values import environment, result_values
from metaplug.tasks.sources import TaskSource

LEAST_VALIDATION_TASKS = 200
"""Fewer make the target, a maximum over noisy values, mostly noise."""


@dataclass(frozen=True)
class Variant:
    """One line of a comparison: its name, and its whole configuration."""

    label: str
    config: ExperimentConfig


@dataclass(frozen=True)
class Point:
    """One validation: the mean over tasks, and half the width of its 95 % interval."""

    iteration: int
    mean: float
    interval: float


Curve = tuple[Point, ...]
"""Validations in the order of their iterations, at least one."""


@dataclass(frozen=True)
class SeedRun:
    """One variant, meta-trained with one seed; `test` is of the weights that validated best."""

    seed: int
    curve: Curve
    test: EvaluationResult
    plugins: Mapping[str, tuple[str, ...]]
    seconds: float
    environment: Mapping[str, Any]


@dataclass(frozen=True)
class Acceleration:
    """How much faster than the baseline a variant reaches the baseline's best value.

    Attributes:
        targets: by seed, the best validation value that the baseline reaches.
        baseline_iterations: by seed, how many iterations the baseline needs for it.
        iterations: by seed, how many the variant needs; None where it never gets there.
    """

    targets: tuple[float, ...]
    baseline_iterations: tuple[int, ...]
    iterations: tuple[int | None, ...]

    @property
    def percent(self) -> tuple[float | None, ...]:
        """By seed, (baseline_iterations / iterations − 1) · 100; None where it was not reached."""
        pairs = zip(self.baseline_iterations, self.iterations, strict=True)
        return tuple(
            None if needed is None else (baseline / needed - 1) * 100 for baseline, needed in pairs
        )

    @property
    def reached(self) -> int:
        """The number of seeds in which the variant reached the target."""
        return sum(needed is not None for needed in self.iterations)

    @property
    def mean_percent(self) -> float | None:
        """The mean over the seeds that reached the target; always give `reached` with it."""
        values = [value for value in self.percent if value is not None]
        return fmean(values) if values else None


@dataclass(frozen=True)
class Comparison:
    """The runs of `compare`, and what follows from them.

    Attributes:
        metric: of every curve and test.
        variants: in the given order; the first is the baseline.
        seeds: in the order of every variant's runs.
        runs: by label.
    """

    metric: Metric
    variants: tuple[Variant, ...]
    seeds: tuple[int, ...]
    runs: Mapping[str, tuple[SeedRun, ...]]

    @property
    def baseline(self) -> str:
        """The label of the first variant."""
        return self.variants[0].label

    def base(self, label: str) -> str | None:
        """The label of the longest variant that this one extends by plugins; None where none is."""
        own = next(variant.config for variant in self.variants if variant.label == label)
        bases = {
            variant.label: len(config.plugins)
            for variant in self.variants
            if (config := variant.config).preset == own.preset
            and len(config.plugins) < len(own.plugins)
            and config.plugins == own.plugins[: len(config.plugins)]
        }
        return max(bases, key=lambda label: bases[label], default=None)

    def acceleration(self, label: str, over: str | None = None) -> Acceleration:
        """Of a variant over the baseline, or over the variant `over`, seed by seed.

        A target counts as reached at the first validation that is as good.
        """
        pairs = zip(self.runs[over or self.baseline], self.runs[label], strict=True)
        return accelerate(self.metric, [(baseline.curve, run.curve) for baseline, run in pairs])

    def mean_curve(self, label: str) -> Curve:
        """The mean over seeds at every validation; its interval is over all tasks of all seeds."""
        return tuple(
            Point(
                points[0].iteration,
                fmean(point.mean for point in points),
                math.hypot(*(point.interval for point in points)) / len(points),
            )
            for points in zip(*(run.curve for run in self.runs[label]), strict=True)
        )

    def acceleration_of_means(self, label: str) -> Acceleration:
        """Of a variant's mean curve over the baseline's, as if it were one seed."""
        return accelerate(self.metric, [(self.mean_curve(self.baseline), self.mean_curve(label))])

    def test(self, label: str) -> EvaluationResult:
        """The test tasks of all seeds together; its 95 % interval is over tasks."""
        results = [run.test for run in self.runs[label]]
        tables = [result.per_class for result in results if result.per_class is not None]
        return replace(
            results[0],
            per_task=torch.cat([result.per_task for result in results]),
            per_class=torch.cat(tables) if tables else None,
        )

    def difference(self, label: str) -> EvaluationResult:
        """The variant's test value minus the baseline's, task by task on the same tasks."""
        own, base = self.test(label), self.test(self.baseline)
        return replace(own, per_task=own.per_task - base.per_task, per_class=None)


def accelerate(metric: Metric, pairs: Sequence[tuple[Curve, Curve]]) -> Acceleration:
    """The acceleration, from (the baseline's curve, the variant's curve) of every seed."""
    bests = [best_point(metric, baseline) for baseline, _ in pairs]
    reached = zip(bests, (curve for _, curve in pairs), strict=True)
    return Acceleration(
        targets=tuple(best.mean for best in bests),
        baseline_iterations=tuple(best.iteration for best in bests),
        iterations=tuple(first_reaching(metric, curve, best.mean) for best, curve in reached),
    )


def best_point(metric: Metric, curve: Curve) -> Point:
    """The best validation; the earlier of two equal ones."""
    best = curve[0]
    for point in curve[1:]:
        if better(metric, point.mean, best.mean) or not math.isfinite(best.mean):
            best = point
    return best


def first_reaching(metric: Metric, curve: Curve, target: float) -> int | None:
    """The iteration of the first validation that is as good as the target; None where none is."""
    for point in curve:
        if point.mean == target or better(metric, point.mean, target):
            return point.iteration
    return None


def compare(
    variants: Sequence[Variant],
    seeds: Sequence[int],
    *,
    on_start: Callable[[Variant, Experiment], None] = lambda variant, experiment: None,
    on_record: Callable[[Variant, int, Record], None] = lambda variant, seed, record: None,
) -> Comparison:
    """Meta-train every variant with every seed, and test what validated best.

    For one seed all variants see the same meta-training batches, validation tasks and test tasks,
    and a model begins with the same weights.

    Args:
        variants: the first is the baseline; they may only differ in their plugins and in `learner`.
        seeds: each takes the place of the configurations' own.
        on_start: called before a variant is trained with a seed.
        on_record: called after every iteration.

    Raises:
        RequestError: fewer than two variants, or not comparable ones.
        RunError: a run failed; names the variant and the seed.
    """
    _check(variants, seeds)
    runs: dict[str, list[SeedRun]] = {variant.label: [] for variant in variants}
    for seed in seeds:
        seeded = [
            replace(variant, config=variant.config.model_copy(update={"seed": seed}))
            for variant in variants
        ]
        tasks = build_tasks(seeded[0].config)
        if seed == seeds[0]:  # what cannot be composed is refused before anything is trained
            for variant in variants:
                with _naming(f"variant '{variant.label}'"):
                    build(variant.config, tasks)
        for variant in seeded:
            with _naming(f"variant '{variant.label}', seed {seed}"):
                runs[variant.label].append(_run(variant, tasks, on_start, on_record))
    done = {label: tuple(of_variant) for label, of_variant in runs.items()}
    metric = as_score(variants[0].config.training.score, tasks.kind).name
    return Comparison(metric, tuple(variants), tuple(seeds), done)


@contextmanager
def _naming(what: str) -> Iterator[None]:
    try:
        yield
    except MetaplugError as error:
        raise type(error)(f"{what}: {error}") from error


def _run(
    variant: Variant,
    tasks: TaskSource,
    on_start: Callable[[Variant, Experiment], None],
    on_record: Callable[[Variant, int, Record], None],
) -> SeedRun:
    training, seed = variant.config.training, variant.config.seed
    experiment = build(variant.config, tasks)
    on_start(variant, experiment)
    learner, tasks = experiment.learner, experiment.tasks
    curve: list[Point] = []
    state: dict[str, Any] = {}
    begun = time.monotonic()
    options = training.model_dump(exclude={"test_tasks", "score"})
    for record in learner.iterate(tasks.train, validation=tasks.val, **options):
        if (result := record.validation) is not None:
            curve.append(Point(record.step.iteration, result.mean, result.interval))
            if best_point(result.metric, tuple(curve)) is curve[-1]:
                state = copy.deepcopy(learner.state_dict())
        on_record(variant, seed, record)
    seconds = time.monotonic() - begun
    learner.load_state_dict(state)
    test = learner.evaluate(tasks.test, num_tasks=training.test_tasks)
    plugins, surroundings = learner.chain.order(), environment(learner)
    return SeedRun(seed, tuple(curve), test, plugins, seconds, surroundings)


def _check(variants: Sequence[Variant], seeds: Sequence[int]) -> None:
    """Refuse what would be no comparison, or no fair one."""
    labels = [variant.label for variant in variants]
    if len(variants) < 2:
        fault = f"a comparison needs at least two variants, not {len(variants)}"
        raise RequestError(f"{fault}: give the baseline first, then another")
    if twice := [label for label in labels if labels.count(label) > 1]:
        fault = f"the variant '{twice[0]}' stands twice, and would be compared with itself"
        raise RequestError(f"{fault}: leave one out")
    if not seeds or len(set(seeds)) < len(seeds):
        fault = f"a comparison needs at least one seed and no seed twice, not {list(seeds)}"
        raise RequestError(f"{fault}: give different ones")
    tasks = variants[0].config.training.validation_tasks
    if tasks < LEAST_VALIDATION_TASKS:
        fault = "too few to compare by, as the target would be mostly noise"
        mend = f"use at least {LEAST_VALIDATION_TASKS}"
        raise RequestError(f"training.validation_tasks = {tasks}: {fault}; {mend}")
    own = {"preset", "plugins", "learner", "seed"}
    shared = [flatten(variant.config.model_dump(mode="json", exclude=own)) for variant in variants]
    for label, other in zip(labels[1:], shared[1:], strict=True):
        for path in {**shared[0], **other}:
            values = shared[0].get(path), other.get(path)
            if values[0] != values[1]:
                what = f"variants '{labels[0]}' and '{label}' differ in {path}"
                fault = f"({values[0]!r} and {values[1]!r}), so a comparison would not be fair"
                raise RequestError(f"{what} {fault}: set {path} for both")


def to_values(comparison: Comparison) -> dict[str, Any]:
    """The whole comparison as JSON values, by variant and seed; an accuracy is a fraction."""
    return {
        "metric": comparison.metric,
        "baseline": comparison.baseline,
        "seeds": list(comparison.seeds),
        "variants": [_variant_values(comparison, variant) for variant in comparison.variants],
    }


def _variant_values(comparison: Comparison, variant: Variant) -> dict[str, Any]:
    label, runs = variant.label, comparison.runs[variant.label]
    by_seed, of_means = comparison.acceleration(label), comparison.acceleration_of_means(label)
    difference, base = comparison.difference(label), comparison.base(label)
    return {
        "label": label,
        "base": base,
        "config": variant.config.model_dump(mode="json"),
        "plugins": {hook: list(names) for hook, names in runs[0].plugins.items()},
        "acceleration_percent": {
            "mean_over_seeds_that_reached": by_seed.mean_percent,
            "seeds_that_reached": by_seed.reached,
            "of_mean_curve": of_means.percent[0],
        },
        "acceleration_over_base_percent": None
        if base is None
        else list(comparison.acceleration(label, base).percent),
        "test": result_values(comparison.test(label)),
        "test_minus_baseline": {
            "mean": difference.mean,
            "interval": difference.interval,
            "interval_method": "t",
        },
        "mean_curve": [list(astuple(point)) for point in comparison.mean_curve(label)],
        "runs": [
            {
                "seed": run.seed,
                "curve": [list(astuple(point)) for point in run.curve],
                "target": target,
                "baseline_iterations_to_target": baseline,
                "iterations_to_target": needed,
                "acceleration_percent": percent,
                "best_iteration": best_point(comparison.metric, run.curve).iteration,
                "test": result_values(run.test),
                "seconds": round(run.seconds, 3),
                **run.environment,
            }
            for run, target, baseline, needed, percent in zip(
                runs,
                by_seed.targets,
                by_seed.baseline_iterations,
                by_seed.iterations,
                by_seed.percent,
                strict=True,
            )
        ],
    }
