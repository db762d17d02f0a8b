"""The inner loop: its optimizers against torch's own, and what it leaves behind: nothing."""

import copy
import gc
import weakref

import pytest
import torch
from metaplug_plugins.gradient_sharing import GradientSharing
from torch import nn
from torch.nn import functional as F

from metaplug import MetaLearner, Plugin, RequestError, RunError, hookimpl
from metaplug.contract.task_batch import FIELDS
from metaplug.core.optimizers import OPTIMIZERS
from metaplug.testing import Problem, Stream, adapted, assert_close, found, problem, reference

TORCH = {
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
    "adamax": torch.optim.Adamax,
    "adagrad": torch.optim.Adagrad,
    "adadelta": torch.optim.Adadelta,
    "rmsprop": torch.optim.RMSprop,
}
SETTINGS = [
    ("sgd", {}),
    ("sgd", {"momentum": 0.9}),
    ("sgd", {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1}),
    ("sgd", {"momentum": 0.8, "nesterov": True}),
    ("adam", {}),
    ("adam", {"betas": [0.8, 0.9], "weight_decay": 0.1}),
    ("adam", {"eps": 1e-2, "amsgrad": True}),
    ("adamax", {}),
    ("adamax", {"betas": [0.7, 0.9], "eps": 1e-3, "weight_decay": 0.1}),
    ("adagrad", {}),
    ("adagrad", {"lr_decay": 0.2, "eps": 1e-3, "weight_decay": 0.1}),
    ("adadelta", {}),
    ("adadelta", {"rho": 0.7, "eps": 1e-2, "weight_decay": 0.1}),
    ("rmsprop", {}),
    ("rmsprop", {"alpha": 0.8, "eps": 1e-3, "weight_decay": 0.1, "momentum": 0.5}),
    ("rmsprop", {"alpha": 0.8, "eps": 1e-3, "centered": True}),
]


def by_torch(case, name, settings, lr):
    """Every task adapted by torch's own optimizer, one after the other: (T, *shape) by name."""
    results = []
    for task in range(case.batch.num_tasks):
        model = copy.deepcopy(case.model)
        settings = {
            key: tuple(value) if key == "betas" else value for key, value in settings.items()
        }
        optimizer = TORCH[name](model.parameters(), lr=lr, **settings)
        for _ in range(case.steps):
            optimizer.zero_grad()
            F.cross_entropy(
                model(case.batch.support_x[task]), case.batch.support_y[task]
            ).backward()
            optimizer.step()
        results.append({key: value.detach() for key, value in model.named_parameters()})
    return {key: torch.stack([result[key] for result in results]) for key in results[0]}


def test_every_optimizer_is_tried():
    assert {name for name, _ in SETTINGS} == set(OPTIMIZERS) == set(TORCH)
    tried = {
        name: {key for each, settings in SETTINGS if each == name for key in settings}
        for name in OPTIMIZERS
    }
    assert tried == {name: set(settings) for name, (_, settings) in OPTIMIZERS.items()}


@pytest.mark.parametrize("batching", ["vectorized", "sequential"])
@pytest.mark.parametrize(("name", "settings"), SETTINGS)
def test_optimizers_adapt_as_torchs_own(name, settings, batching):
    case = problem("layer-norm", steps=3)
    learner = case.learner(
        inner_lr=0.05,
        inner_optimizer=name,
        inner_optimizer_settings=settings,
        task_batching=batching,
    )
    assert_close(adapted(learner, case.batch), by_torch(case, name, settings, 0.05))
    test = learner.engine.evaluate(case.batch, 3).adapted_parameters
    assert_close(dict(test), adapted(learner, case.batch))


RULES = [
    ("sgd", {}, reference.Sgd),
    ("sgd", {"momentum": 0.9}, reference.Sgd),
    ("sgd", {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1}, reference.Sgd),
    ("sgd", {"momentum": 0.8, "nesterov": True}, reference.Sgd),
    ("adam", {"eps": 1e-4}, reference.Adam),
    ("adam", {"eps": 1e-2, "betas": [0.8, 0.9], "weight_decay": 0.1}, reference.Adam),
    ("rmsprop", {"alpha": 0.8, "eps": 1e-3}, reference.RmsProp),
    ("rmsprop", {"alpha": 0.8, "eps": 1e-3, "momentum": 0.5}, reference.RmsProp),
    ("rmsprop", {"alpha": 0.8, "eps": 1e-2, "centered": True}, reference.RmsProp),
]


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize(("name", "settings", "rule"), RULES)
def test_meta_gradients_flow_through_the_state_of_the_optimizer(name, settings, rule, order):
    # Smooth and without batch norm: no gradient is exactly zero, where the square root has no
    # derivative.
    case = problem("mlp", steps=3, seed=3)
    learner = case.learner(
        preset="maml" if order == 2 else "fomaml",
        inner_lr=0.05,
        inner_optimizer=name,
        inner_optimizer_settings=settings,
    )
    expected = reference.maml(
        case.model, case.batch, steps=3, lr=0.05, order=order, rule=lambda: rule(**settings)
    )
    assert_close(learner.meta_gradients(case.batch), expected.gradients)


