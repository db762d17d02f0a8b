"""Losses fetched every few meta-steps: the run of one fetched at every step, bit for bit,
divergence included."""

import pytest
import torch

from metaplug import Plugin, RequestError, RunError, hookimpl
from metaplug.experiments.configuration import ExperimentConfig
from metaplug.experiments.runs import read_metrics, train
from metaplug.testing import Stream, problem

PLUGINS = ["gradient-sharing", "meta-sgd"]


def test_fetching_less_often_changes_no_number():
    case = problem(steps=2)
    plain, ours = (
        case.learner(plugins=list(PLUGINS)),
        case.learner(plugins=list(PLUGINS), metrics_every=3),
    )
    validation = Stream(split="val")
    histories = [
        learner.fit(
            Stream(),
            iterations=8,
            tasks_per_batch=3,
            validation=validation,
            validate_every=5,
            validation_tasks=2,
        )
        for learner in (plain, ours)
    ]
    for one, other in zip(*(history.records for history in histories), strict=True):
        assert (
            one.step.iteration,
            one.step.outer_loss,
            one.step.meta_gradient_norm,
            one.step.meta_lr,
        ) == (
            other.step.iteration,
            other.step.outer_loss,
            other.step.meta_gradient_norm,
            other.step.meta_lr,
        )
        assert (
            one.validation is other.validation is None
            or one.validation.mean == other.validation.mean
        )
    assert [bool(record.step.figures) for record in histories[1].records] == [
        False,
        False,
        True,
        False,
        True,
        False,
        False,
        True,
    ]
    assert histories[1].records[7].step.figures == histories[0].records[7].step.figures
    for one, other in zip(
        plain.engine.meta_parameters.values(), ours.engine.meta_parameters.values(), strict=True
    ):
        assert torch.equal(one, other)


class Diverges(Plugin):
    """In iteration 5."""

    @hookimpl
    def transform_inner_losses(self, losses, step):
        return losses * float("nan") if step.meta_iteration == 4 else None


def test_a_divergence_within_is_found_and_taken_back():
    case, texts, learners = problem(), [], []
    for every in (1, 5):
        learner = case.learner(plugins=["gradient-sharing", Diverges()], metrics_every=every)
        with pytest.raises(RunError) as error:
            learner.fit(Stream(), iterations=20, tasks_per_batch=2)
        texts.append(str(error.value))
        learners.append(learner)
    assert texts[0] == texts[1]
    assert texts[0].startswith(
        "iteration 5 stopped, nothing was updated: plugin 'diverges' in transform_inner_losses "
        "(link 1 of 1, "
    )
    assert [learner.iteration for learner in learners] == [4, 4]
    states = [learner.state_dict() for learner in learners]
    for part in ("model", *states[0]["plugin_states"]):
        one, other = ({**state["plugin_states"], "model": state["model"]}[part] for state in states)
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_labels_on_the_host_are_checked_in_every_batch():
    class Wrong(Stream):
        def batch(self, iteration, indices):
            batch = super().batch(iteration, indices)
            if iteration == 2:
                batch.query_y[0, 0] = 9
            return batch

    with pytest.raises(RequestError, match=r"^labels out of range: query_y has the label 9"):
        problem().learner(metrics_every=4).fit(Wrong(), iterations=4, tasks_per_batch=2)


CONFIG = {
    "model": {"name": "mlp", "settings": {"hidden": [4]}},
    "tasks": {"source": "sinusoid", "shots": 3, "queries": 3},
    "learner": {"inner_lr": 0.01, "inner_steps": 1},
    "training": {
        "iterations": 7,
        "tasks_per_batch": 2,
        "validate_every": 4,
        "validation_tasks": 2,
        "test_tasks": 2,
    },
}


def test_a_run_that_is_stopped_within_goes_on_as_if_it_had_not_been(tmp_path):
    config = ExperimentConfig.model_validate({**CONFIG, "runtime": {"metrics_every": 3}})
    train(config, tmp_path / "whole")
    seen = []

    def stop():
        return len(seen) >= 1  # asked for in the second record of three

    assert train(config, tmp_path / "stopped", on_record=seen.append, stop=stop) is None
    assert [record.step.iteration for record in seen] == [1, 2, 3]
    train(config, tmp_path / "stopped", resume=True)
    assert read_metrics(tmp_path / "stopped") == read_metrics(tmp_path / "whole")
    once = ExperimentConfig.model_validate(CONFIG)
    train(once, tmp_path / "once")
    assert [line["outer_loss"] for line in read_metrics(tmp_path / "once")] == [
        line["outer_loss"] for line in read_metrics(tmp_path / "whole")
    ]


def test_fewer_than_one_is_refused():
    with pytest.raises(RequestError, match=r"^metrics_every = 0: give at least 1$"):
        problem().learner(metrics_every=0)
