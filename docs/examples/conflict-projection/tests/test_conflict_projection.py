"""The contract of every plugin, and the promises of this one."""

import torch
from metaplug import MetaLearner, Plugin, TaskBatch, hookimpl
from metaplug.testing import PluginConformance
from torch import nn

from conflict_projection import ConflictProjection


class TestConformance(PluginConformance):
    plugin = ConflictProjection
    settings = {"strength": 0.7}
    off = {"strength": 0.0}


class Spy(Plugin):
    """Record the gradients that pass its place in the list, (tasks, weights) by inner step."""

    @hookimpl
    def setup(self):
        self.seen = {}

    @hookimpl
    def transform_gradients(self, gradients, step):
        parts = [gradient.detach().flatten(1) for gradient in gradients.values()]
        self.seen[step.index] = torch.cat(parts, 1)


def learn(plugin, tasks=6, inner_steps=2):
    """Make a small learner with spies around the plugin, and tasks of which one disagrees."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
        x = torch.randn(1, 8, 4, dtype=torch.float64) + 0.1 * torch.randn(tasks, 8, 4).double()
        y = torch.arange(8).remainder(3).repeat(tasks, 1)
        y[-1] = (y[-1] + 1) % 3
    before, after = Spy(name="before"), Spy(name="after")
    learner = MetaLearner(model, plugins=[before, plugin, after], inner_steps=inner_steps)
    return learner, TaskBatch(x[:, :4], y[:, :4], x[:, 4:], y[:, 4:]), before.seen, after.seen


class Given:
    """A stream that repeats one batch."""

    split = "train"

    def __init__(self, batch):
        self.given = batch

    def batch(self, iteration, indices):
        return self.given


def test_it_is_its_equation():
    for strength in (0.3, 1.0):
        learner, batch, before, after = learn(ConflictProjection(strength=strength))
        learner.meta_gradients(batch)
        for step, flat in before.items():
            mean = flat.mean(0)
            for task, gradient in enumerate(flat):
                along = gradient @ mean
                if along < 0:
                    gradient = gradient - strength * along / (mean @ mean) * mean
                torch.testing.assert_close(after[step][task], gradient, rtol=1e-10, atol=1e-12)


def test_at_full_strength_no_task_opposes_the_mean_any_more():
    learner, batch, before, after = learn(ConflictProjection())
    learner.meta_gradients(batch)
    along = {step: flat @ flat.mean(0) for step, flat in before.items()}
    assert any(bool((each < 0).any()) for each in along.values()), "no task is in conflict here"
    for step, flat in before.items():
        assert float((after[step] @ flat.mean(0)).min()) > -1e-12


def test_figures_are_the_shares_of_tasks_in_conflict():
    learner, batch, before, _ = learn(ConflictProjection())
    [record] = learner.fit(Given(batch), iterations=1, tasks_per_batch=6).records
    shares = {
        step: float((flat @ flat.mean(0) < 0).double().mean()) for step, flat in before.items()
    }
    assert record.step.figures == {
        f"conflict-projection.conflict/{k}": share for k, share in shares.items()
    }


def test_evaluation_uses_the_mean_of_the_last_training_batch():
    learner, batch, before, after = learn(ConflictProjection())
    learner.fit(Given(batch), iterations=1, tasks_per_batch=6)
    means = {step: flat.mean(0) for step, flat in before.items()}
    learner.evaluate(Given(batch), num_tasks=6)
    for step, flat in before.items():
        along = (flat @ means[step]).clamp(max=0)
        expected = flat - torch.outer(along / (means[step] @ means[step]), means[step])
        torch.testing.assert_close(after[step], expected, rtol=1e-10, atol=1e-12)


def test_before_any_training_evaluation_is_left_alone():
    learner, batch, before, after = learn(ConflictProjection())
    learner.evaluate(Given(batch), num_tasks=6)
    assert all(torch.equal(before[step], after[step]) for step in before)
