"""The loop that the Array API lacks.

A Python loop is right everywhere, but a compiler unrolls it, and a solver of twenty steps then takes long to compile.
So a backend may register its library's own loop for when code is traced.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from drrho_core._arrays import Array, Namespace, library

Carry: TypeAlias = tuple[Array, ...]
"""What a loop hands from step to step: arrays that keep their shapes and dtypes."""

Body: TypeAlias = Callable[[Carry], Carry]
"""One step."""

Loop: TypeAlias = Callable[[int, Body, Carry], Carry]
"""``loop(count, body, carry)`` returns the carry after `count` steps."""

_LOOPS: dict[str, Loop] = {}


def repeat_in_python(count: int, body: Body, carry: Carry) -> Carry:
    """Take `count` steps."""
    for _ in range(count):
        carry = body(carry)
    return carry


def register_loop(name: str, loop: Loop) -> None:
    """Let `repeat` use `loop` for the arrays of a library, named as its namespace without the wrapper's: ``jax.numpy``.

    The loop decides itself whether it is being traced, and falls back on `repeat_in_python` where it is not.
    """
    _LOOPS[name] = loop


def repeat(count: int, body: Body, carry: Carry, xp: Namespace) -> Carry:
    """Take `count` steps with the loop of the arrays' library."""
    return _LOOPS.get(library(xp), repeat_in_python)(count, body, carry)
