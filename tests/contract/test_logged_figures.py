"""Figures that plugins log in the loop and of its outcome."""

import pytest
import torch

from metaplug import InnerStep, Outcome, Plugin, hookimpl
from metaplug.testing import Stream, problem


class Logging(Plugin):
    commits = 0

    @hookimpl
    def transform_inner_losses(self, losses, step: InnerStep):
        step.log("loss", losses)
        step.log(f"loss/{step.index}", losses)

    @hookimpl
    def transform_outer_losses(self, losses, outcome: Outcome):
        outcome.log("outer", losses)
        outcome.log("nothing", losses / 0 * 0)

    @hookimpl
    def commit(self):
        Logging.commits += 1

    @hookimpl
    def end_meta_step(self):
        return {"own": 1.0}


@pytest.mark.parametrize("options", [{}, {"checkpoint_steps": 1}, {"chunk_size": 1}])
def test_what_is_logged_is_a_figure_of_the_iteration(options):
    Logging.commits = 0
    case = problem(tasks=3, steps=2)
    learner = case.learner(plugins=[Logging()], **options)
    outcome = case.learner().engine.meta_gradients(case.batch, 0, 1)
    with pytest.warns(UserWarning, match="the figure 'logging.nothing'"):
        history = learner.fit([case.batch], iterations=1, tasks_per_batch=3)
    figures = history.records[-1].step.figures
    first, last = outcome.losses[:2].tolist()
    assert figures["logging.own"] == 1.0
    assert figures["logging.loss/0"] == pytest.approx(first)
    assert figures["logging.loss"] == figures["logging.loss/1"] == pytest.approx(last)
    assert figures["logging.outer"] == pytest.approx(float(outcome.outer_loss))
    assert Logging.commits == 0  # nothing was kept
    assert torch.isfinite(next(learner.model.parameters())).all()


def test_evaluation_logs_nothing():
    learner = problem(tasks=2, steps=1).learner(plugins=[Logging()])
    learner.evaluate(Stream(), num_tasks=2)
    assert learner.chain.figures() == {"logging.own": 1.0}
