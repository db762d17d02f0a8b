"""What every task source promises, and the equation of this one."""

import pytest
import torch
from metaplug import MetaLearner, RequestError, TaskBatch
from metaplug.models import Mlp

from my_idea import MyIdea

FIELDS = ("support_x", "support_y", "query_x", "query_y")


def same(one: TaskBatch, other: TaskBatch) -> bool:
    return all(torch.equal(getattr(one, field), getattr(other, field)) for field in FIELDS)


def test_the_sizes_are_those_that_were_asked_for() -> None:
    batch = MyIdea(shots=3, queries=5).train.batch(0, range(4))
    assert [getattr(batch, field).shape for field in FIELDS] == [
        (4, 3, 1),
        (4, 3, 1),
        (4, 5, 1),
        (4, 5, 1),
    ]


def test_a_task_depends_on_seed_split_iteration_and_index_alone() -> None:
    tasks = MyIdea(seed=1)
    alone, among = tasks.train.batch(2, [5]), tasks.train.batch(2, [3, 5])
    assert all(torch.equal(getattr(alone, field)[0], getattr(among, field)[1]) for field in FIELDS)
    others = (
        tasks.train.batch(2, [6]),
        tasks.train.batch(3, [5]),
        tasks.test.batch(2, [5]),
        MyIdea(seed=2).train.batch(2, [5]),
    )
    assert not any(same(alone, other) for other in others)


def test_every_task_is_a_line() -> None:
    batch = MyIdea(shots=3, slope=2.0).train.batch(0, range(50))
    x, y = batch.support_x.squeeze(2), batch.support_y.squeeze(2)
    slopes = (y[:, 1:] - y[:, :1]) / (x[:, 1:] - x[:, :1])
    torch.testing.assert_close(slopes[:, 0], slopes[:, 1], rtol=1e-2, atol=1e-2)
    assert 1.0 < float(slopes.abs().max()) < 2.1


def test_settings_out_of_bounds_are_refused() -> None:
    with pytest.raises(RequestError, match="slope = 0: input should be greater than 0"):
        MyIdea(slope=0)
    with pytest.raises(RequestError, match="unknown field 'slop': did you mean 'slope'?"):
        MyIdea(slop=1.0)
    with pytest.raises(RequestError, match="shots = 0"):
        MyIdea(shots=0)


def test_a_model_learns_on_it() -> None:
    torch.manual_seed(0)
    tasks = MyIdea()
    model = Mlp(tasks.input_shape, tasks.outputs, hidden=(8,))
    learner = MetaLearner(model, kind=tasks.kind, inner_lr=0.1, meta_lr=0.01)
    before = learner.evaluate(tasks.test, num_tasks=16).mean
    learner.fit(tasks.train, iterations=50, tasks_per_batch=4)
    assert learner.evaluate(tasks.test, num_tasks=16).mean < before
