"""What a user does with a learner: fit, evaluate, adapt, save, load; and what stops it."""

import copy
import math
import pickle
import re

import pytest
import torch
from metaplug_plugins.gradient_clipping import GradientClipping
from metaplug_plugins.gradient_sharing import GradientSharing
from safetensors.torch import save_file
from torch import nn

from metaplug import (
    History,
    MetaLearner,
    Plugin,
    PluginUse,
    Record,
    RequestError,
    RunError,
    TaskBatch,
    hookimpl,
)
from metaplug.checkpoint import FORMAT, file
from metaplug.evaluation.results import EvaluationResult
from metaplug.evaluation.score_tasks import Scorer
from metaplug.evaluation.scores import SCORES
from metaplug.execution.chunks import ChunkedDerivation
from metaplug.execution.engine import MetaStep
from metaplug.testing import Stream, assert_close, problem, regression

TRAIN, TEST = Stream(split="train"), Stream(split="test")


def states_equal(one, other):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(states_equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(states_equal, one, other))
    return one == other


# Fit.


def test_a_fit_is_one_adam_step_an_iteration_on_the_tasks_of_that_iteration():
    case = problem()
    learner = case.learner(meta_lr=0.02)
    history = learner.fit(TRAIN, iterations=3, tasks_per_batch=4)
    twin = case.learner()
    optimizer = torch.optim.Adam(twin.model.parameters(), lr=0.02)
    for iteration in range(3):
        gradients = twin.meta_gradients(TRAIN.batch(iteration, range(4)))
        norm = math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients.values()))
        assert history.records[iteration].step.meta_gradient_norm == pytest.approx(norm)
        for name, parameter in twin.model.named_parameters():
            parameter.grad = gradients[name]
        optimizer.step()
    assert_close(dict(learner.model.named_parameters()), dict(twin.model.named_parameters()))
    assert [record.step.iteration for record in history.records] == [1, 2, 3]
    assert learner.iteration == 3


def test_the_same_seed_is_the_same_run_and_two_fits_are_one():
    learners = [problem().learner(plugins=[GradientSharing()]) for _ in range(3)]
    learners[0].fit(TRAIN, iterations=4)
    learners[1].fit(TRAIN, iterations=4)
    learners[2].fit(TRAIN, iterations=1)
    learners[2].evaluate(TEST, num_tasks=2)
    learners[2].fit(TRAIN, iterations=3)
    assert states_equal(learners[0].state_dict(), learners[1].state_dict())
    assert states_equal(learners[0].state_dict(), learners[2].state_dict())


def test_what_plugins_draw_at_first_depends_on_the_seed_and_their_name_alone():
    class Drawing(Plugin):
        @hookimpl
        def setup(self, context):
            self.weight = nn.Parameter(torch.randn(3, dtype=context.dtype))

        @hookimpl
        def task_parameters(self, context):
            return {"start": torch.rand(2, dtype=context.dtype)}

    def drawn(*names, seed=0):
        plugins = [Drawing(name=name) for name in names]
        learner = problem().learner(plugins=plugins, seed=seed)
        return {
            plugin.name: torch.cat(
                [plugin.weight, learner.engine.inner.variables[f"{plugin.name}.start"]]
            )
            for plugin in plugins
        }

    before = torch.get_rng_state()
    one, both, other = drawn("one"), drawn("two", "one"), drawn("one", seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one["one"], both["one"])
    assert not torch.equal(both["one"], both["two"])
    assert not torch.equal(one["one"], other["one"])


def test_iterate_stops_when_the_user_does_and_fit_reports_as_it_goes():
    learner, seen = problem().learner(), []
    for record in learner.iterate(TRAIN, iterations=100):
        seen.append(record.step.iteration)
        if len(seen) == 2:
            break
    assert (seen, learner.iteration) == ([1, 2], 2)
    history = learner.fit(
        TRAIN, iterations=2, on_record=lambda record: seen.append(record.step.iteration)
    )
    assert seen == [1, 2, 3, 4]
    assert [record.step.iteration for record in history.records] == [3, 4]


