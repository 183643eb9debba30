"""Checks of the losses that a user passes: shapes, dtypes, devices and values.

All functions of losses or excess losses (differences between losses of two models) share these checks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from drrho_core import _validate
from drrho_core._array_api import Array, Namespace, values_visible, wide_dtype
from drrho_core._validate import Call, at_most_in_size
from drrho_core.ambiguity.sets import AmbiguitySet


def check_ambiguity_set(ambiguity_set: AmbiguitySet) -> None:
    """Check that the argument is an ambiguity set such as ``CVaR(0.1)``, and not a class such as `CVaR` or a number."""
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
    """Check that losses have one shape and one dtype, and return the `Call` that holds them.

    The callers check the axis of the samples and the values of the losses later.

    Parameters
    ----------
    losses : dict of str to array
        The losses. The keys are the names of the arguments.
    where : array of bool or None
        The mask of the losses that count, which is broadcast to the shape of the losses.
    xp : namespace, optional
        The namespace that the caller passed.
    options : mapping, optional
        Further arguments that may be arrays, as in `drrho_core._validate.arrays`.
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
    """Check that every slice has a loss that counts, and that all losses that count are usable.

    A loss is usable if it is finite and at most as large as `largest_usable`.
    Values are checked only if they are visible, which means that reading them is free: on the host, outside tracing.
    """
    # The mask may be visible although the losses are not, for example under a `vmap` over losses, and vice versa.
    xp = call.xp
    if where is not None and (call.visible or values_visible(where, xp)):
        filled = xp.any(xp.broadcast_to(where, losses.shape), axis=axis)
        if not bool(xp.all(filled)):
            empty = int(xp.sum(xp.astype(~filled, xp.int32)))
            raise ValueError(
                f"where must mark at least one entry of every slice along axis {axis}, "
                f"got {empty} of {math.prod(filled.shape)} slices without any"
            )
    # If values are not visible, nothing more can be checked. The function returns before the limit is computed, because
    # a compiler that leaves shapes open could not write the limit into the message.
    if not (call.visible or values_visible(losses, xp)):
        return
    limit = largest_usable(losses, axis, xp)
    seen = losses if where is None else xp.where(where, losses, xp.zeros_like(losses))
    call.values(name, seen, at_most_in_size(limit, f"be finite and at most {limit:.3g} in size"))


def largest_usable(losses: Array, axis: int, xp: Namespace) -> float:
    """Return the largest absolute value of losses for which a sum of n differences between losses stays finite."""
    # A difference between two losses is at most twice as large as a loss. The factor 8 leaves room for further factors
    # in the sums of the solvers.
    largest = float(xp.finfo(wide_dtype(losses.dtype, xp)).max)
    return min(largest / (8 * int(losses.shape[axis])), float(xp.finfo(losses.dtype).max))
