"""Slices of losses, the arrays that a solver works on, and sums over the pieces of long slices.

A slice is one problem: the n losses along the last axis. An array with a value per loss has shape (..., n), an array
with a value per slice has shape (..., 1), so that the two broadcast against each other.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

from drrho_core._array_api import Array, Namespace, device_of, known, values_visible
from drrho_core._routines import descending


class Slices(NamedTuple):
    """Losses in float32 or wider. The axis of the samples is the last axis, and every entry is finite."""

    losses: Array  # (..., n), not shifted; an entry that does not count holds the smallest loss that counts
    counted: Array  # (..., n) bool, the entries that count
    number: Array  # (..., 1), number of entries that count, at least 1, an integer
    size: Array  # (..., 1), the same number in the dtype of the losses
    top: Array  # (..., 1), the largest loss

    @property
    def shifted(self) -> Array:
        """Losses minus the largest loss, (..., n).

        They are computed at each use, because storing them would take as much memory as the losses.
        """
        return self.losses - self.top


class Solution(NamedTuple):
    """Result of a solver.

    The solver computes risk and nu as differences from the largest loss. If all losses share a large offset, these
    differences do not contain the offset, so they keep their digits.
    """

    weights: Array  # (..., n)
    excess: Array  # (..., 1), risk - top
    nu_excess: Array  # (..., 1), nu - top
    scale: Array  # (..., 1), the dual variable s


def count(mask: Array, xp: Namespace) -> Array:
    """Return the number of True entries along the last axis, (..., 1), an integer."""
    return xp.count_nonzero(mask, axis=-1, keepdims=True)


def masked(values: Array, mask: Array, xp: Namespace) -> Array:
    """Return finite values at the marked entries and 0 elsewhere.

    The product with the mask is faster than ``where`` if the marked entries lie at random places.
    """
    return values * xp.astype(mask, values.dtype)


def masked_sum(values: Array, mask: Array, xp: Namespace) -> Array:
    """Return the sum of the marked entries along the last axis, (..., 1). All values must be finite."""
    return xp.sum(masked(values, mask, xp), axis=-1, keepdims=True)


def piece_length() -> int:
    """Return the number of losses in a piece of a long axis. The intermediate results of one piece stay in the caches.

    A piece is also large enough for several threads. Libraries use threads only above a certain size. If a piece
    were close to that size, some operations would use threads and some would not. In measurements such pieces took many
    times longer than on a single thread.
    """
    # This is a function and not a constant, because ``torch.compile(dynamic=True)`` turns numbers of a module into
    # symbols, and a branch cannot depend on a symbol. All limits of this package are functions for this reason.
    return 2**17


def cut(slices: Slices, xp: Namespace) -> list[Slices]:
    """Cut slices along the last axis, so that sums over them can be taken piece by piece.

    A pass over a long axis mostly waits for memory, because it reads many numbers and allocates an array for the
    results. The numbers of one piece stay in the caches instead. Traced arrays are not cut, because a compiler fuses
    the passes itself. Arrays on an accelerator are not cut either, because `piece_length` suits the caches of a CPU.
    """
    if not values_visible(slices.losses, xp):
        return [slices]
    # All rows of a piece together have about `piece_length` losses. But no row of a piece is shorter than a 64th of
    # `piece_length`.
    *rows, n = slices.losses.shape
    length = max(piece_length() // max(math.prod(rows), 1), piece_length() // 64)
    if n <= length:
        return [slices]
    return [
        slices._replace(
            losses=slices.losses[..., start : start + length], counted=slices.counted[..., start : start + length]
        )
        for start in range(0, n, length)
    ]


def sort_descending(slices: Slices, xp: Namespace) -> Slices:
    """Return slices sorted from the largest loss to the smallest: the losses above a threshold then form one run."""
    x = descending(slices.losses, xp)
    # Entries that do not count hold the smallest loss that counts, so after sorting they come last.
    if known(slices.number == x.shape[-1], xp):
        return slices._replace(losses=x)
    return slices._replace(losses=x, counted=first_entries(slices.number, x, xp))


def first_entries(number: Array, like: Array, xp: Namespace) -> Array:
    """Return a mask in the shape of `like` that marks the first `number` entries of every slice."""
    return xp.arange(like.shape[-1], dtype=number.dtype, device=device_of(like)) < number


def cut_down_to(ordered: Slices, lowest: Array, xp: Namespace) -> list[Slices]:
    """Cut sorted slices and skip the pieces in which every loss is below `lowest`."""
    parts = cut(ordered, xp)
    return [part for part in parts if len(parts) == 1 or not known(part.losses[..., :1] < lowest, xp)]


def join(pieces: list[Array], xp: Namespace) -> Array:
    """Concatenate the pieces of an array along the last axis."""
    return pieces[0] if len(pieces) == 1 else xp.concat(pieces, axis=-1)


def totals(rows: list[tuple[Array, ...]], xp: Namespace) -> tuple[Array, ...]:
    """Add up the sums of all pieces by the library's own summation. A row holds the sums (..., 1) of one piece."""
    if len(rows) == 1:
        return rows[0]
    return tuple(xp.sum(xp.concat(column, axis=-1), axis=-1, keepdims=True) for column in zip(*rows, strict=True))


def assemble(
    slices: Slices, weigh: Callable[[Slices], tuple[Array, ...]], xp: Namespace
) -> tuple[Array, Array, tuple[Array, ...]]:
    """Return values (..., n), the sum of ``values * shifted losses``, and the sums of further arrays.

    The values are weights, or numbers proportional to weights. ``weigh(part)`` returns the values of a piece, followed
    by the further arrays of this piece.
    """
    # The values of every piece are kept, because they are returned. Of all other arrays only the sums are kept.
    pieces, rows = [], []
    for part in cut(slices, xp):
        values, *others = weigh(part)
        pieces.append(values)
        rows.append(tuple(xp.sum(array, axis=-1, keepdims=True) for array in (values * part.shifted, *others)))
    excess, *sums = totals(rows, xp)
    return join(pieces, xp), excess, tuple(sums)


def mean_excess(slices: Slices, xp: Namespace) -> Array:
    """Return the mean loss minus the largest loss, (..., 1)."""
    rows = [(masked_sum(part.shifted / slices.size, part.counted, xp),) for part in cut(slices, xp)]
    return totals(rows, xp)[0]


def uniform(slices: Slices, xp: Namespace) -> Solution:
    """Return the worst case in a ball of radius 0: uniform weights. The dual variables are (mean, inf)."""
    weights = xp.where(slices.counted, 1 / slices.size, xp.zeros_like(slices.losses))
    mean = mean_excess(slices, xp)
    return Solution(weights, mean, mean, xp.full_like(mean, xp.inf))
