"""Excess losses and the DRRho risk of the oracle."""

from __future__ import annotations

import math
from typing import Any

import mpmath as mp
import numpy as np
import pytest
from drrho_reference import (
    CappedKLPenalty,
    ChiSquareBall,
    CVaR,
    KLPenalty,
    drrho_risk,
    drrho_risk_vjp,
    excess_loss,
    moving_average_kl,
    worst_case,
)


def test_excess_loss_by_hand() -> None:
    # 2 - 0.5 * 3 = 0.5, and so on.
    loss, reference = [[2.0, -1.0], [0.0, 4.0]], [[3.0, 1.0], [-2.0, 8.0]]
    assert excess_loss(loss, reference, reference_weight=0.5).tolist() == [[0.5, -1.5], [1.0, 0.0]]
    assert excess_loss(loss, reference).tolist() == [[-1.0, -2.0], [2.0, -4.0]]
    assert excess_loss(loss, reference, reference_weight=0).tolist() == loss
    assert excess_loss(loss, reference, reference_weight=1.5).tolist() == [[-2.5, -2.5], [3.0, -8.0]]


def test_drrho_risk_is_the_worst_case_of_the_excess_losses() -> None:
    rng = np.random.default_rng(5)
    loss, reference = rng.normal(size=(3, 6)), rng.normal(size=(3, 6))
    counted = rng.uniform(size=(3, 6)) < 0.7
    result = drrho_risk(loss, reference, ChiSquareBall(0.4), reference_weight=1.5, axis=0, where=counted)
    expected = worst_case(loss - 1.5 * reference, ChiSquareBall(0.4), axis=0, where=counted)
    np.testing.assert_array_equal(result.risk, expected.risk)
    np.testing.assert_array_equal(result.weights, expected.weights)
    np.testing.assert_array_equal(result.dual, expected.dual)


@pytest.mark.parametrize("ambiguity_set", [KLPenalty(0.7), ChiSquareBall(0.4), CappedKLPenalty(0.5, 0.4)])
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_an_upstream_gradient_weighs_the_slices(ambiguity_set: Any, axis: int) -> None:
    rng = np.random.default_rng(8)
    loss, reference = rng.normal(size=(2, 3, 4))
    upstream = rng.normal(size=np.delete(loss.shape, axis))
    counted = np.ones((3, 4), dtype=bool)
    counted[1, 2] = False
    given: dict[str, Any] = {"reference_weight": 0.5, "axis": axis, "where": counted}

    def weighted_sum(loss: Any) -> float:
        return float(upstream @ drrho_risk(loss, reference, ambiguity_set, **given).risk)

    found = drrho_risk_vjp(loss, reference, ambiguity_set, upstream, **given)
    for index in np.ndindex(loss.shape):
        nudge = np.zeros_like(loss)
        nudge[index] = 1e-5
        slope = (weighted_sum(loss + nudge) - weighted_sum(loss - nudge)) / 2e-5
        assert found[index] == pytest.approx(slope, abs=2e-8)
    assert found[1, 2] == 0.0
    with pytest.raises(ValueError, match=r"upstream must have the shape \(\d,\), got \(9,\)"):
        drrho_risk_vjp(loss, reference, ambiguity_set, np.ones(9), **given)


def test_a_shift_of_the_reference_losses_changes_no_weight() -> None:
    loss, reference = np.array([1.0, -2.0, 0.5, 3.0]), np.array([0.5, 1.0, -1.0, 2.25])
    before, after = (drrho_risk(loss, reference + shift, KLPenalty(0.7)) for shift in (0.0, 8.0))
    np.testing.assert_array_equal(after.weights, before.weights)
    assert float(after.risk) == pytest.approx(float(before.risk) - 8.0, abs=2e-15)


def test_what_does_not_count_is_never_read() -> None:
    result = drrho_risk([1.0, np.nan, 2.0], [np.inf, 0.0, 0.5], CVaR(0.5), where=[False, False, True])
    assert (float(result.risk), result.weights.tolist()) == (1.5, [0.0, 0.0, 1.0])


