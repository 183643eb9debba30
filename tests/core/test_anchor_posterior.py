"""The probability of each pair that it is right: the oracle's numbers, known mixtures, edges of share and slope."""

from __future__ import annotations

from typing import Any

import drrho_reference as oracle
import numpy as np
import pytest

from drrho_core import PosteriorWeights, pair_loss, posterior_anchor_weight


def drawn(seed: int, right: int, wrong: int, swapped: int = 60) -> tuple[np.ndarray, np.ndarray]:
    """Pair losses of right and wrong pairs, and of swapped pairs."""
    rng = np.random.default_rng(seed)
    losses = np.concatenate([rng.normal(-2.0, 1.0, size=right), rng.normal(1.0, 1.0, size=wrong)])
    return losses, rng.normal(1.0, 1.0, size=swapped)


@pytest.mark.parametrize("seed", [1, 2])
def test_weights_share_and_slope_are_the_oracles(eager_space: Any, seed: int) -> None:
    arrays = drawn(seed, 24, 12)
    expected = oracle.posterior_anchor_weight(*map(eager_space.rounded, arrays))
    actual = posterior_anchor_weight(*map(eager_space.asarray, arrays))
    for name, got, wanted in zip(PosteriorWeights._fields, actual, expected, strict=True):
        assert np.allclose(eager_space.to_numpy(got), wanted, rtol=0.0, atol=100 * eager_space.unit), name


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("slope", [0.5, 1.0, 3.0])
def test_share_and_slope_of_a_known_mixture_are_found(share: float, slope: float) -> None:
    # The ratio of two normal densities with standard deviation 1 / slope is an exponential tilt.
    rng = np.random.default_rng(4)
    n = 20_000
    is_right = np.arange(n) >= share * n
    losses = (np.where(is_right, -1.0, 1.0) + rng.normal(size=n)) / slope
    posterior = posterior_anchor_weight(losses, (1.0 + rng.normal(size=50_000)) / slope)
    assert float(posterior.swapped_share) == pytest.approx(share, abs=0.03)
    assert float(posterior.slope) == pytest.approx(2.0 * slope, rel=0.1)
    # If the estimated probability of pairs is about q, then about a share q of these pairs is right.
    right = posterior.anchor_weight * (1.0 - posterior.swapped_share)
    for low, high in ((0.1, 0.5), (0.5, 0.9), (0.9, 1.0)):
        chosen = (right >= low) & (right < high)
        assert np.mean(is_right[chosen]) == pytest.approx(np.mean(right[chosen]), abs=0.08)


def test_the_weighted_mean_of_any_function_is_that_of_the_right_pairs() -> None:
    losses, swapped = drawn(5, 15_000, 5_000, 40_000)
    weight = posterior_anchor_weight(losses, swapped).anchor_weight
    for values in (losses, losses**2, np.tanh(losses)):
        assert np.mean(weight * values) == pytest.approx(np.mean(values[:15_000]), abs=0.15)
        assert np.mean(values) != pytest.approx(np.mean(values[:15_000]), abs=0.3)


