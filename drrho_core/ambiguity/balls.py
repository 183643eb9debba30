"""Balls: ambiguity sets that bound the divergence D of the weights from uniform weights, ``D(p) <= radius``.

A ball has two limits. At radius 0 the worst case is the mean of the losses. From a certain radius on the worst case is
the maximum, and the ball is called saturated. `solve_ball` handles both limits and leaves the radii in between to the
solver of the set.

Each divergence D here is an increasing function of a Renyi divergence, ``R = log(mean (n p)^k) / (k - 1)``, with the
weights p on n losses and the order k (KL: the limit at order 1). Therefore each ball bounds R, too. Solvers receive
this bound as a number called the growth. The ball holds the weights with ``exp(R) <= 1 + growth``, and the growth is

    KL          growth = exp(radius) - 1
    chi-square  growth = 2 radius
    order k     growth = (1 + k (k - 1) radius)^(1 / (k - 1)) - 1

Uniform weights on m of n losses have ``exp(R) = n / m``. They lie in the ball if ``(1 + growth) m >= n``. This
inequality can be tested without rounding error. Docs: docs/theory/ambiguity.md, "Limits: mean and maximum".
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

from drrho_core._array_api import Array, Namespace, known
from drrho_core.ambiguity.rounding import log_one_plus, parameter_rounding, product_minus
from drrho_core.ambiguity.slices import Slices, Solution, count, uniform

PerNumber: TypeAlias = Callable[[Array, Array], Array]
"""``function(m, n)`` for m of the n losses of a slice, which is one problem.

Both arrays have shape (..., 1). The dtype of m is an integer dtype, and the dtype of n is that of the losses.
"""


class Ball(NamedTuple):
    """The bound of a ball, and a function that compares the bound with uniform weights on m of n losses."""

    growth: float  # exp(R) <= 1 + growth
    room: PerNumber  # (1 + growth) m - n without rounding error, which is >= 0 if the uniform weights lie in the ball


BallSolver: TypeAlias = Callable[[Slices, Ball, Namespace], Solution]
"""A solver for the radii between the two limits of a ball."""


def smallest_growth() -> float:
    """Return the growth below which a ball is solved as a ball of radius 0. Even float32 can hold this number."""
    return 1e-36


def largest_growth() -> float:
    """Return the growth above which a ball is saturated for any n. Even float32 can hold this number."""
    return 1e18


def exp_minus_one(logarithm: float) -> float:
    """Return ``exp(logarithm) - 1``. Logarithms above 50 count as 50, because exp(50) exceeds `largest_growth`."""
    return math.expm1(min(logarithm, 50.0))


def solve_ball(slices: Slices, growth: float, solver: BallSolver, xp: Namespace) -> Solution:
    """Solve a ball: the two limits by closed forms, and the radii between them by `solver`."""
    # The lower limit: at radius 0 the worst case is the mean.
    if growth < smallest_growth():
        return uniform(slices, xp)
    growth = min(growth, largest_growth())
    x = slices.losses

    def room(number: Array, size: Array) -> Array:
        # (1 + growth) m - n = growth m - (n - m), and n - m is exact.
        number = xp.astype(number, x.dtype)
        return product_minus(growth, number, size - number, x.shape[-1], xp)

    ball = Ball(growth, room)
    inner = solver(slices, ball, xp)
    # The upper limit: let m losses be equal to the largest loss. The worst case is the maximum if the uniform weights
    # on these m losses lie in the ball, which means (1 + growth) m >= n. If the two sides differ by no more than the
    # rounding error of `growth`, they count as equal.
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
    """Return ``sum exp(e)``, and ``-log mean exp(e) - log(1 + growth)`` as two terms, which the caller adds.

    The weights of the n losses are proportional to ``exp(e)``. The surplus is the Renyi divergence of the weights minus
    its bound. The solvers compute the surplus as a mean of the exponents e plus the two terms. The surplus is tiny if
    the weights are nearly uniform, or if a few losses lie close together and far above all other losses. In both cases
    the weights depend on the last digits of the surplus. Therefore both logarithms are taken relative to uniform
    weights on the m losses whose exponent is large (see `large_exponent`): the terms are ``-log(sum exp(e) / m)`` and
    ``-log((1 + growth) m / n)``. The caller has subtracted the mean exponent of these m losses from all exponents, and
    e denotes the result. Then a tiny surplus is a sum of tiny terms, and no digits are lost.

    Parameters
    ----------
    change : array, shape (..., 1)
        ``sum exp(e) - m``, as `exp_and_change` returns it.
    number, size : array, shape (..., 1)
        m, an integer, and n, in the dtype of the losses.
    bound : callable
        The result of `log_bound`.
    xp : namespace
        The arrays' namespace.
    """
    total = xp.astype(number, change.dtype)
    relative = change / total
    return total * (1 + relative), (-xp.log1p(relative), -bound(number, size))


def balance(mean: Array, others: tuple[Array, Array], xp: Namespace) -> Array:
    """Return the sum of three terms, or exactly 0 if the sum is within the terms' rounding error. A 0 ends a search."""
    total = mean + others[0] + others[1]
    rounding = float(xp.finfo(total.dtype).eps) / 4 * (xp.abs(mean) + xp.abs(others[0]) + xp.abs(others[1]))
    return xp.where(xp.abs(total) <= rounding, xp.zeros_like(total), total)
