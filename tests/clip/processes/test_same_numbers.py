"""Several processes train as one process does: weights, estimates, temperatures and logged losses are the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from drrho_clip.data.splits import open_splits
from drrho_clip.plan.options import PlanOptions
from drrho_clip.plan.run import plan_run
from drrho_core.backend import get_backend
from helpers import clip_processes
from helpers.clip_processes import (
    CASES,
    CHAIN,
    IN_FULL,
    STOPS,
    config_of,
    jobs_of,
    launch,
    link_of_chain,
    log_of,
    messages_of,
    prepare,
    run_job,
    state_of,
)

FEW = {name: CASES[name] for name in ("drrho", "jest-topk", "siblings", "split per sample")}
"""Cases of the launches with more than two processes."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the data, and the runs of all cases with one process and with several processes.

    The processes of a number of processes are started as few times as the chains permit.
    """
    folder = tmp_path_factory.mktemp("processes")
    prepare(folder)
    (folder / "chain").mkdir()
    for job in jobs_of(1, CASES | CHAIN | IN_FULL):
        run_job(folder, job)
    whole = {2: jobs_of(2, CASES), 3: jobs_of(3, FEW), 4: jobs_of(4, FEW)}
    for number, (size, _) in enumerate(STOPS):
        if size > 1:
            launch(folder, size, [*link_of_chain(number), *whole.pop(size, [])])
            continue
        for job in link_of_chain(number):
            run_job(folder, job)
    return folder


def _check_no_error(out: Path, name: str) -> None:
    assert [path.read_text() for path in sorted(out.glob(f"{name}-*.error"))] == []


@pytest.mark.parametrize("name", [name for name in CASES if name != "bf16"])
def test_two_processes_train_as_one_process(folder: Path, name: str) -> None:
    _check_no_error(folder / "2", name)
    half = "precision" in CASES[name]
    assert_same_run(folder / "1" / name, folder / "2" / name, tolerance=5e-2 if half else 1e-10)


def test_in_bfloat16_two_processes_are_as_far_from_the_full_precision_as_one(folder: Path) -> None:
    _check_no_error(folder / "2", "bf16")
    exact, alone, shared = (state_of(folder / run) for run in ("1/bf16 in full", "1/bf16", "2/bf16"))
    assert exact.keys() == alone.keys() == shared.keys()
    assert len(log_of(folder / "2" / "bf16")) == len(log_of(folder / "1" / "bf16"))
    # How bfloat16 rounds depends on the size of a batch and on the processor; how much it rounds does not.
    errors = [_errors(state, exact) for state in (alone, shared)]
    assert 0 < errors[1] < 2 * errors[0]


def _errors(state: dict[str, np.ndarray], exact: dict[str, np.ndarray]) -> float:
    """Return the root mean square, over all arrays, of the error relative to the size of the array."""
    squares = []
    for key, value in exact.items():
        # A sample that was never visited has minus infinity.
        seen = np.isfinite(value)
        assert np.array_equal(np.isfinite(state[key]), seen), key
        size = np.linalg.norm(value[seen])
        if size > 0:
            squares.append((np.linalg.norm(state[key][seen] - value[seen]) / size) ** 2)
    return float(np.sqrt(np.mean(squares)))


@pytest.mark.parametrize("size", [3, 4])
@pytest.mark.parametrize("name", FEW)
def test_three_and_four_processes_train_as_one_process(folder: Path, name: str, size: int) -> None:
    _check_no_error(folder / str(size), name)
    assert_same_run(folder / "1" / name, folder / str(size) / name, tolerance=1e-10)


@pytest.mark.parametrize("name", CHAIN)
def test_a_run_that_other_numbers_of_processes_continue_is_the_run_of_one_process(folder: Path, name: str) -> None:
    _check_no_error(folder / "chain", name)
    assert_same_run(folder / "1" / name, folder / "chain" / name, tolerance=1e-10)
    # The files of inner estimates that earlier parts of the chain have used are gone.
    assert sorted((folder / "chain" / name).glob("estimator*.bin")) == []


@pytest.mark.parametrize("name", CASES)
def test_each_process_receives_exactly_the_planned_bytes(folder: Path, name: str) -> None:
    config = config_of(folder, CASES[name])
    options = PlanOptions(world_size=2, bandwidth=1.0)
    plan = plan_run(config, get_backend("torch", dtype=config.dtype), open_splits(config), options=options)
    assert plan.ranks is not None
    num_steps = log_of(folder / "2" / name)[-1]["step"]
    expected: dict[str, list[float]] = {}
    for message in plan.ranks.forms[config.form].exchanges:
        entry = expected.setdefault(message.operation, [0, 0.0])
        entry[0] += message.times * num_steps
        entry[1] += message.received(2) * num_steps
    for rank in range(2):
        assert messages_of(folder / "2", name, rank) == expected


def assert_same_run(alone: Path, shared: Path, *, tolerance: float) -> None:
    """Assert that two runs have the same arrays, the same log and the same results."""
    expected, found = state_of(alone), state_of(shared)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_allclose(found[key], value, rtol=tolerance, atol=tolerance, err_msg=key)
    # The line of an unreadable image is written when the image is met, which may be some steps earlier.
    logs = [log_of(run) for run in (alone, shared)]
    unreadable = [{line["unreadable"] for line in log if "unreadable" in line} for log in logs]
    assert unreadable[0] == unreadable[1]
    lines = [[line for line in log if "unreadable" not in line] for log in logs]
    assert len(lines[0]) == len(lines[1]) >= clip_processes.SMALL["epochs"]
    for line, other in zip(*lines, strict=True):
        assert other == pytest.approx(line, rel=tolerance, abs=tolerance, nan_ok=True)