def test_the_state_of_an_optimizer_does_not_outlive_its_loop():
    case = problem(steps=2)
    for name in OPTIMIZERS:
        learner = case.learner(inner_lr=0.05, inner_optimizer=name)
        first, second = (learner.meta_gradients(case.batch) for _ in range(2))
        assert all(torch.equal(first[key], second[key]) for key in first)


# Refused settings.


def refused(**settings):
    with pytest.raises(RequestError) as error:
        problem().learner(**settings)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_refused_optimizers_and_settings():
    assert (
        refused(inner_optimizer="adamw") == "unknown inner optimizer 'adamw': did you mean 'adam'?"
    )
    assert refused(inner_optimizer="sgd", inner_optimizer_settings={"maximize": True}) == (
        "inner optimizer 'sgd' does not take the setting 'maximize': higher would ignore it or get "
        "it wrong: "
        "known: 'momentum', 'dampening', 'nesterov', 'weight_decay'"
    )
    assert refused(inner_optimizer="adam", inner_optimizer_settings={"wieght_decay": 0.1}) == (
        "inner optimizer 'adam' does not take the setting 'wieght_decay': higher would ignore it "
        "or get it wrong: "
        "did you mean 'weight_decay'?"
    )
    assert refused(inner_optimizer="sgd", inner_optimizer_settings={"momentum": -1}) == (
        "inner optimizer 'sgd': Invalid momentum value: -1; correct the setting"
    )
    assert refused(inner_optimizer="sgd", inner_optimizer_settings={"lr": 1}).startswith(
        "inner optimizer 'sgd' does not take the setting 'lr'"
    )
    assert (
        refused(inner_lr=-0.1)
        == "learner: inner_lr = -0.1: input should be greater than or equal to 0"
    )
    assert (
        refused(inner_lr=float("nan")) == "learner: inner_lr = nan: input should be a finite number"
    )
    assert (
        refused(inner_steps=-1)
        == "learner: inner_steps = -1: input should be greater than or equal to 0"
    )
    assert refused(meta_lr=0) == "learner: meta_lr = 0: input should be greater than 0"
    assert (
        refused(batch_norm="running")
        == "learner: batch_norm = 'running': input should be 'batch' or 'frozen'"
    )
    assert (
        refused(kind="clasification")
        == "unknown kind of task 'clasification': classification or regression"
    )
    assert (
        refused(task_batching="vectorised")
        == "unknown task batching 'vectorised': did you mean 'vectorized'?"
    )
    assert refused(preset="mamll") == "unknown preset 'mamll': did you mean 'maml'?"


# What the loop leaves behind.


def tensors():
    gc.collect()
    return {id(each): each for each in gc.get_objects() if issubclass(type(each), torch.Tensor)}


class Lstm(nn.Module):
    def __init__(self):
        super().__init__()
        self.recurrent = nn.LSTM(4, 5, batch_first=True)
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        return self.head(self.recurrent(x.unsqueeze(1))[0][:, 0])


@pytest.mark.parametrize(
    ("name", "optimizer"), [("batch-norm", "sgd"), ("tied", "adagrad"), ("lstm", "adam")]
)
def test_nothing_of_a_step_stays_alive(name, optimizer):
    case = Problem(Lstm().double(), problem().batch, 0.1, 2) if name == "lstm" else problem(name)
    learner = case.learner(plugins=[GradientSharing()], inner_optimizer=optimizer)
    learner.fit(Stream(), iterations=1)
    learner.evaluate(Stream(), num_tasks=2)
    before = tensors()
    for _ in range(2):
        learner.meta_gradients(case.batch)
        learner.fit(Stream(), iterations=1)
        learner.evaluate(Stream(), num_tasks=2)
        task = case.batch
        learner.adapt(task.support_x[0], task.support_y[0])
    after = tensors()
    # The optimizer keeps its own state tensor by tensor, and plugins their statistics; no other
    # tensor may be new.
    kept = {
        id(each) for state in learner.engine.optimizer.state.values() for each in state.values()
    }
    new = [each for key, each in after.items() if key not in before and key not in kept]
    assert [
        tuple(each.shape) for each in new if each.requires_grad or each.grad_fn is not None
    ] == []
    assert len(after) <= len(before)


