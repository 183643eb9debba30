"""Rules for gamma: worked by hand, and SCENT's against a brute-force proximal step."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from drrho_reference import InnerEstimator, cosine_gamma, moving_average, recommended_gamma_min, scent_gamma
from scipy.optimize import minimize_scalar


def test_cosine_gamma_by_hand() -> None:
    # 0.2 + 0.8 (1 + cos(pi e / 6)) / 2: cos is 1, 1/2, 0, -1/2, -1 at e = 0, 2, 3, 4, 6; then it stays.
    for epoch, gamma in {0: 1.0, 2: 0.8, 3: 0.6, 4: 0.4, 6: 0.2, 7: 0.2, 100: 0.2}.items():
        assert cosine_gamma(epoch, num_epochs=6, gamma_min=0.2) == pytest.approx(gamma, abs=1e-15)
    assert cosine_gamma(2.5, num_epochs=5, gamma_min=1.0) == 1.0


def test_recommended_gamma_min_by_hand() -> None:
    # 4.177 * 32^-0.7265 = 4.177 * 2^-3.6325; below 4.177^(1/0.7265) = 7.2 epochs it is 1.
    assert recommended_gamma_min(32) == pytest.approx(4.177 * 2.0**-3.6325, rel=1e-14)
    assert (recommended_gamma_min(7), recommended_gamma_min(1)) == (1.0, 1.0)
    assert recommended_gamma_min(8) < 1.0


def test_scent_gamma_by_hand() -> None:
    # alpha u / (1 + alpha u) with alpha = 3: u = 1, 1/3, 2 give 3/4, 1/2, 6/7.
    gamma = scent_gamma([[0.0, -math.log(3.0)], [math.log(2.0), -math.inf]], log_alpha=math.log(3.0))
    np.testing.assert_allclose(gamma, [[3 / 4, 1 / 2], [6 / 7, 1.0]], rtol=1e-15)
    assert scent_gamma([-1e4, 1e4], log_alpha=10.0, gamma_floor=0.05).tolist() == [0.05, 1.0]


@pytest.mark.parametrize(("log_u", "log_g", "log_alpha"), [(0.3, 1.2, 0.5), (-2.0, 0.5, 1.0), (1.5, -1.0, -0.5)])
def test_scent_gamma_is_a_proximal_step(log_u: float, log_g: float, log_alpha: float) -> None:
    """The new log u minimises alpha (g e^-nu + nu) + Bregman divergence of e^-nu from the old one."""
    alpha, old, g = math.exp(log_alpha), math.exp(-log_u), math.exp(log_g)

    def step(nu: float) -> float:
        return alpha * (g * math.exp(-nu) + nu) + math.exp(-nu) - old + old * (nu - log_u)

    best = minimize_scalar(step, bounds=(-6.0, 6.0), method="bounded", options={"xatol": 1e-10}).x
    gamma = float(scent_gamma([log_u], log_alpha=log_alpha)[0])
    new = math.log(moving_average(math.exp(log_u), g, gamma))
    assert new == pytest.approx(best, abs=1e-7)
    assert new == pytest.approx(log_u + math.log1p(alpha * g) - math.log1p(alpha * math.exp(log_u)), abs=1e-14)


@pytest.mark.parametrize(
    ("function", "arguments", "options", "error", "message"),
    [
        (cosine_gamma, (-1,), {"num_epochs": 5, "gamma_min": 0.2}, ValueError, "epoch must be at least 0, got -1.0"),
        (cosine_gamma, (1,), {"num_epochs": 0, "gamma_min": 0.2}, ValueError, "num_epochs must be positive, got 0.0"),
        (cosine_gamma, (1,), {"num_epochs": 5, "gamma_min": 0}, ValueError, r"gamma_min must lie in \(0, 1\], got 0.0"),
        (cosine_gamma, ("1",), {"num_epochs": 5, "gamma_min": 0.2}, TypeError, "epoch must be a real number, got '1'"),
        (recommended_gamma_min, (0,), {}, ValueError, "num_epochs must be positive, got 0.0"),
        (scent_gamma, ([np.nan],), {"log_alpha": 1.0}, ValueError, "log_inner must be finite or -inf, got"),
        (scent_gamma, ([np.inf],), {"log_alpha": 1.0}, ValueError, "log_inner must be finite or -inf, got"),
        (scent_gamma, ([0.0],), {"log_alpha": np.inf}, ValueError, "log_alpha must be finite, got inf"),
        (scent_gamma, ([0.0],), {"log_alpha": 1.0, "gamma_floor": 0.0}, ValueError, r"gamma_floor must lie in"),
    ],
)  # fmt: skip
def test_bad_input_is_refused(function: Any, arguments: Any, options: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        function(*arguments, **options)


def test_an_estimator_remembers() -> None:
    estimator = InnerEstimator(4, like=None)
    assert estimator.scatter([2, 0], [0.5, 1.5], [-1.0, 1.0]) is estimator
    image, text = estimator.gather([0, 1, 2])
    assert (image.tolist(), text.tolist()) == ([1.5, -math.inf, 0.5], [1.0, -math.inf, -1.0])
    grown = estimator.grow(6)
    grown.scatter([5, 2], [7.0, 8.0], [9.0, -math.inf])
    assert grown.state_dict()["log_inner_image"].tolist() == [1.5, -math.inf, 8.0, -math.inf, -math.inf, 7.0]
    assert grown.state_dict()["log_inner_text"].tolist() == [1.0] + [-math.inf] * 4 + [9.0]
    assert estimator.state_dict()["log_inner_image"].tolist() == [1.5, -math.inf, 0.5, -math.inf]
    other = InnerEstimator(6, like=None)
    other.load_state_dict(grown.state_dict())
    assert other.gather([5, 0])[0].tolist() == [7.0, 1.5]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda e: InnerEstimator(0, like=None), ValueError, "num_samples must be at least 1, got 0"),
        (lambda e: e.gather([0.0]), TypeError, "index must be integers along one axis, got dtype float64"),
        (lambda e: e.gather([4]), ValueError, r"index must lie in \[0, 4\), got 4"),
        (lambda e: e.gather([-1]), ValueError, r"index must lie in \[0, 4\), got -1"),
        (lambda e: e.scatter([1, 1], [0.0, 0.0], [0.0, 0.0]), ValueError, r"index must have no repeats, got \[1, 1\]"),
        (lambda e: e.scatter([1], [0.0], [np.nan]), ValueError, "log_inner_text must be finite or -inf"),
        (lambda e: e.grow(3), ValueError, "num_samples must be at least 4, got 3"),
        (lambda e: e.load_state_dict({}), ValueError, "state must hold log_inner_image and log_inner_text"),
    ],
)
def test_an_estimator_refuses_bad_input(call: Any, error: Any, message: str) -> None:
    estimator = InnerEstimator(4, like=None)
    with pytest.raises(error, match=message):
        call(estimator)
    assert not np.any(np.isfinite(estimator.gather(np.arange(4))))
