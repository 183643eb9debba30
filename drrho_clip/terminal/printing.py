"""Lines and tables on standard output and standard error: the only module of the harness that prints.

Every text passes `shown` here, so no caller can forget to make the text of a user safe. Standard output may be closed,
may be a full disk, may be a pipe without a reader, and may have an encoding other than UTF-8.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, TextIO

from drrho_clip.terminal.safe_text import shown

if TYPE_CHECKING:
    from rich.console import Console

__all__ = [
    "Bold",
    "abandon",
    "complain",
    "console",
    "end_bar",
    "flush",
    "is_silent",
    "prepared_streams",
    "print_cells",
    "say",
    "silence",
]

_silent = False


def silence(silent: bool = True) -> None:
    """Print nothing from now on: this process is one of several, and the first of them prints for all.

    With False the process prints again, as it does before it ends after an error.
    """
    global _silent
    _silent = silent


def is_silent() -> bool:
    """Return whether this process leaves printing to another process."""
    return _silent


def say(*lines: str, stream: TextIO | None = None) -> None:
    r"""Print lines; each argument is one line, whatever characters it holds.

    Parameters
    ----------
    *lines : str
        The lines, without line breaks at the end.
    stream : file, optional
        The output; standard output by default.

    Raises
    ------
    OSError
        If the stream cannot be written; a BrokenPipeError if the reader of a pipe has gone.

    Examples
    --------
    >>> say("wrote a\nb")
    wrote a\nb
    """
    _write("".join(f"{shown(line)}\n" for line in lines), stream)


def complain(message: object) -> None:
    """Print one line that begins with ``drrho:`` on standard error; if standard error cannot be written, do nothing."""
    # There is no other place for a message, and the exit code tells the rest.
    with contextlib.suppress(OSError, ValueError):
        _write(f"drrho: {shown(message)}\n", sys.stderr)


def console(stream: TextIO) -> Console:
    """Return a console of the library rich that reads no markup and no emoji codes in texts."""
    from rich.console import Console

    return Console(file=stream, markup=False, emoji=False, highlight=False)


class Bold(str):
    """The text of a cell that `print_cells` prints in bold."""


def print_cells(titles: Sequence[str], rows: Sequence[Sequence[str]], *, left: int) -> None:
    """Print a table on standard output.

    Parameters
    ----------
    titles : sequence of str
        The titles of the columns.
    rows : sequence of sequences of str
        The cells, one sequence per row; a cell may be `Bold`.
    left : int
        Number of columns, from the left, that are aligned at the left; all others are aligned at the right.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    # The padding is narrow, so that the table fits into eighty columns.
    table = Table(box=box.SIMPLE, collapse_padding=True, pad_edge=False)
    for number, title in enumerate(titles):
        table.add_column(Text(shown(title)), justify="left" if number < left else "right")
    for cells in rows:
        table.add_row(*(Text(shown(cell), "bold" if isinstance(cell, Bold) else "") for cell in cells))
    # The console only draws. `_write` prints, because rich has an exit code of its own for broken pipes.
    drawing = console(sys.stdout)
    with drawing.capture() as captured:
        drawing.print(table)
    _write(captured.get(), sys.stdout)


def end_bar() -> None:
    """Show the cursor of the terminal again, on a new line, if a progress bar cannot be ended any more."""
    with contextlib.suppress(OSError, ValueError):
        if sys.stderr.isatty() and not _silent:
            sys.stderr.write("\x1b[?25h\n")


def _write(text: str, stream: TextIO | None) -> None:
    """Write and flush a text, with replacement signs for characters that the stream's encoding lacks."""
    if _silent:
        return
    stream = sys.stdout if stream is None else stream
    encoding = getattr(stream, "encoding", None) or "utf-8"
    with _naming_stream(stream):
        stream.write(text.encode(encoding, "replace").decode(encoding))
        # An error of the disk or the pipe must come now, and not when the interpreter ends.
        stream.flush()


@contextlib.contextmanager
def _naming_stream(stream: TextIO) -> Iterator[None]:
    """Let every OSError name the stream, and abandon the stream after an error."""
    try:
        yield
    except OSError as error:
        abandon(stream)
        name = "standard error" if stream is sys.stderr else "standard output"
        raise OSError(error.errno, error.strerror, name) from None


@contextlib.contextmanager
def prepared_streams() -> Iterator[None]:
    """Prepare the standard streams of the process for a command, and flush them after the command.

    Raises
    ------
    OSError
        If standard output cannot be written; a BrokenPipeError if the reader of a pipe has gone.
    """
    _open_closed_streams()
    # Libraries print too (argparse prints the help), so the stream itself must replace what it cannot encode.
    errors = getattr(sys.stdout, "errors", None)
    if errors == "strict" and hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")
    try:
        yield
    finally:
        # argparse hides errors of the stream, so a full disk behind --help is only seen here.
        flush()
        if errors == "strict" and hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(errors="strict")


def flush() -> None:
    """Write what libraries have left in the buffer of standard output."""
    if not sys.stdout.closed:
        with _naming_stream(sys.stdout):
            sys.stdout.flush()


def abandon(stream: TextIO) -> None:
    """Lead a stream to nowhere, so that the interpreter does not try to write the rest of its buffer at the end."""
    # A stream in memory, as in a notebook or a test, has no descriptor.
    with contextlib.suppress(OSError, ValueError, AttributeError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def _open_closed_streams() -> None:
    """Open the null device for each standard stream that is closed (``drrho ... >&-``)."""
    # Otherwise the next file that is opened, such as a checkpoint, would get the number of standard output, and a
    # library that writes to this number would write into the checkpoint.
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError as error:
            if error.errno == errno.EBADF:
                os.open(os.devnull, os.O_RDWR)
    # Python sets the stream of a closed descriptor to None, and libraries do not expect that.
    if sys.stdout is None:
        sys.stdout = os.fdopen(1, "w", encoding="utf-8", errors="replace")
    if sys.stderr is None:
        sys.stderr = os.fdopen(2, "w", encoding="utf-8", errors="replace")
