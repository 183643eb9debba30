"""One writer per run: a lock keeps a second process out of a run's folder, and no link leads out of the folder."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from drrho_clip.errors import BadInput
from drrho_clip.files.lock import LOCK, only_process
from drrho_clip.run.folder import files_of_run

__all__ = ["LOCK", "only_writer"]


@contextlib.contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Hold the lock of a run's folder; see `drrho_clip.files.lock`.

    Raises
    ------
    BadInput
        If another process holds the lock, or if a file of the run or the lock file is a link.
    OSError
        If the folder cannot be written.
    """
    with only_process(folder):
        _refuse_links(folder)
        yield


def _refuse_links(folder: Path) -> None:
    """Raise BadInput if a file of the run is a link, because writing would change a file in another place."""
    for path in files_of_run(folder):
        if path.is_symlink():
            raise BadInput(f"{path} must be a plain file, got a link to {os.readlink(path)}")
