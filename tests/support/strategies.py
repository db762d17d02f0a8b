"""Hypothesis strategies: models with their tasks, task counts, steps and learning rates.

At least three examples: over two, batch norm is a step function, which rounding decides.
"""

from hypothesis import strategies as st
from support.models import MODELS, problem

seeds = st.integers(0, 10_000)
weights = st.floats(0.01, 0.99)
"""A gate or momentum strictly between its ends."""


@st.composite
def problems(draw, names=tuple(MODELS), *, tasks=(1, 6), steps=(0, 3), lrs=(0.0, 0.5)):
    """A small model, its tasks, the number of inner steps and the inner learning rate."""
    return problem(
        draw(st.sampled_from(names)),
        tasks=draw(st.integers(*tasks)),
        support=draw(st.integers(3, 6)),
        query=draw(st.integers(3, 5)),
        steps=draw(st.integers(*steps)),
        lr=draw(st.floats(*lrs)),
        seed=draw(seeds),
    )
