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

from helpers import torch_checkpoints, torch_launches, torch_process_calls, torch_processes

Results = dict[int, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Start each number of processes once, and return the results of each process."""
    folder: Path = tmp_path_factory.mktemp("processes")
    # Most processes come first: they write a checkpoint, and the others read it.
    sizes = sorted(torch_processes.CASES, reverse=True)
    started: Results = {world_size: torch_launches.launch(world_size, folder) for world_size in sizes}
    return started | {1: [{"checkpoint": torch_launches.load_alone(folder)}]}


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


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_a_distributed_checkpoint_of_four_processes_is_read_by_any_number(results: Results, world_size: int) -> None:
    written = results[torch_checkpoints.WRITERS][0]["checkpoint"]
    found = [rank["checkpoint"] for rank in results[world_size]]
    tables: dict[str, dict[str, Any]] = {"temperatures": torch_checkpoints.temperatures()}
    for size in torch_checkpoints.SIZES:
        tables[f"rows {size}"] = dict(
            zip(("log_inner_image", "log_inner_text"), torch_checkpoints.rows(size), strict=True)
        )
        assert {rank[f"temperature {size}"].item() for rank in found} == {0.25}
    for table, columns in tables.items():
        for name, whole in columns.items():
            np.testing.assert_array_equal(np.concatenate([rank[table][name] for rank in found]), whole)
    for name in ("weight", "moments"):
        for rank in found:
            np.testing.assert_array_equal(rank[name], written[name])


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
    "no pairs": r"batch_size must be the same on all ranks, got 4 on rank 0 and 0 on rank 1",
    "form": r"form must be 'reduce' or 'ring', got 'tree'",
    "group": r"process_group must be a process group or a DeviceMesh, .*, got str",
    "pickle": r"an object with a process_group cannot be pickled, .* save state_dict\(\) .*",
    "DTensor": r"rank 1 refuses its arguments: image_features must be a plain tensor, got a DTensor; .*",
    "DTensor as temperature": r"temperature must be a plain tensor, got a DTensor; .*",
    "outside of the group": r"process_group must contain this process, got a group without global rank [01]; .*",
    "outside of the mesh": r"process_group must contain this process, got a group without global rank [01]; .*",
    "destroyed": r"process_group must exist as long as the loss is called, got a group that was destroyed; .*",
}


@pytest.mark.parametrize("kind", REFUSALS)
def test_all_processes_refuse_a_wrong_call_with_the_same_message(results: Results, kind: str) -> None:
    messages = [rank["refusals"][kind] for rank in results[torch_process_calls.WORLD_SIZE]]
    assert all(re.fullmatch(REFUSALS[kind], message) for message in messages), messages
    # A message about the group of one process names this process, so that each process has a message of its own.
    assert len(set(messages)) == (2 if kind.startswith("outside") else 1)


def test_rows_that_other_processes_share_are_refused_with_both_groups(results: Results) -> None:
    for rank, found in enumerate(results[torch_checkpoints.WRITERS]):
        row, column = divmod(rank, 2)
        rows, batch = [2 * row, 2 * row + 1], [column, column + 2]
        expected = f"got one whose rows are split among processes {rows} for a group of processes {batch}"
        assert found["other groups"].endswith(expected)


def test_a_compiled_loss_refuses_what_an_eager_loss_refuses(results: Results) -> None:
    for rank in results[torch_process_calls.WORLD_SIZE]:
        for kind, message in rank["compiled refusals"].items():
            assert message == rank["refusals"][kind]


@pytest.mark.parametrize("kind", ["replicated", "split"])
def test_a_copy_of_a_loss_shares_the_group_and_has_a_state_of_its_own(results: Results, kind: str) -> None:
    copies = [rank["copies"][kind] for rank in results[torch_process_calls.WORLD_SIZE]]
    assert all(copy["group"] and copy["moved"] and copy["unchanged"] == -np.inf for copy in copies)
    assert copies[0]["value"] == copies[1]["value"]
