"""Precision on a CUDA device: float32 without TF32, whatever surrounds the step."""

import copy

import pytest
import torch
from torch.nn.functional import cosine_similarity

from metaplug import MetaLearner
from metaplug.testing import problem

pytestmark = pytest.mark.cuda


def meta_gradient(case, device, precision="float32", **settings):
    """All tensors in one vector, in float64."""
    model = copy.deepcopy(case.model).to(device)
    learner = MetaLearner(
        model, inner_lr=case.lr, inner_steps=case.steps, precision=precision, **settings
    )
    gradients = learner.meta_gradients(case.batch)
    assert {gradient.dtype for gradient in gradients.values()} == {torch.float32}
    return torch.cat([gradient.flatten() for gradient in gradients.values()]).double().cpu()


@pytest.mark.parametrize("batching", ["vectorized", "sequential"])
@pytest.mark.parametrize("name", ["softplus", "layer-norm", "group-norm", "batch-norm", "max-pool"])
@pytest.mark.parametrize("precision", ["tf32", "bfloat16"])
def test_coarser_products_keep_the_direction_of_the_meta_gradient(precision, name, batching):
    case = problem(name, dtype=torch.float32, lr=0.1, support=8)
    coarse, fine = (
        meta_gradient(case, "cuda", each, task_batching=batching) for each in (precision, "float32")
    )
    assert cosine_similarity(coarse, fine, dim=0) > 0.99


@pytest.mark.parametrize("name", ["conv4", "batch-norm"])
def test_float32_is_float32_though_tf32_is_allowed_around_it(name):
    case = problem(name, dtype=torch.float32, lr=0.1, support=8)
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = (
        True  # put back by exact_arithmetic
    )
    ours = meta_gradient(case, "cuda")
    assert torch.backends.cudnn.allow_tf32
    assert torch.backends.cuda.matmul.allow_tf32
    assert (ours - meta_gradient(case, "cpu")).norm() < 1e-3 * ours.norm()


@pytest.mark.parametrize("precision", ["tf32", "bfloat16"])
def test_coarser_steps_are_captured_too(precision):
    case = problem("conv4", dtype=torch.float32)
    plain, ours = (
        meta_gradient(case, "cuda", precision, capture=capture) for capture in (False, True)
    )
    assert (ours - plain).norm() < 1e-2 * plain.norm()
