"""JAX's own loops, for the solvers and the tiles of the core (`drrho_core`).

Inside `jax.shard_map` an array *varies* along a mapped axis if the values may differ between the devices of the axis. A
loop of JAX requires that its carry varies along the same axes before and after each step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType

from drrho_core.checks import Array, device_of
from drrho_core.extend import Body, Carry, plain_loop


def loop(count: int, body: Body, carry: Carry) -> Carry:
    """Take `count` steps: as one compiled loop if code is being traced, else step by step in Python."""
    if not traces():
        return plain_loop(count, body, carry)
    # The compiler would unroll a Python loop, and a solver of twenty steps would take long to compile.
    last: Carry = fori_loop(0, count, lambda _, inner: body(inner), carry)
    return last


def fori_loop(start: int, stop: int, body: Callable[[Any, Any], Any], carry: Any) -> Any:
    """Return the result of `jax.lax.fori_loop`, also inside `jax.shard_map`, where `body` may make the carry vary."""
    if AxisType.Manual not in jax.sharding.get_abstract_mesh().axis_types:
        return jax.lax.fori_loop(start, stop, body, carry)
    # Find the axes along which the results of a step vary, and let the whole carry vary along all of them.
    axes, more = frozenset[str](), axes_of(carry)
    while True:
        axes |= more
        more = axes_of(jax.eval_shape(lambda c: body(jnp.int32(start), c), varied(carry, axes)))
        if more <= axes:
            break
    return jax.lax.fori_loop(start, stop, lambda k, c: varied(body(k, c), axes), varied(carry, axes))


def varying_axes(array: Any) -> frozenset[str]:
    """Return the mapped axes along which an array, or its description by `jax.eval_shape`, varies, as far as known."""
    kind = array if isinstance(array, jax.ShapeDtypeStruct) else jax.typeof(array)
    # Newer versions of JAX call the set `manual_axis_type.varying`, older ones `vma`.
    newer = getattr(kind, "manual_axis_type", None)
    return frozenset((getattr(kind, "vma", None) if newer is None else newer.varying) or ())


def axes_of(tree: Any) -> frozenset[str]:
    """Return the mapped axes along which some array of a pytree varies."""
    return frozenset().union(*map(varying_axes, jax.tree.leaves(tree)))


def varied(tree: Any, axes: frozenset[str]) -> Any:
    """Return a pytree whose arrays all count as varying along the axes."""

    def vary(x: Array) -> Array:
        missing = tuple(sorted(axes - varying_axes(x)))
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(vary, tree)


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
