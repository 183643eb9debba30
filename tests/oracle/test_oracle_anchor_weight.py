"""Weights per anchor and pair losses of the oracle: worked by hand, mpmath, finite differences, sums over anchors."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import mpmath as mp
import numpy as np
import pytest
from drrho_reference import (
    contrastive_objective,
    contrastive_step,
    info_nce,
    pair_loss,
    reference_anchor_weight,
    sharded_contrastive_step,
    unimodal_contrastive_step,
    unimodal_objective,
)

from helpers.features import unit_rows

NEVER, B = -math.inf, 5
log = math.log
Function = Callable[..., Any]


def batch(seed: int) -> tuple[np.ndarray, ...]:
    """Two sides of features and their states, some never visited."""
    rng = np.random.default_rng(seed)
    states = rng.normal(size=(2, B))
    states[0, 1] = states[1, 3] = NEVER
    return unit_rows(rng, B, 4), unit_rows(rng, B, 4), *states


def options(seed: int) -> dict[str, Any]:
    rng = np.random.default_rng([seed, 1])
    return {
        "temperature": (rng.uniform(0.2, 0.9, size=B), rng.uniform(0.2, 0.9, size=B)),
        "gamma": (rng.uniform(0.1, 0.9, size=B), rng.uniform(0.1, 0.9, size=B)),
        "reference_features": (unit_rows(rng, B, 3), unit_rows(rng, B, 3)),
        "reference_weight": 1.5,
        "radius": 0.4,
        "eps": 0.02,
    }


def factors(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Weights of each side, one of them 0."""
    image, text = np.random.default_rng([seed, 2]).gamma(2.0, size=(2, B))
    image[2] = 0.0
    return image, text


def clip(*arrays: Any, anchor_weight: Any = None, **given: Any) -> Any:
    return info_nce(*arrays[:2], temperature=0.4, anchor_weight=anchor_weight)


STEPS = [contrastive_step, unimodal_contrastive_step]
FUNCTIONS: list[Function] = [*STEPS, clip]


def assert_equal_fields(one: Any, other: Any, tolerance: float = 1e-14) -> None:
    assert type(one) is type(other)
    for field, left, right in zip(one._fields, one, other, strict=True):
        np.testing.assert_allclose(left, right, rtol=tolerance, atol=tolerance, err_msg=field)


# ---------------------------------------------------------------------------------------------------------------------
# Weights per anchor
# ---------------------------------------------------------------------------------------------------------------------


def test_weighted_step_by_hand() -> None:
    # exp(Z) = [[1, 2], [4, 2]] and t = 1: g = 2/1, 4/2 for images and h = 4/1, 2/2 for texts. With a = 3, 1/2 and
    # a' = 3/4, 2: loss = (3 log 2 + 1/2 log 2 + 3/4 log 4 + 2 log 1) / 4 = 5/4 log 2, and the surrogate adds
    # (3 + 1/2 + 3/4 + 2) / 4. One negative each, so every w is 1: W = [[0, 3], [1/2, 0]] for images and
    # [[0, 2], [3/4, 0]] for texts.
    table = np.array([[1.0, 2.0], [4.0, 2.0]])
    images, texts = np.eye(2), np.log(table).T
    weight = ([3.0, 0.5], [0.75, 2.0])
    step = contrastive_step(images, texts, [NEVER] * 2, [NEVER] * 2, temperature=1.0, anchor_weight=weight)
    assert step.loss == pytest.approx(1.25 * log(2.0), abs=1e-15)
    assert step.surrogate == pytest.approx(1.25 * log(2.0) + 6.25 / 4, abs=1e-15)
    np.testing.assert_allclose(step.log_inner_image, np.log([2.0, 2.0]), atol=1e-15)
    np.testing.assert_allclose(step.log_inner_text, np.log([4.0, 1.0]), atol=1e-15)
    # V = [[0, 5], [5/4, 0]], c = 3 + 3/4 and 1/2 + 2.
    V, c = np.array([[0.0, 5.0], [1.25, 0.0]]), np.array([3.75, 2.5])
    np.testing.assert_allclose(step.image_gradient, (V @ texts - c[:, None] * texts) / 4, atol=1e-15)
    np.testing.assert_allclose(step.text_gradient, (V.T - np.diag(c)) / 4, atol=1e-15)
    assert step.temperature_gradient == pytest.approx(0.0, abs=1e-15)  # L = D where there is one negative


