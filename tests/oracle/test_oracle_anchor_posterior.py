"""The oracle's probability that a pair is right: small numbers by hand, the likelihood, and refused input."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from drrho_reference import posterior_anchor_weight
from scipy import optimize


def drawn(seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return np.concatenate([rng.normal(-2.0, 1.0, 24), rng.normal(1.0, 1.0, 12)]), rng.normal(1.0, 1.0, 60)


def likelihood(losses: np.ndarray, swapped: np.ndarray, share: float, slope: float) -> float:
    b = len(losses)
    normaliser = (1 - 1 / b) * np.mean(np.exp(-slope * swapped)) + np.mean(np.exp(-slope * losses)) / b
    return float(np.sum(np.log((1 - share) * np.exp(-slope * losses) / normaliser + share)))


@pytest.mark.parametrize("seed", [1, 2, 3, 4])
def test_share_and_slope_have_the_largest_likelihood(seed: int) -> None:
    losses, swapped = drawn(seed)
    posterior = posterior_anchor_weight(losses, swapped)
    here = likelihood(losses, swapped, posterior.swapped_share, posterior.slope)
    best = optimize.minimize(
        lambda at: -likelihood(losses, swapped, at[0], at[1]), [0.5, 1.0], bounds=[(1e-6, 1 - 1e-6), (0.1, 10.0)]
    )
    assert here >= -best.fun - 1e-9
    assert [posterior.swapped_share, posterior.slope] == pytest.approx(best.x.tolist(), rel=1e-3)


def test_two_values_by_hand() -> None:
    # Losses are 0 or 1. With the slope s and x = exp(-s), random texts have the mean Z = m + (1 - m) x, where m is the
    # share of zeros among random texts: (1 - 1/4) * 1/3 + 1/4 * 3/4 = 7/16. The likelihood can give the four pairs
    # their own frequencies, three quarters of zeros, and has many maxima; EM stops at one of them.
    posterior = posterior_anchor_weight([0.0, 0.0, 0.0, 1.0], [0.0, 1.0, 1.0])
    p, x = posterior.swapped_share, math.exp(-posterior.slope)
    Z = 7 / 16 + 9 / 16 * x
    assert 7 / 16 * ((1 - p) / Z + p) == pytest.approx(3 / 4, abs=1e-12)
    right = np.array([(1 - p) / Z / ((1 - p) / Z + p), (1 - p) * x / Z / ((1 - p) * x / Z + p)])
    np.testing.assert_allclose(posterior.anchor_weight, right[[0, 0, 0, 1]] / (1 - p), atol=1e-12)


def test_the_mean_weight_is_1_and_the_mean_probability_is_the_share_of_right_pairs() -> None:
    losses, swapped = drawn(9)
    posterior = posterior_anchor_weight(losses, swapped)
    assert posterior.anchor_weight.mean() == pytest.approx(1.0, abs=1e-15)
    b, slope, p = len(losses), posterior.slope, posterior.swapped_share
    normaliser = (1 - 1 / b) * np.mean(np.exp(-slope * swapped)) + np.mean(np.exp(-slope * losses)) / b
    r = np.exp(-slope * losses) / normaliser
    right = (1 - p) * r / ((1 - p) * r + p)
    assert right.mean() == pytest.approx(1 - p, abs=1e-13)
    np.testing.assert_allclose(posterior.anchor_weight, right / right.mean(), atol=1e-12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], [1.0]), r"pair_loss must have one axis that is not empty, got the shape \(0,\)"),
        (([1.0], [[1.0]]), r"swapped_pair_loss must have one axis that is not empty, got the shape \(1, 1\)"),
        (([math.inf], [1.0]), "pair_loss must be finite, got inf"),
    ],
)
def test_bad_losses_are_refused(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        posterior_anchor_weight(*arguments)
