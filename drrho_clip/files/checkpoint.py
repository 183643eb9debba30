"""Arrays and a JSON state in one safetensors file, which is written whole or not at all and checked when it is read."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from drrho_clip.errors import BadInput
from drrho_clip.files.disk import write_atomic
from drrho_clip.terminal.safe_text import brief

FORMAT_VERSION = 2
"""In files of version 1, which are still read, the checksum covers the arrays but not the state."""


def save_arrays(path: Path, kind: str, arrays: Mapping[str, np.ndarray], state: Mapping[str, Any]) -> None:
    """Write arrays and a JSON state atomically.

    Parameters
    ----------
    path : Path
        The file.
    kind : str
        Kind of the content, such as ``"checkpoint"``; `load_arrays` must be called with the same word.
    arrays : mapping of str to ndarray
        Any shapes and numeric dtypes.
    state : mapping
        Values that JSON can hold.
    """
    # safetensors copies the memory of an array unchanged, so every array must be in C order (row by row).
    whole = {name: np.array(array, order="C", copy=None) for name, array in arrays.items()}
    text = json.dumps(state, sort_keys=True)
    metadata = {
        "format": f"drrho-{kind}",
        "version": str(FORMAT_VERSION),
        "sha256": digest(whole, text),
        "state": text,
    }
    write_atomic(path, safetensors.numpy.save(whole, metadata=metadata))


def load_state(path: Path, kind: str) -> dict[str, Any]:
    """Read only the JSON state of a file that `save_arrays` wrote; the arrays are neither read nor checked.

    Raises
    ------
    BadInput
        As `load_arrays`, but damaged arrays are not noticed.
    """
    with _opened(path, kind) as (_, state, _):
        return state


def load_arrays(path: Path, kind: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Read a file that `save_arrays` wrote.

    Returns
    -------
    tuple of dict and dict
        The arrays by name, and the state.

    Raises
    ------
    BadInput
        If the file is missing or damaged, holds another kind of content, or comes from another program or version.
    """
    with _opened(path, kind) as (file, state, expected):
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        actual = digest(arrays, file.metadata()["state"] if file.metadata()["version"] != "1" else "")
    if actual != expected:
        raise BadInput(f"{path} must be an undamaged drrho {kind}, got: its checksum does not fit its content")
    return arrays, state


@contextlib.contextmanager
def _opened(path: Path, kind: str) -> Iterator[tuple[Any, dict[str, Any], str]]:
    """Open a file that `save_arrays` wrote: yield the safetensors file, the state and the checksum of the content."""
    if not path.is_file():
        raise BadInput(f"{path} must be a {kind} file, got no such file")
    try:
        with safetensors.safe_open(str(path), framework="numpy") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != f"drrho-{kind}":
                raise BadInput(f"{path} must be a drrho {kind}, got a safetensors file of another kind")
            if metadata.get("version") not in ("1", str(FORMAT_VERSION)):
                raise BadInput(f"{path} must have format version {FORMAT_VERSION}, got {metadata.get('version')!r}")
            state = json.loads(metadata["state"])
            if not isinstance(state, dict):
                raise BadInput(f"{path} must hold the state of a drrho {kind}, got {brief(state)}")
            yield file, state, metadata["sha256"]
    except BadInput:
        raise
    # The parser raises an error if the file is incomplete; the checksum detects changed bits.
    except (safetensors.SafetensorError, OSError, KeyError, ValueError, RecursionError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise BadInput(f"{path} must be an undamaged drrho {kind}, got: {reason}") from None


def digest(arrays: Mapping[str, np.ndarray], state: str = "") -> str:
    """Return the SHA-256 of names, dtypes, shapes and bytes of arrays, and of the text of a state, in hex."""
    # A zero byte ends each name, dtype and shape, so that different sets of arrays never give the same bytes.
    sha = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        sha.update(f"{name}\0{array.dtype.str}\0{arrays[name].shape}\0".encode())
        sha.update(array.data if array.size else b"")
    sha.update(state.encode())
    return sha.hexdigest()
