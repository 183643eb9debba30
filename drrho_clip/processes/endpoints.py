"""The two ends of the watch: rank 0 hears all other ranks, and each of them hears rank 0.

The connections are plain TCP, so they do not depend on the array library, whose own connections fail or wait when a
rank fails. If a process dies, the operating system closes its connection, also after ``kill -9``.
"""

from __future__ import annotations

import selectors
import socket
import time
from typing import Any, Protocol

from drrho_clip.processes.connection import Connection
from drrho_clip.processes.judge import Judge, Limits, Standing, Verdict

__all__ = ["Endpoint", "FirstEndpoint", "OtherEndpoint"]

_SECONDS_TO_END = 1.0


class Endpoint(Protocol):
    """One end of the watch: messages are exchanged only inside these calls."""

    @property
    def verdict(self) -> Verdict | None:
        """The failed ranks, as soon as there are any."""

    @property
    def over(self) -> bool:
        """All ranks have done their work."""

    @property
    def waits(self) -> bool:
        """A verdict is due soon."""

    def sockets(self) -> list[Any]:
        """Return the sockets whose messages `read` takes."""

    def read(self) -> None:
        """Take in the messages that have arrived."""

    def tell(self, standing: Standing) -> None:
        """Tell the other side how this rank stands."""

    def pass_time(self, seconds: float) -> None:
        """Let time pass."""

    def end(self) -> None:
        """End the connections; rank 0 waits for the other ranks for a short time."""


class FirstEndpoint:
    """The end of the watch in the process of rank 0, which judges.

    Parameters
    ----------
    listener : socket
        Takes the connections of the other ranks.
    size : int
        Number of ranks.
    key : str
        The secret that a process has to know in order to be heard.
    limits : Limits
        The times after which a rank counts as failed.
    """

    def __init__(self, listener: socket.socket, size: int, key: str, limits: Limits) -> None:
        listener.setblocking(False)
        self._listener = listener
        self._key, self._size = key, size
        self._judge = Judge(size, limits)
        self._strangers: list[Connection] = []
        self._ranks: dict[int, Connection] = {}

    @property
    def verdict(self) -> Verdict | None:
        """The failed ranks, as soon as there are any."""
        return self._judge.verdict

    @property
    def over(self) -> bool:
        """All ranks have done their work."""
        return self._judge.over

    @property
    def waits(self) -> bool:
        """A verdict is due soon."""
        return self._judge.waits

    def sockets(self) -> list[Any]:
        """Return the sockets whose messages `read` takes."""
        listeners = [] if self._listener.fileno() < 0 else [self._listener]
        return listeners + self._strangers + [connection for connection in self._ranks.values() if connection.is_open]

    def read(self) -> None:
        """Take in new connections and the messages that have arrived."""
        self._accept()
        for connection in list(self._strangers):
            self._introduce(connection)
        for rank, connection in self._ranks.items():
            if connection.is_open:
                self._hear(rank, connection)

    def tell(self, standing: Standing) -> None:
        """Take in how rank 0 stands, and tell the other ranks the saved step, the verdict or the end."""
        self._judge.hear(0, standing)
        verdict = None if self.verdict is None else self.verdict.to_json()
        for connection in self._ranks.values():
            connection.send({"saved": standing.saved, "over": self.over, "verdict": verdict})

    def pass_time(self, seconds: float) -> None:
        """Let time pass."""
        self._judge.pass_time(seconds)

    def end(self) -> None:
        """End the connections after the other ranks have closed theirs, for which they have some time."""
        # If this process closed first, messages that it has not read would make the operating system reset the
        # connections, and the other ranks might lose the verdict.
        end = time.monotonic() + _SECONDS_TO_END
        with selectors.DefaultSelector() as selector:
            for connection in self._ranks.values():
                connection.end()
                if connection.is_open:
                    selector.register(connection, selectors.EVENT_READ, connection)
            while selector.get_map() and (left := end - time.monotonic()) > 0:
                for key, _ in selector.select(left):
                    _received(key.data)
                    if not key.data.is_open:
                        selector.unregister(key.fileobj)
        for connection in (*self._strangers, *self._ranks.values()):
            connection.close()
        self._listener.close()

    def _accept(self) -> None:
        """Take new connections; after that of the last rank, take no more."""
        if self._listener.fileno() < 0:
            return
        try:
            while True:
                self._strangers.append(Connection(self._listener.accept()[0]))
        except OSError:
            pass

    def _introduce(self, connection: Connection) -> None:
        """Read the first message of a connection, which must hold the secret and the rank."""
        messages = _received(connection)
        if not messages and connection.is_open:
            return
        self._strangers.remove(connection)
        first = messages[0] if messages else {}
        rank = first.get("rank", 0)
        known = isinstance(rank, int) and 0 < rank < self._size and first.get("key") == self._key
        if not known or rank in self._ranks:
            connection.close()
            return
        self._ranks[rank] = connection
        self._take(rank, connection, messages)
        if len(self._ranks) == self._size - 1:
            self._listener.close()

    def _hear(self, rank: int, connection: Connection) -> None:
        self._take(rank, connection, _received(connection))

    def _take(self, rank: int, connection: Connection, messages: list[dict[str, Any]]) -> None:
        """Give the messages of a rank to the judge."""
        for message in messages:
            if "standing" in message:
                self._judge.hear(rank, Standing.from_json(message["standing"]))
        if not connection.is_open:
            self._judge.lose(rank)


class OtherEndpoint:
    """The end of the watch in the process of any other rank.

    Parameters
    ----------
    connection : Connection
        The connection to rank 0.
    rank : int
        The own rank.
    key : str
        The secret of the run.
    limits : Limits
        The times after which rank 0 counts as failed.
    """

    def __init__(self, connection: Connection, rank: int, key: str, limits: Limits) -> None:
        self.verdict: Verdict | None = None
        self.over = False
        self._connection, self._limits = connection, limits
        self._silent = 0.0
        self._saved: int | None = None
        self._failed = False
        connection.send({"key": key, "rank": rank})

    @property
    def waits(self) -> bool:
        """A verdict is due soon."""
        return self._failed and self.verdict is None

    def sockets(self) -> list[Any]:
        """Return the sockets whose messages `read` takes."""
        return [self._connection] if self._connection.is_open else []

    def read(self) -> None:
        """Take in the messages of rank 0."""
        for message in _received(self._connection):
            self._silent = 0.0
            self._saved = message.get("saved")
            self.over = bool(message.get("over"))
            if self.verdict is None and message.get("verdict"):
                self.verdict = Verdict.from_json(message["verdict"])
        if not (self._connection.is_open or self.over):
            self._judge_first("ended without a word (killed?)")

    def tell(self, standing: Standing) -> None:
        """Tell rank 0 how this rank stands."""
        self._failed = bool(standing.failure)
        self._connection.send({"standing": standing.to_json()})

    def pass_time(self, seconds: float) -> None:
        """Let time pass."""
        self._silent += seconds
        limit = min(self._limits.silence, self._limits.hang)
        if self._silent >= limit:
            self._judge_first(f"gave no sign of life for {limit:g} s (stopped, or the machine is gone?)")

    def end(self) -> None:
        """End the connection."""
        self._connection.close()

    def _judge_first(self, reason: str) -> None:
        # Every other rank finds out by itself that rank 0 is gone.
        if self.verdict is None:
            self.verdict = Verdict((0,), reason, saved=self._saved)


def _received(connection: Connection) -> list[dict[str, Any]]:
    """Return the messages of a connection; a connection with foreign messages is closed."""
    try:
        return connection.receive()
    except (ValueError, RecursionError):
        connection.close()
        return []
