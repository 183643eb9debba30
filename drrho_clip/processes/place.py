"""The place of a process among all processes that train one model, as the variables of a launcher tell it."""

# The command line reads this at once, so the file imports no library.
from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Final, NamedTuple

from drrho_clip.errors import BadInput

__all__ = ["Place", "host_of_first", "place_of_launcher", "processes_of_machine"]

# The variables with which launchers of several processes describe each process.
_NUMBERS: Final = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
_ADDRESS: Final = ("MASTER_ADDR", "MASTER_PORT")


class Place(NamedTuple):
    """The place of a process among all processes that train one model.

    Attributes
    ----------
    rank : int
        Number of this process, 0 <= rank < size; process 0 is the first process.
    size : int
        W, the number of processes on all machines.
    local_rank : int
        Number of this process among those of the same machine; it is the number of the device of this process.
    address : str or None
        ``HOST:PORT`` of the first process; None if the launcher's environment variables have it.
    """

    rank: int
    size: int
    local_rank: int = 0
    address: str | None = None


def place_of_launcher(variables: Mapping[str, str] | None = None) -> Place | None:
    """Return the place that a launcher has given this process, or None if this process was started alone.

    Parameters
    ----------
    variables : mapping of str to str, optional
        Environment variables; those of this process by default.

    Raises
    ------
    BadInput
        If the variables of the launcher contradict each other.

    Examples
    --------
    >>> variables = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "host", "MASTER_PORT": "29500"}
    >>> place_of_launcher(variables)
    Place(rank=1, size=4, local_rank=1, address=None)
    >>> place_of_launcher({}) is None
    True
    """
    variables = os.environ if variables is None else variables
    # Other programs set one of these names for a purpose of their own, so all of them have to be there.
    if not all(name in variables for name in (*_NUMBERS, *_ADDRESS)):
        return None
    numbers = {name: variables[name] for name in _NUMBERS}
    if not all(word.isdecimal() for word in numbers.values()):
        raise BadInput(f"RANK, WORLD_SIZE and LOCAL_RANK must be numbers, got {numbers}")
    rank, size, local_rank = (int(word) for word in numbers.values())
    if not (0 <= rank < size and local_rank <= rank):
        raise BadInput(f"RANK must be below WORLD_SIZE and not below LOCAL_RANK, got {numbers}")
    return Place(rank, size, local_rank)


def processes_of_machine(variables: Mapping[str, str] | None = None) -> int:
    """Return how many processes the launcher has started on this machine, as far as the launcher tells it.

    Examples
    --------
    >>> processes_of_machine({"LOCAL_WORLD_SIZE": "4"}), processes_of_machine({})
    (4, 1)
    """
    variables = os.environ if variables is None else variables
    word = variables.get("LOCAL_WORLD_SIZE", "1")
    return int(word) if word.isdecimal() else 1


def host_of_first(place: Place, variables: Mapping[str, str] | None = None) -> str:
    """Return the name or the address under which all processes reach the machine of the first process.

    Examples
    --------
    >>> host_of_first(Place(1, 2, address="[::1]:4000"))
    '::1'
    >>> host_of_first(Place(0, 1))
    '127.0.0.1'
    """
    # A process that is alone needs no launcher, which would give the address.
    if place.size == 1 and place.address is None:
        return "127.0.0.1"
    variables = os.environ if variables is None else variables
    host = variables["MASTER_ADDR"] if place.address is None else place.address.rpartition(":")[0]
    return host.removeprefix("[").removesuffix("]")
