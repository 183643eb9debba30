"""Real processes under the watch: whichever fails, all others stop, name it in one line, and exit with 2."""

from __future__ import annotations

import signal
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from drrho_clip.processes.one import OneProcess
from drrho_clip.processes.watched import WatchedProcesses
from drrho_core.backend import get_backend
from helpers.watched_process import Ended, Group

LINE = "drrho: rank {} of 3 {}; the run stops"
KILLED = "ended without a word (killed?)"


@pytest.mark.parametrize("failed", [0, 2])
def test_a_killed_process_is_named_by_all_others(failed: int) -> None:
    with Group(3) as group:
        group.tell(0, "saved 120")
        group.tell_all("step")
        # One process waits where no signal and no exception reaches it.
        group.tell(1, "stuck")
        group.send(failed, signal.SIGKILL)
        ended = group.ends()
    assert ended.pop(failed) == Ended(-signal.SIGKILL, [])
    line = LINE.format(failed, KILLED)
    hints = ["; --resume continues from step 120"] if failed == 2 else ["", "; --resume continues from step 120"]
    for end in ended.values():
        assert end.code == 2
        (text,) = end.lines
        # Rank 0 may have died before its last message, which has the step.
        assert text in [line + hint for hint in hints]


def test_bad_input_of_a_process_is_printed_there_and_named_by_the_others() -> None:
    with Group(3) as group:
        group.tell(2, "stuck")
        group.tell(1, "fail batch_size must be 8, got 7", answered=False)
        ended = group.ends()
    named = Ended(2, [LINE.format(1, "failed: batch_size must be 8, got 7")])
    assert ended == {0: named, 1: Ended(2, ["drrho: batch_size must be 8, got 7"]), 2: named}


def test_a_mistake_of_ours_keeps_its_traceback_on_its_own_process() -> None:
    with Group(2) as group:
        group.tell(0, "mistake", answered=False)
        ended = group.ends()
    assert ended[0].code == 1
    assert (ended[0].lines[0], ended[0].lines[-1]) == (
        "Traceback (most recent call last):",
        "TypeError: a mistake of ours",
    )
    line = "drrho: rank 0 of 2 failed: TypeError: a mistake of ours; the run stops"
    assert ended[1] == Ended(2, [line])


@pytest.mark.parametrize("error", ["TypeError: a mistake of ours", "RuntimeError: sizes must match"])
def test_a_mistake_of_one_process_in_work_of_all_is_named_by_all_others(error: str) -> None:
    with Group(3, grace=1000.0) as group:
        for rank, words in enumerate(("together", "together", f"together {error.partition(':')[0]}")):
            group.tell(rank, words, answered=False)
        group.exchange()
        ended = group.ends()
    line = LINE.format(2, f"failed: {error}")
    assert (ended[0], ended[1]) == (Ended(2, [line]), Ended(2, [line]))
    assert (ended[2].code, ended[2].lines[0], ended[2].lines[-1]) == (1, "Traceback (most recent call last):", error)


def test_a_mistake_keeps_its_traceback_if_another_process_has_failed_before() -> None:
    with Group(2, grace=1000.0) as group:
        group.tell(0, "fail data must be a table, got none", answered=False)
        group.tell(1, "mistake", answered=False)
        ended = group.ends()
    assert "TypeError: a mistake of ours" in ended[1].lines


def test_an_error_that_all_processes_meet_is_printed_once() -> None:
    with Group(3) as group:
        for rank in (2, 0, 1):
            group.tell(rank, "fail data must be a table, got none", answered=False)
        ended = group.ends()
    assert [end.code for end in ended.values()] == [2, 2, 2]
    assert [line for end in ended.values() for line in end.lines] == ["drrho: data must be a table, got none"]


@pytest.mark.parametrize("lost", ["lost", "reset"])
@pytest.mark.parametrize("failed", [0, 1])
def test_a_failed_exchange_does_not_hide_the_killed_process(failed: int, lost: str) -> None:
    with Group(3, grace=1000.0) as group:
        # The exchanges of the others fail before anyone knows the reason.
        others = [rank for rank in range(3) if rank != failed]
        for rank in others:
            group.tell(rank, lost, answered=False)
        group.send(failed, signal.SIGKILL)
        ended = group.ends()
    assert [ended[rank] for rank in others] == [Ended(2, [LINE.format(failed, KILLED)])] * 2