def test_an_outcome_dies_with_its_last_reference():
    case = problem("batch-norm")
    learner = case.learner()
    outcome = found(learner, case.batch).outcome
    watched = [weakref.ref(weight) for weight in outcome.adapted_parameters.values()]
    watched += [weakref.ref(loss) for loss in outcome.support_losses]
    del outcome
    gc.collect()
    assert [each() for each in watched] == [None] * len(watched)


def test_a_failed_step_leaves_the_learner_usable():
    class Trip(Plugin):
        on = False

        @hookimpl
        def transform_gradients(self, gradients):
            return 1 / 0 if self.on else gradients

    trip, case = Trip(), problem()
    learner = case.learner(plugins=[trip], inner_optimizer="adam", inner_lr=0.05)
    expected = learner.meta_gradients(case.batch)
    trip.on = True
    with pytest.raises(RunError):
        learner.meta_gradients(case.batch)
    trip.on = False
    again = learner.meta_gradients(case.batch)
    assert all(torch.equal(expected[name], again[name]) for name in expected)


def outside(model):
    """All of a model that is not a parameter's value."""
    return {
        "buffers": {name: buffer.clone() for name, buffer in model.named_buffers()},
        "modes": [module.training for module in model.modules()],
        "requires_grad": [parameter.requires_grad for parameter in model.parameters()],
        "identities": [id(parameter) for parameter in model.parameters()],
        "modules": [id(module) for module in model.modules()],
        "attributes": [sorted(module.__dict__) for module in model.modules()],
        "flags": [getattr(module, "track_running_stats", None) for module in model.modules()],
        "hooks": [
            (len(module._forward_hooks), len(module._backward_hooks)) for module in model.modules()
        ],
        "state": sorted(model.state_dict()),
    }


@pytest.mark.parametrize("batch_norm", ["batch", "frozen"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["batch-norm", "conv4", "tied"])
def test_the_users_model_is_unchanged_except_for_its_parameters(name, training, batch_norm):
    case = problem(name)
    case.model.train(training)
    case.model.register_forward_hook(lambda *_: None)
    before = outside(case.model)
    values = [parameter.detach().clone() for parameter in case.model.parameters()]
    learner = MetaLearner(case.model, batch_norm=batch_norm, inner_steps=2)
    learner.fit(Stream(name), iterations=2)
    learner.evaluate(Stream(name), num_tasks=2)
    learner.adapt(case.batch.support_x[0], case.batch.support_y[0])
    after = outside(case.model)
    for key, buffer in before.pop("buffers").items():
        assert torch.equal(buffer, after["buffers"][key])
    del after["buffers"]
    assert before == after
    assert all(
        not torch.equal(*pair)
        for pair in zip(values, case.model.parameters(), strict=True)
        if pair[0].dim() > 1
    )
    assert all(parameter.grad is None for parameter in case.model.parameters())


# Batch norm and dropout.


def test_batch_norm_by_the_statistics_of_each_tasks_own_batch():
    """Tasks of very different scales are normalised each by itself, as if each were alone."""
    case = problem("batch-norm", tasks=2)
    case.batch.support_x[1] *= 100
    together = adapted(case.learner(), case.batch)
    for task in range(2):
        fields = (getattr(case.batch, field)[task : task + 1] for field in FIELDS)
        alone = adapted(case.learner(), type(case.batch)(*fields))
        assert_close(
            {name: weight[task : task + 1] for name, weight in together.items()},
            alone,
            rtol=1e-8,
            atol=1e-9,
        )


@pytest.mark.parametrize("batching", ["vectorized", "sequential"])
def test_frozen_batch_norm_uses_the_stored_statistics(batching):
    case = problem("batch-norm")
    layer = case.model[1]
    layer.running_mean.copy_(torch.linspace(-1, 1, 6))
    layer.running_var.copy_(torch.linspace(0.5, 2, 6))
    learner = case.learner(batch_norm="frozen", task_batching=batching)
    case.model.eval()
    expected = reference.maml(case.model, case.batch, steps=case.steps, lr=case.lr)
    assert_close(learner.meta_gradients(case.batch), expected.gradients)
    predictions = learner.engine.evaluate(case.batch, 2).query_predictions
    by_hand = [
        reference.predict(case.model, expected.adapted[task], case.batch.query_x[task])
        for task in range(3)
    ]
    assert_close(predictions, torch.stack(by_hand).detach())
    adapted_model = learner.adapt(case.batch.support_x[0], case.batch.support_y[0])
    assert_close(adapted_model(case.batch.query_x[0]).detach(), predictions[0])


def test_frozen_batch_norm_without_statistics_is_refused():
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3, track_running_stats=False))
    with pytest.raises(RequestError) as error:
        MetaLearner(model, batch_norm="frozen")
    assert (
        str(error.value)
        == "batch_norm 'frozen' needs stored statistics, but the layer '1' keeps none: use 'batch'"
    )


