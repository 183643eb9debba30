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

WORLD_SIZE = torch_processes.WORLD_SIZE


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Start the processes once, and return the results of each."""
    folder: Path = tmp_path_factory.mktemp("processes")
    torch.multiprocessing.spawn(torch_processes.work, args=(WORLD_SIZE, str(folder)), nprocs=WORLD_SIZE)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(WORLD_SIZE)]


KINDS = [
    *(
        f"{name}/{form}/{wrapper}"
        for name in torch_processes.CASES
        for form in ("reduce", "ring")
        for wrapper in ("plain", "ddp")
    ),
    "everything/scale 1/plain",
    "everything/split/ddp",
]


@pytest.mark.parametrize("kind", KINDS)
def test_processes_train_as_one_process(results: list[dict[str, Any]], kind: str) -> None:
    name = kind.partition("/")[0]
    alone = torch_processes.train(name, 0, 1, lambda model: model, WORLD_SIZE * torch_processes.LOCAL)
    for rank in results:
        shared = rank[kind]
        for field, expected in alone.items():
            np.testing.assert_allclose(shared[field], expected, rtol=1e-10, atol=1e-12, err_msg=field)


def test_single_calls_of_processes_are_those_of_one_process(results: list[dict[str, Any]]) -> None:
    alone = torch_processes.calls(0, 1)
    for field, expected in alone.items():
        parts = [rank["calls"][field] for rank in results]
        # Losses and estimates are the same on all processes; gradients belong to the own rows.
        shared = np.concatenate(parts) if "gradient" in field else parts[1]
        # bfloat16 has 8 bits: a gradient near the middle of two numbers may be rounded to either.
        rtol = 2**-7 if field.startswith("bfloat16 gradient") else 1e-5
        np.testing.assert_allclose(shared, expected, rtol=rtol, atol=1e-7, err_msg=field)
    assert np.all(alone["eval estimates"] == -np.inf)
    assert np.all(alone["no update estimates"] == -np.inf)


REFUSALS = {
    "estimator": r"estimator must hold all rows .*, got one whose rows are split among 2 ranks",
    "no tensor": r"rank 1 refuses its arguments: image_features must be a torch tensor .*, got list",
    "pairs": r"rank 1 refuses its arguments: temperature must .*",
    "samples": r"num_samples must be the same on all ranks, got 8 on rank 0 and 9 on rank 1",
    "training": r"training must be the same on all ranks, got True on rank 0 and False on rank 1",
    "update": r"update must be the same on all ranks, got True on rank 0 and False on rank 1",
    "open_clip": r"contrastive_loss must have no process_group, because the batches are gathered here, got one",
    "no group": r"world size must be 1 .*process_group=torch\.distributed\.group\.WORLD, .* got 2",
    "gathered": r"gathered must be False if the loss has a process_group, got True",
    "same id": r"sample_index must not repeat an index within a batch, got 3 on rank 0 and on rank 1 .*drop_last.*",
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
