"""JAX programs that `contrastive_step` is compared with: autograd through b x b matrices. Do not train with them."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

TEMPERATURE = 0.05
GAMMA = 0.9


def dense_step(
    images: Array, texts: Array, reference_images: Array, reference_texts: Array, log_inner: Array
) -> tuple[Array, ...]:
    """Take the step of `drrho_core.contrastive_step` directly from its formula; return the same values.

    Matrices are b x b; jax.grad gives the gradients of the features and of the temperature.
    """

    def surrogate(images: Array, texts: Array, temperature: Array) -> Any:
        excess = images @ texts.T - reference_images @ reference_texts.T
        positive = jnp.diagonal(excess)
        is_positive = jnp.eye(len(images), dtype=bool)
        loss, more, states = jnp.zeros(()), jnp.zeros(()), []
        # Both directions: rows are image anchors, columns are text anchors; each subtracts the anchor's positive pair.
        for pairs, axis in ((excess - positive[:, None], 1), (excess - positive[None, :], 0)):
            logits = jnp.where(is_positive, -jnp.inf, pairs / temperature)
            log_own = jax.nn.logsumexp(logits, axis=axis) - jnp.log(len(images) - 1.0)
            fixed = jax.lax.stop_gradient(log_own)
            # u is the stored estimate of an anchor, g that of this batch: u' = (1 - gamma) u + gamma g, or g if u = 0.
            averaged = jnp.logaddexp(log_inner + jnp.log1p(-GAMMA), fixed + jnp.log(GAMMA))
            log_new = jnp.where(jnp.isinf(log_inner), fixed, averaged)
            loss = loss + jnp.mean(temperature * log_new) / 2
            # The derivative of this term is the derivative of the objective, if u' is a constant.
            more = more + jnp.mean(jax.lax.stop_gradient(temperature) * jnp.exp(log_own - log_new)) / 2
            states.append(log_new)
        return loss + more, (loss, *states)

    function = jax.value_and_grad(surrogate, argnums=(0, 1, 2), has_aux=True)
    (value, (loss, *states)), gradients = function(images, texts, jnp.asarray(TEMPERATURE, dtype=jnp.float32))
    return (*gradients, loss, value, *states)


def cross_entropy(images: Array, texts: Array, *_: Array) -> tuple[Array, ...]:
    """Return the gradients of CLIP's loss, cross-entropy of the logits over rows and over columns, by jax.grad."""

    def loss(features: tuple[Array, Array]) -> Any:
        logits = features[0] @ features[1].T / TEMPERATURE
        labels = jnp.arange(len(logits))
        each = optax.softmax_cross_entropy_with_integer_labels
        return (each(logits, labels).mean() + each(logits.T, labels).mean()) / 2

    gradients: tuple[Array, ...] = jax.grad(loss)((images, texts))
    return gradients


def synchronize(result: Any) -> None:
    """Wait until a result has been computed."""
    jax.block_until_ready(result)  # type: ignore[no-untyped-call]


def peak_bytes() -> int | None:
    """Return the peak of the accelerator's memory in bytes in this process; None on the host."""
    statistics = jax.devices()[0].memory_stats()
    return None if not statistics else int(statistics["peak_bytes_in_use"])


def held_bytes() -> int:
    """Return the bytes that are in use on the accelerator now."""
    return int(jax.devices()[0].memory_stats()["bytes_in_use"])
