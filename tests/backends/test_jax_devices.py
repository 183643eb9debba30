"""drrho_jax on 1 to 4 devices trains as on one device: inside shard_map and pmap, over a mesh, in two processes.

JAX counts its devices once per process. So one program with four CPU devices runs all trainings in one process, and one
pair of programs, with two devices each, runs all trainings in two processes.
"""

from __future__ import annotations

import json
import subprocess
from typing import Any

import pytest

from drrho_clip.plan.traffic import SharedStep, messages
from helpers.jax_checkpoints import NUM_SAMPLES, RESTORING
from helpers.jax_collectives import REFERENCE_WIDTH, ROWS, WIDTH
from helpers.jax_devices import CASES, FORMS, NUM_DEVICES, NUM_PROCESSES, PROCESS_CASES, Case
from helpers.jax_programs import start
from helpers.ports import free_port

pytest.importorskip("jax")
pytest.importorskip("optax")
pytest.importorskip("orbax.checkpoint")

PROGRAM = "helpers.jax_devices"


def figures_of(program: subprocess.Popen[str]) -> dict[str, Any]:
    """Return what a program has printed: how far each training is from that on one device in float64."""
    try:
        output, errors = program.communicate(timeout=600)
    finally:
        program.kill()
    assert program.returncode == 0, errors
    figures: dict[str, Any] = json.loads(output.splitlines()[-1])
    return figures


@pytest.fixture(scope="module")
def differences() -> dict[str, Any]:
    """The figures of one process with four devices."""
    return figures_of(start(PROGRAM))


@pytest.fixture(scope="module")
def differences_of_processes() -> list[dict[str, Any]]:
    """The figures of two processes with two devices each."""
    port = free_port()
    programs = [start(PROGRAM, port, number) for number in range(NUM_PROCESSES)]
    try:
        return [figures_of(program) for program in programs]
    finally:
        for program in programs:
            program.kill()


@pytest.mark.parametrize("case", [case for case in CASES if case.dtype == "float64"], ids=lambda case: case.name)
def test_devices_together_train_as_one_device(differences: dict[str, Any], case: Case) -> None:
    assert differences[case.name] <= 1e-10


@pytest.mark.parametrize("case", PROCESS_CASES, ids=lambda case: case.name)
def test_processes_together_train_as_one_device(differences_of_processes: list[dict[str, Any]], case: Case) -> None:
    for differences in differences_of_processes:
        assert differences[case.name] <= 1e-10


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_narrow_types_are_as_far_from_float64_as_on_one_device(differences: dict[str, Any], dtype: str) -> None:
    one, four = (differences[Case(n, dtype=dtype, options="reference").name] for n in (1, 4))
    assert 0 < four <= 2 * one


@pytest.mark.parametrize("form", FORMS)
def test_a_compiled_step_sends_the_bytes_of_the_formula(differences: dict[str, Any], form: str) -> None:
    step = SharedStep(
        num_ranks=NUM_DEVICES,
        num_local=ROWS,
        feature_dim=WIDTH,
        reference_dim=REFERENCE_WIDTH,
        per_anchor=True,
        checked=False,
        estimates="all",
        form=form,
    )
    small = "checks and scalars"
    expected = sum(message.received(NUM_DEVICES) for message in messages(step) if message.purpose != small)
    assert differences["traffic"][form]["of_pairs"] == expected
    # A few numbers for each device, such as the largest temperature, do not grow with the batch.
    assert 0 < differences["traffic"][form]["of_others"] < 100


def test_micro_batches_sum_the_gradient_over_devices_once(differences: dict[str, Any]) -> None:
    figures = differences["micro-batches"]
    assert figures["difference"] <= 1e-12
    assert figures["of_gradient"] == figures["of_whole_gradient"] == figures["expected"]


def test_the_ring_needs_less_memory(differences: dict[str, Any]) -> None:
    memory = {form: differences["traffic"][form]["memory"] for form in FORMS}
    # With four devices the ring keeps a quarter of the rows of texts at a time.
    assert 0 < 2 * memory["ring"] < memory["reduce"]


@pytest.mark.parametrize("num_devices", RESTORING)
def test_a_divided_state_is_restored_by_other_numbers_of_devices(differences: dict[str, Any], num_devices: int) -> None:
    assert differences["restored"][str(num_devices)] == [True, NUM_SAMPLES // num_devices]
