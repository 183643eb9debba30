"""InfoNCE of the oracle: worked by hand, SciPy, finite differences."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from drrho_reference import cross_entropy, info_nce
from scipy.special import log_softmax


def features(seed: int = 1, b: int = 5, d: int = 3) -> tuple[np.ndarray, np.ndarray]:
    both = np.random.default_rng(seed).normal(size=(2, b, d))
    both /= np.linalg.norm(both, axis=2, keepdims=True)
    return both[0], both[1]


def test_cross_entropy_by_hand() -> None:
    # softmax(log 1, log 2, log 5) = 1/8, 2/8, 5/8
    loss, gradient = cross_entropy([0.0, math.log(2.0), math.log(5.0)], 1)
    assert loss == pytest.approx(math.log(4.0), abs=1e-15)
    assert gradient == pytest.approx([1 / 8, 2 / 8 - 1, 5 / 8], abs=1e-15)
    assert cross_entropy([1e4, -1e4], 1)[0] == 2e4


def test_info_nce_by_hand() -> None:
    # Unit vectors as images make S the transpose of the texts; t = 1/2 doubles it. exp(S / t) = [[1, 2], [6, 3]].
    # Rows: 1/3, 3/9 of the probability is right; columns: 1/7, 3/5. Loss (log 3 + log 3 + log 7 + log(5/3)) / 4.
    texts = np.log([[1.0, 2.0], [6.0, 3.0]]).T / 2
    result = info_nce(np.eye(2), texts, temperature=0.5)
    assert result.loss == pytest.approx((2 * math.log(3) + math.log(7) + math.log(5 / 3)) / 4, abs=1e-15)
    # dS = (q - 1)/(2 b t) summed over both directions, 2 b t = 2: row softmax [[1/3, 2/3], [2/3, 1/3]], columns
    # [[1/7, 2/5], [6/7, 3/5]].
    dS = np.array([[1 / 3 - 1 + 1 / 7 - 1, 2 / 3 + 2 / 5], [2 / 3 + 6 / 7, 1 / 3 - 1 + 3 / 5 - 1]]) / 2
    np.testing.assert_allclose(result.image_gradient, dS @ texts, atol=1e-15)
    np.testing.assert_allclose(result.text_gradient, dS.T, atol=1e-15)
    assert result.temperature_gradient == pytest.approx(-np.sum(dS * texts.T) / 0.5, abs=1e-15)


@pytest.mark.parametrize("temperature", [1e-4, 0.01, 0.3, 10.0])
def test_info_nce_agrees_with_scipy_at_any_temperature(temperature: float) -> None:
    image, text = features()
    logits = image @ text.T / temperature
    expected = -np.mean([np.diag(log_softmax(logits, axis=1)), np.diag(log_softmax(logits, axis=0))])
    assert info_nce(image, text, temperature=temperature).loss == pytest.approx(expected, rel=1e-11)


def test_info_nce_gradients_agree_with_finite_differences() -> None:
    image, text = features()
    t, h = 0.4, 1e-5
    result = info_nce(image, text, temperature=t)
    for index in np.ndindex(image.shape):
        nudge = np.zeros_like(image)
        nudge[index] = h
        for gradient, pairs in [
            (result.image_gradient, [(image + sign * nudge, text) for sign in (1, -1)]),
            (result.text_gradient, [(image, text + sign * nudge) for sign in (1, -1)]),
        ]:
            up, down = (info_nce(*pair, temperature=t).loss for pair in pairs)
            assert (up - down) / (2 * h) == pytest.approx(gradient[index], abs=1e-9)
    up, down = (info_nce(image, text, temperature=t + sign * h).loss for sign in (1, -1))
    assert (up - down) / (2 * h) == pytest.approx(result.temperature_gradient, abs=1e-8)


def test_one_pair_is_always_right() -> None:
    result = info_nce([[1.0, 0.0]], [[0.6, 0.8]], temperature=0.1)
    assert (result.loss, result.temperature_gradient) == (0.0, 0.0)
    assert not np.any(result.image_gradient)


@pytest.mark.parametrize(
    ("arguments", "temperature", "error", "message"),
    [
        ((np.ones((3, 2)), np.ones((2, 2))), 0.5, ValueError, r"text_features must have the shape \(3, 2\)"),
        ((np.ones(3), np.ones(3)), 0.5, ValueError, "image_features must have two axes"),
        ((np.full((2, 2), np.nan), np.ones((2, 2))), 0.5, ValueError, "image_features must be finite, got nan"),
        ((np.ones((2, 2)), np.ones((2, 2))), -0.5, ValueError, "temperature must be positive, got -0.5"),
        ((np.ones((2, 2)), np.ones((2, 2))), (np.ones(2), np.ones(2)), TypeError, "temperature must be a real number"),
    ],
)  # fmt: skip
def test_bad_input_is_refused(arguments: Any, temperature: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        info_nce(*arguments, temperature=temperature)


def test_cross_entropy_wants_one_axis() -> None:
    with pytest.raises(ValueError, match=r"logits must have one axis, got the shape \(2, 2\)"):
        cross_entropy(np.ones((2, 2)), 0)
