"""Excess losses and the DRRho risk of the oracle."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from drrho_reference import ChiSquareBall, CVaR, KLPenalty, drrho_risk, excess_loss, worst_case


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
