"""Checks of losses that every function of excess losses shares: shapes, dtypes, devices and values."""

from __future__ import annotations

import math

from drrho_core import _validate
from drrho_core._array_api import Array, Namespace, namespace_of, values_visible, wide_dtype
from drrho_core.ambiguity.sets import AmbiguitySet


def check_ambiguity_set(ambiguity_set: AmbiguitySet) -> None:
    """Check that the argument is one of the sets, not a class of sets and not a number."""
    if not isinstance(ambiguity_set, AmbiguitySet):
        raise TypeError(
            f"ambiguity_set must be an ambiguity set such as CVaR(0.1), got {_validate.describe(ambiguity_set)}"
        )


def check_losses(arrays: dict[str, Array], where: Array | None, xp: Namespace | None) -> Namespace:
    """Check arrays of losses of one shape, except for their axis and their values, and return their namespace."""
    together = arrays if where is None else {**arrays, "where": where}
    xp = namespace_of(together, xp)
    for name, array in arrays.items():
        _validate.floating(name, array, xp)
    _validate.same_dtype(arrays)
    _validate.same_device(together, xp)
    _validate.detached(arrays, xp)
    (first, losses), *rest = arrays.items()
    for name, array in rest:
        _validate.shape(name, array, tuple(losses.shape), f"{first}.shape")
    if where is not None:
        _validate.mask("where", where, first, losses, xp)
    return xp


def check_values(name: str, losses: Array, axis: int, where: Array | None, xp: Namespace) -> None:
    """Check, if values are visible, that every loss that counts is usable and that every slice has such a loss."""
    if where is not None and values_visible(where, xp):
        filled = xp.any(xp.broadcast_to(where, losses.shape), axis=axis)
        if not bool(xp.all(filled)):
            empty = int(xp.sum(xp.astype(~filled, xp.int32)))
            raise ValueError(
                f"where must mark at least one entry of every slice along axis {axis}, "
                f"got {empty} of {math.prod(filled.shape)} slices without any"
            )
    # Also because a compiler that leaves shapes open cannot write the limit into the message.
    if not values_visible(losses, xp):
        return
    limit = largest_usable(losses, axis, xp)
    seen = losses if where is None else xp.where(where, losses, xp.zeros_like(losses))
    _validate.values(name, seen, lambda x: xp.abs(x) <= limit, f"be finite and at most {limit:.3g} in size", xp)


def largest_usable(losses: Array, axis: int, xp: Namespace) -> float:
    """Return the largest size of a loss for which sums over n differences of two losses stay finite."""
    largest = float(xp.finfo(wide_dtype(losses.dtype, xp)).max)
    return min(largest / (8 * int(losses.shape[axis])), float(xp.finfo(losses.dtype).max))
