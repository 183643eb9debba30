"""The interface of the processes that train one model together; a backend implements it for an array library."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, Protocol

import numpy.typing as npt

from drrho_core import Ranks
from drrho_core.backend import Function
from drrho_core.checks import Array

__all__ = ["ConnectedGroup", "Gathering", "Group", "Processes"]


class Gathering(Protocol):
    """The part of a group of processes with which they find each other and compare facts."""

    @property
    def rank(self) -> int:
        """Number of this process."""
        ...

    @property
    def size(self) -> int:
        """W, the number of processes."""
        ...

    def gather(self, value: Any, /) -> list[Any]:
        """Return the value of every process, in the order of the ranks; a value is small, and JSON can hold it."""
        ...


class Group(Gathering, Protocol):
    """W processes that train one model together, as the backend of an array library connects them.

    Every process calls every method at the same time, except `compile`. The arrays of the training step stay in the
    array library; all other values pass through the memory of the host.

    Attributes
    ----------
    rank : int
        Number of this process.
    size : int
        W, the number of processes.
    is_first : bool
        True for process 0, the only one that writes files and prints.
    num_devices : int
        Number of the devices of all processes that share a batch, a multiple of `size`.
    ranks : Ranks or None
        The operations with which the step exchanges arrays; None for one process.
    exchanges_between_steps : bool
        True if `ranks` also hold outside of the compiled step.
    """

    rank: int
    size: int
    is_first: bool
    num_devices: int
    ranks: Ranks | None
    exchanges_between_steps: bool

    def gather_arrays(self, array: npt.NDArray[Any], /) -> list[npt.NDArray[Any]]:
        """Return the NumPy array of every process; the arrays may differ in shape and dtype."""
        ...

    def all_rows(self, arrays: tuple[Array, ...], /) -> tuple[Array, ...]:
        """Return the rows of all processes, (W b, ...), of arrays (b, ...) that the compiled step has returned.

        The rows stand in the order of the ranks. The results are arrays of the backend, the same on all processes.
        """
        ...

    def compile(self, step: Function, /) -> Function:
        """Return the compiled training step.

        `drrho_clip.step` says which arguments and results of the step hold the own rows, and which hold the same
        numbers on all processes.
        """
        ...

    def barrier(self) -> None:
        """Wait until every process has called this method."""
        ...

    def close(self) -> None:
        """Leave the group of processes; no other method can be called after that."""
        ...


class ConnectedGroup(Group, Protocol):
    """The group that a backend has connected, with the own device, which the processes compare.

    Attributes
    ----------
    device : tuple of (str, str or None)
        The name of the own device, such as "cuda:0", and the identity that no other GPU of this machine has; None if
        processes may share the device, or if the array library does not tell the identity.
    """

    device: tuple[str, str | None]


class Processes(Group, Protocol):
    """A group of processes as the harness sees them: if one fails, all of them stop."""

    def alive(self) -> None:
        """Say that this process gets on with work of its own, such as reading data; other processes may wait."""
        ...

    def exchanging(self) -> AbstractContextManager[None]:
        """Return a context in which all processes exchange arrays by `ranks`, outside of the step."""
        ...

    def alone(self, work: str, /) -> AbstractContextManager[None]:
        """Return a context for work that only this process does, such as "writing a checkpoint"; the others wait."""
        ...

    def saved(self, step: int, /) -> None:
        """Say that the checkpoint of a step is on the disk, from which a new start of the run can continue."""
        ...

    def failed(self, error: BaseException, /) -> None:
        """Tell all processes about an error of this process; if there are several processes, all of them end."""
        ...
