"""What every model promises, and the equation of this one."""

from pathlib import Path

import pytest
import torch
from metaplug import MetaLearner, RequestError, TaskBatch
from metaplug.tasks import Sinusoid

from my_idea import MyIdea


def batch_of(shape: tuple[int, ...], outputs: int) -> TaskBatch:
    x = torch.randn(2, 6, *shape, dtype=torch.float64)
    y = torch.arange(6).remainder(outputs).expand(2, 6)
    return TaskBatch(x, y, x.flip(1), y.flip(1))


def test_the_output_is_that_of_the_equation() -> None:
    model = MyIdea((2, 3), 4, width=5)
    x = torch.randn(7, 2, 3)
    hidden = torch.tanh(x.flatten(1) @ model.first.weight.T + model.first.bias)
    block = torch.tanh(hidden @ model.block.weight.T + model.block.bias)
    expected = (hidden + block) @ model.head.weight.T + model.head.bias
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("shape", [(3,), (1, 4, 4)])
def test_meta_gradients_are_the_same_stacked_and_one_by_one(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model, batch = MyIdea(shape, 3, width=6).double(), batch_of(shape, 3)
    stacked, one_by_one = (
        MetaLearner(model, task_batching=batching, inner_steps=2).meta_gradients(batch)
        for batching in ("vectorized", "sequential")
    )
    assert stacked.keys() == dict(model.named_parameters()).keys()
    for name, gradient in stacked.items():
        torch.testing.assert_close(gradient, one_by_one[name], rtol=1e-10, atol=1e-12)


def test_settings_out_of_bounds_are_refused() -> None:
    with pytest.raises(RequestError, match="width = 0: input should be greater than or equal to 1"):
        MyIdea((1,), 1, width=0)
    with pytest.raises(RequestError, match="unknown field 'with': did you mean 'width'?"):
        MyIdea((1,), 1, **{"with": 3})


def test_it_learns_and_goes_on_from_a_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tasks = Sinusoid()
    model = MyIdea(tasks.input_shape, tasks.outputs, width=8)
    learner = MetaLearner(model, kind="regression", inner_lr=0.01, meta_lr=0.01)
    before = learner.evaluate(tasks.test, num_tasks=16).mean
    learner.fit(tasks.train, iterations=50, tasks_per_batch=4)
    after = learner.evaluate(tasks.test, num_tasks=16)
    assert after.mean < before
    learner.save(tmp_path / "learner.safetensors")
    again = MyIdea(tasks.input_shape, tasks.outputs, width=8)
    loaded = MetaLearner.load(tmp_path / "learner.safetensors", model=again)
    assert loaded.evaluate(tasks.test, num_tasks=16).mean == after.mean
