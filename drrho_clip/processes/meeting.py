"""The meeting at the start: several processes find each other over TCP before their array library connects them.

The first process listens at the address that all processes were given. Every other process connects and says its
number and how many processes there should be. When all are there, the first process says "go", and the array library
connects the processes by itself, at the same address. A library that waits for a process that never comes may end this
process without a message; after the meeting this cannot happen any more.

A process that fails before the meeting, such as one whose machine lacks a file, comes to say why, so that the others do
not wait for it.
"""

from __future__ import annotations

import contextlib
import json
import socket
import time
from typing import Any

from drrho_clip.errors import BadInput
from drrho_clip.processes.place import Place

__all__ = ["MEETING_SECONDS", "check_address", "meet", "tell_failure"]

MEETING_SECONDS = 60.0
"""Seconds after which a process gives up, if the other processes have not come."""

# Seconds between two attempts to connect; the first process may be started last.
_PAUSE = 0.1
_GO = ""
# A line has a few numbers, and perhaps an error, whose characters may take six bytes each.
_LONGEST, _MOST_CHARACTERS = 1 << 15, 4000
# Seconds for which a process that has failed waits for the others, to tell them why; its user sees the error then.
_SECONDS_TO_TELL = 10.0
# The places of this process that have been at a meeting, and cannot tell anything there any more.
_begun: set[Place] = set()


def check_address(address: str) -> tuple[str, int]:
    """Return host and port of an address HOST:PORT.

    Raises
    ------
    BadInput
        If the address has another form.

    Examples
    --------
    >>> check_address("10.0.0.1:4321"), check_address("[::1]:4321")
    (('10.0.0.1', 4321), ('::1', 4321))
    """
    host, colon, port = address.rpartition(":")
    host = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    if not (host and colon and port.isascii() and port.isdecimal() and 0 < int(port) < 2**16):
        raise BadInput(f"coordinator must be HOST:PORT with a port from 1 to 65535, got {address!r}")
    return host, int(port)


def meet(place: Place, *, seconds: float | None = None) -> None:
    """Wait until all processes have come to the address of the first process.

    Parameters
    ----------
    place : Place
        The place of this process among all processes, with the address.
    seconds : float, optional
        Seconds to wait; by default `MEETING_SECONDS`.

    Raises
    ------
    BadInput
        On all processes that have come, if a process has not come in time, if two processes have the same number, or if
        processes name different numbers of processes, or if a process has failed before the meeting.
    """
    assert place.address is not None
    _begun.add(place)
    seconds = MEETING_SECONDS if seconds is None else seconds
    deadline = time.monotonic() + seconds
    if place.rank == 0:
        refusal = _receive_all(place, deadline, seconds)
        if refusal:
            raise BadInput(refusal)
    else:
        _report(place, deadline, seconds)


def tell_failure(place: Place | None, message: str) -> None:
    """Tell the other processes, which wait at the meeting, that this process has failed before.

    Nothing happens if this process is alone, has no address at which the others wait, or has been at the meeting.

    Parameters
    ----------
    place : Place or None
        The place of this process among all processes.
    message : str
        The error, in one line.
    """
    if place is None or place.address is None or place.size == 1 or place in _begun:
        return
    _begun.add(place)
    message = message[:_MOST_CHARACTERS]
    deadline = time.monotonic() + _SECONDS_TO_TELL
    # This process ends with its own error, whether the others have heard it or not.
    with contextlib.suppress(BadInput):
        if place.rank == 0:
            _receive_all(place, deadline, _SECONDS_TO_TELL, failure=message)
        else:
            _report(place, deadline, _SECONDS_TO_TELL, failure=message)


