"""The contrastive step of the oracle, worked by hand and compared with mpmath.

Inputs are asymmetric throughout: images, texts, states, temperatures and masks differ, so that rows are not columns.
"""

from __future__ import annotations

import math
from typing import Any

import mpmath as mp
import numpy as np
import pytest
from drrho_reference import (
    ContrastiveStep,
    contrastive_objective,
    contrastive_step,
    inner_estimate,
    moving_average,
    pair_exponents,
    pair_similarities,
    pair_weights,
)

from helpers.oracle_contrastive import IMAGES, NEVER, TABLE, TEXTS, problem


def test_small_functions_by_hand() -> None:
    row = [0.0, math.log(2.0), math.log(3.0)]  # image 0: D = log 2, log 3
    np.testing.assert_allclose(pair_similarities(IMAGES, TEXTS), np.log(TABLE), atol=1e-15)
    assert pair_exponents(row, 0, [1, 2], 0.5) == pytest.approx([2 * math.log(2.0), 2 * math.log(3.0)])
    assert inner_estimate(row, 0, [1, 2], 1.0) == pytest.approx(2.5)
    assert inner_estimate(row, 0, [1, 2], 0.5) == pytest.approx((4 + 9) / 2)
    assert inner_estimate(row, 0, [2], 1.0) == pytest.approx(3.0)
    assert inner_estimate(row, 1, [0, 2], 1.0) == pytest.approx((1 / 2 + 3 / 2) / 2)
    assert moving_average(1.0, 2.5, 0.25) == 1.375
    assert moving_average(1.0, 2.5, 1.0) == 2.5
    assert moving_average(0.0, 2.5, 0.25) == 2.5
    assert pair_weights(row, 0, [1, 2], 1.0, 1.75) == pytest.approx([0.0, 4 / 7, 6 / 7])
    assert pair_weights(row, 0, [2], 1.0, 1.75, eps=0.25) == pytest.approx([0.0, 0.0, 3 / 2])


def test_reference_similarities_are_subtracted() -> None:
    # <e1_0, e2_1> = 0.8, <r1_0, r2_1> = 2 * 3 = 6; the reference model has another width.
    reference = ([[2.0], [1.0]], [[1.0], [3.0]])
    Z = pair_similarities([[0.0, 1.0], [1.0, 0.0]], [[1.0, 0.0], [0.6, 0.8]], reference_features=reference)
    assert Z.tolist() == pytest.approx(np.array([[0.0 - 2.0, 0.8 - 6.0], [1.0 - 1.0, 0.6 - 3.0]]))
    Z = pair_similarities([[0.0, 1.0], [1.0, 0.0]], [[1.0, 0.0], [0.6, 0.8]], reference_features=reference,
                          reference_weight=0.5)  # fmt: skip
    assert Z.tolist() == pytest.approx(np.array([[0.0 - 1.0, 0.8 - 3.0], [1.0 - 0.5, 0.6 - 1.5]]))


def test_objective_by_hand() -> None:
    # Images: g = (2+3)/2/1 = 5/2, (4+8)/2/2 = 3, (5+1)/2/4 = 3/4. Texts: h = (4+5)/2/1 = 9/2, (2+1)/2/2 = 3/4,
    # (3+8)/2/4 = 11/8.
    value = sum(math.log(g) for g in (5 / 2, 3.0, 3 / 4, 9 / 2, 3 / 4, 11 / 8)) / 6
    assert contrastive_objective(IMAGES, TEXTS, temperature=1.0) == pytest.approx(value, abs=1e-15)
    step = contrastive_step(IMAGES, TEXTS, [NEVER] * 3, [NEVER] * 3, temperature=1.0)
    assert step.loss == pytest.approx(value, abs=1e-15)
    assert step.surrogate == pytest.approx(value + 1.0, abs=1e-15)  # g / u = 1 for each of 2 b anchors
    np.testing.assert_allclose(np.exp(step.log_inner_image), [5 / 2, 3.0, 3 / 4])
    np.testing.assert_allclose(np.exp(step.log_inner_text), [9 / 2, 3 / 4, 11 / 8])
    # radius and eps: math.log(g + 1/2) + 0.3 for each
    value = sum(math.log(g + 0.5) + 0.3 for g in (5 / 2, 3.0, 3 / 4, 9 / 2, 3 / 4, 11 / 8)) / 6
    assert contrastive_objective(IMAGES, TEXTS, temperature=1.0, radius=0.3, eps=0.5) == pytest.approx(value, abs=1e-15)


