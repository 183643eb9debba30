"""JAX's own loop for the solvers of the core (`drrho_core`)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from drrho_core.checks import Array, device_of
from drrho_core.extend import Body, Carry, plain_loop


def loop(count: int, body: Body, carry: Carry) -> Carry:
    """Take `count` steps: as one compiled loop if code is being traced, else step by step in Python."""
    if not traces():
        return plain_loop(count, body, carry)
    # The compiler would unroll a Python loop, and a solver of twenty steps would take long to compile.
    last: Carry = jax.lax.fori_loop(0, count, lambda _, inner: body(inner), carry)
    return last


def put(stack: Array, index: Any, value: Array) -> Array:
    """Return the stack with the entry at an index, or at a tuple of indices, replaced."""
    place = index if isinstance(index, tuple) else (index,)
    entry = jnp.reshape(value, (1,) * len(place) + value.shape)
    # `stack.at[index].set(value)` would test, for every written number, whether its position is in range.
    corner = [jnp.asarray(number, dtype=jnp.int32) for number in (*place, *(0,) * value.ndim)]
    return jax.lax.dynamic_update_slice(stack, entry, corner)


def traces() -> bool:
    """Tell whether code is being traced: only under tracing does a new array have no device."""
    return device_of(jnp.zeros(())) is None
