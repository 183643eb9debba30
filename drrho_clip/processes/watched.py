"""The processes of a run under the watch: every exchange is counted, so the watch knows for whom the others wait."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, cast

import numpy.typing as npt

from drrho_clip.errors import AgreedError
from drrho_clip.processes.protocol import Group
from drrho_clip.processes.watch import Watch
from drrho_clip.terminal.printing import silence
from drrho_core.backend import Function
from drrho_core.checks import Array

__all__ = ["WatchedProcesses"]


class WatchedProcesses:
    """Processes that the watch observes; see `drrho_clip.processes.protocol.Processes`.

    Parameters
    ----------
    group : Group
        The processes of the array library.
    watch : Watch
        The watch of this process.
    """

    def __init__(self, group: Group, watch: Watch) -> None:
        self._group, self._watch = group, watch
        self.rank, self.size, self.is_first, self.ranks = group.rank, group.size, group.is_first, group.ranks
        self.num_devices, self.exchanges_between_steps = group.num_devices, group.exchanges_between_steps

    def gather(self, value: Any, /) -> list[Any]:
        """Return the value of every process, in the order of the ranks."""
        self._watch.progress()
        values = self._group.gather(value)
        self._watch.received()
        return values

    def gather_arrays(self, array: npt.NDArray[Any], /) -> list[npt.NDArray[Any]]:
        """Return the NumPy array of every process."""
        self._watch.progress()
        arrays = self._group.gather_arrays(array)
        self._watch.received()
        return arrays

    def all_rows(self, arrays: tuple[Array, ...], /) -> tuple[Array, ...]:
        """Return the rows of all processes."""
        self._watch.progress()
        rows = self._group.all_rows(arrays)
        self._watch.alive()
        return rows

    def compile(self, step: Function, /) -> Function:
        """Return the compiled training step; each call counts as an exchange."""
        compiled = self._group.compile(step)

        def watched(*arguments: Any) -> Any:
            self._watch.progress()
            result = compiled(*arguments)
            self._watch.stepped()
            return result

        return cast(Function, watched)

    def barrier(self) -> None:
        """Wait until every process has called this method."""
        self._watch.progress()
        self._group.barrier()
        self._watch.received()

    def alive(self) -> None:
        """Say that this process gets on with work of its own."""
        self._watch.alive()

    @contextmanager
    def exchanging(self) -> Iterator[None]:
        """Return a context in which the processes exchange arrays by `ranks`; it counts as one exchange."""
        self._watch.progress()
        yield
        self._watch.alive()

    def alone(self, work: str) -> AbstractContextManager[None]:
        """Return a context for work that only this process does."""
        return self._watch.alone(work)

    def saved(self, step: int) -> None:
        """Say that the checkpoint of a step is on the disk."""
        self._watch.saved(step)

    def failed(self, error: BaseException) -> None:
        """Tell all processes about an error of this process, and end this process."""
        self._watch.failed(error)
        # If there is no watch, each process prints an error that the others do not have.
        if not isinstance(error, AgreedError):
            silence(False)

    def close(self) -> None:
        """Wait until all processes have done their work, and leave the group."""
        self._watch.close()
        self._group.close()
