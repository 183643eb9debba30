"""A value with a closed-form gradient, for JAX's forward and reverse mode.

The core returns values together with closed-form gradients. Here a `jax.custom_jvp` ties the two: differentiation never
enters the core. Its rule is one inner product, tangent times gradient, which is linear in the tangent; reverse mode is
the transpose of that product, the gradient times the incoming cotangent.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

Array = jax.Array


@jax.custom_jvp
def with_gradient(value: Array, inputs: list[Array], gradients: list[Array]) -> Array:
    """Return `value`, of which differentiation says that its gradients with respect to `inputs` are `gradients`.

    Parameters
    ----------
    value : array
        A scalar, or the axes of the inputs with length 1 where the value belongs to a whole axis of them.
    inputs : list of arrays
        The differentiable inputs, in the dtype of their gradients.
    gradients : list of arrays
        One per input, of its shape.
    """
    del inputs, gradients
    return value


@with_gradient.defjvp
def _tangent(primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[Array, Array]:
    value, inputs, gradients = primals
    _, input_tangents, _ = tangents
    total = jnp.zeros_like(value)
    for gradient, tangent in zip(_differentiable_once(gradients, inputs), input_tangents, strict=True):
        # A scalar collects the products of all entries, a value per slice those along its axis of length 1.
        axes = tuple(range(tangent.ndim) if value.ndim == 0 else [i for i, n in enumerate(value.shape) if n == 1])
        total = total + jnp.sum(gradient * tangent, axis=axes, keepdims=value.ndim > 0).astype(value.dtype)
    return value, total


@jax.custom_jvp
def _differentiable_once(gradients: list[Array], inputs: list[Array]) -> list[Array]:
    """Return `gradients`: they are constants here, though not in truth, so their derivative must not be taken for 0."""
    del inputs
    return gradients


@_differentiable_once.defjvp
def _refuse(primals: Any, tangents: Any) -> Any:
    del primals, tangents
    raise NotImplementedError(
        "the contrastive loss and the DRRho risk must be differentiated once only, because their gradient is a closed "
        "form, got a second derivative"
    )
