"""Turn the records of a table into rows, one for each pair of image and caption, and check all of them."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NamedTuple

from drrho_clip.data.columns import ColumnNames
from drrho_clip.data.delimited import trim
from drrho_clip.data.images import inspect_images
from drrho_clip.data.tables import Record, Table, open_table
from drrho_clip.errors import BadInput
from drrho_clip.terminal.safe_text import shown

__all__ = ["Row", "read_rows"]

# A web address, such as https://example.org/a.png. A drive letter of Windows has one letter before the colon.
_ADDRESS: Final = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
# The list ['a', 'b'] is how Python writes a list of texts; in JSON the list is ["a", "b"].
_PYTHON_LIST: Final = re.compile(r"\[\s*'.*'\s*\]", re.DOTALL)


class Row(NamedTuple):
    """One pair of an image and a caption; a record with several captions gives several rows.

    Attributes
    ----------
    place : str
        The place of the record for messages, such as "row 3", where the header of a text table is row 1.
    written : str
        The image's path as the table writes it.
    file : Path
        The path to open.
    digest : bytes
        The identity of the file's content; see content.py.
    caption, label : str
        The label is empty if there is none.
    """

    place: str
    written: str
    file: Path
    digest: bytes
    caption: str
    label: str


class _Image(NamedTuple):
    """The fields of a record, which have been checked; the image has not been opened yet."""

    number: int
    written: str
    file: Path
    captions: tuple[str, ...]
    label: str


def read_rows(path: Path, names: ColumnNames) -> list[Row]:
    """Read and check every row of a table; the errors are those of `read_pairs`."""
    table = open_table(path, names)
    # All records are read before an error is raised, so that the message can count the records that are wrong.
    images: list[_Image] = []
    problems: list[tuple[int, str]] = []
    for record in table.records:
        try:
            images.append(_check(record, table))
        except BadInput as error:
            problems.append((record.number, str(error)))
    inspections = inspect_images(image.file for image in images)
    rows: list[Row] = []
    for image in images:
        digest, flaw = inspections[image.file]
        if flaw is not None:
            problems.append((image.number, f"{image.file} is not a readable image: {flaw}"))
        place = f"{table.unit} {image.number}"
        rows += [Row(place, image.written, image.file, digest, text, image.label) for text in image.captions]
    if problems:
        number, reason = min(problems)
        more = f" (and {len(problems) - 1} more such {table.unit}s)" if len(problems) > 1 else ""
        raise BadInput(shown(f"{path}, {table.unit} {number}: {reason}{more}"))
    if not rows:
        raise BadInput(f"{path} must have at least one row below its header, got none")
    return rows


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
    captions = _captions(record.captions, columns.caption)
    # A missing number is nan in tables that pandas writes, and nan differs from itself.
    label = "" if record.label is None or record.label != record.label else record.label
    # A label may be a number in JSON and in Parquet; True and False are numbers to Python.
    if not isinstance(label, str | int | float):
        raise BadInput(f"{columns.label} must be a text or a number, got {_kind(label)}")
    file = table.folder / written
    # Tables that were written on Windows separate folders by backslashes.
    if "\\" in written and not os.path.isfile(file):
        file = table.folder / written.replace("\\", "/")
    if not os.path.isfile(file):
        raise BadInput(f"there is no image file {table.folder / written}")
    return _Image(record.number, written, file, captions, trim(_text(str(label), str(columns.label))))


def _captions(value: object, column: str) -> tuple[str, ...]:
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
