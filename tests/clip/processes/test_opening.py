"""Joining the other processes: a process that cannot join says why, because no other process knows the reason."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from drrho_clip.errors import BadInput
from drrho_clip.processes.opening import open_processes
from drrho_clip.processes.place import Place
from drrho_clip.terminal.printing import is_silent, silence
from drrho_core.backend import get_backend


@pytest.fixture(autouse=True)
def _printing() -> Iterator[None]:
    yield
    silence(False)


def _refuse(place: Place) -> None:
    raise BadInput(f"processes must be able to reach each other, got: process {place.rank} is alone")


@pytest.mark.parametrize("silent", [False, True], ids=["started by hand", "started by a launcher"])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_cannot_join_prints_the_reason(rank: int, silent: bool) -> None:
    backend: Any = SimpleNamespace(name="torch", processes=_refuse)
    # A launcher's processes begin in silence, except for the first of each machine.
    silence(silent)
    with pytest.raises(BadInput, match="is alone"):
        open_processes(backend, Place(rank, 2, rank, "localhost:1"))
    assert not is_silent()


def test_a_process_with_a_backend_without_processes_prints_the_reason() -> None:
    with pytest.raises(BadInput, match="backend must be one of"):
        open_processes(get_backend("numpy"), Place(1, 2, 0, "localhost:1"))
    assert not is_silent()