@pytest.mark.parametrize("batching", ["vectorized", "sequential"])
def test_dropout_draws_for_every_task_and_step_from_the_seed(batching):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 32), nn.Dropout(0.5), nn.Linear(32, 3)).double()
    case = Problem(model, problem(tasks=2).batch, 0.1, 1)
    same = type(case.batch)(
        *(
            getattr(case.batch, field)[:1].repeat(2, *[1] * (getattr(case.batch, field).dim() - 1))
            for field in FIELDS
        )
    )
    learners = [case.learner(task_batching=batching, seed=seed) for seed in (7, 7, 8)]
    first, again, other = (learner.meta_gradients(same) for learner in learners)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["0.weight"], other["0.weight"])
    moved = adapted(learners[0], same)["0.weight"]
    assert not torch.allclose(moved[0], moved[1]), "two tasks must not share their dropout"
    later = learners[0].engine.meta_gradients(same, iteration=1, total=0).gradients
    assert not torch.equal(later["0.weight"], first["0.weight"]), "every iteration draws its own"


def test_running_statistics_work_under_vmap():
    learner = problem("conv4").learner(task_batching="vectorized")
    learner.fit(Stream("conv4"), iterations=1)
    assert int(learner.model[1].num_batches_tracked) == 0


# Errors in the loop.


def test_a_loss_that_reaches_no_adapted_parameter_is_named():
    class Loose(nn.Module):
        def __init__(self):
            super().__init__()
            self.used = nn.Linear(4, 3)
            self.spare = nn.Parameter(torch.zeros(2))

        def forward(self, x):
            return self.used(x)

    class OnlySpare(Plugin):
        @hookimpl
        def select_adapted(self):
            return ("spare",)

    learner = MetaLearner(Loose(), plugins=[OnlySpare()])
    with pytest.raises(RunError) as error:
        learner.meta_gradients(problem(dtype=torch.float32).batch)
    assert (
        str(error.value)
        == "no gradient reaches the adapted parameters 'spare': the loss does not depend on them; "
        "adapt others"
    )


def test_a_meta_loss_that_reaches_no_parameter_is_named():
    class Cut(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x):
            return self.layer(x).detach()

    with pytest.raises(RunError) as error:
        MetaLearner(Cut(), inner_steps=0).meta_gradients(problem(dtype=torch.float32).batch)
    assert (
        str(error.value)
        == "no meta-gradient: the outer loss depends on no trainable parameter; let the model's "
        "output depend on one"
    )


class Once(torch.autograd.Function):
    """An operation that has a first derivative alone."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        return gradient


class FirstOrderOnly(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))

    def forward(self, x):
        return Once.apply(self.layers(x))


def test_a_model_without_second_derivatives_is_named_and_learns_in_first_order():
    batch = problem(dtype=torch.float32).batch
    with pytest.raises(RunError) as error:
        MetaLearner(FirstOrderOnly()).meta_gradients(batch)
    assert str(error.value) == (
        "second-order meta-gradients cannot be had of this model (one of its operations is marked "
        "once_differentiable): add the plugin derivative-order"
    )
    gradients = MetaLearner(FirstOrderOnly(), preset="fomaml").meta_gradients(batch)
    assert gradients.keys() == dict(FirstOrderOnly().named_parameters()).keys()


def test_first_order_keeps_no_graph_of_the_support_losses():
    class Penalty(Plugin):
        @hookimpl
        def transform_outer_losses(self, losses, outcome):
            return losses + outcome.support_losses[0]

    case = problem()
    assert case.learner(plugins=[Penalty()]).meta_gradients(case.batch)
    with pytest.raises(RunError) as error:
        case.learner(preset="fomaml", plugins=[Penalty()]).meta_gradients(case.batch)
    assert str(error.value) == (
        "a plugin uses the support losses of a first-order step in what is differentiated, but "
        "their graph is gone: "
        "detach them in the plugin, or use second order"
    )
