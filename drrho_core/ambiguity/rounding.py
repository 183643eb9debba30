"""Arithmetic without loss of digits: safe denominators, units for extreme parameters, an exact product.

The parameters of a set are Python floats and may lie outside the range of the losses' dtype. Such a parameter is
divided by a unit, so that the quotient lies in this range. The unit is a power of two, so the division is exact.
"""

from __future__ import annotations

import math

from drrho_core._array_api import Array, Namespace


def parameter_rounding() -> float:
    """Return the relative error that a few operations on Python floats may cause: 8 roundings of 2^-53 each."""
    return 8 * 2.0**-53


def positive_part(values: Array, xp: Namespace) -> Array:
    """Return ``max(values, 0)``."""
    return xp.clip(values, min=0.0)


def or_one(values: Array, xp: Namespace) -> Array:
    """Return safe denominators: values that are not positive become 1.

    The caller replaces all results that were computed with such a 1.
    """
    return xp.where(values > 0, values, xp.ones_like(values))


def in_units(parameter: float, like: Array, xp: Namespace) -> tuple[float, float]:
    """Return a positive parameter divided by a unit, and this unit, which is a power of two.

    The unit is 1, except for parameters that the dtype of `like` would round to 0 or to infinity.
    """
    smallest, largest = float(xp.finfo(like.dtype).smallest_normal), float(xp.finfo(like.dtype).max)
    unit = 2.0**100 if parameter > largest else 2.0**-100 if parameter < smallest else 1.0
    return min(max(parameter / unit, smallest), largest), unit


def distance_in_units(distance: Array, unit: float, xp: Namespace) -> Array:
    """Return ``distance / unit`` for distances >= 0.

    If the unit is tiny, distances above 1 count as 1. Their result ``1 / unit`` is so much larger than the parameter
    divided by the unit that the result has the effect of infinity.
    """
    if unit < 1:
        distance = xp.where(distance < 1, distance, xp.ones_like(distance))
    return distance / unit


def product_or_inf(scale: Array, unit: Array, xp: Namespace) -> Array:
    """Return the product of two positive numbers, or infinity if the dtype cannot hold the product."""
    fits = scale < float(xp.finfo(scale.dtype).max) / xp.clip(unit, min=1.0)
    # If the product would overflow, the inner `where` replaces `scale` by 0, so that NumPy does not warn.
    return xp.where(fits, xp.where(fits, scale, 0.0) * unit, xp.inf)


def constant(parameter: float, like: Array, xp: Namespace) -> Array:
    """Return an array like `like` filled with the parameter, or with the dtype's largest number if that is smaller."""
    return xp.full_like(like, min(parameter, float(xp.finfo(like.dtype).max)))


def product_minus(factor: float, number: Array, other: Array, longest: int, xp: Namespace) -> Array:
    """Return ``factor * number - other`` for whole numbers, accurate even if the two terms nearly cancel.

    The sign of this difference decides which weights are 0. If the difference is near 0, the weights depend on the
    square root of the difference. Therefore a product that is rounded to float32 would make half of the digits of the
    weights wrong.

    Parameters
    ----------
    factor : float
        At least 0.
    number, other : array
        Whole numbers in a floating dtype.
    longest : int
        Largest possible value of `number`.
    xp : namespace
        The arrays' namespace.
    """
    # The factor is cut into pieces with so few bits that each piece times `number` is exact. The product of the largest
    # piece is added first. So the cancellation happens between exact numbers, and only the small remainder is rounded.
    precision = 1 - round(math.log2(float(xp.finfo(number.dtype).eps)))
    bits = max(precision - longest.bit_length(), 4)
    total = -other
    negligible = factor * 2.0**-60
    while factor > negligible:
        step = math.ldexp(1.0, math.frexp(factor)[1] - bits)
        piece = math.floor(factor / step) * step
        total = total + piece * number
        factor -= piece
    return total


def log_one_plus(change: Array, total: Array, xp: Namespace) -> Array:
    """Return ``log(total)``, given ``total = 1 + change > 0``, accurate both near ``total = 1`` and far from it."""
    near = xp.abs(change) < 0.5
    return xp.where(near, xp.log1p(xp.where(near, change, 0.0)), xp.log(xp.where(near, 1.0, total)))