def _receive_all(place: Place, deadline: float, seconds: float, *, failure: str = "") -> str:
    """Wait as the first process for all others, and tell them to go on, or the reason why they cannot.

    Return what they were told. The reason is `failure`, the error of this process, if there is one.
    """
    assert place.address is not None
    _, port = check_address(place.address)
    try:
        # Other machines may reach this one by several names, so the port is opened for all of them.
        dual = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if dual else socket.AF_INET
        listener = socket.create_server(("", port), family=family, dualstack_ipv6=dual, backlog=place.size)
    except OSError as error:
        raise BadInput(
            f"coordinator must have a port that is free on the machine of process 0, got {place.address!r}: "
            f"{error.strerror}"
        ) from error
    with contextlib.ExitStack() as stack:
        came: dict[int, socket.socket] = {}
        with listener:
            # The error of the process with the lowest number is told, as in all later checks.
            problem = _refusal(place, listener, came, stack, deadline, seconds)
            refusal = failure or problem
        # The port is free from here on, so the library of a process that goes on finds only the library of process 0.
        for connection in came.values():
            with contextlib.suppress(OSError):
                connection.sendall(_in_line(refusal))
    return refusal


def _refusal(
    place: Place,
    listener: socket.socket,
    came: dict[int, socket.socket],
    stack: contextlib.ExitStack,
    deadline: float,
    seconds: float,
) -> str:
    """Fill in the connections of the processes that come; return why they cannot go on, or an empty text."""
    failures: dict[int, str] = {}
    while len(came) < place.size - 1:
        try:
            listener.settimeout(max(deadline - time.monotonic(), 0.001))
            connection = stack.enter_context(listener.accept()[0])
            number, size, failure = _read(connection, deadline)
        except TimeoutError:
            if failures:
                break
            missing = [str(number) for number in range(1, place.size) if number not in came]
            kind = "process" if len(missing) == 1 else "processes"
            return f"all {place.size} processes must start within {seconds:g} seconds, got no {kind} {_short(missing)}"
        # Not every program that connects to a port is one of ours.
        except (OSError, ValueError, TypeError, KeyError):
            continue
        if size != place.size:
            came[-1] = connection
            return f"processes must be the same number on all, got {place.size} on process 0 and {size} on {number}"
        if number in came:
            came[-1] = connection
            return f"process must be another number on each process, got {number} twice"
        came[number] = connection
        failures |= {number: failure} if failure else {}
    # All processes that come are waited for, because each of them needs to hear the reason.
    return next((f"process {number}: {failures[number]}" for number in sorted(failures)), _GO)


def _report(place: Place, deadline: float, seconds: float, *, failure: str = "") -> None:
    """Tell the first process that this one has come, and wait for the word to go on; after a failure, do not wait."""
    assert place.address is not None
    host, port = check_address(place.address)
    reason = "no answer"
    while (left := deadline - time.monotonic()) > 0:
        try:
            with socket.create_connection((host, port), timeout=left) as connection:
                connection.sendall(_in_line({"process": place.rank, "processes": place.size, "failure": failure}))
                if failure:
                    return
                # The first process gives up by itself, and it may have started later.
                refusal = _received(connection, deadline + seconds)
        except OSError as error:
            reason = error.strerror or reason
            time.sleep(min(_PAUSE, max(left, 0.0)))
            continue
        except ValueError:
            reason = "another program answers"
            break
        if refusal:
            raise BadInput(str(refusal))
        return
    raise BadInput(
        f"coordinator must be an address at which process 0 answers within {seconds:g} seconds, got "
        f"{place.address!r}: {reason}"
    )


def _read(connection: socket.socket, deadline: float) -> tuple[int, int, str]:
    """Return the number of the process at the other end, the number of processes that it expects, and its failure."""
    # A silent stranger must not hold up the processes that have come.
    word = _received(connection, min(deadline, time.monotonic() + 1.0))
    return int(word["process"]), int(word["processes"]), str(word.get("failure", ""))


def _in_line(value: Any) -> bytes:
    return json.dumps(value).encode() + b"\n"


def _received(connection: socket.socket, deadline: float) -> Any:
    """Return the value that the other end sends, a line of JSON."""
    text = b""
    while not text.endswith(b"\n"):
        connection.settimeout(max(deadline - time.monotonic(), 0.001))
        try:
            piece = connection.recv(4096)
        except TimeoutError as error:
            raise ConnectionError("no answer") from error
        if not piece:
            raise ConnectionError("the other end has closed the connection")
        text += piece
        if len(text) > _LONGEST:
            raise ValueError("a line of a stranger")
    return json.loads(text)


def _short(words: list[str]) -> str:
    """Return the words in a list that a line can hold."""
    return ", ".join(words[:8]) + (", ..." if len(words) > 8 else "")
