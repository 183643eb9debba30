"""Threads as ranks: several ranks in one process, for tests and for trying out a loop without a cluster."""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable
from typing import Any, Self, TypeVar

from drrho_core import _validate
from drrho_core._array_api import Array, namespace_of
from drrho_core.contrastive.ranks import Arrays

T = TypeVar("T")


class ThreadRanks:
    """Ranks that are threads of one process and exchange arrays of any library through shared memory.

    `run` starts one thread per rank and gives each thread an object of this class. The object has the operations of
    `Ranks`. It is made for tests and for learning: the threads of one process do not make a step faster.

    Attributes
    ----------
    rank : int
        Number of the own rank.
    size : int
        W, the number of ranks.

    Examples
    --------
    >>> import numpy as np
    >>> def train(ranks):
    ...     (gathered,) = ranks.all_gather((np.asarray([ranks.rank]),))
    ...     return gathered.tolist()
    >>> ThreadRanks.run(2, train)
    [[[0], [1]], [[0], [1]]]
    """

    def __init__(self, rank: int, meeting: Meeting) -> None:
        self._rank, self._meeting = rank, meeting

    @classmethod
    def run(cls, world_size: int, function: Callable[[Self], T], /) -> list[T]:
        """Call ``function(ranks)`` in one thread per rank and return the results in the order of the ranks.

        Parameters
        ----------
        world_size : int
            W >= 1, the number of ranks.
        function : callable
            The work of one rank; its argument is the rank's object of this class.

        Raises
        ------
        RuntimeError
            If the function raises an error on some rank. The other ranks stop at their next exchange, and the message
            names the rank and its error, which is also the cause (``__cause__``). The same error is raised if ranks do
            not call the same operations.
        """
        world_size = _validate.integer("world_size", world_size, minimum=1)
        meeting = Meeting(world_size)
        results: list[Any] = [None] * world_size

        def work(rank: int) -> None:
            try:
                results[rank] = function(cls(rank, meeting))
            except _Stopped:
                meeting.leave(rank, None)
            except BaseException as error:
                meeting.leave(rank, error)
            else:
                meeting.leave(rank, None)

        # Each thread gets the caller's context, so that settings such as `fused_kernels` hold in it.
        threads = [
            threading.Thread(target=contextvars.copy_context().run, args=(work, rank), name=f"rank {rank}")
            for rank in range(world_size)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        meeting.raise_error()
        return results

    @property
    def rank(self) -> int:
        """Number of the own rank."""
        return self._rank

    @property
    def size(self) -> int:
        """Number of ranks W."""
        return self._meeting.size

    def all_gather(self, arrays: Arrays, /) -> Arrays:
        """Return each array of all ranks, in a new first axis."""
        return tuple(_xp(parts[0]).stack(parts) for parts in self._exchange("all_gather", arrays))

    def all_sum(self, arrays: Arrays, /) -> Arrays:
        """Return the sum of each array over all ranks."""
        return tuple(_total(parts) for parts in self._exchange("all_sum", arrays))

    def all_to_all(self, arrays: Arrays, /) -> Arrays:
        """Send entry k of each array to rank k; entry k of the result came from rank k."""
        return tuple(
            _xp(parts[0]).stack([part[self._rank, ...] for part in parts])
            for parts in self._exchange("all_to_all", arrays)
        )

    def reduce_scatter(self, arrays: Arrays, /) -> Arrays:
        """Return the sum over all ranks of the entry `rank` of each array."""
        return tuple(
            _total([part[self._rank, ...] for part in parts]) for parts in self._exchange("reduce_scatter", arrays)
        )

    def shift(self, arrays: Arrays, /) -> Arrays:
        """Send the arrays to rank - 1 and return those of rank + 1."""
        source = (self._rank + 1) % self.size
        return tuple(parts[source] for parts in self._exchange("shift", arrays))

    def repeat(self, count: int, body: Callable[[Any, Arrays], Arrays], carry: Arrays, /) -> Arrays:
        """Apply ``carry = body(k, carry)`` for k = 1, ..., count and return the carry."""
        for k in range(1, count + 1):
            carry = body(k, carry)
        return carry

    def _exchange(self, operation: str, arrays: Arrays) -> list[list[Array]]:
        """Return, for each array of the message, the arrays of all ranks in the order of the ranks."""
        # Copies are sent, because the sender may overwrite its arrays while slower threads still read the message.
        plain = [x.detach() if hasattr(x, "detach") else x for x in arrays]
        message = tuple(_xp(x).asarray(x, copy=True) for x in plain)
        messages = self._meeting.exchange(self._rank, operation, message)
        return [list(parts) for parts in zip(*messages, strict=True)]


class Meeting:
    """The place where the threads of one `ThreadRanks.run` exchange messages.

    An exchange is complete when every rank has brought its message. A rank that returns or raises will bring none, so
    the ranks that wait for it stop.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._condition = threading.Condition()
        self._number = 0  # of complete exchanges
        self._brought: dict[int, tuple[str, Arrays]] = {}
        self._complete: list[Arrays] = []
        self._gone: set[int] = set()
        self._error: tuple[int, BaseException] | None = None

    def exchange(self, rank: int, operation: str, arrays: Arrays) -> list[Arrays]:
        """Bring a message, wait for those of all ranks, and return them in the order of the ranks."""
        with self._condition:
            self._check(operation, rank)
            self._brought[rank] = (operation, arrays)
            number = self._number
            if len(self._brought) == self.size:
                self._complete = [self._brought[r][1] for r in range(self.size)]
                self._brought, self._number = {}, number + 1
                self._condition.notify_all()
            else:
                self._condition.wait_for(lambda: self._number > number or bool(self._gone))
            if self._number == number:
                self._check(operation, rank)
            # The list is replaced only after every rank has brought another message, so after it has read this one.
            return self._complete

    def leave(self, rank: int, error: BaseException | None) -> None:
        """Note that a rank has ended, with an error or with a result."""
        with self._condition:
            self._gone.add(rank)
            if error is not None and self._error is None:
                self._error = rank, error
            self._condition.notify_all()

    def raise_error(self) -> None:
        """Raise the first error of a rank, if there is one."""
        if self._error is not None:
            rank, error = self._error
            raise RuntimeError(f"rank {rank} raised {type(error).__name__}: {error}") from error

    def _check(self, operation: str, rank: int) -> None:
        """Stop this rank if another rank has ended, or if another rank has called another operation."""
        if self._error is not None:
            raise _Stopped
        gone = self._gone - {rank}
        if gone:
            raise RuntimeError(f"rank {rank} calls {operation}, but rank {min(gone)} has already returned")
        for other, (name, _) in self._brought.items():
            if name != operation:
                raise RuntimeError(f"rank {rank} calls {operation}, but rank {other} calls {name}")


class _Stopped(Exception):
    """Ends a thread that waits for a rank that has raised an error."""


def _xp(array: Array) -> Any:
    """Return the namespace of an array."""
    return namespace_of({"message": array})


def _total(parts: list[Array]) -> Array:
    """Return the sum of the arrays of all ranks, in the order of the ranks, so that it is the same on all ranks."""
    xp = _xp(parts[0])
    return xp.sum(xp.stack(parts), axis=0, dtype=parts[0].dtype)
