"""Several processes train as one process does: weights, estimates, temperatures and logged losses are the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from helpers import clip_processes
from helpers.clip_processes import CASES, launch, log_of, prepare, run_case, state_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the data, and the runs of all cases with one process."""
    folder = tmp_path_factory.mktemp("processes")
    prepare(folder)
    for name, case in CASES.items():
        run_case(folder, name, case, folder / "runs-1")
    return folder


@pytest.fixture(scope="module")
def runs(folder: Path) -> Path:
    """The runs of all cases with two processes, which are started once."""
    return launch(folder, 2, CASES)


@pytest.mark.parametrize("name", CASES)
def test_two_processes_train_as_one_process(folder: Path, runs: Path, name: str) -> None:
    assert not list(runs.glob(f"{name}-*.error")), [path.read_text() for path in runs.glob(f"{name}-*.error")]
    half = "precision" in CASES[name]
    assert_same_run(folder / "runs-1" / name, runs / name, rtol=5e-2 if half else 1e-10, atol=5e-2 if half else 1e-10)


def assert_same_run(alone: Path, shared: Path, *, rtol: float, atol: float) -> None:
    """Assert that two runs have the same arrays and the same log."""
    expected, found = state_of(alone), state_of(shared)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_allclose(found[key], value, rtol=rtol, atol=atol, err_msg=key)
    lines = log_of(alone), log_of(shared)
    assert len(lines[0]) == len(lines[1]) >= clip_processes.SMALL["epochs"]
    for line, other in zip(*lines, strict=True):
        assert other == pytest.approx(line, rel=rtol, abs=atol, nan_ok=True)
