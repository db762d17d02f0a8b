"""A meta-step on ranks exchanges what docs/many-devices.md says."""

import runpy
from pathlib import Path

import pytest
from support import plugins
from support.ranks import on_ranks

from metaplug.execution.ranks import World
from metaplug.testing import Stream, problem

pytestmark = pytest.mark.filterwarnings(
    "ignore:This process .* is multi-threaded:DeprecationWarning"
)

DOCS = Path(__file__).parents[2] / "docs"
STUDY = runpy.run_path(str(DOCS / "studies" / "many_devices.py"))
STEPS, TASKS = 3, 5


def sizes_of_a_step(world, sharing):
    """Return the bytes of every exchange of a meta-step, those of whole numbers apart."""
    given = [plugins.make("gradient-sharing")] * sharing
    learner = problem().learner(plugins=given, inner_steps=STEPS, world=world)
    learner.fit(Stream(), iterations=1, tasks_per_batch=TASKS)
    device, host, exchange = [], [], World._exchange

    def counted(self, collective, x, *rest):
        (device if x.is_floating_point() else host).append(x.nbytes)
        exchange(self, collective, x, *rest)

    World._exchange = counted
    learner.fit(Stream(), iterations=1, tasks_per_batch=TASKS)
    World._exchange = exchange
    return device, host


def test_a_step_exchanges_as_often_and_as_many_bytes_as_the_model_says():
    tensors = [each.numel() for each in problem().model.parameters()]
    found = on_ranks(lambda world: [sizes_of_a_step(world, sharing) for sharing in (False, True)])
    for answer in found:
        for sharing, (device, host) in zip((False, True), answer, strict=True):
            expected = STUDY["exchanges"](
                tensors, ranks=2, steps=STEPS, sharing=sharing, itemsize=8
            )
            assert device == [*expected.means, expected.last]
            assert host == [*expected.host]


def test_the_table_of_the_page_is_what_the_study_prints():
    assert STUDY["table"]() in (DOCS / "many-devices.md").read_text(encoding="utf-8")
