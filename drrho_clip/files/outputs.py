"""Output files and folders: they are tried before the work, so that a run of hours cannot end without its results."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from drrho_clip.errors import BadInput
from drrho_clip.files.disk import naming, temporary_path, write_atomic

__all__ = ["check_file", "check_folder", "has_checkpoint", "write_json"]

# More than a file system keeps inside an inode, so a full disk refuses the trial file.
_TRIAL = bytes(1 << 13)


def check_folder(folder: Path, name: str) -> None:
    """Raise BadInput unless a folder can be made, if it is missing, and can hold a new file; nothing stays behind.

    Parameters
    ----------
    folder : Path
        The folder.
    name : str
        The option, for the message.

    Raises
    ------
    BadInput
        If the path leads below a file, the disk is full or read-only, a permission is missing, or a name is too long.

    Examples
    --------
    >>> check_folder(Path("/dev/null/run"), "out")
    Traceback (most recent call last):
        ...
    drrho_clip.errors.BadInput: out must be a folder that can be written, got /dev/null/run: Not a directory
    """
    with _as_bad_input(f"{name} must be a folder that can be written, got {folder}"), _made(folder):
        _try_to_write(folder / "trial")


def check_file(path: Path | None, name: str) -> None:
    """Raise BadInput unless a file, and a missing folder for it, can be made at a path; nothing stays behind.

    Parameters
    ----------
    path : Path or None
        The file; None stands for no file and is always accepted.
    name : str
        The option, for the message.

    Raises
    ------
    BadInput
        If the path is a folder, a device, a pipe or a socket, or for one of the reasons of `check_folder`.
    """
    if path is None:
        return
    with _as_bad_input(f"{name} must be a file that can be written, got {path}"):
        # A device, a pipe or a socket would be replaced by a plain file: fatal for /dev/null.
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            mode = path.stat().st_mode
            if not stat.S_ISREG(mode):
                kind = "a folder" if stat.S_ISDIR(mode) else "a device, a pipe or a socket"
                raise BadInput(f"{name} must be a file that can be written, got {path}, which is {kind}")
            # A new file could replace a read-only file, but the user has protected that file for a reason.
            if not os.access(path, os.W_OK):
                raise BadInput(f"{name} must be a file that can be written, got {path}, which is read-only")
        with _made(path.parent):
            _try_to_write(path)


def write_json(path: Path, content: Sequence[Any] | Mapping[str, Any], *, indent: int | None = 1) -> None:
    """Write a JSON file in UTF-8, whole or not at all; a missing folder is made.

    Raises
    ------
    OSError
        If the disk refuses the file; the error names the file.
    """
    text = json.dumps(content, indent=indent, ensure_ascii=False) + "\n"
    with naming(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
    # Paths may hold lone surrogates, which UTF-8 lacks. The error handler writes them as JSON does, such as \\udc80.
    write_atomic(path, text.encode("utf-8", "backslashreplace"))


def has_checkpoint(folder: Path) -> bool:
    """Return whether a folder holds a run with a checkpoint, from which --resume can continue."""
    return all((folder / name).is_file() for name in ("config.json", "checkpoint.safetensors"))


@contextlib.contextmanager
def _as_bad_input(rule: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise BadInput(f"{rule}: {error.strerror or error}") from None


@contextlib.contextmanager
def _made(folder: Path) -> Iterator[None]:
    """Make a folder with all missing parents, and remove afterwards what was made."""
    made: list[Path] = []
    try:
        for part in (*reversed(folder.parents), folder):
            # `new/..` exists as soon as `new` does, so each part is looked at when its parent exists.
            if not part.is_dir():
                try:
                    part.mkdir()
                except FileExistsError:
                    raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(part)) from None
                made.append(part)
        yield
    finally:
        for part in reversed(made):
            with contextlib.suppress(OSError):
                part.rmdir()


def _try_to_write(path: Path) -> None:
    """Write and remove the temporary file under which `write_atomic` would write a path."""
    trial = temporary_path(path)
    try:
        with trial.open("xb") as file:
            file.write(_TRIAL)
    finally:
        with contextlib.suppress(OSError):
            trial.unlink()
