"""The watch over the processes of a run: if one fails, all others stop, and each prints one line that says why.

Array libraries notice a failed process late or not at all, and then they do not name it. The watch uses connections of
its own, one from each rank to rank 0 (see `drrho_clip.processes.endpoints`), and a thread in each process. The thread
can end the process even if the main thread waits inside an array library. `drrho_clip.processes.judge` has the rules.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import selectors
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, NamedTuple

from drrho_clip.errors import AgreedError
from drrho_clip.files.temporary import remove_all
from drrho_clip.processes.connection import connect, listen
from drrho_clip.processes.endpoints import Endpoint, FirstEndpoint, OtherEndpoint
from drrho_clip.processes.judge import Limits, Standing, Verdict
from drrho_clip.processes.protocol import Gathering
from drrho_clip.terminal.guard import BAD_INPUT, INTERRUPTED, TERMINATED, ending, reason
from drrho_clip.terminal.printing import complain, end_bar, say, silence

__all__ = ["Watch"]

BEAT = 1.0
"""Seconds between two messages of a rank."""

_SECONDS_TO_CONNECT = 10.0
_LONGEST_WORDS = 2000
_SIGNALS = {signal.SIGINT: ("interrupted", INTERRUPTED), signal.SIGTERM: ("terminated", TERMINATED)}


class _Failure(NamedTuple):
    """The end of this process after an error of its own.

    `words` are for the other processes; `message` is for the user, or None if there is only a traceback.
    """

    words: str
    message: str | None
    code: int
    consequence: bool = False
    repeats: bool = False
    error: BaseException | None = None


class Watch:
    """The watch of one process, as a context around all work that the processes do together.

    At the end of the context a process waits until all processes have done their work, so that none of them goes while
    another still needs it. After an error, or if another rank fails, the process does not leave the context: it prints
    one line and ends with exit code 2. With a single process the watch does nothing.

    Parameters
    ----------
    processes : Gathering
        The processes; they are used only to exchange the address of rank 0.
    host : str
        The name or the address under which the other processes reach the machine of rank 0.
    limits : Limits
        The times after which a rank counts as failed.
    beat : float
        Seconds between two messages of a rank, > 0.
    end : callable
        Ends the process with an exit code.

    Examples
    --------
    >>> from types import SimpleNamespace
    >>> with Watch(SimpleNamespace(rank=0, size=1), host="localhost") as watch:
    ...     watch.progress()
    """

    def __init__(
        self,
        processes: Gathering,
        *,
        host: str,
        limits: Limits | None = None,
        beat: float = BEAT,
        end: Callable[[int], Any] = os._exit,
    ) -> None:
        self.rank, self.size = processes.rank, processes.size
        self._limits = Limits() if limits is None else limits
        self._beat, self._end = beat, end
        self._owner = threading.get_ident()
        self._exchanges = self._signs = 0
        self._exchanging = False
        self._prepared = self._left = False
        self._work: list[str] = []
        self._saved: int | None = None
        self._failure: _Failure | None = None
        self._signal: tuple[int, float] | None = None
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None
        if self.size > 1:
            self._start(processes, host)

    # The hooks of the run ---------------------------------------------------------------------------------------------

    def progress(self) -> None:
        """Say that this process begins an exchange with all others; all processes do so equally often."""
        self._exchanging = True
        self._exchanges += 1
        self._signs += 1

    def received(self) -> None:
        """Say that an exchange is over and this process has the values of all others.

        An exchange between devices, such as that of a step, may go on when the array library returns. It does not end
        with this call, so it counts as an exchange until the next exchange of values on the host.
        """
        self._exchanging = False
        self._signs += 1

    def alive(self) -> None:
        """Say that this process gets on with work of its own."""
        self._signs += 1

    def stepped(self) -> None:
        """Say that this process has done a step; before the first step, which is compiled, hangs may take longer."""
        self._prepared = True
        self._signs += 1

    def saved(self, step: int) -> None:
        """Say that a checkpoint of a step is on the disk, from which a new start of the run can continue."""
        self._saved = step
        self._wake()

    @contextlib.contextmanager
    def alone(self, work: str) -> Iterator[None]:
        """Do work that only this process does, such as "writing a checkpoint", while the others wait.

        The work may take as long as a step. If it hangs, the message names the work.
        """
        self._work.append(work)
        self._signs += 1
        try:
            yield
        finally:
            self._work.pop()
            self._signs += 1

    def failed(self, error: BaseException) -> None:
        """Tell all processes about an error of this process, and end the process."""
        if self._thread is None:
            return
        self._report(_failure_of(error))
        # The thread ends the process. A second Ctrl-C must not lose the message, so it is ignored.
        while not self._stopped.is_set():
            with contextlib.suppress(KeyboardInterrupt):
                self._stopped.wait()

    def close(self) -> None:
        """Say that this process has done all its work, and wait until all processes have done theirs."""
        if self._thread is None:
            return
        self._left = True
        self._wake()
        self._stopped.wait()
        self._thread.join()
        if self._earlier_waker is not None:
            signal.set_wakeup_fd(self._earlier_waker)
        for end in (self._bell, self._waker):
            end.close()
        self._thread = None

    def __enter__(self) -> Watch:
        """Return the watch, which has begun already."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, frames: TracebackType | None
    ) -> None:
        """Wait for the other processes, or tell them about the error."""
        if error is None:
            try:
                self.close()
            # Ctrl-C while this process waits for the others
            except BaseException as interruption:
                self.failed(interruption)
                raise
        else:
            self.failed(error)

    # The thread -------------------------------------------------------------------------------------------------------

    def _start(self, processes: Gathering, host: str) -> None:
        """Connect the processes, and start the thread."""
        listener = listen(host, backlog=self.size) if self.rank == 0 else None
        # A stranger who finds the port cannot stop the run, because the stranger does not know the key.
        own = None if listener is None else [listener.getsockname()[1], secrets.token_hex(16)]
        port, key = processes.gather(own)[0]
        problem = None
        endpoint: Endpoint
        if listener is not None:
            endpoint = FirstEndpoint(listener, self.size, key, self._limits)
        else:
            try:
                # The first message is on the way before the second exchange, so rank 0 misses no rank that dies.
                endpoint = OtherEndpoint(connect(host, port, seconds=_SECONDS_TO_CONNECT), self.rank, key, self._limits)
            except OSError as error:
                problem = f"rank {self.rank} cannot connect to rank 0 at {host}:{port}: {reason(error)}"
        # All processes have to know whether the watch begins.
        problems = [words for words in processes.gather(problem) if words]
        if problems:
            if problem is None:
                endpoint.end()
            if self.rank == 0:
                say(f"warning: {problems[0]}; so nothing names a process that fails", stream=sys.stderr)
            return
        self._bell, self._waker = socket.socketpair()
        for end in (self._bell, self._waker):
            end.setblocking(False)
        self._hear_signals()
        self._thread = threading.Thread(target=self._run, args=(endpoint,), name="drrho-watch", daemon=True)
        self._thread.start()

    def _hear_signals(self) -> None:
        """Let signals wake the thread, because the main thread may wait inside an array library and not hear them."""
        self._earlier_waker: int | None = None
        if threading.current_thread() is threading.main_thread():
            self._earlier_waker = signal.set_wakeup_fd(self._waker.fileno(), warn_on_full_buffer=False)

    def _wake(self) -> None:
        """Let the thread send the standing at once."""
        if self._thread is None:
            return
        with contextlib.suppress(OSError):
            self._waker.send(b"\0")

    def _report(self, failure: _Failure) -> None:
        if self._failure is None:
            self._failure = failure
            self._wake()

    def _run(self, endpoint: Endpoint) -> None:
        """Exchange messages until all processes have done their work, or until one has failed."""
        try:
            self._exchange(endpoint)
            verdict = endpoint.verdict
        except BaseException as error:
            # Without the watch the run would go on unguarded.
            traceback.print_exception(error)
            verdict = Verdict((self.rank,), "failed: the watch has ended")
        if verdict is None:
            endpoint.end()
            self._stopped.set()
            return
        code = self._code(verdict)
        # A stream whose reader has stopped must not keep the process alive.
        _within(1.0, lambda: self._print(verdict))
        # The process does not leave its contexts, so nothing else would remove its temporary folders.
        _within(1.0, remove_all)
        endpoint.end()
        self._end(code)
        self._stopped.set()

    def _exchange(self, endpoint: Endpoint) -> None:
        sent = now = time.monotonic()
        while endpoint.verdict is None and not (endpoint.over and self._left):
            with selectors.DefaultSelector() as selector:
                for connection in (self._bell, *endpoint.sockets()):
                    selector.register(connection, selectors.EVENT_READ)
                selector.select(self._beat / 10 if endpoint.waits or self._signal else self._beat / 2)
            if self._answer_bell():
                endpoint.tell(self._standing())
            endpoint.read()
            # If this process was stopped for a while, or the machine slept, that time does not count against others.
            earlier, now = now, time.monotonic()
            endpoint.pass_time(min(now - earlier, 2 * self._beat))
            if now - sent >= self._beat:
                endpoint.tell(self._standing())
                sent = now
        # The other ranks learn the verdict, or that all work is done.
        endpoint.tell(self._standing())

    def _answer_bell(self) -> bool:
        """Return whether the main thread has something to tell; notice signals that it does not notice itself."""
        try:
            rung = self._bell.recv(1024)
        except BlockingIOError:
            rung = b""
        numbers = [number for number in rung if number in _SIGNALS]
        if numbers and self._signal is None:
            self._signal = numbers[0], time.monotonic()
        if self._signal is not None and time.monotonic() - self._signal[1] >= self._beat and self._failure is None:
            words, code = _SIGNALS[signal.Signals(self._signal[0])]
            self._report(_Failure(f"was {words}", words, code, consequence=True))
            return True
        return bool(rung)

    def _standing(self) -> Standing:
        failure = self._failure
        return Standing(
            exchanges=self._exchanges,
            exchanging=self._exchanging,
            signs=self._signs,
            prepared=self._prepared,
            work=self._work[-1] if self._work else "",
            place=_place(self._owner),
            process=f"process {os.getpid()} on {socket.gethostname()}",
            saved=self._saved,
            left=self._left,
            failure="" if failure is None else failure.words,
            consequence=failure is not None and failure.consequence,
            repeats=failure is not None and failure.repeats,
        )

    def _code(self, verdict: Verdict) -> int:
        """Return the exit code of this process."""
        return BAD_INPUT if self._failure is None or self.rank not in verdict.ranks else self._failure.code

    def _print(self, verdict: Verdict) -> None:
        """Print the line of this process."""
        # Only the first process prints, except now.
        silence(False)
        end_bar()
        if self._failure is None or self.rank not in verdict.ranks:
            # An error in our own code cannot be found without its traceback, whichever rank was first.
            if self._failure is not None and self._failure.message is None and not self._failure.consequence:
                traceback.print_exception(self._failure.error)
            complain(verdict.line(self.size))
        # An error that all processes have met is printed once.
        elif self.rank == 0 or not verdict.shared:
            if self._failure.message is None:
                traceback.print_exception(self._failure.error)
            else:
                # A signal is no reason to change anything before the run goes on.
                hint = verdict.hint if self._failure.code in (INTERRUPTED, TERMINATED) else ""
                complain(f"{self._failure.message}{hint}")
        for stream in (sys.stdout, sys.stderr):
            stream.flush()