def test_a_reference_that_has_learnt_the_noise_needs_the_slope() -> None:
    # Scores that fit the noisy pairs exactly: r' = (1 - p) r + p for right pairs, and p for swapped pairs.
    share, n = 0.3, 10_000
    # A random text matches the image with probability 1/50, so r is 50 for matching texts and 0 for others.
    noisy = np.log((1.0 - share) * 50.0 + share)
    losses = np.where(np.arange(n) < (1.0 - share + share / 50.0) * n, -noisy, -np.log(share))
    swapped = np.where(np.arange(n) < n / 50.0, -noisy, -np.log(share))
    # A slope of 1 finds no swapped pair: the derivative of the likelihood in the share is 0 at share 0.
    assert np.mean(np.exp(losses)) == pytest.approx(1.0, abs=1e-9)
    posterior = posterior_anchor_weight(losses, swapped)
    assert float(posterior.swapped_share) == pytest.approx(share, abs=0.01)
    assert float(posterior.slope) > 2.0


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize(
    ("losses", "swapped"),
    [
        ([0.0, 0.0, 0.0], [0.0, 0.0]),
        ([1.0], [2.0]),
        ([-5.0, -6.0, -7.0], [3.0, 4.0]),
        ([5.0, 6.0, 7.0], [1.0, 2.0]),
        ([900.0, 901.0], [900.0, 905.0]),
        ([np.inf, -np.inf, 3.0], [np.inf, -np.inf]),
    ],
)
def test_every_finite_loss_gives_finite_weights(dtype: str, losses: list[float], swapped: list[float]) -> None:
    # inf stands for the largest number of the dtype.
    largest = np.finfo(dtype).max
    arrays = [np.nan_to_num(np.asarray(values, dtype=dtype), posinf=largest) for values in (losses, swapped)]
    with np.errstate(all="raise", under="ignore"):
        posterior = posterior_anchor_weight(*arrays)
    assert posterior.anchor_weight.dtype == np.dtype("float32" if dtype == "float16" else dtype)
    assert all(np.all(np.isfinite(field)) for field in posterior)
    assert np.mean(posterior.anchor_weight) == pytest.approx(1.0, rel=1e-6)
    assert 0.0 <= posterior.swapped_share <= 1.0


def test_pairs_that_all_fit_keep_equal_weights() -> None:
    posterior = posterior_anchor_weight(np.linspace(-9.0, -7.0, 100), np.linspace(0.0, 4.0, 400))
    assert float(posterior.swapped_share) == 0.0
    assert np.allclose(posterior.anchor_weight, 1.0)


def test_pairs_that_fit_worse_than_swapped_pairs_keep_about_equal_weights() -> None:
    posterior = posterior_anchor_weight(np.linspace(2.0, 4.0, 100), np.linspace(0.0, 4.0, 400))
    assert float(posterior.swapped_share) == 1.0
    assert np.allclose(posterior.anchor_weight, 1.0, atol=0.1)


def test_a_single_pair_below_all_swapped_pairs_does_not_take_the_whole_weight() -> None:
    losses, swapped = drawn(7, 30, 10, 100)
    losses[0] = np.min(swapped) - 1.0
    assert np.max(posterior_anchor_weight(losses, swapped).anchor_weight) < 2.0


def test_swapped_pairs_of_features_are_found() -> None:
    rng = np.random.default_rng(8)
    images, texts = rng.normal(size=(1000, 8)) + 0.3 * rng.normal(size=(2, 1000, 8))
    texts[:400] = texts[:400][::-1]
    images, texts = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (images, texts))
    losses, swapped = (pair_loss(images, np.roll(texts, shift, axis=0), temperature=0.1) for shift in (0, 450))
    posterior = posterior_anchor_weight(losses, swapped)
    assert float(posterior.swapped_share) == pytest.approx(0.4, abs=0.03)
    assert np.max(np.quantile(posterior.anchor_weight[:400], 0.9)) < 0.1


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([[1.0]], np.ones(2)), TypeError, "pair_loss must be an array, got list"),
        ((np.ones((2, 2)), np.ones(2)), ValueError, r"pair_loss must have 1 axes \(num_pairs,\), got shape \(2, 2\)"),
        ((np.ones(2), np.ones(0)), ValueError, r"swapped_pair_loss must hold at least 1 entry, got shape \(0,\)"),
        ((np.ones(2), np.asarray([np.nan])), ValueError, "swapped_pair_loss must be finite, got nan"),
        ((np.asarray([1, 2]), np.ones(2)), TypeError, "pair_loss must have a real floating dtype, got int64"),
        ((np.ones(2), np.ones(2, dtype="float32")), TypeError, "swapped_pair_loss must have"),
    ],
)
def test_bad_losses_are_refused(arguments: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=f"^{message}"):
        posterior_anchor_weight(*arguments)
