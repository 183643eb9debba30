"""The gradients of the oracle's contrastive step against finite differences."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from drrho_reference import (
    contrastive_objective,
    contrastive_step,
)

from helpers.oracle_contrastive import MASK, problem


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
