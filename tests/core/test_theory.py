"""Theory tools: identities, all mini-batches one by one, SciPy's fits, and the published scaling laws from noise."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import scipy.optimize

from drrho_core import (
    ChiSquareBall,
    effective_sample_size,
    excess_variance,
    fit_scaling_law,
    generalization_bound,
    log_mean_exp_bias,
    worst_case,
)


def thin(space: Any) -> None:
    """JAX compiles every operation that is not jitted: one dtype of it is enough."""
    if space.name == "jax" and space.jit is None and space.dtype_name == "float32":
        pytest.skip("JAX without jit is met in float64")


# ---------------------------------------------------------------------------------------------------------------------
# Variance
# ---------------------------------------------------------------------------------------------------------------------


def draw(seed: int = 0, shape: tuple[int, ...] = (5, 7)) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.normal(size=shape), rng.normal(size=shape), rng.uniform(size=shape) < 0.7


def test_variances_of_a_matrix_with_a_mask(space: Any) -> None:
    thin(space)
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
        ((np.ones(2), np.ones(2)), {"reference_weight": -1}, ValueError, "reference_weight must be at least 0, got -1"),
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
    thin(space)
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
    thin(space)
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
    thin(space)
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


# ---------------------------------------------------------------------------------------------------------------------
# Scaling law
# ---------------------------------------------------------------------------------------------------------------------

COMPUTE = np.geomspace(2e8, 6e10, 9)


def noisy(prefactor: float, exponent: float, seed: int, noise: float, floor: float = 0.0) -> np.ndarray:
    factors = np.exp(noise * np.random.default_rng(seed).normal(size=COMPUTE.size))
    return (floor + prefactor * COMPUTE**-exponent) * factors


def inside(value: float, interval: Any) -> bool:
    return float(interval[0]) <= value <= float(interval[1])


@pytest.mark.parametrize(("prefactor", "exponent"), [(5.77, 0.116), (7.15, 0.127)])
def test_the_published_laws_come_back_from_noise(prefactor: float, exponent: float) -> None:
    held = []
    for seed in range(40):
        law = fit_scaling_law(COMPUTE, noisy(prefactor, exponent, seed, 0.01), num_resamples=300)
        held.append(inside(exponent, law.exponent_interval) and inside(prefactor, law.prefactor_interval))
        assert abs(law.exponent - exponent) < 0.01
        assert law.floor == law.floor_interval[0] == law.floor_interval[1] == 0
    assert held[0]
    assert sum(held) >= 33  # of 40, nominally 38; small samples make the percentiles a little narrow


def test_a_line_is_polyfits(eager_space: Any) -> None:
    thin(eager_space)
    error = noisy(5.77, 0.116, 3, 0.05)
    compute, error = eager_space.rounded(COMPUTE), eager_space.rounded(error)
    law = fit_scaling_law(eager_space.asarray(compute), eager_space.asarray(error), num_resamples=50, seed=4)
    slope, level = np.polyfit(np.log(compute), np.log(error), 1)
    unit = 100 * eager_space.unit
    assert float(law.exponent) == pytest.approx(-slope, rel=unit)
    assert float(law.prefactor) == pytest.approx(np.exp(level), rel=unit)
    residuals = np.log(error) - level - slope * np.log(compute)
    assert float(law.residual) == pytest.approx(np.sqrt(np.mean(residuals**2)), rel=unit)
    same = fit_scaling_law(compute, error, num_resamples=50, seed=4)
    for name in ("prefactor_interval", "exponent_interval"):
        got, wanted = ([float(end) for end in getattr(one, name)] for one in (law, same))
        assert got == pytest.approx(wanted, rel=unit)


def test_intervals_are_those_of_a_residual_bootstrap() -> None:
    error = noisy(5.77, 0.116, 5, 0.05)
    law = fit_scaling_law(COMPUTE, error, num_resamples=4000, confidence=0.9)
    x = np.log(COMPUTE)
    slope, level = np.polyfit(x, np.log(error), 1)
    residuals = (np.log(error) - level - slope * x) * np.sqrt(9 / 7)
    rng = np.random.default_rng(0)
    draws = [np.polyfit(x, level + slope * x + rng.choice(residuals, 9), 1)[0] for _ in range(4000)]
    width = np.diff(np.quantile(draws, [0.05, 0.95]))[0]
    np.testing.assert_allclose([float(end) for end in law.exponent_interval], -np.quantile(draws, [0.95, 0.05]),
                               atol=0.03 * width)  # fmt: skip
    assert float(law.exponent_interval[1] - law.exponent_interval[0]) == pytest.approx(width, rel=0.04)
    assert float(law.exponent_interval[0]) < float(law.exponent) < float(law.exponent_interval[1])


@pytest.mark.parametrize(("floor", "noise"), [(0.1, 0.0), (0.2, 0.01), (0.0, 0.02), (0.05, 0.03)])
def test_the_floor_is_scipys(floor: float, noise: float) -> None:
    error = noisy(200.0, 0.35, 2, noise, floor)
    law = fit_scaling_law(COMPUTE, error, with_floor=True, num_resamples=2)

    def residual(z: np.ndarray) -> np.ndarray:
        return np.log(z[2] + np.exp(z[0] - z[1] * np.log(COMPUTE))) - np.log(error)

    fits = [
        scipy.optimize.least_squares(
            residual, [5.0, 0.3, start * error.min()], bounds=([-50, -5, 0], [50, 5, error.min()]),
            x_scale=[1, 0.1, 0.1], xtol=1e-15, ftol=1e-15, gtol=1e-15,
        )
        for start in (0.1, 0.5, 0.9)
    ]  # fmt: skip
    best = min(fits, key=lambda fit: fit.cost)
    mine = residual(np.array([np.log(law.prefactor), law.exponent, law.floor]))
    assert np.sum(mine**2) <= 2 * best.cost + 1e-14 + 1e-9 * best.cost
    assert law.residual == pytest.approx(np.sqrt(np.mean(mine**2)), abs=1e-9)
    assert float(law.floor) == pytest.approx(best.x[2], abs=2e-5)
    if noise == 0:
        assert [float(x) for x in law[:3]] == pytest.approx([200.0, 0.35, 0.1], rel=1e-5)


def test_a_floor_comes_back_from_noise_within_its_interval(eager_space: Any) -> None:
    if eager_space.name == "jax" or eager_space.dtype_name == "float32":
        pytest.skip("a floor needs float64, as the docstring says; JAX compiles every operation, and a line has most")
    arrays = [eager_space.asarray(x) for x in (COMPUTE, noisy(200.0, 0.35, 1, 0.01, 0.1))]
    law = fit_scaling_law(*arrays, with_floor=True, num_resamples=60)
    assert inside(0.1, law.floor_interval)
    assert inside(200.0, law.prefactor_interval)
    assert inside(0.35, law.exponent_interval)
    assert float(law.floor_interval[0]) >= 0
    assert float(law.floor) < float(np.min(eager_space.to_numpy(arrays[1])))


def test_it_says_which_points_were_fitted() -> None:
    error = noisy(5.77, 0.116, 6, 0.02)
    where = COMPUTE > 1e9
    error[~where] = np.nan
    law = fit_scaling_law(COMPUTE, error, where=where, num_resamples=20)
    assert law.fitted.tolist() == where.tolist()
    assert law[:-1] == fit_scaling_law(COMPUTE[where], error[where], num_resamples=20)[:-1]
    assert fit_scaling_law(COMPUTE, noisy(1, 0.1, 0, 0.1), num_resamples=2).fitted.tolist() == [True] * 9


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"compute": np.array([1.0, 0.0, 2.0])}, ValueError, r"compute must be finite and > 0, got 0\.0 at position 1"),
        ({"error": np.array([1.0, 2.0, np.nan])}, ValueError, "error must be finite and > 0, got nan at position 2"),
        ({"compute": np.ones(3)}, ValueError, "compute must have at least two different values"),
        ({"compute": np.ones(2), "error": np.ones(2)}, ValueError, "compute must have at least 3 points to fit, got 2"),
        ({"with_floor": True}, ValueError, "compute must have at least 4 points to fit, got 3"),
        ({"where": np.array([True, True, False])}, ValueError, "compute must have at least 3 points to fit, got 2"),
        ({"where": np.ones(3)}, TypeError, "where must have dtype bool"),
        ({"compute": np.ones((3, 1))}, ValueError, r"compute must have 1 axes \(num_points,\)"),
        ({"error": np.ones(4)}, ValueError, "error must have shape"),
        ({"error": np.ones(3, int)}, TypeError, "error must have a real floating dtype"),
        ({"error": np.ones(3, np.float32)}, TypeError, "error must have the dtype of compute"),
        ({"with_floor": 1}, TypeError, "with_floor must be True or False, got 1"),
        ({"confidence": 1.0}, ValueError, r"confidence must be in \(0, 1\), got 1\.0"),
        ({"num_resamples": 1}, ValueError, "num_resamples must be at least 2, got 1"),
        ({"seed": -1}, ValueError, "seed must be at least 0, got -1"),
        ({"error": [1.0]}, TypeError, "error must be an array, got list"),
    ],
)  # fmt: skip
def test_bad_points_get_one_clear_error(change: dict[str, Any], error: Any, message: str) -> None:
    given = {"compute": np.array([1.0, 2.0, 3.0]), "error": np.array([3.0, 2.0, 1.5]), **change}
    with pytest.raises(error, match=message):
        fit_scaling_law(given.pop("compute"), given.pop("error"), **given)
