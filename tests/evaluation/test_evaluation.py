"""What is published: intervals that cover, results that say what they are of, and no training class
taken for an unseen one."""

import csv
import itertools
import math
import time

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st
from metaplug_plugins.gradient_sharing import GradientSharing
from torch import nn

from metaplug import MetaLearner, RequestError, RunError
from metaplug.evaluation.results import EvaluationResult
from metaplug.experiments import runs
from metaplug.experiments.build import build
from metaplug.experiments.configuration import ExperimentConfig
from metaplug.experiments.json_values import result_values, to_json
from metaplug.report.terminal import result_line, statements
from metaplug.tasks import ArrayTasks, Harmonic, Sinusoid, Tabular
from metaplug.tasks.identities import TrainedOn, digest
from metaplug.testing import Stream, problem


def result(*values, metric="accuracy", **fields):
    return EvaluationResult(metric, torch.tensor(values, dtype=torch.float64), 3, **fields)


# Intervals.


@given(
    st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=50).filter(
        lambda values: np.ptp(values) > 1e-3
    )
)
def test_the_t_interval_is_that_of_scipy(values):
    low, high = result(*values).bounds()
    mean, error = np.mean(values), scipy.stats.sem(values)
    expected = scipy.stats.t.interval(0.95, len(values) - 1, loc=mean, scale=error)
    assert (low, high) == pytest.approx(expected, rel=1e-9, abs=1e-9 * error)


def test_the_t_interval_of_a_textbook():
    """NIST/SEMATECH e-Handbook, 1.3.5.2, whose t(0.975; 194) = 1.9723: n = 195, mean 9.261460, s =
    0.0227881, from 9.258242 to 9.264679."""
    values = torch.randn(195, generator=torch.Generator().manual_seed(0)).double()
    values = 9.261460 + 0.0227881 * (values - values.mean()) / values.std()
    assert EvaluationResult("mean squared error", values, 1).bounds() == pytest.approx(
        (9.258242, 9.264679), abs=1e-6
    )


def bca(values, seed):
    """Efron 1987 for a mean, whose jackknife values are known: a = Σ d³ / (6 (Σ d²)^1.5) with d = x
    − x̄."""
    generator = np.random.default_rng(seed)
    resampled = np.sort(
        [values[generator.integers(0, len(values), len(values))].mean() for _ in range(9999)]
    )
    bias = scipy.stats.norm.ppf(
        (np.mean(resampled < values.mean()) + np.mean(resampled <= values.mean())) / 2
    )
    deviations = values - values.mean()
    acceleration = (deviations**3).sum() / (6 * (deviations**2).sum() ** 1.5)
    ends = bias + scipy.stats.norm.ppf([0.025, 0.975])
    return np.quantile(resampled, scipy.stats.norm.cdf(bias + ends / (1 - acceleration * ends)))


def test_the_bootstrap_is_bias_corrected_and_accelerated():
    values = np.random.default_rng(3).lognormal(0, 1, 80)
    made = result(*values, metric="mean squared error", seed=5)
    low, high = made.bounds("bootstrap")
    spread = high - low
    assert (low, high) == pytest.approx(
        bca(values, 11), abs=0.06 * spread
    )  # other resamples, so to their noise
    assert high - made.mean > 1.2 * (made.mean - low), "skewed values have a skewed interval"


def test_the_bootstrap_repeats_and_depends_on_the_seed():
    values = np.random.default_rng(0).normal(size=40)
    before = np.random.get_state()[1].copy()
    first, again, other = (result(*values, seed=seed).bounds("bootstrap") for seed in (7, 7, -8))
    assert first == again != other
    assert np.array_equal(before, np.random.get_state()[1])
    assert problem().learner(seed=9).evaluate(Stream(split="test"), num_tasks=2).seed == 9


@given(st.lists(st.floats(0, 1), min_size=20, max_size=26), st.sampled_from([1e-150, 1.0, 1e100]))
def test_the_bootstrap_of_few_tasks_of_any_scale_holds_the_mean(values, scale):
    made = result(*(scale * value for value in values))
    low, high = made.bounds("bootstrap")
    slack = 1e-12 * scale
    assert low - slack <= made.mean <= high + slack
    assert min(values) * scale - slack <= low <= high <= max(values) * scale + slack


def test_a_bootstrap_of_very_few_tasks_is_refused():
    with pytest.raises(RequestError) as error:
        result(0.1, 0.2).bounds("bootstrap")
    assert str(error.value) == (
        "a bootstrap of 2 tasks: resamples of so few say less of other tasks than they seem to; "
        "give at least 20 tasks, or take the interval by t"
    )


