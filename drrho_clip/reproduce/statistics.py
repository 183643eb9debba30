"""Differences between methods, seed by seed, with intervals, and the verdict that the intervals allow."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

__all__ = [
    "DOES_NOT_HOLD",
    "HOLDS",
    "NOT_SHOWN",
    "Interval",
    "interval",
    "mean_and_deviation",
    "not_all_above",
    "paired",
    "resampled",
    "sides",
    "verdict",
]

HOLDS: Final = "holds"
DOES_NOT_HOLD: Final = "does not hold"
NOT_SHOWN: Final = "not shown"

_DRAWS: Final = 10_000
_LEVEL: Final = 0.95
# The seed of the bootstrap, so that the same rows always give the same interval.
_SEED: Final = 14


class Interval(NamedTuple):
    """A mean over seeds with 95 % intervals.

    Attributes
    ----------
    mean : float
    low, high : float
        Ends of the percentile bootstrap interval of the mean.
    half : float
        Half the width of Student's interval of the mean. With five seeds it is wider than the bootstrap interval.
    num : int
        Number of seeds.
    p : float
        The two-sided p-value of Student's test of mean 0, in [0, 1].
    """

    mean: float
    low: float
    high: float
    half: float
    num: int
    p: float

    @property
    def side(self) -> int:
        """1 if both intervals lie above zero, -1 if both lie below zero, else 0."""
        # A bootstrap of five values is too narrow: it covers the mean in about 85 % of all cases. So Student's interval
        # must exclude zero as well.
        if self.low > 0 and self.mean - self.half > 0:
            return 1
        return -1 if self.high < 0 and self.mean + self.half < 0 else 0


def interval(values: Sequence[float]) -> Interval:
    """Return mean and intervals of one value per seed.

    Parameters
    ----------
    values : sequence of float, length n
        At least two finite values.

    Raises
    ------
    ValueError
        If there are fewer than two values.

    Examples
    --------
    >>> result = interval([1.0, 2.0, 3.0])
    >>> result.mean, result.low, result.high, round(result.half, 3), result.side
    (2.0, 1.0, 3.0, 2.484, 0)
    """
    from scipy.stats import t as student

    if len(values) < 2:
        raise ValueError(f"values must hold at least two values, got {len(values)}")
    tail = (1 - _LEVEL) / 2
    low, high = np.quantile(resampled(np.asarray(values, dtype=np.float64)), [tail, 1 - tail])
    error = statistics.stdev(values) / math.sqrt(len(values))
    half = float(student.ppf(1 - tail, len(values) - 1)) * error
    mean = statistics.fmean(values)
    # Without any spread the mean is known, and the quotient of the test does not exist.
    p = 2 * float(student.sf(abs(mean) / error, len(values) - 1)) if error > 0 else float(mean == 0.0)
    return Interval(mean, float(low), float(high), half, len(values), p)


def resampled(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return the means over the seeds of 10,000 bootstrap samples, shape (10000, ...); values have shape (n, ...)."""
    drawn = np.random.default_rng(_SEED).integers(0, len(values), size=(_DRAWS, len(values)))
    means: npt.NDArray[np.float64] = values[drawn].mean(axis=1)
    return means


def paired(first: Mapping[int, float], second: Mapping[int, float]) -> Interval:
    """Return the interval of the differences ``first - second`` over the seeds that both have.

    Examples
    --------
    >>> paired({0: 0.5, 1: 0.75}, {0: 0.25, 1: 0.5, 2: 0.5}).mean
    0.25
    """
    seeds = sorted(first.keys() & second.keys())
    return interval([first[seed] - second[seed] for seed in seeds])


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and the standard deviation over seeds; the deviation of a single value is nan."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else math.nan


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Return Spearman's rank correlation, in [-1, 1]; it is 0 if all values of a sequence are equal.

    Examples
    --------
    >>> round(rank_correlation([1.0, 2.0, 3.0, 4.0], [10.0, 20.0, 40.0, 30.0]), 6)
    0.8
    >>> rank_correlation([1.0, 2.0], [3.0, 3.0])
    0.0
    """
    from scipy.stats import spearmanr

    # Equal values have no order that the other values could agree with.
    if len(set(first)) == 1 or len(set(second)) == 1:
        return 0.0
    return float(spearmanr(first, second).statistic)


def not_all_above(noun: str = "difference") -> str:
    """Return the sentence of the verdict `NOT_SHOWN`, which is true whether or not an interval contains zero.

    Examples
    --------
    >>> not_all_above()
    'At least one difference is not shown to be above zero.'
    """
    # An interval may lie below zero without the correction; then the claim is still not shown to be false.
    return f"At least one {noun} is not shown to be above zero."


def sides(intervals: Sequence[Interval], nouns: str = "differences") -> str:
    """Return the sentence that counts the intervals of the verdict on each side of zero.

    Examples
    --------
    >>> sides([interval([0.2, 0.3, 0.25]), interval([-0.1, 0.2, 0.0])])
    'Above zero: 1 of the 2 differences of the verdict; below zero: 0.'
    """
    where = [each.side for each in intervals]
    return f"Above zero: {where.count(1)} of the {len(where)} {nouns} of the verdict; below zero: {where.count(-1)}."


def verdict(intervals: Sequence[Interval]) -> str:
    """Return the verdict on the claim that all differences are positive.

    The claim holds if every interval lies above zero. It does not hold if an interval lies below zero, also after
    Bonferroni's correction for the number of intervals. Otherwise it is not shown.

    Examples
    --------
    >>> above, around = interval([0.2, 0.3, 0.25]), interval([-0.1, 0.2, 0.0])
    >>> verdict([above, above]), verdict([above, around]), verdict([interval([-0.2, -0.3, -0.25]), above])
    ('holds', 'not shown', 'does not hold')
    """
    sides = [each.side for each in intervals]
    # Without the correction, 24 differences around zero would refute a true claim in every second trial.
    if any(each.side == -1 and each.p < (1 - _LEVEL) / len(intervals) for each in intervals):
        return DOES_NOT_HOLD
    return HOLDS if set(sides) == {1} else NOT_SHOWN
