"""The options with which each of several processes names its place, if no launcher has started them."""

from __future__ import annotations

from typing import Any

from drrho_clip.errors import BadInput
from drrho_clip.options import TEXT, at_least, setting
from drrho_clip.processes.meeting import check_address
from drrho_clip.processes.place import Place, place_of_launcher

__all__ = ["coordinator_option", "place_among", "process_option", "processes_option"]


def coordinator_option() -> Any:
    """Return the field of the option ``--coordinator``."""
    return setting(
        None,
        rule=TEXT,
        metavar="HOST:PORT",
        shown="that of the launcher, if any",
        help="Address of the first of several processes that train together.",
    )


def processes_option() -> Any:
    """Return the field of the option ``--processes``."""
    return setting(
        None,
        rule=at_least(1),
        shown="those of the launcher, else 1",
        help="Number of processes that train together; each is started with the same options but --process.",
    )


def process_option() -> Any:
    """Return the field of the option ``--process``."""
    return setting(
        None,
        rule=at_least(0),
        shown="that of the launcher, else 0",
        help="Number of this process, from 0; only process 0 writes files and prints.",
    )


def place_among(coordinator: str | None, processes: int | None, process: int | None) -> Place | None:
    """Return the place that the user names, else that of the launcher, or None without a launcher.

    Raises
    ------
    BadInput
        If only a part of the place is named, or if the numbers do not fit together.

    Examples
    --------
    >>> place_among("localhost:4000", 2, 1)
    Place(rank=1, size=2, local_rank=0, address='localhost:4000')
    """
    named = {"coordinator": coordinator, "processes": processes, "process": process}
    missing = [name for name, value in named.items() if value is None]
    if len(missing) == len(named):
        return place_of_launcher()
    # One process needs no address; it may share each batch among several devices of its own.
    if processes == 1 and coordinator is None and not process:
        return Place(0, 1)
    if missing:
        given = ", ".join(name for name in named if name not in missing)
        raise BadInput(f"{missing[0]} must be given with {given}, got none")
    assert coordinator is not None
    assert processes is not None
    assert process is not None
    check_address(coordinator)
    if process >= processes:
        raise BadInput(f"process must be below the number of processes ({processes}), got {process}")
    return Place(process, processes, 0, coordinator)