def test_the_bootstrap_of_many_tasks_takes_little_memory(monkeypatch):
    largest = []
    mean = np.mean
    monkeypatch.setattr(np, "mean", lambda x, **rest: largest.append(x.size) or mean(x, **rest))
    low, high = result(*np.random.default_rng(0).normal(size=3000)).bounds("bootstrap")
    assert low < high
    assert max(largest) <= 2**22


def test_an_unknown_method_is_refused():
    with pytest.raises(
        RequestError, match=r"^unknown interval method 'bootstrp': did you mean 'bootstrap'"
    ):
        result(0.1, 0.2).bounds("bootstrp")


DRAWS = {
    "normal": (lambda generator, n: generator.normal(0.5, 0.1, n), 0.5),
    "accuracy": (lambda generator, n: generator.binomial(75, 0.7, n) / 75, 0.7),
    "skewed error": (lambda generator, n: generator.lognormal(0, 1, n), math.exp(0.5)),
}


def coverage(kind, tasks, experiments):
    """How often the known mean lies in the intervals of simulated experiments; by method, with how
    often below and above."""
    draw, mean = DRAWS[kind]
    generator = np.random.default_rng(tasks)
    found = {"t": [], "bootstrap": []}
    for seed in range(experiments):
        made = EvaluationResult(
            "mean squared error", torch.from_numpy(draw(generator, tasks)), 1, seed=seed
        )
        for method, each in found.items():
            low, high = made.bounds(method)
            each.append((low <= mean <= high, mean < low, mean > high))
    return {method: np.mean(each, axis=0) for method, each in found.items()}


@pytest.mark.parametrize(
    ("kind", "tasks", "t", "bootstrap"),
    [("normal", 20, 0.95, 0.935), ("accuracy", 40, 0.95, 0.94), ("skewed error", 20, 0.87, 0.885)],
)
def test_both_intervals_cover_the_mean(kind, tasks, t, bootstrap):
    """About 95 % of the time; less for few tasks with skewed errors. 300 experiments tell it to ± 4
    points."""
    found = coverage(kind, tasks, 300)
    assert found["t"][0] == pytest.approx(t, abs=0.04)
    assert found["bootstrap"][0] == pytest.approx(bootstrap, abs=0.04)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "tasks"), list(itertools.product(DRAWS, (20, 100, 600))))
def test_the_figures_of_the_documentation(kind, tasks):
    """Run with -s, it prints them."""
    experiments = 1000 if tasks == 600 else 2000
    found = coverage(kind, tasks, experiments)
    for method, (inside, below, above) in found.items():
        print(
            f"\n{kind}, {tasks} tasks, {experiments} experiments, {method}: covers {inside:.1%}, "
            f"below {below:.1%}, above {above:.1%}"
        )
        least = {20: 0.85, 100: 0.89, 600: 0.90}[tasks] if kind == "skewed error" else 0.91
        assert least <= inside <= 0.98


def test_one_task_gives_no_interval_and_says_so():
    one = result(0.25)
    assert math.isnan(one.interval)
    for method in ("t", "bootstrap"):
        assert all(map(math.isnan, one.bounds(method)))
        values = result_values(one, method)
        assert '"interval": null' in to_json(values)
        assert (
            result_line(values)
            == "accuracy 25.00 % (1 task, which gives no interval, 3 inner steps)"
        )
    assert str(one) == "accuracy 0.2500 (1 task, which gives no interval; transductive: no)"


def test_equal_tasks_have_an_interval_of_no_width_and_it_is_said():
    same = result(*[0.1] * 600)
    assert same.interval == 0.0
    for method in ("t", "bootstrap"):
        assert same.bounds(method) == (same.mean, same.mean)
        assert ", all of them equal, 3 inner steps)" in result_line(result_values(same, method))
    assert (
        str(same) == "accuracy 0.1000 ± 0.0000 (95 % interval over 600 tasks, all of them equal; "
        "transductive: no)"
    )


def test_what_is_not_finite_has_no_bounds():
    for method in ("t", "bootstrap"):
        assert all(map(math.isnan, result(1.0, math.inf).bounds(method)))
        assert all(map(math.isnan, result(1.0, math.nan).bounds(method)))


# What a result says of itself.


