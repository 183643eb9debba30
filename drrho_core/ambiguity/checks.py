"""Checks of losses that every function of excess losses shares: shapes, dtypes, devices and values."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from drrho_core import _validate
from drrho_core._array_api import Array, Namespace, values_visible, wide_dtype
from drrho_core._validate import Call, at_most_in_size
from drrho_core.ambiguity.sets import AmbiguitySet


def check_ambiguity_set(ambiguity_set: AmbiguitySet) -> None:
    """Check that the argument is one of the sets, not a class of sets and not a number."""
    if not isinstance(ambiguity_set, AmbiguitySet):
        raise TypeError(
            f"ambiguity_set must be an ambiguity set such as CVaR(0.1), got {_validate.describe(ambiguity_set)}"
        )


def check_losses(
    losses: dict[str, Array],
    where: Array | None,
    xp: Namespace | None,
    *,
    options: Mapping[str, Any] | None = None,
) -> Call:
    """Open a public call about losses of one shape and dtype: check all but their axis and their values.

    Parameters
    ----------
    losses : dict of str to array
        The losses by argument name.
    where : array of bool or None
        The mask, broadcast to the shape of the losses.
    xp : namespace, optional
        The caller's namespace.
    options : mapping, optional
        Further arguments that may be arrays: see `drrho_core._validate.arrays`.
    """
    call = _validate.arrays(losses if where is None else {**losses, "where": where}, xp, options=options)
    first, *rest = losses
    for name in losses:
        call.array(name)
    call.same_dtype(first, *rest)
    expected = tuple(losses[first].shape)
    for name in rest:
        _validate.shape(name, losses[name], expected, f"{first}.shape")
    if where is not None:
        _validate.mask("where", where, first, losses[first], call.xp)
    return call


def check_values(call: Call, name: str, losses: Array, axis: int, where: Array | None) -> None:
    """Check, if values are visible, that every loss that counts is usable and that every slice has such a loss."""
    # The two checks read different arrays: under a `vmap` over losses the mask may still be visible, and vice versa.
    xp = call.xp
    if where is not None and (call.visible or values_visible(where, xp)):
        filled = xp.any(xp.broadcast_to(where, losses.shape), axis=axis)
        if not bool(xp.all(filled)):
            empty = int(xp.sum(xp.astype(~filled, xp.int32)))
            raise ValueError(
                f"where must mark at least one entry of every slice along axis {axis}, "
                f"got {empty} of {math.prod(filled.shape)} slices without any"
            )
    # Also because a compiler that leaves shapes open cannot write the limit into the message.
    if not (call.visible or values_visible(losses, xp)):
        return
    limit = largest_usable(losses, axis, xp)
    seen = losses if where is None else xp.where(where, losses, xp.zeros_like(losses))
    call.values(name, seen, at_most_in_size(limit, f"be finite and at most {limit:.3g} in size"))


def largest_usable(losses: Array, axis: int, xp: Namespace) -> float:
    """Return the largest size of a loss for which sums over n differences of two losses stay finite."""
    # A difference of two losses is at most twice as large, and further factors leave room for the solvers' sums.
    largest = float(xp.finfo(wide_dtype(losses.dtype, xp)).max)
    return min(largest / (8 * int(losses.shape[axis])), float(xp.finfo(losses.dtype).max))
