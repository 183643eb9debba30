"""worst_case of the oracle: numbers worked by hand, an exact convex solver, mpmath, and the facts that must hold."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import cvxpy as cp
import mpmath as mp
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
from hypothesis import given, settings
from hypothesis import strategies as st

FAMILIES: dict[str, list[Any]] = {
    # from the mean towards the maximum: the risk rises along each list
    "cvar": [CVaR(alpha) for alpha in (1.0, 0.8, 0.5, 0.31, 0.1, 0.01)],
    "kl_penalty": [KLPenalty(temperature) for temperature in (1e6, 10.0, 2.0, 0.3, 1e-6)],
    "kl_ball": [KLBall(radius) for radius in (0.0, 1e-9, 0.1, 0.5, 1.2, 1e3)],
    "chi_square_penalty": [ChiSquarePenalty(strength) for strength in (1e6, 10.0, 2.0, 0.3, 1e-6)],
    "chi_square_ball": [ChiSquareBall(radius) for radius in (0.0, 1e-9, 0.1, 0.5, 2.0, 1e3)],
    "cressie_read_3": [CressieReadBall(3.0, radius) for radius in (0.0, 1e-9, 0.1, 0.5, 2.0, 1e6)],
    "cressie_read_1.3": [CressieReadBall(1.3, radius) for radius in (0.0, 1e-9, 0.1, 0.5, 2.0, 1e3)],
    "capped_kl_penalty": [
        CappedKLPenalty(*both) for both in ((1e6, 1.0), (10.0, 0.8), (2.0, 0.5), (0.5, 0.31), (0.3, 0.05), (1e-6, 0.01))
    ],
}
PENALTIES = (KLPenalty, ChiSquarePenalty, CappedKLPenalty)
SETS = [ambiguity_set for family in FAMILIES.values() for ambiguity_set in family[1:-1]]
BALLS = [ambiguity_set for ambiguity_set in SETS if not isinstance(ambiguity_set, PENALTIES)]


def solve(losses: Any, ambiguity_set: Any, **options: Any) -> tuple[float, list[float], float, float]:
    """One slice: risk, weights, nu, s as plain numbers."""
    result = worst_case(losses, ambiguity_set, **options)
    return float(result.risk), result.weights.tolist(), float(result.dual[0]), float(result.dual[1])


def order_of(ambiguity_set: Any) -> float:
    """The order of the divergence: 1 for KL, 2 for chi-square."""
    if isinstance(ambiguity_set, (KLPenalty, KLBall, CappedKLPenalty)):
        return 1.0
    return 2.0 if isinstance(ambiguity_set, (ChiSquarePenalty, ChiSquareBall)) else ambiguity_set.order


def high_precision_phi(t: Any, order: float) -> Any:
    if order == 1.0:
        return t * mp.log(t) - t + 1 if t > 0 else mp.mpf(1)
    k = mp.mpf(order)
    return (t**k - k * t + k - 1) / (k * (k - 1))


def high_precision_divergence(weights: list[float], order: float) -> float:
    """D(p || 1/n) of weights that are scaled to sum to 1 exactly."""
    with mp.workdps(60):
        total = mp.fsum(weights)
        return float(mp.fsum(high_precision_phi(len(weights) * p / total, order) for p in weights) / len(weights))


def high_precision_dual(losses: Any, ambiguity_set: Any, nu: float, s: float) -> float:
    """nu + s radius + s mean phi*((x - nu)/s) at 60 digits; CVaR: nu + mean(relu(x - nu)) / alpha."""
    with mp.workdps(60):
        x = [mp.mpf(float(value)) for value in losses]
        if isinstance(ambiguity_set, CVaR):
            return float(nu + mp.fsum(max(value - nu, 0) for value in x) / len(x) / ambiguity_set.alpha)
        if s == 0.0:
            return nu
        total, k = mp.mpf(0), mp.mpf(order_of(ambiguity_set))
        cap = 1 / mp.mpf(ambiguity_set.alpha) if isinstance(ambiguity_set, CappedKLPenalty) else mp.inf
        for value in x:
            y = (value - nu) / mp.mpf(s)
            if k == 1 and y > mp.log(cap):  # the conjugate of a function that ends at the cap goes on as a line
                total += cap * (y - mp.log(cap) + 1) - 1
                continue
            total += mp.expm1(y) if k == 1 else (max(1 + (k - 1) * y, 0) ** (k / (k - 1)) - 1) / k
        return float(nu + mp.mpf(s) * (mp.mpf(getattr(ambiguity_set, "radius", 0.0)) + total / len(x)))


# ---------------------------------------------------------------------------------------------------------------------
# Worked by hand
# ---------------------------------------------------------------------------------------------------------------------


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


# ---------------------------------------------------------------------------------------------------------------------
# An exact convex solver
# ---------------------------------------------------------------------------------------------------------------------


def convex_problem(losses: np.ndarray, ambiguity_set: Any) -> tuple[float, np.ndarray]:
    """The primal problem as it is written in the theory, handed to cvxpy."""
    n = len(losses)
    p = cp.Variable(n, nonneg=True)
    constraints = [cp.sum(p) == 1]
    objective = losses @ p
    order = None if isinstance(ambiguity_set, CVaR) else order_of(ambiguity_set)
    if isinstance(ambiguity_set, (CVaR, CappedKLPenalty)):
        constraints.append(p <= 1.0 / (ambiguity_set.alpha * n))
    if order is None:
        pass
    elif order == 1.0:
        divergence = cp.sum(cp.kl_div(n * p, np.ones(n))) / n
    elif order == 2.0:
        divergence = cp.sum_squares(n * p - 1) / (2 * n)
    else:
        divergence = (cp.sum(cp.power(n * p, order)) / n - 1) / (order * (order - 1))
    if isinstance(ambiguity_set, (KLPenalty, CappedKLPenalty)):
        objective = objective - ambiguity_set.temperature * divergence
    elif isinstance(ambiguity_set, ChiSquarePenalty):
        objective = objective - ambiguity_set.strength * divergence
    elif order is not None:
        constraints.append(divergence <= ambiguity_set.radius)
    problem = cp.Problem(cp.Maximize(objective), constraints)
    value = problem.solve(solver=cp.CLARABEL, tol_gap_abs=1e-9, tol_gap_rel=1e-9, tol_feas=1e-9)
    return float(value), p.value


@pytest.mark.parametrize(
    "ambiguity_set",
    [
        *(CVaR(0.13), CVaR(0.5), KLPenalty(0.4), KLPenalty(3.0), KLBall(0.05), KLBall(0.9)),
        *(ChiSquarePenalty(0.4), ChiSquarePenalty(5.0), ChiSquareBall(0.02), ChiSquareBall(0.7), ChiSquareBall(2.5)),
        *(CressieReadBall(3.0, 0.3), CressieReadBall(1.5, 0.4)),
        *(CappedKLPenalty(0.4, 0.5), CappedKLPenalty(1.0, 0.8), CappedKLPenalty(0.7, 0.23), CappedKLPenalty(0.2, 0.4)),
    ],
)
@pytest.mark.parametrize("shift", [-20.0, 0.0, 3.0])
def test_agrees_with_a_convex_solver_on_signed_losses(ambiguity_set: Any, shift: float) -> None:
    losses = np.random.default_rng(7).normal(size=9) + shift  # -20: all negative
    value, weights = convex_problem(losses, ambiguity_set)
    result = worst_case(losses, ambiguity_set)
    assert float(result.risk) == pytest.approx(value, abs=1e-7)
    np.testing.assert_allclose(result.weights, weights, atol=2e-5)  # flat at the optimum: half the digits


# ---------------------------------------------------------------------------------------------------------------------
# A certificate in high precision: feasible weights and a dual point of the same value prove each other
# ---------------------------------------------------------------------------------------------------------------------


def check_certificate(losses: np.ndarray, ambiguity_set: Any) -> None:
    risk, weights, nu, s = solve(losses, ambiguity_set)
    size = float(np.max(np.abs(losses)))
    assert min(weights) >= 0.0
    assert math.fsum(weights) == pytest.approx(1.0, abs=4e-15)
    for value in np.unique(losses):  # the symmetric choice among ties
        assert len({weights[i] for i in np.flatnonzero(losses == value)}) == 1
    assert abs(high_precision_dual(losses, ambiguity_set, nu, s) - risk) <= 4e-15 * size
    earned = math.fsum(p * float(x) for p, x in zip(weights, losses, strict=True))
    if isinstance(ambiguity_set, (CVaR, CappedKLPenalty)):
        assert max(weights) <= 1.0 / (ambiguity_set.alpha * len(losses)) * (1 + 4e-15)
    if isinstance(ambiguity_set, CVaR):
        paid = 0.0
    elif isinstance(ambiguity_set, PENALTIES):
        paid = s * high_precision_divergence(weights, order_of(ambiguity_set))
        size += s * 1e-17  # weights are known to an ulp, D of uniform ones to its square
    else:
        # The weights carry an error of some ulp, which moves D by that times the slope of phi.
        divergence = high_precision_divergence(weights, order_of(ambiguity_set))
        assert divergence <= ambiguity_set.radius + 1e-13 * (math.sqrt(ambiguity_set.radius) + ambiguity_set.radius)
        paid = 0.0
    assert abs(earned - paid - risk) <= 4e-15 * size


@pytest.mark.parametrize("seed", range(12))
def test_certificate_at_every_size_and_parameter(seed: int) -> None:
    rng = np.random.default_rng(seed)
    losses = rng.normal(size=int(rng.integers(2, 30))) * 10.0 ** rng.uniform(-30, 30)
    size = float(np.max(np.abs(losses)))
    if seed % 3 == 0:
        losses = np.round(losses / size * 3) * size  # many ties
    radius, strength = 10.0 ** rng.uniform(-12, 0.5), size * 10.0 ** rng.uniform(-3, 6)
    for ambiguity_set in [
        *(CVaR(rng.uniform(0.01, 1.0)), KLPenalty(strength), ChiSquarePenalty(strength)),
        *(KLBall(radius), ChiSquareBall(radius)),
        *(CressieReadBall(order, radius) for order in (1.001, 1.5, 3.0, 20.0)),
        *(CappedKLPenalty(strength, rng.uniform(0.01, 1.0)), CappedKLPenalty(strength, 1.0)),
    ]:
        check_certificate(losses, ambiguity_set)


NEARLY_EQUAL = np.array([1.0, np.nextafter(1.0, 2.0), 1.0, np.nextafter(1.0, 0.0)])


@pytest.mark.parametrize("ambiguity_set", SETS)
@pytest.mark.parametrize(
    "losses",
    [
        NEARLY_EQUAL,
        -NEARLY_EQUAL,
        np.array([1.0, 1e-20, 2e-20, -1.0]),
        np.array([0.0, -1e-30, -1.0, -1e30]),
        np.array([-1e-300, -2e-300, -4e-300]),
        np.concatenate([np.full(20, -1.0), [5.0], np.full(3, 4.999999)]),
    ],
    ids=["ulp", "minus-ulp", "merging", "wide", "tiny", "ties"],
)
def test_certificate_of_awkward_losses(ambiguity_set: Any, losses: np.ndarray) -> None:
    check_certificate(losses, ambiguity_set)


@pytest.mark.parametrize("make", [KLBall, ChiSquareBall, lambda radius: CressieReadBall(3.0, radius)])
@pytest.mark.parametrize("relative", [-1e-3, -1e-9, -1e-15, 0.0, 1e-15])
def test_certificate_next_to_saturation(make: Callable[[float], Any], relative: float) -> None:
    losses = np.array([0.5, 3.0, -1.0, 3.0, 2.0, 2.9, 0.0, 1.0])
    threshold = {KLBall: math.log(4.0), ChiSquareBall: 1.5}.get(make, 2.5)  # n / m = 4
    check_certificate(losses, make(threshold * (1 + relative)))


@pytest.mark.parametrize("make", [KLBall, ChiSquareBall, lambda radius: CressieReadBall(1.5, radius)])
@pytest.mark.parametrize("radius", [1e-300, 1e-100, 1e-20])
def test_certificate_of_tiny_radii(make: Callable[[float], Any], radius: float) -> None:
    losses = np.array([0.5, 3.0, -1.0, 2.0])
    risk, _, nu, s = solve(losses, make(radius))
    # Any divergence with phi''(1) = 1 behaves alike here: F = mean + sqrt(2 radius var), s = sqrt(var / (2 radius)).
    assert risk == pytest.approx(losses.mean() + math.sqrt(2 * radius * losses.var()), abs=1e-15)
    assert s == pytest.approx(math.sqrt(losses.var() / (2 * radius)), rel=1e-9)
    assert nu == pytest.approx(losses.mean(), rel=1e-9)


# ---------------------------------------------------------------------------------------------------------------------
# Facts that must hold
# ---------------------------------------------------------------------------------------------------------------------

# Multiples of 1/8, so that ties happen and sums with other multiples are exact; between them any float.
eighths = st.integers(-80, 80).map(lambda whole: whole / 8)
one_loss = eighths | st.floats(-10.0, 10.0, allow_subnormal=False)
some_losses = st.lists(one_loss, min_size=1, max_size=9).map(np.array)
some_eighths = st.lists(eighths, min_size=1, max_size=9).map(np.array)
two_of_a_length = st.integers(1, 8).flatmap(
    lambda n: st.tuples(*[st.lists(one_loss, min_size=n, max_size=n).map(np.array)] * 2)
)
few = settings(max_examples=20)


@pytest.mark.parametrize("ambiguity_set", SETS)
@few
@given(losses=some_losses)
def test_risk_lies_between_mean_and_maximum(ambiguity_set: Any, losses: np.ndarray) -> None:
    risk = float(worst_case(losses, ambiguity_set).risk)
    assert losses.mean() - 1e-13 <= risk <= losses.max() + 1e-13


@pytest.mark.parametrize("ambiguity_set", SETS)
@few
@given(losses=some_eighths, shift=eighths)
def test_a_shift_moves_the_risk_and_no_weight(ambiguity_set: Any, losses: np.ndarray, shift: float) -> None:
    risk, weights, nu, s = solve(losses, ambiguity_set)
    moved, same_weights, moved_nu, same_s = solve(losses + shift, ambiguity_set)
    # abs: one ulp of x times the steepness of the weights, at most 1 / (n s).
    assert same_weights == pytest.approx(weights, abs=1e-12)
    # nu = mean - s (n - k) / k: s of 1e5 and radius 1e-9 give it an error of the same relative size.
    assert (moved, same_s) == (pytest.approx(risk + shift, abs=1e-13), pytest.approx(s, rel=1e-9, abs=1e-13))
    assert moved_nu == pytest.approx(nu + shift, abs=1e-12)


@pytest.mark.parametrize("ambiguity_set", BALLS)
@few
@given(losses=some_losses, power=st.integers(-90, 90))
def test_a_scale_scales_balls_and_moves_no_weight(ambiguity_set: Any, losses: np.ndarray, power: int) -> None:
    scale = 2.0**power
    risk, weights, _, _ = solve(losses, ambiguity_set)
    scaled, same_weights, _, _ = solve(losses * scale, ambiguity_set)
    assert same_weights == pytest.approx(weights, abs=1e-12)
    assert scaled == pytest.approx(risk * scale, rel=1e-13, abs=1e-13 * scale)


@pytest.mark.parametrize("ambiguity_set", SETS)
@few
@given(pair=two_of_a_length)
def test_risk_is_convex_and_non_decreasing(ambiguity_set: Any, pair: tuple[np.ndarray, np.ndarray]) -> None:
    x, y = pair
    at_x, at_y, between, above = (
        float(worst_case(losses, ambiguity_set).risk) for losses in (x, y, 0.25 * x + 0.75 * y, np.maximum(x, y))
    )
    assert between <= 0.25 * at_x + 0.75 * at_y + 1e-13
    assert above >= max(at_x, at_y) - 1e-13


@pytest.mark.parametrize("family", FAMILIES)
@few
@given(losses=some_losses)
def test_risk_rises_from_the_mean_to_the_maximum(family: str, losses: np.ndarray) -> None:
    risks = [float(worst_case(losses, ambiguity_set).risk) for ambiguity_set in FAMILIES[family]]
    assert all(later >= earlier - 1e-13 for earlier, later in pairwise(risks))
    # The first and last parameters are limits, or come within var / 1e6 and 1e-6 log n of them.
    assert risks[0] == pytest.approx(losses.mean(), abs=1e-4)
    assert risks[-1] == pytest.approx(losses.max(), abs=1e-4)


@pytest.mark.parametrize("ambiguity_set", SETS)
@few
@given(losses=some_losses, random=st.randoms(use_true_random=False))
def test_a_permutation_permutes_the_weights(ambiguity_set: Any, losses: np.ndarray, random: Any) -> None:
    order = list(range(len(losses)))
    random.shuffle(order)
    risk, weights, nu, s = solve(losses, ambiguity_set)
    # Sums are rounded once, so not even the last bit may move.
    assert solve(losses[order], ambiguity_set) == (risk, [weights[i] for i in order], nu, s)


@pytest.mark.parametrize("ambiguity_set", SETS)
@few
@given(losses=some_losses)
def test_certificate_of_drawn_losses(ambiguity_set: Any, losses: np.ndarray) -> None:
    check_certificate(np.where(np.abs(losses) < 1e-100, 0.0, losses), ambiguity_set)


@few
@given(losses=some_losses, radius=st.floats(1e-6, 3.0))
def test_order_2_is_chi_square(losses: np.ndarray, radius: float) -> None:
    risk, weights, _, _ = solve(losses, ChiSquareBall(radius))
    same, same_weights, _, _ = solve(losses, CressieReadBall(2.0, radius))
    assert same == pytest.approx(risk, abs=1e-13)
    # Near saturation weights are the root of a difference: half the digits.
    assert same_weights == pytest.approx(weights, abs=1e-7)


@few
@given(losses=some_losses, radius=st.floats(1e-3, 1.0))
def test_orders_near_1_come_near_to_kl(losses: np.ndarray, radius: float) -> None:
    risk = float(worst_case(losses, KLBall(radius)).risk)
    errors = [abs(float(worst_case(losses, CressieReadBall(order, radius)).risk) - risk) for order in (1.01, 1.0001)]
    assert errors[0] <= 0.2
    assert errors[1] <= 0.002


@few
@given(losses=some_losses, radius=st.floats(1e-3, 1.0))
def test_variance_formula_holds_where_nothing_is_clipped(losses: np.ndarray, radius: float) -> None:
    variance, mean = losses.var(), losses.mean()
    if variance > 1e-6 and math.sqrt(2 * radius / variance) * (mean - losses.min()) <= 1 - 1e-9:
        risk, weights, _, _ = solve(losses, ChiSquareBall(radius))
        assert risk == pytest.approx(mean + math.sqrt(2 * radius * variance), abs=1e-12)
        assert min(weights) > 0.0


@pytest.mark.parametrize("ambiguity_set", SETS)
def test_weights_are_the_gradient_of_the_risk(ambiguity_set: Any) -> None:
    losses = np.array([0.3, -1.7, 2.2, 0.9, -0.4, 1.1])
    weights = worst_case(losses, ambiguity_set).weights
    step = 1e-5
    for i in range(len(losses)):
        nudge = step * np.eye(len(losses))[i]
        up, down = (float(worst_case(losses + sign * nudge, ambiguity_set).risk) for sign in (1, -1))
        assert (up - down) / (2 * step) == pytest.approx(weights[i], abs=2e-8)


# ---------------------------------------------------------------------------------------------------------------------
# where, axis, dtypes
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ambiguity_set", SETS)
def test_where_is_the_same_as_leaving_entries_out(ambiguity_set: Any) -> None:
    losses = np.array([1.0, np.nan, -2.0, np.inf, 4.0, -np.inf, 0.5])
    counted = np.isfinite(losses)
    masked, shorter = worst_case(losses, ambiguity_set, where=counted), worst_case(losses[counted], ambiguity_set)
    assert masked.risk == shorter.risk
    assert masked.dual == shorter.dual
    np.testing.assert_array_equal(masked.weights[counted], shorter.weights)
    np.testing.assert_array_equal(masked.weights[~counted], 0.0)


def test_every_slice_is_a_problem_of_its_own() -> None:
    losses = np.random.default_rng(3).normal(size=(2, 5, 3))
    counted = np.array([[True], [True], [False], [True], [True]])  # broadcasts along the first and last axis
    for axis in (1, -2):
        result = worst_case(losses, ChiSquareBall(0.6), axis=axis, where=counted)
        assert (result.risk.shape, result.weights.shape) == ((2, 3), (2, 5, 3))
        for i in range(2):
            for j in range(3):
                alone = worst_case(losses[i, :, j], ChiSquareBall(0.6), where=counted[:, 0])
                assert (result.risk[i, j], result.dual[0][i, j], result.dual[1][i, j]) == (alone.risk, *alone.dual)
                np.testing.assert_array_equal(result.weights[i, :, j], alone.weights)


def test_no_slices_give_no_risks() -> None:
    result = worst_case(np.empty((0, 3)), CVaR(0.5))
    assert (result.risk.shape, result.weights.shape) == ((0,), (0, 3))


@pytest.mark.parametrize(
    "losses", [[1, 3, 2], np.array([1, 3, 2], dtype="uint8"), np.array([1, 3, 2], dtype="float32")]
)
def test_any_real_dtype_is_read_as_float64(losses: Any) -> None:
    result = worst_case(losses, CVaR(2 / 3))
    assert (result.risk.dtype, result.weights.dtype, result.dual[0].dtype) == (np.float64,) * 3
    assert float(result.risk) == 2.5


def test_inputs_are_not_written_to() -> None:
    losses, counted = np.array([1.0, 3.0, np.nan]), np.array([True, True, False])
    worst_case(losses, KLPenalty(1.0), where=counted)
    np.testing.assert_array_equal(losses, [1.0, 3.0, np.nan])
    np.testing.assert_array_equal(counted, [True, True, False])


def test_sets_are_values() -> None:
    assert CVaR(0.5) == CVaR(np.float32(0.5)) == CVaR(np.array(0.5))
    assert len({KLBall(1), KLBall(1.0), KLBall(2.0)}) == 2
    with pytest.raises(AttributeError, match="alpha"):
        CVaR(0.5).alpha = 1.0  # type: ignore[misc]


# ---------------------------------------------------------------------------------------------------------------------
# Errors
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: CVaR(0.0), ValueError, r"alpha must lie in \(0, 1\], got 0.0"),
        (lambda: CVaR(1.5), ValueError, r"alpha must lie in \(0, 1\], got 1.5"),
        (lambda: CVaR(math.nan), ValueError, "alpha must be finite, got nan"),
        (lambda: CVaR("half"), TypeError, "alpha must be a real number, got 'half'"),
        (lambda: CVaR(True), TypeError, "alpha must be a real number, got True"),
        (lambda: CVaR([0.5]), TypeError, "alpha must be a real number"),
        (lambda: KLPenalty(0.0), ValueError, "temperature must be positive, got 0.0"),
        (lambda: KLPenalty(math.inf), ValueError, "temperature must be finite, got inf"),
        (lambda: KLBall(-1.0), ValueError, "radius must be at least 0, got -1.0"),
        (lambda: ChiSquarePenalty(-1.0), ValueError, "strength must be positive, got -1.0"),
        (lambda: ChiSquareBall(-1e-9), ValueError, "radius must be at least 0, got -1e-09"),
        (lambda: CressieReadBall(1.0, 0.5), ValueError, "order must be above 1, got 1.0"),
        (lambda: CressieReadBall(2.0, -0.5), ValueError, "radius must be at least 0, got -0.5"),
        (lambda: CappedKLPenalty(0.0, 0.5), ValueError, "temperature must be positive, got 0.0"),
        (lambda: CappedKLPenalty(1.0, 1.5), ValueError, r"alpha must lie in \(0, 1\], got 1.5"),
    ],
)
def test_sets_refuse_parameters_outside_their_domain(make: Callable[[], Any], error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    ("losses", "ambiguity_set", "options", "error", "message"),
    [
        ([1.0, np.nan], CVaR(0.5), {}, ValueError, r"losses must be finite where they count, got \[1.0, nan\]"),
        ([1.0, -np.inf], CVaR(0.5), {}, ValueError, "losses must be finite"),
        (1.0, CVaR(0.5), {}, ValueError, "losses must have at least one axis, got a 0-d array"),
        ([], CVaR(0.5), {}, ValueError, "losses must have an entry that counts in every slice"),
        ([[1.0], [1.0, 2.0]], CVaR(0.5), {}, ValueError, "losses must be a rectangular array"),
        (["a"], CVaR(0.5), {}, TypeError, "losses must be an array of real numbers, got dtype <U1"),
        ([True, False], CVaR(0.5), {}, TypeError, "losses must be an array of real numbers, got dtype bool"),
        ([1j], CVaR(0.5), {}, TypeError, "losses must be an array of real numbers, got dtype complex128"),
        ([1.0], "cvar", {}, TypeError, "ambiguity_set must be one of the ambiguity sets, got 'cvar'"),
        ([1.0], CVaR, {}, TypeError, "ambiguity_set must be one of the ambiguity sets"),
        ([1.0], CVaR(0.5), {"axis": 1}, ValueError, r"axis must lie in \[-1, 1\), got 1"),
        ([1.0], CVaR(0.5), {"axis": 0.0}, TypeError, "axis must be an integer, got 0.0"),
        ([1.0], CVaR(0.5), {"axis": False}, TypeError, "axis must be an integer, got False"),
        ([1.0, 2.0], CVaR(0.5), {"where": [1, 0]}, TypeError, "where must be an array of bool, got dtype int64"),
        ([1.0, 2.0], CVaR(0.5), {"where": [True] * 3}, ValueError, r"where must broadcast to the shape \(2,\)"),
        ([[1.0], [2.0]], CVaR(0.5), {"where": [[True], [False]]}, ValueError, "entry that counts in every slice"),
    ],
)
def test_worst_case_refuses_bad_input(losses: Any, ambiguity_set: Any, options: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        worst_case(losses, ambiguity_set, **options)
