"""The closed-form gradients against autograd of torch and JAX, finite differences, and InfoNCE.

The objective and the surrogate are written here once more, densely and as the theory page writes them, in operations
that NumPy, torch and JAX share.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from drrho_core import ContrastiveStep, contrastive_step, info_nce
from helpers import problems

CASES = {
    "plain": {"r": None},
    "reference": {"reference_weight": 1.5, "features": "aligned"},
    "floor and radius": {"eps": 0.2, "radius": 0.7, "reference_weight": 0.5},
    "mask": {"mask": "empty", "radius": 0.7, "eps": 1e-4},
    "cold": {"temperature": (0.02, 0.05)},
}


def draw(case: str, per_anchor: bool, **more: Any) -> Any:
    options = {"temperature": (0.2, 0.9), **CASES[case], **more}
    return problems.draw(31, b=6, d=4, per_anchor_temperature=per_anchor, **options)


def similarities(xp: Any, p: Any, E1: Any, E2: Any) -> Any:
    """Z, its reference part a constant."""
    Z = E1 @ E2.T
    if p.reference_features is not None:
        Z = Z - xp.asarray(p.reference_weight * p.reference_features[0] @ p.reference_features[1].T)
    return Z


def estimates(xp: Any, p: Any, Z: Any, tau: Any) -> tuple[Any, np.ndarray]:
    """For image anchors: g_i = mean_j exp((Z_ij - Z_ii) / t_i) over negatives, and who has any. Texts: give Z^T."""
    b = p.batch_size
    counts = (np.ones((b, b), dtype=bool) if p.pair_mask is None else p.pair_mask) & ~np.eye(b, dtype=bool)
    return (
        counts,
        lambda counts: (
            xp.sum(
                xp.exp((Z - Z[np.arange(b), np.arange(b)][:, None]) / tau[:, None]) * xp.asarray(counts * 1.0), axis=1
            )
            / xp.asarray(np.maximum(counts.sum(axis=1), 1) * 1.0)
        ),
    )


def both_sides(xp: Any, p: Any, E1: Any, E2: Any, t_image: Any, t_text: Any) -> list[tuple[Any, Any, np.ndarray]]:
    """Per direction: the temperatures, g and which anchors have negatives."""
    Z = similarities(xp, p, E1, E2)
    counts, of_images = estimates(xp, p, Z, t_image)
    _, of_texts = estimates(xp, p, Z.T, t_text)
    return [
        (t_image, of_images(counts), counts.any(axis=1)),
        (t_text, of_texts(counts.T), counts.any(axis=0)),
    ]


def objective(xp: Any, p: Any, E1: Any, E2: Any, t_image: Any, t_text: Any) -> Any:
    """mean_i [ t_i log(eps + g_i) + radius t_i + the same for texts ] / 2."""
    total = 0.0
    for t, g, active in both_sides(xp, p, E1, E2, t_image, t_text):
        # An anchor without negatives contributes nothing: its g is 0, so it gets a 1 to keep the logarithm finite.
        level = xp.log(p.eps + g + xp.asarray(1.0 * ~active)) + p.radius
        total = total + xp.sum(t * level * xp.asarray(1.0 * active))
    return total / (2 * p.batch_size)


def surrogate(xp: Any, p: Any, E1: Any, E2: Any, t_image: Any, t_text: Any, *, frozen: Any) -> Any:
    """sum_i [ t_i (sg L_i + radius) + sg t_i g_i / (eps + sg u_i) ] / 2b: sg is what stands in `frozen`."""
    total = 0.0
    sides = both_sides(xp, p, E1, E2, t_image, t_text)
    for (t, g, active), (t_frozen, u) in zip(sides, frozen, strict=True):
        level = xp.asarray(np.where(active, np.log(p.eps + u), 0.0)) + p.radius
        terms = t * level + xp.asarray(t_frozen) * g / xp.asarray(p.eps + u)
        total = total + xp.sum(terms * xp.asarray(1.0 * active))
    return total / (2 * p.batch_size)


def inputs(p: Any) -> tuple[np.ndarray, ...]:
    """Features and one temperature per anchor."""
    t = p.temperature if isinstance(p.temperature, tuple) else (np.full(p.batch_size, p.temperature),) * 2
    return p.image_features, p.text_features, *t


def torch_gradients(function: Any, p: Any) -> tuple[float, list[np.ndarray]]:
    import torch

    leaves = [torch.asarray(x).clone().requires_grad_() for x in inputs(p)]
    # NumPy's names: torch.sum takes axis=, torch.asarray and the rest are the same.
    value = function(torch, p, *leaves)
    value.backward()
    return float(value.detach()), [leaf.grad.numpy() for leaf in leaves]


def jax_gradients(function: Any, p: Any) -> tuple[float, list[np.ndarray]]:
    import jax

    jax.config.update("jax_enable_x64", True)
    f = jax.value_and_grad(lambda *x: function(jax.numpy, p, *x), argnums=(0, 1, 2, 3))
    value, gradients = f(*map(jax.numpy.asarray, inputs(p)))
    return float(value), [np.asarray(gradient) for gradient in gradients]


def differences(function: Any, p: Any) -> tuple[float, list[np.ndarray]]:
    """Central differences of fourth order."""
    at = [x.copy() for x in inputs(p)]
    gradients = []
    for x in at:
        slope = np.zeros_like(x)
        for index in np.ndindex(x.shape):
            kept, h = x[index], 2e-4 * (abs(x[index]) if x.ndim == 1 else 0.1)
            values = []
            for step in (-2, -1, 1, 2):
                x[index] = kept + step * h
                values.append(float(function(np, p, *at)))
            x[index] = kept
            slope[index] = (values[0] - 8 * values[1] + 8 * values[2] - values[3]) / (12 * h)
        gradients.append(slope)
    return float(function(np, p, *at)), gradients


AUTOGRAD = [
    pytest.param(torch_gradients, 1e-12, id="torch"),
    pytest.param(jax_gradients, 1e-12, id="jax"),
    pytest.param(differences, 1e-7, id="differences"),
]


def check(p: Any, step: ContrastiveStep, value: float, gradients: list[np.ndarray], unit: float, of: str) -> None:
    """Compare with what autograd says of the function that `of` names."""
    slopes = tuple(gradients[2:]) if isinstance(p.temperature, tuple) else np.float64(np.sum(gradients[2:]))
    expected = step._replace(
        **{of: np.float64(value)}, image_gradient=gradients[0], text_gradient=gradients[1], temperature_gradient=slopes
    )
    problems.check_step(step, expected, p, unit)


@pytest.mark.parametrize("per_anchor", [False, True], ids=["global", "per anchor"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("derive", "unit"), AUTOGRAD)
def test_without_memory_the_gradient_is_the_objectives(case: str, per_anchor: bool, derive: Any, unit: float) -> None:
    p = draw(case, per_anchor, gamma="one")
    step = contrastive_step(*p.arrays, **p.options)
    check(p, step, *derive(objective, p), unit, "loss")


@pytest.mark.parametrize("per_anchor", [False, True], ids=["global", "per anchor"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("derive", "unit"), AUTOGRAD)
def test_with_memory_the_gradient_is_the_surrogates(case: str, per_anchor: bool, derive: Any, unit: float) -> None:
    p = draw(case, per_anchor, gamma="pair")
    step = contrastive_step(*p.arrays, **p.options)
    with np.errstate(under="ignore"):
        u = [np.exp(np.where(np.isfinite(side), side, 0.0)) for side in (step.log_inner_image, step.log_inner_text)]
    frozen = list(zip(inputs(p)[2:], u, strict=True))

    def function(xp: Any, p: Any, *x: Any) -> Any:
        return surrogate(xp, p, *x, frozen=frozen)

    check(p, step, *derive(function, p), unit, "surrogate")


def test_the_two_gradients_differ() -> None:
    # Else the two tests above would test the same thing.
    steps = []
    for gamma in ("one", "pair"):
        p = draw("plain", False, gamma=gamma)
        steps.append(contrastive_step(*p.arrays, **p.options))
    assert np.max(np.abs(steps[0].image_gradient - steps[1].image_gradient)) > 1e-3


# ---------------------------------------------------------------------------------------------------------------------
# InfoNCE
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.01, 0.3, 4.0])
def test_eps_of_one_negative_makes_it_info_nce(space: Any, temperature: float) -> None:
    b = 6
    p = problems.draw(33, b=b, d=3, r=None, eps=1 / (b - 1))
    p = replace(p, temperature=temperature, gamma=1.0)
    exact = p.rounded(space)
    t = exact.temperature
    step = p.run(space)
    plain = info_nce(*exact.arrays[:2], temperature=t)
    expected = step._replace(
        loss=t * (plain.loss - np.log(b - 1)),
        image_gradient=t * plain.image_gradient,
        text_gradient=t * plain.text_gradient,
        # d(t (InfoNCE - log(b - 1))) / dt
        temperature_gradient=plain.loss - np.log(b - 1) + t * plain.temperature_gradient,
    )
    problems.check_step(step, expected, exact, space.unit)
