"""Balls: a bound on a divergence, its two ends, and the difference between a divergence and its bound.

Each divergence D here is an increasing function of the Renyi divergence R of its order k (KL: order 1), so each ball
``D(p) <= radius`` is a bound on R. Solvers receive it as ``exp(R) <= 1 + growth``:

    KL          growth = exp(radius) - 1
    chi-square  growth = 2 radius
    order k     growth = (1 + k (k - 1) radius)^(1 / (k - 1)) - 1

Uniform weights on m of n losses have ``exp(R) = n / m``. A comparison with them is a comparison of ``(1 + growth) m``
with n, and can be made without rounding error. Docs: docs/theory/ambiguity.md, "The two ends".
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

from drrho_core._array_api import Array, Namespace, known
from drrho_core.ambiguity.rounding import log_one_plus, parameter_rounding, product_minus
from drrho_core.ambiguity.slices import Slices, Solution, count, uniform

PerNumber: TypeAlias = Callable[[Array, Array], Array]
"""``function(m, n)`` for m of the n losses of a slice, (..., 1) each: m an integer, n in the dtype of the losses."""


class Ball(NamedTuple):
    """A bound on a divergence, compared with uniform weights on m of n losses."""

    growth: float
    room: PerNumber  # (1 + growth) m - n, without rounding error


BallSolver: TypeAlias = Callable[[Slices, Ball, Namespace], Solution]
"""A solver for the ball between its two ends."""


def smallest_growth() -> float:
    """Return the growth below which a ball is radius 0 in any dtype. It lies in the range of float32."""
    return 1e-36


def largest_growth() -> float:
    """Return the growth above which a ball is saturated on any axis. It lies in the range of float32."""
    return 1e18


def exp_minus_one(logarithm: float) -> float:
    """Return ``exp(logarithm) - 1``; logarithms above 50 count as 50, far beyond `largest_growth`."""
    return math.expm1(min(logarithm, 50.0))


def solve_ball(slices: Slices, growth: float, solver: BallSolver, xp: Namespace) -> Solution:
    """Solve a ball: its two ends in closed form, everything between them by `solver`."""
    # The lower end: radius 0 is the mean.
    if growth < smallest_growth():
        return uniform(slices, xp)
    growth = min(growth, largest_growth())
    x = slices.losses

    def room(number: Array, size: Array) -> Array:
        # (1 + growth) m - n = growth m - (n - m), where n - m is exact.
        number = xp.astype(number, x.dtype)
        return product_minus(growth, number, size - number, x.shape[-1], xp)

    ball = Ball(growth, room)
    inner = solver(slices, ball, xp)
    # The upper end: uniform weights on the m tied largest losses are in the ball if (1 + growth) m >= n. A difference
    # within the rounding of `growth` itself counts as equality.
    at_top = slices.counted & (x == slices.top)
    ties = count(at_top, xp)
    saturated = ball.room(ties, slices.size) >= -parameter_rounding() * slices.size
    if known(~saturated, xp):
        return inner
    at_top_only = xp.where(at_top, 1 / xp.astype(ties, x.dtype), xp.zeros_like(inner.weights))
    zero = xp.zeros_like(slices.top)
    return Solution(
        xp.where(saturated, at_top_only, inner.weights), *(xp.where(saturated, zero, value) for value in inner[1:])
    )


def log_bound(ball: Ball, xp: Namespace) -> PerNumber:
    """Return the function ``(m, n) -> log((1 + growth) m / n)``."""

    def evaluate(number: Array, size: Array) -> Array:
        part = xp.astype(number, size.dtype) / size
        return log_one_plus(ball.room(number, size) / size, (1 + ball.growth) * part, xp)

    return evaluate


def normalise(
    change: Array, number: Array, size: Array, bound: PerNumber, xp: Namespace
) -> tuple[Array, tuple[Array, Array]]:
    """Return ``sum exp(e)`` and, as two terms, ``-log mean exp(e) - log(1 + growth)``.

    The Renyi divergence of the weights minus that of the ball is a mean of e plus these two terms. The difference is
    tiny near uniform weights, and on a plateau where a few losses are close together far above the rest; then its
    digits decide the weights. So both logarithms are taken relative to uniform weights on the m losses with a large
    exponent: ``-log(sum exp(e) / m) - log((1 + growth) m / n)``. Exponents are relative to the centre of those m, so
    that every term is of the order of the divergence.

    Parameters
    ----------
    change : array, shape (..., 1)
        ``sum exp(e) - m``, from `exp_and_change`.
    number, size : array, shape (..., 1)
        m, an integer, and n, in the dtype of the losses.
    bound : callable
        From `log_bound`.
    xp : namespace
        The arrays' namespace.
    """
    total = xp.astype(number, change.dtype)
    relative = change / total
    return total * (1 + relative), (-xp.log1p(relative), -bound(number, size))


def balance(mean: Array, others: tuple[Array, Array], xp: Namespace) -> Array:
    """Return the sum of three terms, exactly 0 where it is below their rounding error: there a search is over."""
    total = mean + others[0] + others[1]
    rounding = float(xp.finfo(total.dtype).eps) / 4 * (xp.abs(mean) + xp.abs(others[0]) + xp.abs(others[1]))
    return xp.where(xp.abs(total) <= rounding, xp.zeros_like(total), total)
