"""One writer per folder: a lock that the operating system releases when the process ends, however it ends."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from drrho_clip.errors import BadInput
from drrho_clip.terminal.printing import complain

# The module is missing on Windows.
if sys.platform != "win32":
    import fcntl

__all__ = ["LOCK", "only_process"]

LOCK = "writer.lock"
"""Name of the lock file. It holds the process id of the last writer and stays in the folder; the lock does not stay."""

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


@contextlib.contextmanager
def only_process(folder: Path, name: str = "out") -> Iterator[None]:
    """Hold the lock of a folder.

    On a file system without locks (NFS servers may have none) and on Windows, a line on standard error says that
    nothing keeps a second process out.

    Parameters
    ----------
    folder : Path
        A folder that exists.
    name : str
        The option that names the folder, for the message.

    Raises
    ------
    BadInput
        If another process holds the lock, or if the lock file is a link.
    OSError
        If the folder cannot be written.
    """
    path = folder / LOCK
    # Through a link the process id would be written into a file outside the folder.
    if path.is_symlink():
        raise BadInput(f"{path} must be a plain file, got a link")
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        _lock(descriptor, folder, name)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)


def _lock(descriptor: int, folder: Path, name: str) -> None:
    unprotected = f"nothing keeps a second process out of {folder}, because the file system has no locks"
    if sys.platform == "win32":
        complain(unprotected)
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        process = os.pread(descriptor, 32, 0).decode(errors="replace").strip() or "unknown"
        line = f"{name} must be a folder that no other process writes, got {folder}: process {process}"
        raise BadInput(line) from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        complain(unprotected)
