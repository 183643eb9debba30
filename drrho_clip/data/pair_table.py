"""Turn the records of a table into pairs of image and caption, and check all of them."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from drrho_clip.data.columns import ColumnNames
from drrho_clip.data.delimited import trim
from drrho_clip.data.images import decode_image, inspect_images
from drrho_clip.data.pair_source import PairSource, SourceBuilder, Unreadable
from drrho_clip.data.protocol import Int64, UInt8
from drrho_clip.data.tables import Record, Table, open_table
from drrho_clip.errors import BadInput
from drrho_clip.terminal.safe_text import shown

__all__ = ["FileStore", "checked_captions", "checked_label", "read_table"]

# A web address, such as https://example.org/a.png. A drive letter of Windows has one letter before the colon.
_ADDRESS: Final = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
# The list ['a', 'b'] is how Python writes a list of texts; in JSON the list is ["a", "b"].
_PYTHON_LIST: Final = re.compile(r"\[\s*'.*'\s*\]", re.DOTALL)


class FileStore:
    """Images in files, which a table or a folder names.

    Parameters
    ----------
    table : Path
        The table or folder, for messages.
    folder : Path
        The folder to which relative paths refer.
    unit : str
        The name of a record in messages: "row", "line" or "image".
    numbers : ndarray of int64, shape (m,)
        The number of each record in the table.
    written : sequence of str, length m
        The paths of the images as the table writes them.
    """

    kind = "files"

    def __init__(self, table: Path, folder: Path, unit: str, numbers: Int64, written: Sequence[str]) -> None:
        self._table, self._folder, self._unit = table, folder, unit
        self._numbers, self._written = numbers, written

    def file(self, record: int) -> Path:
        """Return the path of an image."""
        return _file_of(self._folder, self._written[record])

    def load(self, record: int, digest: bytes) -> UInt8:
        """Return an image as RGB; see `decode_image`."""
        return decode_image(self.file(record), digest)

    def place(self, record: int) -> str:
        """Return table and number of a record."""
        return f"{self._table}, {self._unit} {self._numbers[record]}"

    def image(self, record: int) -> str:
        """Return the path of an image as a text."""
        return str(self.file(record))

    def files(self) -> Sequence[Path]:
        """Return the folder to which relative paths refer."""
        return (self._folder,)

    def describe(self) -> tuple[dict[str, Any], dict[str, npt.NDArray[Any]]]:
        """Return the unit, and the numbers of the records."""
        return {"unit": self._unit}, {"numbers": self._numbers}


class _Image(NamedTuple):
    """The fields of a record, which have been checked; the image has not been opened yet."""

    number: int
    written: str
    file: Path
    captions: tuple[str, ...]
    label: str


def read_table(path: Path, names: ColumnNames) -> PairSource:
    """Read and check every record of a table or folder.

    Raises
    ------
    BadInput
        The errors of `read_pairs`, except that unreadable images are listed in the result.
    MissingExtra
        Pillow is not installed, or pyarrow for Parquet.
    """
    table = open_table(path, names)
    # All records are read before an error is raised, so that the message can count the records that are wrong.
    images: list[_Image] = []
    problems: list[tuple[int, str]] = []
    for record in table.records:
        try:
            images.append(_check(record, table))
        except BadInput as error:
            problems.append((record.number, str(error)))
    if problems:
        number, reason = min(problems)
        more = f" (and {len(problems) - 1} more such {table.unit}s)" if len(problems) > 1 else ""
        raise BadInput(shown(f"{path}, {table.unit} {number}: {reason}{more}"))
    if not images:
        raise BadInput(f"{path} must have at least one row below its header, got none")
    # The fields are right; now the images are looked at.
    inspections = inspect_images(image.file for image in images)
    builder, unreadable, numbers = SourceBuilder(), [], []
    for image in images:
        digest, flaw = inspections[image.file]
        if flaw is None:
            builder.add(image.written, image.captions, image.label, digest)
            numbers.append(image.number)
        else:
            unreadable.append(Unreadable(f"{path}, {table.unit} {image.number}", str(image.file), flaw))
    written = builder.image_names()
    store = FileStore(path, table.folder, table.unit, np.array(numbers, dtype=np.int64), written)
    # The captions of a folder stand in as many files as there are images.
    text_files = () if path.is_dir() else (path,)
    return builder.build(path.stem, str(path), store, unreadable=unreadable, text_files=text_files)


def _file_of(folder: Path, written: str) -> Path:
    """Return the path to open for a path that a table writes."""
    file = folder / written
    # Tables that were written on Windows separate folders by backslashes.
    if "\\" in written and not os.path.isfile(file):
        file = folder / written.replace("\\", "/")
    return file


def _check(record: Record, table: Table) -> _Image:
    """Return the fields of a record as texts; raise BadInput with the reason if a field is wrong."""
    if record.flaw is not None:
        raise BadInput(record.flaw)
    columns = table.columns
    if not isinstance(record.image, str):
        raise BadInput(f"{columns.image} must be a path, got {_kind(record.image)}")
    written = trim(_text(record.image, columns.image))
    if not written:
        raise BadInput(f"{columns.image} must be a path, got an empty field")
    if _ADDRESS.match(written):
        raise BadInput(f"{columns.image} must be a path, got the web address {written}: download the images first")
    captions = checked_captions(record.captions, columns.caption)
    label = checked_label(record.label, str(columns.label))
    file = _file_of(table.folder, written)
    if not os.path.isfile(file):
        raise BadInput(f"there is no image file {table.folder / written}")
    return _Image(record.number, written, file, captions, label)


def checked_label(value: object, column: str) -> str:
    """Return a label as a text, which is empty if there is no label; raise BadInput for a value that is no label."""
    # A missing number is nan in tables that pandas writes, and nan differs from itself.
    label = "" if value is None or value != value else value
    # A label may be a number in JSON and in Parquet; True and False are numbers to Python.
    if not isinstance(label, str | int | float):
        raise BadInput(f"{column} must be a text or a number, got {_kind(label)}")
    return trim(_text(str(label), column))


def checked_captions(value: object, column: str) -> tuple[str, ...]:
    """Return the captions of a field: a text or a list of texts; raise BadInput if there is none or an empty one."""
    texts: Sequence[object] = value if isinstance(value, list) else [value]
    if not texts:
        raise BadInput(f"{column} must hold a caption, got an empty list")
    captions = []
    for text in texts:
        if not isinstance(text, str):
            raise BadInput(f"{column} must be a text or a list of texts, got {_kind(text)}")
        caption = trim(_text(text, column))
        # A caption of control characters and invisible marks only is as empty as a caption of spaces.
        if all(unicodedata.category(character)[0] in "CZ" for character in caption):
            raise BadInput(f"{column} must not be empty")
        if _PYTHON_LIST.fullmatch(caption):
            raise BadInput(f'{column} must hold a list of captions as JSON, as in ["a", "b"], got {caption[:40]}')
        captions.append(caption)
    return tuple(captions)


def _text(text: str, column: str) -> str:
    """Return a text that can be encoded, and raise BadInput for another one."""
    # JSON can name half of a surrogate pair. Such a text can neither be written to a file nor be printed.
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        raise BadInput(f"{column} must be valid Unicode, got half of a surrogate pair (U+{code:04X})") from None
    return text


def _kind(value: object) -> str:
    # Parquet files of data set libraries often hold the bytes of the images.
    if isinstance(value, bytes | dict):
        return "data of another kind: save the images as files and their paths in the table"
    return "nothing" if value is None else f"a value of type {type(value).__name__}"
