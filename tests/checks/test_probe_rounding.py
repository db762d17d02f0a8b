"""The trial of a model whose float32 results differ by rounding alone, and of one that is wrong."""

import pytest
import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from metaplug import MetaLearner, RequestError, TaskBatch
from metaplug.checks.model_copy import give_noisy_weights
from metaplug.checks.probe_model import probe_model
from metaplug.core.functional_model import clone
from metaplug.models import Conv4

WAYS = 20


def tried(model, x):
    y = torch.arange(len(x)).unsqueeze(0)
    x = x.unsqueeze(0)
    probe_model(MetaLearner(model).engine.inner, TaskBatch(x, y, x, y), "classification")


class Loud(nn.Module):
    """A network whose answers are large; batch norm takes its first bias away again."""

    def __init__(self):
        super().__init__()
        self.quiet = Conv4((1, 28, 28), WAYS, filters=64)

    def forward(self, x):
        return 100 * self.quiet(x)


@pytest.mark.parametrize("seed", range(3))
def test_a_gradient_of_nothing_but_rounding_is_no_other_gradient(seed):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model, x = Loud(), torch.rand(WAYS, 1, 28, 28)
    tried(model, x)


def strokes():
    """Images of one bright cross and one short stroke each, on a constant background."""
    x = torch.zeros(WAYS, 1, 28, 28)
    for image in x[:, 0]:
        row, column, other, *ends, _ = torch.randint(3, 25, (6,)).tolist()
        image[row, 3:25] = image[3:25, column] = 1
        image[other, min(ends) : max(ends) + 1] = 1
    return x


def test_rounding_adds_up_over_a_constant_background():
    """The first bias's gradient is 0; of 15,680 terms, most of them equal, 0.004 is left."""
    with torch.random.fork_rng():
        torch.manual_seed(148)
        model, x = Conv4((1, 28, 28), WAYS, filters=64, pooling="max"), strokes()
    tried(model, x)


class AtKinks(nn.Module):
    """ReLU within rounding of its kink, on the whole background of every channel."""

    def __init__(self, x):
        super().__init__()
        self.conv = nn.Conv2d(1, WAYS, 1)
        self.norm = nn.BatchNorm2d(WAYS, track_running_stats=False)
        self.head = nn.Linear(WAYS, WAYS)
        self.register_buffer("kinks", torch.zeros(WAYS, 1, 1))
        noisy = clone(self, shared=False)
        give_noisy_weights(noisy, self)
        self.kinks = noisy.normal(x)[0, :, :1, :1].detach()

    def normal(self, x):
        return self.norm(self.conv(x)) - self.kinks

    def forward(self, x):
        return self.head(F.relu(self.normal(x)).mean((2, 3)))


class Residues(AtKinks):
    """Answers that are the rounding of one pixel, made large."""

    def forward(self, x):
        return 1e6 * self.normal(x)[:, :, 0, 0]


@pytest.mark.parametrize("model", [AtKinks, Residues])
def test_neither_a_branch_nor_values_that_rounding_takes_are_others(model):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        x = strokes()
        made = model(x)
    tried(made, x)


class Rerun(torch.autograd.Function):
    """A linear layer whose backward pass reads the weight that its module has by then."""

    @staticmethod
    def forward(ctx, x, weight, module):
        ctx.module = module
        ctx.save_for_backward(x)
        return x @ weight.T

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return gradient @ ctx.module.weight, gradient.T @ x, None


class Rerunning(nn.Module):
    def __init__(self, dtypes):
        super().__init__()
        self.dtypes = dtypes
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 3, bias=False)

    def forward(self, x):
        hidden = torch.tanh(self.first(x))
        if x.dtype in self.dtypes:
            return Rerun.apply(hidden, self.second.weight, self.second)
        return self.second(hidden)


@pytest.mark.parametrize(
    ("dtype", "dtypes"),
    [
        (torch.float32, (torch.float32, torch.float64)),
        (torch.float64, (torch.float64,)),
        (torch.float32, (torch.float32,)),
    ],
    ids=["everywhere", "in float64", "in float32 alone"],
)
def test_a_gradient_of_other_weights_is_refused(dtype, dtypes):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, x = Rerunning(dtypes).to(dtype), torch.rand(3, 4, dtype=dtype)
    with pytest.raises(RequestError) as refusal:
        tried(model, x)
    assert str(refusal.value) == (
        "the gradient of the model does not follow the weights of its forward pass (a backward "
        "pass that runs forward again, or an operation that has no gradient): replace that part of "
        "the model"
    )
    tried(Rerunning(()).to(dtype), x)
