"""The oracle's worst case agrees with a convex solver, and a dual point in high precision proves it optimal."""

from __future__ import annotations

import math
from collections.abc import Callable
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
from hypothesis import given

from helpers.oracle_ambiguity import PENALTIES, SETS, few, solve, some_losses


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


@pytest.mark.parametrize("ambiguity_set", SETS)
@few
@given(losses=some_losses)
def test_certificate_of_drawn_losses(ambiguity_set: Any, losses: np.ndarray) -> None:
    check_certificate(np.where(np.abs(losses) < 1e-100, 0.0, losses), ambiguity_set)
