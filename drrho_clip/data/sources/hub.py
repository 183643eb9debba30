"""Pairs in a data set of the library `datasets` (Hugging Face) that was saved on disk with `save_to_disk`.

Images are a column of images, of bytes or of paths. A saved dictionary of data sets keeps the parts: its validation and
test data are held out as they are.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from drrho_clip.data.columns import ColumnNames
from drrho_clip.data.images import decode_bytes, inspect_bytes
from drrho_clip.data.pair_source import PairSource, SourceBuilder, Unreadable
from drrho_clip.data.pair_table import checked_captions, checked_label
from drrho_clip.data.protocol import Int64, UInt8
from drrho_clip.errors import BadInput, MissingExtra
from drrho_clip.terminal.safe_text import shown

__all__ = ["HubStore", "is_hub_data", "read_hub_data"]

_MARKS: Final = ("dataset_info.json", "dataset_dict.json")
# The usual names of the parts of a dictionary of data sets, with the numbers of `PairSource.parts`.
_PARTS: Final = {"train": 0, "training": 0, "validation": 1, "valid": 1, "val": 1, "dev": 1, "test": 2}
_ROWS_AT_ONCE: Final = 256


class HubStore:
    """Images in a saved data set, by part and row.

    Parameters
    ----------
    folder : Path
    column : str
        The column of images.
    parts : sequence of str
        The names of the parts; an empty name for a data set without parts.
    places : ndarray of int64, shape (m, 2)
        For each record the number of the part and the row in the part.
    """

    kind = "datasets"

    def __init__(self, folder: Path, column: str, parts: Sequence[str], places: Int64) -> None:
        self._folder, self._column, self._parts, self._places = folder, column, tuple(parts), places
        self._opened: Mapping[str, Any] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Return the state for another process, which opens the data itself."""
        return vars(self) | {"_opened": None}

    def load(self, record: int, digest: bytes) -> UInt8:
        """Read an image; see `decode_bytes`."""
        # Two threads may both open the data, and the result is the same.
        if self._opened is None:
            self._opened = {name: part.select_columns([self._column]) for name, part in _opened(self._folder).items()}
        part, row = self._places[record].tolist()
        return decode_bytes(_content(self._opened[self._parts[part]][row][self._column], self._folder), digest)

    def place(self, record: int) -> str:
        """Return folder, part and row of a record; rows are counted from 0, as the library does."""
        part, row = self._places[record].tolist()
        return _place(self._folder, self._parts[part], row)

    def image(self, record: int) -> str:
        """Return part and row of an image."""
        part, row = self._places[record].tolist()
        return _image_name(self._parts[part], row)

    def files(self) -> Sequence[Path]:
        """Return the folder of the data set."""
        return (self._folder,)

    def describe(self) -> tuple[dict[str, Any], dict[str, npt.NDArray[Any]]]:
        """Return the column and the parts, and the places of the images."""
        return {"column": self._column, "parts": list(self._parts)}, {"places": self._places}


def is_hub_data(folder: Path) -> bool:
    """Return whether a folder is a data set that the library `datasets` has saved."""
    return any((folder / mark).is_file() for mark in _MARKS)


