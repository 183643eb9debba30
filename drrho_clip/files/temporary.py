"""Temporary folders that are removed at the end, also if the watch over several processes ends this process at once.

A process that another process's failure ends does not leave its contexts, so Python removes nothing. The watch (see
`drrho_clip.processes.watch`) therefore calls `remove_all`.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

__all__ = ["remove_all", "removed_at_end"]

_folders: list[Path] = []


@contextlib.contextmanager
def removed_at_end(folder: Path) -> Iterator[None]:
    """Remove a folder, which need not exist, at the end of the context.

    Examples
    --------
    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> with removed_at_end(folder):
    ...     folder.exists()
    True
    >>> folder.exists()
    False
    """
    _folders.append(folder)
    try:
        yield
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        _folders.remove(folder)


def remove_all() -> None:
    """Remove all folders whose contexts have not ended yet."""
    for folder in list(_folders):
        shutil.rmtree(folder, ignore_errors=True)
