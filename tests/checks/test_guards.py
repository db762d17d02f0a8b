"""Models that cannot be computed with are refused before the first step, each with its cause.

And "auto" falls back where vmap refuses.
"""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from metaplug import MetaLearner, RequestError, TaskBatch
from metaplug.checks.probe_model import CHECKPOINTED
from metaplug.checks.refuse_other_weights import OTHER_WEIGHTS
from metaplug.execution.batching import CPU_TASK_BYTES, kept_bytes
from metaplug.testing import Problem, Stream, assert_close, problem, reference, regression

BATCH = problem(dtype=torch.float32).batch


def body(forward=None):
    """A linear model of which a test spoils one part."""
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    if forward:
        model.forward = forward.__get__(model)
    return model


def refused(model, batch=BATCH, **settings):
    """The one line with which a model is refused, before anything of it has changed."""
    state = {
        name: tensor.clone()
        for name, tensor in model.state_dict().items()
        if not isinstance(tensor, nn.UninitializedParameter)
    }
    with pytest.raises(RequestError) as error:
        MetaLearner(model, **settings).meta_gradients(batch)
    assert "\n" not in str(error.value)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in state.items())
    return str(error.value)


# Weights from elsewhere.


def test_a_closure_stored_on_a_module_is_refused():
    model = body()
    model.route = lambda x: model[2](torch.tanh(model[0](x)))

    class Router(nn.Module):
        def __init__(self):
            super().__init__()
            self.inside = model

        def forward(self, x):
            return self.inside.route(x)

    names = "'inside.0.weight', 'inside.0.bias', 'inside.2.weight'"
    assert refused(Router()) == OTHER_WEIGHTS.format(names)


class Recomputing(nn.Module):
    def __init__(self, part, reentrant):
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Sequential(nn.Tanh(), nn.Linear(6, 3))
        self.part, self.reentrant = part, reentrant

    def forward(self, x):
        return checkpoint(self.part(self), self.first(x), use_reentrant=self.reentrant)


def all_of(model):
    return model.second


def closure_of(model):
    return lambda hidden: model.second[1](model.second[0](hidden))


@pytest.mark.parametrize("part", [all_of, closure_of])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("batching", ["auto", "sequential"])
def test_activation_checkpointing_is_refused(batching, reentrant, part):
    assert refused(Recomputing(part, reentrant), task_batching=batching) == CHECKPOINTED


COMPILED = (
    "the module 'model' is compiled by torch.compile, which knows nothing of stacked tasks: pass "
    "the module that it was made from; the learner's own compile=True compiles whole meta-steps"
)


def test_a_compiled_module_is_refused():
    class OptimizedModule(nn.Module):
        """As torch.compile(model) returns it."""

        def __init__(self, model):
            super().__init__()
            self._orig_mod = model

    assert refused(OptimizedModule(body())) == COMPILED


def test_a_data_parallel_module_is_refused():
    assert refused(nn.DataParallel(body())) == (
        "the module 'model' is a DataParallel, whose replicas do not follow a task's weights: "
        "pass its .module; tasks spread over devices by ranks"
    )


class Lazy(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x):
        if not hasattr(self, "scale"):
            self.register_buffer("scale", torch.full((4,), 2.0))
        return self.layer(x * self.scale)


def test_a_buffer_made_at_the_first_call_is_to_be_made_before():
    assert refused(Lazy()) == (
        "the model makes its 'scale' in forward: pass one batch through the model first, or make "
        "it in __init__"
    )
    model = Lazy()
    model(BATCH.support_x[0])
    assert MetaLearner(model).meta_gradients(BATCH)


@pytest.mark.slow
def test_a_module_compiled_by_torch_is_refused():
    assert refused(torch.compile(body())) == COMPILED


# State in forward.


class Counter(nn.Module):
    def __init__(self, write):
        super().__init__()
        self.layer, self.write = nn.Linear(4, 3), write
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        self.write(self)
        return self.layer(x) + self.seen


def in_place(module):
    module.seen += 1


def anew(module):
    module.seen = module.seen + 1


def twice(module):
    anew(module)
    anew(module)


