"""Facts that hold for the oracle's contrastive step: equal inputs, swapped roles, masks, weights, states, dtypes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from drrho_reference import (
    ContrastiveStep,
    contrastive_objective,
    contrastive_step,
    feature_gradients,
    info_nce,
)

from helpers.oracle_contrastive import IMAGES, MASK, TEXTS, problem


def assert_equal_steps(one: ContrastiveStep, other: ContrastiveStep, tolerance: float = 1e-13) -> None:
    for field, left, right in zip(ContrastiveStep._fields, one, other, strict=True):
        np.testing.assert_allclose(left, right, rtol=tolerance, atol=tolerance, err_msg=field)


@pytest.mark.parametrize("temperature", [0.05, 0.4, 3.0])
def test_eps_of_one_negative_makes_it_info_nce(temperature: float) -> None:
    p = problem(seed=31, b=6)
    b, t = 6, temperature
    step = contrastive_step(p["image"], p["text"], *p["log_inner"], temperature=t, eps=1 / (b - 1))
    plain = info_nce(p["image"], p["text"], temperature=t)
    assert step.loss == pytest.approx(t * (plain.loss - math.log(b - 1)), abs=1e-14)
    np.testing.assert_allclose(step.image_gradient, t * plain.image_gradient, atol=1e-14)
    np.testing.assert_allclose(step.text_gradient, t * plain.text_gradient, atol=1e-14)
    # The product rule: d(t (InfoNCE - math.log(b-1))) / dt.
    expected = plain.loss - math.log(b - 1) + t * plain.temperature_gradient
    assert step.temperature_gradient == pytest.approx(expected, abs=1e-13)


def test_one_temperature_for_all_is_a_pair_of_equal_ones() -> None:
    p = problem(seed=32)
    options: dict[str, Any] = {"gamma": 0.3, "reference_features": p["reference"], "radius": 0.2}
    one = contrastive_step(p["image"], p["text"], *p["log_inner"], temperature=0.4, **options)
    pair = contrastive_step(p["image"], p["text"], *p["log_inner"], temperature=(np.full(5, 0.4),) * 2, **options)
    assert isinstance(one.temperature_gradient, float)
    assert isinstance(pair.temperature_gradient, tuple)
    total = float(np.sum(pair.temperature_gradient))
    assert one.temperature_gradient == pytest.approx(total, abs=1e-15)
    assert_equal_steps(one._replace(temperature_gradient=0.0), pair._replace(temperature_gradient=0.0), 0.0)


def test_gamma_may_differ_between_anchors() -> None:
    p = problem(seed=33)
    steps = [
        contrastive_step(p["image"], p["text"], *p["log_inner"], temperature=0.5, gamma=gamma)
        for gamma in (0.2, 0.9, (np.array([0.2, 0.2, 0.9, 0.2, 0.9]), np.array([0.9, 0.2, 0.2, 0.9, 0.9])))
    ]
    chosen_image, chosen_text = np.array([0, 0, 1, 0, 1]), np.array([1, 0, 0, 1, 1])
    both = np.array([[step.log_inner_image, step.log_inner_text] for step in steps[:2]])
    np.testing.assert_array_equal(steps[2].log_inner_image, both[chosen_image, 0, np.arange(5)])
    np.testing.assert_array_equal(steps[2].log_inner_text, both[chosen_text, 1, np.arange(5)])


def test_gradients_agree_with_the_closed_form_of_matrices() -> None:
    rng = np.random.default_rng(34)
    W, W_text = rng.uniform(size=(2, 5, 5)) * ~np.eye(5, dtype=bool)
    E1, E2 = rng.normal(size=(2, 5, 3))
    V, c = W + W_text, W.sum(axis=1) + W_text.sum(axis=0)
    image_gradient, text_gradient = feature_gradients(W, W_text, E1, E2)
    np.testing.assert_allclose(image_gradient, (V @ E2 - c[:, None] * E2) / 10, atol=1e-15)
    np.testing.assert_allclose(text_gradient, (V.T @ E1 - c[:, None] * E1) / 10, atol=1e-15)


def test_reference_weight_0_is_no_reference() -> None:
    p = problem(seed=35)
    options: dict[str, Any] = {"temperature": p["temperatures"], "gamma": p["gammas"]}
    with_reference, without = (
        contrastive_step(p["image"], p["text"], *p["log_inner"], **more, **options)
        for more in ({"reference_features": p["reference"], "reference_weight": 0.0}, {})
    )
    assert_equal_steps(with_reference, without, 0.0)


@pytest.mark.parametrize("reference_weight", [0.5, 1.0, 1.5])
def test_reference_is_a_wider_product(reference_weight: float) -> None:
    p = problem(seed=36)
    R1, R2 = p["reference"]
    options: dict[str, Any] = {"temperature": 0.4, "gamma": 0.6, "radius": 0.1}
    step = contrastive_step(
        p["image"], p["text"], *p["log_inner"], reference_features=p["reference"],
        reference_weight=reference_weight, **options,
    )  # fmt: skip
    wider = contrastive_step(
        np.hstack([p["image"], -reference_weight * R1]), np.hstack([p["text"], R2]), *p["log_inner"], **options
    )
    wider = wider._replace(image_gradient=wider.image_gradient[:, :4], text_gradient=wider.text_gradient[:, :4])
    assert_equal_steps(step, wider)


def test_images_and_texts_may_change_roles() -> None:
    p = problem(seed=37)
    R1, R2 = p["reference"]
    options: dict[str, Any] = {"radius": 0.2, "eps": 0.01}
    step = contrastive_step(
        p["image"], p["text"], *p["log_inner"], temperature=p["temperatures"], gamma=p["gammas"],
        reference_features=(R1, R2), pair_mask=MASK, **options,
    )  # fmt: skip
    swapped = contrastive_step(
        p["text"], p["image"], *p["log_inner"][::-1], temperature=p["temperatures"][::-1], gamma=p["gammas"][::-1],
        reference_features=(R2, R1), pair_mask=MASK.T, **options,
    )  # fmt: skip
    back = ContrastiveStep(
        swapped.loss, swapped.surrogate, swapped.text_gradient, swapped.image_gradient,
        swapped.temperature_gradient[::-1], swapped.log_inner_text, swapped.log_inner_image,  # type: ignore[index]
    )  # fmt: skip
    assert_equal_steps(step, back)


def test_anchors_without_negatives_add_nothing_and_keep_their_state() -> None:
    p = problem(seed=38)
    p["log_inner"][0, 1] = 1e4  # not even looked at: exp would overflow
    options: dict[str, Any] = {"temperature": p["temperatures"], "gamma": p["gammas"], "pair_mask": MASK, "radius": 0.5}
    step = contrastive_step(p["image"], p["text"], *p["log_inner"], **options)
    assert step.log_inner_image[1] == 1e4
    assert step.log_inner_text[4] == p["log_inner"][1, 4]
    assert step.temperature_gradient[0][1] == step.temperature_gradient[1][4] == 0.0  # type: ignore[index]
    others = np.delete(np.arange(5), 1)
    assert np.all(step.log_inner_image[others] != p["log_inner"][0, others])
    # Only their own: image 1 still is a negative of texts, so it has a gradient.
    assert np.any(step.image_gradient[1] != 0.0)


def test_no_negatives_at_all_is_a_step_of_nothing() -> None:
    p = problem(seed=39)
    step = contrastive_step(
        p["image"], p["text"], *p["log_inner"], temperature=0.5, radius=1.0, pair_mask=np.eye(5, dtype=bool)
    )
    nothing = np.zeros((5, 4))
    assert_equal_steps(step, ContrastiveStep(0.0, 0.0, nothing, nothing, 0.0, *p["log_inner"]), 0.0)
    assert contrastive_objective(p["image"], p["text"], temperature=0.5, pair_mask=np.eye(5, dtype=bool)) == 0.0


def test_the_diagonal_of_a_mask_does_not_matter() -> None:
    p = problem(seed=40)
    steps = [
        contrastive_step(p["image"], p["text"], *p["log_inner"], temperature=0.5, pair_mask=mask)
        for mask in (MASK, MASK | np.eye(5, dtype=bool), MASK & ~np.eye(5, dtype=bool))
    ]
    assert_equal_steps(steps[0], steps[1], 0.0)
    assert_equal_steps(steps[0], steps[2], 0.0)
    everything = contrastive_step(p["image"], p["text"], *p["log_inner"], temperature=0.5)
    with_mask = contrastive_step(
        p["image"], p["text"], *p["log_inner"], temperature=0.5, pair_mask=np.ones((5, 5), dtype=bool)
    )
    assert_equal_steps(everything, with_mask, 0.0)


@pytest.mark.parametrize("gamma", [0.1, 0.5, 1.0])
def test_weights_of_an_anchor_sum_to_at_most_one_over_gamma(gamma: float) -> None:
    # The weights of an anchor sum to g / u; at temperature 1 surrogate - loss is the mean of these sums.
    p = problem(seed=41)
    p["log_inner"][:] = -600.0  # the estimates are far too small: the worst case
    step = contrastive_step(p["image"], p["text"], *p["log_inner"], temperature=1.0, gamma=gamma)
    assert (step.surrogate - step.loss) == pytest.approx(1 / gamma, rel=1e-13)


def test_repeated_visits_lead_to_the_objective() -> None:
    p = problem(seed=42)
    image, text = np.array([3.0, 0, 0, 0, 0]), np.array([-2.0, 1, 0, 0, 0])
    for _ in range(200):
        step = contrastive_step(p["image"], p["text"], image, text, temperature=0.5, gamma=0.2)
        image, text = step.log_inner_image, step.log_inner_text
    exact = contrastive_step(p["image"], p["text"], image, text, temperature=0.5, gamma=1.0)
    assert_equal_steps(step, exact, 1e-14)


def test_the_state_is_stored_without_eps() -> None:
    p = problem(seed=43)
    steps = [contrastive_step(p["image"], p["text"], *p["log_inner"], temperature=0.5, eps=eps) for eps in (0.0, 0.3)]
    np.testing.assert_array_equal(steps[0].log_inner_image, steps[1].log_inner_image)
    np.testing.assert_array_equal(steps[0].log_inner_text, steps[1].log_inner_text)


def test_a_state_of_0_is_an_estimate_of_1_and_not_a_first_visit() -> None:
    step = contrastive_step(IMAGES, TEXTS, [0.0] * 3, [0.0] * 3, temperature=1.0, gamma=0.5)
    np.testing.assert_allclose(np.exp(step.log_inner_image), (1 + np.array([5 / 2, 3.0, 3 / 4])) / 2)


def test_inputs_are_not_written_to() -> None:
    p = problem(seed=44)
    before = {name: np.array(value, copy=True) for name, value in p.items()}
    contrastive_step(p["image"], p["text"], *p["log_inner"], temperature=p["temperatures"], gamma=p["gammas"],
                     reference_features=p["reference"])  # fmt: skip
    for name, value in p.items():
        np.testing.assert_array_equal(value, before[name])


def test_everything_is_computed_in_float64() -> None:
    p = problem(seed=45)
    step = contrastive_step(*(a.astype("float32") for a in (p["image"], p["text"], *p["log_inner"])), temperature=0.5)
    arrays = (step.image_gradient, step.text_gradient, step.log_inner_image, step.log_inner_text)
    assert {array.dtype for array in arrays} == {np.dtype("float64")}