def test_validation_comes_at_its_times_and_after_the_last():
    learner = problem().learner()
    history = learner.fit(
        TRAIN, iterations=5, validation=TEST, validate_every=2, validation_tasks=3
    )
    assert [iteration for iteration, _ in history.validations] == [2, 4, 5]
    assert all(result.num_tasks == 3 for _, result in history.validations)
    again = learner.evaluate(TEST, num_tasks=3)
    assert torch.equal(history.validations[-1][1].per_task, again.per_task)


def test_a_file_does_not_say_how_a_learner_computes_and_who_loads_it_does(tmp_path):
    path = tmp_path / "learner.safetensors"
    how = {"chunk_size": 2, "deterministic": True, "metrics_every": 3}
    problem().learner(**how).save(path)
    plain = MetaLearner.load(path, model=problem().model)
    again = MetaLearner.load(path, model=problem().model, **how)
    assert [each.metrics_every for each in (plain, again)] == [1, 3]
    assert isinstance(again.engine.derivation, ChunkedDerivation)
    assert plain.engine.derivation is None


def test_best_is_the_best_validation_and_the_earlier_of_two_equal_ones():
    def history(metric, means):
        records = []
        for iteration, mean in enumerate(means, 1):
            result = (
                None
                if mean is None
                else EvaluationResult(metric, torch.full((2,), mean, dtype=torch.float64), 1)
            )
            records.append(Record(MetaStep(iteration, 0.0, 0.0, 1e-3, {}), result))
        return History(records)

    assert history("accuracy", [0.2, None, 0.7, 0.5, 0.7]).best[0] == 3
    assert history("mean squared error", [0.9, None, 0.3, 0.5, 0.3]).best[0] == 3
    assert history("accuracy", [None, None]).best is None
    assert history("accuracy", [math.nan, 0.5, math.nan]).best[0] == 2
    assert history("accuracy", [math.nan]).best is None


def test_figures_are_named_by_plugin():
    learner = problem().learner(
        plugins=[GradientSharing(), GradientSharing(name="other", gate=0.25)]
    )
    figures = learner.fit(TRAIN, iterations=1).records[0].step.figures
    names = [
        f"{plugin}.{kind}/{slot}"
        for plugin in ("gradient-sharing", "other")
        for kind in ("gate", "momentum")
        for slot in range(2)
    ]
    assert list(figures) == names
    assert figures["other.gate/0"] == pytest.approx(0.25, abs=0.01)


def test_a_plugins_own_meta_learning_rate_and_schedule_are_used():
    class Schedule(Plugin):
        @hookimpl
        def scale_meta_learning_rate(self, factor, iteration, total):
            return factor * (1 - iteration / total)

    learner = problem().learner(plugins=[GradientSharing(meta_lr=0.5), Schedule()], meta_lr=0.25)
    rates = [
        [group["lr"] for group in learner.engine.optimizer.param_groups]
        for _ in learner.iterate(TRAIN, iterations=4, tasks_per_batch=2)
    ]
    assert rates == [[0.25 * factor, 0.5 * factor] for factor in (1, 0.75, 0.5, 0.25)]


def test_a_gradient_that_the_user_left_behind_is_not_used():
    case = problem()
    case.model.spare = nn.Parameter(torch.ones(2, dtype=torch.float64))
    learner = case.learner()
    learner.model.spare.grad = torch.ones(2, dtype=torch.float64)
    learner.fit(TRAIN, iterations=2)
    assert learner.model.spare.tolist() == [1, 1]


@pytest.mark.parametrize(
    "counts", [{"tasks_per_batch": 0}, {"validate_every": 0}, {"validation_tasks": 0}]
)
def test_counts_below_one_are_refused(counts):
    name = next(iter(counts))
    with pytest.raises(RequestError, match=f"^{name} = 0: give at least 1$"):
        problem().learner().fit(TRAIN, iterations=1, validation=TEST, **counts)