@pytest.mark.parametrize("function", FUNCTIONS)
def test_ones_are_no_weights(function: Function) -> None:
    plain = function(*batch(1), **options(1))
    for ones in (np.ones(B), [1.0] * B, (np.ones(B), np.ones(B))):
        assert_equal_fields(function(*batch(1), **options(1), anchor_weight=ones), plain, tolerance=0.0)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_one_array_serves_both_sides(function: Function) -> None:
    weight = factors(2)[0]
    one = function(*batch(2), **options(2), anchor_weight=weight)
    assert_equal_fields(one, function(*batch(2), **options(2), anchor_weight=(weight, weight)), tolerance=0.0)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_weighted_step_is_the_weighted_sum_over_anchors(function: Function) -> None:
    weight = factors(3)
    whole = function(*batch(3), **options(3), anchor_weight=weight)
    none, totals = np.zeros(B), {}
    for side in (0, 1):
        for i in range(B):
            one = np.eye(B)[i]
            part = function(*batch(3), **options(3), anchor_weight=(none, one) if side else (one, none))
            for field, value in part._asdict().items():
                if field.startswith("log_inner"):
                    np.testing.assert_array_equal(value, getattr(whole, field), err_msg=field)
                else:
                    totals[field] = totals.get(field, 0.0) + weight[side][i] * np.array(value)
    for field, value in totals.items():
        np.testing.assert_allclose(getattr(whole, field), value, rtol=1e-13, atol=1e-14, err_msg=field)


@pytest.mark.parametrize("function", STEPS)
def test_states_do_not_know_the_weights(function: Function) -> None:
    plain, weighted = (function(*batch(4), **options(4), anchor_weight=weight) for weight in (None, factors(4)))
    for one, other in zip(plain[-2:], weighted[-2:], strict=True):
        np.testing.assert_array_equal(one, other)


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


@pytest.mark.parametrize(
    ("step", "objective"),
    [(contrastive_step, contrastive_objective), (unimodal_contrastive_step, unimodal_objective)],
)
def test_without_memory_gradients_are_those_of_the_weighted_objective(step: Function, objective: Function) -> None:
    first, second, *states = batch(5)
    given = {**options(5), "anchor_weight": factors(5)}
    del given["gamma"]
    answer = step(first, second, *states, **given)
    assert answer.loss == pytest.approx(objective(first, second, **given), abs=1e-15)
    of_first = slope(lambda moved: objective(moved, second, **given), first)
    of_second = slope(lambda moved: objective(first, moved, **given), second)
    np.testing.assert_allclose(answer[2], of_first, atol=1e-8)
    np.testing.assert_allclose(answer[3], of_second, atol=1e-8)
    temperature = np.array(given.pop("temperature"))
    both = slope(lambda pair: objective(first, second, temperature=(pair[0], pair[1]), **given), temperature)
    np.testing.assert_allclose(answer.temperature_gradient, both, atol=1e-8)
    assert answer.temperature_gradient[0][2] == 0.0  # the weight of this anchor is 0


def test_gradients_of_the_weighted_info_nce() -> None:
    image, text, *_ = batch(6)
    weight = factors(6)

    def loss(image: Any = image, text: Any = text, temperature: float = 0.4) -> float:
        return info_nce(image, text, temperature=temperature, anchor_weight=weight).loss

    answer = info_nce(image, text, temperature=0.4, anchor_weight=weight)
    np.testing.assert_allclose(answer.image_gradient, slope(lambda moved: loss(image=moved), image), atol=1e-8)
    np.testing.assert_allclose(answer.text_gradient, slope(lambda moved: loss(text=moved), text), atol=1e-8)
    single = slope(lambda t: loss(temperature=float(t)), np.array(0.4))
    assert answer.temperature_gradient == pytest.approx(float(single), abs=1e-7)


def test_eps_of_one_negative_makes_the_weighted_step_info_nce() -> None:
    # t log(1/(b-1) + g) = t (CE - log(b-1)) anchor by anchor, so it holds for any weights.
    image, text, *states = batch(7)
    weight, t = factors(7), 0.3
    step = contrastive_step(image, text, *states, temperature=t, eps=1 / (B - 1), anchor_weight=weight)
    clip_loss = info_nce(image, text, temperature=t, anchor_weight=weight)
    mean_weight = sum(map(sum, weight)) / (2 * B)
    assert step.loss == pytest.approx(t * (clip_loss.loss - mean_weight * log(B - 1)), abs=1e-14)
    np.testing.assert_allclose(step.image_gradient, t * clip_loss.image_gradient, atol=1e-14)
    np.testing.assert_allclose(step.text_gradient, t * clip_loss.text_gradient, atol=1e-14)


