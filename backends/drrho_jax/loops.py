"""JAX's own loop for the solvers of the core: importing `drrho_jax` registers it."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from drrho_core._arrays import device_of
from drrho_core._loops import Body, Carry, register_loop, repeat_in_python


def repeat(count: int, body: Body, carry: Carry) -> Carry:
    """Take `count` steps: rolled up where they are traced, step by step where nothing is compiled anyway."""
    if device_of(jnp.zeros(())) is not None:  # only under tracing a fresh array has no device
        return repeat_in_python(count, body, carry)
    last: Carry = jax.lax.fori_loop(0, count, lambda _, inner: body(inner), carry)
    return last


register_loop("jax.numpy", repeat)