# Evaluate and adapt.


def test_score_is_accuracy_or_mean_squared_error_by_task():
    predictions = torch.tensor([[[2.0, 1.0], [0.0, 1.0]], [[1.0, 0.0], [1.0, 0.0]]])
    accuracy = Scorer(SCORES["accuracy"], "classification")
    assert accuracy(predictions, torch.tensor([[0, 0], [1, 1]])).tolist() == [0.5, 0.0]
    error = Scorer(SCORES["mean-squared-error"], "regression")
    assert error(predictions, torch.zeros(2, 2, 2)).tolist() == [1.5, 0.5]


def test_the_interval_is_students():
    result = EvaluationResult("accuracy", torch.tensor([0.2, 0.4, 0.9], dtype=torch.float64), 3)
    assert result.mean == pytest.approx(0.5)
    # t(0.975; 2) = 4.302653, s = √(0.13), n = 3
    assert result.interval == pytest.approx(4.302652729749462 * math.sqrt(0.13 / 3))
    assert str(result) == "accuracy 0.5000 ± 0.8957 (95 % interval over 3 tasks; transductive: no)"
    assert math.isnan(EvaluationResult("accuracy", torch.tensor([0.2]), 3).interval)


@pytest.mark.parametrize("name", ["mlp", "batch-norm", "conv4", "tied"])
def test_adapt_answers_as_evaluation_predicts(name):
    case = problem(name)
    learner = case.learner(plugins=[GradientSharing()])
    learner.fit(Stream(name), iterations=1)
    batch = Stream(name, split="test").batch(0, range(3))
    predictions = learner.engine.evaluate(batch, 2).query_predictions
    weights = [parameter.detach().clone() for parameter in learner.model.parameters()]
    for task in range(3):
        model = learner.adapt(batch.support_x[task], batch.support_y[task])
        assert_close(model(batch.query_x[task]).detach(), predictions[task], rtol=1e-8, atol=1e-9)
        assert type(model) is type(learner.model)
        assert not model.training
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
    assert all(torch.equal(*pair) for pair in zip(weights, learner.model.parameters(), strict=True))


def test_evaluation_takes_as_many_steps_as_asked_and_warns_once_beyond_training():
    learner = problem(steps=2).learner(plugins=[GradientSharing()])
    assert learner.evaluate(TEST, num_tasks=2).inner_steps == 2
    assert learner.evaluate(TEST, num_tasks=2, inner_steps=0).inner_steps == 0
    with pytest.warns(UserWarning) as caught:
        assert learner.evaluate(TEST, num_tasks=2, inner_steps=4).inner_steps == 4
        learner.evaluate(TEST, num_tasks=2, inner_steps=5)
    assert [str(each.message) for each in caught] == [
        "adapting for 4 inner steps, trained with 2: later steps use the last step's values"
    ]
    problem(steps=2).learner().evaluate(
        TEST, num_tasks=2, inner_steps=9
    )  # nothing is kept by step, so nothing to warn of
    with pytest.raises(
        RequestError, match=r"^inner_steps = -1: a task cannot be adapted for fewer than 0 steps$"
    ):
        learner.evaluate(TEST, num_tasks=2, inner_steps=-1)


def test_meta_gradients_by_name_and_without_a_trace():
    learner = problem().learner(plugins=[GradientSharing(name="share")])
    before = learner.state_dict()
    gradients = learner.meta_gradients(problem().batch)
    assert set(gradients) == {
        "0.weight",
        "0.bias",
        "2.weight",
        "2.bias",
        "share.gate",
        "share.momentum",
    }
    assert not any(gradient.requires_grad for gradient in gradients.values())
    assert states_equal(before, learner.state_dict())
    assert all(parameter.grad is None for parameter in learner.model.parameters())


