"""Progress of long work: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TextIO

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from drrho_clip.terminal.printing import console, is_silent, say
from drrho_clip.terminal.safe_text import shown


class Reporter:
    """Show the progress of a piece of work.

    Parameters
    ----------
    title : str
        Name of the work.
    total : int
        Number of steps.
    done : int
        Number of steps that were done before the reporter starts.
    stream : file, optional
        The output; standard error by default, so that results on standard output stay clean.
    quiet : bool
        Write nothing.
    seconds_between_lines : float
        Shortest time between two plain lines.
    brief : bool
        Leave out the first and the last plain line, so that work that is soon done writes none.

    Examples
    --------
    >>> with Reporter("counting", 3, quiet=True) as reporter:
    ...     for step in range(3):
    ...         reporter.advance("no figures yet")
    """

    def __init__(
        self,
        title: str,
        total: int,
        *,
        done: int = 0,
        stream: TextIO | None = None,
        quiet: bool = False,
        seconds_between_lines: float = 10.0,
        brief: bool = False,
    ) -> None:
        self._title, self._total, self._done = title, total, done
        self._stream = sys.stderr if stream is None else stream
        self._quiet, self._pause, self._brief = quiet or is_silent(), seconds_between_lines, brief
        self._last = time.monotonic()
        self._note = ""
        self._bar: Progress | None = None

    def __enter__(self) -> Reporter:
        """Start the bar, or write the first line."""
        # A bar moves the cursor, which would fill a log file with control characters.
        if not self._quiet and self._stream.isatty():
            columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn())
            more = (TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("{task.fields[note]}", markup=False))
            self._bar = Progress(*columns, *more, console=console(self._stream))
            self._bar.start()
            # The bar draws its texts itself, so they do not pass `say`.
            self._task = self._bar.add_task(shown(self._title), total=self._total, completed=self._done, note="")
        elif not self._brief:
            self._line()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Stop the bar, or write the last line."""
        if self._bar is not None:
            self._bar.stop()
        # After an error the error message is the last line.
        elif kind is None and not self._brief:
            self._line()

    def advance(self, note: str | None = None) -> None:
        """Count one step; `note` replaces the text at the end of the line."""
        self.move_to(self._done + 1, note)

    def move_to(self, done: int, note: str | None = None) -> None:
        """Set the number of steps that are done; `note` replaces the text at the end of the line."""
        self._done = done
        self._note = self._note if note is None else note
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done, note=shown(self._note))
        # `__exit__` writes the line of the last step.
        elif time.monotonic() - self._last >= self._pause and self._done < self._total:
            self._line()

    def _line(self) -> None:
        if not self._quiet:
            say(f"{self._title}: {self._done}/{self._total} {self._note}".rstrip(), stream=self._stream)
        self._last = time.monotonic()
