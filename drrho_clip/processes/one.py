"""One process: nothing is exchanged, and every step takes the path of a program that knows no other process."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy.typing as npt

from drrho_core import Ranks
from drrho_core.backend import Backend, Function
from drrho_core.checks import Array

__all__ = ["OneProcess"]


class OneProcess:
    """A process that trains alone; see `drrho_clip.processes.protocol.Processes`.

    Parameters
    ----------
    backend : Backend
        The library that compiles the step.

    Examples
    --------
    >>> from drrho_core.backend import get_backend
    >>> alone = OneProcess(get_backend("numpy"))
    >>> alone.size, alone.is_first, alone.gather({"step": 3})
    (1, True, [{'step': 3}])
    """

    rank: int = 0
    size: int = 1
    is_first: bool = True
    num_devices: int = 1
    ranks: Ranks | None = None
    exchanges_between_steps: bool = True

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    def gather(self, value: Any, /) -> list[Any]:
        """Return the own value in a list."""
        return [value]

    def gather_arrays(self, array: npt.NDArray[Any], /) -> list[npt.NDArray[Any]]:
        """Return the own array in a list."""
        return [array]

    def all_rows(self, arrays: tuple[Array, ...], /) -> tuple[Array, ...]:
        """Return the arrays."""
        return arrays

    def compile(self, step: Function, /) -> Function:
        """Return the step as the backend compiles it."""
        return self._backend.compile(step)

    def barrier(self) -> None:
        """Return at once."""

    def close(self) -> None:
        """Do nothing."""

    def alive(self) -> None:
        """Do nothing, because nobody waits."""

    def exchanging(self) -> AbstractContextManager[None]:
        """Return a context that does nothing."""
        return nullcontext()

    def alone(self, work: str, /) -> AbstractContextManager[None]:  # noqa: ARG002 (nobody else works)
        """Return a context that does nothing."""
        return nullcontext()

    def saved(self, step: int, /) -> None:
        """Do nothing."""

    def failed(self, error: BaseException, /) -> None:
        """Do nothing, because the caller raises the error."""
