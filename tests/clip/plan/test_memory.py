"""The memory that a dry run announces is close to the memory that runs take."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from drrho_clip.config import TrainConfig
from drrho_clip.data import DataSplits
from drrho_clip.data.splits import open_splits
from drrho_clip.models import ModelSpec
from drrho_clip.plan.memory import memory_of_run, parameter_count
from drrho_clip.plan.run import plan_run
from drrho_core.backend import get_backend

# Peak of a run less the memory after the imports, in MB: benchmarks/memory.py, scenes of 4,096 pairs, width 64.
MEASURED = {
    ("torch", "conv", 256): 239,
    ("torch", "conv", 1024): 614,
    ("torch", "mlp", 256): 105,
    ("torch", "mlp", 1024): 108,
    ("jax", "conv", 256): 778,
    ("jax", "conv", 1024): 1450,
    ("jax", "mlp", 256): 359,
    ("jax", "mlp", 1024): 466,
    ("numpy", "mlp", 256): 106,
    ("numpy", "mlp", 1024): 122,
}


def announced(backend: str, architecture: str, batch_size: int) -> float:
    """Megabytes that a dry run announces for the runs of `MEASURED`."""
    spec = ModelSpec(architecture, 32, 3, vocabulary_size=35, context_length=13, width=64)
    config = TrainConfig(data="scenes", method="sogclr", batch_size=batch_size, backend=backend)
    parts = memory_of_run(config, spec, get_backend(backend), num_pairs=4096, num_images=6096)
    return sum(part.num_bytes for part in parts) / 1e6


@pytest.mark.parametrize("run", MEASURED, ids=str)
def test_the_announced_memory_is_within_a_fifth_of_the_measured_memory(run: tuple[str, str, int]) -> None:
    assert announced(*run) == pytest.approx(MEASURED[run], rel=0.2)


def test_a_run_of_this_machine_takes_the_announced_memory() -> None:
    benchmark = Path(__file__).parents[3] / "benchmarks" / "memory.py"
    settings = {
        "data": "scenes",
        "method": "sogclr",
        "train_size": 2048,
        "epochs": 1,
        "batch_size": 512,
        "backend": "numpy",
        "architecture": "mlp",
        "width": 256,
    }
    words = [sys.executable, str(benchmark), "--run", json.dumps(settings)]
    run = subprocess.run(words, check=True, capture_output=True, text=True)
    measured = json.loads(run.stdout)
    assert sum(measured["plan"].values()) == pytest.approx(measured["peak"] - measured["before"], rel=0.2)


def test_the_parts_grow_with_the_sizes_that_they_name() -> None:
    spec = ModelSpec("conv", 32, 3, vocabulary_size=35, context_length=13, width=64)
    config = TrainConfig(data="scenes", method="sogclr", batch_size=1024, backend="torch", dtype="float64")
    parts = dict(
        memory_of_run(config, spec, get_backend("torch"), num_pairs=1000, num_images=10, reference_features=512)
    )
    assert parts["images"] == 10 * 32 * 32 * 3
    assert parts["parameters"] == parts["gradients"] == parts["optimiser"] / 2 == 8 * parameter_count(spec)
    assert parts["inner estimates"] == 2 * 8 * 1000
    assert parts["reference features"] == 2 * 8 * 1000 * 512


# Peaks less the memory after the imports, in MB, of runs with settings that need memory of their own:
# benchmarks/memory.py.
MEASURED_SETTINGS = {
    "jest": (526, {"method": "jest", "reference": "RUN", "batch_size": 512, "super_batch": 4}),
    "jest-topk": (555, {"method": "jest-topk", "reference": "RUN", "batch_size": 512, "super_batch": 4}),
    "rho": (554, {"method": "rho", "reference": "RUN", "batch_size": 256, "super_batch": 8}),
    "moving average": (866, {"ema": 0.99, "width": 256, "batch_size": 128}),
    "wide": (640, {"width": 256, "batch_size": 128}),
    "micro-batches": (213, {"micro_batch": 128, "batch_size": 2048}),
    "bf16": (349, {"precision": "bf16"}),
    "fp16": (436, {"precision": "fp16"}),
}


@pytest.mark.parametrize("run", MEASURED_SETTINGS)
def test_settings_that_need_memory_are_within_a_fifth_of_the_measured_memory(run: str) -> None:
    measured, settings = MEASURED_SETTINGS[run]
    config = TrainConfig(
        **({"data": "scenes", "method": "sogclr", "batch_size": 1024, "backend": "torch", "width": 64} | settings)
    )
    spec = ModelSpec("conv", 32, 3, vocabulary_size=35, context_length=13, width=config.width)
    pairs = 512 if config.width == 256 else 4096
    parts = memory_of_run(config, spec, get_backend("torch"), num_pairs=pairs, num_images=pairs + 2000)
    assert sum(part.num_bytes for part in parts) / 1e6 == pytest.approx(measured, rel=0.2)


def test_micro_batches_bound_the_activations_but_not_the_inputs() -> None:
    spec = ModelSpec("conv", 32, 3, vocabulary_size=35, context_length=13, width=64)
    config = TrainConfig(data="scenes", method="sogclr", batch_size=2048, backend="torch", micro_batch=128)
    backend = get_backend("torch")
    sizes = [
        dict(memory_of_run(replace(config, micro_batch=size), spec, backend, num_pairs=4096, num_images=0))
        for size in (128, 256, 0, 2048)
    ]
    assert sizes[0]["activations"] < sizes[1]["activations"] < sizes[2]["activations"] == sizes[3]["activations"]
    assert sizes[0]["activations"] > 4 * 2048 * 2 * 32 * 32 * 3


# Peaks of runs of NumPy with width 512, as above.
MEASURED_NUMPY = {
    "large batch": (927, {"batch_size": 2048}),
    "moving average": (1225, {"ema": 0.99}),
    "micro-batches": (997, {"batch_size": 2048, "micro_batch": 256}),
    "jest": (870, {"method": "jest", "reference": "RUN", "batch_size": 512, "super_batch": 4}),
    "rho": (1025, {"method": "rho", "reference": "RUN", "batch_size": 256, "super_batch": 8}),
}


@pytest.mark.parametrize("run", MEASURED_NUMPY)
def test_a_checkpoint_uses_memory_that_the_step_has_left(run: str) -> None:
    measured, settings = MEASURED_NUMPY[run]
    config = TrainConfig(
        **({"data": "scenes", "method": "sogclr", "batch_size": 1024, "backend": "numpy", "width": 512} | settings)
    )
    spec = ModelSpec("mlp", 32, 3, vocabulary_size=35, context_length=13, width=512)
    parts = memory_of_run(config, spec, get_backend("numpy"), num_pairs=4096, num_images=6096)
    assert sum(part.num_bytes for part in parts) / 1e6 == pytest.approx(measured, rel=0.2)


# Peaks of runs of a Hugging Face model of the size tiny, as above.
MEASURED_HF = {
    "batch 512": (410, {"batch_size": 512}),
    "micro-batches": (363, {"batch_size": 2048, "micro_batch": 256}),
    "bf16": (336, {"batch_size": 512, "precision": "bf16"}),
}


@pytest.fixture(scope="module")
def scenes() -> DataSplits:
    return open_splits(TrainConfig(data="scenes", method="sogclr", train_size=4096))


@pytest.mark.parametrize("run", MEASURED_HF)
def test_hugging_face_encoders_take_memory_of_their_own(run: str, scenes: DataSplits) -> None:
    measured, settings = MEASURED_HF[run]
    sizes = {"data": "scenes", "train_size": 4096, "model": "tiny"}
    config = TrainConfig(**(sizes | {"method": "sogclr", "backend": "torch"} | settings))
    plan = plan_run(config, get_backend("torch"), scenes)
    assert sum(part.num_bytes for part in plan.memory) / 1e6 == pytest.approx(measured, rel=0.1)


def test_each_rank_compares_all_pairs_of_a_super_batch() -> None:
    spec = ModelSpec("mlp", 8, 1, vocabulary_size=35, context_length=13, width=8, feature_dim=8)
    config = TrainConfig(
        data="scenes", method="jest", reference="runs/r", batch_size=1024, backend="torch", super_batch=4
    )
    backend = get_backend("torch")
    four, eight = (
        dict(memory_of_run(config, spec, backend, num_pairs=8192, num_images=0, num_ranks=size))["super-batch"]
        for size in (4, 8)
    )
    # Twice as many ranks do not halve the similarities of the 4,096 pairs, which are most of this part.
    assert 0.9 * four < eight
