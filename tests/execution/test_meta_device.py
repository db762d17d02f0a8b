"""Every plugin and preset on the `meta` device, which holds no values.

A tensor made on another device raises there, and so does everything that waits for a value. So
a step that runs here stays on the model's device and never makes it wait for the host, which
otherwise only a machine with a GPU can tell.
"""

import copy
import dataclasses

import pytest
import torch
from support import plugins

from metaplug import MetaLearner, Plugin, hookimpl
from metaplug.contract import registry
from metaplug.testing import problem

# torch says it once in a process, so which test meets it depends on the order.
pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")

STEPS = 2
TOTAL = 10
SHARING = (
    {"granularity": "step-and-tensor", "scope": "tensor", "normalisation": "mean-unit"},
    {"conditioning": "task"},
    {"streaming": True},
    {"statistics": "learned"},
)
WAYS = (
    {"checkpoint_steps": 1},
    {"inner_optimizer": "adam"},
    {"meta_optimizer": "sgd"},
    {"batch_norm": "frozen"},
)


def two_meta_steps(*links, **settings):
    """Take two steps of two query losses; the second starts from what the first committed."""
    case = problem("batch-norm")  # the small model that has what every plugin asks for
    model, batch = copy.deepcopy(case.model).to("meta"), case.batch.to("meta")
    learner = MetaLearner(model, plugins=links, inner_steps=STEPS, **settings)
    for iteration in range(2):
        found = learner.engine.derive(batch, iteration, TOTAL, {1: 0.5, STEPS: 0.5})
        gradients = learner.chain.fold(
            "transform_meta_gradients", found.gradients, iteration=iteration
        )
        assert {gradient.device.type for gradient in gradients.values()} == {"meta"}
        learner.engine.update(dataclasses.replace(found, gradients=gradients), TOTAL)
    assert learner.iteration == 2


@pytest.mark.parametrize("name", plugins.NAMES)
def test_every_plugin_keeps_to_the_device_and_waits_for_no_value(name):
    two_meta_steps(plugins.make(name))


@pytest.mark.parametrize("options", SHARING, ids=str)
def test_so_does_gradient_sharing_with_its_options(options):
    two_meta_steps(plugins.make("gradient-sharing", **options))


@pytest.mark.parametrize("preset", registry.names("preset"))
def test_so_does_every_preset_beside_gradient_sharing(preset):
    two_meta_steps(plugins.make("gradient-sharing"), preset=preset)


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_so_does_every_way_of_taking_a_step(way):
    two_meta_steps(**way)


class OnAnotherDevice(Plugin):
    @hookimpl
    def transform_inner_losses(self, losses, step):
        return losses + torch.zeros(losses.shape, dtype=losses.dtype)


class WaitsForAValue(Plugin):
    @hookimpl
    def transform_inner_losses(self, losses, step):
        return losses / max(1.0, float(losses.max()))


@pytest.mark.parametrize("fault", [OnAnotherDevice, WaitsForAValue])
def test_a_plugin_that_does_not_is_found_here(fault):
    with pytest.raises(RuntimeError, match="meta"):
        two_meta_steps(fault())
