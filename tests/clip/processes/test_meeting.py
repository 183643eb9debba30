"""The meeting at the start: each way in which it fails is one line on every process that has come."""

from __future__ import annotations

import socket
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from drrho_torch.processes import TorchProcesses

from drrho_clip.errors import BadInput
from drrho_clip.processes import meeting
from drrho_clip.processes.meeting import meet, tell_failure
from drrho_clip.processes.place import Place
from helpers.ports import free_port

BRIEF, LONG = 0.4, 30.0
"""Seconds to wait for a process that never comes, and for processes that all come."""


def messages(*places: tuple[int, int], seconds: float) -> list[str]:
    """Let processes with these numbers, of groups of these sizes, meet; return the messages of those that fail."""
    address = f"localhost:{free_port()}"

    def message(place: tuple[int, int]) -> str:
        try:
            meet(Place(*place, address=address), seconds=seconds)
        except BadInput as error:
            return str(error).replace(address, "ADDRESS")
        return ""

    with ThreadPoolExecutor(len(places)) as threads:
        return list(threads.map(message, places))


@pytest.mark.parametrize("size", [1, 2, 4])
def test_processes_that_all_come_go_on(size: int) -> None:
    assert messages(*((rank, size) for rank in reversed(range(size))), seconds=LONG) == [""] * size


def test_a_process_to_which_nobody_answers_names_the_address() -> None:
    (message,) = messages((1, 2), seconds=BRIEF)
    rule = "coordinator must be an address at which process 0 answers within 0.4 seconds"
    assert message == f"{rule}, got 'ADDRESS': Connection refused"


def test_missing_processes_are_named_by_all_that_have_come() -> None:
    (message,) = set(messages((0, 4), (2, 4), seconds=BRIEF))
    assert message == "all 4 processes must start within 0.4 seconds, got no processes 1, 3"


def test_a_number_that_two_processes_have_is_named_by_all() -> None:
    (message,) = set(messages((0, 4), (1, 4), (1, 4), seconds=LONG))
    assert message == "process must be another number on each process, got 1 twice"


def test_processes_that_name_different_sizes_are_refused() -> None:
    (message,) = set(messages((0, 3), (1, 2), seconds=LONG))
    assert message == "processes must be the same number on all, got 3 on process 0 and 2 on 1"


@pytest.mark.parametrize("failing", [(0,), (1,), (2, 3), (0, 3)])
def test_a_failure_before_the_meeting_is_told_to_all_that_wait(failing: tuple[int, ...]) -> None:
    address = f"localhost:{free_port()}"

    def message(rank: int) -> str:
        place = Place(rank, 4, address=address)
        if rank in failing:
            tell_failure(place, f"process {rank} has no pairs.csv")
            return "failed"
        with pytest.raises(BadInput) as caught:
            meet(place, seconds=LONG)
        return str(caught.value)

    with ThreadPoolExecutor(4) as threads:
        heard = list(threads.map(message, range(4)))
    name = "" if failing[0] == 0 else f"process {failing[0]}: "
    words = f"{name}process {failing[0]} has no pairs.csv"
    assert heard == ["failed" if rank in failing else words for rank in range(4)]


def test_a_failure_after_the_meeting_is_not_told_there_again(monkeypatch: pytest.MonkeyPatch) -> None:
    address = f"localhost:{free_port()}"
    places = [Place(rank, 2, address=address) for rank in range(2)]
    with ThreadPoolExecutor(2) as threads:
        list(threads.map(lambda place: meet(place, seconds=LONG), places))
    # Nobody listens any more, or a library does, which would not understand the message.
    monkeypatch.delattr(socket, "create_connection")
    monkeypatch.delattr(socket, "create_server")
    for place in places:
        tell_failure(place, "too late")


def test_a_port_of_another_program_is_refused() -> None:
    with socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True) as other:
        address = f"localhost:{other.getsockname()[1]}"
        with pytest.raises(BadInput, match="must have a port that is free on the machine of process 0") as caught:
            meet(Place(0, 2, address=address), seconds=BRIEF)
    assert address in str(caught.value)


def test_a_port_for_processes_that_start_later_is_given_to_nobody_else() -> None:
    port = free_port()
    with socket.socket() as other, pytest.raises(OSError, match="in use"):
        other.bind(("localhost", port))
    # A process of the test can listen there, as a server does.
    with socket.create_server(("localhost", port)):
        pass


def test_strangers_do_not_disturb_the_meeting() -> None:
    port = free_port()
    address = f"localhost:{port}"
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(meet, Place(0, 2, address=address), seconds=LONG)
        for words in (b"", b"GET / HTTP/1.1\r\n\r\n", b'{"process": null}\n', b"[" * 50_000):
            while True:
                try:
                    with socket.create_connection(("localhost", port), timeout=LONG) as stranger:
                        stranger.sendall(words)
                    break
                # The first process does not listen yet.
                except ConnectionRefusedError:
                    assert not first.done()
        threads.submit(meet, Place(1, 2, address=address), seconds=LONG).result()
        first.result()


def test_a_torch_process_meets_the_others_before_torch_connects_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting, "MEETING_SECONDS", BRIEF)
    # torch by itself would wait for half an hour.
    with pytest.raises(BadInput, match=r"^coordinator must be an address at which process 0 answers"):
        TorchProcesses(torch.device("cpu"), Place(1, 2, address=f"localhost:{free_port()}"))
