"""Compare the memory that a dry run announces with the measured memory of training runs.

Each run is a process: resident memory is read after the imports, and the peak when the run is over. The runs cover the
libraries, the encoders and the settings that need memory of their own: selection from a super-batch, a moving average
of the parameters, micro-batches, half types, and reference features in memory or in a cache.

    python benchmarks/memory.py
    python benchmarks/memory.py --only torch/conv
"""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

# Settings that all runs have, unless a run has others; the backend and the encoders are in the name of the run.
COMMON = {"data": "scenes", "method": "sogclr", "train_size": 4096, "epochs": 1, "batch_size": 1024, "width": 64}

_JEST = {"method": "jest", "reference": "RUN", "batch_size": 512, "super_batch": 4}
_RHO = {"method": "rho", "reference": "RUN", "batch_size": 256, "super_batch": 8}
_DRRHO = {"method": "drrho", "reference": "RUN"}
_CACHE = {"method": "drrho", "reference": "CACHE"}
_HF = {"model": "tiny"}

# Name of a run: library / encoders / what is special. RUN and CACHE stand for a reference run and for the cache of it.
RUNS: dict[str, dict[str, Any]] = {
    "torch/conv/256": {"batch_size": 256},
    "torch/conv/1024": {},
    "torch/conv/jest": _JEST,
    "torch/conv/jest-topk": _JEST | {"method": "jest-topk"},
    "torch/conv/rho": _RHO,
    "torch/conv/ema": {"ema": 0.99, "width": 256, "batch_size": 128, "train_size": 512},
    "torch/conv/wide": {"width": 256, "batch_size": 128, "train_size": 512},
    "torch/conv/micro": {"micro_batch": 128, "batch_size": 2048},
    "torch/conv/bf16": {"precision": "bf16"},
    "torch/conv/fp16": {"precision": "fp16"},
    "torch/conv/drrho": _DRRHO,
    "torch/conv/drrho cache": _CACHE,
    "torch/conv/augment": {"augment": "crop-flip"},
    "torch/hf/512": _HF | {"batch_size": 512},
    "torch/hf/micro": _HF | {"batch_size": 2048, "micro_batch": 256},
    "torch/hf/bf16": _HF | {"batch_size": 512, "precision": "bf16"},
    "torch/mlp/256": {"batch_size": 256},
    "torch/mlp/1024": {},
    "torch/mlp/ema": {"ema": 0.99, "width": 512, "batch_size": 256},
    "jax/conv/256": {"batch_size": 256},
    "jax/conv/1024": {},
    "jax/conv/jest": _JEST,
    "jax/conv/rho": _RHO,
    "jax/conv/ema": {"ema": 0.99, "width": 256, "batch_size": 128, "train_size": 512},
    "jax/conv/micro": {"micro_batch": 512, "batch_size": 2048},
    "jax/conv/bf16": {"precision": "bf16"},
    "jax/conv/drrho": _DRRHO,
    "jax/mlp/256": {"batch_size": 256},
    "jax/mlp/1024": {},
    "numpy/mlp/256": {"batch_size": 256},
    "numpy/mlp/1024": {},
    "numpy/mlp/2048": {"batch_size": 2048, "width": 512},
    "numpy/mlp/ema": {"ema": 0.99, "width": 512},
    "numpy/mlp/micro": {"micro_batch": 256, "batch_size": 2048, "width": 512},
    "numpy/mlp/jest": _JEST | {"width": 512},
    "numpy/mlp/rho": _RHO | {"width": 512},
    "numpy/mlp/drrho": _DRRHO | {"width": 512},
}


def settings_of(name: str) -> dict[str, Any]:
    """Return the settings of a run of `RUNS`."""
    backend, architecture, _ = name.split("/")
    encoders = {} if architecture == "hf" else {"architecture": architecture}
    settings = COMMON | {"backend": backend} | encoders | RUNS[name]
    return {key: value for key, value in settings.items() if not ("model" in settings and key == "width")}


def run(settings: dict[str, Any]) -> dict[str, Any]:
    """Train in this process, and return resident memory after the imports, the peak, and the announced memory."""
    from drrho_clip.config import TrainConfig
    from drrho_clip.data.splits import open_splits
    from drrho_clip.plan.run import plan_run
    from drrho_clip.train import train
    from drrho_core.backend import get_backend

    config = TrainConfig(**settings)
    backend = get_backend(config.backend, dtype=config.dtype)
    if "model" in settings:
        # The library of these encoders is imported when the first of them is built.
        importlib.import_module("transformers.models.clip.modeling_clip")
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


def make_reference(folder: Path) -> dict[str, str]:
    """Train a small reference model and encode the data with it; return the folders by the words of `RUNS`."""
    drrho = [sys.executable, "-m", "drrho_clip"]
    reference, cache = folder / "reference", folder / "cache"
    small = ["--method", "clip", "--architecture", "mlp", "--backend", "numpy", "--width", "8", "--epochs", "1"]
    sizes = ["--data", "scenes", "--train-size", "4096", "--out", str(reference)]
    subprocess.run([*drrho, "train", *small, *sizes], check=True, capture_output=True)
    encoded = ["--model", str(reference), "--data", "scenes", "--train-size", "4096", "--out", str(cache)]
    subprocess.run([*drrho, "encode", *encoded], check=True, capture_output=True)
    return {"RUN": str(reference), "CACHE": str(cache)}


def main() -> None:
    """Measure all runs, and print a table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default="", help="the start of the names of the runs, such as torch/conv")
    parser.add_argument("--parts", action="store_true", help="print the announced parts too")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run is not None:
        print(json.dumps(run(json.loads(arguments.run))))
        return
    with tempfile.TemporaryDirectory() as folder:
        places = make_reference(Path(folder))
        print("| run | measured MB | announced MB | difference |\n|---|---|---|---|", flush=True)
        for name in RUNS:
            if not name.startswith(arguments.only):
                continue
            settings = settings_of(name)
            if "reference" in settings:
                settings["reference"] = places[settings["reference"]]
            words = [sys.executable, __file__, "--run", json.dumps(settings)]
            finished = subprocess.run(words, check=False, capture_output=True, text=True)
            if finished.returncode:
                print(f"| {name} | failed: {finished.stderr.strip().splitlines()[-1]} |", flush=True)
                continue
            measured = json.loads(finished.stdout)
            peak, announced = measured["peak"] - measured["before"], sum(measured["plan"].values())
            print(f"| {name} | {peak / 1e6:.0f} | {announced / 1e6:.0f} | {announced / peak - 1:+.0%} |", flush=True)
            if arguments.parts:
                print({part: round(size / 1e6, 1) for part, size in measured["plan"].items()}, flush=True)


if __name__ == "__main__":
    main()