def test_transformed_tasks_are_what_is_learned_from():
    class Shuffle(Plugin):
        """Random signs on the inputs, from the generator of the iteration."""

        @hookimpl
        def transform_tasks(self, batch, generator):
            sign = 2.0 * torch.randint(2, (batch.num_tasks, 1, 1), generator=generator) - 1
            return TaskBatch(
                batch.support_x * sign, batch.support_y, batch.query_x * sign, batch.query_y
            )

    case = problem()
    one, other = (case.learner(plugins=[Shuffle()], seed=seed) for seed in (1, 1))
    states = torch.get_rng_state()
    gradients = one.meta_gradients(case.batch)
    assert states_equal(gradients, other.meta_gradients(case.batch))
    assert torch.equal(states, torch.get_rng_state())
    assert not states_equal(gradients, case.learner().meta_gradients(case.batch))
    plain = case.learner()
    assert torch.equal(
        one.evaluate(TEST, num_tasks=3).per_task, plain.evaluate(TEST, num_tasks=3).per_task
    )


# Save and load.


class Body(nn.Module):
    """A model of the user's own."""

    def __init__(self):
        super().__init__()
        self.layers = problem().model

    def forward(self, x):
        return self.layers(x)


class Decay(Plugin):
    """A plugin of the user's own, with a setting, a meta-parameter and a statistic."""

    class Config(Plugin.Config):
        start: float = 0.5

    @hookimpl
    def setup(self, context):
        self.rate = nn.Parameter(torch.tensor(self.config.start, dtype=context.dtype))
        self.register_buffer("sum", torch.zeros((), dtype=context.dtype))

    @hookimpl
    def transform_learning_rates(self, learning_rates, step):
        step.keep("loss", step.losses.mean())
        return {name: rate * self.rate**step.slot for name, rate in learning_rates.items()}

    @hookimpl
    def commit(self, kept):
        self.sum += kept["loss"]


def own(loss=None):
    """A learner of which every part is the user's own."""
    return MetaLearner(
        Body(),
        plugins=[Decay(start=0.7), GradientSharing(name="share")],
        inner_lr=0.2,
        inner_steps=2,
        seed=5,
        loss=loss,
    )


def test_a_saved_learner_goes_on_bit_for_bit(tmp_path):
    learner = own()
    learner.fit(TRAIN, iterations=2)
    learner.save(tmp_path / "learner.safetensors")
    loaded = MetaLearner.load(
        tmp_path / "learner.safetensors",
        model=Body(),
        plugins=[Decay(start=0.7), GradientSharing(name="share")],
    )
    assert states_equal(learner.state_dict(), loaded.state_dict())
    one, other = (
        each.fit(TRAIN, iterations=3, validation=TEST, validation_tasks=3)
        for each in (learner, loaded)
    )
    assert states_equal(learner.state_dict(), loaded.state_dict())
    assert [record.step for record in one.records] == [record.step for record in other.records]
    assert torch.equal(one.best[1].per_task, other.best[1].per_task)
    assert [path.name for path in tmp_path.iterdir()] == ["learner.safetensors"]


@pytest.mark.parametrize("layout", ["fused", "unfused"])
def test_a_state_does_not_depend_on_the_default_dtype(tmp_path, layout):
    path, first, tasks = tmp_path / "learner.safetensors", Body(), [problem().batch]

    def body():
        model = copy.deepcopy(first)
        if layout == "unfused":  # a parameter that lies otherwise is updated by torch's own loop
            layer = model.layers[0]
            layer.weight = nn.Parameter(layer.weight.detach().mT.contiguous().mT)
        return model

    def run():
        learner = MetaLearner(body(), inner_lr=0.2, inner_steps=2)
        learner.fit(tasks, iterations=2, tasks_per_batch=3)
        learner.load_state_dict(learner.state_dict())
        learner.fit(tasks, iterations=1, tasks_per_batch=3)
        return learner

    plain = run().state_dict()
    torch.set_default_dtype(torch.float64)
    try:
        learner = run()
        learner.save(path)
        loaded = MetaLearner.load(path, model=body())
    finally:
        torch.set_default_dtype(torch.float32)
    for own in (learner, loaded, MetaLearner.load(path, model=body())):
        state = own.state_dict()
        assert states_equal(state["model"], plain["model"])
        assert states_equal(state["optimizer"], plain["optimizer"])
        assert {each["step"].dtype for each in state["optimizer"]["state"].values()} == {
            torch.float32
        }
    learner = MetaLearner(body(), inner_lr=0.2, inner_steps=2)
    learner.load_state_dict(state)


