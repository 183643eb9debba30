"""The messages between ranks that share one batch: each rank, a process or a thread, holds some of the pairs.

W is the number of ranks. Rank r holds the local batch, b pairs; the global batch has W b pairs. The steps of this
package need only the operations of `Ranks`. Any object with these operations can be passed: `ThreadRanks` in one
process, or an object that calls the collectives of a library.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeAlias

from drrho_core._array_api import Array, Namespace

Arrays: TypeAlias = tuple[Array, ...]
"""The arrays of one message."""

FORMS = ("reduce", "ring")
"""The ways in which ranks can share the pairs of a batch; see `sharded_contrastive_step`."""


class Ranks(Protocol):
    """The operations by which W ranks exchange arrays; all ranks have to call the same operation at the same time.

    Each operation takes a tuple of arrays, which may have several dtypes, and sends them as one message. The arrays of
    all ranks have the same shapes and dtypes. No operation is differentiable. The results do not share memory with the
    arguments or with arrays of another rank.

    Attributes
    ----------
    rank : int
        Number of the own rank, 0 <= rank < size; under tracing it may be an array of shape ().
    size : int
        W, the number of ranks; always an int.
    """

    @property
    def rank(self) -> Any:
        """Number of the own rank."""
        ...

    @property
    def size(self) -> int:
        """Number of ranks W."""
        ...

    def all_gather(self, arrays: Arrays, /) -> Arrays:
        """Return each array of all ranks, in a new first axis: (...) -> (W, ...)."""
        ...

    def all_sum(self, arrays: Arrays, /) -> Arrays:
        """Return the sum of each array over all ranks; every rank gets the same numbers."""
        ...

    def all_to_all(self, arrays: Arrays, /) -> Arrays:
        """Send entry k of each array (W, ...) to rank k; entry k of the result came from rank k."""
        ...

    def reduce_scatter(self, arrays: Arrays, /) -> Arrays:
        """Return the sum over all ranks of the entry `rank` of each array: (W, ...) -> (...)."""
        ...

    def shift(self, arrays: Arrays, /) -> Arrays:
        """Send the arrays to rank - 1 and return those of rank + 1; ranks are counted modulo W."""
        ...

    def repeat(self, count: int, body: Callable[[Any, Arrays], Arrays], carry: Arrays, /) -> Arrays:
        """Apply ``carry = body(k, carry)`` for k = 1, ..., count and return the carry.

        `body` may call `shift`. If code is traced, a library's own loop may run `body`, which then gets a traced k.
        """
        ...


def summed_over_ranks(ranks: Ranks, scalars: Arrays, xp: Namespace) -> Arrays:
    """Return the sums over all ranks of arrays of shape ()."""
    # One dtype for all, because then the message is a single array.
    (sums,) = ranks.all_sum((xp.stack([xp.astype(x, scalars[0].dtype, copy=False) for x in scalars]),))
    return tuple(xp.astype(sums[place, ...], x.dtype, copy=False) for place, x in enumerate(scalars))


def largest_on_ranks(ranks: Ranks, values: Array, xp: Namespace) -> Array:
    """Return the elementwise maximum of an array over all ranks."""
    # A message is an array with an axis, because a reduction of NumPy returns a number and no array.
    (gathered,) = ranks.all_gather((xp.reshape(values, (-1,)),))
    return xp.reshape(xp.max(gathered, axis=0), values.shape)
