"""Run sections in separate processes with time limits; a section that fails does not affect other sections.

A process reports to its parent over a pipe, with one JSON object per line:

    {"absent": "why there is nothing to measure"}      {"progress": {...}}: kept if the case is cut off
    {"begin": 3}: the case's number                    {"row": {...}}: the case is done

An exception, a signal or a time limit becomes the row of the case that was being measured. The later cases get a fresh
process.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import queue
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.packages import ROOT
from benchmarks.gpu.plan import Case, Section

START_SECONDS, ENDING_SECONDS = 120.0, 3.0
"""Time limits in seconds: for importing the library and finding the device, and for the end of a process."""

Row = dict[str, Any]
"""The entries of a case, and "section", "part", "status", and either a "reason" or figures."""

OK, FAILED, ABSENT, LEFT_OUT, NO_MEMORY, NO_TIME = "ok", "failed", "absent", "left out", "out of memory", "out of time"
Command = Callable[[Section, Sequence[Case], int], list[str]]
"""Makes the command line of a process that measures cases of a section and reports to a file descriptor."""

Report = Callable[[str, Any], None]
"""Sends a kind of message and its content to the parent process."""


class Results:
    """All rows so far. They are also in a file with one JSON object per line, and this file is complete at any time."""

    def __init__(self, path: Path, say: Callable[[Row], None] = lambda _: None) -> None:
        self.path, self.rows, self._say = path, list[Row](), say
        self.absent: dict[str, str] = {}
        self._lock = threading.Lock()
        path.parent.mkdir(parents=True, exist_ok=True)
        self._write()

    def add(self, row: Row) -> None:
        """Keep a row and write it to disk at once."""
        with self._lock:
            self.rows.append(row)
            self._write()
            self._say(row)

    def _write(self) -> None:
        write(self.path, "".join(json.dumps(row) + "\n" for row in self.rows))


def write(path: Path, text: str) -> None:
    """Replace a file in one step."""
    replacement = path.with_name(f".{path.name}.new")
    with replacement.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    replacement.replace(path)


def rounded(value: float) -> float | None:
    """Return a number with four significant digits; None instead of nan, which JSON does not have."""
    value = float(value)
    return float(f"{value:.4g}") if math.isfinite(value) else None


def run_group(
    sections: Sequence[Section],
    results: Results,
    *,
    command: Command,
    environment: Mapping[str, str],
    deadline: float,
) -> None:
    """Run sections at the same time and return when all have ended, at the latest at the deadline."""
    threads = [
        threading.Thread(target=run_section, args=(section, results, command, environment, deadline), daemon=True)
        for section in sections
    ]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            thread.join()
    # If this program is stopped, its child processes must not stay behind.
    except BaseException:
        for process in list(_RUNNING):
            _kill(process)
        raise


_RUNNING: set[subprocess.Popen[bytes]] = set()


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End a process and its children: all are in one process group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def run_section(
    section: Section, results: Results, command: Command, environment: Mapping[str, str], deadline: float
) -> None:
    """Measure the cases of a section; every case becomes a row."""
    named = {"section": section.name, "part": section.part}
    if section.needs in results.absent:
        results.add({**named, "status": ABSENT, "reason": results.absent[str(section.needs)]})
        return
    # Each attempt is one process. If a case ends this process, the next attempt starts with the next case.
    left = list(section.cases)
    while left:
        if time.monotonic() >= deadline:
            for case in left:
                results.add({**named, **case, "status": NO_TIME, "reason": "not begun: the section's time was over"})
            return
        try:
            done = _Attempt(section, left, results, command, environment, deadline).run()
        # For example, the system may refuse to start another process.
        except Exception as error:
            results.add({**named, "status": FAILED, "reason": f"{type(error).__name__}: {error}"})
            return
        if done is None:
            return
        left = left[done:]


class _Attempt:
    """One process, from its start to its end."""

    def __init__(
        self,
        section: Section,
        cases: Sequence[Case],
        results: Results,
        command: Command,
        environment: Mapping[str, str],
        deadline: float,
    ) -> None:
        self.section, self.cases, self.results, self.deadline = section, cases, results, deadline
        self.named = {"section": section.name, "part": section.part}
        # The number of the case that is being measured, and how many cases have a row.
        self.current: int | None = None
        self.done = 0
        # Figures that a case reported before its end: they go into its row if the case is cut off.
        self.partial: Row = {}
        self.output = tempfile.TemporaryFile()  # noqa: SIM115  (`run` closes it)
        reading, writing = os.pipe()
        try:
            self.process = subprocess.Popen(
                command(section, cases, writing),
                cwd=ROOT,
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=self.output,
                stderr=self.output,
                pass_fds=[writing],
                start_new_session=True,  # a process group of its own, so that `_kill` reaches its children
            )
        except BaseException:
            os.close(reading)
            self.output.close()
            raise
        finally:
            os.close(writing)
        _RUNNING.add(self.process)
        # A thread reads the pipe, because waiting for a line must have a time limit.
        self.lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, args=(reading,), daemon=True).start()

    def _read(self, reading: int) -> None:
        with os.fdopen(reading, encoding="utf-8") as pipe:
            for line in pipe:
                self.lines.put(line)
        self.lines.put(None)

    def run(self) -> int | None:
        """Return the number of cases that have a row, or None if the section is over."""
        limit, allowed = time.monotonic() + START_SECONDS, START_SECONDS
        try:
            while True:
                until = min(limit, self.deadline)
                try:
                    line = self.lines.get(timeout=max(0.0, until - time.monotonic()))
                except queue.Empty:
                    return self._cut_off(allowed)
                if line is None:
                    return self._ended()
                try:
                    message = json.loads(line)
                # The process died while it wrote this line.
                except ValueError:
                    continue
                if "absent" in message:
                    self._absent(str(message["absent"]))
                    return None
                if "begin" in message:
                    self.current, self.partial = int(message["begin"]), {}
                    # The time limit for starting is over, and the time limit of this case begins.
                    allowed = self.section.case_seconds
                    limit = time.monotonic() + allowed
                elif "progress" in message:
                    self.partial = message["progress"]
                elif "row" in message:
                    self._add(message["row"])
                    if self.done == len(self.cases):
                        limit = time.monotonic() + ENDING_SECONDS
        finally:
            _kill(self.process)
            self.process.wait()
            _RUNNING.discard(self.process)
            self.output.close()

    def _add(self, row: Row) -> None:
        place = self.done if self.current is None else self.current
        self.results.add({**self.named, **self.cases[place], **row})
        self.current, self.done = None, place + 1

    def _absent(self, reason: str) -> None:
        if self.section.needs is not None:
            self.results.absent[self.section.needs] = reason
        self.results.add({**self.named, "status": ABSENT, "reason": reason})

    def _cut_off(self, allowed: float) -> int:
        if self.current is None and self.done == len(self.cases):
            return self.done
        over = time.monotonic() >= self.deadline
        took = "the section's time was over" if over else f"it took longer than {allowed:.0f} s"
        self._add({**self.partial, "status": NO_TIME, "reason": took, "output": self._tail()})
        return self.done

    def _ended(self) -> int | None:
        # A library may hang at the end of its process.
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(ENDING_SECONDS)
        if self.current is None and self.done == len(self.cases):
            return self.done
        _kill(self.process)
        code = self.process.wait()
        # The worker ends with exit code 0 after an error that makes its device unusable.
        if self.current is None and code == 0 and self.done > 0:
            return self.done
        how = f"ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        tail = self._tail()
        reason = f"{how}: {tail.splitlines()[-1]}" if tail else how
        # If a process could not start, the next process could not start either, so all cases fail.
        if self.current is None and self.done == 0:
            for _ in self.cases:
                self._add({"status": FAILED, "reason": reason, "output": tail})
            return None
        self._add({**self.partial, "status": FAILED, "reason": reason, "output": tail})
        return self.done

    def _tail(self, lines: int = 25) -> str:
        """Return the last lines that the process has printed."""
        self.output.seek(0)
        text = self.output.read().decode(errors="replace")
        return "\n".join([line for line in text.splitlines() if line.strip()][-lines:])