@pytest.mark.parametrize("write", [in_place, anew, twice])
def test_a_buffer_written_in_forward_is_refused(write):
    expected = (
        "the model writes to a buffer in forward, which would leak from task to task: "
        "make its buffers constant in training"
    )
    assert refused(Counter(write)) == expected


# Parameters.


def test_parameters_that_cannot_be_meta_learned_are_refused():
    frozen = body().requires_grad_(False)
    assert (
        refused(frozen)
        == "the model has no trainable parameter, so there is nothing to meta-learn: set "
        "requires_grad on some"
    )
    assert (
        refused(nn.ReLU())
        == "the model has no trainable parameter, so there is nothing to meta-learn: set "
        "requires_grad on some"
    )
    lazy = nn.Sequential(nn.LazyLinear(3))
    assert (
        refused(lazy)
        == "the model's parameters '0.weight', '0.bias' have no shape yet: pass one batch through "
        "the model first"
    )
    mixed = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3).double())
    assert refused(mixed) == (
        "the model's trainable parameters differ in dtype, or its parameters in device "
        "('torch.float32', 'torch.float64'): call model.to(...) first; frozen parameters may be of "
        "another dtype"
    )
    rotated = body()
    rotated.angles = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    assert refused(rotated) == (
        "some of the model's parameters are complex and some are real, but all must be of one "
        "dtype: hold the complex ones as real ones, and read them by torch.view_as_complex"
    )
    counted = body()
    counted.levels = nn.Parameter(torch.ones(2, dtype=torch.int8), requires_grad=False)
    assert refused(counted) == (
        "the model's parameters 'levels' hold whole numbers, which nothing trains: "
        "make them buffers, by register_buffer"
    )


# Outputs, labels and losses.


def test_outputs_of_a_wrong_form_are_refused():
    rows = (
        "the model must answer with one tensor (n, *output), a row for each example: "
        "wrap it in a module that does"
    )

    class Answer(nn.Module):
        def __init__(self, answer):
            super().__init__()
            self.layer, self.answer = nn.Linear(4, 3), answer

        def forward(self, x):
            return self.answer(self.layer(x))

    assert refused(Answer(lambda output: {"scores": output})) == (
        "the model answers with a dict of 'scores', and which of them is the prediction nobody "
        "says: give output=, such as output='scores'"
    )
    assert refused(Answer(lambda output: (output, output))) == (
        "the model answers with a tuple of '0', '1', and which of them is the prediction nobody "
        "says: give output=, such as output=0"
    )
    assert refused(Answer(lambda output: [None])) == rows
    assert refused(Answer(lambda output: output.mean(0))) == rows
    assert refused(Answer(lambda output: output[:, 0])) == (
        "for classification the model must answer (n, classes), not (5,): give it a head of that "
        "form"
    )
    narrow = problem(dtype=torch.float32).batch
    narrow.support_y[0, 0] = 3
    assert refused(body(), narrow) == (
        "labels out of range: support_y has the label 3, but the model has 3 outputs, for the "
        "labels 0 to 2: "
        "give the model more outputs, or the tasks fewer ways"
    )


def test_labels_are_checked_in_every_batch():
    learner = MetaLearner(body())
    learner.meta_gradients(BATCH)
    wrong = problem(dtype=torch.float32).batch
    wrong.query_y[2, 1] = -1
    with pytest.raises(
        RequestError,
        match=r"^labels out of range: query_y has the label -1, but the model has 3 outputs",
    ):
        learner.meta_gradients(wrong)


def test_losses_of_a_wrong_form_are_refused():
    expected = (
        "the loss must answer with one number for a task, a tensor of shape (): take the "
        "mean over its examples"
    )
    for loss in (nn.CrossEntropyLoss(reduction="none"), lambda prediction, target: 0.5):
        assert refused(body(), loss=loss) == expected


def test_a_regression_that_would_broadcast_is_refused():
    case = regression(outputs=1)
    case.batch = type(case.batch)(
        case.batch.support_x,
        case.batch.support_y.squeeze(-1),
        case.batch.query_x,
        case.batch.query_y.squeeze(-1),
    )
    assert refused(case.model, case.batch, kind="regression") == (
        "for regression the model must answer in the form of the targets, (5,) for a task, not (5, "
        "1): reshape one of them"
    )


