"""Files are written whole or not at all, and an error of the disk names the file."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

__all__ = ["naming", "temporary_path", "write_atomic"]


def write_atomic(path: Path, content: bytes) -> None:
    """Write a file so that a crash at any moment leaves the old content or the new content, never a mixture."""
    temporary = temporary_path(path)
    try:
        with naming(path):
            # Mode "x" follows no link; a file of an earlier process with the same id is no longer needed.
            temporary.unlink(missing_ok=True)
            with temporary.open("xb") as file:
                file.write(content)
                # The content must be on the disk before the file gets its final name.
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
    finally:
        # If the disk has failed, the temporary file may stay; the error of the writing is the one to report.
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    # The folder holds the new name, so the folder must be on the disk as well.
    with naming(path):
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def temporary_path(path: Path) -> Path:
    """Return the name under which `write_atomic` writes a file before the file gets its final name."""
    # The process id keeps two programs from writing into the same temporary file.
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let every OSError inside the block name the given file, because an error of a full disk names none.

    Examples
    --------
    >>> with naming(Path("run/metrics.jsonl")):
    ...     raise OSError(28, "No space left on device")
    Traceback (most recent call last):
        ...
    OSError: [Errno 28] No space left on device: 'run/metrics.jsonl'
    """
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from None
