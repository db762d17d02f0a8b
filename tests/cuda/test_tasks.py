"""Tasks drawn on a CUDA device are the CPU's, bit for bit."""

from typing import Any

import pytest
import torch

from metaplug.contract.task_batch import FIELDS
from metaplug.tasks import Glyphs, Sinusoid

pytestmark = pytest.mark.cuda


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"within": True},
        {"rotate": True, "flip": True, "shift": 2},
        {"train_ways": (2, 5)},
        {"train_ways": (2, 5), "train_shots": (1, 3), "vary": "task", "rotate": True},
    ],
)
def test_episodes_on_the_device_are_those_of_the_cpu(options: dict[str, Any]) -> None:
    source = Glyphs(ways=5, shots=1, queries=3, **options)
    moved = source.to("cuda")
    for split in ("train", "val", "test"):
        ours, theirs = (getattr(each, split).batch(3, range(6)) for each in (moved, source))
        assert ours.device.type == "cuda"
        assert all(torch.equal(getattr(ours, name).cpu(), getattr(theirs, name)) for name in FIELDS)


def test_computed_tasks_stay_where_they_are() -> None:
    assert Sinusoid().to("cuda").train.batch(0, [0]).device.type == "cpu"
