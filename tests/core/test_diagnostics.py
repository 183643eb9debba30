"""Diagnostics: identities, and the bias of mini-batches against all mini-batches one by one."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from drrho_core import (
    ChiSquareBall,
    effective_sample_size,
    excess_variance,
    generalization_bound,
    log_mean_exp_bias,
    worst_case,
)

# ---------------------------------------------------------------------------------------------------------------------
# Variance
# ---------------------------------------------------------------------------------------------------------------------


def draw(seed: int = 0, shape: tuple[int, ...] = (5, 7)) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.normal(size=shape), rng.normal(size=shape), rng.uniform(size=shape) < 0.7


def test_variances_of_a_matrix_with_a_mask(space: Any) -> None:
    loss, reference, where = draw()
    where[2] = False  # an anchor without any pair
    got = space.run(
        lambda a, b, w: excess_variance(a, b, reference_weight=0.5, where=w),
        *(space.asarray(x) for x in (np.where(where, loss, np.nan), reference, where)),
    )
    x = loss - 0.5 * reference
    rows = [row[mask] for row, mask in zip(x, where, strict=True) if mask.any()]
    counts = [len(row) for row in rows]
    within = np.average([np.var(row) for row in rows], weights=counts)
    for value, wanted in zip(got, (np.var(x[where]), within, np.var(x[where]) - within), strict=True):
        assert float(value) == pytest.approx(float(wanted), abs=4 * space.unit)


def test_a_vector_is_one_anchor_and_an_offset_costs_no_digits() -> None:
    loss, reference, _ = draw(1, (9,))
    got = excess_variance(loss + 1e8, reference)
    assert got.over_pairs == pytest.approx(np.var(loss + 1e8 - reference), rel=1e-14)
    assert got.within_anchors == pytest.approx(got.over_pairs, rel=1e-14)
    assert got.between_anchors == pytest.approx(0, abs=1e-16)
    plain = excess_variance(loss, reference, reference_weight=0)
    assert plain.over_pairs == pytest.approx(np.var(loss), rel=1e-14)


@pytest.mark.parametrize(
    ("arrays", "options", "error", "message"),
    [
        ((np.ones((2, 2, 2)), np.ones((2, 2, 2))), {}, ValueError, r"loss must have shape .* or .*got \(2, 2, 2\)"),
        ((np.ones((0, 2)), np.ones((0, 2))), {}, ValueError, r"hold a pair, got \(0, 2\)"),
        ((np.ones(2), np.ones(3)), {}, ValueError, "reference_loss must have shape"),
        ((np.ones(2), np.array([np.nan, 1])), {}, ValueError, "reference_loss must be finite, got nan at position 0"),
        ((np.ones(2), np.ones(2)), {"where": np.zeros(2, bool)}, ValueError, "where must mark at least one pair"),
        ((np.ones(2), np.ones(2)), {"where": np.ones(2)}, TypeError, "where must have dtype bool"),
        ((np.ones(2), np.ones(2)), {"reference_weight": -1}, ValueError, "reference_weight must be >= 0, got -1"),
    ],
)  # fmt: skip
def test_bad_losses_have_no_variance(arrays: Any, options: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        excess_variance(*arrays, **options)


# ---------------------------------------------------------------------------------------------------------------------
# Effective sample size, bound
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_effective_sample_size(space: Any, axis: int) -> None:
    p = np.abs(draw(2, (4, 5))[0])
    p = space.rounded(p / p.sum(axis=axis, keepdims=True))
    got = space.to_numpy(space.run(effective_sample_size, space.asarray(p), axis=axis))
    np.testing.assert_allclose(got, 1 / np.sum(p**2, axis=axis), rtol=2 * space.unit)


def test_a_chi_square_radius_bounds_the_effective_sample_size_from_below() -> None:
    weights = worst_case(draw(3, (50,))[0], ChiSquareBall(0.3)).weights
    assert effective_sample_size(weights) == pytest.approx(50 / (1 + 2 * 0.3), rel=1e-9)


def test_effective_sample_size_of_half_types() -> None:
    got = effective_sample_size(np.full(1000, 1e-3, dtype=np.float16))
    assert got.dtype == np.float32
    assert got == pytest.approx(1000, rel=2e-3)


@pytest.mark.parametrize(
    ("weights", "axis", "error", "message"),
    [
        (np.array([0.5, 0.6]), -1, ValueError, r"weights, summed along axis, must be 1, got 1\.1"),
        (np.array([1.5, -0.5]), -1, ValueError, r"weights must be >= 0, got -0\.5 at position 1"),
        (np.array([np.nan, 0.5]), -1, ValueError, "weights must be >= 0, got nan"),
        (np.ones(2, int), -1, TypeError, "weights must have a real floating dtype"),
        (np.ones((1, 0)), 1, ValueError, "weights must have at least one entry along axis 1"),
        (np.ones(2), 1, ValueError, "axis must be an axis of weights"),
        ([1.0], 0, TypeError, "weights must be an array, got list"),
    ],
)
def test_bad_weights_get_one_clear_error(weights: Any, axis: int, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        effective_sample_size(weights, axis=axis)


def test_the_bound(space: Any) -> None:
    risk, variance = np.array([[0.8, 0.3], [0.4, 0.9]]), np.array([[0.0, 0.08], [0.02, 0.0]])
    here = [space.asarray(x) for x in (risk, variance, np.asarray(0.25, dtype=space.dtype_name))]
    got = space.run(
        lambda r, v, radius: generalization_bound(r, v, radius=radius, num_samples=10, c1=2.0, c2=0.7), *here
    )
    # 0.8; 0.3 + 2 sqrt(0.5 * 0.08) = 0.7; 0.4 + 2 sqrt(0.5 * 0.02) = 0.6; 0.9
    assert float(got) == pytest.approx(0.6 + 0.07, rel=space.unit)
    got = space.run(generalization_bound, *here[:2], radius=0.0, num_samples=1)
    assert float(got) == pytest.approx(0.3, rel=space.unit)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"risk": np.array([np.inf])}, ValueError, "risk must be finite, got inf"),
        ({"risk": np.array([1])}, TypeError, "risk must have a real floating dtype"),
        ({"risk": np.zeros(0), "variance": np.zeros(0)}, ValueError, "risk must hold at least one candidate"),
        ({"variance": np.array([-1.0])}, ValueError, r"variance must be finite and >= 0, got -1\.0"),
        ({"variance": np.ones(2)}, ValueError, r"variance must have shape the shape of risk = \(1,\), got \(2,\)"),
        ({"variance": np.ones(1, np.float32)}, TypeError, "variance must have the dtype of risk"),
        ({"radius": -1.0}, ValueError, r"radius must be >= 0, got -1\.0"),
        ({"c1": -1.0}, ValueError, r"c1 must be >= 0, got -1\.0"),
        ({"c2": np.nan}, ValueError, "c2 must be finite, got nan"),
        ({"num_samples": 0}, ValueError, "num_samples must be at least 1, got 0"),
    ],
)  # fmt: skip
def test_bad_arguments_have_no_bound(change: dict[str, Any], error: Any, message: str) -> None:
    given = {"risk": np.ones(1), "variance": np.ones(1), "radius": 1.0, "num_samples": 2, **change}
    with pytest.raises(error, match=message):
        generalization_bound(given.pop("risk"), given.pop("variance"), **given)


# ---------------------------------------------------------------------------------------------------------------------
# Bias of mini-batches
# ---------------------------------------------------------------------------------------------------------------------


def log_mean_exp(x: Any, t: float) -> float:
    return float(t * np.log(np.mean(np.exp(np.asarray(x) / t))))


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_over_all_orders_it_is_the_bias_over_all_batches(batch_size: int) -> None:
    losses, t = np.array([0.3, -1.2, 2.0, 0.1, -0.4, 1.1]), 0.7
    orders = np.array(list(itertools.permutations(losses)))
    measured = np.mean(log_mean_exp_bias(orders, batch_size=batch_size, temperature=t).measured)
    batches = [log_mean_exp(batch, t) for batch in itertools.combinations(losses, batch_size)]
    assert measured == pytest.approx(np.mean(batches) - log_mean_exp(losses, t), rel=1e-12)


def test_the_prediction_is_the_first_order() -> None:
    losses = np.array([0.3, -1.2, 2.0, 0.1, -0.4, 1.1])
    orders = np.array(list(itertools.permutations(losses)))
    for t, within in ((10.0, 0.1), (100.0, 0.01), (1000.0, 0.001)):
        bias = log_mean_exp_bias(orders, batch_size=2, temperature=t)
        assert np.mean(bias.measured) / np.mean(bias.predicted) == pytest.approx(1, abs=within)
    p = np.exp(losses) / np.sum(np.exp(losses))
    wanted = -0.5 * (6 / float(effective_sample_size(p)) - 1) * (6 / 2 - 1) / 5
    assert log_mean_exp_bias(losses, batch_size=2).predicted == pytest.approx(wanted, rel=1e-13)


def test_the_rest_that_fills_no_batch_is_left_out(space: Any) -> None:
    losses = space.rounded(draw(4, (3, 7, 2))[0])
    got = space.run(log_mean_exp_bias, space.asarray(losses), batch_size=3, axis=1, temperature=0.5)
    wanted = log_mean_exp_bias(np.moveaxis(losses, 1, 2)[..., :6], batch_size=3, temperature=0.5)
    for one, other in zip(got, wanted, strict=True):
        np.testing.assert_allclose(space.to_numpy(one), other, atol=10 * space.unit)


def test_one_batch_of_all_has_no_bias_and_nothing_overflows() -> None:
    losses = 1e4 + 1e3 * draw(5, (8,))[0]
    bias = log_mean_exp_bias(losses, batch_size=8, temperature=np.asarray(0.1))
    assert bias.measured == bias.predicted == 0
    bias = log_mean_exp_bias(losses.astype(np.float32), batch_size=2)
    assert np.isfinite(bias.measured)
    assert bias.predicted == pytest.approx(-0.5 * 7 * 3 / 7, rel=1e-6)  # one sample carries all


@pytest.mark.parametrize(
    ("losses", "options", "error", "message"),
    [
        (np.ones(3), {"batch_size": 4}, ValueError, "batch_size must be at most the number of samples 3, got 4"),
        (np.ones(3), {"batch_size": 0}, ValueError, "batch_size must be at least 1, got 0"),
        (np.ones(1), {"batch_size": 1}, ValueError, "losses must have at least 2 entries along axis -1"),
        (np.ones(2), {"batch_size": 1, "temperature": 0.0}, ValueError, r"temperature must be > 0, got 0\.0"),
        (np.ones(2), {"batch_size": 1, "axis": 1}, ValueError, "axis must be an axis of losses"),
        (np.array([np.nan, 1]), {"batch_size": 1}, ValueError, "losses must be finite, got nan"),
        (np.ones(2, int), {"batch_size": 1}, TypeError, "losses must have a real floating dtype"),
    ],
)
def test_bad_losses_have_no_bias(losses: Any, options: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        log_mean_exp_bias(losses, **options)