def read_hub_data(folder: Path, names: ColumnNames) -> PairSource:
    """Read and check every row of a saved data set; columns are chosen as in a table.

    Raises
    ------
    BadInput
        The data are damaged, a column is missing, or a row has a wrong field. Unreadable images are listed in the
        result.
    MissingExtra
        The library `datasets` is not installed.
    """
    opened = _opened(folder)
    unknown = [name for name in opened if name.lower() not in _PARTS]
    if len(opened) > 1 and unknown:
        raise BadInput(shown(f"{folder} must have the parts train, validation and test, got {', '.join(opened)}"))
    first = next(iter(opened.values()))
    try:
        columns = names.choose(first.column_names)
    except BadInput as error:
        raise BadInput(shown(f"{folder} {error}")) from None
    builder, places, parts, unreadable = SourceBuilder(), [], [], []
    problems: list[str] = []
    for number, (name, part) in enumerate(opened.items()):
        missing = [column for column in columns if column is not None and column not in part.column_names]
        if missing:
            raise BadInput(shown(f"{folder} must have the column {missing[0]!r} in every part, got none in {name}"))
        for row, (value, texts, label) in enumerate(_rows(part, columns.image, columns.caption, columns.label)):
            place = _place(folder, name, row)
            try:
                captions = checked_captions(texts, columns.caption)
                checked = checked_label(label, str(columns.label))
                content = _content(value, folder)
            except BadInput as error:
                problems.append(f"{place}: {error}")
                continue
            digest, flaw = inspect_bytes(content)
            if flaw is None:
                builder.add(_image_name(name, row), captions, checked, digest)
                places.append((number, row))
                parts.append(_PARTS.get(name.lower(), 0))
            else:
                unreadable.append(Unreadable(place, columns.image, flaw))
    if problems:
        more = f" (and {len(problems) - 1} more such rows)" if len(problems) > 1 else ""
        raise BadInput(shown(f"{problems[0]}{more}"))
    if not len(builder) and not unreadable:
        raise BadInput(f"{folder} must have at least one row, got none")
    store = HubStore(folder, columns.image, tuple(opened), np.array(places, dtype=np.int64).reshape(-1, 2))
    own_parts = np.array(parts, dtype=np.uint8) if any(parts) else None
    # Whatever changes a saved data set also changes the number in state.json by which the library knows the content.
    states = sorted(folder.rglob("state.json"))
    return builder.build(folder.name, str(folder), store, parts=own_parts, unreadable=unreadable, text_files=states)


def _opened(folder: Path) -> dict[str, Any]:
    """Return the parts of a saved data set by name; no image is decoded. The name is empty if there are no parts."""
    try:
        import datasets
    except ImportError:
        raise MissingExtra("reading a saved data set", "datasets", "datasets") from None
    try:
        loaded = datasets.load_from_disk(os.fspath(folder))
    # For damaged files the library raises exceptions of several classes.
    except Exception as error:
        reason = " ".join(str(error).split())
        raise BadInput(shown(f"{folder} must be a data set that `save_to_disk` has written, got: {reason}")) from error
    parts = dict(loaded) if isinstance(loaded, dict) else {"": loaded}
    for name, part in parts.items():
        images = [column for column, feature in part.features.items() if isinstance(feature, datasets.Image)]
        for column in images:
            part = part.cast_column(column, datasets.Image(decode=False))
        parts[str(name)] = part
    return parts


def _rows(part: Any, image: str, caption: str, label: str | None) -> Any:
    """Yield image, captions and label of each row; numbers of classes become names."""
    needed = [image, caption] + ([] if label is None else [label])
    class_names = getattr(part.features.get(label), "names", None)
    for batch in part.select_columns(needed).iter(batch_size=_ROWS_AT_ONCE):
        labels = [None] * len(batch[image]) if label is None else batch[label]
        if class_names is not None:
            # The library writes -1 for a missing class.
            labels = [class_names[number] if number is not None and number >= 0 else None for number in labels]
        yield from zip(batch[image], batch[caption], labels, strict=True)


def _content(value: object, folder: Path) -> bytes:
    """Return the content of the image file that a field holds or names."""
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str) or not value:
        raise BadInput(f"an image must be bytes or a path, got {type(value).__name__}")
    try:
        return (folder / value).read_bytes()
    except OSError as error:
        raise BadInput(f"there is no image file {folder / value}: {error.strerror or error}") from None


def _place(folder: Path, part: str, row: int) -> str:
    return f"{folder}, {part + ' ' if part else ''}row {row}"


def _image_name(part: str, row: int) -> str:
    return f"{part or 'row'}/{row}"
