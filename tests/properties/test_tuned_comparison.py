"""Variants compared at their best settings: how these are chosen, and what is said of chance."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import ttest_rel
from support.studies import curve, result

from metaplug import EvaluationResult
from metaplug.evaluation.significance import holm, p_value
from metaplug.experiments.study.tuned import comparisons

RATES = {"slow": {"learner.inner_lr": 0.1}, "fast": {"learner.inner_lr": 0.4}}
AXES = {"learner.inner_lr": [0.1, 0.4]}
ROWS = [f"{name}@{rate}" for name in ("maml", "anil", "maml+gradient-sharing") for rate in RATES]

SHARES = st.integers(0, 25).map(lambda count: count / 25)
TESTS = st.lists(st.lists(SHARES, min_size=4, max_size=4), min_size=2, max_size=2)
P_VALUES = st.lists(st.floats(0, 1), min_size=1, max_size=12)


def by_row(values):
    return st.fixed_dictionaries(dict.fromkeys(ROWS, values))


def made(curves, tests):
    lines = {label: [curve(*line) for line in of_seeds] for label, of_seeds in curves.items()}
    return result("accuracy", lines, tests, settings=RATES, axes=AXES)


@given(by_row(TESTS), by_row(TESTS), by_row(TESTS))
@settings(max_examples=30)
def test_settings_are_chosen_by_validation_alone(curves, tests, others):
    one, other = made(curves, tests), made(curves, others)
    [chosen], [again] = one.best_rows(), other.best_rows()
    assert [row.label for row in chosen] == [row.label for row in again]
    for row in chosen:
        assert row.best_validation == max(
            each.best_validation for each in one.rows if each.variant == row.variant
        )
    found, same = comparisons(one, chosen), comparisons(other, again)
    for label, each in found.with_baseline.items():
        assert each.acceleration == same.with_baseline[label].acceleration


@given(P_VALUES, st.floats(0, 1))
@settings(max_examples=100)
def test_holms_correction_keeps_the_order_and_lowers_nothing(p_values, smaller):
    corrected = holm(p_values)
    assert all(raw <= each <= 1 for raw, each in zip(p_values, corrected, strict=True))
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    assert [corrected[i] for i in order] == sorted(corrected)
    assert corrected[order[0]] == min(1, len(p_values) * p_values[order[0]])
    # It rises with each value, and with every further comparison.
    lowered = holm([p_values[0] * smaller, *p_values[1:]])
    assert all(low <= each for low, each in zip(lowered, corrected, strict=True))
    assert all(low <= each for low, each in zip(corrected, holm([*p_values, 0.5]), strict=False))


def test_a_nan_among_p_values_counts_and_stays():
    one, other = holm([0.02, math.nan])
    assert one == 0.04
    assert math.isnan(other)


@given(TESTS)
@settings(max_examples=50)
def test_the_p_value_is_that_of_the_paired_t_test(pair):
    one, other = (torch.tensor(each).double() for each in pair)
    difference = EvaluationResult("accuracy", one - other, 1)
    if not difference.all_equal:
        assert p_value(difference) == pytest.approx(float(ttest_rel(one, other).pvalue), rel=1e-9)
    else:
        assert p_value(difference) == float(difference.mean == 0)
    assert math.isnan(p_value(EvaluationResult("accuracy", one[:1], 1)))


@given(TESTS, TESTS)
@settings(max_examples=20)
def test_a_variant_equal_to_the_baseline_differs_by_nothing(curves, tests):
    found = made(dict.fromkeys(ROWS, curves), dict.fromkeys(ROWS, tests))
    [rows] = found.best_rows()
    compared = comparisons(found, rows)
    assert compared.count == 2
    # Sharing extends the baseline, which is one comparison, and ANIL extends nothing.
    assert list(compared.with_base) == ["maml+gradient-sharing, inner_lr 0.1"]
    for each in compared.with_baseline.values():
        assert (each.difference.mean, each.difference.interval) == (0, 0)
        assert (each.by_seed, each.p_value, each.p_holm) == ((0, 0), 1, 1)
        assert each.acceleration.percent == (0, 0)
