"""The theory tools of the oracle: worked by hand, mpmath, SciPy, brute force."""

from __future__ import annotations

import math
from itertools import permutations
from typing import Any

import mpmath as mp
import numpy as np
import pytest
from drrho_reference import (
    ChiSquareBall,
    effective_sample_size,
    excess_variance,
    expected_log_mean_exp_bias,
    fit_scaling_law,
    generalization_bound,
    log_mean_exp_bias,
    worst_case,
)
from scipy.optimize import least_squares

# ---------------------------------------------------------------------------------------------------------------------
# Variance and effective sample size
# ---------------------------------------------------------------------------------------------------------------------


def test_variances_by_hand() -> None:
    # l: mean 2, squares 4 + 1 + 9 = 14 over 3. l - 2 r: 2, 1, -1 with mean 2/3: 16/9 + 1/9 + 25/9 = 42/9 over 3.
    loss, reference = [0.0, 1.0, 5.0], [-1.0, 0.0, 3.0]
    assert excess_variance(loss, reference, reference_weight=2.0) == pytest.approx((14 / 9, 14 / 9, 0.0), abs=1e-15)
    assert excess_variance(loss, reference, reference_weight=0.0) == pytest.approx((14 / 3, 14 / 3, 0.0), abs=1e-15)
    assert excess_variance(loss, loss) == (0.0, 0.0, 0.0)


def test_variances_of_pairs_read_the_negatives_only() -> None:
    # Off the diagonal 1, 3, 2, 6 minus 1, 1, 1, 3: 0, 2 and 1, 3. Means 1 and 2, of all 3/2.
    loss = np.array([[np.nan, 1.0, 3.0], [2.0, np.inf, 6.0], [np.nan] * 3])
    reference = np.array([[0.0, 1.0, 1.0], [1.0, np.nan, 3.0], [0.0] * 3])
    result = excess_variance(loss, reference, where=np.isfinite(loss))
    assert result == pytest.approx((5 / 4, 1.0, 1 / 4), abs=1e-15)
    # Anchors with 1 and 3 pairs: 4 and 0, 2, 4. Means 4 and 2, of all 5/2; within 8/4, between (9/4 + 3/4)/4.
    where = np.array([[True, False, False], [True, True, True]])
    result = excess_variance([[4.0, 9.0, 9.0], [0.0, 2.0, 4.0]], np.zeros((2, 3)), where=where)
    assert result == pytest.approx((11 / 4, 2.0, 3 / 4), abs=1e-15)


def test_variance_of_pairs_is_that_between_anchors_and_that_within() -> None:
    # The law of total variance: what the paper measures over pairs and over anchors.
    rng = np.random.default_rng(1)
    loss, reference = rng.normal(size=(2, 5, 7)) + 4.0
    pairs = excess_variance(loss, reference)
    assert pairs.over_pairs == pytest.approx(pairs.within_anchors + pairs.between_anchors, abs=1e-14)
    assert pairs.between_anchors == pytest.approx(np.var((loss - reference).mean(axis=1)), abs=1e-14)
    assert pairs.within_anchors == pytest.approx(np.mean(np.var(loss - reference, axis=1)), abs=1e-14)


def test_effective_sample_size_by_hand() -> None:
    weights = [[0.5, 0.5, 0.0], [0.0, 1.0, 0.0], [0.6, 0.2, 0.2]]
    np.testing.assert_allclose(effective_sample_size(weights), [2.0, 1.0, 1 / 0.44])
    np.testing.assert_allclose(effective_sample_size(np.transpose(weights), axis=0), [2.0, 1.0, 1 / 0.44])
    assert float(effective_sample_size(np.full(7, 1 / 7))) == pytest.approx(7.0)


def test_effective_sample_size_of_a_chi_square_ball() -> None:
    # On its sphere D = (n sum p^2 - 1)/2 = radius, so the size is n / (1 + 2 radius), whatever the losses.
    losses = np.random.default_rng(2).normal(size=8)
    weights = worst_case(losses, ChiSquareBall(0.3)).weights
    assert float(effective_sample_size(weights)) == pytest.approx(8 / 1.6, rel=1e-12)


# ---------------------------------------------------------------------------------------------------------------------
# Bias of the mini-batch
# ---------------------------------------------------------------------------------------------------------------------


