"""Weights proportional to exponentials: KL weights, and Cressie-Read weights, whose exponents are logarithms of powers.

With exponents ``e_i`` the weights are ``p_i = exp(e_i) / sum_j exp(e_j)``. If all exponents are near 0, the weights are
nearly uniform. In this case, too, the functions below keep all digits of the weights and of ``log mean exp(e)``.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from drrho_core._array_api import Array, Namespace
from drrho_core.ambiguity.rounding import log_one_plus
from drrho_core.ambiguity.slices import Slices, assemble, masked


def negligible_exponent() -> float:
    """Return a logarithm whose exponential is 0 in any dtype."""
    return -1e4


def large_exponent() -> float:
    """Return the limit above which an exponent counts as large. The largest exponent is 0."""
    return -0.5


def exponent_floor(dtype: object, xp: Namespace) -> float:
    """Return the smallest exponent that solvers use.

    Smaller exponents have subnormal exponentials, and arithmetic with subnormal numbers takes forty times as long.
    """
    return float(math.ceil(math.log(float(xp.finfo(dtype).smallest_normal))))


def exponent_ratio(z: Array, scale: Array, xp: Namespace) -> Array:
    """Return the exponents ``max(z / scale, exponent_floor)`` for z <= 0, without overflow."""
    floor = exponent_floor(z.dtype, xp)
    # The bound is applied to z before the division, because the division might overflow.
    return xp.maximum(z, floor * xp.clip(scale, max=float(xp.finfo(z.dtype).max) / (-2 * floor))) / scale


def exponential_weights(
    slices: Slices, exponents: Callable[[Slices], tuple[Array, Array]], xp: Namespace
) -> tuple[Array, Array, Array]:
    """Return weights ``exp(e) / sum exp(e)``, the weighted mean loss minus the largest loss, and ``log mean exp(e)``.

    ``exponents(part)`` returns two arrays for a piece of the slices: the exponents e, and the mask of the entries with
    a positive weight. All other entries that count must have an e so small that ``exp(e)`` is negligible.
    """

    def weigh(part: Slices) -> tuple[Array, ...]:
        exponent, active = exponents(part)
        values = masked(xp.exp(exponent), active, xp)
        return values, values, masked(xp.expm1(exponent), part.counted, xp)

    # log mean exp(e) = log(1 + mean expm1(e)): the second form keeps the digits if mean exp(e) is near 1.
    values, excess, (total, change) = assemble(slices, weigh, xp)
    return values / total, excess / total, log_one_plus(change / slices.size, total / slices.size, xp)


def exp_and_change(exponent: Array, large: Array, active: Array, xp: Namespace) -> tuple[Array, Array]:
    """Return ``v = exp(e)``, with 0 for entries without a weight, and ``sum v`` minus the number of large exponents.

    The difference is computed as the sum of ``v - 1 = expm1(e)`` over the large exponents, plus the sum of v over all
    other exponents. So the difference keeps its digits if it is small.
    """
    value = masked(xp.exp(exponent), active, xp)
    mask = xp.astype(large, value.dtype)
    return value, xp.sum(xp.expm1(exponent) * mask + (value - value * mask), axis=-1, keepdims=True)
