"""The loop that the Array API lacks, and a sort that a backend may do faster.

A Python loop is right everywhere, but a compiler unrolls it, and a solver of twenty steps then takes long to compile.
So a backend may register its library's own loop for when code is traced.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias, cast

from drrho_core._array_api import Array, Namespace, has_memory, is_compiling, library, values_visible

Carry: TypeAlias = tuple[Array, ...]
"""What a loop hands from step to step: arrays that keep their shapes and dtypes."""

Body: TypeAlias = Callable[[Carry], Carry]
"""One step."""

Loop: TypeAlias = Callable[[int, Body, Carry], Carry]
"""``loop(count, body, carry)`` returns the carry after `count` steps."""

Put: TypeAlias = Callable[[Array, Any, Array], Array]
"""``put(stack, index, value)`` returns the stack with ``stack[index] = value``; the index may be traced."""


Sort: TypeAlias = Callable[[Array], Array]
"""``sort(values)`` returns the values in ascending order along the last axis."""


class _Library(NamedTuple):
    loop: Loop
    put: Put | None
    traces: Callable[[], bool] | None


_LIBRARIES: dict[str, _Library] = {}
_SORTS: dict[str, Sort] = {}


def repeat_in_python(count: int, body: Body, carry: Carry) -> Carry:
    """Take `count` steps."""
    for _ in range(count):
        carry = body(carry)
    return carry


def register_loop(name: str, loop: Loop, *, put: Put | None = None, traces: Callable[[], bool] | None = None) -> None:
    """Let `repeat` use `loop` for the arrays of a library.

    Parameters
    ----------
    name : str
        The library's namespace without the wrapper's name: ``jax.numpy``.
    loop : callable
        ``loop(count, body, carry)``. It decides itself whether code is being traced, and falls back on
        `repeat_in_python` where it is not.
    put, traces : callable, optional
        ``put(stack, index, value)`` and ``traces()``, which tells whether code is being traced. With both, tiles are
        met in a loop as well, with arrays that are cut into a stack of blocks.
    """
    _LIBRARIES[name] = _Library(loop, put, traces)


def rolls(xp: Namespace) -> bool:
    """Tell whether a loop over stacked blocks would be rolled up now."""
    its = _LIBRARIES.get(library(xp))
    return its is not None and its.put is not None and its.traces is not None and its.traces()


def traced(xp: Namespace) -> bool:
    """Tell whether a compiler is tracing code now, which fuses what is done to each entry of a tile."""
    return is_compiling(xp) or rolls(xp)


def put(xp: Namespace) -> Put:
    """Return the assignment of a library whose loop `rolls`."""
    return cast(Put, _LIBRARIES[library(xp)].put)


def repeat(
    count: int, body: Body, carry: Carry, xp: Namespace, *, finished: Callable[[Carry], Array] | None = None
) -> Carry:
    """Take `count` steps with the loop of the arrays' library.

    Where a look is free, and nothing is compiled, steps end early once every entry of ``finished(carry)`` is true: from
    there on a step would change nothing.
    """
    # A first step may turn an array that can be seen into one that cannot, so every look asks anew.
    while count > 0 and finished is not None:
        over = finished(carry)
        if not values_visible(over, xp):
            break
        if bool(xp.all(over)):
            return carry
        carry, count = body(carry), count - 1
    its = _LIBRARIES.get(library(xp))
    return (repeat_in_python if its is None else its.loop)(count, body, carry)


def register_sort(name: str, sort: Sort) -> None:
    """Let `descending` use `sort` for the arrays of a library, named as for `register_loop`."""
    _SORTS[name] = sort


def descending(values: Array, xp: Namespace) -> Array:
    """Return values, none of them nan, sorted along the last axis, the largest first."""
    sort = _SORTS.get(library(xp))
    if sort is not None and (is_compiling(xp) or has_memory(values)):
        return xp.flip(sort(values), axis=-1)
    # Equal numbers are all alike, and a sort that need not keep their order is several times as fast.
    return xp.sort(values, axis=-1, descending=True, stable=False)
