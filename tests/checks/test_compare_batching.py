"""Stacked tasks are compared with single ones where needed, and differ only where vmap errs."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from metaplug import MetaLearner
from metaplug.checks import compare_batching
from metaplug.testing import problem

BATCH = problem().batch


class Around(nn.Module):
    """Calls a function between two layers; torch.flip is no operation that is known to be right."""

    def __init__(self, function, examples=0):
        super().__init__()
        self.first, self.head = nn.Linear(4, 16), nn.Linear(16, 3)
        self.function, self.examples = function, examples

    def forward(self, x):
        if len(x) < self.examples:
            raise ValueError("too few examples")
        return self.head(self.function(torch.tanh(self.first(x))).flip(1))


def choice(model, batch=BATCH, **settings):
    torch.manual_seed(0)
    dtype = next(model.parameters()).dtype
    given = batch.map(lambda each: each.to(dtype) if each.is_floating_point() else each)
    learner = MetaLearner(model, inner_steps=1, **settings)
    learner.meta_gradients(given)
    return learner.batching


def test_a_model_of_known_operations_is_not_compared(monkeypatch):
    def never(*_):
        raise AssertionError("compared")

    monkeypatch.setattr(compare_batching, "_compare", never)
    known = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    assert choice(known).batching == "vectorized"


class Reversed(torch.autograd.Function):
    """The identity, whose gradient is reversed; all that it calls is known."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x * 1

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, gradient):
        return -gradient


@pytest.mark.parametrize("strange", ["hook", "function"])
def test_what_no_operation_tells_of_is_compared(strange, monkeypatch):
    seen = []
    monkeypatch.setattr(compare_batching, "_compare", lambda *_: seen.append(1))
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    if strange == "hook":
        model[1].register_full_backward_hook(lambda module, taken, given: None)
    else:
        model[1].forward = Reversed.apply
    choice(model)
    assert seen


def in_single(h):
    assert h.dtype == torch.float32
    return h


STRANGE = {
    "draws twice": lambda h: (h + torch.randn_like(h)) * torch.rand_like(h),
    "drops out by torch.dropout": lambda h: torch.dropout(torch.dropout(h, 0.5, True), 0.5, True),
    "asserts its dtype": in_single,
    "rounds in float32": lambda h: torch.cdist(h.float(), torch.ones(16, 16)).to(h),
}


@pytest.mark.parametrize("name", STRANGE)
def test_what_is_no_fault_of_vmap_does_not_count(name):
    assert choice(Around(STRANGE[name])).batching == "vectorized"


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_within_attention_is_left_out_of_the_comparison(dtype, fused):
    class Attending(nn.Module):
        def __init__(self):
            super().__init__()
            self.mix, self.head = nn.MultiheadAttention(4, 2, 0.5), nn.Linear(4, 3)

        def forward(self, x):
            return self.head(self.mix(x, x, x, need_weights=not fused)[0])

    assert choice(Attending().to(dtype)).batching == "vectorized"


@pytest.mark.parametrize("examples", [0, 5])
def test_few_examples_are_compared_where_the_model_takes_so_few(examples, monkeypatch):
    seen, compare = [], compare_batching._compare

    def noting(inner, rows, dtype):
        seen.append(rows.support_x.shape[1])
        return compare(inner, rows, dtype)

    monkeypatch.setattr(compare_batching, "_compare", noting)
    batch = problem(support=9, query=9).batch
    assert choice(Around(lambda h: h, examples), batch).batching == "vectorized"
    assert seen[-1] == (9 if examples else compare_batching.FEW)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_a_derivative_that_single_tasks_lack_too_is_no_fault_of_vmap():
    model = Around(lambda h: h)
    loss = F.multi_margin_loss  # it has no second derivative
    found = choice(model, loss=loss, preset="fomaml", task_batching="vectorized")
    assert found.batching == "vectorized"


class Rotating(nn.Module):
    """With complex weights; torch.embedding of padded rows goes wrong under vmap."""

    def __init__(self, padded):
        super().__init__()
        self.rows = nn.Parameter(torch.randn(5, 3, dtype=torch.complex64))
        self.padded = padded

    def forward(self, x):
        parts = torch.view_as_real(self.rows).flatten(1)
        rows = torch.embedding(parts, (x > 0).long(), 0 if self.padded else -1)
        return torch.view_as_complex(rows.sum(1).unflatten(1, (3, 2))).abs()


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.filterwarnings("error")
def test_complex_weights_are_compared(padded):
    batch = BATCH.map(lambda each: each.float() if each.is_floating_point() else each)
    learner = MetaLearner(Rotating(padded), inner_steps=1)
    learner.meta_gradients(batch)
    assert learner.batching.batching == ("sequential" if padded else "vectorized")
