"""The end of every command: exit codes, messages for errors of the surroundings, signals.

The surroundings are all that is neither the user's input nor our code: disks, permissions, memory, pipes, signals. An
error of the surroundings ends in one line and exit code 2. An error in our own code still ends in a traceback, so that
users can report the error.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Protocol, runtime_checkable

from drrho_clip.errors import BadInput, MissingExtra
from drrho_clip.processes.place import place_of_launcher
from drrho_clip.terminal.printing import abandon, complain, flush, prepared_streams, silence

__all__ = ["Command", "Continued", "ending", "guarded", "reason"]

BAD_INPUT = 2
"""Exit code after bad usage, bad input or an error of the surroundings."""

MISTAKE = 1
"""Exit code after an error in our own code, which Python gives together with a traceback."""

INTERRUPTED, BROKEN_PIPE, TERMINATED = 130, 141, 143
"""Exit codes after Ctrl-C, after the reader of a pipe has gone, and after SIGTERM: those that a shell shows."""

# How array libraries say, in a RuntimeError, that the memory of a device or of the computer is exhausted.
_MEMORY_WORDS = ("out of memory", "out_of_memory", "can't allocate memory", "resource_exhausted", "failed to allocate")


class Command(Protocol):
    """A command of the command line."""

    def run(self) -> int:
        """Do the work and return the exit code."""


@runtime_checkable
class Continued(Protocol):
    """A command that can continue after an interruption."""

    def can_resume(self) -> bool:
        """Return whether the folder of the command holds a checkpoint."""


class _Terminated(KeyboardInterrupt):
    """The process received SIGTERM; the clean-up is that of Ctrl-C."""


@contextlib.contextmanager
def _signals_as_exceptions(report: Callable[[KeyboardInterrupt], int] | None) -> Iterator[None]:
    """Turn SIGINT (Ctrl-C) and SIGTERM into exceptions, so that temporary files and progress bars are cleaned up.

    An exception inside an import may get lost in the library that is being imported, or may abort the process, and an
    import may take seconds. An import leaves nothing to clean up, so there the process ends at once with the code that
    `report` returns. If the process goes on after the command, `report` is None, and the exception is always raised.
    """
    # Only the main thread may set handlers; a program that calls `main` in another thread keeps its own.
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, frame: FrameType | None) -> None:
        error = KeyboardInterrupt() if number == signal.SIGINT else _Terminated()
        if report is not None and _is_importing(frame):
            os._exit(report(error))
        raise error

    # A shell lets programs in the background ignore Ctrl-C, and they must go on ignoring it.
    ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    numbers = [signal.SIGTERM] if ignored else [signal.SIGTERM, signal.SIGINT]
    before = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield
    finally:
        # None stands for a handler that was not installed from Python; such a handler cannot be restored.
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def guarded(prepare: Callable[[], Command], *, ends_process: bool = False) -> int:
    """Build a command, run it, and return the exit code of the process.

    Parameters
    ----------
    prepare : callable
        Returns the command, or raises BadInput if the command line is wrong.
    ends_process : bool
        True if the process ends with the returned code.

    Returns
    -------
    int
        The command's own code; 2 after bad input or an error of the surroundings; 130, 141 or 143 after Ctrl-C, after a
        closed pipe, or after SIGTERM.
    """
    command: Command | None = None

    def report(error: KeyboardInterrupt) -> int:
        return _interrupted(command, error)

    try:
        with prepared_streams(), _signals_as_exceptions(report if ends_process else None):
            place = place_of_launcher()
            # Before the processes have joined, the first process of each machine speaks for the machine.
            if place is not None and place.local_rank > 0:
                silence()
            command = prepare()
            code = command.run()
            # The last lines are written here, so that an error of the stream still gets a message.
            flush()
            return code
    except KeyboardInterrupt as error:
        # Python's threads and exit functions still run after this; a second Ctrl-C ends the process at once.
        if ends_process:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        return report(error)
    except Exception as error:
        message, code = ending(error)
        if message is None:
            raise
        if code == BROKEN_PIPE:
            # `drrho ... | head -1`: the reader has seen enough, so there is nothing to say and nobody to say it to.
            for stream in (sys.stdout, sys.stderr):
                abandon(stream)
        else:
            complain(message)
        return code


def ending(error: BaseException) -> tuple[str | None, int]:
    """Return the message with which an error ends the process, and the exit code.

    The message is None for an error in our own code, of which Python prints a traceback.

    Examples
    --------
    >>> ending(BadInput("epochs must be at least 1, got 0"))
    ('epochs must be at least 1, got 0', 2)
    >>> ending(KeyboardInterrupt())
    ('interrupted', 130)
    """
    match error:
        case BadInput() | MissingExtra():
            return str(error), BAD_INPUT
        case _Terminated():
            return "terminated", TERMINATED
        case KeyboardInterrupt():
            return "interrupted", INTERRUPTED
        case BrokenPipeError():
            return "the reader of the output has gone", BROKEN_PIPE
    explanation = reason(error)
    return explanation, MISTAKE if explanation is None else BAD_INPUT


def reason(error: BaseException) -> str | None:
    """Return the message for an error of the surroundings, or None for any other error.

    Examples
    --------
    >>> reason(PermissionError(13, "Permission denied", "pairs.csv"))
    'cannot use pairs.csv: Permission denied'
    >>> reason(TypeError("a mistake of ours")) is None
    True
    """
    # Python's own words for these errors ("maximum recursion depth exceeded") say nothing about the input.
    match error:
        case OSError(filename=str() | bytes() | os.PathLike() as name):
            return f"cannot use {os.fsdecode(name)}: {error.strerror or error}"
        case OSError():
            return str(error.strerror or error or type(error).__name__)
        case MemoryError():
            return f"not enough memory: {error}" if str(error) else "not enough memory"
        case RecursionError():
            return "the input must not be nested so deeply"
        case UnicodeError():
            return f"a text cannot be read or written: {error}"
        case RuntimeError() if any(words in str(error).lower() for words in _MEMORY_WORDS):
            return f"not enough memory: {str(error).splitlines()[0]}"
    return None


def _interrupted(command: Command | None, error: KeyboardInterrupt) -> int:
    """Print the message after Ctrl-C or SIGTERM and return the exit code."""
    message, code = ending(error)
    hint = ""
    # Without a checkpoint --resume would only fail, and most commands have nothing to continue.
    with contextlib.suppress(OSError):
        if isinstance(command, Continued) and command.can_resume():
            hint = "; --resume continues from the last checkpoint"
    complain(f"{message}{hint}")
    return code
