"""Processes that share a batch train as one process does, under the wrappers of torch and without a wrapper."""

from __future__ import annotations

import functools
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch.distributed.fsdp")

from helpers import torch_launches, torch_process_calls, torch_processes

Results = dict[int, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Start each number of processes once, and return the results of each process."""
    folder: Path = tmp_path_factory.mktemp("processes")
    return {world_size: torch_launches.launch(world_size, folder) for world_size in torch_processes.CASES}


@functools.cache
def alone(case: torch_processes.Case) -> dict[str, np.ndarray]:
    """Train on this process."""
    return torch_processes.train(case)


ALL = [(world_size, name) for world_size, cases in torch_processes.CASES.items() for name in cases]
EXACT = [(size, name) for size, name in ALL if not torch_processes.CASES[size][name].autocast]
HALF = [(size, name) for size, name in ALL if torch_processes.CASES[size][name].autocast]


@pytest.mark.parametrize(("world_size", "name"), EXACT, ids=[f"{size} x {name}" for size, name in EXACT])
def test_processes_train_as_one_process(results: Results, world_size: int, name: str) -> None:
    expected = alone(torch_processes.CASES[world_size][name].alone)
    for rank in results[world_size]:
        shared = rank["cases"][name]
        assert shared.keys() == expected.keys()
        for field in expected:
            np.testing.assert_allclose(shared[field], expected[field], rtol=1e-10, atol=1e-12, err_msg=field)


@pytest.mark.parametrize(("world_size", "name"), HALF, ids=[f"{size} x {name}" for size, name in HALF])
def test_half_types_are_as_far_from_float64_on_processes_as_on_one(
    results: Results, world_size: int, name: str
) -> None:
    case = torch_processes.CASES[world_size][name].alone
    one, exact = alone(case), alone(replace(case, autocast=False))
    for rank in results[world_size]:
        for field, expected in exact.items():
            visited = np.isfinite(expected)
            np.testing.assert_array_equal(np.isfinite(rank["cases"][name][field]), visited)
            error, usual = (
                np.sqrt(np.mean((x[field][visited] - expected[visited]) ** 2)) for x in (rank["cases"][name], one)
            )
            # The weights' gradients are rounded on each process before they are averaged, so their errors differ.
            assert error <= 1.25 * usual, field


def test_single_calls_of_processes_are_those_of_one_process(results: Results) -> None:
    expected = torch_process_calls.calls(0, 1)
    for field, whole in expected.items():
        parts = [rank["calls"][field] for rank in results[torch_process_calls.WORLD_SIZE]]
        # Losses and estimates are the same on all processes; gradients belong to the own rows.
        shared = np.concatenate(parts) if "gradient" in field else parts[1]
        # bfloat16 has 8 bits: a gradient near the middle of two numbers may be rounded to either.
        rtol = 2**-7 if field.startswith("bfloat16 gradient") else 1e-5
        np.testing.assert_allclose(shared, whole, rtol=rtol, atol=1e-7, err_msg=field)
    assert np.all(expected["eval estimates"] == -np.inf)
    assert np.all(expected["no update estimates"] == -np.inf)


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
def test_all_processes_refuse_a_wrong_call_with_the_same_message(results: Results, kind: str) -> None:
    messages = {rank["refusals"][kind] for rank in results[torch_process_calls.WORLD_SIZE]}
    assert len(messages) == 1
    assert re.fullmatch(REFUSALS[kind], messages.pop())
