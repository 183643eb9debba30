"""Gradients of the unimodal step against autograd, finite differences and SimCLR's loss."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from drrho_core import UnimodalStep, unimodal_contrastive_step
from helpers import problems
from helpers.unimodal import NEVER, surrogate


def frozen_and_arguments(p: Any) -> tuple[UnimodalStep, np.ndarray, list[np.ndarray]]:
    step = unimodal_contrastive_step(*p.arrays, **p.options)
    u = np.exp(np.concatenate([step.log_inner_view1, step.log_inner_view2]))
    return step, u, [p.image_features, p.text_features, *(np.array(side) for side in p.temperature)]


def gradients(step: UnimodalStep) -> list[np.ndarray]:
    return [step.view1_gradient, step.view2_gradient, *step.temperature_gradient]


CASES = [{"r": None}, {"reference_weight": 1.5, "eps": 0.2, "radius": 0.7}, {"r": 5, "features": "aligned"}]


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_torchs_autograd_of_the_surrogate(case: Any) -> None:
    import torch

    p = problems.draw(31, b=5, temperature=(0.2, 0.9), per_anchor_temperature=True, gamma="pair", **case)
    step, u, arguments = frozen_and_arguments(p)
    leaves = [torch.tensor(argument, requires_grad=True) for argument in arguments]
    value = surrogate(torch, p, *leaves, u)
    value.backward()
    assert float(value.detach()) == pytest.approx(float(step.surrogate), rel=1e-13)
    for got, leaf in zip(gradients(step), leaves, strict=True):
        np.testing.assert_allclose(got, leaf.grad.numpy(), rtol=0, atol=1e-13 * max(1.0, float(leaf.grad.abs().max())))


@pytest.mark.parametrize("case", CASES[1:2])
def test_gradients_are_jaxs_autograd_of_the_surrogate(case: Any) -> None:
    import jax

    jax.config.update("jax_enable_x64", True)
    p = problems.draw(32, b=5, temperature=(0.2, 0.9), per_anchor_temperature=True, gamma="pair", **case)
    step, u, arguments = frozen_and_arguments(p)
    found = jax.jit(jax.grad(lambda *inner: surrogate(jax.numpy, p, *inner, u), argnums=(0, 1, 2, 3)))(*arguments)
    for got, expected in zip(gradients(step), found, strict=True):
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-13 * max(1.0, float(np.max(np.abs(expected)))))


def test_without_memory_gradients_are_finite_differences_of_the_objective() -> None:
    p = problems.draw(33, b=4, temperature=(0.4, 0.9), per_anchor_temperature=True, gamma="one", eps=0.1, radius=0.7)
    step, _, arguments = frozen_and_arguments(p)
    assert float(surrogate(np, p, *arguments, None)) == pytest.approx(float(step.loss), rel=1e-13)
    rng = np.random.default_rng(0)
    for position, gradient in enumerate(gradients(step)):
        direction = rng.normal(size=gradient.shape)
        values = []
        for h in (1e-4, -1e-4, 2e-4, -2e-4):
            moved = list(arguments)
            moved[position] = moved[position] + h * direction
            values.append(float(surrogate(np, p, *moved, None)))
        slope = (8 * (values[0] - values[1]) - (values[2] - values[3])) / 12e-4  # exact to the fourth order
        assert np.sum(gradient * direction) == pytest.approx(slope, abs=1e-10)


def test_without_memory_it_is_simclrs_loss() -> None:
    import torch

    b, tau = 6, 0.3
    p = problems.draw(34, b=b, r=None)
    step = unimodal_contrastive_step(*p.arrays, temperature=tau, gamma=1.0, eps=1 / (2 * b - 2))
    leaves = [torch.tensor(side, requires_grad=True) for side in p.arrays[:2]]
    views = torch.cat(leaves)
    logits = (views @ views.T / tau).masked_fill(torch.eye(2 * b, dtype=torch.bool), NEVER)
    nt_xent = torch.nn.functional.cross_entropy(logits, (torch.arange(2 * b) + b) % (2 * b))
    (tau * nt_xent).backward()
    assert float(step.loss) == pytest.approx(tau * (float(nt_xent.detach()) - np.log(2 * b - 2)), rel=1e-13)
    np.testing.assert_allclose(step.view1_gradient, leaves[0].grad, rtol=0, atol=1e-14)
    np.testing.assert_allclose(step.view2_gradient, leaves[1].grad, rtol=0, atol=1e-14)
