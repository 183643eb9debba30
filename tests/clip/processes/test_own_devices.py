"""Processes that use one GPU are refused on all processes before the first exchange of arrays; a CPU may be shared."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from drrho_torch import processes as torch_processes

from drrho_clip.errors import AgreedError
from drrho_clip.processes.own_devices import require_own_devices
from drrho_clip.processes.place import Place
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


@pytest.mark.parametrize(("identity", "refused"), [("GPU-a", True), ("00000000-0000", False), (None, False)])
def test_processes_of_torch_compare_their_gpus_by_identity(
    identity: str | None, refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Both processes of the group send the value of this one.
    monkeypatch.setattr(torch_processes, "values_of_all", lambda value, _: [value] * 2)
    monkeypatch.setattr(torch_processes, "TorchRanks", lambda _: SimpleNamespace(rank=0, size=2))
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "new_group", lambda **_: None)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    properties = SimpleNamespace() if identity is None else SimpleNamespace(uuid=identity)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    torch_processes.TorchProcesses(torch.device("cpu"), Place(0, 2, 0))
    if not refused:
        torch_processes.TorchProcesses(torch.device("cuda:0"), Place(0, 2, 0))
        return
    with pytest.raises(AgreedError, match=r"^device must be another GPU on each process, got cuda:0 of .* on ranks 0"):
        torch_processes.TorchProcesses(torch.device("cuda:0"), Place(0, 2, 0))
