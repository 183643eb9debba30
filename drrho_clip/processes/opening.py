"""Joining the processes that train together."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from typing import Any

from drrho_clip.errors import AgreedError, BadInput
from drrho_clip.processes.one import OneProcess
from drrho_clip.processes.place import Place, place_of_launcher
from drrho_clip.processes.protocol import Processes
from drrho_clip.terminal.printing import complain, silence
from drrho_core.backend import Backend, backend_names

__all__ = ["check_batch_size", "open_processes", "opened_processes"]


def open_processes(backend: Backend, place: Place | None = None) -> Processes:
    """Join the processes that train together.

    Parameters
    ----------
    backend : Backend
        The library that runs the training.
    place : Place, optional
        Where this process stands; by default `place_of_launcher` says it.

    Returns
    -------
    Processes
        The group; `OneProcess` if this process is alone.

    Raises
    ------
    BadInput
        If there are several processes and the backend cannot train with them, or if the group cannot be joined.
    """
    place = place_of_launcher() if place is None else place
    if place is None or place.size == 1:
        return OneProcess(backend)
    if place.rank > 0:
        silence()
    join: Any = getattr(backend, "processes", None)
    if join is None:
        raise BadInput(
            f"backend must be one of {', '.join(_backends_with_processes())} for several processes, got "
            f"{backend.name!r}, started as {place.size} processes"
        )
    processes: Processes = join(place)
    return processes


@contextlib.contextmanager
def opened_processes(
    backend: Backend, place: Place | None = None, *, ends_process: bool = False
) -> Iterator[Processes]:
    """Join the processes that train together, and leave them at the end; see `open_processes`.

    If `ends_process` is True, an error ends the process. An error that all processes have in common is then printed
    here, because a launcher ends all processes as soon as one of them has ended.
    """
    processes = open_processes(backend, place)
    try:
        yield processes
    except AgreedError as error:
        if ends_process and processes.size > 1:
            # The launcher's signal must not replace the message and the exit code of this process.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            complain(error)
            error.said = True
            processes.barrier()
        raise
    finally:
        processes.close()


def check_batch_size(batch_size: int, processes: Processes) -> None:
    """Raise AgreedError unless every process gets equally many pairs of a batch."""
    if batch_size % processes.size:
        raise AgreedError(
            f"batch_size must be a multiple of the number of processes ({processes.size}), got {batch_size}"
        )


def _backends_with_processes() -> list[str]:
    """Return the names of the installed backends that can train with several processes."""
    from importlib.metadata import entry_points

    from drrho_core.backend import GROUP

    names = []
    for point in entry_points(group=GROUP):
        # A backend whose library is missing cannot be imported.
        with contextlib.suppress(ImportError):
            if hasattr(point.load(), "processes"):
                names.append(point.name)
    return sorted(names) or backend_names()
