"""Facts that hold for the oracle's worst case of any losses: bounds, shifts, scales, convexity, permutations."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from drrho_reference import (
    ChiSquareBall,
    CressieReadBall,
    KLBall,
    worst_case,
)
from hypothesis import given
from hypothesis import strategies as st

from helpers.oracle_ambiguity import FAMILIES, PENALTIES, SETS, eighths, few, one_loss, solve, some_losses

BALLS = [ambiguity_set for ambiguity_set in SETS if not isinstance(ambiguity_set, PENALTIES)]
some_eighths = st.lists(eighths, min_size=1, max_size=9).map(np.array)
two_of_a_length = st.integers(1, 8).flatmap(
    lambda n: st.tuples(*[st.lists(one_loss, min_size=n, max_size=n).map(np.array)] * 2)
)


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


@pytest.mark.parametrize("radius", [1e-9, 0.1])
def test_the_gap_between_the_two_largest_losses_may_be_the_smallest_normal_number(radius: float) -> None:
    tiny = float(np.finfo(np.float64).tiny)
    risk, weights, _, _ = solve(np.asarray([0.0, -0.125, tiny]), KLBall(radius))
    # Beside the third loss the two largest are equal.
    expected, same_weights, _, _ = solve(np.asarray([0.0, -0.125, 0.0]), KLBall(radius))
    assert risk == pytest.approx(expected, rel=1e-9)
    assert weights == pytest.approx(same_weights, abs=1e-9)


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
