"""worst_case of the oracle, worked by hand: each set, ties at the quantile, and the radius that saturates a ball."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from drrho_reference import (
    CappedKLPenalty,
    ChiSquareBall,
    ChiSquarePenalty,
    CressieReadBall,
    CVaR,
    KLBall,
    KLPenalty,
    worst_case,
)

from helpers.oracle_ambiguity import SETS, solve


def test_cvar_by_hand() -> None:
    # k = 0.5 * 3 = 1.5 units of weight 2/3: the largest takes 2/3, the next the remaining 1/3. F = 8/3 + 1/3 = 3.
    # The dual agrees: nu = 1, 1 + mean(3, 0, 0) / 0.5 = 3.
    risk, weights, nu, s = solve([1.0, 4.0, -3.0], CVaR(0.5))
    assert (risk, nu, s) == (pytest.approx(3.0, abs=1e-15), 1.0, 0.0)
    assert weights == pytest.approx([1 / 3, 2 / 3, 0.0], abs=1e-15)


def test_cvar_shares_the_remainder_among_ties_at_the_quantile() -> None:
    # k = 2: 1/2 on the 3, and the other 1/2 in three equal parts. F = 1.5 + 0.5 = 2.
    risk, weights, nu, _ = solve([1.0, 3.0, 1.0, 1.0], CVaR(0.5))
    assert (risk, nu) == (pytest.approx(2.0, abs=1e-15), 1.0)
    assert weights == pytest.approx([1 / 6, 1 / 2, 1 / 6, 1 / 6], abs=1e-15)


def test_cvar_below_one_sample_is_the_maximum() -> None:
    # k = 0.6: at least the first, here two equal ones.
    assert solve([3.0, 1.0, 3.0], CVaR(0.2)) == (3.0, [0.5, 0.0, 0.5], 3.0, 0.0)


def test_cvar_of_everything_is_the_mean_and_its_quantile_the_minimum() -> None:
    assert solve([-6.0, 2.0, 1.0], CVaR(1.0)) == (pytest.approx(-1.0, abs=1e-15), [pytest.approx(1 / 3)] * 3, -6.0, 0.0)


def test_cvar_rounds_the_quantile_within_4_ulp() -> None:
    # 0.07 * 100 = 7.000000000000001 in float64: seven losses, not a shred of the eighth.
    assert 0.07 * 100 != 7.0
    _, weights, nu, _ = solve(np.arange(100.0), CVaR(0.07))
    assert (nu, weights[93:], weights[92]) == (93.0, [1 / 7] * 7, 0.0)


@pytest.mark.parametrize(("dtype", "alpha", "rounded"), [
    ("float64", 0.1 * (1 + 4e-16), True),   # k = 3 + 1.3e-15: 4 ulp of float64 at 3 are 1.8e-15
    ("float64", 0.1 * (1 + 1e-15), False),
    ("float32", 0.1 * (1 + 1e-7), True),    # 4 ulp of float32 at 3 are 9.5e-7
    ("float64", 0.1 * (1 + 1e-7), False),
    ("float32", 0.1 * (1 + 1e-6), False),
])  # fmt: skip
def test_cvar_measures_ulp_in_the_dtype_of_the_losses(dtype: str, alpha: float, rounded: bool) -> None:
    _, weights, nu, _ = solve(np.arange(30, dtype=dtype), CVaR(alpha))
    assert (nu == 27.0, weights[26] == 0.0) == (rounded, rounded)


def test_kl_penalty_by_hand() -> None:
    # exp(x) = e^-10 (1, 5, 2), mean e^-10 8/3: F = log(8/3) - 10 and weights 1/8, 5/8, 2/8.
    losses = [-10.0, math.log(5.0) - 10.0, math.log(2.0) - 10.0]
    risk, weights, nu, s = solve(losses, KLPenalty(1.0))
    assert risk == pytest.approx(math.log(8 / 3) - 10.0, abs=4e-15)
    assert weights == pytest.approx([1 / 8, 5 / 8, 2 / 8], abs=1e-15)
    assert (nu, s) == (risk, 1.0)


def test_capped_kl_penalty_by_hand() -> None:
    # exp(x) = e^-7 (1, 8, 4, 1), so a softmax would give 8/14 to the second loss, which is more than the cap 1/2. The
    # others share the other half as 1 : 4 : 1. Of the third loss n p = 4/3 = exp(x - nu), so nu = log 3 - 7, and
    # exp(x_2 - nu) = 8/3 lies above the cap 1/alpha = 2. D = mean(n p log(n p)).
    losses = [0.0 - 7.0, math.log(8.0) - 7.0, math.log(4.0) - 7.0, 0.0 - 7.0]
    risk, weights, nu, s = solve(losses, CappedKLPenalty(1.0, 0.5))
    assert weights == pytest.approx([1 / 12, 1 / 2, 1 / 3, 1 / 12], abs=1e-15)
    assert (nu, s) == (pytest.approx(math.log(3.0) - 7.0, abs=4e-15), 1.0)
    paid = (2 * math.log(2.0) + 4 / 3 * math.log(4 / 3) + 2 / 3 * math.log(1 / 3)) / 4
    assert risk == pytest.approx(math.log(8.0) / 2 + math.log(4.0) / 3 - 7.0 - paid, abs=4e-15)


def test_capped_kl_penalty_caps_ties_together() -> None:
    # exp(x) = (6, 2, 6, 1): two losses are capped at 1/3 each (alpha n = 3), the rest of 1/3 is shared as 2 : 1.
    risk, weights, nu, _ = solve([math.log(6.0), math.log(2.0), math.log(6.0), 0.0], CappedKLPenalty(1.0, 0.75))
    assert weights == pytest.approx([1 / 3, 2 / 9, 1 / 3, 1 / 9], abs=1e-15)
    assert nu == pytest.approx(math.log(2.0) - math.log(8 / 9), abs=1e-15)
    ratios = [4 / 3, 8 / 9, 4 / 3, 4 / 9]
    paid = sum(ratio * math.log(ratio) for ratio in ratios) / 4
    assert risk == pytest.approx((2 * math.log(6.0)) / 3 + 2 / 9 * math.log(2.0) - paid, abs=1e-15)


def test_capped_kl_penalty_of_all_losses_is_the_mean_and_its_nu_the_minimum() -> None:
    for temperature in (1e-6, 1.0, 1e6):
        risk, weights, nu, s = solve([-6.0, 2.0, 1.0, 2.0], CappedKLPenalty(temperature, 1.0))
        assert (risk, nu, s) == (pytest.approx(-0.25, abs=1e-15), -6.0, temperature)
        assert weights == [0.25] * 4


@pytest.mark.parametrize("temperature", [0.01, 0.7, 30.0])
def test_capped_kl_penalty_with_a_cap_above_one_is_the_kl_penalty(temperature: float) -> None:
    losses = np.random.default_rng(5).normal(size=7) - 3.0
    capped, free = worst_case(losses, CappedKLPenalty(temperature, 1 / 7)), worst_case(losses, KLPenalty(temperature))
    assert float(capped.risk) == pytest.approx(float(free.risk), abs=1e-15)
    assert float(capped.dual[0]) == pytest.approx(float(free.dual[0]), abs=1e-14)
    np.testing.assert_allclose(capped.weights, free.weights, atol=1e-15)


@pytest.mark.parametrize("alpha", [0.07, 0.25, 0.5, 0.61])
def test_capped_kl_penalty_of_a_small_temperature_is_cvar(alpha: float) -> None:
    losses = np.concatenate([np.random.default_rng(6).normal(size=9), [0.5, 0.5, 0.5]])
    capped, tail = worst_case(losses, CappedKLPenalty(1e-9, alpha)), worst_case(losses, CVaR(alpha))
    assert float(capped.risk) == pytest.approx(float(tail.risk), abs=1e-8)
    np.testing.assert_allclose(capped.weights, tail.weights, atol=1e-12)


def test_kl_ball_by_hand() -> None:
    # The weights 1/8, 5/8, 2/8 are softmax(x / 0.7) of x = 0.7 log(1, 5, 2) - 3. A ball of exactly their divergence has
    # them: s = 0.7, nu = 0.7 log(8/3) - 3 and F = sum p x.
    p = [1 / 8, 5 / 8, 2 / 8]
    losses = [0.7 * math.log(a) - 3.0 for a in (1.0, 5.0, 2.0)]
    risk, weights, nu, s = solve(losses, KLBall(sum(a * math.log(3 * a) for a in p)))
    assert weights == pytest.approx(p, abs=1e-14)
    assert (risk, nu, s) == pytest.approx(
        (sum(a * x for a, x in zip(p, losses, strict=True)), 0.7 * math.log(8 / 3) - 3.0, 0.7), abs=1e-14
    )


def test_chi_square_by_hand_without_clipping() -> None:
    # x = 1, -1, 0: mean 0, var 2/3, radius 3/16: F = sqrt(2 * 3/16 * 2/3) = 1/2; s = sqrt(var / (2 radius)) = 4/3,
    # weights (1/3)(1 + x / s) = 7/12, 1/12, 4/12. Shifted by -7 nothing but F and nu moves.
    risk, weights, nu, s = solve([-6.0, -8.0, -7.0], ChiSquareBall(3 / 16))
    assert (risk, nu, s) == pytest.approx((-6.5, -7.0, 4 / 3), abs=2e-15)
    assert weights == pytest.approx([7 / 12, 1 / 12, 4 / 12], abs=1e-15)
    # The same weights as a penalty of strength s: it pays s * radius = 1/4.
    risk, weights, nu, s = solve([-6.0, -8.0, -7.0], ChiSquarePenalty(4 / 3))
    assert (risk, nu, s) == pytest.approx((-6.75, -7.0, 4 / 3), abs=2e-15)
    assert weights == pytest.approx([7 / 12, 1 / 12, 4 / 12], abs=1e-15)


def test_chi_square_by_hand_with_clipping() -> None:
    # x = -5, 0, 1 and weights 0, 1/4, 3/4: D = (3 * 10/16 - 1) / 2 = 7/16. On the two active ones
    # p = 1/2 + (x - 1/2)/(3 s), so s = 2/3 and nu = 1/2 - s/2 = 1/6; at -5 the weight is clipped, as
    # 1 + (-5 - 1/6)/s < 0. F = 3/4.
    risk, weights, nu, s = solve([-5.0, 0.0, 1.0], ChiSquareBall(7 / 16))
    assert (risk, nu, s) == pytest.approx((3 / 4, 1 / 6, 2 / 3), abs=2e-15)
    assert weights == pytest.approx([0.0, 1 / 4, 3 / 4], abs=1e-15)
    # As a penalty it pays (2/3)(7/16) = 7/24.
    risk, weights, nu, s = solve([-5.0, 0.0, 1.0], ChiSquarePenalty(2 / 3))
    assert (risk, nu, s) == pytest.approx((3 / 4 - 7 / 24, 1 / 6, 2 / 3), abs=2e-15)
    assert weights == pytest.approx([0.0, 1 / 4, 3 / 4], abs=1e-15)


def test_cressie_read_by_hand() -> None:
    # Order 3, nu = 0, s = 1: n p = sqrt(1 + 2 x) = 1/2, 3/2 at x = -3/8, 5/8. phi(t) = (t^3 - 3 t + 2)/6 gives
    # 0.625/6 and 0.875/6, so D = 1/8, and F = (1/4)(-3/8) + (3/4)(5/8) = 3/8.
    risk, weights, nu, s = solve([-3 / 8, 5 / 8], CressieReadBall(3.0, 1 / 8))
    assert (risk, nu, s) == pytest.approx((3 / 8, 0.0, 1.0), abs=1e-14)
    assert weights == pytest.approx([1 / 4, 3 / 4], abs=1e-14)


@pytest.mark.parametrize("ball", [KLBall(0.0), ChiSquareBall(0.0), CressieReadBall(3.0, 0.0)])
def test_radius_0_is_the_mean_even_of_equal_losses(ball: Any) -> None:
    assert solve([4.0, -1.0, 0.0, 1.0], ball) == (1.0, [0.25] * 4, 1.0, math.inf)
    assert solve([-2.0, -2.0], ball) == (-2.0, [0.5, 0.5], -2.0, math.inf)


@pytest.mark.parametrize(
    ("make", "threshold"),
    # n = 6 losses, m = 2 of them the maximum: n / m = 3.
    [
        (KLBall, math.log(3.0)),
        (ChiSquareBall, 1.0),
        (lambda radius: CressieReadBall(3.0, radius), (9.0 - 1.0) / 6.0),
        (lambda radius: CressieReadBall(1.5, radius), (math.sqrt(3.0) - 1.0) / 0.75),
    ],
)
def test_saturation_starts_at_its_threshold(make: Callable[[float], Any], threshold: float) -> None:
    losses = [2.0, -1.0, 0.0, 2.0, -3.0, 1.5]
    on_the_maxima = [0.5, 0.0, 0.0, 0.5, 0.0, 0.0]
    assert solve(losses, make(threshold * (1 + 1e-15))) == (2.0, on_the_maxima, 2.0, 0.0)
    risk, weights, _, s = solve(losses, make(threshold * (1 - 1e-6)))
    assert 1.99 < risk < 2.0
    assert s > 0.0
    assert weights[5] > 0.0  # the next largest has got a little


@pytest.mark.parametrize("ball", [KLBall(1e-9), ChiSquareBall(1e-9), CressieReadBall(3.0, 1e-9)])
def test_equal_losses_are_saturated_by_any_ball(ball: Any) -> None:
    assert solve([-2.5] * 4, ball) == (-2.5, [0.25] * 4, -2.5, 0.0)


@pytest.mark.parametrize("ambiguity_set", SETS)
def test_one_loss_is_its_own_worst_case(ambiguity_set: Any) -> None:
    risk, weights, _, _ = solve([-3.0], ambiguity_set)
    assert (risk, weights) == (-3.0, [1.0])
