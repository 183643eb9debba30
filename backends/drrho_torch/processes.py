"""Processes of torch.distributed that train one model together; see `drrho_clip.processes.protocol.Processes`.

Arrays of the step travel between the devices: by NCCL between GPUs, by gloo between CPUs. All other values travel as
bytes between the hosts, by gloo. NCCL connects the GPUs at the first exchange of arrays, after
`drrho_clip.processes.opening` has made sure that no two processes use one GPU.
"""

from __future__ import annotations

import atexit
import datetime
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor

from drrho_clip.errors import BadInput
from drrho_clip.processes.meeting import MEETING_SECONDS, check_address, meet
from drrho_clip.processes.messages import arrays_of_all, values_of_all
from drrho_clip.processes.place import Place
from drrho_core.backend import Function
from drrho_torch.ranks import TorchRanks

# The time that torch waits in an exchange, unless the user names another.
_PATIENCE = datetime.timedelta(minutes=30)
_joined = False  # this module has made the group of the process


def _join(device: torch.device, place: Place) -> None:
    """Make the group of all processes, which lasts as long as the process."""
    global _joined
    try:
        # With the argument device_id NCCL would connect the GPUs at once.
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
            store=None if place.address is None else _store(place, place.address),
            rank=place.rank,
            world_size=place.size,
        )
    except BadInput:
        raise
    except (RuntimeError, ValueError, OSError) as error:
        reason = str(error).partition("\n")[0]
        raise BadInput(f"processes must be able to reach each other, got: {reason}") from error
    _joined = True
    atexit.register(_leave)


def _store(place: Place, address: str) -> Any:
    """Return the store at the address of process 0, through which torch connects the processes."""
    # torch would wait for half an hour for a process that does not come, and would not name it.
    meet(place)
    host, port = check_address(address)
    wait = datetime.timedelta(seconds=MEETING_SECONDS)
    open_store: Any = dist.TCPStore  # type: ignore[attr-defined]  # torch does not mark this name as public
    store = open_store(host, port, place.size, is_master=place.rank == 0, timeout=wait)
    # Messages between the processes may wait longer: for a process that writes a checkpoint.
    store.set_timeout(_PATIENCE)
    return store


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def _identity(device: torch.device) -> str | None:
    """Return the identity of a GPU, whatever number it has in this process; None for any other device."""
    if device.type != "cuda":
        return None
    identity = str(getattr(torch.cuda.get_device_properties(device), "uuid", ""))
    # A driver without identities may give zeros for each GPU.
    return identity if identity.strip("0-") else None


class TorchProcesses:
    """The processes of a launcher, or of a group that the user's program has made already.

    Parameters
    ----------
    device : torch.device
        The device of this process.
    place : Place
        The place of this process among all processes.

    Attributes
    ----------
    device : tuple of (str, str or None)
        The name of the own device, and the identity of this GPU.

    Raises
    ------
    BadInput
        If the group cannot be joined.
    """

    def __init__(self, device: torch.device, place: Place) -> None:
        if device.type == "cuda":
            # Libraries that allocate memory on "the" device must not all take the first.
            torch.cuda.set_device(device)
        if not dist.is_initialized():
            _join(device, place)
        elif dist.get_world_size() != place.size:
            raise BadInput(
                f"a group of the program must have the {place.size} processes of the launcher, got "
                f"{dist.get_world_size()}"
            )
        # A group that the program has made may have no backend for the memory of the host.
        self._host = dist.group.WORLD if _joined else dist.new_group(backend="gloo")
        self.ranks = TorchRanks(dist.group.WORLD)
        self.rank, self.size = self.ranks.rank, self.ranks.size
        self.is_first, self.num_devices = self.rank == 0, self.size
        self.exchanges_between_steps = True  # a step is not compiled
        self.device = str(device), _identity(device)

    def gather(self, value: Any, /) -> list[Any]:
        """Return the value of every process, in the order of the ranks."""
        return values_of_all(value, self._exchanged)

    def gather_arrays(self, array: npt.NDArray[Any], /) -> list[npt.NDArray[Any]]:
        """Return the NumPy array of every process; the arrays may differ in shape and dtype."""
        return arrays_of_all(array, self._exchanged)

    def all_rows(self, arrays: tuple[Tensor, ...], /) -> tuple[Tensor, ...]:
        """Return the rows of all processes, in the order of the ranks."""
        return tuple(x.flatten(0, 1) for x in self.ranks.all_gather(arrays))

    def compile(self, step: Function, /) -> Function:
        """Return the step unchanged, as `TorchBackend.compile` does."""
        return step

    def barrier(self) -> None:
        """Wait until every process has called this method."""
        self.gather(None)

    def close(self) -> None:
        """Keep the group, which the process leaves when it ends: a launcher connects its processes only once."""

    def _exchanged(self, message: npt.NDArray[np.uint8]) -> list[npt.NDArray[np.uint8]]:
        """Return the bytes of every process; all messages have the same length."""
        own = torch.from_numpy(message.copy())
        received = torch.empty((self.size, own.numel()), dtype=torch.uint8)
        dist.all_gather(list(received.unbind()), own, group=self._host)
        return list(received.numpy())
