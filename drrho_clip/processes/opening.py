"""Joining the processes that train together."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from importlib.metadata import entry_points
from typing import Any

from drrho_clip.errors import AgreedError, BadInput
from drrho_clip.processes.fingerprint import facts_of_program, require_equal
from drrho_clip.processes.judge import RANK_TIMEOUT, Limits
from drrho_clip.processes.meeting import tell_failure
from drrho_clip.processes.one import OneProcess
from drrho_clip.processes.own_devices import require_own_devices
from drrho_clip.processes.place import Place, host_of_first, place_of_launcher
from drrho_clip.processes.protocol import ConnectedGroup, Processes
from drrho_clip.processes.together import in_words
from drrho_clip.processes.watch import Watch
from drrho_clip.processes.watched import WatchedProcesses
from drrho_clip.terminal.printing import silence
from drrho_core.backend import GROUP, Backend, backend_names

__all__ = ["check_batch_size", "connect", "open_processes", "opened_processes", "telling_others"]


@contextlib.contextmanager
def telling_others(place: Place | None) -> Iterator[None]:
    """Return a context for work before the processes are connected: the others hear of an error of this process.

    The others wait at the meeting, if the processes were given an address. A launcher ends the others by itself.
    """
    try:
        yield
    except Exception as error:
        tell_failure(place, in_words(error))
        raise


def connect(name: str, place: Place | None = None) -> None:
    """Let a backend connect this process with the others, if the library needs that before it is used.

    Parameters
    ----------
    name : str
        Name of the backend, which is not built yet.
    place : Place, optional
        The place of this process among all processes; by default that of `place_of_launcher`.

    Raises
    ------
    BadInput
        If the processes cannot be connected.
    """
    place = place_of_launcher() if place is None else place
    if place is None:
        return
    for point in entry_points(group=GROUP, name=name):
        # If the library is missing, the backend that is built next says so.
        with contextlib.suppress(ImportError):
            join: Any = getattr(point.load(), "connect", None)
            if join is not None:
                join(place)


def open_processes(
    backend: Backend,
    place: Place | None = None,
    *,
    facts: Mapping[str, Any] | None = None,
    rank_timeout: float = RANK_TIMEOUT,
) -> Processes:
    """Join the processes that train together, and begin to watch them.

    Parameters
    ----------
    backend : Backend
        The library that runs the training.
    place : Place, optional
        The place of this process among all processes; by default that of `place_of_launcher`.
    facts : mapping, optional
        Facts that must be the same on all processes, such as the settings; see `require_equal`.
    rank_timeout : float
        Seconds without progress after which a process counts as hanging.

    Returns
    -------
    Processes
        The group; `OneProcess` if this process is alone.

    Raises
    ------
    BadInput
        If there are several processes and the backend cannot train with them, or if the group cannot be joined, or
        if the processes differ in the facts, or if two of them use one GPU.
    """
    place = place_of_launcher() if place is None else place
    # A single process with a place may share each batch among several devices of its own.
    if place is None or (place.size == 1 and getattr(backend, "num_devices", 1) == 1):
        return OneProcess(backend)
    join: Any = getattr(backend, "processes", None)
    if join is None:
        raise BadInput(
            f"backend must be one of {', '.join(_backends_with_processes())} for several processes, got "
            f"{backend.name!r}, started as {place.size} processes"
        )
    try:
        group: ConnectedGroup = join(place)
    except BaseException:
        # No other process can say why this process has not joined.
        silence(False)
        raise
    # From here on the first process prints what concerns all.
    if place.rank > 0:
        silence()
    watch = Watch(group, host=host_of_first(place), limits=Limits(hang=rank_timeout))
    processes = WatchedProcesses(group, watch)
    try:
        # Processes of other versions would exchange other values, so this comes first.
        own = facts_of_program(("drrho_core", "drrho_clip", type(backend).__module__.partition(".")[0]))
        require_equal(processes, {**own, **(facts or {})})
        # The first exchange of arrays connects the GPUs, so the devices are compared before it.
        require_own_devices(processes, *group.device)
    except BaseException as error:
        processes.failed(error)
        raise
    return processes


@contextlib.contextmanager
def opened_processes(
    backend: Backend,
    place: Place | None = None,
    *,
    facts: Mapping[str, Any] | None = None,
    rank_timeout: float = RANK_TIMEOUT,
) -> Iterator[Processes]:
    """Join the processes that train together, and leave them at the end; see `open_processes`.

    If there are several processes, an error in one of them ends all of them; see `drrho_clip.processes.watch`.
    """
    processes = open_processes(backend, place, facts=facts, rank_timeout=rank_timeout)
    try:
        yield processes
        processes.close()
    except BaseException as error:
        processes.failed(error)
        raise


def check_batch_size(batch_size: int, processes: Processes) -> None:
    """Raise AgreedError unless every process, and every device that shares a batch, gets equally many pairs."""
    for kind, number in (("processes", processes.size), ("devices of all processes", processes.num_devices)):
        if batch_size % number:
            raise AgreedError(f"batch_size must be a multiple of the number of {kind} ({number}), got {batch_size}")


def _backends_with_processes() -> list[str]:
    """Return the names of the installed backends that can train with several processes."""
    names = []
    for point in entry_points(group=GROUP):
        # A backend whose library is missing cannot be imported.
        with contextlib.suppress(ImportError):
            if hasattr(point.load(), "processes"):
                names.append(point.name)
    return sorted(names) or backend_names()
