"""Sections in processes of their own, each with its own time; what happens to one happens to no other.

A process tells its parent over a pipe what it begins and what it has found, one JSON object a line:

    {"absent": "why there is nothing to measure"}      {"progress": {...}}: kept if the case is cut off
    {"begin": 3}: the case's number                    {"row": {...}}: the case is done

Whatever else happens, an exception, a signal, a time limit, becomes the row of the case that was being measured; the
cases after it get a fresh process.
"""

from __future__ import annotations

import contextlib
import json
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
"""A process may take so long to import its library and find its device, and to end."""

Row = dict[str, Any]
"""A case with "section", "part", "status", and "reason" or figures."""

OK, FAILED, ABSENT, LEFT_OUT, NO_MEMORY, NO_TIME = "ok", "failed", "absent", "left out", "out of memory", "out of time"
Command = Callable[[Section, Sequence[Case], int], list[str]]
"""Makes the command line of a process for some cases of a section, which reports to a file descriptor."""


class Results:
    """All rows so far, in a file that is whole at any time: one JSON object a line."""

    def __init__(self, path: Path, say: Callable[[Row], None] = lambda _: None) -> None:
        self.path, self.rows, self._say = path, list[Row](), say
        self.absent: dict[str, str] = {}
        self._lock = threading.Lock()
        path.parent.mkdir(parents=True, exist_ok=True)
        self._write()

    def add(self, row: Row) -> None:
        """Keep a row, on disk before anything else happens."""
        with self._lock:
            self.rows.append(row)
            self._write()
            self._say(row)

    def _write(self) -> None:
        write(self.path, "".join(json.dumps(row) + "\n" for row in self.rows))


def write(path: Path, text: str) -> None:
    """Replace a file in one step."""
    beside = path.with_name(f".{path.name}.new")
    with beside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)


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
    except BaseException:  # somebody ends this program: what it has started ends, too
        for process in list(_RUNNING):
            _kill(process)
        raise


_RUNNING: set[subprocess.Popen[bytes]] = set()


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End a process and whatever it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def run_section(
    section: Section, results: Results, command: Command, environment: Mapping[str, str], deadline: float
) -> None:
    """Measure a section's cases; every one of them becomes a row."""
    named = {"section": section.name, "part": section.part}
    if section.needs in results.absent:
        results.add({**named, "status": ABSENT, "reason": results.absent[str(section.needs)]})
        return
    left = list(section.cases)
    while left:
        if time.monotonic() >= deadline:
            for case in left:
                results.add({**named, **case, "status": NO_TIME, "reason": "not begun: the section's time was over"})
            return
        try:
            done = _Attempt(section, left, results, command, environment, deadline).run()
        except Exception as error:  # no process can be had, say
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
        self.current: int | None = None  # the case that is being measured
        self.done = 0  # how many cases have their row
        self.partial: Row = {}
        self.output = tempfile.TemporaryFile()  # noqa: SIM115  (closed where the process ends)
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
                start_new_session=True,  # so that its own children end with it
            )
        except BaseException:
            os.close(reading)
            self.output.close()
            raise
        finally:
            os.close(writing)
        _RUNNING.add(self.process)
        self.lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, args=(reading,), daemon=True).start()

    def _read(self, reading: int) -> None:
        with os.fdopen(reading, encoding="utf-8") as pipe:
            for line in pipe:
                self.lines.put(line)
        self.lines.put(None)

    def run(self) -> int | None:
        """Return how many cases are done with, or None where the section is over."""
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
                except ValueError:  # it died with half a line
                    continue
                if "absent" in message:
                    self._absent(str(message["absent"]))
                    return None
                if "begin" in message:
                    self.current, self.partial = int(message["begin"]), {}
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
        with contextlib.suppress(subprocess.TimeoutExpired):  # some libraries hang when they end
            self.process.wait(ENDING_SECONDS)
        if self.current is None and self.done == len(self.cases):
            return self.done
        _kill(self.process)
        code = self.process.wait()
        if self.current is None and code == 0 and self.done > 0:
            return self.done  # it asked for a fresh process
        how = f"ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        tail = self._tail()
        reason = f"{how}: {tail.splitlines()[-1]}" if tail else how
        if self.current is None and self.done == 0:  # it cannot even start, and would not the next time
            for _ in self.cases:
                self._add({"status": FAILED, "reason": reason, "output": tail})
            return None
        self._add({**self.partial, "status": FAILED, "reason": reason, "output": tail})
        return self.done

    def _tail(self, lines: int = 25) -> str:
        """Return the end of what the process has printed."""
        self.output.seek(0)
        text = self.output.read().decode(errors="replace")
        return "\n".join([line for line in text.splitlines() if line.strip()][-lines:])
