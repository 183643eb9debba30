"""Processes that use one GPU are refused, before the first exchange of arrays; a CPU may be shared."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from drrho_torch import processes as torch_processes

from drrho_clip.errors import AgreedError
from drrho_clip.processes import opening
from drrho_clip.processes.own_devices import require_own_devices
from drrho_clip.processes.place import Place
from drrho_clip.terminal.printing import is_silent, silence
from helpers.thread_processes import ThreadProcesses


def _messages(*devices: tuple[str, str, str | None]) -> list[str]:
    """Compare devices, each given as host, name and identity; return the error of each process, or an empty text."""

    def message(processes: ThreadProcesses) -> str:
        host, name, identity = devices[processes.rank]
        # Threads are on one machine, so another host is put into the message.
        own: Any = SimpleNamespace(size=processes.size, gather=lambda value: processes.gather([host, *value[1:]]))
        try:
            require_own_devices(own, name, identity)
        except AgreedError as error:
            return str(error)
        return ""

    return ThreadProcesses.run(len(devices), message)


def test_processes_on_one_gpu_are_named_by_all() -> None:
    a, b = ("node1", "cuda:0", "GPU-a"), ("node1", "cuda:1", "GPU-b")
    rule = "device must be another GPU on each process, got"
    assert _messages(a, b, a) == [f"{rule} cuda:0 of node1 on ranks 0 and 2"] * 3
    words = f"{rule} cuda:0 of node1 on ranks 0 and 2; cuda:1 of node1 on ranks 1 and 3"
    assert _messages(a, b, a, b) == [words] * 4


def test_the_number_of_a_gpu_in_a_process_does_not_matter() -> None:
    # Each process may see another part of the GPUs of the machine, and calls the first one of these number 0.
    assert _messages(("node1", "cuda:0", "GPU-a"), ("node1", "cuda:0", "GPU-b")) == [""] * 2
    (message,) = set(_messages(("node1", "cuda:0", "GPU-a"), ("node1", "cuda:1", "GPU-a")))
    assert message.endswith("got cuda:0 of node1 on ranks 0 and 1")


@pytest.mark.parametrize(
    "devices",
    [
        [("node1", "cpu", None)] * 3,
        [("node1", "cuda:0", "GPU-a"), ("node2", "cuda:0", "GPU-a")],
        [("node1", "cuda:0", "GPU-a"), ("node1", "cpu", None), ("node1", "cpu", None)],
    ],
    ids=["CPUs", "two machines", "a GPU and CPUs"],
)
def test_other_devices_are_not_refused(devices: list[Any]) -> None:
    assert _messages(*devices) == [""] * len(devices)


@pytest.mark.parametrize(
    ("uuid", "identity"), [("GPU-a", "GPU-a"), ("00000000-0000", None), (None, None)], ids=["usual", "zeros", "none"]
)
def test_processes_of_torch_tell_the_identity_of_their_gpu(
    uuid: str | None, identity: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch_processes, "TorchRanks", lambda _: SimpleNamespace(rank=0, size=2))
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "new_group", lambda **_: None)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    properties = SimpleNamespace() if uuid is None else SimpleNamespace(uuid=uuid)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    for name, expected in (("cpu", None), ("cuda:0", identity)):
        processes = torch_processes.TorchProcesses(torch.device(name), Place(0, 2, 0))
        assert processes.device == (name, expected)


def _joined(rank: int, sent: list[Any], *, same_program: bool) -> Any:
    """Return a backend whose group has two processes on one GPU; the values that this process sends are noted."""

    def gather(value: Any) -> list[Any]:
        sent.append(value)
        if isinstance(value, list) or same_program:
            return [value, value]
        other = {**value, "version": "0.0"} if isinstance(value, dict) else ""
        return [value, other] if rank == 0 else [other, value]

    sizes = {"rank": rank, "size": 2, "is_first": rank == 0, "num_devices": 2, "ranks": None}
    group = SimpleNamespace(**sizes, exchanges_between_steps=True, device=("cuda:0", "GPU-a"), gather=gather)

    class TorchBackend:
        name = "torch"
        processes = staticmethod(lambda _: group)

    # The digest of the source is that of the module's package.
    TorchBackend.__module__ = "drrho_torch.backend"
    return TorchBackend()


@pytest.fixture
def _unwatched(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    hooks = dict.fromkeys(("progress", "received", "failed"), lambda *_: None)
    monkeypatch.setattr(opening, "Watch", lambda *_, **__: SimpleNamespace(**hooks))
    yield
    silence(False)


@pytest.mark.usefixtures("_unwatched")
@pytest.mark.parametrize("rank", [0, 1])
def test_only_the_first_of_the_processes_on_one_gpu_prints_the_line(rank: int) -> None:
    silence(False)
    with pytest.raises(AgreedError, match=r"^device must be another GPU on each process, got cuda:0 of .* on ranks 0"):
        opening.open_processes(_joined(rank, [], same_program=True), Place(rank, 2, rank, "localhost:1"))
    assert is_silent() is (rank > 0)


@pytest.mark.usefixtures("_unwatched")
@pytest.mark.parametrize("rank", [0, 1])
def test_processes_of_other_versions_are_refused_before_devices_are_exchanged(rank: int) -> None:
    sent: list[Any] = []
    with pytest.raises(AgreedError, match=r"^version must be the same on all processes"):
        opening.open_processes(_joined(rank, sent, same_program=False), Place(rank, 2, rank, "localhost:1"))
    # A hash of the facts, and the facts.
    assert [type(value) for value in sent] == [str, dict]
