"""On a CUDA device: the measured peak, and memory that really runs out."""

import re

import pytest
import torch

from metaplug import RunError
from metaplug.contract.task_batch import FIELDS
from metaplug.execution.memory import peak_memory, reset_peak_memory
from metaplug.learner import MetaLearner
from metaplug.testing import Stream, problem

pytestmark = pytest.mark.cuda


def test_the_peak_of_a_step_is_above_what_it_leaves():
    device = torch.device("cuda")
    learner = MetaLearner(problem("conv4").model.cuda(), inner_steps=2)
    held = torch.empty(2**26, device=device)
    del held
    reset_peak_memory(device)
    before = peak_memory(device)
    learner.fit(Stream("conv4"), iterations=1)
    assert before < torch.cuda.memory_allocated() < peak_memory(device)


def test_memory_that_runs_out_is_explained():
    case = problem(dtype=torch.float32)
    learner = MetaLearner(case.model.cuda(), inner_steps=2)
    learner.fit(Stream(dtype=torch.float32), iterations=1)
    before = {name: tensor.clone() for name, tensor in learner.model.state_dict().items()}
    torch.cuda.empty_cache()
    most = 2**20 + torch.cuda.memory_reserved()
    torch.cuda.set_per_process_memory_fraction(
        most / torch.cuda.get_device_properties(0).total_memory
    )
    try:
        batch = learner.prepare_batch(case.batch)
        many = type(batch)(
            *(getattr(batch, field).repeat_interleave(20_000, 0).cpu() for field in FIELDS)
        )

        class Many:
            split = "train"

            def batch(self, iteration, indices):
                return many

        with pytest.raises(RunError) as raised:
            learner.fit(Many(), iterations=1, tasks_per_batch=60_000)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert re.match(
        r"iteration 2 ran out of memory on cuda.*, asking for .* more, with 60000 tasks of 2 inner "
        "steps; it updated nothing",
        str(raised.value),
    )
    assert all(
        torch.equal(tensor, before[name]) for name, tensor in learner.model.state_dict().items()
    )
