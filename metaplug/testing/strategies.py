"""Hypothesis strategies: models, tasks, problems, and chains of first-party plugins."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from hypothesis import strategies as st
from torch import nn

from metaplug.contract.plugin import Plugin
from metaplug.contract.presets import PluginUse
from metaplug.contract.task_batch import TaskBatch
from metaplug.testing.first_party import FIRST_PARTY
from metaplug.testing.problems import CLASSIFIERS, WITH_BATCH_NORM, Problem, problem

seeds = st.integers(0, 10_000)
weights = st.floats(0.01, 0.99)
"""A gate or momentum strictly between its ends."""


@st.composite
def problems(
    draw: st.DrawFn,
    names: Sequence[str] = CLASSIFIERS,
    *,
    tasks: tuple[int, int] = (1, 6),
    steps: tuple[int, int] = (0, 3),
    lrs: tuple[float, float] = (0.0, 0.5),
) -> Problem:
    """Draw a small model, its tasks, the number of inner steps and the inner learning rate.

    Args:
        names: of models in MODELS.
        tasks, steps, lrs: the least and the greatest.
    """
    return problem(
        draw(st.sampled_from(list(names))),
        tasks=draw(st.integers(*tasks)),
        support=draw(st.integers(3, 6)),  # over two, batch norm is a step function
        query=draw(st.integers(3, 5)),
        steps=draw(st.integers(*steps)),
        lr=draw(st.floats(*lrs)),
        seed=draw(seeds),
    )


def models(names: Sequence[str] = CLASSIFIERS) -> st.SearchStrategy[nn.Module]:
    """Draw a small model in float64, with random weights."""
    return problems(names, tasks=(1, 1)).map(lambda drawn: drawn.model)


def tasks(name: str = "mlp", *, tasks: tuple[int, int] = (1, 6)) -> st.SearchStrategy[TaskBatch]:
    """Draw random tasks for the model of this name in MODELS."""
    return problems((name,), tasks=tasks).map(lambda drawn: drawn.batch)


@st.composite
def chains(draw: st.DrawFn, *, least: int = 2, most: int = 6) -> tuple[list[PluginUse], Problem]:
    """Draw first-party plugins in any order, and a model that has what they need, with tasks.

    There are `least` to `most`, fewer where some of those drawn refuse each other.
    """
    uses: list[PluginUse] = []
    for name in draw(st.permutations(list(FIRST_PARTY)))[: draw(st.integers(least, most))]:
        use = PluginUse(plugin=name, settings=FIRST_PARTY[name])
        uses += [use] if compatible([each.make() for each in (*uses, use)]) else []
    needs_batch_norm = any(use.plugin == "per-step-batch-norm" for use in uses)
    names = WITH_BATCH_NORM if needs_batch_norm else ("mlp", "layer-norm", "max-pool", "conv4")
    # The implicit meta-gradient reaches what steers steps through the last of two or more alone.
    least_steps = 2 if any(use.plugin == "imaml" for use in uses) else 1
    return uses, draw(problems(names, tasks=(1, 4), steps=(least_steps, 3), lrs=(0.01, 0.3)))


def compatible(plugins: Sequence[Plugin]) -> bool:
    """Whether no plugin of these refuses to be beside another, or before it."""
    pairs, ordered = itertools.permutations(plugins, 2), itertools.combinations(plugins, 2)
    return all(other.kind() not in plugin.conflicts_with for plugin, other in pairs) and all(
        after.kind() not in plugin.runs_after for plugin, after in ordered
    )