def test_bias_by_hand() -> None:
    # exp(x / 2) = 1, 2, 6, mean 3. Pairs have the means 3/2, 7/2, 4, so the bias is 2 (log(21) / 3 - log 3).
    losses = 2 * np.log([1.0, 2.0, 6.0])
    bias = expected_log_mean_exp_bias(losses, temperature=2.0, batch_size=2)
    assert bias == pytest.approx(2 * (math.log(21) / 3 - math.log(3)), abs=1e-15)
    # One at a time: the mean of the losses minus the risk.
    bias = expected_log_mean_exp_bias(losses, temperature=2.0, batch_size=1)
    assert bias == pytest.approx(2 * (math.log(12) / 3 - math.log(3)), abs=1e-15)


def test_bias_shrinks_with_the_batch_and_is_gone_with_all() -> None:
    losses = np.random.default_rng(3).normal(size=7)
    bias = [expected_log_mean_exp_bias(losses, temperature=0.3, batch_size=b) for b in range(1, 8)]
    assert np.all(np.diff(bias) > 0.0)
    assert bias[-1] == pytest.approx(0.0, abs=1e-15)
    assert expected_log_mean_exp_bias([2.0] * 4, temperature=0.3, batch_size=2) == pytest.approx(0.0, abs=1e-15)


def test_bias_of_a_warm_risk_is_that_of_second_order() -> None:
    # tau -> inf: -(tau / 2) var(exp(x/tau)) / mean^2 / b * (n - b)/(n - 1), the variance of a mean drawn without
    # replacement, and the next order is 1 / tau smaller.
    losses = np.random.default_rng(4).normal(size=8)
    for b in (1, 3, 6):
        e = np.exp(losses / 1e3)
        expected = -500.0 * e.var() / e.mean() ** 2 / b * (8 - b) / 7
        assert expected_log_mean_exp_bias(losses, temperature=1e3, batch_size=b) == pytest.approx(expected, rel=2e-2)


def test_bias_of_one_batch_after_another_by_hand() -> None:
    # exp(x / 2) = 1, 3 | 2, 6 | 9 (left over): means 2, 4 and 3 of the four.
    losses = 2 * np.log([1.0, 3.0, 2.0, 6.0, 9.0])
    bias = log_mean_exp_bias(losses, temperature=2.0, batch_size=2)
    assert float(bias.measured) == pytest.approx(math.log(2) + math.log(4) - 2 * math.log(3), abs=1e-15)
    # p = (1, 3, 2, 6) / 12, so 1 / E = 50/144: -(2/2) (4 * 50/144 - 1) (4/2 - 1) / 3.
    assert float(bias.predicted) == pytest.approx(-(200 / 144 - 1) / 3, abs=1e-15)


def test_bias_over_all_orders_is_the_expected_one() -> None:
    losses = np.random.default_rng(11).normal(size=5)
    orders = np.array([losses[list(order)] for order in permutations(range(5), 4)])
    for b in (1, 2):
        four = [log_mean_exp_bias(order, temperature=0.7, batch_size=b).measured for order in orders]
        wanted = [expected_log_mean_exp_bias(order, temperature=0.7, batch_size=b) for order in orders]
        assert np.mean(four) == pytest.approx(np.mean(wanted), abs=1e-14)
    whole = log_mean_exp_bias(orders, temperature=0.7, batch_size=2)
    other = log_mean_exp_bias(orders.T, temperature=0.7, batch_size=2, axis=0)
    assert whole.measured.shape == (len(orders),)
    np.testing.assert_array_equal(whole.measured, other.measured)
    np.testing.assert_array_equal(whole.predicted, other.predicted)


def test_predicted_bias_is_the_one_of_second_order() -> None:
    losses = np.random.default_rng(12).normal(size=8)
    for b in (1, 2, 4, 8):
        exact = expected_log_mean_exp_bias(losses, temperature=1e3, batch_size=b)
        predicted = float(log_mean_exp_bias(losses, temperature=1e3, batch_size=b).predicted)
        assert predicted == pytest.approx(exact, rel=2e-2)


# ---------------------------------------------------------------------------------------------------------------------
# The bound
# ---------------------------------------------------------------------------------------------------------------------


def test_bound_by_hand() -> None:
    # 1 + 3 sqrt(2 * 1/8 * 4) = 4 and 2 + 3 sqrt(2 * 1/8 * 1/9) = 5/2, plus 10/20.
    bound = generalization_bound([1.0, 2.0], [4.0, 1 / 9], radius=1 / 8, num_samples=20, c1=3.0, c2=10.0)
    assert bound == pytest.approx(3.0, abs=1e-15)
    assert generalization_bound([1.0, 2.0], [4.0, 1 / 9], radius=0.0, num_samples=1, c1=3.0, c2=0.0) == 1.0


