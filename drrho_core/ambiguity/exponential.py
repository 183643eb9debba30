"""Weights in proportion to exp(exponent): the form of KL and, with logarithms of powers, of Cressie-Read weights.

With exponents ``e_i`` the weights are ``p_i = exp(e_i) / sum_j exp(e_j)``. Everything is written so that neither the
weights nor ``log mean exp(e)`` lose digits when all exponents are near 0, where the weights are nearly uniform.
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
    """Return the exponent, relative to the largest, above which exponents count as large."""
    return -0.5


def exponent_floor(dtype: object, xp: Namespace) -> float:
    """Return the smallest exponent in use: exponentials below it are subnormal and take forty times as long."""
    return float(math.ceil(math.log(float(xp.finfo(dtype).smallest_normal))))


def exponent_ratio(z: Array, scale: Array, xp: Namespace) -> Array:
    """Return the exponents ``z / scale`` for z <= 0, at least `exponent_floor`. Nothing overflows."""
    floor = exponent_floor(z.dtype, xp)
    # The bound is applied to z, before the division, which might overflow.
    return xp.maximum(z, floor * xp.clip(scale, max=float(xp.finfo(z.dtype).max) / (-2 * floor))) / scale


def exponential_weights(
    slices: Slices, exponents: Callable[[Slices], tuple[Array, Array]], xp: Namespace
) -> tuple[Array, Array, Array]:
    """Return weights ``exp(e) / sum exp(e)``, the weighted mean loss minus the largest loss, and ``log mean exp(e)``.

    ``exponents(part)`` returns e and the mask of the entries that have a weight. Other entries that count must have an
    e so small that ``exp(e)`` is negligible.
    """

    def weigh(part: Slices) -> tuple[Array, ...]:
        exponent, active = exponents(part)
        values = masked(xp.exp(exponent), active, xp)
        return values, values, masked(xp.expm1(exponent), part.counted, xp)

    # log mean exp(e) = log(1 + mean expm1(e)): the second form keeps the digits where the mean is near 1.
    values, excess, (total, change) = assemble(slices, weigh, xp)
    return values / total, excess / total, log_one_plus(change / slices.size, total / slices.size, xp)


def exp_and_change(exponent: Array, large: Array, active: Array, xp: Namespace) -> tuple[Array, Array]:
    """Return ``v = exp(e)``, 0 for entries without a weight, and ``sum v - number of large exponents``.

    The difference is summed as ``v - 1 = expm1(e)`` over the large exponents and v over the others, so that it keeps
    its digits where it is small.
    """
    value = masked(xp.exp(exponent), active, xp)
    mask = xp.astype(large, value.dtype)
    return value, xp.sum(xp.expm1(exponent) * mask + (value - value * mask), axis=-1, keepdims=True)
