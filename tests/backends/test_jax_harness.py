"""The harness on JAX trains the same model on one device, on several devices of a process, and in two processes."""

from __future__ import annotations

import json
import signal
import subprocess
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from safetensors.numpy import load_file

from drrho_clip.cli import main
from helpers.jax_harness import KILLED, NUM_PROCESSES, SMALL
from helpers.jax_programs import start
from helpers.ports import free_port
from helpers.small_pairs import write_two_colours

pytest.importorskip("jax")

PROGRAM = "helpers.jax_harness"


class Ended(NamedTuple):
    """The end of a program: its exit code, its output, and the lines of its errors."""

    code: int
    output: str
    errors: list[str]


def finish(*programs: subprocess.Popen[str]) -> list[Ended]:
    """Wait for programs that run at the same time."""
    try:
        printed = [program.communicate(timeout=600) for program in programs]
    finally:
        for program in programs:
            program.kill()
    codes = [program.returncode for program in programs]
    return [Ended(code, output, errors.splitlines()) for code, (output, errors) in zip(codes, printed, strict=True)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of all runs."""
    folder = tmp_path_factory.mktemp("runs")
    write_two_colours(folder / "data", 60, swapped_fraction=0.1)
    return folder


@pytest.fixture(scope="module")
def ended(folder: Path) -> list[Ended]:
    """The ends of two processes that train, then the runs of one process with four devices."""
    port = free_port()
    ended = finish(*(start(PROGRAM, folder, port, number) for number in range(NUM_PROCESSES)))
    (devices,) = finish(start(PROGRAM, folder))
    assert devices.code == 0, [*ended, devices]
    return ended


def by_two_processes(*words: object) -> list[Ended]:
    """Run a command with two processes that the options connect."""
    place = "--coordinator", f"127.0.0.1:{free_port()}", "--processes", NUM_PROCESSES, "--process"
    return finish(*(start(PROGRAM, "command", *words, *place, number) for number in range(NUM_PROCESSES)))


@pytest.mark.parametrize(
    "run",
    ["processes/reference", "processes/steered", "devices/steered", "processes/resumed"],
    ids=["two processes", "two processes in a ring", "four devices of one process", "resumed with four devices"],
)
@pytest.mark.usefixtures("ended")
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


def test_a_killed_process_is_named_and_its_run_goes_on_to_equal_bits(folder: Path, ended: list[Ended]) -> None:
    # The processes print nothing else, and nothing of their libraries.
    line = "drrho: rank 1 of 2 ended without a word (killed?); the run stops; --resume continues from step 4"
    assert ended == [Ended(2, "", [line]), Ended(-signal.SIGKILL, "", [])]
    killed, whole = folder / "processes" / KILLED, folder / "processes" / "steered"
    first, second = by_two_processes("train", "--resume", "--out", killed)
    assert (first.code, second) == (0, Ended(0, "", [])), first
    found, expected = (load_file(run / "checkpoint.safetensors") for run in (killed, whole))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)
    logs = [(run / "metrics.jsonl").read_text() for run in (killed, whole)]
    assert logs[0] == logs[1]


@pytest.mark.usefixtures("ended")
def test_two_processes_encode_and_measure_as_one_process(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = folder / "processes" / "steered"

    def commands(out: Path) -> list[list[str]]:
        data = str(folder / "data" / "pairs.csv")
        return [
            ["encode", "--model", str(run), "--data", data, "--batch-size", "16", "--out", str(out / "cache")],
            ["evaluate", str(run), "--json", str(out / "figures.json")],
        ]

    for words, words_of_one in zip(commands(tmp_path / "2"), commands(tmp_path / "1"), strict=True):
        first, second = by_two_processes(*words)
        assert (first.code, second) == (0, Ended(0, "", [])), first
        # NumPy needs no time to compile.
        assert main([*words_of_one, "--backend", "numpy"]) == 0
    assert "R@1" in first.output
    assert "R@1" in capsys.readouterr().out
    for name in ("image", "text", "ids"):
        mine, theirs = (np.load(tmp_path / size / "cache" / f"{name}.npy") for size in "21")
        np.testing.assert_allclose(mine, theirs, rtol=1e-6, atol=1e-6)
    figures = [json.loads((tmp_path / size / "figures.json").read_text())[0]["metrics"] for size in "21"]
    assert figures[0] == pytest.approx(figures[1], rel=1e-9)
