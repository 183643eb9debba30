from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Iterator

import pytest

from drrho_clip.processes.connection import Connection, connect, listen
from drrho_clip.processes.endpoints import FirstEndpoint, OtherEndpoint
from drrho_clip.processes.judge import Limits, Standing

LIMITS = Limits()


@pytest.fixture
def pair() -> Iterator[tuple[Connection, socket.socket]]:
    left, right = socket.socketpair()
    connection = Connection(left)
    yield connection, right
    connection.close()
    right.close()


def test_a_message_may_arrive_in_parts(pair: tuple[Connection, socket.socket]) -> None:
    connection, other = pair
    other.sendall(b'{"rank": 1}\n{"ra')
    assert connection.receive() == [{"rank": 1}]
    other.sendall(b'nk": 2}\n')
    assert connection.receive() == [{"rank": 2}]
    assert connection.receive() == []


def test_messages_before_the_end_are_received(pair: tuple[Connection, socket.socket]) -> None:
    connection, other = pair
    other.sendall(b'{"verdict": 1}\n')
    other.close()
    connection.send({"rank": 1})
    connection.send({"rank": 1})
    assert connection.receive() == [{"verdict": 1}]
    assert not connection.is_open


@pytest.mark.parametrize("text", [b"GET / HTTP/1.1\r\n", b"[1]\n", b"\xff\n", b"x" * 200_000])
def test_foreign_messages_are_refused(pair: tuple[Connection, socket.socket], text: bytes) -> None:
    connection, other = pair
    other.setblocking(False)
    other.send(text)
    with pytest.raises(ValueError):
        connection.receive()


def test_a_side_that_reads_nothing_neither_blocks_nor_fills_the_memory(pair: tuple[Connection, socket.socket]) -> None:
    connection, other = pair
    for _ in range(5_000):
        connection.send({"words": "x" * 1000})
    # The messages that were sent are whole.
    received = Connection(other).receive()
    assert received[0] == {"words": "x" * 1000}


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", socket.gethostname()])
def test_a_process_connects_to_the_first(host: str) -> None:
    with listen(host, backlog=1) as listener:
        connection = connect(host, listener.getsockname()[1], seconds=10.0)
        connection.close()


def test_no_other_machine_reaches_a_port_for_this_machine() -> None:
    with listen("127.0.0.1", backlog=1) as listener:
        assert listener.getsockname()[0] == "127.0.0.1"


def test_a_child_process_does_not_keep_connections_open() -> None:
    # In a process of its own, because array libraries that other tests have loaded forbid a fork.
    script = """
import os, socket
from drrho_clip.processes.connection import Connection
left, right = socket.socketpair()
connection = Connection(left)
reading, writing = os.pipe()
if os.fork() == 0:
    os.close(writing)
    os.read(reading, 1)
    os._exit(0)
connection.close()
right.settimeout(10.0)
assert right.recv(1) == b""
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


def test_a_stranger_cannot_stop_the_run() -> None:
    with listen("127.0.0.1", backlog=3) as listener:
        address = listener.getsockname()
        first = FirstEndpoint(listener, 2, "secret", LIMITS)
        strangers = [socket.create_connection(address) for _ in range(3)]
        strangers[0].sendall(b'{"key": "guess", "rank": 1}\n')
        strangers[1].sendall(b"GET / HTTP/1.1\n")
        strangers[2].close()
        other = OtherEndpoint(connect(*address, seconds=10.0), 1, "secret", LIMITS)
        for signs in range(3):
            other.tell(Standing(signs=signs))
            first.read()
        assert first.verdict is None
        # The right rank was heard, so its end is noticed.
        other.end()
        first.read()
        assert first.verdict is not None
        assert first.verdict.ranks == (1,)
        first.end()
        for stranger in strangers:
            stranger.close()