def test_bound_of_one_model_is_the_risk_of_the_ball() -> None:
    # Where no weight is clipped the chi-square ball adds exactly sqrt(2 radius var_n) to the mean.
    x = np.array([0.4, -0.1, 0.2, 0.3])
    variance = excess_variance(x + 1.0, np.ones(4)).over_pairs
    bound = generalization_bound([x.mean()], [variance], radius=0.05, num_samples=4)
    assert bound == pytest.approx(float(worst_case(x, ChiSquareBall(0.05)).risk), abs=1e-15)


# ---------------------------------------------------------------------------------------------------------------------
# The scaling law
# ---------------------------------------------------------------------------------------------------------------------

expected_bias = expected_log_mean_exp_bias
COMPUTE = np.logspace(9.0, 12.0, 10)
PUBLISHED = [(5.77, 0.116), (7.15, 0.127)]


def noisy(a: float, beta: float, noise: float, seed: int) -> np.ndarray:
    return a * COMPUTE**-beta * np.exp(noise * np.random.default_rng(seed).normal(size=10))


@pytest.mark.parametrize(("a", "beta"), PUBLISHED)
def test_published_laws_are_recovered_within_their_intervals(a: float, beta: float) -> None:
    law = fit_scaling_law(COMPUTE, noisy(a, beta, 0.02, seed=1), seed=2)
    for value, interval, truth in [
        (law.prefactor, law.prefactor_interval, a),
        (law.exponent, law.exponent_interval, beta),
    ]:
        assert interval[0] < value < interval[1]
        assert interval[0] < truth < interval[1]
    assert law.exponent_interval[1] - law.exponent_interval[0] < 0.02
    assert (law.floor, law.floor_interval) == (0.0, (0.0, 0.0))
    assert law.fitted.tolist() == [True] * 10


def test_intervals_cover_about_as_often_as_they_say() -> None:
    # 60 data sets: a bootstrap over ten points covers a little less than 95 %. Fewer than 45 has a chance below 1e-4
    # even at 90 %; all 60 would say that the intervals are far too wide.
    inside = 0
    for seed in range(60):
        low, high = fit_scaling_law(COMPUTE, noisy(7.15, 0.127, 0.05, seed), num_resamples=60).exponent_interval
        inside += low < 0.127 < high
    assert 45 <= inside < 60


def test_line_agrees_with_mpmath() -> None:
    error = noisy(5.77, 0.116, 0.1, seed=3)
    with mp.workdps(40):
        x, y = ([mp.log(mp.mpf(value)) for value in values] for values in (COMPUTE.tolist(), error.tolist()))
        n, sx, sy = len(x), mp.fsum(x), mp.fsum(y)
        slope = (n * mp.fdot(x, y) - sx * sy) / (n * mp.fdot(x, x) - sx**2)
        law = fit_scaling_law(COMPUTE, error, num_resamples=2)
        assert law.exponent == pytest.approx(float(-slope), rel=1e-12)
        assert law.prefactor == pytest.approx(float(mp.exp((sy - slope * sx) / n)), rel=1e-11)


def test_intervals_are_quantiles_of_refits_to_the_line_plus_its_residuals() -> None:
    # y = 0, -1, -1.5 at x = 0, 1, 2: the slope is -3/4, the residuals (-1, 2, -1)/12, wider by sqrt(3 / (3 - 2)). A
    # resample moves the slope by half the difference of its outer residuals: 0 with the chance 5/9, else 3/24 sqrt(3).
    C, e = np.array([1.0, math.e, math.e**2]), np.exp([0.0, -1.0, -1.5])
    move = 3 / 24 * math.sqrt(3)
    for confidence, low, high in ((0.9, -move, move), (0.5, 0.0, 0.0)):
        law = fit_scaling_law(C, e, num_resamples=2000, confidence=confidence, seed=4)
        assert law.exponent_interval == pytest.approx((0.75 + low, 0.75 + high), abs=1e-12)
        assert law.exponent == pytest.approx(0.75, abs=1e-15)
        assert law.residual == pytest.approx(math.sqrt(6 / 144 / 3), abs=1e-15)


def test_points_that_do_not_count_are_never_read() -> None:
    C, e = np.array([1.0, np.nan, 4.0, 16.0, -1.0]), np.array([8.0, 3.0, 4.0, 2.0, np.inf])
    where = np.array([True, False, True, True, False])
    law = fit_scaling_law(C, e, where=where, num_resamples=2)
    assert (law.prefactor, law.exponent) == pytest.approx((8.0, 0.5))
    assert law.fitted.tolist() == where.tolist()
    assert law[:-1] == fit_scaling_law(C[where], e[where], num_resamples=2)[:-1]