def test_one_anchor_alone_shows_the_sum_of_its_weights() -> None:
    image, text, *states = batch(8)
    given = {**options(8), "eps": 0.0}
    for i in range(B):
        step = contrastive_step(image, text, *states, **given, anchor_weight=(np.eye(B)[i], np.zeros(B)))
        total = 2 * B * (step.surrogate - step.loss) / given["temperature"][0][i]
        pull = np.delete(step.text_gradient, i, axis=0).sum(axis=0)
        np.testing.assert_allclose(pull, total * image[i] / (2 * B), atol=1e-14)
        assert 0.0 < total <= 1 / given["gamma"][0][i]


@pytest.mark.parametrize("num_shards", [1, 5])
def test_ranks_together_are_one_rank_with_weights(num_shards: int) -> None:
    given = {**options(9), "anchor_weight": factors(9)}
    ranks = sharded_contrastive_step(*batch(9), num_shards=num_shards, **given)
    step = contrastive_step(*batch(9), **given)
    assert ranks[0].loss == pytest.approx(step.loss, abs=1e-14)
    assert ranks[0].surrogate == pytest.approx(step.surrogate, abs=1e-14)
    for field in ("image_gradient", "text_gradient", "log_inner_image", "log_inner_text"):
        together = np.concatenate([getattr(rank, field) for rank in ranks])
        np.testing.assert_allclose(together, getattr(step, field), atol=1e-14, err_msg=field)
    for side in (0, 1):
        together = np.concatenate([rank.temperature_gradient[side] for rank in ranks])  # type: ignore[index]
        np.testing.assert_allclose(together, step.temperature_gradient[side], atol=1e-14)  # type: ignore[index]


