"""The scaling law: SciPy's and NumPy's fits, intervals against a bootstrap by hand, published laws from noise."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
import scipy.optimize

from drrho_core import fit_scaling_law

COMPUTE = np.geomspace(2e8, 6e10, 9)


def noisy(prefactor: float, exponent: float, seed: int, noise: float, floor: float = 0.0) -> np.ndarray:
    factors = np.exp(noise * np.random.default_rng(seed).normal(size=COMPUTE.size))
    return (floor + prefactor * COMPUTE**-exponent) * factors


def inside(value: float, interval: Any) -> bool:
    return float(interval[0]) <= value <= float(interval[1])


@pytest.mark.parametrize(("prefactor", "exponent"), [(5.77, 0.116), (7.15, 0.127)])
def test_published_laws_are_recovered_from_noise(prefactor: float, exponent: float) -> None:
    held = []
    for seed in range(40):
        law = fit_scaling_law(COMPUTE, noisy(prefactor, exponent, seed, 0.01), num_resamples=300)
        held.append(inside(exponent, law.exponent_interval) and inside(prefactor, law.prefactor_interval))
        assert abs(law.exponent - exponent) < 0.01
        assert law.floor == law.floor_interval[0] == law.floor_interval[1] == 0
    assert held[0]
    assert sum(held) >= 33  # of 40, nominally 38; small samples make the percentiles a little narrow


def test_a_line_equals_polyfit(eager_space: Any) -> None:
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
def test_a_floor_minimises_the_squares(floor: float, noise: float) -> None:
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


def test_a_floor_is_recovered_within_its_interval(eager_space: Any) -> None:
    if eager_space.name == "jax" or eager_space.dtype_name == "float32":
        pytest.skip("a floor needs float64, as the docstring says; JAX compiles every operation, and a line has most")
    arrays = [eager_space.asarray(x) for x in (COMPUTE, noisy(200.0, 0.35, 1, 0.01, 0.1))]
    law = fit_scaling_law(*arrays, with_floor=True, num_resamples=60)
    assert inside(0.1, law.floor_interval)
    assert inside(200.0, law.prefactor_interval)
    assert inside(0.35, law.exponent_interval)
    assert float(law.floor_interval[0]) >= 0
    assert float(law.floor) < float(np.min(eager_space.to_numpy(arrays[1])))


def test_fitted_marks_the_points_of_the_fit() -> None:
    error = noisy(5.77, 0.116, 6, 0.02)
    where = COMPUTE > 1e9
    error[~where] = np.nan
    law = fit_scaling_law(COMPUTE, error, where=where, num_resamples=20)
    assert law.fitted.tolist() == where.tolist()
    assert law[:-1] == fit_scaling_law(COMPUTE[where], error[where], num_resamples=20)[:-1]
    assert fit_scaling_law(COMPUTE, noisy(1, 0.1, 0, 0.1), num_resamples=2).fitted.tolist() == [True] * 9


def test_a_missing_scipy_is_an_error_that_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(ImportError, match=r"^fit_scaling_law needs SciPy: pip install 'drrho-core\[train\]'$"):
        fit_scaling_law(COMPUTE, noisy(5.77, 0.116, 0, 0.01))


def test_a_floor_is_below_the_smallest_error_in_every_resample() -> None:
    # Three errors level off above the last: the best floor is as large as the smallest error allows.
    error = np.asarray([1.0, 0.3, 0.12, 0.12, 0.12, 0.11])
    law = fit_scaling_law(np.geomspace(1.0, 1e5, 6), error, with_floor=True, num_resamples=20)
    assert 0.1 <= float(law.floor) < 0.11
    assert all(np.isfinite([float(end) for end in law.floor_interval]))


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