def test_step_with_memory_by_hand() -> None:
    # gamma = 1/2; u_old = 1, never, 2 and v_old = 1/2, 1, never.
    u = [(1 + 5 / 2) / 2, 3.0, (2 + 3 / 4) / 2]
    v = [(1 / 2 + 9 / 2) / 2, (1 + 3 / 4) / 2, 11 / 8]
    step = contrastive_step(
        IMAGES, TEXTS, [0.0, NEVER, math.log(2.0)], [-math.log(2.0), 0.0, NEVER], temperature=1.0, gamma=0.5
    )
    np.testing.assert_allclose(np.exp(step.log_inner_image), u, rtol=1e-15)
    np.testing.assert_allclose(np.exp(step.log_inner_text), v, rtol=1e-15)
    loss = sum(math.log(value) for value in u + v) / 6
    assert step.loss == pytest.approx(loss, abs=1e-15)
    # g / u: 10/7, 1, 6/11 for images; 9/5, 6/7, 1 for texts.
    assert step.surrogate == pytest.approx(loss + (10 / 7 + 1 + 6 / 11 + 9 / 5 + 6 / 7 + 1) / 6, abs=1e-15)

    # w_ij = exp(D_ij) / u_i / 2, w'_ij = exp(D'_ij) / v_j / 2.
    W = np.array([[0, 4 / 7, 6 / 7], [1 / 3, 0, 2 / 3], [5 / 11, 1 / 11, 0]])
    W_text = np.array([[0, 4 / 7, 3 / 11], [4 / 5, 0, 8 / 11], [1, 2 / 7, 0]])
    # c_i: row sums 10/7, 1, 6/11 and column sums 9/5, 6/7, 1.
    c = np.array([10 / 7 + 9 / 5, 1 + 6 / 7, 6 / 11 + 1])
    V = W + W_text
    np.testing.assert_allclose(step.image_gradient, (V @ TEXTS - c[:, None] * TEXTS) / 6, atol=1e-15)
    np.testing.assert_allclose(step.text_gradient, (V.T - np.diag(c)) / 6, atol=1e-15)  # images are unit vectors

    # Temperature: L - sum w D, with D = math.log(TABLE_ij / TABLE_ii) for images ...
    images = [
        math.log(u[0]) - (4 / 7 * math.log(2) + 6 / 7 * math.log(3)),
        math.log(u[1]) - (1 / 3 * math.log(2) + 2 / 3 * math.log(4)),
        math.log(u[2]) - (5 / 11 * math.log(5 / 4) + 1 / 11 * math.log(1 / 4)),
    ]
    # ... and math.log(TABLE_ij / TABLE_jj) for texts.
    texts = [
        math.log(v[0]) - (4 / 5 * math.log(4) + 1 * math.log(5)),
        math.log(v[1]) - (4 / 7 * math.log(1) + 2 / 7 * math.log(1 / 2)),
        math.log(v[2]) - (3 / 11 * math.log(3 / 4) + 8 / 11 * math.log(2)),
    ]
    assert step.temperature_gradient == pytest.approx(sum(images + texts) / 6, abs=1e-15)
    ones = np.ones(3)
    pair = contrastive_step(
        IMAGES, TEXTS, [0.0, NEVER, math.log(2.0)], [-math.log(2.0), 0.0, NEVER], temperature=(ones, ones), gamma=0.5
    ).temperature_gradient
    np.testing.assert_allclose(pair, np.array([images, texts]) / 6, atol=1e-15)


def test_mask_by_hand() -> None:
    # Negatives: image 0 meets text 1 only, image 1 texts 0 and 2, image 2 none; so text 0 meets image 1, text 1 meets
    # image 0, text 2 meets image 1.
    mask = np.array([[True, True, False], [True, False, True], [False, False, True]])
    step = contrastive_step(IMAGES, TEXTS, [NEVER] * 3, [NEVER] * 3, temperature=1.0, radius=0.1, pair_mask=mask)
    g, h = (2.0, (4 / 2 + 8 / 2) / 2), (4.0, 1.0, 8 / 4)
    np.testing.assert_allclose(step.log_inner_image, [math.log(g[0]), math.log(g[1]), NEVER], atol=1e-15)
    np.testing.assert_allclose(step.log_inner_text, np.log(h), atol=1e-15)
    # Five anchors with the radius, but divided by 2 b = 6.
    assert step.loss == pytest.approx((sum(math.log(value) for value in g + h) + 5 * 0.1) / 6, abs=1e-15)