def test_a_model_that_fails_on_the_tasks_is_named_with_its_own_words():
    text = refused(body(), problem().batch)
    assert text.startswith(
        "the model fails on the support examples of a task, shape (5, 4), torch.float64 on cpu "
        "(RuntimeError: "
    )
    assert text.endswith("): give it the form and dtype of the tasks")
    single = problem(support=1, dtype=torch.float32).batch
    assert "ValueError: Expected more than 1 value per channel when training" in refused(
        nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)), single
    )


# What torch's new ways do instead.


class Bent(nn.Module):
    def forward(self, weight):
        return weight.sinh()


def test_parametrizations_are_followed():
    torch.manual_seed(0)
    model = body().double()
    nn.utils.parametrize.register_parametrization(model[0], "weight", Bent())
    case = Problem(model, problem().batch)
    ours = case.learner().meta_gradients(case.batch)
    expected = reference.maml(model, case.batch, steps=case.steps, lr=case.lr)
    assert_close(ours, expected.gradients)


# Falling back.


class DataDependent(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x):
        hidden = self.layer(x)
        return hidden if hidden.sum().item() > 0 else 2 * hidden


def test_auto_falls_back_for_a_data_dependent_model_and_names_the_operation():
    torch.manual_seed(0)
    case = Problem(DataDependent().double(), problem().batch)
    learner = case.learner()
    assert learner.batching is None
    expected = reference.maml(case.model, case.batch, steps=case.steps, lr=case.lr)
    assert_close(learner.meta_gradients(case.batch), expected.gradients)
    assert learner.batching.batching == "sequential"
    assert learner.batching.reason.startswith(
        "torch.vmap refuses the model: vmap: It looks like you're calling .item() on a Tensor."
    )
    text = refused(copy.deepcopy(case.model), case.batch, task_batching="vectorized")
    assert text.startswith(
        "task batching 'vectorized' cannot be had, as torch.vmap refuses the model (vmap: It looks "
        "like you're calling .item()"
    )
    assert text.endswith("): use 'auto' or 'sequential'")


def test_the_choice_of_batching_is_a_rule_and_says_why():
    small = problem().learner()
    small.evaluate(Stream(), num_tasks=1)
    assert small.batching.batching == "vectorized"
    assert small.batching.reason.startswith("a task keeps 0.00 MiB for its backward pass, at most ")
    wide = MetaLearner(nn.Sequential(nn.Linear(4, 400_000), nn.Tanh(), nn.Linear(400_000, 3)))
    wide.evaluate(Stream(dtype=torch.float32), num_tasks=1)
    assert wide.batching.batching == "sequential"
    assert " more than " in wide.batching.reason
    for batching in ("vectorized", "sequential"):
        learner = problem().learner(task_batching=batching)
        learner.evaluate(Stream(), num_tasks=1)
        assert (learner.batching.batching, learner.batching.reason) == (batching, "as configured")


def kept_by(model, batch, **more):
    return kept_bytes(MetaLearner(model, **more).engine.inner, batch)


def test_what_a_task_keeps_for_frozen_weights_alone_is_not_counted():
    n, wide = 6, 2**16
    x, y = torch.rand(2, n, 4), torch.randint(3, (2, n))
    batch = TaskBatch(x, y, x, y)

    def model():
        return nn.Sequential(nn.Linear(4, wide), nn.Tanh(), nn.Linear(wide, 3))

    logits, hidden, inputs = 4 * n * 3, 4 * n * wide, 4 * n * 4
    ends, bound = logits + 8 * n + 4, CPU_TASK_BYTES  # log-softmax, labels, total weight
    assert kept_by(model(), batch) == (inputs + hidden + ends, bound)
    head, body = model(), model()
    head[0].requires_grad_(False)
    body[2].requires_grad_(False)
    assert kept_by(head, batch) == (hidden + ends, bound)  # tanh is not differentiated
    # The frozen head is read for the derivative by the body: 0.75 MiB, below the bound.
    assert kept_by(body, batch) == (inputs + hidden + ends, bound)
    frozen = nn.Sequential(nn.Linear(4, 16), nn.Linear(16, wide), nn.Linear(wide, 3))
    frozen[1:].requires_grad_(False)
    read = 4 * (16 + 3) * wide  # 4.75 MiB
    assert kept_by(frozen, batch) == (inputs + ends, read)
