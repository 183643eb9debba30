"""The check that no two processes use the same GPU, made before the array library connects the GPUs.

Two processes on one GPU would have to share its memory, and the libraries that exchange arrays between GPUs wait or
fail with a message that names no process.
"""

from __future__ import annotations

import socket

from drrho_clip.errors import AgreedError
from drrho_clip.processes.judge import ranks_in_words
from drrho_clip.processes.protocol import Gathering

__all__ = ["require_own_devices"]


def require_own_devices(processes: Gathering, device: str, identity: str | None) -> None:
    """Compare the devices of all processes; all of them call this function at the same time.

    Parameters
    ----------
    processes : Gathering
        The processes, whose exchange must not need the devices.
    device : str
        The device of this process, as the user knows it, such as "cuda:0".
    identity : str or None
        The identity of this GPU, which no other GPU of this machine has; None if processes may share the device, such
        as a CPU.

    Raises
    ------
    AgreedError
        On all processes, with the same message, if several processes use one GPU.

    Examples
    --------
    >>> from types import SimpleNamespace
    >>> processes = SimpleNamespace(size=2, gather=lambda value: [["node7", "cuda:0", "GPU-5f"]] * 2)
    >>> require_own_devices(processes, "cuda:0", "GPU-5f")
    Traceback (most recent call last):
        ...
    drrho_clip.errors.AgreedError: device must be another GPU on each process, got cuda:0 of node7 on ranks 0 and 1
    """
    users: dict[tuple[str, str], list[int]] = {}
    names: dict[tuple[str, str], str] = {}
    for rank, (host, name, gpu) in enumerate(processes.gather([socket.gethostname(), device, identity])):
        if gpu is not None:
            users.setdefault((host, gpu), []).append(rank)
            names.setdefault((host, gpu), f"{name} of {host}")
    shared = [f"{names[key]} on {ranks_in_words(ranks)}" for key, ranks in users.items() if len(ranks) > 1]
    if shared:
        raise AgreedError(f"device must be another GPU on each process, got {'; '.join(shared)}")
