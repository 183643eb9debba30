"""Connections that carry JSON objects, one object a line; no call waits for the other side."""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
import socket
import weakref
from collections.abc import Mapping
from typing import Any

__all__ = ["Connection", "connect", "listen"]

# A message holds a few numbers and one line of text.
_LONGEST = 1 << 16

# A child process would keep the connections of its parent open, and nobody would notice the end of the parent.
_open_sockets: weakref.WeakSet[socket.socket] = weakref.WeakSet()


def _close_all() -> None:
    for opened in _open_sockets:
        opened.close()


os.register_at_fork(after_in_child=_close_all)


class Connection:
    """A connection that carries JSON objects.

    Parameters
    ----------
    opened : socket
        The open socket, which belongs to this object from now on.

    Attributes
    ----------
    is_open : bool
        False after the other side has closed the connection, and after an error of the connection.

    Examples
    --------
    >>> left, right = map(Connection, socket.socketpair())
    >>> left.send({"rank": 1})
    >>> right.receive()
    [{'rank': 1}]
    >>> left.close()
    >>> right.receive(), right.is_open
    ([], False)
    >>> right.close()
    """

    def __init__(self, opened: socket.socket) -> None:
        opened.setblocking(False)
        # Small messages are sent at once, and not collected.
        with contextlib.suppress(OSError):
            opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        _open_sockets.add(opened)
        self._socket = opened
        self._incoming, self._outgoing = b"", b""
        self.is_open = True

    def fileno(self) -> int:
        """Return the number of the socket, by which a selector knows it."""
        return self._socket.fileno()

    def send(self, message: Mapping[str, Any]) -> None:
        """Send an object as far as the other side takes it; the rest is sent by the next call."""
        # A process that is stopped reads nothing, and its messages must not fill the memory.
        if len(self._outgoing) < _LONGEST:
            self._outgoing += json.dumps(message).encode() + b"\n"
        try:
            while self.is_open and self._outgoing:
                self._outgoing = self._outgoing[self._socket.send(self._outgoing) :]
        except BlockingIOError:
            pass
        except OSError:
            # Messages that the other side sent before it went can still be read, so `receive` finds the end.
            self._outgoing = b""

    def receive(self) -> list[dict[str, Any]]:
        """Return the objects that have arrived.

        Raises
        ------
        ValueError
            If the other side has sent anything else.
        """
        try:
            while self.is_open and len(self._incoming) <= _LONGEST:
                part = self._socket.recv(_LONGEST)
                self._incoming += part
                self.is_open = bool(part)
        except BlockingIOError:
            pass
        except OSError:
            self.is_open = False
        *lines, self._incoming = self._incoming.split(b"\n")
        if len(self._incoming) > _LONGEST:
            raise ValueError("a message is too long")
        messages = [json.loads(line) for line in lines]
        if not all(isinstance(message, dict) for message in messages):
            raise ValueError("a message is not an object")
        return messages

    def end(self) -> None:
        """Tell the other side that no more messages come; its messages can still be received."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """Close the connection."""
        self.is_open = False
        self._socket.close()


def listen(host: str, *, backlog: int) -> socket.socket:
    """Return a socket that listens on a free port, where processes that know this machine as `host` reach it."""
    try:
        local = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        local = False
    # Processes of this machine alone need no port that other machines see.
    if local:
        family = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, 0), family=family, backlog=backlog)
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=backlog)
    return socket.create_server(("", 0), backlog=backlog)


def connect(host: str, port: int, *, seconds: float) -> Connection:
    """Connect to the listening process.

    Raises
    ------
    OSError
        If nothing answers there in time.
    """
    return Connection(socket.create_connection((host, port), timeout=seconds))
