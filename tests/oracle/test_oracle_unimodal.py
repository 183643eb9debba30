"""The two-view step of the oracle: worked by hand, the closed form of matrices at 50 digits, finite differences.

Views, states, temperatures and gammas differ, so that neither views nor rows and columns can be mistaken.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import mpmath as mp
import numpy as np
import pytest
from drrho_reference import UnimodalStep, unimodal_contrastive_step, unimodal_objective, view_positions

NEVER = -math.inf
log = math.log


def unit_rows(rng: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    features = rng.normal(size=(rows, columns))
    return features / np.linalg.norm(features, axis=1, keepdims=True)


def problem(seed: int = 0, b: int = 4, d: int = 3, r: int = 2) -> dict[str, Any]:
    """Views, reference features of another width, and states, some of them never visited."""
    rng = np.random.default_rng(seed)
    log_inner = rng.normal(size=(2, b))
    log_inner[0, 1] = log_inner[1, 3] = NEVER
    return {
        "views": (unit_rows(rng, b, d), unit_rows(rng, b, d)),
        "reference": (unit_rows(rng, b, r), unit_rows(rng, b, r)),
        "log_inner": log_inner,
        "temperatures": (rng.uniform(0.2, 0.9, size=b), rng.uniform(0.2, 0.9, size=b)),
        "gammas": (rng.uniform(0.1, 0.9, size=b), rng.uniform(0.1, 0.9, size=b)),
    }


def assert_equal_steps(one: UnimodalStep, other: UnimodalStep, tolerance: float = 1e-13) -> None:
    for field, left, right in zip(UnimodalStep._fields, one, other, strict=True):
        np.testing.assert_allclose(left, right, rtol=tolerance, atol=tolerance, err_msg=field)


# ---------------------------------------------------------------------------------------------------------------------
# Worked by hand
# ---------------------------------------------------------------------------------------------------------------------

# Two samples. Columns of the features: with these rows A is
#            x1     y1     x2     y2        x1, y1: view 1 of samples 0 and 1; x2, y2: view 2
#   x1        .    log 2  log 3  log 5
#   y1      log 2    .    log 7  log 4
#   x2      log 3  log 7    .    log 6
#   y2      log 5  log 4  log 6    .       (what stands on the diagonal is never read)
# because the first rows are unit vectors and the last ones carry the numbers.
X1, Y1 = [1.0, 0.0, 0.0, 0.0], [log(2), 1.0, 0.0, 0.0]
X2 = [log(3), log(7) - log(2) * log(3), 1.0, 0.0]
Y2_0, Y2_1 = log(5), log(4) - log(2) * log(5)
Y2 = [Y2_0, Y2_1, log(6) - Y2_0 * X2[0] - Y2_1 * X2[1], 1.0]
VIEW1, VIEW2 = np.array([X1, Y1]), np.array([X2, Y2])


def test_positions_by_hand() -> None:
    # Rows of three samples: 0 1 2 of view 1, 3 4 5 of view 2.
    assert view_positions(1, 3) == (4, [0, 2, 3, 5])
    assert view_positions(5, 3) == (2, [0, 1, 3, 4])


def test_step_by_hand() -> None:
    # exp(A_ak - A_ap): x1 meets y1 and y2 against x2: 2/3, 5/3. y1 meets x1, x2 against y2: 2/4, 7/4.
    # x2 meets y1, y2 against x1: 7/3, 6/3. y2 meets x1, x2 against y1: 5/4, 6/4.
    g1, g2 = [7 / 6, 9 / 8], [13 / 6, 11 / 8]
    objective = sum(log(g) for g in g1 + g2) / 4
    assert unimodal_objective(VIEW1, VIEW2, temperature=1.0) == pytest.approx(objective, abs=1e-15)

    # gamma 1/4; x1 has u = 2, y1 is new, x2 has u = 1/2, y2 has u = 1.
    old1, old2 = [log(2), NEVER], [-log(2), 0.0]
    u1, u2 = [(6 + 7 / 6) / 4, 9 / 8], [(3 / 2 + 13 / 6) / 4, (3 + 11 / 8) / 4]
    step = unimodal_contrastive_step(VIEW1, VIEW2, old1, old2, temperature=1.0, gamma=0.25, radius=0.5, eps=0.25)
    np.testing.assert_allclose(step.log_inner_view1, np.log(u1), atol=1e-15)
    np.testing.assert_allclose(step.log_inner_view2, np.log(u2), atol=1e-15)
    level = [log(0.25 + u) + 0.5 for u in u1 + u2]
    assert step.loss == pytest.approx(sum(level) / 4, abs=1e-15)
    ratio = [g / (0.25 + u) for g, u in zip(g1 + g2, u1 + u2, strict=True)]
    assert step.surrogate == pytest.approx((sum(level) + sum(ratio)) / 4, abs=1e-15)

    # Weights exp(D) / (eps + u) / 2, rows x1 y1 x2 y2.
    q = [2 * (0.25 + u) for u in u1 + u2]
    w = {
        ("x1", "y1"): 2 / 3 / q[0], ("x1", "y2"): 5 / 3 / q[0], ("y1", "x1"): 2 / 4 / q[1], ("y1", "x2"): 7 / 4 / q[1],
        ("x2", "y1"): 7 / 3 / q[2], ("x2", "y2"): 6 / 3 / q[2], ("y2", "x1"): 5 / 4 / q[3], ("y2", "x2"): 6 / 4 / q[3],
    }  # fmt: skip
    x1, y1, x2, y2 = (np.array(row) for row in (X1, Y1, X2, Y2))
    # x1 as an anchor: to y1 and y2, away from x2. As a negative of y1 and y2: towards them. As the positive of x2.
    x1_gradient = (
        w["x1", "y1"] * (y1 - x2) + w["x1", "y2"] * (y2 - x2) + w["y1", "x1"] * y1 + w["y2", "x1"] * y2
        - (w["x2", "y1"] + w["x2", "y2"]) * x2
    ) / 4  # fmt: skip
    y2_gradient = (
        w["y2", "x1"] * (x1 - y1) + w["y2", "x2"] * (x2 - y1) + w["x1", "y2"] * x1 + w["x2", "y2"] * x2
        - (w["y1", "x1"] + w["y1", "x2"]) * y1
    ) / 4  # fmt: skip
    np.testing.assert_allclose(step.view1_gradient[0], x1_gradient, atol=1e-15)
    np.testing.assert_allclose(step.view2_gradient[1], y2_gradient, atol=1e-15)

    # L + radius - sum w D.
    D = {("x1", "y1"): 2 / 3, ("x1", "y2"): 5 / 3, ("y2", "x1"): 5 / 4, ("y2", "x2"): 6 / 4}
    both = (np.ones(2), np.ones(2))
    gradient = unimodal_contrastive_step(
        VIEW1, VIEW2, old1, old2, temperature=both, gamma=0.25, radius=0.5, eps=0.25
    ).temperature_gradient
    assert isinstance(gradient, tuple)
    for anchor, position, value in [("x1", 0, gradient[0][0]), ("y2", 3, gradient[1][1])]:
        expected = level[position] - sum(w[pair] * log(ratio) for pair, ratio in D.items() if pair[0] == anchor)
        assert value == pytest.approx(expected / 4, abs=1e-15)
    assert step.temperature_gradient == pytest.approx(float(np.sum(gradient)), abs=1e-15)


# ---------------------------------------------------------------------------------------------------------------------
# mpmath: the closed form of the theory page, blocks A11, A12, A22 and all
# ---------------------------------------------------------------------------------------------------------------------


def high_precision_step(
    p: dict[str, Any], *, temperature: Any, gamma: Any, reference_weight: float, radius: float, eps: float
) -> UnimodalStep:
    with mp.workdps(50):
        Z1, Z2, R1, R2 = (mp.matrix(a.tolist()) for a in (*p["views"], *p["reference"]))
        b, weight = Z1.rows, mp.mpf(reference_weight)
        A11 = Z1 * Z1.T - weight * (R1 * R1.T)
        A12 = Z1 * Z2.T - weight * (R1 * R2.T)
        A22 = Z2 * Z2.T - weight * (R2 * R2.T)
        W11, W12, W21, W22 = (mp.zeros(b) for _ in range(4))
        log_u, temperature_gradient, loss, surrogate = [[], []], [[], []], mp.mpf(0), mp.mpf(0)
        for side in (0, 1):
            for i in range(b):
                t, new = mp.mpf(float(temperature[side][i])), mp.mpf(float(gamma[side][i]))
                others = [j for j in range(b) if j != i]
                same = {j: ((A11 if side == 0 else A22)[i, j] - A12[i, i]) / t for j in others}
                cross = {j: ((A12[i, j] if side == 0 else A12[j, i]) - A12[i, i]) / t for j in others}
                exponents = [*same.values(), *cross.values()]
                g = mp.fsum(mp.exp(D) for D in exponents) / (2 * b - 2)
                old = p["log_inner"][side][i]
                u = g if old == NEVER else (1 - new) * mp.exp(mp.mpf(float(old))) + new * g
                level, scale = mp.log(eps + u) + mp.mpf(radius), (mp.mpf(eps) + u) * (2 * b - 2)
                for j in others:
                    (W11 if side == 0 else W22)[i, j] = mp.exp(same[j]) / scale
                    if side == 0:
                        W12[i, j] = mp.exp(cross[j]) / scale
                    else:
                        W21[j, i] = mp.exp(cross[j]) / scale  # index: view 1, view 2
                log_u[side].append(mp.log(u))
                slope = level - mp.fsum(mp.exp(D) * D for D in exponents) / scale
                temperature_gradient[side].append(slope / (2 * b))
                loss += t * level / (2 * b)
                surrogate += t * (level + g / (mp.mpf(eps) + u)) / (2 * b)
        V12, V11, V22 = W12 + W21, W11 + W11.T, W22 + W22.T
        c = mp.diag([
            mp.fsum(W11[i, j] + W12[i, j] + W22[i, j] + W21[j, i] for j in range(b)) for i in range(b)
        ])  # fmt: skip
        dZ1 = (V11 * Z1 + V12 * Z2 - c * Z2) / (2 * b)
        dZ2 = (V22 * Z2 + V12.T * Z1 - c * Z1) / (2 * b)

        def numbers(matrix: Any) -> np.ndarray:
            return np.array([[float(entry) for entry in row] for row in matrix.tolist()])

        pair = tuple(np.array([float(entry) for entry in side]) for side in temperature_gradient)
        states = (np.array([float(entry) for entry in side]) for side in log_u)
        return UnimodalStep(float(loss), float(surrogate), numbers(dZ1), numbers(dZ2), pair, *states)


@pytest.mark.parametrize(
    ("temperature", "reference_weight", "radius", "eps"),
    # 0.01 with positives of any cosine: a shift by a constant would leave float64's exp in the log domain of others.
    [(0.5, 0.0, 0.0, 0.0), (0.07, 1.0, 0.2, 1e-3), (0.01, 1.5, 6.5, 0.0)],
)
def test_step_agrees_with_the_closed_form_at_50_digits(
    temperature: float, reference_weight: float, radius: float, eps: float
) -> None:
    p = problem(seed=11)
    options: dict[str, Any] = {"reference_weight": reference_weight, "radius": radius, "eps": eps}
    options["temperature"] = tuple(temperature * (0.7 + values) for values in p["temperatures"])
    options["gamma"] = p["gammas"]
    step = unimodal_contrastive_step(*p["views"], *p["log_inner"], reference_features=p["reference"], **options)
    expected = high_precision_step(p, **options)
    k = max(1.0, 0.1 / temperature)  # D is a difference of similarities divided by t: its rounding error grows like 1/t
    size = max(float(np.max(np.abs(gradient))) for gradient in (expected.view1_gradient, expected.view2_gradient))
    for field, value in expected._asdict().items():
        value, actual = np.array(value), np.array(getattr(step, field))
        scale = size if field in ("view1_gradient", "view2_gradient") else np.maximum(1.0, np.abs(value))
        np.testing.assert_array_less(np.abs(actual - value) / scale, k * 1e-13, err_msg=field)


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


@pytest.mark.parametrize("options", [{}, {"reference_weight": 0.5, "eps": 0.05}, {"radius": 0.7}])
def test_without_memory_gradients_are_those_of_the_objective(options: dict[str, Any]) -> None:
    p = problem(seed=21)
    if options:
        options = {"reference_features": p["reference"], **options}
    step = unimodal_contrastive_step(*p["views"], *p["log_inner"], temperature=p["temperatures"], **options)
    view1, view2 = p["views"]

    def objective(view1: Any = view1, view2: Any = view2, temperature: Any = p["temperatures"]) -> float:
        return unimodal_objective(view1, view2, temperature=temperature, **options)

    assert step.loss == pytest.approx(objective(), abs=1e-15)
    np.testing.assert_allclose(step.view1_gradient, slope(lambda view: objective(view1=view), view1), atol=1e-8)
    np.testing.assert_allclose(step.view2_gradient, slope(lambda view: objective(view2=view), view2), atol=1e-8)
    both = slope(lambda pair: objective(temperature=(pair[0], pair[1])), np.array(p["temperatures"]))
    np.testing.assert_allclose(step.temperature_gradient, both, atol=1e-8)


def test_with_memory_gradients_are_those_of_the_surrogate() -> None:
    p = problem(seed=22)
    options: dict[str, Any] = {
        "eps": 0.02,
        "radius": 0.4,
        "reference_weight": 1.5,
        "reference_features": p["reference"],
    }
    temperature = np.array(p["temperatures"])
    step = unimodal_contrastive_step(
        *p["views"], *p["log_inner"], temperature=p["temperatures"], gamma=p["gammas"], **options
    )
    u, t_frozen = np.exp([step.log_inner_view1, step.log_inner_view2]), temperature.copy()
    R1, R2 = p["reference"]

    def surrogate(view1: Any = p["views"][0], view2: Any = p["views"][1], t: Any = temperature) -> float:
        """In whole arrays; no gradient flows through u and through the temperature that multiplies g / u."""
        b = len(view1)
        A11, A12, A22 = (
            left @ right.T - 1.5 * r_left @ r_right.T
            for left, right, r_left, r_right in [
                (view1, view1, R1, R1), (view1, view2, R1, R2), (view2, view2, R2, R2),
            ]
        )  # fmt: skip
        p_i, off = np.diag(A12), ~np.eye(b, dtype=bool)
        total = 0.0
        for side, (same, cross) in enumerate([(A11, A12), (A22, A12.T)]):
            exponentials = sum(np.exp((a - p_i[:, None]) / t[side][:, None]) * off for a in (same, cross))
            g = exponentials.sum(axis=1) / (2 * b - 2)
            terms = t[side] * (np.log(0.02 + u[side]) + 0.4) + t_frozen[side] * g / (0.02 + u[side])
            total += terms.sum()
        return total / (2 * b)

    assert step.surrogate == pytest.approx(surrogate(), abs=1e-14)
    np.testing.assert_allclose(step.view1_gradient, slope(lambda v: surrogate(view1=v), p["views"][0]), atol=1e-8)
    np.testing.assert_allclose(step.view2_gradient, slope(lambda v: surrogate(view2=v), p["views"][1]), atol=1e-8)
    np.testing.assert_allclose(step.temperature_gradient, slope(lambda t: surrogate(t=t), temperature), atol=1e-8)


# ---------------------------------------------------------------------------------------------------------------------
# What must be equal
# ---------------------------------------------------------------------------------------------------------------------


def test_views_may_change_roles() -> None:
    p = problem(seed=31)
    options: dict[str, Any] = {"radius": 0.2, "eps": 0.01, "reference_weight": 0.5}
    step = unimodal_contrastive_step(
        *p["views"], *p["log_inner"], temperature=p["temperatures"], gamma=p["gammas"],
        reference_features=p["reference"], **options,
    )  # fmt: skip
    swapped = unimodal_contrastive_step(
        *p["views"][::-1], *p["log_inner"][::-1], temperature=p["temperatures"][::-1], gamma=p["gammas"][::-1],
        reference_features=p["reference"][::-1], **options,
    )  # fmt: skip
    back = UnimodalStep(
        swapped.loss, swapped.surrogate, swapped.view2_gradient, swapped.view1_gradient,
        swapped.temperature_gradient[::-1], swapped.log_inner_view2, swapped.log_inner_view1,  # type: ignore[index]
    )  # fmt: skip
    assert_equal_steps(step, back)


def test_reference_is_a_wider_product() -> None:
    # <z_a, z_k> - lambda <r_a, r_k> is no inner product of wider rows with themselves; with lambda = -1 it would be.
    # So the wider rows stand for the model, and the reference takes the extra part off again.
    p = problem(seed=32)
    extra = (np.full((4, 2), 0.3), np.array([[0.1, 0.7], [0.4, -0.2], [0.5, 0.5], [-0.6, 0.2]]))
    options: dict[str, Any] = {"temperature": 0.4, "gamma": 0.6, "radius": 0.1}
    plain = unimodal_contrastive_step(*p["views"], *p["log_inner"], **options)
    wider = unimodal_contrastive_step(
        *(np.hstack([view, 2 * more]) for view, more in zip(p["views"], extra, strict=True)), *p["log_inner"],
        reference_features=extra, reference_weight=4.0, **options,
    )  # fmt: skip
    wider = wider._replace(view1_gradient=wider.view1_gradient[:, :3], view2_gradient=wider.view2_gradient[:, :3])
    assert_equal_steps(plain, wider)


def test_reference_weight_0_is_no_reference() -> None:
    p = problem(seed=33)
    options: dict[str, Any] = {"temperature": p["temperatures"], "gamma": p["gammas"]}
    with_reference, without = (
        unimodal_contrastive_step(*p["views"], *p["log_inner"], **more, **options)
        for more in ({"reference_features": p["reference"], "reference_weight": 0.0}, {})
    )
    assert_equal_steps(with_reference, without, 0.0)


def test_aligned_positives_at_a_cold_temperature_are_finite() -> None:
    # Every positive has cosine above 0.99, where a released loss gives nan at temperature 0.01.
    rng = np.random.default_rng(34)
    view1 = unit_rows(rng, 4, 16)
    view2 = view1 + 0.01 * rng.normal(size=view1.shape)
    view2 /= np.linalg.norm(view2, axis=1, keepdims=True)
    step = unimodal_contrastive_step(view1, view2, [NEVER] * 4, [NEVER] * 4, temperature=0.01)
    assert all(np.all(np.isfinite(value)) for value in step)
    assert step.loss < -0.1
    with pytest.raises(FloatingPointError, match=r"temperature must keep the linear domain .*, got 0\.0001"):
        unimodal_contrastive_step(view1, view2, [NEVER] * 4, [NEVER] * 4, temperature=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"views": (np.ones((4, 3)), np.ones((4, 2)))}, r"view2_features must have the shape \(4, 3\), got \(4, 2\)"),
        ({"views": (np.ones((1, 3)), np.ones((1, 3)))}, "view1_features must have at least 2 rows, got 1"),
        ({"log_inner": np.zeros((2, 3))}, r"log_inner_view1 must have the shape \(4,\), got \(3,\)"),
        ({"log_inner": (np.zeros(4), np.full(4, np.nan))}, "log_inner_view2 must be finite or -inf, got"),
        ({"temperature": 0.0}, "temperature must be positive, got 0.0"),
        ({"gamma": 1.5}, r"gamma must lie in \(0, 1\], got 1.5"),
        ({"radius": -1.0}, "radius must be at least 0, got -1.0"),
        ({"eps": -1.0}, "eps must be at least 0, got -1.0"),
        ({"reference_weight": -1.0}, "reference_weight must be at least 0, got -1.0"),
        ({"reference_features": (np.ones((3, 2)), np.ones((3, 2)))}, "reference_features must have 4 rows, got 3"),
    ],
)
def test_bad_input_is_refused(changes: dict[str, Any], message: str) -> None:
    p = problem()
    views, log_inner = (changes.get(name, p[name]) for name in ("views", "log_inner"))
    options = {"temperature": 0.5, **{k: v for k, v in changes.items() if k not in ("views", "log_inner")}}
    with pytest.raises(ValueError, match=message):
        unimodal_contrastive_step(*views, *log_inner, **options)
