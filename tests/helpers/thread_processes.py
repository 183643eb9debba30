"""Threads that stand for the processes of a run, for parts of the harness that need no step."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from drrho_core import Ranks, ThreadRanks
from drrho_core.backend import Function
from drrho_core.checks import Array

T = TypeVar("T")

_ROOM = 1 << 16


class ThreadProcesses:
    """The processes of a run as threads of this process; see `drrho_clip.processes.protocol.Processes`."""

    def __init__(self, ranks: Any) -> None:
        self.ranks: Ranks | None = ranks
        self.rank, self.size = int(ranks.rank), int(ranks.size)
        self.is_first, self.num_devices = self.rank == 0, self.size
        self.exchanges_between_steps = True
        self._gather = ranks.all_gather

    @classmethod
    def run(cls, size: int, function: Callable[[ThreadProcesses], T]) -> list[T]:
        """Call ``function(processes)`` in one thread per process, and return the results in the order of the ranks."""
        return ThreadRanks.run(size, lambda ranks: function(cls(ranks)))

    def gather(self, value: Any, /) -> list[Any]:
        """Return the values of all processes."""
        message = np.frombuffer(json.dumps(value).encode().ljust(_ROOM), dtype=np.uint8)
        return [json.loads(row.tobytes()) for row in self._gather((message,))[0]]

    def gather_arrays(self, array: npt.NDArray[Any], /) -> list[npt.NDArray[Any]]:
        """Return the arrays of all processes."""
        forms = self.gather([array.dtype.str, list(array.shape)])
        content = np.ascontiguousarray(array).tobytes()
        longest = max(int(np.prod(shape)) * np.dtype(dtype).itemsize for dtype, shape in forms)
        (rows,) = self._gather((np.frombuffer(content.ljust(longest + 1), dtype=np.uint8),))
        return [
            np.frombuffer(row[: int(np.prod(shape)) * np.dtype(dtype).itemsize].tobytes(), dtype).reshape(shape)
            for row, (dtype, shape) in zip(rows, forms, strict=True)
        ]

    def all_rows(self, arrays: tuple[Array, ...], /) -> tuple[Array, ...]:
        """Return the rows of all processes."""
        return tuple(np.concatenate(list(x)) for x in self._gather(arrays))

    def compile(self, step: Function, /) -> Function:
        """Return the step."""
        return step

    def barrier(self) -> None:
        """Wait for all processes."""
        self.gather(None)

    def alive(self) -> None:
        """Do nothing, because nobody watches."""

    def exchanging(self) -> AbstractContextManager[None]:
        """Return a context that does nothing, because nobody watches."""
        return nullcontext()

    def alone(self, work: str, /) -> AbstractContextManager[None]:
        """Return a context that does nothing, because nobody watches."""
        return nullcontext()

    def saved(self, step: int, /) -> None:
        """Do nothing, because nobody watches."""

    def failed(self, error: BaseException, /) -> None:
        """Do nothing, because `ThreadRanks` stops the other threads."""

    def close(self) -> None:
        """Do nothing."""