def test_a_result_as_values_names_method_and_bounds():
    made = result(*[0.2, 0.4, 0.9] * 8, transductive=("a plugin shares",), training_classes=2)
    values = result_values(made)
    low, high = made.bounds()
    assert values == {
        "metric": "accuracy",
        "mean": made.mean,
        "interval": made.interval,
        "interval_method": "t",
        "low": low,
        "high": high,
        "num_tasks": 24,
        "inner_steps": 3,
        "transductive": ["a plugin shares"],
        "training_classes": 2,
    }
    low, high = made.bounds("bootstrap")
    other = result_values(made, "bootstrap")
    assert (other["interval_method"], other["low"], other["high"], other["interval"]) == (
        "bootstrap",
        low,
        high,
        (high - low) / 2,
    )
    assert (
        result_line(other)
        == f"accuracy 50.00 % (95 % bootstrap interval {low * 100:.2f} to {high * 100:.2f} % over "
        "24 tasks, 3 inner steps)"
    )


def test_what_must_be_known_beside_a_value_is_said():
    assert statements(result_values(result(0.1, 0.2))) == ["transductive: no"]
    assert statements(
        result_values(result(0.1, 0.2, transductive=("a", "b"), training_classes=0))
    ) == [
        "transductive: a",
        "transductive: b",
    ]
    assert (
        statements(result_values(result(0.1, 0.2, training_classes=1)))[1]
        == "not of unseen classes: 1 of them was trained on"
    )
    assert str(result(0.1, 0.1, training_classes=7)).endswith(
        "; transductive: no; not of unseen classes: 7 of them were trained on)"
    )
    assert statements({"transductive": []}) == ["transductive: no"], "a summary of an older version"


# Training classes.


def images(*names, seed=0):
    made = {}
    for name in names:
        generator = torch.Generator().manual_seed(seed + sum(name.encode()))
        made[name] = torch.randint(256, (6, 1, 4, 4), dtype=torch.uint8, generator=generator)
    return made


def source(**changed):
    given = {
        "train": images("a", "b", "c"),
        "val": images("d", "e"),
        "test": images("f", "g"),
        **changed,
    }
    return ArrayTasks(**given, ways=2, shots=1, queries=2)


def learner_of_images(**options):
    torch.manual_seed(0)
    return MetaLearner(nn.Sequential(nn.Flatten(), nn.Linear(16, 2)), inner_steps=1, **options)


def refused(call):
    with pytest.raises(RequestError) as error:
        call()
    return str(error.value)


ON_PURPOSE = (
    "evaluate tasks.test, or give allow_training_classes=True "
    "(--allow-training-classes) to measure training on purpose"
)


def test_training_classes_are_refused_and_measured_on_purpose():
    tasks, learner = source(), learner_of_images()
    assert learner.evaluate(tasks.train, num_tasks=2).training_classes == 0, (
        "nothing was trained on yet"
    )
    learner.fit(tasks.train, iterations=1, validation=tasks.val, validation_tasks=2)
    assert refused(lambda: learner.evaluate(tasks.train, num_tasks=2)) == (
        "the train tasks draw on 3 of 3 classes that this learner is trained on, the first being "
        "'a', so that nothing would be measured on "
        f"unseen ones: {ON_PURPOSE}"
    )
    seen = learner.evaluate(tasks.train, num_tasks=2, allow_training_classes=True)
    assert seen.training_classes == 3
    assert str(seen).endswith("; not of unseen classes: 3 of them were trained on)")
    assert learner.evaluate(tasks.test, num_tasks=2).training_classes == 0
    assert (
        learner.evaluate(tasks.test, num_tasks=2, allow_training_classes=True).training_classes == 0
    )


def test_a_class_is_known_by_its_images_whatever_its_name_and_order():
    learner = learner_of_images()
    learner.fit(source().train, iterations=1)
    renamed = images("b")["b"].flip(0)
    other = source(train=images("h", "i"), test={"new": renamed, **images("j")})
    assert refused(lambda: learner.evaluate(other.test, num_tasks=2)).startswith(
        "the test tasks draw on 1 of 2 classes that this learner is trained on, the first being "
        "'new'"
    )
    same_name = source(train=images("h", "i"), test=images("a", "b", seed=99))
    assert learner.evaluate(same_name.test, num_tasks=2).training_classes == 0


def test_validation_on_a_training_class_is_refused_before_the_first_step():
    tasks, learner = source(), learner_of_images()
    before = [weight.clone() for weight in learner.model.parameters()]
    text = refused(lambda: learner.fit(tasks.train, iterations=2, validation=tasks.train))
    assert text.endswith(
        "so that nothing would be measured on unseen ones: give validation tasks of other classes, "
        "such as tasks.val"
    )
    assert learner.iteration == 0
    assert learner.trained_on == TrainedOn()
    assert all(
        torch.equal(weight, old)
        for weight, old in zip(learner.model.parameters(), before, strict=True)
    )
    learner.fit(tasks.val, iterations=1)
    refused(lambda: learner.fit(tasks.train, iterations=1, validation=tasks.val))


