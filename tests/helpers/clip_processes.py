"""Runs of the harness with several processes: each process takes all cases, one after another, in one launch."""

from __future__ import annotations

import json
import os
import socket
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.multiprocessing

from drrho_clip.config import TrainConfig
from drrho_clip.files.checkpoint import load_arrays
from drrho_clip.processes.opening import open_processes
from drrho_clip.processes.place import Place
from drrho_clip.processes.protocol import Processes
from drrho_clip.train import train
from drrho_core.backend import get_backend
from helpers.small_pairs import write_two_colours

SMALL: dict[str, Any] = {
    "backend": "torch", "architecture": "mlp", "image_size": 8, "width": 8, "feature_dim": 8, "dtype": "float64",
    "batch_size": 12, "epochs": 2, "learning_rate": 0.01, "warmup_steps": 2, "log_every": 1, "checkpoint_every": 4,
}  # fmt: skip
"""Settings of a run of a second."""

METHODS: dict[str, dict[str, Any]] = {
    "clip": {"method": "clip"},
    "sogclr": {"method": "sogclr"},
    "drrho": {"method": "drrho"},
}
"""Settings of each case, by its name."""


class Launch(NamedTuple):
    """What the processes of a launch need to know; every field can be pickled."""

    folder: str
    world_size: int
    port: int
    cases: Mapping[str, Mapping[str, Any]]


def make_table(folder: Path, size: int = 60) -> Path:
    """Write a table of pictures with captions, and return its path."""
    write_two_colours(folder, size, swapped_fraction=0.1)
    return folder / "pairs.csv"


def config_of(folder: Path, case: Mapping[str, Any]) -> TrainConfig:
    """Return the settings of a case; the folder has the table and the reference run."""
    settings = SMALL | {"data": str(folder / "data" / "pairs.csv")} | dict(case)
    if settings["method"] in ("drrho",):
        settings.setdefault("reference", str(folder / "reference"))
    return TrainConfig(**settings)


def run_case(folder: Path, name: str, case: Mapping[str, Any], out: Path, processes: Processes | None = None) -> None:
    """Train one case."""
    config = config_of(folder, case)
    backend = get_backend("torch", device="cpu", dtype=config.dtype)
    train(config, out / name, backend=backend, quiet=True, processes=processes)


def launch(folder: Path, world_size: int, cases: Mapping[str, Mapping[str, Any]]) -> Path:
    """Run cases with several processes, and return the folder of their runs."""
    return spawn(_work, Launch(str(folder), world_size, free_port(), cases))


def spawn(work: Callable[[int, Any], None], launched: Any) -> Path:
    """Start the processes of a launch, wait for them, and return the folder of their runs."""
    out = Path(launched.folder) / f"runs-{launched.world_size}"
    out.mkdir(exist_ok=True)
    torch.multiprocessing.spawn(work, args=(launched,), nprocs=launched.world_size)
    return out


def free_port() -> int:
    """Return a port that is free now."""
    with socket.socket() as server:
        server.bind(("localhost", 0))
        return int(server.getsockname()[1])


def _work(rank: int, launched: Launch) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    folder = Path(launched.folder)
    out = folder / f"runs-{launched.world_size}"
    place = Place(rank, launched.world_size, rank, f"localhost:{launched.port}")
    processes = open_processes(get_backend("torch", device="cpu"), place)
    try:
        for name, case in launched.cases.items():
            try:
                run_case(folder, name, case, out, processes)
            # The other cases still run, if all processes have met the same error.
            except ValueError:
                (out / f"{name}-{rank}.error").write_text(traceback.format_exc())
    finally:
        processes.close()


def state_of(run: Path, checkpoint: str = "checkpoint") -> dict[str, np.ndarray]:
    """Return the arrays of a checkpoint: weights, optimiser, estimates, temperatures."""
    return load_arrays(run / f"{checkpoint}.safetensors", "checkpoint")[0]


def log_of(run: Path) -> list[dict[str, Any]]:
    """Return the lines of the log."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
