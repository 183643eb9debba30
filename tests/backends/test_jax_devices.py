"""drrho_jax on 1, 2 and 4 devices trains as on one device: inside shard_map and pmap, and over a mesh.

JAX counts its devices once per process, so one program with four CPU devices runs all trainings.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import jax_devices
from helpers.jax_devices import CASES, Case

pytest.importorskip("jax")
pytest.importorskip("optax")


@pytest.fixture(scope="module")
def differences() -> dict[str, float]:
    """How far each training is from the training on one device in float64."""
    paths = [str(Path(jax_devices.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    command = [sys.executable, "-W", "error", "-m", "helpers.jax_devices"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=1500, env=environment)
    assert done.returncode == 0, done.stderr
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


@pytest.mark.parametrize("case", [case for case in CASES if case.dtype == "float64"], ids=lambda case: case.name)
def test_devices_together_train_as_one_device(differences: dict[str, float], case: Case) -> None:
    assert differences[case.name] <= 1e-10


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_narrow_types_are_as_far_from_float64_as_on_one_device(differences: dict[str, float], dtype: str) -> None:
    one, four = (differences[Case(n, dtype=dtype, options="reference").name] for n in (1, 4))
    assert 0 < four <= 2 * one