def test_what_was_refused_or_failed_before_its_first_step_was_not_trained_on():
    tasks, learner = source(), learner_of_images()
    with pytest.raises(RequestError, match=r"^unknown non_finite 'skp'"):
        learner.fit(tasks.train, iterations=2, non_finite="skp")
    weight = list(learner.model.parameters())[-1]
    with torch.no_grad():
        weight.fill_(math.nan)
    for every in (1, 2):
        learner.metrics_every = every
        with pytest.raises(RunError, match=r"^iteration 1 stopped, nothing was updated"):
            learner.fit(tasks.train, iterations=2)
    assert learner.trained_on == TrainedOn()
    with torch.no_grad():
        weight.fill_(0)
    assert learner.evaluate(tasks.train, num_tasks=2).training_classes == 0
    next(learner.iterate(tasks.train, iterations=2))
    assert learner.trained_on == TrainedOn().and_by(tasks.train)


def test_it_is_known_after_saving_loading_and_going_on(tmp_path):
    tasks, learner = source(), learner_of_images()
    learner.fit(tasks.train, iterations=1)
    learner.save(tmp_path / "learner.pt")
    loaded = MetaLearner.load(
        tmp_path / "learner.pt", model=nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
    )
    assert loaded.trained_on == learner.trained_on
    assert "'a'" in refused(lambda: loaded.evaluate(tasks.train, num_tasks=2))
    loaded.fit(tasks.val, iterations=1)
    assert "'a'" in refused(lambda: loaded.evaluate(tasks.train, num_tasks=2))
    assert "'d'" in refused(lambda: loaded.evaluate(tasks.val, num_tasks=2))


def test_of_an_older_state_nothing_is_claimed():
    tasks, learner = source(), learner_of_images()
    state = learner.state_dict()
    del state["trained_on"]
    learner.load_state_dict(state)
    assert learner.evaluate(tasks.train, num_tasks=2).training_classes is None
    learner.fit(tasks.train, iterations=1)
    assert learner.evaluate(tasks.test, num_tasks=2).training_classes is None
    refused(lambda: learner.evaluate(tasks.train, num_tasks=2))


def test_the_images_of_a_device_are_known_too():
    moved = source().to("cpu").train
    assert moved.identities == source().train.identities
    assert list(moved.identities) == ["a", "b", "c"]


class Named(Stream):
    """A third party's stream that says what it draws from, and how often it was asked."""

    def __init__(self, identities, **given):
        super().__init__(**given)
        self.asked, self._identities = 0, identities

    @property
    def identities(self):
        self.asked += 1
        return self._identities


def test_a_stream_of_others_says_it_or_does_not():
    train, test = (
        Named({"one": digest("1"), "two": digest("2")}),
        Named({"zwei": digest("2")}, split="test"),
    )
    learner = problem().learner()
    learner.fit(train, iterations=20, tasks_per_batch=1)
    assert train.asked == 1, "once a fit, not once a step"
    assert "1 of 1 classes that this learner is trained on, the first being 'zwei'" in refused(
        lambda: learner.evaluate(test, num_tasks=2)
    )
    assert learner.evaluate(Stream(split="test"), num_tasks=2).training_classes is None
    assert (
        learner.evaluate(Named({"three": digest("3")}, split="test"), num_tasks=2).training_classes
        == 0
    )
    learner.fit(Stream(), iterations=1)
    assert (
        learner.evaluate(Named({"three": digest("3")}, split="test"), num_tasks=2).training_classes
        is None
    )
    assert "'zwei'" in refused(lambda: learner.evaluate(test, num_tasks=2))
    assert refused(lambda: learner.fit(Named(["one"]), iterations=1)) == (
        "the identities of Named are no mapping from names to digests, both of them text: "
        "give {name: metaplug.tasks.identities.digest(data)}, or None where it is not known"
    )


def test_a_digest_stands_for_its_parts():
    assert digest("ab", "c") != digest("a", "bc") != digest("abc")
    assert digest("a") == digest(b"a")
    assert len(digest()) == 32


