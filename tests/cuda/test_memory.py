"""On a CUDA device: the estimate beside torch's counters, and memory that really runs out."""

import re

import pytest
import torch

from metaplug import RunError
from metaplug.bench.meters import Meter
from metaplug.bench.workloads import Workload
from metaplug.learner import MetaLearner
from metaplug.testing import Stream, problem

pytestmark = pytest.mark.cuda


@pytest.mark.parametrize("settings", [{}, {"checkpoint_steps": 2}, {"chunk_size": 4}])
def test_the_estimate_is_near_what_the_allocator_holds(settings):
    model, batch = Workload("", "conv4-64-max", 16, 5, 0.01, "classification", 1, 2).build()
    batch = batch.to("cuda")
    learner = MetaLearner(model.cuda(), inner_steps=5, inner_lr=0.01, **settings)
    learner.estimate_memory(batch)
    learner.engine.meta_step(batch, 1)
    measured = (
        Meter(torch.device("cuda")).memory(lambda: learner.engine.meta_step(batch, 2))[0] * 2**20
    )
    assert 0.7 < learner.estimate_memory(batch).bytes / measured < 1.5


def test_memory_that_runs_out_has_a_mend():
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
        batch = learner.intake(case.batch)
        many = type(batch)(
            *(getattr(batch, field).repeat_interleave(20_000, 0).cpu() for field in batch.__slots__)
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
        r"iteration 1 ran out of memory on cuda.*, asking for .* more, with 60000 tasks of 2 inner steps; it updated nothing",
        str(raised.value),
    )
    assert all(
        torch.equal(tensor, before[name]) for name, tensor in learner.model.state_dict().items()
    )
