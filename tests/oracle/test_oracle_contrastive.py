"""The contrastive step of the oracle: worked by hand, mpmath, finite differences, and its link to InfoNCE.

Inputs are asymmetric throughout: images, texts, states, temperatures and masks differ, so that rows are not columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import mpmath as mp
import numpy as np
import pytest
from drrho_reference import (
    ContrastiveStep,
    contrastive_objective,
    contrastive_step,
    feature_gradients,
    info_nce,
    inner_estimate,
    moving_average,
    pair_exponents,
    pair_similarities,
    pair_weights,
)

from helpers.features import unit_rows

NEVER = -math.inf
log = math.log


def problem(seed: int = 0, b: int = 5, d: int = 4, r: int = 3) -> dict[str, Any]:
    """Features, reference features of another width, and states, some of them never visited."""
    rng = np.random.default_rng(seed)
    log_inner = rng.normal(size=(2, b))
    log_inner[0, 1] = log_inner[1, 3] = NEVER
    return {
        "image": unit_rows(rng, b, d),
        "text": unit_rows(rng, b, d),
        "reference": (unit_rows(rng, b, r), unit_rows(rng, b, r)),
        "log_inner": log_inner,
        "temperatures": (rng.uniform(0.2, 0.9, size=b), rng.uniform(0.2, 0.9, size=b)),
        "gammas": (rng.uniform(0.1, 0.9, size=b), rng.uniform(0.1, 0.9, size=b)),
    }


# Row 1 and column 4 have no negatives, other rows and columns have different numbers of them.
MASK = np.array(
    [
        [False, True, True, True, False],
        [False, True, False, False, False],
        [True, False, True, True, False],
        [True, True, True, False, False],
        [True, False, True, True, True],
    ]
)


def assert_equal_steps(one: ContrastiveStep, other: ContrastiveStep, tolerance: float = 1e-13) -> None:
    for field, left, right in zip(ContrastiveStep._fields, one, other, strict=True):
        np.testing.assert_allclose(left, right, rtol=tolerance, atol=tolerance, err_msg=field)


# ---------------------------------------------------------------------------------------------------------------------
# Worked by hand
# ---------------------------------------------------------------------------------------------------------------------

# With the unit vectors as images, Z is the transpose of the text features; here exp(Z) is a table of whole numbers and
# the temperature 1, so exp(D_ij) = TABLE_ij / TABLE_ii for images and TABLE_ij / TABLE_jj for texts.
TABLE = np.array([[1.0, 2.0, 3.0], [4.0, 2.0, 8.0], [5.0, 1.0, 4.0]])
IMAGES, TEXTS = np.eye(3), np.log(TABLE).T


def test_small_functions_by_hand() -> None:
    row = [0.0, log(2.0), log(3.0)]  # image 0: D = log 2, log 3
    np.testing.assert_allclose(pair_similarities(IMAGES, TEXTS), np.log(TABLE), atol=1e-15)
    assert pair_exponents(row, 0, [1, 2], 0.5) == pytest.approx([2 * log(2.0), 2 * log(3.0)])
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
    value = sum(log(g) for g in (5 / 2, 3.0, 3 / 4, 9 / 2, 3 / 4, 11 / 8)) / 6
    assert contrastive_objective(IMAGES, TEXTS, temperature=1.0) == pytest.approx(value, abs=1e-15)
    step = contrastive_step(IMAGES, TEXTS, [NEVER] * 3, [NEVER] * 3, temperature=1.0)
    assert step.loss == pytest.approx(value, abs=1e-15)
    assert step.surrogate == pytest.approx(value + 1.0, abs=1e-15)  # g / u = 1 for each of 2 b anchors
    np.testing.assert_allclose(np.exp(step.log_inner_image), [5 / 2, 3.0, 3 / 4])
    np.testing.assert_allclose(np.exp(step.log_inner_text), [9 / 2, 3 / 4, 11 / 8])
    # radius and eps: log(g + 1/2) + 0.3 for each
    value = sum(log(g + 0.5) + 0.3 for g in (5 / 2, 3.0, 3 / 4, 9 / 2, 3 / 4, 11 / 8)) / 6
    assert contrastive_objective(IMAGES, TEXTS, temperature=1.0, radius=0.3, eps=0.5) == pytest.approx(value, abs=1e-15)


def test_step_with_memory_by_hand() -> None:
    # gamma = 1/2; u_old = 1, never, 2 and v_old = 1/2, 1, never.
    u = [(1 + 5 / 2) / 2, 3.0, (2 + 3 / 4) / 2]
    v = [(1 / 2 + 9 / 2) / 2, (1 + 3 / 4) / 2, 11 / 8]
    step = contrastive_step(IMAGES, TEXTS, [0.0, NEVER, log(2.0)], [-log(2.0), 0.0, NEVER], temperature=1.0, gamma=0.5)
    np.testing.assert_allclose(np.exp(step.log_inner_image), u, rtol=1e-15)
    np.testing.assert_allclose(np.exp(step.log_inner_text), v, rtol=1e-15)
    loss = sum(log(value) for value in u + v) / 6
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

    # Temperature: L - sum w D, with D = log(TABLE_ij / TABLE_ii) for images ...
    images = [
        log(u[0]) - (4 / 7 * log(2) + 6 / 7 * log(3)),
        log(u[1]) - (1 / 3 * log(2) + 2 / 3 * log(4)),
        log(u[2]) - (5 / 11 * log(5 / 4) + 1 / 11 * log(1 / 4)),
    ]
    # ... and log(TABLE_ij / TABLE_jj) for texts.
    texts = [
        log(v[0]) - (4 / 5 * log(4) + 1 * log(5)),
        log(v[1]) - (4 / 7 * log(1) + 2 / 7 * log(1 / 2)),
        log(v[2]) - (3 / 11 * log(3 / 4) + 8 / 11 * log(2)),
    ]
    assert step.temperature_gradient == pytest.approx(sum(images + texts) / 6, abs=1e-15)
    ones = np.ones(3)
    pair = contrastive_step(
        IMAGES, TEXTS, [0.0, NEVER, log(2.0)], [-log(2.0), 0.0, NEVER], temperature=(ones, ones), gamma=0.5
    ).temperature_gradient
    np.testing.assert_allclose(pair, np.array([images, texts]) / 6, atol=1e-15)


def test_mask_by_hand() -> None:
    # Negatives: image 0 meets text 1 only, image 1 texts 0 and 2, image 2 none; so text 0 meets image 1, text 1 meets
    # image 0, text 2 meets image 1.
    mask = np.array([[True, True, False], [True, False, True], [False, False, True]])
    step = contrastive_step(IMAGES, TEXTS, [NEVER] * 3, [NEVER] * 3, temperature=1.0, radius=0.1, pair_mask=mask)
    g, h = (2.0, (4 / 2 + 8 / 2) / 2), (4.0, 1.0, 8 / 4)
    np.testing.assert_allclose(step.log_inner_image, [log(g[0]), log(g[1]), NEVER], atol=1e-15)
    np.testing.assert_allclose(step.log_inner_text, np.log(h), atol=1e-15)
    # Five anchors with the radius, but divided by 2 b = 6.
    assert step.loss == pytest.approx((sum(log(value) for value in g + h) + 5 * 0.1) / 6, abs=1e-15)


# ---------------------------------------------------------------------------------------------------------------------
# mpmath: the formulas once more as matrices, in the log domain, at 50 digits
# ---------------------------------------------------------------------------------------------------------------------


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


# ---------------------------------------------------------------------------------------------------------------------
# Finite differences
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


OPTIONS: list[dict[str, Any]] = [
    {},
    {"reference_weight": 0.0},
    {"reference_weight": 0.5, "eps": 0.05},
    {"reference_weight": 1.5, "radius": 0.7},
    {"reference_weight": 1.0, "pair_mask": MASK, "radius": 0.3, "eps": 1e-3},
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("per_anchor", [False, True])
def test_without_memory_gradients_are_those_of_the_objective(options: dict[str, Any], per_anchor: bool) -> None:
    p = problem(seed=21)
    if options:
        options = {"reference_features": p["reference"], **options}
    temperature = p["temperatures"] if per_anchor else 0.6
    step = contrastive_step(p["image"], p["text"], *p["log_inner"], temperature=temperature, **options)

    def objective(image: Any = p["image"], text: Any = p["text"], temperature: Any = temperature) -> float:
        return contrastive_objective(image, text, temperature=temperature, **options)

    assert step.loss == pytest.approx(objective(), abs=1e-15)
    np.testing.assert_allclose(step.image_gradient, slope(lambda image: objective(image=image), p["image"]), atol=1e-8)
    np.testing.assert_allclose(step.text_gradient, slope(lambda text: objective(text=text), p["text"]), atol=1e-8)
    if per_anchor:
        both = slope(lambda pair: objective(temperature=(pair[0], pair[1])), np.array(temperature))
        np.testing.assert_allclose(step.temperature_gradient, both, atol=1e-8)
    else:
        single = slope(lambda value: objective(temperature=float(value)), np.array(temperature))
        assert step.temperature_gradient == pytest.approx(float(single), abs=1e-8)


def surrogate_with_frozen_state(
    p: dict[str, Any], image: Any, text: Any, temperature: Any, *, frozen: dict[str, Any], eps: float, radius: float,
    reference_weight: float, pair_mask: np.ndarray,
) -> float:  # fmt: skip
    """The surrogate in whole arrays; ``frozen`` holds the u and temperatures through which no gradient flows."""
    R1, R2 = p["reference"]
    Z = image @ text.T - reference_weight * R1 @ R2.T
    negative = pair_mask & ~np.eye(len(Z), dtype=bool)
    total = 0.0
    for side, (table, allowed) in enumerate([(Z, negative), (Z.T, negative.T)]):
        number = allowed.sum(axis=1)
        t, u, t_frozen = temperature[side], frozen["u"][side], frozen["temperature"][side]
        exponentials = np.exp((table - np.diag(table)[:, None]) / t[:, None]) * allowed
        g = exponentials.sum(axis=1) / np.maximum(number, 1)
        terms = t * (np.log(eps + u) + radius) + t_frozen * g / (eps + u)
        total += terms[number > 0].sum()
    return total / (2 * len(Z))


@pytest.mark.parametrize("reference_weight", [0.0, 0.5, 1.5])
@pytest.mark.parametrize("mask", [np.ones((5, 5), dtype=bool), MASK])
def test_with_memory_gradients_are_those_of_the_surrogate(reference_weight: float, mask: np.ndarray) -> None:
    p = problem(seed=22)
    temperature = np.array(p["temperatures"])
    options: dict[str, Any] = {"eps": 0.02, "radius": 0.4, "reference_weight": reference_weight, "pair_mask": mask}
    step = contrastive_step(
        p["image"], p["text"], *p["log_inner"], temperature=p["temperatures"], gamma=p["gammas"],
        reference_features=p["reference"], **options,
    )  # fmt: skip
    frozen = {"u": np.exp([step.log_inner_image, step.log_inner_text]), "temperature": temperature}

    def surrogate(image: Any = p["image"], text: Any = p["text"], temperature: Any = temperature) -> float:
        return surrogate_with_frozen_state(p, image, text, temperature, frozen=frozen, **options)

    assert step.surrogate == pytest.approx(surrogate(), abs=1e-14)
    np.testing.assert_allclose(step.image_gradient, slope(lambda image: surrogate(image=image), p["image"]), atol=1e-8)
    np.testing.assert_allclose(step.text_gradient, slope(lambda text: surrogate(text=text), p["text"]), atol=1e-8)
    both = slope(lambda pair: surrogate(temperature=pair), temperature)
    np.testing.assert_allclose(step.temperature_gradient, both, atol=1e-8)


# ---------------------------------------------------------------------------------------------------------------------
# What must be equal
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.05, 0.4, 3.0])
def test_eps_of_one_negative_makes_it_info_nce(temperature: float) -> None:
    p = problem(seed=31, b=6)
    b, t = 6, temperature
    step = contrastive_step(p["image"], p["text"], *p["log_inner"], temperature=t, eps=1 / (b - 1))
    plain = info_nce(p["image"], p["text"], temperature=t)
    assert step.loss == pytest.approx(t * (plain.loss - log(b - 1)), abs=1e-14)
    np.testing.assert_allclose(step.image_gradient, t * plain.image_gradient, atol=1e-14)
    np.testing.assert_allclose(step.text_gradient, t * plain.text_gradient, atol=1e-14)
    # The product rule: d(t (InfoNCE - log(b-1))) / dt.
    expected = plain.loss - log(b - 1) + t * plain.temperature_gradient
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


# ---------------------------------------------------------------------------------------------------------------------
# Errors
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"image": np.ones((5, 3))}, ValueError, r"text_features must have the shape \(5, 3\), got \(5, 4\)"),
        ({"image": np.ones(5)}, ValueError, r"image_features must have two axes, neither of them empty, got .* \(5,\)"),
        ({"image": np.ones((5, 0))}, ValueError, "image_features must have two axes, neither of them empty"),
        ({"image": np.full((5, 4), np.nan)}, ValueError, "image_features must be finite, got nan"),
        ({"text": np.full((5, 4), np.inf)}, ValueError, "text_features must be finite, got inf"),
        ({"image": np.ones((5, 4), dtype=complex)}, TypeError, "image_features must be an array of real numbers"),
        ({"image": np.ones((1, 4)), "text": np.ones((1, 4))}, ValueError, "must have at least 2 rows, got 1"),
        ({"log_inner": np.zeros((2, 4))}, ValueError, r"log_inner_image must have the shape \(5,\), got \(4,\)"),
        ({"log_inner": (np.zeros(5), np.zeros((5, 1)))}, ValueError, r"log_inner_text must have the shape \(5,\)"),
        ({"log_inner": (np.zeros(5), np.full(5, np.nan))}, ValueError, "log_inner_text must be finite or -inf, got"),
        ({"log_inner": (np.full(5, np.inf), np.zeros(5))}, ValueError, "log_inner_image must be finite or -inf, got"),
        ({"temperature": 0.0}, ValueError, "temperature must be positive, got 0.0"),
        ({"temperature": np.nan}, ValueError, "temperature must be finite, got nan"),
        ({"temperature": "warm"}, TypeError, "temperature must be a real number, got 'warm'"),
        ({"temperature": np.ones(5)}, TypeError, "temperature must be a number or a pair of arrays, got ndarray"),
        ({"temperature": (np.ones(5),)}, ValueError, "temperature must be a number or a pair of arrays, got 1 entries"),
        ({"temperature": (np.ones(5), np.ones(4))}, ValueError, r"temperature\[1\] must have the shape \(5,\)"),
        ({"temperature": (np.ones(5), -np.ones(5))}, ValueError, "temperature must be positive, got -1.0"),
        ({"gamma": 0.0}, ValueError, r"gamma must lie in \(0, 1\], got 0.0"),
        ({"gamma": 1.1}, ValueError, r"gamma must lie in \(0, 1\], got 1.1"),
        ({"gamma": (np.ones(5), np.zeros(5))}, ValueError, r"gamma must lie in \(0, 1\], got 0.0"),
        ({"radius": -1.0}, ValueError, "radius must be at least 0, got -1.0"),
        ({"eps": -1e-9}, ValueError, "eps must be at least 0, got -1e-09"),
        ({"eps": np.inf}, ValueError, "eps must be finite, got inf"),
        ({"reference_features": np.ones((5, 4))}, TypeError, "must be a pair of arrays, got ndarray"),
        ({"reference_features": (np.ones((5, 4)),)}, TypeError, "reference_features must be a pair of arrays"),
        ({"reference_features": (np.ones((5, 2)), np.ones((5, 3)))}, ValueError, r"features\[1\] must have"),
        ({"reference_features": (np.ones((4, 2)), np.ones((4, 2)))}, ValueError, "must have 5 rows, got 4"),
        ({"reference_weight": -0.5}, ValueError, "reference_weight must be at least 0, got -0.5"),
        ({"pair_mask": np.ones((5, 5))}, TypeError, "pair_mask must be an array of bool, got dtype float64"),
        ({"pair_mask": np.ones(5, dtype=bool)}, ValueError, r"pair_mask must have the shape \(5, 5\), got \(5,\)"),
    ],
)  # fmt: skip
def test_bad_input_is_refused(changes: dict[str, Any], error: Any, message: str) -> None:
    p = problem()
    image, text, log_inner = (changes.get(name, p[name]) for name in ("image", "text", "log_inner"))
    options = {"temperature": 0.5, **{k: v for k, v in changes.items() if k not in ("image", "text", "log_inner")}}
    with pytest.raises(error, match=message):
        contrastive_step(image, text, *log_inner, **options)


def test_the_objective_needs_two_pairs() -> None:
    with pytest.raises(ValueError, match="image_features must have at least 2 rows, got 1"):
        contrastive_objective([[1.0]], [[1.0]], temperature=0.5)