@pytest.mark.parametrize("make", [Sinusoid, Harmonic])
def test_tasks_that_are_computed_are_known_by_what_decides_them(make):
    tasks = make(shots=3, queries=2)
    learner = problem("regression").learner()
    learner.trained_on = TrainedOn().and_by(tasks.train)
    name = make.__name__.lower()
    assert (
        f"1 of 1 groups of tasks that this learner is trained on, the first being '{name}, split "
        "train, seed 0'" in refused(lambda: learner.evaluate(make(shots=5).train, num_tasks=2))
    )
    for other in (tasks.val, tasks.test, make(seed=1).train, make(phase=(0, 1)).train):
        assert learner.trained_on.shared(other) == 0


def test_tasks_of_a_table_are_known_by_name_and_rows(tmp_path):
    rows = [
        (f"task {task}", str(task % 7 + row), str(task * row))
        for task in range(10)
        for row in range(6)
    ]
    with (tmp_path / "table.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("task", "x", "target"), *rows])
    tasks = Tabular(tmp_path / "table.csv", shots=2, queries=2)
    trained = TrainedOn().and_by(tasks.train)
    assert (trained.shared(tasks.train), trained.shared(tasks.val), trained.shared(tasks.test)) == (
        len(tasks.train.rows.names),
        0,
        0,
    )
    otherwise = Tabular(
        tmp_path / "table.csv", shots=1, queries=3, standardise=False, fractions=(0.2, 0.2, 0.6)
    )
    assert trained.shared(otherwise.test) > 0, "another split of the same table, in another form"


# The run: the best checkpoint is chosen on validation only.


def tiny(iterations=6):
    return ExperimentConfig.model_validate(
        {
            "plugins": ["gradient-sharing"],
            "tasks": {"source": "sinusoid", "shots": 3, "queries": 4},
            "model": {"name": "mlp", "settings": {"hidden": [8]}},
            "learner": {"inner_lr": 0.01, "inner_steps": 1},
            "training": {
                "iterations": iterations,
                "tasks_per_batch": 2,
                "validate_every": 2,
                "validation_tasks": 4,
                "test_tasks": 5,
            },
            "runtime": {"device": "cpu"},
        }
    )


class Broken:
    """Test tasks that nobody can read."""

    split = "test"

    def batch(self, iteration, indices):
        raise RunError("the test tasks were read")


def test_the_best_checkpoint_is_chosen_without_the_test_tasks(tmp_path, monkeypatch):
    monkeypatch.setattr(time, "monotonic", lambda: 0.0)  # so that even the seconds agree
    assert runs.train(tiny(), tmp_path / "whole") is not None

    def built(*given, **options):
        experiment = build(*given, **options)
        experiment.tasks.test = Broken()
        return experiment

    monkeypatch.setattr("metaplug.experiments.runs.training.build", built)
    with pytest.raises(RunError, match=r"^the test tasks were read$"):
        runs.train(tiny(), tmp_path / "broken")
    for name in ("best.safetensors", "last.safetensors", "metrics.jsonl"):
        assert (tmp_path / "whole" / name).read_bytes() == (
            tmp_path / "broken" / name
        ).read_bytes(), name


def test_a_run_says_it_everywhere(tmp_path):
    summary = runs.train(tiny(), tmp_path / "run")
    [validation] = [
        line["validation"] for line in runs.read_metrics(tmp_path / "run") if line["iteration"] == 2
    ]
    for values, count in ((summary["test"], 5), (validation, 4)):
        assert (values["transductive"], values["interval_method"], values["training_classes"]) == (
            [],
            "t",
            0,
        )
        assert values["num_tasks"] == count
        assert values["low"] <= values["mean"] <= values["high"]
    loaded = runs.load(tmp_path / "run")
    assert "sinusoid, split train, seed 0" in refused(
        lambda: loaded.learner.evaluate(loaded.tasks.train, num_tasks=2)
    )
    assert (
        loaded.learner.evaluate(
            loaded.tasks.train, num_tasks=2, allow_training_classes=True
        ).training_classes
        == 1
    )


def test_a_resumed_run_knows_it_too(tmp_path):
    assert runs.train(tiny(), tmp_path / "run", stop=lambda: True) is None
    assert runs.train(tiny(), tmp_path / "run", resume=True) is not None
    loaded = runs.load(tmp_path / "run" / "last.safetensors")
    assert loaded.learner.trained_on == TrainedOn().and_by(loaded.tasks.train)


def test_a_transductive_plugin_is_named_in_what_is_written():
    learner = problem("batch-norm").learner(plugins=[GradientSharing(share_at_evaluation=True)])
    values = result_values(learner.evaluate(Stream("batch-norm", split="test"), num_tasks=2))
    assert statements(values) == [
        "transductive: plugin gradient-sharing sees more than a task's support set",
        "transductive: batch norm uses the statistics of each task's own batch",
    ]
