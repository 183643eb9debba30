"""JAX's own loop for the solvers of the core."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from drrho_core._array_api import Array, device_of
from drrho_core.extend import Body, Carry, plain_loop


def loop(count: int, body: Body, carry: Carry) -> Carry:
    """Take `count` steps: rolled up where they are traced, step by step where nothing is compiled anyway."""
    if not traces():
        return plain_loop(count, body, carry)
    last: Carry = jax.lax.fori_loop(0, count, lambda _, inner: body(inner), carry)
    return last


def put(stack: Array, index: Any, value: Array) -> Array:
    """Return the stack with one entry replaced."""
    place = index if isinstance(index, tuple) else (index,)
    entry = jnp.reshape(value, (1,) * len(place) + value.shape)
    # `stack.at[index].set(value)` would ask for every number whether its place exists.
    corner = [jnp.asarray(number, dtype=jnp.int32) for number in (*place, *(0,) * value.ndim)]
    return jax.lax.dynamic_update_slice(stack, entry, corner)


def traces() -> bool:
    """Tell whether code is being traced: only then a fresh array has no device."""
    return device_of(jnp.zeros(())) is None
