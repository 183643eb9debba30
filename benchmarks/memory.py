"""Compare the memory that a dry run announces with the measured memory of training runs.

Each run is a process: resident memory is read after the imports, and the peak when the run is over.

    python benchmarks/memory.py
    python benchmarks/memory.py --only torch/conv
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

BACKENDS = {"torch": ("conv", "mlp"), "jax": ("conv", "mlp"), "numpy": ("mlp",)}
BATCHES = (256, 1024)


def run(settings: dict[str, Any]) -> dict[str, Any]:
    """Train in this process, and return resident memory after the imports, the peak, and the announced memory."""
    from drrho_clip.config import TrainConfig
    from drrho_clip.data.splits import open_splits
    from drrho_clip.plan import plan_run
    from drrho_clip.train import train
    from drrho_core.backend import get_backend

    config = TrainConfig(**settings)
    backend = get_backend(config.backend, dtype=config.dtype)
    before = status("VmRSS")
    with tempfile.TemporaryDirectory() as folder:
        train(config, Path(folder) / "run", backend=backend, quiet=True)
    peak = status("VmHWM")
    plan = plan_run(config, backend, open_splits(config))
    return {"before": before, "peak": peak, "plan": {part.name: part.num_bytes for part in plan.memory}}


def status(name: str) -> int:
    """Return a number of bytes from /proc/self/status."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":"))


def main() -> None:
    """Measure all runs, and print a table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", help="BACKEND/ARCHITECTURE")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run is not None:
        print(json.dumps(run(json.loads(arguments.run))))
        return
    for backend, architectures in BACKENDS.items():
        for architecture in architectures:
            if arguments.only not in (None, f"{backend}/{architecture}"):
                continue
            for batch_size in BATCHES:
                settings = {
                    "data": "scenes",
                    "method": "sogclr",
                    "train_size": 4096,
                    "epochs": 1,
                    "batch_size": batch_size,
                    "backend": backend,
                    "architecture": architecture,
                    "width": 64,
                }
                words = [sys.executable, __file__, "--run", json.dumps(settings)]
                measured = json.loads(subprocess.run(words, check=True, capture_output=True, text=True).stdout)
                peak, announced = measured["peak"] - measured["before"], sum(measured["plan"].values())
                figures = f"measured {peak / 1e6:6.0f} MB, announced {announced / 1e6:6.0f} MB"
                print(f"{backend:6} {architecture:5} {batch_size:5} {figures}, {announced / peak - 1:+.0%}", flush=True)


if __name__ == "__main__":
    main()
