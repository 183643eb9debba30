"""Logarithms of sums: masked log-sum-exp, averages in the log domain."""

from __future__ import annotations

import math
from typing import Any

import mpmath as mp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drrho_core.numerics import log, log_add_constant, log_moving_average, log_share_of_new, log_sum_exp

NEVER = -math.inf
LOGARITHMS = st.floats(-1e4, 1e4) | st.floats(-2, 2) | st.sampled_from([0.0, -1e4, 1e4, 1e-300])


def numbers(space: Any, array: Any) -> np.ndarray:
    return np.asarray(space.to_numpy(array), dtype=np.float64)


@given(rows=st.lists(st.lists(st.tuples(LOGARITHMS, st.booleans()), min_size=3, max_size=3), min_size=2, max_size=2),
       axis=st.sampled_from([0, 1, -1]), masked=st.booleans())  # fmt: skip
@settings(max_examples=30)
def test_log_sum_exp(eager_space: Any, rows: Any, axis: int, masked: bool) -> None:
    x = eager_space.rounded([[value for value, _ in row] for row in rows])
    where = np.array([[counts for _, counts in row] for row in rows])
    got = log_sum_exp(
        eager_space.asarray(np.where(where | (not masked), x, np.nan)),  # what does not count is not read
        axis=axis,
        where=eager_space.asarray(where) if masked else None,
        xp=eager_space.xp,
    )
    assert got.dtype == eager_space.dtype
    moved, counts = np.moveaxis(x, axis, -1), np.moveaxis(where if masked else np.ones_like(where), axis, -1)
    with mp.workdps(40):
        sums = [mp.fsum(mp.exp(mp.mpf(float(v))) for v in line[keep]) for line, keep in zip(moved, counts, strict=True)]
        expected = [float(mp.log(total)) if total else NEVER for total in sums]
    check(numbers(eager_space, got), np.array(expected), eager_space.unit)


def check(got: np.ndarray, expected: np.ndarray, unit: float) -> None:
    assert np.array_equal(np.isinf(got), np.isinf(expected))
    finite = np.isfinite(expected)
    error = np.abs(got[finite] - expected[finite]) / np.maximum(1.0, np.abs(expected[finite]))
    assert np.all(error <= unit), (got, expected)


def test_log_sum_exp_of_nothing_and_of_infinities() -> None:
    x = np.array([[NEVER, NEVER], [1.0, NEVER], [1.0, math.inf], [np.nan, 1.0]])
    got = log_sum_exp(x, axis=1, where=None, xp=np)
    assert got[:3].tolist() == [NEVER, 1.0, math.inf]
    assert np.isnan(got[3])
    assert log_sum_exp(x, axis=1, where=np.zeros_like(x, dtype=bool), xp=np).tolist() == [NEVER] * 4


def test_only_the_axis_that_is_summed_goes() -> None:
    x = np.zeros((1, 3, 1))
    assert [log_sum_exp(x, axis=axis, where=None, xp=np).shape for axis in (0, 1, 2)] == [(3, 1), (1, 1), (1, 3)]


def test_log_does_not_warn_at_0_and_keeps_nan(eager_space: Any) -> None:
    got = numbers(
        eager_space, log(eager_space.asarray(np.array([0.0, 1.0, math.e, np.nan, math.inf])), xp=eager_space.xp)
    )
    np.testing.assert_allclose(got, [NEVER, 0.0, 1.0, np.nan, math.inf], rtol=1e-6)


@given(old=LOGARITHMS | st.just(NEVER), new=LOGARITHMS, gamma=st.floats(1e-3, 1.0) | st.sampled_from([1.0, 0.5]),
       form=st.sampled_from(["number", "array", "per anchor"]))  # fmt: skip