@pytest.mark.parametrize(
    ("weight", "error", "message"),
    [
        ([1.0] * 4, ValueError, r"anchor_weight must have the shape \(5,\), got \(4,\)"),
        (([1.0] * 5, [1.0] * 4), ValueError, r"anchor_weight\[1\] must have the shape \(5,\), got \(4,\)"),
        ([1.0, -0.5, 1.0, 1.0, 1.0], ValueError, "anchor_weight must be at least 0, got -0.5"),
        (([1.0] * 5, [-1.0] * 5), ValueError, "anchor_weight must be at least 0, got -1.0"),
        ([math.nan] * 5, ValueError, "anchor_weight must be finite, got nan"),
        (2.0, ValueError, r"anchor_weight must have the shape \(5,\), got \(\)"),
        ([True] * 5, TypeError, "anchor_weight must be an array of real numbers, got dtype bool"),
    ],
)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_bad_weights_are_refused(function: Function, weight: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        function(*batch(10), **options(10), anchor_weight=weight)


# ---------------------------------------------------------------------------------------------------------------------
# Pair losses, and the weights made of a reference model's
# ---------------------------------------------------------------------------------------------------------------------


def test_pair_loss_by_hand() -> None:
    # exp(S) is this table: g = (2+3)/2/1, (4+8)/2/2, (5+1)/2/4 and h = (4+5)/2/1, (2+1)/2/2, (3+8)/2/4.
    texts = np.log([[1.0, 2.0, 3.0], [4.0, 2.0, 8.0], [5.0, 1.0, 4.0]]).T
    losses = pair_loss(np.eye(3), texts, temperature=1.0)
    np.testing.assert_allclose(losses, np.log([5 / 2 * 9 / 2, 3 * 3 / 4, 3 / 4 * 11 / 8]) / 2, atol=1e-15)


@pytest.mark.parametrize("temperature", [0.5, 0.02])
def test_pair_loss_agrees_with_mpmath(temperature: float) -> None:
    image, text, *_ = batch(11)
    with mp.workdps(50):
        S = mp.matrix(image.tolist()) * mp.matrix(text.tolist()).T
        t = mp.mpf(temperature)
        expected = []
        for i in range(B):
            rows = [mp.exp((S[i, j] - S[i, i]) / t) for j in range(B) if j != i]
            columns = [mp.exp((S[j, i] - S[i, i]) / t) for j in range(B) if j != i]
            expected.append(float((mp.log(mp.fsum(rows) / (B - 1)) + mp.log(mp.fsum(columns) / (B - 1))) / 2))
    np.testing.assert_allclose(pair_loss(image, text, temperature=temperature), expected, rtol=1e-13, atol=1e-13)


def test_pair_loss_is_the_mean_of_both_new_states() -> None:
    image, text, *_ = batch(12)
    step = contrastive_step(image, text, [NEVER] * B, [NEVER] * B, temperature=0.3)
    both = (step.log_inner_image + step.log_inner_text) / 2
    np.testing.assert_array_equal(pair_loss(image, text, temperature=0.3), both)


def test_pair_loss_with_a_mask_by_hand() -> None:
    # The table is that of `test_pair_loss_by_hand`. The mask leaves row 1 and column 2 without negatives, so half of
    # the losses of pairs 1 and 2 is 0.
    texts = np.log([[1.0, 2.0, 3.0], [4.0, 2.0, 8.0], [5.0, 1.0, 4.0]]).T
    mask = np.array([[True, True, False], [False, True, False], [True, True, True]])
    losses = pair_loss(np.eye(3), texts, temperature=1.0, pair_mask=mask)
    # g_0 = 2/1 and h_0 = 5/1; h_1 = (2+1)/2/2; g_2 = (5+1)/2/4.
    np.testing.assert_allclose(losses, np.log([2 * 5, 3 / 4, 3 / 4]) / 2, atol=1e-15)


def test_pair_loss_refuses_bad_input() -> None:
    image, text, *_ = batch(13)
    with pytest.raises(ValueError, match=r"temperature must be positive, got 0\.0"):
        pair_loss(image, text, temperature=0.0)
    with pytest.raises(ValueError, match=r"text_features must have the shape \(5, 4\), got \(4, 4\)"):
        pair_loss(image, text[:4], temperature=1.0)
    with pytest.raises(ValueError, match="image_features must have at least 2 rows, got 1"):
        pair_loss(image[:1], text[:1], temperature=1.0)
    with pytest.raises(FloatingPointError, match=r"temperature must keep the linear domain .*, got 0\.0001"):
        pair_loss(image, text, temperature=1e-4)


def test_reference_anchor_weight_by_hand() -> None:
    # sigmoid(-(l + 1)/.5) at l = -1 - log(3)/2, -1, -1 + log(3)/2 is 3/4, 1/2, 1/4: the mean is 1/2.
    losses = [-1 - log(3) / 2, -1.0, -1 + log(3) / 2]
    np.testing.assert_allclose(reference_anchor_weight(losses), [1.5, 1.0, 0.5], atol=1e-15)
    # Temperature 2, threshold 3: losses 3 - 2 log 4 and 3 + 2 log 4 give 4/5 and 1/5.
    losses = [3 - 2 * log(4), 3 + 2 * log(4)]
    found = reference_anchor_weight(losses, temperature=2.0, threshold=3.0)
    np.testing.assert_allclose(found, [1.6, 0.4], atol=1e-15)


@pytest.mark.parametrize("shift", [0.0, -2000.0, 2000.0])
def test_reference_anchor_weight_agrees_with_mpmath_and_has_mean_1(shift: float) -> None:
    losses = np.random.default_rng(14).normal(size=(2, 4)) * 3 + shift
    with mp.workdps(1000):
        sigmoids = [1 / (1 + mp.exp((mp.mpf(value) + 1) / mp.mpf(0.5))) for value in losses.ravel().tolist()]
        mean = mp.fsum(sigmoids) / 8
        expected = np.array([float(value / mean) for value in sigmoids]).reshape(2, 4)
    found = reference_anchor_weight(losses)
    np.testing.assert_allclose(found, expected, rtol=1e-11)  # the exponent 4000 is known to an ulp, 1e-12
    assert found.mean() == pytest.approx(1.0, abs=1e-15)


@pytest.mark.parametrize(
    ("losses", "given", "message"),
    [
        ([], {}, "pair_loss must have at least one entry, got none"),
        ([math.inf], {}, "pair_loss must be finite, got inf"),
        ([1.0], {"temperature": 0.0}, "temperature must be positive, got 0.0"),
        ([1.0], {"threshold": math.nan}, "threshold must be finite, got nan"),
    ],
)
def test_reference_anchor_weight_refuses_bad_input(losses: Any, given: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        reference_anchor_weight(losses, **given)
