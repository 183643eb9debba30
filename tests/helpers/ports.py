"""Ports at which the processes of a test meet; nobody else can get them before the processes come."""

from __future__ import annotations

import socket

_held: list[socket.socket] = []


def free_port() -> int:
    """Return a port that is free, and keep it for the processes that this process starts.

    A port that is given back at once may become that of any connection of this machine, while the processes of a test
    still import their libraries. So a socket holds the port as long as this process lives. The socket does not listen,
    and it allows addresses in use, as servers do; so the first process of a test can listen at the port.
    """
    holder = socket.socket()
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    holder.bind(("localhost", 0))
    _held.append(holder)
    return int(holder.getsockname()[1])
