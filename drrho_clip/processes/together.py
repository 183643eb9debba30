"""Work that may fail on a single process: either all processes go on, or all of them raise the same error.

A process that raised an error alone would let the others wait for its next message. So each process says whether its
own work has succeeded before any of them goes on. The work itself must exchange nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from drrho_clip.errors import AgreedError, BadInput, MissingExtra
from drrho_clip.processes.protocol import Processes
from drrho_clip.terminal.guard import reason

__all__ = ["agreed_figures", "in_words", "of_first", "together", "together_with_values", "written_by_first"]

T = TypeVar("T")


def together(processes: Processes | None, work: Callable[[], T]) -> T:
    """Return the result of the own work, or raise an error on all processes if the work of one process fails.

    Parameters
    ----------
    processes : Processes or None
        The processes, each of which does its own work; None: this process is alone.
    work : callable
        The work of this process; it must not exchange anything with other processes.

    Raises
    ------
    AgreedError
        On all processes. The message is that of the failed process with the lowest number; the number is named unless
        it is 0. A process with an error in our own code raises this error instead, and the others name this process.

    Examples
    --------
    >>> from drrho_clip.processes.one import OneProcess
    >>> from drrho_core.backend import get_backend
    >>> together(OneProcess(get_backend("numpy")), lambda: 2 + 3)
    5
    """
    return together_with_values(processes, lambda: (work(), None))[0]


def together_with_values(processes: Processes | None, work: Callable[[], tuple[T, Any]]) -> tuple[T, list[Any]]:
    """Do work as in `together`, and exchange a small value with the same message.

    `work` returns the own result and the value for the other processes, which JSON can hold. Without `processes` this
    process is alone.

    Returns
    -------
    tuple
        The own result, and the values of all processes in the order of the ranks.
    """
    if processes is None or processes.size == 1:
        result, value = work()
        return result, [value]
    failure: Exception | None = None
    own_value: Any = None
    try:
        result, own_value = work()
    # Any kind of error, because the other processes would wait for this one.
    except Exception as error:
        failure = error
    words = None if failure is None else in_words(failure)
    mistaken = failure is not None and not isinstance(failure, BadInput | MissingExtra) and reason(failure) is None
    every = processes.gather({"failure": words, "mistaken": mistaken, "value": own_value})
    failed = [rank for rank, said in enumerate(every) if said["failure"] is not None]
    if not failed:
        return result, [said["value"] for said in every]
    if failure is not None and mistaken:
        # A mistake of ours needs the traceback of the process that has made it.
        raise failure
    mistakes = [rank for rank in failed if every[rank]["mistaken"]]
    first = (mistakes or failed)[0]
    message = every[first]["failure"]
    raise AgreedError(message if first == 0 else f"process {first}: {message}", repeats=bool(mistakes)) from failure


def of_first(processes: Processes | None, work: Callable[[], T]) -> T:
    """Let the first process do work, and return its result, which JSON can hold, on all processes."""
    is_first = processes is None or processes.is_first
    _, every = together_with_values(processes, lambda: (None, work() if is_first else None))
    result: T = every[0]
    return result


def agreed_figures(figures: dict[str, float], processes: Processes) -> dict[str, float]:
    """Return the figures of the first process, because rounding may differ between machines."""
    first: dict[str, float] = processes.gather(figures)[0]
    return first


def written_by_first(processes: Processes, write: Callable[[], object], work: str = "writing files") -> None:
    """Let the first process write, and go on when it has written; if it cannot write, all processes raise an error.

    `work` names the work in a message, if it does not end.
    """

    def write_alone() -> None:
        if processes.is_first:
            with processes.alone(work):
                write()

    together(processes, write_alone)


def in_words(error: Exception) -> str:
    """Return the message of an error for the other processes."""
    if isinstance(error, BadInput | MissingExtra):
        return str(error)
    return reason(error) or f"{type(error).__name__}: {error}"