@settings(max_examples=60)
def test_log_moving_average(eager_space: Any, old: float, new: float, gamma: float, form: str) -> None:
    old, new, gamma = (float(eager_space.rounded(x)) for x in (old, new, gamma))
    arrays = [eager_space.asarray(np.array([x, x])) for x in (old, new, gamma)]
    weight = {"number": gamma, "array": arrays[2][0], "per anchor": arrays[2]}[form]
    got = log_moving_average(arrays[0], arrays[1], weight, xp=eager_space.xp)
    assert got.dtype == eager_space.dtype
    with mp.workdps(40):
        exact = [mp.exp(mp.mpf(x)) for x in (old, new)]
        u = exact[1] if old == NEVER else (1 - mp.mpf(gamma)) * exact[0] + mp.mpf(gamma) * exact[1]
        expected = float(mp.log(u))
    check(numbers(eager_space, got), np.array([expected] * 2), eager_space.unit)


def test_the_first_visit_takes_the_new_value_to_the_bit() -> None:
    new = np.array([0.1, -3.7])
    for gamma in (0.3, np.asarray(0.3), np.asarray([0.3, 0.01])):
        assert log_moving_average(np.full(2, NEVER), new, gamma, xp=np).tolist() == new.tolist()
    assert log_moving_average(np.array([7.0, NEVER]), new, 1.0, xp=np).tolist() == new.tolist()
    # 0 is log 1: a legal estimate and not "never visited".
    assert log_moving_average(np.zeros(2), new, 0.5, xp=np).tolist() != new.tolist()


@given(x=LOGARITHMS | st.just(NEVER), constant=st.sampled_from([0.0, 1e-300, 1e-14, 1e-4, 0.25, 1.0, 1e10]),
       form=st.sampled_from(["number", "array"]))  # fmt: skip
@settings(max_examples=40)
def test_log_add_constant(eager_space: Any, x: float, constant: float, form: str) -> None:
    x, constant = (float(eager_space.rounded(value)) for value in (x, constant))
    array = eager_space.asarray(np.array([x, x]))
    given_constant = eager_space.asarray(np.array([constant]))[0] if form == "array" else constant
    got = log_add_constant(array, given_constant, xp=eager_space.xp)
    assert got.dtype == eager_space.dtype
    with mp.workdps(40):
        total = mp.mpf(constant) + (0 if x == NEVER else mp.exp(mp.mpf(x)))
        expected = float(mp.log(total)) if total else NEVER
    check(numbers(eager_space, got), np.array([expected] * 2), eager_space.unit)
    if constant == 0.0:
        assert np.array_equal(numbers(eager_space, got), [x, x])


def test_no_constant_is_no_operation() -> None:
    x = np.array([0.1, NEVER])
    assert log_add_constant(x, 0.0, xp=np) is x


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_averages_of_far_apart_numbers_keep_the_small_ones_digits(dtype: str) -> None:
    # log(0.75 e^0 + 0.25 e^-1e4): the second vanishes; the first keeps log 0.75 in full.
    got = log_moving_average(np.zeros(1, dtype=dtype), np.full(1, -1e4, dtype=dtype), 0.25, xp=np)
    assert got[0] == np.asarray(math.log(0.75), dtype=dtype)


@pytest.mark.parametrize("gamma", [0.3, np.asarray(0.3), 1.0])
def test_the_share_of_the_new_estimate_is_g_over_u(gamma: Any) -> None:
    old, new = np.asarray([-np.inf, -2.0, 0.5, 900.0]), np.asarray([1.0, 3.0, -700.0, -900.0])
    got = log_share_of_new(old, new, gamma, xp=np)
    expected = np.asarray(
        [0.0] + [float(-mp.log((1 - mp.mpf(float(gamma))) * mp.exp(o - n) + mp.mpf(float(gamma))))
                 for o, n in zip(old[1:].tolist(), new[1:].tolist(), strict=True)]
    )  # fmt: skip
    assert np.allclose(got, expected, rtol=1e-12, atol=1e-12)
    assert np.all(got <= -np.log(float(gamma)) + 1e-12)