def test_the_ulp_of_the_quantile_is_that_of_the_losses() -> None:
    # k = 3.0000003 is 3 in float32 and not in float64.
    for dtype, weight in (("float32", 0.0), ("float64", 1e-7)):
        loss = np.arange(30, dtype=dtype)
        result = drrho_risk(loss, np.zeros_like(loss), CVaR(0.1 * (1 + 1e-7)))
        assert result.weights[26] == pytest.approx(weight, rel=1e-6)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (([1.0, 2.0], [1.0]), {}, ValueError, r"reference_loss must have the shape \(2,\), got \(1,\)"),
        (([1.0], 1.0), {}, ValueError, r"reference_loss must have the shape \(1,\), got \(\)"),
        (([1.0], [1.0]), {"reference_weight": -0.5}, ValueError, "reference_weight must be at least 0, got -0.5"),
        (([1.0], [1.0]), {"reference_weight": None}, TypeError, "reference_weight must be a real number, got None"),
        ((["x"], [1.0]), {}, TypeError, "loss must be an array of real numbers"),
        (([np.nan], [1.0]), {}, ValueError, "loss must be finite, got nan"),
        (([0.0], [np.inf]), {}, ValueError, "reference_loss must be finite, got inf"),
    ],
)
def test_bad_input_is_refused(arguments: Any, options: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        excess_loss(*arguments, **options)
    with pytest.raises(error, match=message):
        drrho_risk(*arguments, CVaR(0.5), **options)


# ---------------------------------------------------------------------------------------------------------------------
# The moving average
# ---------------------------------------------------------------------------------------------------------------------

NEVER = -math.inf


def test_moving_average_by_hand() -> None:
    # x = l - r / 2 = 2 log(2, 4, 9), so exp(x / 2) = 2, 4, 9 with the mean 5; u was 1 and gamma is 1/4: u = 2.
    reference = np.array([1.0, -3.0, 0.5])
    loss = 2 * np.log([2.0, 4.0, 9.0]) + reference / 2
    result = moving_average_kl(loss, reference, 0.0, temperature=2.0, gamma=0.25, reference_weight=0.5)
    assert (result.risk, result.log_inner) == pytest.approx((2 * math.log(2.0), math.log(2.0)), abs=1e-15)
    np.testing.assert_allclose(result.weights, [2 / 6, 4 / 6, 9 / 6], rtol=1e-15)
    # On the first batch u is the batch's mean.
    first = moving_average_kl(loss, reference, NEVER, temperature=2.0, gamma=0.25, reference_weight=0.5)
    assert (first.risk, first.log_inner) == pytest.approx((2 * math.log(5.0), math.log(5.0)), abs=1e-15)
    np.testing.assert_allclose(first.weights, [2 / 15, 4 / 15, 9 / 15], rtol=1e-15)
    # Without the second entry the mean is 11/2, u = (3 + 11/2) / 4 = 17/8 and two entries share.
    loss[1] = np.nan
    result = moving_average_kl(
        loss, reference, 0.0, temperature=2.0, gamma=0.25, reference_weight=0.5, where=[True, False, True]
    )
    assert result.log_inner == pytest.approx(math.log(17 / 8), abs=1e-15)
    np.testing.assert_allclose(result.weights, [2 / (17 / 4), 0.0, 9 / (17 / 4)], rtol=1e-15)


def test_without_memory_it_is_the_kl_penalty() -> None:
    rng = np.random.default_rng(6)
    loss, reference = rng.normal(size=(2, 3)), rng.normal(size=(2, 3))
    counted = np.array([[True, False, True], [True, True, True]])
    result = moving_average_kl(loss, reference, 0.7, temperature=0.3, reference_weight=1.5, where=counted)
    expected = drrho_risk(loss.ravel(), reference.ravel(), KLPenalty(0.3), reference_weight=1.5, where=counted.ravel())
    assert result.risk == pytest.approx(float(expected.risk), abs=1e-14)
    np.testing.assert_allclose(result.weights.ravel(), expected.weights, atol=1e-14)


@pytest.mark.parametrize("temperature", [0.02, 1.0, 50.0])
def test_moving_average_agrees_with_mpmath(temperature: float) -> None:
    rng = np.random.default_rng(7)
    loss, reference = rng.normal(size=(2, 5))
    result = moving_average_kl(loss, reference, -1.5, temperature=temperature, gamma=0.2)
    with mp.workdps(40):
        exponentials = [
            mp.exp((mp.mpf(a) - mp.mpf(b)) / mp.mpf(temperature))
            for a, b in zip(loss.tolist(), reference.tolist(), strict=True)
        ]
        new = mp.mpf(0.2)
        u = (1 - new) * mp.exp(mp.mpf(-1.5)) + new * mp.fsum(exponentials) / 5
        assert result.log_inner == pytest.approx(float(mp.log(u)), rel=1e-13)
        assert result.risk == pytest.approx(float(mp.mpf(temperature) * mp.log(u)), rel=1e-13)
        np.testing.assert_allclose(result.weights, [float(e / u / 5) for e in exponentials], rtol=1e-12)


def test_weights_are_the_gradient_with_u_held_fixed() -> None:
    rng = np.random.default_rng(8)
    loss, reference = rng.normal(size=(2, 4))
    result = moving_average_kl(loss, reference, 0.4, temperature=0.8, gamma=0.3)
    u, h = math.exp(result.log_inner), 1e-5

    def surrogate(loss: np.ndarray) -> float:
        return 0.8 * float(np.mean(np.exp((loss - reference) / 0.8))) / u

    for i in range(4):
        nudge = np.eye(4)[i] * h
        slope = (surrogate(loss + nudge) - surrogate(loss - nudge)) / (2 * h)
        assert result.weights[i] == pytest.approx(slope, rel=1e-8)


def test_batches_in_turn_lead_to_the_risk_of_all() -> None:
    # Two batches of a fixed data set in turn: u goes back and forth around the mean of all, ever closer as gamma falls.
    rng = np.random.default_rng(9)
    loss, reference = rng.normal(size=(2, 8))
    exact = float(drrho_risk(loss, reference, KLPenalty(0.7)).risk)
    distance = []
    for gamma in (0.3, 0.03):
        log_inner = NEVER
        for step in range(400):
            part = slice(0, 4) if step % 2 else slice(4, 8)
            log_inner = moving_average_kl(
                loss[part], reference[part], log_inner, temperature=0.7, gamma=gamma
            ).log_inner
        distance.append(abs(0.7 * log_inner - exact))
    assert distance[1] < distance[0] / 5
    assert distance[1] < 0.01


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (([1.0, 2.0], [1.0], 0.0), {}, ValueError, r"reference_loss must have the shape \(2,\), got \(1,\)"),
        (([1.0], [1.0], math.inf), {}, ValueError, "log_inner must be finite or -inf"),
        (([1.0], [1.0], math.nan), {}, ValueError, "log_inner must be finite or -inf"),
        (([1.0], [1.0], [0.0]), {}, TypeError, "log_inner must be a number, got an array"),
        (([1.0], [1.0], "0"), {}, TypeError, "log_inner must be an array of real numbers"),
        (([1.0], [1.0], 0.0), {"temperature": 0.0}, ValueError, "temperature must be positive, got 0.0"),
        (([1.0], [1.0], 0.0), {"gamma": 0.0}, ValueError, r"gamma must lie in \(0, 1\], got 0.0"),
        (([1.0], [1.0], 0.0), {"reference_weight": -1}, ValueError, "reference_weight must be at least 0, got -1.0"),
        (([1.0], [1.0], 0.0), {"where": [False]}, ValueError, "loss must have an entry that counts"),
        (([1.0], [np.nan], 0.0), {}, ValueError, "reference_loss must be finite, got nan"),
        (([1e3], [0.0], 0.0), {}, FloatingPointError, "temperature must keep the linear domain .*, got 1.0"),
        (([-1e3], [0.0], 0.0), {}, FloatingPointError, "temperature must keep the linear domain .*, got 1.0"),
        (([1.0], [1.0], 1e4), {}, FloatingPointError, "log_inner must keep the linear domain .*, got 10000.0"),
    ],
)
def test_moving_average_refuses_bad_input(arguments: Any, options: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        moving_average_kl(*arguments, **{"temperature": 1.0, **options})
