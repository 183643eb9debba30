"""A small process under the watch, without an array library, that does what its standard input says; and groups of it.

Run as a script, it is one process: python tests/helpers/watched_process.py RANK SIZE HANG SILENCE GRACE. Each line on
standard output answers a line on standard input, so a test never has to wait for a fixed time.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from drrho_clip.errors import BadInput
from drrho_clip.files.temporary import removed_at_end
from drrho_clip.processes.judge import Limits
from drrho_clip.processes.together import together
from drrho_clip.processes.watch import Watch
from drrho_clip.terminal.guard import guarded

TIMEOUT = 30.0
"""Seconds after which a group that does not end makes its test fail."""


class Pipes:
    """Values travel through the test, which answers with the values of all processes."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size, self.is_first = rank, size, rank == 0

    def gather(self, value: Any, /) -> list[Any]:
        print(json.dumps(value), flush=True)
        values: list[Any] = json.loads(sys.stdin.readline())
        return values


class Work(NamedTuple):
    """The command of one process."""

    rank: int
    size: int
    limits: Limits

    def run(self) -> int:
        with Watch(Pipes(self.rank, self.size), host="127.0.0.1", limits=self.limits, beat=0.05) as watch:
            while (words := sys.stdin.readline().split()) != ["end"]:
                self.obey(words, watch)
                print("done", flush=True)
        return 0

    def obey(self, words: list[str], watch: Watch) -> None:
        """Do what a line says."""
        match words:
            case ["step"]:
                watch.progress()
                watch.stepped()
            case ["exchange"]:
                watch.progress()
            case ["saved", step]:
                watch.saved(int(step))
            case ["fail", *message]:
                raise BadInput(" ".join(message))
            case ["mistake"]:
                raise TypeError("a mistake of ours")
            # The exchange of `together` goes through the test, like those of the start.
            case ["together", *mistake]:
                together(Pipes(self.rank, self.size), lambda: self.checked(mistake))
            case ["folder", name]:
                Path(name).mkdir()
                with removed_at_end(Path(name)):
                    print("done", flush=True)
                    sys.stdin.readline()
            case ["reset"]:
                raise ConnectionResetError(104, "Connection reset by peer")
            # An exchange of an array library fails so when another process is gone.
            case ["lost"]:
                raise RuntimeError("Connection closed by peer [127.0.0.1]:4532")
            case ["alone", *work]:
                print("done", flush=True)
                with watch.alone(" ".join(work)):
                    sys.stdin.readline()
            case ["stuck"]:
                print("done", flush=True)
                # A lock that is taken twice holds the main thread outside Python, and signals do not wake it.
                lock, library = ctypes.create_string_buffer(64), ctypes.CDLL(None)
                library.pthread_mutex_lock(lock)
                library.pthread_mutex_lock(lock)
            case _:
                raise ValueError(words)

    def checked(self, mistake: list[str]) -> None:
        """Fail if there is an error to raise."""
        match mistake:
            case ["TypeError"]:
                raise TypeError("a mistake of ours")
            case ["RuntimeError"]:
                raise RuntimeError("sizes must match")


class Ended(NamedTuple):
    """The end of a process: its exit code, and the lines on standard error."""

    code: int
    lines: list[str]


class Group:
    """Processes that watch each other, as a context that leaves no process behind."""

    def __init__(self, size: int, *, hang: float = 1000.0, silence: float = 1000.0, grace: float = 0.3) -> None:
        root = Path(__file__).parents[2]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])}
        self._processes = [
            subprocess.Popen(
                [sys.executable, __file__, str(rank), str(size), str(hang), str(silence), str(grace)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=environment,
            )
            for rank in range(size)
        ]

    def __enter__(self) -> Group:
        # The watch gathers twice: the address of rank 0, and whether all ranks have reached it.
        for _ in range(2):
            self.exchange()
        return self

    def __exit__(self, *error: object) -> None:
        for process in self._processes:
            process.kill()
            process.communicate()

    def tell(self, rank: int, words: str, *, answered: bool = True) -> None:
        """Give a line to a process, and wait until the process has done it."""
        stdin = self._processes[rank].stdin
        assert stdin is not None
        stdin.write(f"{words}\n")
        stdin.flush()
        if answered:
            assert self._answer(rank) == "done"

    def exchange(self) -> None:
        """Take the value of every process, and give all of them to each."""
        values = [json.loads(self._answer(rank)) for rank in range(len(self._processes))]
        for rank in range(len(values)):
            self.tell(rank, json.dumps(values), answered=False)

    def tell_all(self, words: str) -> None:
        """Give a line to all processes."""
        for rank in range(len(self._processes)):
            self.tell(rank, words)

    def send(self, rank: int, number: signal.Signals) -> None:
        """Send a signal to a process."""
        self._processes[rank].send_signal(number)

    def ends(self, ranks: Sequence[int] | None = None) -> dict[int, Ended]:
        """Wait until the processes have ended, all of them by default."""
        ended = {}
        for rank in range(len(self._processes)) if ranks is None else ranks:
            process = self._processes[rank]
            assert process.stderr is not None
            # The standard input stays open, so a process that waits for a line goes on waiting.
            code = process.wait(timeout=TIMEOUT)
            ended[rank] = Ended(code, process.stderr.read().splitlines())
        return ended

    def _answer(self, rank: int) -> str:
        stdout = self._processes[rank].stdout
        assert stdout is not None
        return stdout.readline().strip()


if __name__ == "__main__":
    number, group, *seconds = sys.argv[1:]
    times = Limits(*map(float, seconds))
    sys.exit(guarded(lambda: Work(int(number), int(group), times), ends_process=True))
