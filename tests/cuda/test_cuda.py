"""On a CUDA device every number is the CPU's, up to rounding."""

import copy

import pytest
import torch
from metaplug_plugins.gradient_sharing import GradientSharing

from metaplug import MetaLearner
from metaplug.testing import CLASSIFIERS, Stream, assert_close, problem

pytestmark = pytest.mark.cuda


def learner_on(case, device, **settings):
    return MetaLearner(
        copy.deepcopy(case.model).to(device), inner_lr=case.lr, inner_steps=case.steps, **settings
    )


def on_cpu(tensors):
    return {name: tensor.cpu() for name, tensor in tensors.items()}


@pytest.mark.parametrize("preset", ["maml", "fomaml"])
@pytest.mark.parametrize("batching", ["vectorized", "sequential"])
@pytest.mark.parametrize("name", CLASSIFIERS)
def test_float64_agrees_with_the_cpu(name, batching, preset):
    case = problem(name)
    settings = {"preset": preset, "task_batching": batching}
    ours, theirs = (
        learner_on(case, device, plugins=[GradientSharing()], **settings).meta_gradients(case.batch)
        for device in ("cuda", "cpu")
    )
    assert_close(on_cpu(ours), theirs, rtol=1e-9, atol=1e-9)


def test_float32_agrees_with_the_cpu_on_conv4():
    case = problem("conv4", dtype=torch.float32)
    ours, theirs = (
        learner_on(case, device, plugins=[GradientSharing()]).meta_gradients(case.batch)
        for device in ("cuda", "cpu")
    )
    assert_close(on_cpu(ours), theirs, rtol=1e-3, atol=1e-3)


def test_tasks_are_moved_to_the_device_of_the_model_and_training_agrees():
    case = problem("batch-norm")
    learners = [learner_on(case, device, plugins=[GradientSharing()]) for device in ("cuda", "cpu")]
    for learner in learners:
        learner.fit(Stream(), iterations=3)
    assert learners[0].batching.reason == "tasks are stacked on cuda"
    # Adam divides by the size of the gradient, which magnifies rounding.
    assert_close(
        on_cpu(learners[0].model.state_dict()), learners[1].model.state_dict(), rtol=1e-6, atol=1e-7
    )
    results = [learner.evaluate(Stream(split="test"), num_tasks=5).per_task for learner in learners]
    assert torch.equal(*results)
    assert results[0].device.type == "cpu"


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_the_callers_random_streams_are_left_alone_on_every_device(device):
    learner = learner_on(problem(), device)
    torch.cuda.manual_seed(3)
    before = torch.get_rng_state(), torch.cuda.get_rng_state()
    learner.fit(Stream(), iterations=1)
    learner.evaluate(Stream(), num_tasks=2)
    after = torch.get_rng_state(), torch.cuda.get_rng_state()
    assert all(torch.equal(*pair) for pair in zip(before, after, strict=True))


def test_a_file_from_the_device_is_read_without_it(tmp_path):
    learner = learner_on(problem(), "cuda", plugins=[GradientSharing()])
    learner.fit(Stream(), iterations=1)
    learner.save(tmp_path / "learner.pt")
    loaded = MetaLearner.load(tmp_path / "learner.pt", model=problem().model)
    assert_close(
        loaded.meta_gradients(problem().batch),
        on_cpu(learner.meta_gradients(problem().batch)),
        rtol=1e-9,
        atol=1e-9,
    )
