"""Tests of differences that were taken task by task, and their correction for being several."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy.special import stdtr

from metaplug.evaluation.results import EvaluationResult


def p_value(differences: EvaluationResult) -> float:
    """The two-sided p-value of the paired t-test of a mean difference of 0.

        t = √n · mean / s,    p = 2 · P(T(n − 1) > |t|)

    Args:
        differences: of n tasks. Where all are equal, p is 1 if they are 0, and else 0; it is NaN
            for one task, and where a difference is NaN.
    """
    n, values = differences.num_tasks, differences.per_task
    if n == 1:
        return math.nan
    if differences.all_equal:
        return 1.0 if values[0] == 0 else 0.0
    t = math.sqrt(n) * differences.mean / float(values.std())
    return 2 * float(stdtr(n - 1, -abs(t)))


def holm(p_values: Sequence[float]) -> tuple[float, ...]:
    """P-values corrected for their number by Holm's step-down method (Holm 1979).

        corrected[i] = max over j ≤ i of min(1, (m − j + 1) · p[j]),    p[1] ≤ … ≤ p[m]

    So the chance that any true hypothesis has a corrected value below α is at most α, whatever
    the dependence of the tests. A NaN stays one, and counts.

    >>> holm([0.01, 0.04, 0.03])
    (0.03, 0.06, 0.06)
    """
    given = np.asarray(p_values, dtype=float)
    order = given.argsort()
    stepped = np.minimum(1, given[order] * np.arange(len(given), 0, -1))
    corrected = np.empty_like(given)
    corrected[order] = np.maximum.accumulate(stepped)
    return tuple(corrected.tolist())
