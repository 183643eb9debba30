"""The harness on JAX trains the same model on one device, on several devices of a process, and in two processes."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from helpers.failing_ranks import free_port
from helpers.jax_harness import NUM_PROCESSES, SMALL
from helpers.jax_programs import start
from helpers.small_pairs import write_two_colours

pytest.importorskip("jax")

PROGRAM = "helpers.jax_harness"


def finish(*programs: subprocess.Popen[str]) -> list[str]:
    """Wait for programs, and return what they have printed."""
    try:
        printed = ["".join(program.communicate(timeout=600)) for program in programs]
    finally:
        for program in programs:
            program.kill()
    assert [program.returncode for program in programs] == [0] * len(programs), printed
    return printed


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of all runs: two processes train, then one process with four devices."""
    folder = tmp_path_factory.mktemp("runs")
    write_two_colours(folder / "data", 60, swapped_fraction=0.1)
    port = free_port()
    printed = finish(*(start(PROGRAM, folder, port, number) for number in range(NUM_PROCESSES)))
    (folder / "printed.json").write_text(json.dumps(printed))
    finish(start(PROGRAM, folder))
    return folder


@pytest.mark.parametrize(
    "run",
    ["processes/reference", "processes/steered", "devices/steered", "processes/resumed"],
    ids=["two processes", "two processes in a ring", "four devices of one process", "resumed with four devices"],
)
def test_several_devices_train_as_one_device(folder: Path, run: str) -> None:
    alone, shared = folder / "alone" / Path(run).name, folder / run
    expected, found = (load_file(path / "checkpoint.safetensors") for path in (alone, shared))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-10, atol=1e-12, err_msg=name)
    lines, others = ((path / "metrics.jsonl").read_text().splitlines() for path in (alone, shared))
    assert len(others) == len(lines) > SMALL["epochs"]
    for line, other in zip(map(json.loads, lines), map(json.loads, others), strict=True):
        assert other == pytest.approx(line, rel=1e-10, abs=1e-12, nan_ok=True)


def test_processes_print_nothing_of_their_libraries(folder: Path) -> None:
    assert json.loads((folder / "printed.json").read_text()) == [""] * NUM_PROCESSES