def test_intervals_depend_on_the_seed_alone() -> None:
    error = noisy(5.77, 0.116, 0.05, seed=5)
    assert fit_scaling_law(COMPUTE, error, seed=6)[:-1] == fit_scaling_law(COMPUTE, error, seed=6)[:-1]
    assert fit_scaling_law(COMPUTE, error, seed=6)[:-1] != fit_scaling_law(COMPUTE, error, seed=7)[:-1]


@pytest.mark.parametrize("floor", [0.0, 0.05, 0.12, 0.2])
def test_a_floor_is_found(floor: float) -> None:
    law = fit_scaling_law(COMPUTE, floor + 7.15 * COMPUTE**-0.127, with_floor=True, num_resamples=2)
    assert (law.floor, law.exponent, law.prefactor) == pytest.approx((floor, 0.127, 7.15), rel=1e-5, abs=1e-6)


def test_floor_agrees_with_scipy() -> None:
    error = 0.05 + 300.0 * COMPUTE**-0.35 * np.exp(0.01 * np.random.default_rng(8).normal(size=10))
    law = fit_scaling_law(COMPUTE, error, with_floor=True, num_resamples=10, seed=9)
    # In scaled parameters: C in units of 1e10.
    scaled = COMPUTE / 1e10
    expected = least_squares(
        lambda at: np.log(error) - np.log(at[2] + np.exp(at[0]) * scaled ** -at[1]),
        [0.0, 0.3, 0.01], bounds=([-np.inf, -np.inf, 0.0], [np.inf, np.inf, error.min()]),
        xtol=1e-14, ftol=1e-14, gtol=1e-14,
    ).x  # fmt: skip
    actual = (math.log(law.prefactor) - law.exponent * math.log(1e10), law.exponent, law.floor)
    assert actual == pytest.approx(tuple(expected), rel=1e-5)
    assert law.floor_interval[0] < law.floor < law.floor_interval[1]
    # The squares are those of the logarithm: the law beats its neighbours there.
    best = np.sum((np.log(error) - np.log(law.floor + law.prefactor * COMPUTE**-law.exponent)) ** 2)
    for change in (0.999, 1.001):
        for a, beta, e0 in [(change, 1, 1), (1, change, 1), (1, 1, change)]:
            model = e0 * law.floor + a * law.prefactor * COMPUTE ** -(beta * law.exponent)
            assert np.sum((np.log(error) - np.log(model)) ** 2) > best


def test_a_curve_that_bends_down_has_no_floor() -> None:
    error = np.exp(-0.05 * (np.arange(10.0) + 0.1 * np.arange(10.0) ** 2))
    law, line = (fit_scaling_law(COMPUTE, error, with_floor=f, num_resamples=2) for f in (True, False))
    assert law.floor == 0.0
    assert law[:2] == pytest.approx(line[:2], rel=1e-12)


