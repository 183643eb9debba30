"""The loop that the Array API lacks.

A Python loop is right everywhere, but a compiler unrolls it, and a solver of twenty steps then takes long to compile.
So a backend may register its library's own loop for when code is traced.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

from drrho_core._arrays import Array, Namespace, library

Carry: TypeAlias = tuple[Array, ...]
"""What a loop hands from step to step: arrays that keep their shapes and dtypes."""

Body: TypeAlias = Callable[[Carry], Carry]
"""One step."""

Loop: TypeAlias = Callable[[int, Body, Carry], Carry]
"""``loop(count, body, carry)`` returns the carry after `count` steps."""

Put: TypeAlias = Callable[[Array, Array, Array], Array]
"""``put(stack, index, value)`` returns the stack with ``stack[index] = value``, for an index that is being traced."""


class _Library(NamedTuple):
    loop: Loop
    put: Put | None
    traces: Callable[[], bool] | None


_LIBRARIES: dict[str, _Library] = {}


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


def put(xp: Namespace) -> Put:
    """Return the assignment of a library whose loop `rolls`."""
    its = _LIBRARIES[library(xp)].put
    assert its is not None
    return its


def repeat(count: int, body: Body, carry: Carry, xp: Namespace) -> Carry:
    """Take `count` steps with the loop of the arrays' library."""
    its = _LIBRARIES.get(library(xp))
    return (repeat_in_python if its is None else its.loop)(count, body, carry)