def _failure_of(error: BaseException) -> _Failure:
    """Return the end of a process after an error."""
    message, code = ending(error)
    repeats = isinstance(error, AgreedError) and error.repeats
    # If a rank dies, array libraries let the exchanges of the other ranks end in a RuntimeError, and launchers send
    # SIGTERM to the other ranks. Connections of Python are reset; a broken pipe is that of the user's output.
    failed_exchange = isinstance(error, ConnectionError) and not isinstance(error, BrokenPipeError)
    stopped = isinstance(error, RuntimeError | KeyboardInterrupt) and code != BAD_INPUT
    if isinstance(error, KeyboardInterrupt):
        words = f"was {message}"
    else:
        words = f"failed: {message or traceback.format_exception_only(error)[-1].strip()}"
    return _Failure(words[:_LONGEST_WORDS], message, code, failed_exchange or stopped or repeats, repeats, error)


def _place(thread: int) -> str:
    """Return the line of Python that a thread executes."""
    frame = sys._current_frames().get(thread)
    if frame is None:
        return ""
    return f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno} ({frame.f_code.co_name})"


def _within(seconds: float, work: Callable[[], None]) -> None:
    """Do work, and go on after some time even if the work is not done."""
    worker = threading.Thread(target=work, daemon=True)
    worker.start()
    worker.join(seconds)