def high_precision_step(
    p: dict[str, Any], *, temperature: Any, gamma: Any, reference_weight: float, radius: float, eps: float
) -> ContrastiveStep:
    """The closed form of the theory page, all pairs negatives."""
    with mp.workdps(50):
        b = len(p["image"])
        E1, E2, R1, R2 = (mp.matrix(a.tolist()) for a in (p["image"], p["text"], *p["reference"]))
        Z = E1 * E2.T - mp.mpf(reference_weight) * (R1 * R2.T)
        W = [mp.zeros(b), mp.zeros(b)]  # row: image, column: text
        log_u, temperature_gradient, loss, surrogate = [[], []], [[], []], mp.mpf(0), mp.mpf(0)
        for side in (0, 1):
            for a in range(b):
                t, weight_of_new = mp.mpf(float(temperature[side][a])), mp.mpf(float(gamma[side][a]))
                others = [k for k in range(b) if k != a]
                D = {k: ((Z[a, k] if side == 0 else Z[k, a]) - Z[a, a]) / t for k in others}
                g = sum(mp.exp(D[k]) for k in others) / (b - 1)
                old = p["log_inner"][side][a]
                u = g if old == NEVER else (1 - weight_of_new) * mp.exp(mp.mpf(float(old))) + weight_of_new * g
                level = mp.log(mp.mpf(eps) + u) + mp.mpf(radius)
                w = {k: mp.exp(D[k]) / (mp.mpf(eps) + u) / (b - 1) for k in others}
                for k in others:
                    W[side][(a, k) if side == 0 else (k, a)] = w[k]
                log_u[side].append(mp.log(u))
                temperature_gradient[side].append((level - sum(w[k] * D[k] for k in others)) / (2 * b))
                loss += t * level / (2 * b)
                surrogate += t * (level + g / (mp.mpf(eps) + u)) / (2 * b)
        V = W[0] + W[1]
        c = mp.diag([sum(W[0][i, j] for j in range(b)) + sum(W[1][j, i] for j in range(b)) for i in range(b)])
        dE1, dE2 = (V * E2 - c * E2) / (2 * b), (V.T * E1 - c * E1) / (2 * b)

        def numbers(matrix: Any) -> np.ndarray:
            return np.array([[float(entry) for entry in row] for row in matrix.tolist()])

        pair = tuple(np.array([float(entry) for entry in side]) for side in temperature_gradient)
        states = (np.array([float(entry) for entry in side]) for side in log_u)
        return ContrastiveStep(float(loss), float(surrogate), numbers(dE1), numbers(dE2), pair, *states)


@pytest.mark.parametrize(
    ("temperature", "reference_weight", "radius", "eps"),
    [(0.5, 0.0, 0.0, 0.0), (0.07, 1.0, 0.2, 1e-3), (0.01, 0.5, 0.0, 1e-14), (0.01, 1.5, 6.5, 0.0)],
)
def test_step_agrees_with_mpmath(temperature: float, reference_weight: float, radius: float, eps: float) -> None:
    p = problem(seed=11, b=6, d=5)
    options: dict[str, Any] = {"reference_weight": reference_weight, "radius": radius, "eps": eps}
    options["temperature"] = tuple(temperature * (0.7 + values) for values in p["temperatures"])
    options["gamma"] = p["gammas"]
    step = contrastive_step(p["image"], p["text"], *p["log_inner"], reference_features=p["reference"], **options)
    expected = high_precision_step(p, **options)
    # D is a difference of similarities divided by t: its rounding error grows like 1/t.
    k = max(1.0, 0.1 / temperature)
    size = max(float(np.max(np.abs(gradient))) for gradient in (expected.image_gradient, expected.text_gradient))
    for field, value in expected._asdict().items():
        value, actual = np.array(value), np.array(getattr(step, field))
        scale = size if field in ("image_gradient", "text_gradient") else np.maximum(1.0, np.abs(value))
        np.testing.assert_array_less(np.abs(actual - value) / scale, k * 1e-13, err_msg=field)


@pytest.mark.parametrize("state", [600.0, -600.0, 700.0, -700.0])
def test_states_are_good_up_to_700(state: float) -> None:
    p = problem(seed=12)
    p["log_inner"][0, 0] = p["log_inner"][1, 2] = state
    options: dict[str, Any] = {"reference_weight": 1.0, "radius": 0.0, "eps": 0.0}
    options["temperature"], options["gamma"] = p["temperatures"], p["gammas"]
    step = contrastive_step(p["image"], p["text"], *p["log_inner"], reference_features=p["reference"], **options)
    for value, expected in zip(step, high_precision_step(p, **options), strict=True):
        np.testing.assert_allclose(value, expected, rtol=1e-12, atol=1e-13)


def test_where_the_linear_domain_ends_it_says_so() -> None:
    p = problem(seed=13)
    with pytest.raises(FloatingPointError, match=r"temperature must keep the linear domain .*, got 0\.0001"):
        contrastive_step(p["image"], p["text"], *p["log_inner"], temperature=1e-4)
    with pytest.raises(FloatingPointError, match="temperature must keep the linear domain"):
        contrastive_objective(p["image"], p["text"], temperature=1e-4)
    # Well aligned: every negative is far below the positive, g would be exactly 0.
    with pytest.raises(FloatingPointError, match=r"temperature must keep .*, got 0\.0001 \(value 0\.0\)"):
        contrastive_objective(np.eye(3), np.eye(3), temperature=1e-4)
    for side in (0, 1):
        for state in (1e4, -1e4):
            log_inner = p["log_inner"].copy()
            log_inner[side, 0] = state
            with pytest.raises(FloatingPointError, match=f"log_inner must keep the linear domain .*, got {state}"):
                contrastive_step(p["image"], p["text"], *log_inner, temperature=0.5)
