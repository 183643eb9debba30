"""Processes that share a batch train as one process does: loss, weights, temperature and estimates after some steps."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.multiprocessing

from helpers import torch_processes

WORLD_SIZE = 2


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Start the processes once, and return the results of each."""
    folder: Path = tmp_path_factory.mktemp("processes")
    torch.multiprocessing.spawn(torch_processes.work, args=(WORLD_SIZE, str(folder)), nprocs=WORLD_SIZE)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(WORLD_SIZE)]


@pytest.mark.parametrize("wrapper", ["plain", "ddp"])
@pytest.mark.parametrize("form", ["reduce", "ring"])
@pytest.mark.parametrize("name", torch_processes.CASES)
def test_processes_train_as_one_process(results: list[dict[str, Any]], name: str, form: str, wrapper: str) -> None:
    alone = torch_processes.train(name, 0, 1, lambda model: model, WORLD_SIZE * torch_processes.LOCAL)
    for rank in results:
        shared = rank[f"{name}/{form}/{wrapper}"]
        for field, expected in alone.items():
            np.testing.assert_allclose(shared[field], expected, rtol=1e-10, atol=1e-12, err_msg=field)


REFUSALS = {
    "no group": r"world size must be 1 .*process_group=torch\.distributed\.group\.WORLD, .* got 2",
    "gathered": r"gathered must be False if the loss has a process_group, got True",
    "same id": r"sample_index must not repeat an index within a batch, got 3 on rank 0 and on rank 1",
    "range": r"rank 1 refuses its arguments: sample_index must hold row ids from 0 to 7 .*, got 8 at position 2",
    "sizes": r"batch_size must be the same on all ranks, got 4 on rank 0 and 3 on rank 1",
    "form": r"form must be 'reduce' or 'ring', got 'tree'",
    "group": r"process_group must be a process group or a DeviceMesh, .*, got str",
}


@pytest.mark.parametrize("kind", REFUSALS)
def test_all_processes_refuse_a_wrong_call_with_the_same_message(results: list[dict[str, Any]], kind: str) -> None:
    messages = {rank["refusals"][kind] for rank in results}
    assert len(messages) == 1
    assert re.fullmatch(REFUSALS[kind], messages.pop())
