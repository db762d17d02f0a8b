"""Every plugin and preset on a CUDA device: the CPU's numbers, up to rounding."""

import copy
import warnings

import pytest
import torch
from metaplug_plugins.gradient_sharing import GradientSharing
from support import plugins

from metaplug import MetaLearner
from metaplug.contract import registry
from metaplug.models import Conv4
from metaplug.testing import Stream, assert_close, problem

pytestmark = pytest.mark.cuda

DETERMINISTIC = [name for name in plugins.NAMES if name not in plugins.DRAWING]
"""Random numbers are other ones on another device."""

SHARING = [
    {"granularity": "step-and-tensor", "scope": "tensor", "normalisation": "mean-unit"},
    {"conditioning": "task"},
    {"streaming": True},
    {"statistics": "learned"},
]


def meta_gradients(case, device, **settings):
    model = copy.deepcopy(case.model).to(device)
    learner = MetaLearner(model, inner_lr=case.lr, inner_steps=case.steps, **settings)
    return {name: gradient.cpu() for name, gradient in learner.meta_gradients(case.batch).items()}


@pytest.mark.parametrize("batching", ["vectorized", "sequential"])
@pytest.mark.parametrize("name", DETERMINISTIC)
def test_every_plugin_in_float64_agrees_with_the_cpu(name, batching):
    case = problem("conv4")
    ours, theirs = (
        meta_gradients(case, device, plugins=[plugins.make(name)], task_batching=batching)
        for device in ("cuda", "cpu")
    )
    assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("sharing", [False, True])
@pytest.mark.parametrize("preset", registry.names("preset"))
def test_every_preset_in_float64_agrees_with_the_cpu(preset, sharing):
    case = problem("conv4", tasks=4, steps=3)
    ours, theirs = (
        meta_gradients(case, device, preset=preset, plugins=["gradient-sharing"] if sharing else [])
        for device in ("cuda", "cpu")
    )
    assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("options", SHARING, ids=str)
def test_the_options_of_gradient_sharing_agree_with_the_cpu(options):
    case = problem("conv4")
    ours, theirs = (
        meta_gradients(case, device, plugins=[GradientSharing(**options)])
        for device in ("cuda", "cpu")
    )
    assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("preset", registry.names("preset"))
def test_every_preset_in_float32_agrees_with_the_cpu_on_conv4(preset):
    """The real conv4, 32 filters, on images of 28 by 28."""
    case = problem("conv4", dtype=torch.float32)
    torch.manual_seed(0)
    case.model = Conv4((1, 28, 28), 3)
    batch = case.batch
    grown = [
        torch.nn.functional.interpolate(x.flatten(0, 1), (28, 28)).unflatten(0, x.shape[:2])
        for x in (batch.support_x, batch.query_x)
    ]
    case.batch = type(batch)(grown[0], batch.support_y, grown[1], batch.query_y)
    ours, theirs = (meta_gradients(case, device, preset=preset) for device in ("cuda", "cpu"))
    scale = max(float(gradient.abs().max()) for gradient in theirs.values())
    assert_close(ours, theirs, rtol=1e-3, atol=1e-3 * scale)


@pytest.mark.parametrize("name", plugins.NAMES)
def test_every_plugin_trains_saves_and_takes_more_steps_on_the_device(name, tmp_path):
    case = problem("conv4")
    learner = MetaLearner(
        copy.deepcopy(case.model).cuda(),
        plugins=[plugins.make(name)],
        inner_lr=case.lr,
        inner_steps=case.steps,
    )
    learner.fit(Stream("conv4"), iterations=2, tasks_per_batch=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        result = learner.evaluate(
            Stream("conv4", split="test"), num_tasks=3, inner_steps=case.steps + 2
        )
    assert bool(torch.isfinite(result.per_task).all())
    learner.save(tmp_path / "learner.pt")
    loaded = MetaLearner.load(tmp_path / "learner.pt", model=copy.deepcopy(case.model))
    assert next(loaded.model.parameters()).device.type == "cpu"
    for plugin, other in zip(learner.chain.plugins, loaded.chain.plugins, strict=True):
        assert_close(
            {k: v.cpu() for k, v in plugin.state_dict().items()},
            dict(other.state_dict()),
            rtol=0,
            atol=0,
        )
