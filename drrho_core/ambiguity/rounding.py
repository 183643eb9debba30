"""Arithmetic that keeps its digits: safe denominators, units for extreme parameters, an exact product.

Parameters of a set are Python floats and may lie outside the range of the losses' dtype. Functions here bring them
into that range by a unit, a power of two, so that the change of unit costs no digits.
"""

from __future__ import annotations

import math

from drrho_core._array_api import Array, Namespace


def parameter_rounding() -> float:
    """Return the relative rounding error of a Python float and of the few operations on it: 8 units of its last bit."""
    return 8 * 2.0**-53


def positive_part(values: Array, xp: Namespace) -> Array:
    """Return ``max(values, 0)``."""
    return xp.clip(values, min=0.0)


def or_one(values: Array, xp: Namespace) -> Array:
    """Return a safe denominator: 1 where a value is not positive. Results of such slices are replaced by the caller."""
    return xp.where(values > 0, values, xp.ones_like(values))


def in_units(parameter: float, like: Array, xp: Namespace) -> tuple[float, float]:
    """Return a positive parameter divided by a unit, and the unit, a power of two.

    The unit is 1, except for parameters that the dtype of `like` would round to 0 or to infinity.
    """
    smallest, largest = float(xp.finfo(like.dtype).smallest_normal), float(xp.finfo(like.dtype).max)
    unit = 2.0**100 if parameter > largest else 2.0**-100 if parameter < smallest else 1.0
    return min(max(parameter / unit, smallest), largest), unit


def distance_in_units(distance: Array, unit: float, xp: Namespace) -> Array:
    """Return ``distance / unit`` for distances >= 0.

    In a tiny unit, distances above 1 become ``1 / unit``: compared with the parameter, that is as good as infinite.
    """
    if unit < 1:
        distance = xp.where(distance < 1, distance, xp.ones_like(distance))
    return distance / unit


def product_or_inf(scale: Array, unit: Array, xp: Namespace) -> Array:
    """Return the product of positive numbers, infinite where the dtype cannot hold the product."""
    fits = scale < float(xp.finfo(scale.dtype).max) / xp.clip(unit, min=1.0)
    # The inner `where` keeps the overflow, and the warning about it, from happening at all.
    return xp.where(fits, xp.where(fits, scale, 0.0) * unit, xp.inf)


def constant(parameter: float, like: Array, xp: Namespace) -> Array:
    """Return a parameter as an array, at most the largest number of the dtype."""
    return xp.full_like(like, min(parameter, float(xp.finfo(like.dtype).max)))


def product_minus(factor: float, number: Array, other: Array, longest: int, xp: Namespace) -> Array:
    """Return ``factor * number - other`` for whole numbers, accurate also where the difference cancels.

    Such a difference decides which weights are 0, and near 0 the weights change with its square root: a product that
    is rounded in float32 would cost half of their digits.

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
    # The factor is cut into pieces of so few bits that each piece times `number` is exact. The largest pieces meet
    # `other` first, where the cancellation happens; only the small remainder is rounded.
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
    """Return ``log(total)`` where ``total = 1 + change > 0``: accurate both near ``total = 1`` and far from it."""
    near = xp.abs(change) < 0.5
    return xp.where(near, xp.log1p(xp.where(near, change, 0.0)), xp.log(xp.where(near, 1.0, total)))