def test_installed_parts_are_rebuilt_from_the_file(tmp_path):
    settings = {
        "inner_optimizer": "adam",
        "inner_optimizer_settings": {"betas": [0.8, 0.9]},
        "inner_lr": 0.05,
        "task_batching": "sequential",
    }
    learner = problem().learner(
        preset="fomaml",
        plugins=[
            "gradient-sharing",
            PluginUse(plugin="gradient-clipping", name="clip", settings={"max_norm": 1}),
        ],
        **settings,
    )
    learner.fit(TRAIN, iterations=1)
    learner.save(tmp_path / "learner.safetensors")
    loaded = MetaLearner.load(tmp_path / "learner.safetensors", model=problem(seed=1).model)
    assert [plugin.name for plugin in loaded.chain.plugins] == [
        "derivative-order",
        "gradient-sharing",
        "clip",
    ]
    assert loaded.chain.plugins[2].config.max_norm == 1
    assert states_equal(learner.state_dict(), loaded.state_dict())
    assert states_equal(
        learner.meta_gradients(problem().batch), loaded.meta_gradients(problem().batch)
    )


def message(action, error=RunError):
    with pytest.raises(error) as caught:
        action()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_a_file_cannot_hold_is_asked_for(tmp_path):
    path = tmp_path / "learner.safetensors"
    own().save(path)
    assert message(lambda: MetaLearner.load(path), RequestError) == (
        f"{path} holds the weights of a model of your own, which a file cannot build: give it as "
        "MetaLearner.load(..., model=...)"
    )
    assert message(lambda: MetaLearner.load(path, model=Body()), RequestError) == (
        f"{path} was trained with the plugin 'decay', which is not an installed part: give "
        "MetaLearner.load(..., plugins=...)"
    )
    own(loss=nn.functional.cross_entropy).save(path)
    assert message(lambda: MetaLearner.load(path, model=Body()), RequestError) == (
        f"{path} was trained with a loss of your own, which a file cannot hold: give it as "
        "MetaLearner.load(..., loss=...)"
    )

    def share_of_errors(predictions, targets):
        return (predictions.argmax(2) != targets).double().mean(1)

    given = {"model": problem().model}
    problem().learner(score=share_of_errors).save(path)
    assert message(lambda: MetaLearner.load(path, **given), RequestError) == (
        f"{path} was trained with a score of your own, which a file cannot hold: give it as "
        "MetaLearner.load(..., score=...)"
    )
    loaded = MetaLearner.load(path, score=share_of_errors, **given)
    assert loaded.evaluator.score.name == "share_of_errors"


def test_a_file_of_another_model_or_of_other_plugins_is_refused_and_nothing_is_loaded(tmp_path):
    path = tmp_path / "learner.safetensors"
    learner = problem().learner(plugins=[GradientSharing()])
    learner.fit(TRAIN, iterations=1)
    learner.save(path)
    other = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    assert message(lambda: MetaLearner.load(path, model=other)) == (
        f"{path} belongs to another model: '0.weight' is (6, 4) there and (5, 4) here; build the "
        "model as it was"
    )
    assert message(lambda: MetaLearner.load(path, model=nn.Linear(4, 3).double())) == (
        f"{path} belongs to another model: it lacks 'weight', 'bias' and has '0.weight', '0.bias', "
        "'2.weight' beside; "
        "build the model as it was"
    )
    assert message(
        lambda: MetaLearner.load(
            path, model=problem().model, plugins=[GradientClipping(max_norm=1)]
        )
    ) == (
        f"{path} belongs to the plugins 'gradient-sharing', this learner has 'gradient-clipping': "
        "make it with the same list"
    )
    finer = problem(seed=2).learner(plugins=[GradientSharing(gate_function="clamp")])
    before = finer.state_dict()
    assert message(lambda: finer.load_state_dict(learner.state_dict())) == (
        "the state has other settings of plugin 'gradient-sharing' than this learner: "
        "gate_function is 'sigmoid' there and 'clamp' here; make it with the same settings"
    )
    longer = problem(steps=3).learner(plugins=[GradientSharing()])
    assert message(lambda: longer.load_state_dict(learner.state_dict())) == (
        "the state has another form of plugin 'gradient-sharing': 'gate' is (2, 1) there and (3, "
        "1) here; "
        "use it as it was"
    )
    assert states_equal(before, finer.state_dict())


