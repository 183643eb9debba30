"""Extreme losses and parameters of the ambiguity sets: rounding does not decide the weights."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import array_api_compat.numpy as np_namespace
import drrho_reference
import numpy as np
import pytest

from drrho_core import (
    AmbiguitySet,
    CappedKLPenalty,
    ChiSquareBall,
    ChiSquarePenalty,
    CressieReadBall,
    CVaR,
    KLBall,
    KLPenalty,
    worst_case,
)
from drrho_core.ambiguity.checks import largest_usable
from helpers.ambiguity import (
    ALL,
    divergence,
    dual_value,
    problem_rows,
)


def test_ties_are_ties_of_the_losses_as_they_came() -> None:
    # The difference to the largest loss is the same for both in float32; only the second one is at the quantile.
    x = np.asarray([1e8, 1.0, 2.0, 3.0], dtype=np.float32)
    assert worst_case(x, CVaR(0.5)).weights.tolist() == [0.5, 0.0, 0.0, 0.5]
    assert worst_case(x, CVaR(0.625)).weights.tolist() == pytest.approx([0.4, 0.0, 0.2, 0.4])


def test_a_share_that_is_a_whole_number_but_for_rounding_is_that_number() -> None:
    # 0.1 of 30 losses is 3 + 4e-16 of them in floating point: no fourth loss gets a weight, nor is it the quantile.
    worst = worst_case(np.asarray([0.0] * 26 + [1.0, 2.0, 3.0, 4.0]), CVaR(0.1))
    assert worst.weights[:27].tolist() == [0.0] * 27
    assert float(worst.dual[0]) == 2.0


@pytest.mark.parametrize("temperature", [1e-12, 0.05])
def test_a_cap_for_a_whole_number_of_losses_is_that_of_the_number(temperature: float) -> None:
    # As for CVaR: 0.1 of 30 losses is 3. The third gets what the 27 below leave it, none of them more than their due.
    x = np.asarray([0.0] * 26 + [1.0, 2.0, 3.0, 4.0])
    worst = worst_case(x, CappedKLPenalty(temperature, 0.1))
    free = np.exp((x[:-2] - 2.0) / temperature)
    np.testing.assert_allclose(worst.weights[:-2], free / free.sum() / 3, rtol=1e-12, atol=1e-300)
    assert worst.weights[-2:].tolist() == [1 / 3, 1 / 3]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_cap_counts_a_large_sample_without_rounding(dtype: str) -> None:
    # k = alpha n is 27182.81828; what is left for the free losses would be wrong by 1e-3 of a cap in float32.
    n, alpha = 100_000, 0.2718281828
    x = np.arange(n, dtype=dtype)
    weights = worst_case(x, CappedKLPenalty(1.0, alpha)).weights.astype(float) * (alpha * n)
    np.testing.assert_allclose(weights[-27182:], 1.0, rtol=1e-6)
    left = alpha * n - 27182  # 0.81828, which the others share as a geometric series
    ratio = np.exp(-np.arange(20.0))
    np.testing.assert_allclose(weights[-27202:-27182][::-1], left * ratio / ratio.sum(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("temperature", [1e-320, 1e-30, 1e-3, 1.0, 1e7, 1e30, 1e300])
@pytest.mark.parametrize("alpha", [1e-300, 1 / 6, 0.3, 0.5 + 1e-15, 0.5 - 1e-15, 1 - 1e-9, 1 - 1e-16, 1.0])
def test_a_capped_penalty_is_finite_at_all_sizes(dtype: str, temperature: float, alpha: float) -> None:
    x, where = problem_rows()
    worst = worst_case(np.where(where, x, 0.0).astype(dtype), CappedKLPenalty(temperature, alpha), where=where)
    assert all(np.isfinite(array).all() for array in (worst.risk, worst.weights, worst.dual[0]))
    np.testing.assert_allclose(worst.weights.sum(axis=1), 1.0, rtol=1e-6 if dtype == "float32" else 1e-14)
    size, number = np.abs(x).max(axis=1, where=where, initial=0.0), where.sum(axis=1)
    small = 1e-6 if dtype == "float32" else 1e-14
    assert (worst.weights.max(axis=1) <= (1 + small) / np.maximum(alpha * number, 1)).all()
    mean = np.where(where, x, 0.0).sum(axis=1) / number
    assert (worst.risk >= mean - small * size).all()
    assert (worst.risk <= (np.where(where, x, 0.0) * worst.weights).sum(axis=1) + small * size).all()
    if temperature >= 1e30 and alpha < 0.9:  # as for KLPenalty, also where a loss over the temperature is 0 in float32
        assert (np.abs(worst.dual[0] - mean) <= small * size)[size < 1e9].all()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_cvar_counts_a_large_sample_without_rounding(dtype: str) -> None:
    # alpha n is 27182.81828: in float32 the product alone would be wrong by 1e-3 of the weight at the quantile.
    n, alpha = 100_000, 0.2718281828
    x = np.arange(n, dtype=dtype)
    weights = worst_case(x, CVaR(alpha)).weights.astype(float)
    largest = 1 / (alpha * n)
    np.testing.assert_allclose(weights[-27182:], largest, rtol=1e-6)
    np.testing.assert_allclose(weights[-27183], 0.81828 * largest, rtol=1e-6 if dtype == "float32" else 1e-9)
    assert (weights[:-27183] == 0).all()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    "ambiguity_set", [ChiSquareBall(0.1), ChiSquareBall(0.5), CressieReadBall(3.0, 0.5), KLBall(math.log(2) + 1e-9)]
)
def test_digits_are_kept_on_a_plateau(dtype: str, ambiguity_set: AmbiguitySet) -> None:
    # Far below the cluster on top lies the rest, and the radius is that of uniform weights on the cluster: what decides
    # between its members is then the square root of a rounding error, unless there is none.
    members = 5 if ambiguity_set == ChiSquareBall(0.1) else 3
    top = np.asarray([1.0, 1.125, 1.25, 1.0625, 1.1875])[:members]
    x = np.concatenate([top, np.full(1 if members == 5 else 3, -1e6)]).astype(dtype)
    theirs = getattr(drrho_reference, type(ambiguity_set).__name__)(*dataclasses.astuple(ambiguity_set))
    expected = drrho_reference.worst_case(x.astype(np.float64), theirs)
    got = worst_case(x, ambiguity_set)
    np.testing.assert_allclose(got.weights, expected.weights, rtol=0, atol=1e-5 if dtype == "float32" else 1e-8)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_losses_of_many_scales_at_once(dtype: str) -> None:
    reach = 60 if dtype == "float64" else 12
    rng = np.random.default_rng(12)
    for _ in range(60):
        n = int(rng.integers(2, 7))
        x = (rng.choice([0, -1, 1], size=n) * 10.0 ** (reach * rng.uniform(-1, 1, size=n))).astype(dtype)
        for ambiguity_set in (KLBall(0.3), ChiSquareBall(0.3), CressieReadBall(1.3, 0.3), CressieReadBall(4.0, 0.3)):
            got = worst_case(x, ambiguity_set)
            wide = np.asarray(got.weights, dtype=np.float64)
            assert abs(wide.sum() - 1) <= 1e-6
            assert divergence(ambiguity_set, wide) <= ambiguity_set.radius + 1e-5
            size = np.abs(x).max()
            nu, s = float(got.dual[0]), float(got.dual[1])
            if s == 0 or s > 1e3 * np.finfo(dtype).eps * size:
                gap = dual_value(ambiguity_set, x.astype(np.float64), nu, s) - float(got.risk)
                assert abs(gap) <= (1e-10 if dtype == "float64" else 1e-5) * size


@pytest.mark.parametrize("build", [KLPenalty, ChiSquarePenalty, lambda t: CappedKLPenalty(t, 0.5)])
@pytest.mark.parametrize("parameter", [1e-320, 1e-60, 1e-42, 1e37, 1e39, 1e60, 1e300])
def test_a_parameter_that_float32_cannot_hold(build: Callable[[float], AmbiguitySet], parameter: float) -> None:
    x = np.asarray([[1.0, -2.0, 0.5], [3e36, -1e36, 0.0], [2e-30, 1e-30, 1e-30]])
    narrow, wide = worst_case(x.astype(np.float32), build(parameter)), worst_case(x, build(parameter))
    size = np.abs(x).max(axis=1)
    np.testing.assert_allclose(narrow.risk / size, wide.risk / size, rtol=0, atol=1e-6)
    np.testing.assert_allclose(narrow.weights, wide.weights, rtol=0, atol=1e-6)


def test_a_dual_scale_that_float32_cannot_hold_is_infinite() -> None:
    x = np.asarray([1e34, -3e34, 0.0], dtype=np.float32)
    for ambiguity_set in (KLBall(1e-14), CressieReadBall(1.5, 1e-14)):
        worst = worst_case(x, ambiguity_set)
        assert math.isinf(worst.dual[1])
        np.testing.assert_allclose(worst.dual[0], x.mean(), rtol=1e-4)


def test_a_dual_scale_that_a_half_type_cannot_hold_is_infinite() -> None:
    worst = worst_case(np.asarray([1.0, 2.0, 4.0], dtype=np.float16), ChiSquareBall(1e-12))
    assert math.isinf(worst.dual[1])
    assert float(worst.risk) == pytest.approx(7 / 3, rel=1e-3)
    assert float(worst_case(np.full(2, 65504.0, dtype=np.float16), KLPenalty(1.0)).risk) == 65504


def test_large_orders_fill_their_ball() -> None:
    ambiguity_set = CressieReadBall(1e8, 0.5)
    worst = worst_case(np.asarray([1.0, 2.0, 6.0]), ambiguity_set)
    assert divergence(ambiguity_set, worst.weights) == pytest.approx(0.5, rel=1e-5)


@pytest.mark.parametrize(("order", "radius"), [(100.0, 1e12), (60.0, 1e14), (30.0, 1e13)])
def test_large_orders_with_large_radii_match_the_oracle(order: float, radius: float) -> None:
    # order (order - 1) radius is above 1e15, so the core adds logarithms and does not multiply.
    x = np.asarray([0.3, -1.2, 2.0, 0.9, 0.1])
    solution = worst_case(x, CressieReadBall(order, radius))
    expected = drrho_reference.worst_case(x, drrho_reference.CressieReadBall(order, radius))
    assert float(solution.risk) == pytest.approx(float(expected.risk), rel=1e-10)
    assert np.asarray(solution.weights) == pytest.approx(expected.weights, abs=1e-10)


def test_losses_up_to_the_limit_are_solved() -> None:
    limit = float(np.finfo(np.float32).max) / (8 * 3)
    x = np.asarray([1.0, -1.0, 0.5], dtype=np.float32) * np.float32(0.999 * limit)
    for ambiguity_set in ALL:
        if not isinstance(ambiguity_set, (KLPenalty, CappedKLPenalty, ChiSquarePenalty)):
            scaled, plain = worst_case(x, ambiguity_set), worst_case(np.asarray([1.0, -1.0, 0.5]), ambiguity_set)
            np.testing.assert_allclose(scaled.weights, plain.weights, rtol=0, atol=1e-5, err_msg=str(ambiguity_set))


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_largest_usable_loss_is_usable(sign: float) -> None:
    limit = largest_usable(np.zeros(3), 0, np_namespace)
    losses = np.asarray([0.0, sign * limit, 0.0])
    for where in (None, np.asarray([True, True, False])):
        assert np.isfinite(worst_case(losses, CVaR(0.5), where=where).risk)
        with pytest.raises(ValueError, match="losses must be finite and at most"):
            worst_case(losses * 1.0001, CVaR(0.5), where=where)
