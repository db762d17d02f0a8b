"""Steps replayed from CUDA graphs: the engine's own numbers, and nothing else."""

import copy

import pytest
import torch
from support import hook_plugins, plugins
from torch import nn

from metaplug import MetaLearner
from metaplug.execution.cuda_graphs import CudaGraphs
from metaplug.execution.traced import PATIENCE
from metaplug.testing import Stream, assert_close, problem

pytestmark = pytest.mark.cuda

DETERMINISTIC = [name for name in plugins.NAMES if name not in plugins.DRAWING]
"""What draws has numbers of its own on CUDA."""


def learner_on_cuda(case, **settings):
    return MetaLearner(
        copy.deepcopy(case.model).cuda(), inner_lr=case.lr, inner_steps=case.steps, **settings
    )


def refusals(learner):
    derivation = learner.engine.derivation
    return derivation.refusal, derivation.compile_graph.refusal


@pytest.mark.parametrize("name", [None, *DETERMINISTIC])
@pytest.mark.parametrize("model", ["conv4", "batch-norm"])
def test_a_replay_gives_the_meta_gradients_of_the_engine(model, name):
    case, other = problem(model), problem(model, seed=1)
    plain, ours = (
        learner_on_cuda(case, plugins=[plugins.make(name)] if name else [], capture=capture)
        for capture in (False, True)
    )
    for batch in (
        case.batch,
        other.batch,
        case.batch,
    ):  # the first is recorded, and what it read is overwritten after
        assert_close(ours.meta_gradients(batch), plain.meta_gradients(batch))
    assert refusals(ours) == (None, None)


@pytest.mark.parametrize("model", ["layer-norm", "group-norm", "max-pool", "tied"])
def test_other_layers_and_inner_optimizers_are_captured_too(model):
    case = problem(model, lr=0.01)
    for settings in ({}, {"inner_optimizer": "adam"}, {"task_batching": "sequential"}):
        plain, ours = (
            learner_on_cuda(case, capture=capture, **settings) for capture in (False, True)
        )
        for _ in range(2):
            assert_close(ours.meta_gradients(case.batch), plain.meta_gradients(case.batch))
        assert refusals(ours) == (None, None)


@pytest.mark.parametrize(
    "parts", [hook_plugins.ALL, hook_plugins.ZERO], ids=["second order", "order 0"]
)
def test_starts_variables_updates_and_more_passes_are_captured(parts):
    case = problem("batch-norm")
    plain, ours = (
        learner_on_cuda(case, plugins=hook_plugins.chain(parts), capture=capture)
        for capture in (False, True)
    )
    for _ in range(3):
        assert_close(ours.meta_gradients(case.batch), plain.meta_gradients(case.batch))
        with torch.no_grad():
            for learner in (plain, ours):
                for parameter in learner.engine.meta_parameters.values():
                    parameter.add_(0.05)
    assert refusals(ours) == (None, None)


@pytest.mark.parametrize("preset", ["maml", "maml++"])
def test_a_captured_run_is_the_uncaptured_run(preset):
    """Weights go in anew at every step, and later replays do not overwrite what was committed."""
    case = problem("conv4")
    plain, ours = (
        learner_on_cuda(case, preset=preset, plugins=["gradient-sharing"], capture=capture)
        for capture in (False, True)
    )
    for learner in (plain, ours):
        learner.fit(Stream("conv4"), iterations=6, tasks_per_batch=3)
    assert refusals(ours) == (None, None)
    assert_close(
        dict(ours.model.state_dict()), dict(plain.model.state_dict()), rtol=1e-6, atol=1e-8
    )  # Adam magnifies rounding
    for one, other in zip(ours.chain.plugins, plain.chain.plugins, strict=True):
        assert_close(dict(one.state_dict()), dict(other.state_dict()), rtol=1e-6, atol=1e-8)


def test_batches_of_other_shapes_share_a_pool_and_do_not_disturb_each_other():
    case = problem("conv4")
    batches = [problem("conv4", tasks=tasks, seed=tasks).batch for tasks in (2, 5, 3)]
    plain, ours = (
        learner_on_cuda(case, plugins=["gradient-sharing"], capture=capture)
        for capture in (False, True)
    )
    expected = [plain.meta_gradients(batch) for batch in batches]
    rounds = [
        [ours.meta_gradients(batch) for batch in batches] for _ in range(2)
    ]  # all kept, beyond the replays that follow
    assert refusals(ours) == (None, None)
    for actual in rounds:
        for one, other in zip(actual, expected, strict=True):
            assert_close(one, other)


def test_auto_captures_after_its_patience():
    case = problem()
    plain, ours = (learner_on_cuda(case, capture=capture) for capture in (False, "auto"))
    ours.fit(Stream(), iterations=PATIENCE, tasks_per_batch=2)
    assert not ours.engine.derivation._traces
    ours.fit(Stream(), iterations=3, tasks_per_batch=2)
    assert len(ours.engine.derivation._traces) == 1
    plain.fit(Stream(), iterations=PATIENCE + 3, tasks_per_batch=2)
    assert_close(
        dict(ours.model.state_dict()), dict(plain.model.state_dict()), rtol=1e-6, atol=1e-8
    )


def test_random_numbers_are_refused_and_training_goes_on():
    case = problem()
    case.model.insert(2, nn.Dropout(0.5))
    plain, ours = (learner_on_cuda(case, capture=capture) for capture in (False, True))
    with pytest.warns(
        UserWarning,
        match="^steps are not captured, and the run goes on uncaptured: .* draws random numbers",
    ):
        ours.fit(Stream(), iterations=2, tasks_per_batch=2)
    plain.fit(Stream(), iterations=2, tasks_per_batch=2)
    assert_close(
        dict(ours.model.state_dict()), dict(plain.model.state_dict()), rtol=1e-6, atol=1e-8
    )


def test_what_waits_for_the_device_is_refused_before_it_is_recorded():
    record, x = (
        CudaGraphs(torch.device("cuda", torch.cuda.current_device())),
        torch.ones(3, device="cuda"),
    )
    with pytest.raises(RuntimeError, match="synchronizing CUDA operation"):
        record(lambda x: [x * x.sum().item()], [x])
    assert torch.cuda.get_sync_debug_mode() == 0
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    replay, outputs = record(lambda x: [x * x.sum()], [x])  # and another recording works
    x.fill_(2)
    replay()
    assert torch.equal(outputs[0], torch.full((3,), 12.0, device="cuda"))
    torch.rand(3, device="cuda")  # the generator, too, is as it was


@pytest.mark.slow
def test_compiled_steps_are_captured_too():
    case = problem("batch-norm")
    plain, ours = (
        learner_on_cuda(case, plugins=["gradient-sharing"], compile=both, capture=both)
        for both in (False, True)
    )
    for _ in range(2):
        assert_close(
            ours.meta_gradients(case.batch), plain.meta_gradients(case.batch), rtol=1e-9, atol=1e-10
        )
    assert refusals(ours) == (None, None)
