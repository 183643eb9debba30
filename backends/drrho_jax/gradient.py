"""A value with a closed-form gradient, for JAX's forward and reverse mode.

The core (`drrho_core`) returns a value L together with the gradient g of that value. A `jax.custom_jvp` combines the
two, so that JAX never differentiates the core. Forward mode computes an inner product, ``dL = sum g * dx``, which is
linear in the tangent dx. For reverse mode JAX transposes this linear function: ``dL/dx = g * incoming cotangent``. A
`jax.custom_vjp` would give reverse mode only.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from drrho_jax.loops import varying_axes

Array = jax.Array


@jax.custom_jvp
def with_gradient(value: Array, inputs: list[Array], gradients: list[Array]) -> Array:
    """Return a value equal to `value` for which JAX uses `gradients` as the gradients with respect to `inputs`.

    Parameters
    ----------
    value : array
        A scalar, or an array with as many axes as the inputs, with length 1 on each axis that was reduced.
    inputs : list of arrays
        The differentiable inputs, in the dtype of their gradients.
    gradients : list of arrays
        One gradient per input, of the same shape.
    """
    del inputs, gradients
    return value


@with_gradient.defjvp
def _tangent(primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[Array, Array]:
    value, inputs, gradients = primals
    # The value and the gradients were computed from constants, so their own tangents are 0 and not used.
    _, input_tangents, _ = tangents
    total = jnp.zeros_like(value)
    for gradient, tangent in zip(_differentiable_once(gradients, inputs), input_tangents, strict=True):
        # For a scalar value the sum runs over all entries, otherwise over the axes on which the value has length 1.
        axes = tuple(range(tangent.ndim) if value.ndim == 0 else [i for i, n in enumerate(value.shape) if n == 1])
        part = jnp.sum(gradient * tangent, axis=axes, keepdims=value.ndim > 0).astype(value.dtype)
        total = total + _over_devices(part, value, gradient)
    return value, total


def _over_devices(part: Array, value: Array, gradient: Array) -> Array:
    """Return the tangent of a value that the devices of a mapped axis share, given the part from the own inputs.

    Inside `jax.shard_map` the value is the same on all devices of such an axis, but the inputs are not, so the tangent
    is a sum over devices. If the gradient is the same on all devices too, each device has the same input, and the
    input's tangent counts once.
    """
    mapped = varying_axes(part) - varying_axes(value)
    if not mapped:
        return part
    for axis in mapped - varying_axes(gradient):
        part = part / jax.lax.axis_size(axis)
    total: Array = jax.lax.psum(part, tuple(sorted(mapped)))  # type: ignore[no-untyped-call]
    return total


@jax.custom_jvp
def _differentiable_once(gradients: list[Array], inputs: list[Array]) -> list[Array]:
    """Return gradients equal to `gradients` whose derivative is an error.

    JAX treats the gradients as constants, although they depend on the inputs. Without this function a second derivative
    would silently be 0.
    """
    del inputs
    return gradients


@_differentiable_once.defjvp
def _refuse(primals: Any, tangents: Any) -> Any:
    del primals, tangents
    raise NotImplementedError(
        "the contrastive loss and the DRRho risk must be differentiated once only, because their gradient is a closed "
        "form, got a second derivative"
    )
