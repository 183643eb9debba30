"""JSON files that may come from other programs, may be damaged, or may be made to do harm."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NoReturn

from drrho_clip.errors import BadInput

__all__ = ["parse_json", "read_json"]

# The largest file of a run is the vocabulary in config.json: 10 million words are less than this.
_LARGEST = 256 * 2**20


def read_json(path: Path, kind: str) -> Any:
    """Read a JSON file.

    Parameters
    ----------
    path : Path
        The file.
    kind : str
        The content in words, such as "the description of a run", for the message.

    Returns
    -------
    object
        The content: a mapping, list, text, number, bool or None.

    Raises
    ------
    BadInput
        If the file is missing, is no plain file, is larger than 256 MiB, is not UTF-8, or is refused by `parse_json`.
    """
    # A pipe or a device such as /dev/zero could be read for ever.
    if not path.is_file():
        raise BadInput(f"{path} must be {kind}, got {'no plain file' if path.exists() else 'no such file'}")
    try:
        size = path.stat().st_size
        if size > _LARGEST:
            raise BadInput(f"{path} must be {kind} of at most {_LARGEST:,} bytes, got {size:,}")
        return parse_json(path.read_bytes())
    except OSError as error:
        raise BadInput(f"{path} must be {kind}, got: {error.strerror or error}") from None
    except BadInput:
        raise
    except ValueError as error:
        raise BadInput(f"{path} must be JSON, got: {error}") from None


def parse_json(content: bytes | str) -> Any:
    """Return the value of a JSON text that keeps to the standard (RFC 8259).

    Raises
    ------
    ValueError
        If the text is not UTF-8 or not JSON, holds nan or infinity, names a key twice, or is nested too deeply.

    Examples
    --------
    >>> parse_json('{"width": 8, "width": 9}')
    Traceback (most recent call last):
        ...
    ValueError: the key 'width' twice
    """
    # Python's parser reads NaN, keeps the last of two equal keys, and leaves a RecursionError to the caller.
    try:
        text = content.decode("utf-8-sig") if isinstance(content, bytes) else content
        return json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_unique)
    except RecursionError:
        raise ValueError("brackets that are nested too deeply") from None


def _refuse_constant(constant: str) -> NoReturn:
    raise ValueError(f"{constant}, which is no number")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} twice")
    return values
