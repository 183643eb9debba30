"""Intervals and verdicts, against SciPy and against figures that are known."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from drrho_clip.reproduce.statistics import (
    DOES_NOT_HOLD,
    HOLDS,
    NOT_SHOWN,
    interval,
    mean_and_deviation,
    paired,
    verdict,
)

VALUES = [0.11, 0.25, 0.05, 0.19, 0.32]


def test_intervals_are_those_of_scipy() -> None:
    result = interval(VALUES)
    test = stats.ttest_1samp(VALUES, 0.0).confidence_interval(0.95)
    assert (result.mean - result.half, result.mean + result.half) == pytest.approx((test.low, test.high))
    assert result.p == pytest.approx(stats.ttest_1samp(VALUES, 0.0).pvalue)
    bootstrap = stats.bootstrap((VALUES,), np.mean, n_resamples=20_000, method="percentile", random_state=1)
    # Both are random: the deviation of a quantile of 10,000 draws is below 0.002 here.
    assert (result.low, result.high) == pytest.approx(tuple(bootstrap.confidence_interval), abs=0.008)
    assert interval(VALUES) == result


def test_differences_are_taken_seed_by_seed() -> None:
    result = paired({0: 1.0, 1: 2.0, 2: 3.5}, {2: 3.0, 0: 0.5, 1: 1.5, 7: 100.0})
    assert (result.mean, result.low, result.high, result.half, result.num) == (0.5, 0.5, 0.5, 0.0, 3)
    with pytest.raises(ValueError, match="at least two values, got 1"):
        paired({0: 1.0, 1: 2.0}, {1: 1.0, 2: 2.0})


def test_a_difference_counts_only_if_both_intervals_exclude_zero() -> None:
    clear = interval(VALUES)
    # The bootstrap of these three values excludes zero, Student's interval does not.
    narrow = interval([0.1, 0.5, 0.3])
    assert narrow.low > 0 > narrow.mean - narrow.half
    assert (clear.side, narrow.side, interval([-value for value in VALUES]).side) == (1, 0, -1)
    assert verdict([clear, clear]) == HOLDS
    assert verdict([clear, narrow]) == NOT_SHOWN
    assert verdict([clear, narrow, interval([-0.31, -0.33, -0.32, -0.29])]) == DOES_NOT_HOLD
    # Among 24 differences one lies below zero by chance.
    below = interval([-value for value in VALUES])
    assert verdict([clear] * 23 + [below]) == NOT_SHOWN
    assert verdict([]) == NOT_SHOWN


def test_the_deviation_is_that_of_a_sample() -> None:
    assert mean_and_deviation([1.0, 3.0]) == pytest.approx((2.0, 2**0.5))
    mean, deviation = mean_and_deviation([1.0])
    assert (mean, np.isnan(deviation)) == (1.0, True)
