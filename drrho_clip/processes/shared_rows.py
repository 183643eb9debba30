"""Rows of a batch that several processes share, inside of the training step: gathered and chosen.

Each of W processes holds b consecutive rows of a batch of W b rows. The functions read no values, so a compiler can
trace them.
"""

from __future__ import annotations

from drrho_core import Ranks
from drrho_core.checks import Array, Namespace

__all__ = ["moved_rows", "rows_of_all"]


def rows_of_all(arrays: tuple[Array, ...], ranks: Ranks | None, xp: Namespace) -> tuple[Array, ...]:
    """Return the rows of all processes, (W b, ...), of arrays (b, ...); they travel in one message.

    Examples
    --------
    >>> import numpy as np
    >>> rows_of_all((np.asarray([1, 2]),), None, np)
    (array([1, 2]),)
    """
    if ranks is None:
        return arrays
    gathered = ranks.all_gather(arrays)
    return tuple(xp.reshape(x, (x.shape[0] * x.shape[1], *x.shape[2:])) for x in gathered)


def moved_rows(arrays: tuple[Array, ...], index: Array, ranks: Ranks | None, xp: Namespace) -> tuple[Array, ...]:
    """Return the own part of chosen rows of arrays whose rows the processes share.

    Parameters
    ----------
    arrays : tuple of arrays (b, ...)
        The own rows; row i of process r has the position r b + i.
    index : array of integers, shape (k,)
        Positions of the chosen rows, the same on all processes; W divides k.
    ranks : Ranks or None
        The operations of the processes; None: the own rows are all rows.
    xp : namespace
        The namespace of the arrays.

    Returns
    -------
    tuple of arrays (k / W, ...)
        Process r gets the rows of the positions ``index[r k / W : (r + 1) k / W]``.

    Examples
    --------
    >>> import numpy as np
    >>> moved_rows((np.asarray([10, 11, 12]),), np.asarray([2, 0]), None, np)
    (array([12, 10]),)
    """
    if ranks is None:
        return tuple(xp.take(array, index, axis=0) for array in arrays)
    local = arrays[0].shape[0]
    owners, places = index // local, index % local
    # Each process sends every other process the rows that it owns, and zeros in the places of the other rows.
    sent = []
    for array in arrays:
        rows = xp.take(array, places, axis=0)
        is_own = xp.reshape(owners == ranks.rank, (-1, *(1 for _ in array.shape[1:])))
        rows = xp.where(is_own, rows, xp.zeros_like(rows))
        sent.append(xp.reshape(rows, (ranks.size, -1, *array.shape[1:])))
    # For each place one process has sent the row, and all others have sent zeros.
    received = ranks.all_to_all(tuple(sent))
    return tuple(xp.any(x, axis=0) if x.dtype == xp.bool else xp.sum(x, axis=0, dtype=x.dtype) for x in received)
