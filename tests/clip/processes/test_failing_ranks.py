"""Real training runs with two processes of torch, one of which fails; `helpers.failing_ranks` has more cases.

`test_watch.py` has all kinds of failures, with processes that start quickly. Here the array library fails as well,
because an exchange loses its partner.
"""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from helpers import failing_ranks
from helpers.failing_ranks import Result


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a table, and with a run that nothing has interrupted."""
    folder = tmp_path_factory.mktemp("failing")
    failing_ranks.prepare(folder, 2, "plain")
    return folder


def test_a_killed_process_of_a_run_is_named_and_the_run_goes_on_to_equal_numbers(folder: Path) -> None:
    result, resumed = failing_ranks.measure(folder, "killed", 2, "plain")
    line = "drrho: rank 1 of 2 ended without a word (killed?); the run stops; --resume continues from step 6"
    assert result._replace(seconds=None) == Result(None, [2, -signal.SIGKILL], [line])
    assert resumed == "equal"


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("data", "data.test must be the same on all processes, got "),
        ("disk", "cannot use {folder}/run/checkpoint.safetensors: No space left on device"),
    ],
)
def test_an_error_that_all_processes_know_is_printed_once(folder: Path, case: str, message: str) -> None:
    result = failing_ranks.fail(folder, case, 2, "plain")
    assert result.codes == [2, 2]
    (line,) = result.lines
    assert line.startswith(f"drrho: {message}".format(folder=folder))
    # Differences are found before anything is written.
    assert (folder / "run").exists() == (case == "disk")
