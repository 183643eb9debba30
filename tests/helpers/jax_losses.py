"""An asymmetric batch for the tests of drrho_jax.contrastive_loss, and the formulas, written for JAX's autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest

jax = pytest.importorskip("jax")

import jax.numpy as jnp  # noqa: E402
from drrho_jax import ContrastiveState, contrastive_loss  # noqa: E402

from helpers.features import unit_rows  # noqa: E402

B, D, R, N = 5, 4, 3, 11
INDEX = [7, 0, 10, 4, 2]
UNIT = {"float64": 1e-12, "float32": 5e-6}


class Problem(NamedTuple):
    """One asymmetric batch; two of its five samples were never visited."""

    state: ContrastiveState
    images: Any
    texts: Any
    index: Any
    references: tuple[Any, Any]
    pair_mask: Any
    temperatures: tuple[Any, Any]
    gammas: tuple[Any, Any]


def draw(dtype: str = "float64", seed: int = 0) -> Problem:
    generator = np.random.default_rng(seed)
    arrays = lambda values: tuple(jnp.asarray(x, dtype=dtype) for x in values)  # noqa: E731
    images, texts = arrays(unit_rows(generator, 2, B, D))
    references = arrays(unit_rows(generator, 2, B, R))
    states = generator.normal(-1.0, 1.5, (2, N))
    states[:, [0, 2, 5]] = -np.inf
    pair_mask = generator.random((B, B)) > 0.3
    pair_mask[3, :] = False  # an image without negatives
    temperatures = arrays(generator.uniform(0.2, 0.8, (2, B)))
    gammas = arrays(generator.uniform(0.1, 1.0, (2, B)))
    state = ContrastiveState(*arrays(states))
    return Problem(state, images, texts, jnp.asarray(INDEX), references, jnp.asarray(pair_mask), temperatures, gammas)


def written_out(
    images: Any,
    texts: Any,
    temperature: Any,
    log_inner: tuple[Any, Any],
    *,
    gamma: Any,
    eps: float = 0.0,
    radius: float = 0.0,
    references: tuple[Any, Any] | None = None,
    weight: float = 1.0,
    pair_mask: Any = None,
) -> tuple[Any, tuple[Any, Any, Any]]:
    """Evaluate the formulas with g and u themselves; return surrogate, (loss, new log_inner, max |c_i| / 2b)."""
    # Z = S - lambda R, and the mask of negatives, never the diagonal.
    b, constant = images.shape[0], jax.lax.stop_gradient
    z = images @ texts.T
    if references is not None:
        z = z - weight * references[0] @ references[1].T
    negatives = ~jnp.eye(b, dtype=bool)
    if pair_mask is not None:
        negatives = negatives & pair_mask
    pair = lambda x: x if isinstance(x, tuple) else (x, x)  # noqa: E731
    loss = surrogate = jnp.zeros(())
    new, positive_weight = [], jnp.zeros(b)
    sides = zip((z, z.T), (negatives, negatives.T), log_inner, pair(temperature), pair(gamma), strict=True)
    for logits, of_these, log_u, t, take in sides:
        # One direction: exponents D, the mean g over the negatives, the moving average u, a constant of the gradient.
        count = jnp.sum(of_these, axis=1)
        divisor = jnp.maximum(count, 1)
        t_column = t[:, None] if jnp.ndim(t) else t
        d = (logits - jnp.diagonal(logits)[:, None]) / t_column
        g = jnp.sum(jnp.exp(d) * of_these, axis=1) / divisor
        active = count > 0
        u = constant(jnp.where(log_u == -jnp.inf, g, (1 - take) * jnp.exp(log_u) + take * g))
        new.append(jnp.where(active, jnp.log(u), log_u))
        # The loss is t (log(eps + u) + radius); the surrogate adds t g / (eps + u), with a gradient in g only.
        value = jnp.where(active, jnp.log(jnp.where(active, eps + u, 1.0)) + radius, 0.0)
        fresh = jnp.where(active, g / jnp.where(active, eps + u, 1.0), 0.0)
        loss = loss + jnp.sum(t * value) / (2 * b)
        surrogate = surrogate + jnp.sum(t * value + constant(t) * fresh) / (2 * b)
        # c_i, the sum of the weights of both anchors i, is the size of the terms of a feature gradient.
        w = jnp.where(of_these, jnp.exp(d), 0.0) / jnp.where(active, (eps + u) * divisor, 1.0)[:, None]
        positive_weight = positive_weight + jnp.sum(w, axis=1)
    return surrogate, (loss, tuple(new), jnp.max(positive_weight) / (2 * b))


def step_of(problem: Problem) -> Callable[..., Any]:
    def function(images: Any, texts: Any, temperature: Any, state: Any, index: Any, references: Any) -> Any:
        return contrastive_loss(
            state, images, texts, index, temperature=temperature, gamma=0.7, reference_features=references
        )

    return jax.value_and_grad(function, argnums=(0, 1, 2), has_aux=True)


def arguments_of(problem: Problem) -> tuple[Any, ...]:
    return (problem.images, problem.texts, jnp.asarray(0.3), problem.state, problem.index, problem.references)
