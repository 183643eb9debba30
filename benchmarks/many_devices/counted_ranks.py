"""Ranks that count the received bytes, and a stand-in for the other ranks; for measurements of traffic and time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from drrho_clip.plan.exchanges import received_share
from drrho_core import Ranks

Arrays = tuple[Any, ...]


class CountedRanks:
    """Ranks that pass every operation on and count the bytes that this rank receives from other ranks.

    Parameters
    ----------
    ranks : Ranks
        The ranks that exchange the arrays.

    Attributes
    ----------
    received : Counter
        Bytes by operation.
    calls : Counter
        Number of exchanges by operation.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self.received: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()

    @property
    def rank(self) -> Any:
        """Number of the own rank."""
        return self._ranks.rank

    @property
    def size(self) -> int:
        """Number of ranks."""
        return self._ranks.size

    @property
    def total(self) -> float:
        """All bytes received."""
        return sum(self.received.values())

    def clear(self) -> None:
        """Begin to count again."""
        self.received.clear()
        self.calls.clear()

    def all_gather(self, arrays: Arrays, /) -> Arrays:
        """Count and gather."""
        return self._counted("all_gather", arrays)

    def all_sum(self, arrays: Arrays, /) -> Arrays:
        """Count and sum."""
        return self._counted("all_sum", arrays)

    def all_to_all(self, arrays: Arrays, /) -> Arrays:
        """Count and exchange."""
        return self._counted("all_to_all", arrays)

    def reduce_scatter(self, arrays: Arrays, /) -> Arrays:
        """Count and sum the own entries."""
        return self._counted("reduce_scatter", arrays)

    def shift(self, arrays: Arrays, /) -> Arrays:
        """Count and pass on."""
        return self._counted("shift", arrays)

    def repeat(self, count: int, body: Callable[[Any, Arrays], Arrays], carry: Arrays, /) -> Arrays:
        """Apply ``carry = body(k, carry)`` for k = 1, ..., count; the body calls the counted operations."""
        for k in range(1, count + 1):
            carry = body(k, carry)
        return carry

    def _counted(self, operation: str, arrays: Arrays) -> Arrays:
        num_bytes = sum(int(x.nbytes) for x in arrays)
        self.calls[operation] += 1
        self.received[operation] += num_bytes * received_share(operation, self.size)  # type: ignore[assignment]
        result: Arrays = getattr(self._ranks, operation)(arrays)
        return result


def count_messages(backend: Any) -> list[CountedRanks]:
    """Count the messages of all groups of processes that a backend joins from now on; return the list of their ranks.

    Parameters
    ----------
    backend : Backend or class of backends
        A backend with the method `processes`, whose groups have the attribute `ranks`.
    """
    join, joined = backend.processes, list[CountedRanks]()

    def counted(*arguments: Any) -> Any:
        group = join(*arguments)
        group.ranks = CountedRanks(group.ranks)
        joined.append(group.ranks)
        return group

    backend.processes = counted
    return joined


class StandIn:
    """One rank of W whose messages never leave the process: the other ranks seem to hold the same numbers.

    A step with these ranks takes the time of a rank's own work. The rows of matrices that are gathered are permuted, so
    that the texts of other ranks are not those of the own pairs.

    Parameters
    ----------
    size : int
        Number of ranks W.
    xp : namespace
        The namespace of the arrays.
    """

    rank = 0

    def __init__(self, size: int, xp: Any) -> None:
        self.size, self._xp = size, xp

    def all_gather(self, arrays: Arrays, /) -> Arrays:
        """Return the own arrays W times."""
        xp = self._xp
        return tuple(
            xp.stack([x if x.ndim < 2 else xp.roll(x, rank, axis=0) for rank in range(self.size)]) for x in arrays
        )

    def all_sum(self, arrays: Arrays, /) -> Arrays:
        """Return copies."""
        return tuple(self._xp.asarray(x, copy=True) for x in arrays)

    def all_to_all(self, arrays: Arrays, /) -> Arrays:
        """Return copies."""
        return self.all_sum(arrays)

    def reduce_scatter(self, arrays: Arrays, /) -> Arrays:
        """Return the sums of the parts."""
        return tuple(self._xp.sum(x, axis=0, dtype=x.dtype) for x in arrays)

    def shift(self, arrays: Arrays, /) -> Arrays:
        """Return the own arrays with their rows permuted, so that the next block is another one."""
        return tuple(self._xp.roll(x, 1, axis=0) for x in arrays)

    def repeat(self, count: int, body: Callable[[Any, Arrays], Arrays], carry: Arrays, /) -> Arrays:
        """Apply ``carry = body(k, carry)`` for k = 1, ..., count."""
        for k in range(1, count + 1):
            carry = body(k, carry)
        return carry