def test_damaged_and_foreign_files_are_refused(tmp_path, monkeypatch):
    path = tmp_path / "learner.safetensors"
    assert (
        message(lambda: MetaLearner.load(path))
        == f"there is no checkpoint {path}: train first, or give another path"
    )
    own().save(path)
    whole = path.read_bytes()
    for damaged in (
        whole[: len(whole) // 2],
        whole[:10],
        b"",
        b"no checkpoint at all",
        whole[len(whole) // 2 :],
    ):
        path.write_bytes(damaged)
        text = message(lambda: MetaLearner.load(path))
        assert re.fullmatch(
            f"{re.escape(str(path))} is not a whole metaplug checkpoint \\(.*\\): use another one "
            "of the run",
            text,
        )
    save_file({"weights": torch.zeros(2)}, path)
    assert message(lambda: MetaLearner.load(path)) == (
        f"{path} is not a metaplug checkpoint: give a file that MetaLearner.save or `metaplug "
        "train` wrote"
    )
    with monkeypatch.context() as newer:
        newer.setattr(file, "FORMAT", FORMAT + 1)
        own().save(path)
    assert message(lambda: MetaLearner.load(path)) == (
        f"{path} has layout {FORMAT + 1}, this metaplug reads {FORMAT}: use the version of "
        "metaplug that wrote it"
    )


class Bomb:
    """Pickles to code that leaves a mark where it runs."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return (open, (str(self.mark), "w"))


@pytest.mark.parametrize("plain", [False, True])
def test_code_in_a_file_is_refused_and_not_executed(tmp_path, plain):
    path, mark = tmp_path / "learner.safetensors", tmp_path / "mark"
    state = {"format": 2, **own().state_dict(), "kind": Bomb(mark)}
    if plain:
        path.write_bytes(pickle.dumps(state))
    else:
        torch.save(state, path)
    text = message(lambda: MetaLearner.load(path, model=Body()))
    assert text.startswith(
        f"{path} is {'not a whole metaplug checkpoint' if plain else 'of torch.save'} ("
    )
    assert not mark.exists()


def test_a_failed_write_leaves_the_older_file(tmp_path, monkeypatch):
    path = tmp_path / "learner.safetensors"
    learner = own()
    learner.save(path)
    before = path.read_bytes()

    def full(file):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    text = message(lambda: learner.save(path))
    assert f"{path}: No space left on device; the one that stood there is untouched" in text
    assert path.read_bytes() == before
    assert [each.name for each in tmp_path.iterdir()] == ["learner.safetensors"]
    assert "cannot write" in message(
        lambda: learner.save(tmp_path / "nowhere" / "learner.safetensors")
    )


# What stops a run.


def stopped(learner, stream=TRAIN):
    """The error of a fit, after which the weights, statistics and the iteration are as before."""
    before = {key: pickle.dumps(value) for key, value in learner.state_dict().items()}
    with pytest.raises(RunError) as error:
        learner.fit(stream, iterations=1, tasks_per_batch=2)
    after = {key: pickle.dumps(value) for key, value in learner.state_dict().items()}
    assert before == after
    assert "\n" not in str(error.value)
    return str(error.value)


class Spoil(Plugin):
    """Makes NaN in one hook."""

    class Config(Plugin.Config):
        hook: str
        step: int = 1

    def _spoil(self, hook, values, step=None):
        if self.config.hook != hook or (step is not None and step.index != self.config.step):
            return None
        if isinstance(values, torch.Tensor):
            return values * math.nan
        return {
            name: value * math.nan if "bias" in name else value for name, value in values.items()
        }

    @hookimpl
    def transform_tasks(self, batch):
        spoiled = self._spoil("transform_tasks", batch.support_x)
        return (
            None
            if spoiled is None
            else TaskBatch(spoiled, batch.support_y, batch.query_x, batch.query_y)
        )

    @hookimpl
    def transform_parameters(self, parameters, step):
        return self._spoil("transform_parameters", parameters, step)

    @hookimpl
    def transform_inner_losses(self, losses, step):
        return self._spoil("transform_inner_losses", losses, step)

    @hookimpl
    def transform_gradients(self, gradients, step):
        return self._spoil("transform_gradients", gradients, step)

    @hookimpl
    def transform_learning_rates(self, learning_rates, step):
        return self._spoil("transform_learning_rates", learning_rates, step)

    @hookimpl
    def transform_outer_losses(self, losses):
        return self._spoil("transform_outer_losses", losses)

    @hookimpl
    def compute_meta_gradients(self, outcome):
        means = {
            name: weight.detach().mean(0) for name, weight in outcome.adapted_parameters.items()
        }
        return self._spoil("compute_meta_gradients", means)

    @hookimpl
    def transform_meta_gradients(self, gradients):
        return self._spoil("transform_meta_gradients", gradients)


@pytest.mark.parametrize(
    ("hook", "where", "what"),
    [
        ("transform_tasks", ", iteration 1", "its value' is not right"),
        ("transform_parameters", ", iteration 1, inner step 1", "'0.bias', '2.bias'"),
        ("transform_inner_losses", ", iteration 1, inner step 1", "'its value'"),
        ("transform_gradients", ", iteration 1, inner step 1", "'0.bias', '2.bias'"),
        ("transform_learning_rates", ", iteration 1, inner step 1", "'0.bias', '2.bias'"),
        ("transform_outer_losses", ", iteration 1", "'its value'"),
        ("compute_meta_gradients", ", iteration 1", "'0.bias', '2.bias'"),
        ("transform_meta_gradients", ", iteration 1", "'0.bias', '2.bias'"),
    ],
)
def test_the_plugin_that_made_nan_is_named_and_nothing_is_updated(hook, where, what):
    """Not the plugin behind it, which only passes it on."""
    what = "'support_x'" if hook == "transform_tasks" else what
    if hook.startswith("transform") and hook not in (
        "transform_learning_rates",
        "transform_meta_gradients",
    ):
        what += " of all 2 tasks"

    class Pass(Plugin):
        @hookimpl
        def transform_gradients(self, gradients):
            return {name: gradient * 1 for name, gradient in gradients.items()}

        @hookimpl
        def transform_meta_gradients(self, gradients):
            return {name: gradient * 1 for name, gradient in gradients.items()}

    learner = problem().learner(plugins=[Spoil(hook=hook), Pass()])
    link = (
        "link 1 of 2"
        if hook in ("transform_gradients", "transform_meta_gradients")
        else "link 1 of 1"
    )
    assert stopped(learner) == (
        f"iteration 1 stopped, nothing was updated: plugin 'spoil' in {hook} ({link}{where}) "
        f"returned NaN or Inf in {what}; "
        "see what 'spoil' computes there, or leave it out"
    )


def test_nan_in_the_data_is_named_before_anything_runs():
    class Holed(Stream):
        def batch(self, iteration, indices):
            batch = super().batch(iteration, indices)
            if len(indices) > 1:
                batch.query_x[1, 0] = math.nan
            return batch

    text = stopped(problem().learner(), Holed())
    assert text == (
        "iteration 1 stopped, nothing was updated: query_x of task 1 holds NaN or Inf, on which no "
        "loss is defined: "
        "clean the data of that task"
    )


def test_nan_in_the_loss_is_named_with_its_step():
    def loss(prediction, target):
        return nn.functional.cross_entropy(prediction, target) / (
            prediction.detach().abs().max() < 3
        )

    learner = problem(lr=50.0).learner(loss=loss)
    assert re.fullmatch(
        r"iteration 1 stopped, nothing was updated: the support loss holds NaN or Inf in 'loss' of "
        r"all 2 tasks in iteration 1, "
        r"inner step 1; the model's output was finite: see what the loss function computes",
        stopped(learner),
    )


def test_divergence_names_where_it_began():
    case = regression(lr=1e200, steps=3)

    class Regression(Stream):
        def batch(self, iteration, indices):
            return regression(tasks=len(indices)).batch

    text = stopped(case.learner(kind="regression", inner_lr=1000.0, plugins=[Blow()]), Regression())
    assert re.fullmatch(
        r"iteration 1 stopped, nothing was updated: the support loss holds NaN or Inf in 'loss' of "
        r"all 2 tasks in iteration 1, "
        r"inner step 1; the inner loop diverges: the support loss of task 0 grew from 0\.4106 to "
        r"inf in 1 inner step at inner_lr = 1000, "
        r"of which plugins made up to 1e\+203; lower inner_lr",
        text,
    )


class Blow(Plugin):
    """Learning rates as large as they can be."""

    @hookimpl
    def transform_learning_rates(self, learning_rates):
        return {name: rate * 1e200 for name, rate in learning_rates.items()}


class Cusp(nn.Module):
    """A model whose loss is finite and whose second derivative is not."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3, dtype=torch.float64))

    def forward(self, x):
        return (self.weight**2).sqrt().expand(len(x), -1)


@pytest.mark.parametrize("plugins", [[], [GradientClipping(max_meta_norm=1.0)]])
def test_a_nan_meta_gradient_is_not_blamed_on_the_plugin_that_receives_it(plugins):
    plugins = [GradientClipping(max_meta_norm=1.0)] if plugins else []
    learner = MetaLearner(Cusp(), inner_steps=0, plugins=plugins)
    assert stopped(learner) == (
        "iteration 1 stopped, nothing was updated: the meta-gradient holds NaN or Inf in 'weight' "
        "in iteration 1; every loss on the way "
        "was finite: an operation of the model or of a plugin has no finite derivative there, such "
        "as a root or norm of 0: "
        "add a small number inside it"
    )


def test_labels_that_a_plugin_puts_out_of_range_are_refused():
    class Shifts(Plugin):
        @hookimpl
        def transform_tasks(self, batch):
            return TaskBatch(batch.support_x, batch.support_y + 7, batch.query_x, batch.query_y)

    case = problem()
    learner = case.learner(plugins=[Shifts()])
    with pytest.raises(RequestError, match="labels out of range: support_y has the label"):
        learner.meta_gradients(case.batch)


def test_one_name_is_no_list_of_plugins():
    with pytest.raises(
        RequestError,
        match=r"^plugins = 'gradient-sharing' is one name, not a list of plugins: write "
        r"plugins=\['gradient-sharing'\]$",
    ):
        MetaLearner(nn.Linear(1, 1), plugins="gradient-sharing")


def test_an_evaluation_that_diverges_is_no_wrong_answer():
    case = problem()
    learner = case.learner()
    learner.evaluate(Stream(), num_tasks=1)
    with torch.no_grad():
        list(learner.model.parameters())[-1].fill_(math.nan)
    with pytest.raises(
        RunError,
        match=r"^evaluation task 0 has a query loss of NaN or Inf after 2 inner steps: NaN or "
        r"Inf in "
        r"'2.bias' stood in the "
        r"meta-parameters; go on from a checkpoint before that$",
    ):
        learner.evaluate(Stream(), num_tasks=2)
