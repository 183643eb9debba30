"""Several processes train as one process does: weights, estimates, temperatures and logged losses are the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from helpers import clip_processes
from helpers.clip_processes import METHODS, launch, log_of, make_table, run_case, state_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a table, a reference run, and the runs of all cases with one process."""
    folder = tmp_path_factory.mktemp("processes")
    make_table(folder / "data")
    run_case(folder, "reference", {"method": "clip", "dtype": "float32", "seed": 7}, folder)
    for name, case in METHODS.items():
        run_case(folder, name, case, folder / "runs-1")
    return folder


@pytest.fixture(scope="module")
def runs(folder: Path) -> Path:
    """The runs of all cases with two processes, which are started once."""
    return launch(folder, 2, METHODS)


@pytest.mark.parametrize("name", METHODS)
def test_two_processes_train_as_one_process(folder: Path, runs: Path, name: str) -> None:
    assert_same_run(folder / "runs-1" / name, runs / name)


def assert_same_run(alone: Path, shared: Path) -> None:
    """Assert that two runs have the same arrays and the same log."""
    expected, found = state_of(alone), state_of(shared)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_allclose(found[key], value, rtol=1e-10, atol=1e-12, err_msg=key)
    lines = log_of(alone), log_of(shared)
    assert len(lines[0]) == len(lines[1]) > clip_processes.SMALL["epochs"]
    for line, other in zip(*lines, strict=True):
        assert other == pytest.approx(line, rel=1e-10, abs=1e-12, nan_ok=True)
