"""The loops of docs/many-devices.md: many ranks train as one rank, and another number of ranks continues."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from drrho_core import InnerEstimator
from helpers.examples import EXAMPLES, load

PAIRS, STOP, STEPS = 256, 6, 10
LOOPS = EXAMPLES / "loops"


def start(words: list[Any], **environment: str) -> list[float]:
    """Run a loop as a program, and return the losses that it prints."""
    path = os.pathsep.join([str(LOOPS), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, *map(str, words)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **environment},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    losses: list[float] = json.loads(done.stdout)
    return losses


@pytest.mark.slow
def test_two_processes_of_the_torch_loop_train_as_one_and_one_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch = pytest.importorskip("torch")
    names = load("loops/ddp.py", monkeypatch)
    pairs, two, alone = (tmp_path / name for name in ("pairs.npz", "two", "alone"))
    sys.modules["pairs"].write_pairs(pairs, PAIRS)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2]
    shared = start([*torchrun, LOOPS / "ddp.py", pairs, two, STOP])
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        continued = names["main"](pairs, two, STEPS)
        expected = names["main"](pairs, alone, STEPS)
    finally:
        torch.distributed.destroy_process_group()
    assert (len(shared), len(continued)) == (STOP, STEPS - STOP)
    # The processes sum in another order, and AdamW enlarges rounding errors.
    np.testing.assert_allclose([*shared, *continued], expected, rtol=1e-4)
    # Each process has stored one half of the rows; the process that continued has stored all of them.
    assert [len(list((two / f"{step:06}").glob("inner-*"))) for step in (STOP, STEPS)] == [2, 1]


@pytest.mark.slow
def test_four_devices_of_the_jax_loop_train_as_one_and_one_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jax = pytest.importorskip("jax")
    pytest.importorskip("optax")
    names = load("loops/shard_map.py", monkeypatch)
    pairs, four, alone = (str(tmp_path / name) for name in ("pairs.npz", "four.npz", "alone.npz"))
    sys.modules["pairs"].write_pairs(pairs, PAIRS)
    devices = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    # Another test of this process may have switched 64-bit types on, which changes the random start.
    devices["JAX_ENABLE_X64"] = str(int(jax.config.jax_enable_x64))
    shared = start([LOOPS / "shard_map.py", pairs, four, STOP], **devices)
    # The processes of other tests see one device.
    assert names["mesh"].size == 1
    continued = names["main"](pairs, four, STEPS)
    expected = names["main"](pairs, alone, STEPS)
    assert (len(shared), len(continued)) == (STOP, STEPS - STOP)
    np.testing.assert_allclose([*shared, *continued], expected, rtol=1e-4)


def test_the_torch_loop_continues_the_checkpoint_of_the_largest_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch = pytest.importorskip("torch")
    names = load("loops/ddp.py", monkeypatch)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    model, estimator = torch.nn.Linear(1, 1), InnerEstimator(2, like=torch.zeros(1))
    optimizer = torch.optim.AdamW(model.parameters())
    # In the order of words the name with seven digits comes first.
    for step in (999_999, 1_000_000):
        names["save"](tmp_path, step, model, optimizer, estimator)
    assert names["load"](tmp_path, model, optimizer, estimator) == 1_000_000
