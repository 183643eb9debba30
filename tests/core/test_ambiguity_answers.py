"""The ambiguity sets give the right answers: the oracle, the dual variables, Danskin's theorem, numbers by hand."""

from __future__ import annotations

import math
from typing import Any

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
from helpers.ambiguity import (
    BALLS,
    KINDS,
    ROWS,
    SETS,
    N,
    dual_value,
    oracle_rows,
    problem_rows,
    sets_for,
    solve,
    tolerance,
)


@pytest.mark.parametrize("kind", KINDS)
def test_every_library_agrees_with_the_oracle(space: Any, kind: str) -> None:
    x, where = problem_rows()
    for ambiguity_set in sets_for(space, kind):
        got = solve(space, ambiguity_set, x, where)
        for i, expected in enumerate(oracle_rows(ambiguity_set, space.dtype_name)):
            size, label = np.abs(x[i][where[i]]).max(), f"{ambiguity_set}, row {i}"
            np.testing.assert_allclose(got.risk[i], expected.risk, rtol=0, atol=tolerance(space) * size, err_msg=label)
            largest = expected.weights.max()
            np.testing.assert_allclose(
                got.weights[i], expected.weights, rtol=0, atol=tolerance(space) * largest, err_msg=label
            )
            assert (got.weights[i][~where[i]] == 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_dual_certifies_the_risk(space: Any, kind: str) -> None:
    x, where = problem_rows()
    x = space.rounded(x)
    for ambiguity_set in sets_for(space, kind):
        got = solve(space, ambiguity_set, x, where)
        for i in range(ROWS):
            values = x[i][where[i]]
            size, (nu, s) = np.abs(values).max(), (got.dual[0][i], got.dual[1][i])
            assert s >= 0
            if 0 < s < 1e3 * np.finfo(space.dtype_name).eps * size:
                continue  # nu, rounded, is not known to a fraction of s
            gap = dual_value(ambiguity_set, values, nu, s) - got.risk[i]
            assert abs(gap) <= tolerance(space) * size, (ambiguity_set, i, gap)


@pytest.mark.parametrize("kind", KINDS)
def test_dual_is_a_minimum_and_implies_the_weights(kind: str) -> None:
    # Elsewhere in the dual nothing is smaller, and the weights are (phi*)'((x - nu) / s) / n.
    x = np.random.default_rng(3).normal(size=7)
    ambiguity_set = SETS[kind][0]
    worst = worst_case(x, ambiguity_set)
    nu, s = float(worst.dual[0]), float(worst.dual[1])
    best = dual_value(ambiguity_set, x, nu, s)
    for shift in (-0.1, -1e-3, 1e-3, 0.1):
        assert dual_value(ambiguity_set, x, nu + shift, s) >= best - 1e-15
        if kind in BALLS:
            assert dual_value(ambiguity_set, x, nu, s * (1 + shift)) >= best - 1e-15
    y = (x - nu) / s if s > 0 else x
    k = getattr(ambiguity_set, "order", 2.0)
    if kind != "CVaR":
        likelihood = np.exp(y) if "KL" in kind else np.maximum(1 + (k - 1) * y, 0) ** (1 / (k - 1))
        likelihood = np.minimum(likelihood, 1 / getattr(ambiguity_set, "alpha", 1e-9))
        np.testing.assert_allclose(worst.weights, likelihood / 7, rtol=0, atol=1e-14)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_the_derivative_of_the_risk(eager_space: Any, kind: str) -> None:
    # Danskin's theorem, by central differences; all 2 n shifted problems are rows of one array.
    if eager_space.dtype_name == "float32":
        pytest.skip("differences need float64")
    x, h = np.random.default_rng(5).normal(size=N), 1e-5
    rows = np.concatenate([x + h * np.eye(N), x - h * np.eye(N)])
    for ambiguity_set in SETS[kind][:2]:
        risk = solve(eager_space, ambiguity_set, rows).risk
        weights = solve(eager_space, ambiguity_set, x).weights
        np.testing.assert_allclose((risk[:N] - risk[N:]) / (2 * h), weights, rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    ("losses", "ambiguity_set", "risk", "weights"),
    [
        # k = 1.5: all of the largest, half of the next.
        ([1.0, 4.0, 2.0], CVaR(0.5), 10 / 3, [0, 2 / 3, 1 / 3]),
        # k = 2, one loss above the quantile, three tied at it share the second place.
        ([5.0, 1.0, 3.0, 3.0, 3.0, 0.0], CVaR(1 / 3), 4.0, [1 / 2, 0, 1 / 6, 1 / 6, 1 / 6, 0]),
        # 0.1 times 30 is a little more than 3 in floating point, and means 3.
        ([0.0] * 26 + [1.0, 2.0, 3.0, 4.0], CVaR(0.1), 3.0, [0] * 27 + [1 / 3] * 3),
        ([math.log(1), math.log(5)], KLPenalty(1.0), math.log(3), [1 / 6, 5 / 6]),
        # k = 2: the largest is capped at 1/2, the others share the rest as 1 : 2 : 3, nu = log 3.
        (
            [0.0, math.log(2), math.log(3), math.log(40)],
            CappedKLPenalty(1.0, 0.5),
            math.log(60) / 2,
            [1 / 12, 1 / 6, 1 / 4, 1 / 2],
        ),
        # s = 1: mean log-likelihood ratio of (1/6, 5/6) against uniform weights.
        (
            [math.log(1), math.log(5)],
            KLBall((math.log(2 / 6) + 5 * math.log(10 / 6)) / 6),
            5 / 6 * math.log(5),
            [1 / 6, 5 / 6],
        ),
        # n p = 1 + (x - nu) / s = (0, 1/2, 3/2, 2).
        ([0.0, 1.0, 3.0, 4.0], ChiSquarePenalty(2.0), 3.25 - 2 * 0.3125, [0, 1 / 8, 3 / 8, 1 / 2]),
        ([0.0, 1.0, 3.0, 4.0], ChiSquareBall(0.3125), 2 + math.sqrt(2 * 0.3125 * 2.5), [0, 1 / 8, 3 / 8, 1 / 2]),
        # One loss clipped: p = (0, 1/4, 3/4), n sum p^2 = 15/8.
        ([-9.0, 1.0, 3.0], ChiSquareBall(0.4375), 2.5, [0, 1 / 4, 3 / 4]),
        # p proportional to sqrt(x): 3^2 sum p^3 = 1 + 6 radius with p = (0, 1/3, 2/3).
        ([0.0, 1.0, 4.0], CressieReadBall(3.0, 1 / 3), 3.0, [0, 1 / 3, 2 / 3]),
        # p proportional to x^2: (3 sum p^1.5)^2 ... with p = (0, 1/5, 4/5), n^0.5 sum p^1.5 = 1 + 0.75 radius.
        (
            [0.0, 1.0, 2.0],
            CressieReadBall(1.5, (math.sqrt(3) * (0.2**1.5 + 0.8**1.5) - 1) / 0.75),
            1.8,
            [0, 1 / 5, 4 / 5],
        ),
    ],
)
def test_hand_worked_numbers(losses: list[float], ambiguity_set: AmbiguitySet, risk: float, weights: list) -> None:
    worst = worst_case(np.asarray(losses), ambiguity_set)
    np.testing.assert_allclose(worst.risk, risk, rtol=1e-14)
    np.testing.assert_allclose(worst.weights, weights, rtol=0, atol=1e-14)