def test_the_floor_stays_below_the_smallest_error() -> None:
    # A level curve and one lucky run far below it: the floor goes as high as it may.
    error = np.array([0.5, 0.4, 0.1, 0.3, 0.2, 0.22, 0.18, 0.201, 0.199, 0.2])
    law = fit_scaling_law(COMPUTE, error, with_floor=True, num_resamples=2)
    assert 0.1 * (1.0 - 1e-8) < law.floor < 0.1
    scaled = COMPUTE / 1e10
    expected = least_squares(
        lambda at: np.log(error) - np.log(law.floor + np.exp(at[0]) * scaled ** -at[1]), [-2.0, 0.1],
        xtol=1e-15, ftol=1e-15, gtol=1e-15,
    ).x  # fmt: skip
    actual = (math.log(law.prefactor) - law.exponent * math.log(1e10), law.exponent)
    assert actual == pytest.approx(tuple(expected), rel=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Errors
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: excess_variance([1.0], [1.0, 2.0]), ValueError, r"reference_loss must have the shape \(1,\)"),
        (lambda: excess_variance([1.0], [1.0], where=[False]), ValueError, "loss must have an entry that counts"),
        (lambda: excess_variance([1.0], [1.0], reference_weight=-1), ValueError, "reference_weight must be at least 0"),
        (lambda: excess_variance([np.nan], [1.0]), ValueError, "loss must be finite, got nan"),
        (lambda: excess_variance([[[1.0]]], [[[1.0]]]), ValueError, r"loss must have one or two axes, got .*1, 1, 1"),
        (lambda: effective_sample_size(1.0), ValueError, "weights must have at least one axis"),
        (lambda: effective_sample_size([0.5, -0.5]), ValueError, "weights must be at least 0, got -0.5"),
        (lambda: effective_sample_size([0.0, 0.0]), ValueError, "weights must have an entry above 0"),
        (lambda: effective_sample_size([1.0], axis=1), ValueError, r"axis must lie in \[-1, 0\], got 1"),
        (lambda: log_mean_exp_bias(1.0, batch_size=1), ValueError, "losses must have at least one axis"),
        (lambda: log_mean_exp_bias([1.0], batch_size=1), ValueError, "losses must have at least 2 entries along axis"),
        (lambda: log_mean_exp_bias([1.0] * 2, temperature=0.0, batch_size=1), ValueError, "temperature must be posit"),
        (lambda: log_mean_exp_bias([1.0] * 2, batch_size=3), ValueError, r"batch_size must lie in \[1, 2\], got 3"),
        (lambda: log_mean_exp_bias([1.0] * 2, batch_size=1, axis=1), ValueError, r"axis must lie in \[-1, 0\], got 1"),
        (lambda: log_mean_exp_bias([1e3, 0.0], batch_size=1), FloatingPointError, "temperature must keep"),
        (lambda: expected_bias([], temperature=1.0, batch_size=1), ValueError, "losses must have one axis"),
        (lambda: expected_bias([1.0], temperature=0.0, batch_size=1), ValueError, "temperature must be p"),
        (lambda: expected_bias([1.0], temperature=1.0, batch_size=2), ValueError, "batch_size must lie in"),
        (lambda: expected_bias([1e3], temperature=1.0, batch_size=1), FloatingPointError, "temperature must"),
        (lambda: expected_bias([-1e3], temperature=1.0, batch_size=1), FloatingPointError, "temperature m"),
    ],
)  # fmt: skip
def test_bad_input_is_refused(call: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"risk": []}, ValueError, "risk must have at least one entry"),
        ({"variance": [1.0, 2.0]}, ValueError, r"variance must have the shape \(1,\), got \(2,\)"),
        ({"variance": [-1.0]}, ValueError, "variance must be at least 0, got -1.0"),
        ({"radius": -1.0}, ValueError, "radius must be at least 0, got -1.0"),
        ({"num_samples": 0}, ValueError, "num_samples must be at least 1, got 0"),
        ({"num_samples": 1.0}, TypeError, "num_samples must be an integer, got 1.0"),
        ({"c1": -1.0}, ValueError, "c1 must be at least 0, got -1.0"),
        ({"c2": None}, TypeError, "c2 must be a real number, got None"),
    ],
)
def test_bound_refuses_bad_input(changes: dict[str, Any], error: Any, message: str) -> None:
    arguments: dict[str, Any] = {
        "risk": [1.0],
        "variance": [1.0],
        "radius": 0.1,
        "num_samples": 5,
        "c1": 1.0,
        "c2": 1.0,
    }
    arguments |= changes
    with pytest.raises(error, match=message):
        generalization_bound(arguments.pop("risk"), arguments.pop("variance"), **arguments)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"compute": [[1.0, 2.0, 3.0]]}, ValueError, "compute must have one axis"),
        ({"error": [1.0, 2.0]}, ValueError, r"error must have the shape \(3,\), got \(2,\)"),
        ({"compute": [0.0, 1.0, 2.0]}, ValueError, "compute must be positive, got 0.0"),
        ({"error": [1.0, -1.0, 2.0]}, ValueError, "error must be positive, got -1.0"),
        ({"compute": [2.0, 2.0, 2.0]}, ValueError, r"compute must have at least 2 different values, got \[2.0\]"),
        ({"with_floor": True}, ValueError, "compute must have at least 4 points to fit, got 3"),
        ({"where": [True, True, False]}, ValueError, "compute must have at least 3 points to fit, got 2"),
        ({"where": [1, 1, 1]}, TypeError, "where must be an array of bool"),
        ({"with_floor": 1}, TypeError, "with_floor must be True or False, got 1"),
        ({"confidence": 1.0}, ValueError, r"confidence must lie in \(0, 1\), got 1.0"),
        ({"num_resamples": 1}, ValueError, "num_resamples must be at least 2, got 1"),
        ({"seed": -1}, ValueError, "seed must be at least 0, got -1"),
    ],
)
def test_fit_refuses_bad_input(changes: dict[str, Any], error: Any, message: str) -> None:
    arguments: dict[str, Any] = {"compute": [1.0, 2.0, 3.0], "error": [3.0, 2.0, 1.0]} | changes
    with pytest.raises(error, match=message):
        fit_scaling_law(arguments.pop("compute"), arguments.pop("error"), **arguments)
