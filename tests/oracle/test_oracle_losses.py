"""InfoNCE, SigLIP, distillation and the hinge of the oracle: worked by hand, SciPy, mpmath, finite differences."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import mpmath as mp
import numpy as np
import pytest
from drrho_reference import (
    contrastive_step,
    cross_entropy,
    distillation_loss,
    hinge_margin_loss,
    info_nce,
    sigmoid_loss,
    soft_cross_entropy,
    weighted_sum,
)
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


def test_masked_info_nce_by_hand() -> None:
    # With t = 1: S = [[log 1, log 2, log 5], [0, 0, 0], [0, 0, 0]] in its first row, and a mask without (0, 2), (1, 0).
    images, texts = np.array([[1.0], [0.0], [0.0]]), np.log([[1.0], [2.0], [5.0]])
    mask = np.array([[False, True, False], [False, True, True], [True, True, False]])
    result = info_nce(images, texts, temperature=1.0, pair_mask=mask)
    # Rows: log(1 + 2) - log 1, log 2, log 3. Columns: log 2 (rows 0 and 2), log(2 + 1 + 1) - log 1, log 2.
    expected = (math.log(3) + math.log(2) + math.log(3) + math.log(2) + math.log(4) + math.log(2)) / 6
    assert result.loss == pytest.approx(expected, abs=1e-15)
    # The probabilities minus the labels, of rows and of columns; excluded pairs are 0 in both.
    rows = np.array([[1 / 3 - 1, 2 / 3, 0], [0, 1 / 2 - 1, 1 / 2], [1 / 3, 1 / 3, 1 / 3 - 1]])
    columns = np.array([[1 / 2 - 1, 2 / 4, 0], [0, 1 / 4 - 1, 1 / 2], [1 / 2, 1 / 4, 1 / 2 - 1]])
    dS = (rows + columns) / 6
    np.testing.assert_allclose(result.image_gradient, dS @ texts, atol=1e-15)
    np.testing.assert_allclose(result.text_gradient, dS.T @ images, atol=1e-15)
    assert result.temperature_gradient == pytest.approx(-np.sum(dS * (images @ texts.T)), abs=1e-15)


def test_masked_info_nce_of_separate_groups_is_the_mean_of_the_groups() -> None:
    image, text = features(3, b=6)
    groups = [[0, 3], [1, 2, 4], [5]]
    mask = np.zeros((6, 6), dtype=bool)
    for group in groups:
        mask[np.ix_(group, group)] = True
    whole = info_nce(image, text, temperature=0.3, pair_mask=mask)
    parts = [info_nce(image[group], text[group], temperature=0.3) for group in groups]
    shares = [len(group) / 6 for group in groups]
    assert whole.loss == pytest.approx(sum(s * part.loss for s, part in zip(shares, parts, strict=True)), rel=1e-14)
    for share, group, part in zip(shares, groups, parts, strict=True):
        np.testing.assert_allclose(whole.image_gradient[group], share * part.image_gradient, atol=1e-15)
        np.testing.assert_allclose(whole.text_gradient[group], share * part.text_gradient, atol=1e-15)


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


# ---------------------------------------------------------------------------------------------------------------------
# SigLIP, distillation, hinge
# ---------------------------------------------------------------------------------------------------------------------


def slope(function: Callable[[np.ndarray], float], at: np.ndarray) -> np.ndarray:
    """Central differences with one Richardson step: error of order h^4."""
    gradient = np.empty_like(at)
    for index in np.ndindex(at.shape):
        estimates = []
        for h in (2e-3, 1e-3):
            nudge = np.zeros_like(at)
            nudge[index] = h
            estimates.append((function(at + nudge) - function(at - nudge)) / (2 * h))
        gradient[index] = (4 * estimates[1] - estimates[0]) / 3
    return gradient


# Unit vectors as images make S the transpose of the texts. This S has no symmetry, and b = 3 tells b from b - 1 and 2.
S = np.array([[0.5, 0.75, -0.25], [0.0, 0.25, 0.5], [1.0, -0.5, 0.75]])
IMAGES, TEXTS = np.eye(3), S.T


def test_sigmoid_loss_by_hand() -> None:
    # scale 4 log 3, bias -log 3: z = log 3 * (4 S - 1), so e^z = 3^(4 S - 1):
    #   3^1 3^2 3^-2 / 3^-1 3^0 3^1 / 3^3 3^-3 3^2
    # A question costs log(1 + e^(-y z)): on the diagonal 1 + e^-z, off it 1 + e^z.
    cost = [[1 + 1 / 3, 1 + 9, 1 + 1 / 9], [1 + 1 / 3, 1 + 1, 1 + 3], [1 + 27, 1 + 1 / 27, 1 + 1 / 9]]
    result = sigmoid_loss(IMAGES, TEXTS, scale=4 * math.log(3), bias=-math.log(3))
    assert result.loss == pytest.approx(float(np.sum(np.log(cost))) / 3)
    # dz = (sigmoid(z) - [i = j]) / 3 with sigmoid = e^z / (1 + e^z).
    dz = (np.array([[3 / 4, 9 / 10, 1 / 10], [1 / 4, 1 / 2, 3 / 4], [27 / 28, 1 / 28, 9 / 10]]) - np.eye(3)) / 3
    np.testing.assert_allclose(result.image_gradient, 4 * math.log(3) * dz @ TEXTS, atol=1e-15)
    np.testing.assert_allclose(result.text_gradient, 4 * math.log(3) * dz.T, atol=1e-15)
    assert result.scale_gradient == pytest.approx(float(np.sum(dz * S)), abs=1e-15)
    assert result.bias_gradient == pytest.approx(float(np.sum(dz)), abs=1e-15)


@pytest.mark.parametrize(("scale", "bias"), [(10.0, -10.0), (0.5, 2.0), (1e4, -300.0)])
def test_sigmoid_loss_agrees_with_mpmath_even_where_exp_overflows(scale: float, bias: float) -> None:
    image, text = features(2)
    result = sigmoid_loss(image, text, scale=scale, bias=bias)
    with mp.workdps(60):
        total = mp.mpf(0)
        for i in range(5):
            for j in range(5):
                similarity = mp.fsum(mp.mpf(a) * mp.mpf(c) for a, c in zip(image[i].tolist(), text[j].tolist(),
                                                                           strict=True))  # fmt: skip
                z = mp.mpf(scale) * similarity + mp.mpf(bias)
                total += mp.log(1 + mp.exp(-z if i == j else z))
        assert result.loss == pytest.approx(float(total / 5), rel=1e-12)
    assert all(np.all(np.isfinite(value)) for value in result)


def test_sigmoid_gradients_agree_with_finite_differences() -> None:
    image, text = features(3)
    result = sigmoid_loss(image, text, scale=3.0, bias=-1.0)
    expected = slope(lambda value: sigmoid_loss(value, text, scale=3.0, bias=-1.0).loss, image)
    np.testing.assert_allclose(result.image_gradient, expected, atol=1e-9)
    expected = slope(lambda value: sigmoid_loss(image, value, scale=3.0, bias=-1.0).loss, text)
    np.testing.assert_allclose(result.text_gradient, expected, atol=1e-9)
    both = slope(lambda pair: sigmoid_loss(image, text, scale=pair[0], bias=pair[1]).loss, np.array([3.0, -1.0]))
    assert (result.scale_gradient, result.bias_gradient) == pytest.approx(tuple(both), abs=1e-9)


def test_one_pair_is_one_question() -> None:
    assert sigmoid_loss([[1.0]], [[0.5]], scale=2.0, bias=1.0).loss == pytest.approx(math.log1p(math.exp(-2.0)))


def test_soft_cross_entropy_by_hand() -> None:
    # q = 1/8, 2/8, 5/8
    loss, gradient = soft_cross_entropy([0.0, math.log(2.0), math.log(5.0)], [0.5, 0.25, 0.25])
    assert loss == pytest.approx((2 * math.log(8) + math.log(4) + math.log(8 / 5)) / 4, abs=1e-15)
    assert gradient == pytest.approx([1 / 8 - 1 / 2, 0.0, 5 / 8 - 1 / 4], abs=1e-15)


def test_distillation_by_hand() -> None:
    # t = 1/2: exp(S / t) = [[1, 2], [6, 3]]; t_R = 2: exp(R / t_R) = [[1, 4], [1, 3]]; other widths.
    texts = np.log([[1.0, 2.0], [6.0, 3.0]]).T / 2
    R = 2 * np.log([[1.0, 4.0], [1.0, 3.0]])
    result = distillation_loss(
        np.eye(2), texts, np.eye(2, 3), np.hstack([R.T, [[7.0], [-9.0]]]), temperature=0.5, reference_temperature=2.0
    )
    # Rows: p = (1/5, 4/5), (1/4, 3/4) and q = (1/3, 2/3), (2/3, 1/3). Columns: p = (1/2, 1/2), (4/7, 3/7) and
    # q = (1/7, 6/7), (2/5, 3/5).
    p_row, q_row = np.array([[1 / 5, 4 / 5], [1 / 4, 3 / 4]]), np.array([[1 / 3, 2 / 3], [2 / 3, 1 / 3]])
    p_column, q_column = np.array([[1 / 2, 4 / 7], [1 / 2, 3 / 7]]), np.array([[1 / 7, 2 / 5], [6 / 7, 3 / 5]])
    loss = -(np.sum(p_row * np.log(q_row)) + np.sum(p_column * np.log(q_column))) / 4
    assert result.loss == pytest.approx(float(loss), abs=1e-15)
    dS = (q_row - p_row + q_column - p_column) / (4 * 0.5)
    np.testing.assert_allclose(result.image_gradient, dS @ texts, atol=1e-15)
    np.testing.assert_allclose(result.text_gradient, dS.T, atol=1e-15)
    assert result.temperature_gradient == pytest.approx(-float(np.sum(dS * texts.T)) / 0.5, abs=1e-15)


@pytest.mark.parametrize(("temperature", "reference_temperature"), [(0.3, 0.9), (0.01, 0.05), (1e-4, 1e-3)])
def test_distillation_agrees_with_scipy(temperature: float, reference_temperature: float) -> None:
    image, text = features(4)
    reference_image, reference_text = features(5, d=4)
    logits, reference = image @ text.T / temperature, reference_image @ reference_text.T / reference_temperature
    expected = (
        -sum(np.sum(np.exp(log_softmax(reference, axis=axis)) * log_softmax(logits, axis=axis)) for axis in (0, 1)) / 10
    )
    result = distillation_loss(
        image, text, reference_image, reference_text, temperature=temperature,
        reference_temperature=reference_temperature,
    )  # fmt: skip
    assert result.loss == pytest.approx(expected, rel=1e-11)


def test_distillation_gradients_agree_with_finite_differences() -> None:
    image, text = features(6)
    reference = features(7, d=4)
    options: dict[str, Any] = {"temperature": 0.4, "reference_temperature": 0.7}
    result = distillation_loss(image, text, *reference, **options)
    expected = slope(lambda value: distillation_loss(value, text, *reference, **options).loss, image)
    np.testing.assert_allclose(result.image_gradient, expected, atol=1e-8)
    expected = slope(lambda value: distillation_loss(image, value, *reference, **options).loss, text)
    np.testing.assert_allclose(result.text_gradient, expected, atol=1e-8)
    single = slope(
        lambda value: distillation_loss(image, text, *reference, **{**options, "temperature": float(value)}).loss,
        np.array(0.4),
    )
    assert result.temperature_gradient == pytest.approx(float(single), abs=1e-7)


def test_a_model_that_is_its_own_reference_is_at_a_minimum() -> None:
    image, text = features(8)
    result = distillation_loss(image, text, image, text, temperature=0.5, reference_temperature=0.5)
    for gradient in (result.image_gradient, result.text_gradient, result.temperature_gradient):
        np.testing.assert_allclose(gradient, 0.0, atol=1e-14)
    assert result.loss > 0.1  # the entropy of the reference model: a cross-entropy, not a divergence


def test_hinge_by_hand() -> None:
    # S_ij - S_ii + 1/2 of image anchors (rows) and S_ij - S_jj + 1/2 of text anchors (columns):
    #     .    3/4  -1/4           .     1   -1/2
    #    1/4    .    3/4           0     .    1/4
    #    3/4  -3/4    .            1   -1/4    .
    image_short = np.array([[0, 3 / 4, 0], [1 / 4, 0, 3 / 4], [3 / 4, 0, 0]])
    text_short = np.array([[0, 1, 0], [0, 0, 1 / 4], [1, 0, 0]])
    result = hinge_margin_loss(IMAGES, TEXTS, margin=0.5)
    # Each direction: mean over 2 negatives, over 3 anchors; then half of each: 1/12 of all squares.
    assert result.loss == pytest.approx(float(np.sum(image_short**2) + np.sum(text_short**2)) / 12, abs=1e-15)
    dS = image_short + text_short - np.diag(image_short.sum(axis=1) + text_short.sum(axis=0))
    np.testing.assert_allclose(result.image_gradient, 2 * dS @ TEXTS / 12, atol=1e-15)
    np.testing.assert_allclose(result.text_gradient, 2 * dS.T / 12, atol=1e-15)


def test_hinge_gradients_agree_with_finite_differences() -> None:
    image, text = features(9)
    for margin in (0.0, 0.2):
        result = hinge_margin_loss(image, text, margin=margin)
        assert result.loss > 0.0
        expected = slope(lambda value, m=margin: hinge_margin_loss(value, text, margin=m).loss, image)
        np.testing.assert_allclose(result.image_gradient, expected, atol=1e-5)
        expected = slope(lambda value, m=margin: hinge_margin_loss(image, value, margin=m).loss, text)
        np.testing.assert_allclose(result.text_gradient, expected, atol=1e-5)


def test_pairs_beyond_the_margin_are_forgotten() -> None:
    result = hinge_margin_loss(np.eye(3), np.eye(3), margin=1.0)
    assert result.loss == 0.0
    assert not np.any(result.image_gradient)
    assert hinge_margin_loss(np.eye(3), np.eye(3), margin=1.5).loss == pytest.approx(0.25)


# Image 0 has no negatives left, text 1 none either; image 1 has text 0, image 2 texts 0; the diagonal says nothing.
MASK = np.array([[True, False, False], [True, False, True], [True, False, True]])


def test_masked_hinge_by_hand() -> None:
    # Of the table above: image 1 keeps 1/4 and 3/4, image 2 keeps 3/4; text 0 keeps 0 and 1, text 2 keeps 1/4.
    image_short = np.array([[0, 0, 0], [1 / 4, 0, 3 / 4], [3 / 4, 0, 0]]) / np.array([[1], [2], [1]])
    text_short = np.array([[0, 0, 0], [0, 0, 1 / 4], [1, 0, 0]]) / np.array([2, 1, 1])
    result = hinge_margin_loss(IMAGES, TEXTS, margin=0.5, pair_mask=MASK)
    # Means (1/16 + 9/16)/2, 9/16 and (0 + 1)/2, 1/16; over 3 anchors, half of each direction.
    assert result.loss == pytest.approx((10 / 32 + 9 / 16 + 1 / 2 + 1 / 16) / 6, abs=1e-15)
    dS = image_short + text_short - np.diag(image_short.sum(axis=1) + text_short.sum(axis=0))
    np.testing.assert_allclose(result.image_gradient, 2 * dS @ TEXTS / 6, atol=1e-15)
    np.testing.assert_allclose(result.text_gradient, 2 * dS.T / 6, atol=1e-15)


def test_masked_sigmoid_loss_by_hand() -> None:
    # The questions of the table above that are left: the diagonal, (1, 0), (1, 2) and (2, 0); still over b = 3.
    result = sigmoid_loss(IMAGES, TEXTS, scale=4 * math.log(3), bias=-math.log(3), pair_mask=MASK)
    cost = [1 + 1 / 3, 1 + 1, 1 + 1 / 9, 1 + 1 / 3, 1 + 3, 1 + 27]
    assert result.loss == pytest.approx(float(np.sum(np.log(cost))) / 3)
    dz = np.array([[3 / 4 - 1, 0, 0], [1 / 4, 1 / 2 - 1, 3 / 4], [27 / 28, 0, 9 / 10 - 1]]) / 3
    np.testing.assert_allclose(result.image_gradient, 4 * math.log(3) * dz @ TEXTS, atol=1e-15)
    np.testing.assert_allclose(result.text_gradient, 4 * math.log(3) * dz.T, atol=1e-15)
    assert result.scale_gradient == pytest.approx(float(np.sum(dz * S)), abs=1e-15)
    assert result.bias_gradient == pytest.approx(float(np.sum(dz)), abs=1e-15)


MASKED_LOSSES: dict[Any, dict[str, Any]] = {
    sigmoid_loss: {"scale": 3.0, "bias": -1.0},
    hinge_margin_loss: {"margin": 0.3},
    info_nce: {"temperature": 0.4},
}


@pytest.mark.parametrize("loss", MASKED_LOSSES)
def test_masked_gradients_agree_with_finite_differences(loss: Any) -> None:
    image, text = features(10)
    options = dict(MASKED_LOSSES[loss])
    plain = loss(image, text, **options)
    everybody = loss(image, text, **options, pair_mask=~np.eye(5, dtype=bool))
    assert everybody.loss == plain.loss
    np.testing.assert_array_equal(everybody.image_gradient, plain.image_gradient)
    options["pair_mask"] = np.random.default_rng(11).uniform(size=(5, 5)) < 0.6
    result = loss(image, text, **options)
    assert result.loss != plain.loss
    expected = slope(lambda value: loss(value, text, **options).loss, image)
    np.testing.assert_allclose(result.image_gradient, expected, atol=1e-5)
    expected = slope(lambda value: loss(image, value, **options).loss, text)
    np.testing.assert_allclose(result.text_gradient, expected, atol=1e-5)


def test_nothing_but_positives() -> None:
    nobody = np.zeros((3, 3), dtype=bool)
    result = hinge_margin_loss(IMAGES, TEXTS, margin=0.5, pair_mask=nobody)
    assert result.loss == 0.0
    assert not np.any(result.image_gradient)
    assert not np.any(result.text_gradient)
    alone = info_nce(IMAGES, TEXTS, temperature=0.1, pair_mask=nobody)
    assert (alone.loss, alone.temperature_gradient) == (0.0, 0.0)
    assert not np.any(alone.image_gradient)
    assert not np.any(alone.text_gradient)
    assert sigmoid_loss(np.eye(2), np.eye(2), scale=2.0, bias=-1.0, pair_mask=nobody[:2, :2]).loss == pytest.approx(
        math.log1p(math.exp(-1.0))
    )


def test_weighted_sum_by_hand() -> None:
    image, text = features(12)
    hinge, clip = hinge_margin_loss(image, text, margin=0.3), info_nce(image, text, temperature=0.5)
    never = np.full(5, -np.inf)
    t = np.linspace(0.2, 0.6, 5)
    step = contrastive_step(image, text, never, never, temperature=(t, 2 * t))
    total = weighted_sum((-0.5, hinge), (2, weighted_sum((3.0, clip))), (4.0, step))
    assert total.loss == pytest.approx(-0.5 * hinge.loss + 6.0 * clip.loss + 4.0 * step.loss, abs=1e-15)
    for name in ("image_gradient", "text_gradient"):
        parts = [getattr(term, name) for term in (hinge, clip, step)]
        np.testing.assert_allclose(getattr(total, name), -0.5 * parts[0] + 6 * parts[1] + 4 * parts[2], atol=1e-15)
    none, of_sum, of_step = total.parameter_gradients
    assert (none, of_sum) == ({}, {})  # a sum has no parameters of its own
    assert weighted_sum((3.0, clip)).parameter_gradients == ({"temperature_gradient": 3 * clip.temperature_gradient},)
    for got, wanted in zip(of_step["temperature_gradient"], step.temperature_gradient, strict=True):  # type: ignore[arg-type]
        np.testing.assert_array_equal(got, 4 * wanted)


@pytest.mark.parametrize(
    ("terms", "error", "message"),
    [
        ([], ValueError, "terms must hold at least one pair"),
        ([(1.0, 2.0)], TypeError, r"terms\[0\] must be a pair of \(weight, result of a loss\)"),
        ([(np.nan, info_nce(S, S, temperature=1.0))], ValueError, r"terms\[0\]\[0\] must be finite, got nan"),
        ([(1.0, info_nce(S, S, temperature=1.0)), (1.0, info_nce(S[:2], S[:2], temperature=1.0))], ValueError,
         r"terms\[1\] must have gradients of the shape \(3, 3\), got \(2, 3\)"),
    ],
)  # fmt: skip
def test_weighted_sum_refuses_bad_input(terms: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        weighted_sum(*terms)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda x, y: hinge_margin_loss(x, y, margin=0.1, pair_mask=np.ones((5, 4), bool)),
         r"pair_mask must have the shape \(5, 5\), got \(5, 4\)"),
        (lambda x, y: sigmoid_loss(x[:2], y, scale=1.0, bias=0.0), r"text_features must have the shape \(2, 3\)"),
        (lambda x, y: sigmoid_loss(x, y, scale=0.0, bias=0.0), "scale must be positive, got 0.0"),
        (lambda x, y: sigmoid_loss(x, y, scale=1.0, bias=np.inf), "bias must be finite, got inf"),
        (lambda x, y: hinge_margin_loss(x, y, margin=-0.1), "margin must be at least 0, got -0.1"),
        (lambda x, y: hinge_margin_loss(x[:1], y[:1], margin=0.1), "image_features must have at least 2 rows, got 1"),
        (lambda x, y: distillation_loss(x, y, x, y, temperature=0.0, reference_temperature=1.0),
         "temperature must be positive, got 0.0"),
        (lambda x, y: distillation_loss(x, y, x, y, temperature=1.0, reference_temperature=-1.0),
         "reference_temperature must be positive, got -1.0"),
        (lambda x, y: distillation_loss(x, y, x, y[:2], temperature=1.0, reference_temperature=1.0),
         r"reference_text must have the shape \(5, 3\), got \(2, 3\)"),
        (lambda x, y: distillation_loss(x, y, x[:2], y[:2], temperature=1.0, reference_temperature=1.0),
         "reference_image must have 5 rows, got 2"),
        (lambda x, y: distillation_loss(x, y, x * np.nan, y, temperature=1.0, reference_temperature=1.0),
         "reference_image must be finite, got nan"),
    ],
)  # fmt: skip
def test_the_other_losses_refuse_bad_input(loss: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        loss(*features())
