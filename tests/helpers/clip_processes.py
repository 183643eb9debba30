"""Runs of the harness with several processes: each process takes all cases, one after another, in one launch."""

from __future__ import annotations

import json
import os
import shutil
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.multiprocessing

from benchmarks.many_devices.counted_ranks import count_messages
from drrho_clip.config import TrainConfig
from drrho_clip.data.splits import open_all_pairs
from drrho_clip.encoders import open_model
from drrho_clip.features import encode_pairs
from drrho_clip.files.checkpoint import load_arrays
from drrho_clip.methods import METHODS
from drrho_clip.processes.opening import open_processes
from drrho_clip.processes.place import Place
from drrho_clip.processes.protocol import Processes
from drrho_clip.train import train
from drrho_core.backend import get_backend
from helpers.ports import free_port
from helpers.small_pairs import write_two_colours

SMALL: dict[str, Any] = {
    "backend": "torch", "architecture": "mlp", "image_size": 8, "width": 8, "feature_dim": 8, "dtype": "float64",
    "batch_size": 24, "epochs": 2, "learning_rate": 0.01, "warmup_steps": 2, "log_every": 1, "checkpoint_every": 4,
}  # fmt: skip
"""Settings of a run of a second."""

_SELECTS = {"super_batch": 2, "batch_size": 24}
_HALF = {"dtype": "float32", "architecture": "conv", "width": 4, "image_size": 16}

CASES: dict[str, dict[str, Any]] = {
    # Every method.
    "clip": {"method": "clip", "estimator": "device"},
    "sogclr": {"method": "sogclr", "gamma_schedule": "step", "estimator": "host"},
    "drrho": {"method": "drrho", "gamma_schedule": "constant", "estimator": "file"},
    "siglip": {"method": "siglip", "clip_norm": 0.1},
    "fastclip-v0": {"method": "fastclip-v0", "ema": 0.9},
    "fastclip-v1": {"method": "fastclip-v1", "order": "blocks"},
    "fastclip-v2": {"method": "fastclip-v2", "micro_batch": 4},
    "fastclip-v3": {"method": "fastclip-v3", "augment": "crop-flip"},
    "scent": {"method": "scent", "form": "ring"},
    "distill:clip": {"method": "distill:clip", "temperature_scheme": "log_scale"},
    "distill:fastclip-v2": {"method": "distill:fastclip-v2", "form": "ring"},
    "rho": {"method": "rho", **_SELECTS},
    "jest": {"method": "jest", "jest_chunks": 4, **_SELECTS},
    "jest-topk": {"method": "jest-topk", "data": "siblings", **_SELECTS},
    # Data and guidance.
    "siblings": {"method": "drrho", "data": "siblings", "temperature_scheme": "per_sample", "radius": 0.5},
    "siblings of siglip": {"method": "siglip", "data": "siblings", "form": "ring"},
    "chosen pairs": {"method": "drrho", "drop_suspects": 0.1, "anchor_weights": "reference", "micro_batch": 5},
    "cache": {"method": "drrho", "reference": "cache"},
    "built-in": {"method": "sogclr", "data": "digits", "batch_size": 96, "epochs": 1, "swapped_fraction": 0.1},
    "conv": {"method": "sogclr", "architecture": "conv", "width": 4, "image_size": 16, "epochs": 1},
    "unreadable": {"method": "sogclr", "data": "damaged", "max_unreadable": 0.2},
    # The numbers of the samples are divided among the processes.
    "split": {"method": "sogclr", "estimator": "split"},
    "split per sample": {"method": "fastclip-v2", "data": "siblings", "estimator": "split", "micro_batch": 4},
    "split without estimates": {"method": "jest", "estimator": "split", "jest_chunks": 4, **_SELECTS},
    # Half types: rounding depends on the size of a batch, so these runs are equal up to rounding.
    "bf16": {"method": "sogclr", "precision": "bf16", **_HALF},
    "fp16": {"method": "clip", "precision": "fp16", **_HALF},
}
"""Settings of each case, by the name of the case. Every method, scheme, form and home is in one of them."""


IN_FULL = {"bf16 in full": {**CASES["bf16"], "precision": "float32"}}
"""The case in bfloat16 in the full precision."""

CHAIN: dict[str, dict[str, Any]] = {
    "chain drrho": {"method": "drrho", "ema": 0.9, "clip_norm": 0.5},
    "chain fastclip-v2": {"method": "fastclip-v2", "data": "siblings", "augment": "crop"},
}
"""Settings of runs that other numbers of processes continue."""

STOPS = ((4, 2), (2, 5), (1, 7), (3, 9), (4, None))
"""Numbers of processes of a chain, each with the step after which the run is stopped; an epoch has 6 or 7 steps."""


HOMES_OF_PARTS = ("file", "split", "host", "file", "split")
"""The home of the estimates in each part of a chain."""