@pytest.mark.parametrize(
    ("number", "word", "code"), [(signal.SIGINT, "interrupted", 130), (signal.SIGTERM, "terminated", 143)]
)
@pytest.mark.parametrize("stuck", [False, True], ids=["in Python", "inside a library"])
def test_a_signal_ends_all_processes(number: signal.Signals, word: str, code: int, stuck: bool) -> None:
    with Group(2) as group:
        group.tell_all("step")
        group.tell(0, "saved 3")
        if stuck:
            group.tell(1, "stuck")
        group.send(1, number)
        ended = group.ends()
    assert ended == {
        0: Ended(2, [f"drrho: rank 1 of 2 was {word}; the run stops; --resume continues from step 3"]),
        1: Ended(code, [f"drrho: {word}; --resume continues from step 3"]),
    }


def test_a_process_that_hangs_is_named_with_the_line_that_it_executes() -> None:
    with Group(3, hang=1.0) as group:
        group.tell_all("step")
        # The others wait in the next exchange, and rank 1 never begins it.
        for rank in (0, 2):
            group.tell(rank, "exchange")
        ended = group.ends()
    # The hanging process can be ended as well: only its main thread hangs.
    assert [end.code for end in ended.values()] == [2, 2, 2]
    (line,) = {line for end in ended.values() for line in end.lines}
    assert line.startswith("drrho: rank 1 of 3 hangs: no progress for 1 s (--rank-timeout), watched_process.py:")
    assert "(run), process " in line


def test_work_of_one_process_is_named_if_it_hangs() -> None:
    with Group(2, hang=1.0) as group:
        group.tell_all("step")
        group.tell(0, "alone writing a checkpoint")
        group.tell(1, "exchange")
        ended = group.ends()
    (line,) = {line for end in ended.values() for line in end.lines}
    assert line.startswith("drrho: rank 0 of 2 hangs: no progress for 1 s (--rank-timeout), writing a checkpoint, ")


@pytest.mark.parametrize("stopped", [0, 1])
def test_a_stopped_process_is_named(stopped: int) -> None:
    with Group(3, silence=1.0) as group:
        group.tell_all("step")
        group.send(stopped, signal.SIGSTOP)
        others = [rank for rank in range(3) if rank != stopped]
        ended = group.ends(others)
        # When the process goes on, it ends too.
        group.send(stopped, signal.SIGCONT)
        ended |= group.ends([stopped])
    for rank in others:
        assert ended[rank].code == 2
        (line,) = ended[rank].lines
        assert line.startswith(f"drrho: rank {stopped} of 3 gave no sign of life for 1 s (stopped, or the machine is")
    assert ended[stopped].code == 2


def test_temporary_folders_are_removed_by_a_process_that_another_has_ended(tmp_path: Path) -> None:
    with Group(2) as group:
        group.tell(0, f"folder {tmp_path}/trials")
        assert (tmp_path / "trials").is_dir()
        group.send(1, signal.SIGKILL)
        group.ends()
    assert not (tmp_path / "trials").exists()


def test_processes_wait_for_each_other_at_the_end() -> None:
    with Group(3, hang=1000.0) as group:
        group.tell_all("step")
        for rank in (0, 2):
            group.tell(rank, "end", answered=False)
        # Rank 1 still needs the others.
        group.tell(1, "exchange")
        group.tell(1, "end", answered=False)
        ended = group.ends()
    assert ended == dict.fromkeys(range(3), Ended(0, []))


def test_an_error_at_the_end_still_stops_the_waiting_processes() -> None:
    with Group(2) as group:
        group.tell(0, "end", answered=False)
        group.tell(1, "fail no space left", answered=False)
        ended = group.ends()
    assert ended == {
        0: Ended(2, ["drrho: rank 1 of 2 failed: no space left; the run stops"]),
        1: Ended(2, ["drrho: no space left"]),
    }


def test_an_exchange_of_values_is_over_when_they_are_received_and_a_step_may_go_on() -> None:
    counted: list[str] = []
    watch: Any = SimpleNamespace(
        **{name: partial(counted.append, name) for name in ("progress", "received", "alive", "stepped")}
    )
    processes = WatchedProcesses(OneProcess(get_backend("numpy")), watch)
    processes.gather(1)
    processes.gather_arrays(np.zeros(1))
    processes.barrier()
    assert counted == ["progress", "received"] * 3
    counted.clear()
    # The array library may return before its devices have exchanged anything.
    processes.all_rows(())
    with processes.exchanging():
        pass
    processes.compile(lambda: ())()
    assert counted == ["progress", "alive", "progress", "alive", "progress", "stepped"]
