"""Launches of processes of torch.distributed on gloo: each launch runs all cases of a number of processes."""

from __future__ import annotations

import datetime
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing

from helpers import torch_checkpoints, torch_process_calls, torch_processes

CHECKPOINT = "checkpoint"
"""The folder in which the largest launch leaves a checkpoint for the others."""


def launch(world_size: int, folder: Path) -> list[dict[str, Any]]:
    """Start the processes, wait for them, and return the results of each."""
    torch.multiprocessing.spawn(work, args=(world_size, str(folder)), nprocs=world_size)
    return [torch.load(folder / f"{world_size}-{rank}.pt", weights_only=False) for rank in range(world_size)]


def load_alone(folder: Path) -> dict[str, Any]:
    """Load the checkpoint of a launch on this process."""
    with warnings.catch_warnings():
        # torch notices that there is one process only, and the argument that says so is deprecated.
        warnings.simplefilter("ignore")
        return torch_checkpoints.load(folder / CHECKPOINT, None)


def work(rank: int, world_size: int, folder: str) -> None:
    """Run all cases as one process of a group, and save the results in a file."""
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    # The compiler warns about itself and about array_api_compat's cached question about types.
    warnings.filterwarnings("ignore", message="<class 'torch.autograd.function.Function'> should not")
    warnings.filterwarnings("ignore", message="Dynamo detected a call to a `functools")
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store-{world_size}",
        rank=rank,
        world_size=world_size,
        timeout=datetime.timedelta(seconds=60),
    )
    try:
        results: dict[str, Any] = {"cases": torch_processes.all_cases(world_size)}
        checkpoint = Path(folder) / CHECKPOINT
        if world_size == torch_checkpoints.WRITERS:
            results["checkpoint"] = torch_checkpoints.save(checkpoint)
            results["other groups"] = torch_process_calls.other_groups()
        elif checkpoint.exists():
            results["checkpoint"] = torch_checkpoints.load(checkpoint, dist.group.WORLD)
        if world_size == torch_process_calls.WORLD_SIZE:
            results["calls"] = torch_process_calls.calls(rank, world_size, dist.group.WORLD)
            results["refusals"] = torch_process_calls.refusals(rank)
            results["compiled refusals"] = torch_process_calls.compiled_refusals(rank)
            results["copies"] = torch_process_calls.copies(rank)
        torch.save(results, Path(folder) / f"{world_size}-{rank}.pt")
    finally:
        dist.destroy_process_group()