class Job(NamedTuple):
    """A run, or a part of a run, that all processes of a launch take together."""

    name: str
    case: Mapping[str, Any]
    resume: bool = False
    stop_after: int | None = None


class Launch(NamedTuple):
    """The arguments of the processes of a launch; every field can be pickled."""

    folder: str
    world_size: int
    port: int
    jobs: Sequence[Job]


def jobs_of(size: int, cases: Mapping[str, Mapping[str, Any]]) -> list[Job]:
    """Return the jobs of whole runs with a number of processes, which is the name of the folder of these runs."""
    return [Job(f"{size}/{name}", case) for name, case in cases.items()]


def link_of_chain(number: int) -> list[Job]:
    """Return the jobs of one part of all chains."""
    home = {"estimator": HOMES_OF_PARTS[number]}
    stop = STOPS[number][1]
    return [Job(f"chain/{name}", {**case, **home}, resume=number > 0, stop_after=stop) for name, case in CHAIN.items()]


def prepare(folder: Path) -> None:
    """Write two tables into a folder, with one and with two captions per picture, a reference run, and a cache."""
    write_two_colours(folder / "data", 200, swapped_fraction=0.1)
    lines = (folder / "data" / "pairs.csv").read_text().splitlines()
    more = [f"{line} again" for line in lines[1::2]]
    (folder / "data" / "siblings.csv").write_text("\n".join([*lines, *more]) + "\n")
    # The same pictures, of which some files are damaged.
    shutil.copytree(folder / "data", folder / "broken")
    for row in range(0, 200, 17):
        (folder / "broken" / f"{row}.png").write_bytes(b"no picture")
    text = (folder / "data" / "pairs.csv").read_text().splitlines()
    rows = [text[0], *(f"../broken/{line}" for line in text[1:])]
    (folder / "data" / "damaged.csv").write_text("\n".join(rows) + "\n")
    reference = {"method": "clip", "dtype": "float32", "seed": 7, "epochs": 12}
    run_job(folder, Job("reference", reference))
    encoder = open_model(str(folder / "reference"), backend=get_backend("numpy"))
    encode_pairs(encoder, open_all_pairs(config_of(folder, {"method": "clip"})), folder / "cache")


def config_of(folder: Path, case: Mapping[str, Any]) -> TrainConfig:
    """Return the settings of a case; the folder has the table and the reference run."""
    settings = SMALL | {"data": "pairs"} | dict(case)
    if settings["data"] in ("pairs", "siblings", "damaged"):
        settings["data"] = str(folder / "data" / f"{settings['data']}.csv")
    uses = METHODS[settings["method"]].needs_reference or settings.keys() & {"drop_suspects", "anchor_weights"}
    if uses:
        settings["reference"] = str(folder / settings.get("reference", "reference"))
    return TrainConfig(**settings)


def run_job(folder: Path, job: Job, processes: Processes | None = None) -> None:
    """Train a run or a part of a run."""
    config = config_of(folder, job.case)
    backend = get_backend("torch", device="cpu", dtype=config.dtype)
    train(
        config,
        folder / job.name,
        backend=backend,
        quiet=True,
        processes=processes,
        resume=job.resume,
        stop_after=job.stop_after,
    )


def launch(folder: Path, world_size: int, jobs: Sequence[Job]) -> None:
    """Run jobs with several processes."""
    launched = Launch(str(folder), world_size, free_port(), jobs)
    torch.multiprocessing.spawn(_work, args=(launched,), nprocs=world_size)


def _work(rank: int, launched: Launch) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    folder = Path(launched.folder)
    place = Place(rank, launched.world_size, rank, f"localhost:{launched.port}")
    backend = get_backend("torch", device="cpu")
    counted = count_messages(backend)
    processes = open_processes(backend, place)
    for job in launched.jobs:
        counted[0].clear()
        try:
            run_job(folder, job, processes)
            (folder / f"{job.name}-{rank}.messages").write_text(json.dumps([counted[0].calls, counted[0].received]))
        # The other jobs still run, if all processes have met the same error.
        except ValueError:
            (folder / f"{job.name}-{rank}.error").write_text(traceback.format_exc())
    processes.close()


def messages_of(folder: Path, job: str, rank: int) -> dict[str, list[float]]:
    """Return number and bytes of the messages that a process of a launch has received in a job, by operation."""
    calls, received = json.loads((folder / f"{job}-{rank}.messages").read_text())
    return {operation: [calls[operation], received[operation]] for operation in calls}


def state_of(run: Path, checkpoint: str = "checkpoint") -> dict[str, np.ndarray]:
    """Return the arrays of a checkpoint: weights, optimiser, estimates, temperatures."""
    return load_arrays(run / f"{checkpoint}.safetensors", "checkpoint")[0]


def log_of(run: Path) -> list[dict[str, Any]]:
    """Return the lines of the log."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
