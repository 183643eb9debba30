"""Read a table of image paths and captions, and the images that it names."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np

from drrho_clip.data.protocol import UInt8
from drrho_clip.errors import BadInput, MissingExtra

__all__ = ["Row", "decode_image", "one_line", "read_rows"]

_DELIMITERS: Final = (",", "\t", ";")
_DEFAULT_LABEL: Final = "label"


class Row(NamedTuple):
    """One pair of a table.

    `number` is the row's number in a spreadsheet, in which the header is row 1. `written` is the image's path as the
    table writes it, `file` is the path to open, and `size` is the number of bytes of that file.
    """

    number: int
    written: str
    file: Path
    size: int
    caption: str
    label: str


def read_rows(table: Path, image_column: str, caption_column: str, label_column: str | None) -> list[Row]:
    """Read and check every row of a table; the arguments and errors are those of `read_pairs`."""
    text = _read_text(table)
    records, header = _parse(table, text, (image_column, caption_column))
    columns = [image_column, caption_column] + ([] if label_column is None else [label_column])
    for column in columns:
        if header.count(column) != 1:
            raise BadInput(f"{table} must have one column named {column!r}, got the columns {', '.join(header)}")
    if label_column is None and header.count(_DEFAULT_LABEL) == 1:
        label_column = _DEFAULT_LABEL
    check_image = _image_checker()

    # All rows are read before an error is raised, so that the message can count the rows that are wrong.
    rows: list[Row] = []
    problems: list[tuple[int, str]] = []
    for number, fields in records:
        if len(fields) != len(header):
            problems.append((number, f"must have {len(header)} fields as the header has, got {len(fields)}"))
            continue
        record = dict(zip(header, fields, strict=True))
        written, caption = record[image_column].strip(), record[caption_column].strip()
        label = "" if label_column is None else record[label_column].strip()
        file = table.parent / written
        if not written:
            problems.append((number, f"{image_column} must be a path, got an empty field"))
        elif not caption:
            problems.append((number, f"{caption_column} must not be empty"))
        elif not os.path.isfile(file):
            problems.append((number, f"there is no image file {file}"))
        elif (reason := check_image(file)) is not None:
            problems.append((number, f"{file} is not a readable image: {reason}"))
        else:
            rows.append(Row(number, written, file, file.stat().st_size, caption, label))
    if problems:
        number, reason = problems[0]
        more = f" (and {len(problems) - 1} more such rows)" if len(problems) > 1 else ""
        raise BadInput(f"{table}, row {number}: {reason}{more}")
    if not rows:
        raise BadInput(f"{table} must have at least one row below its header, got none")
    return rows


def _read_text(table: Path) -> str:
    try:
        content = table.read_bytes()
    except OSError as error:
        raise BadInput(f"cannot read {table}: {error.strerror or error}") from error
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise BadInput(
            f"{table} must be UTF-8, got byte 0x{content[error.start]:02x} on line {line}: save it as UTF-8"
        ) from error
    # A file of white space only is refused here: it has no header, but the code below needs a header.
    if not text.strip():
        raise BadInput(f"{table} must have a header and rows, got an empty file")
    return text


def _parse(table: Path, text: str, columns: tuple[str, str]) -> tuple[list[tuple[int, list[str]]], list[str]]:
    """Return the numbered records below the header, and the header."""
    headers = {mark: _header(text, mark) for mark in _DELIMITERS}
    # The right delimiter splits the header into columns among which the named columns are. If no delimiter does so, the
    # delimiter that gives most columns is the best guess, and the error message that follows lists these columns.
    delimiter = max(headers, key=lambda mark: (set(columns) <= set(headers[mark]), len(headers[mark])))
    records = []
    try:
        # Blank lines count as rows, as in a spreadsheet, but are skipped.
        for number, fields in enumerate(_reader(text, delimiter), start=1):
            if _holds_text(fields):
                records.append((number, fields))
    except csv.Error as error:
        last = records[-1][0] if records else 0
        raise BadInput(f"{table}, after row {last}: cannot be read as a table: {error}") from error
    return records[1:], [field.strip() for field in records[0][1]]


def _header(text: str, delimiter: str) -> list[str]:
    """Return the header split at a delimiter, or an empty list if csv cannot split it."""
    try:
        first = next((fields for fields in _reader(text, delimiter) if _holds_text(fields)), [])
    except csv.Error:
        return []
    return [field.strip() for field in first]


def _holds_text(fields: Sequence[str]) -> bool:
    return any(field.strip() for field in fields)


def _reader(text: str, delimiter: str) -> Iterator[list[str]]:
    return csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True, strict=True)


def _image_checker() -> Callable[[Path], str | None]:
    """Return a function that returns the reason why a file is not an image, or None if the file is an image."""
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError:
        raise MissingExtra("reading images", "Pillow") from None

    def check(file: Path) -> str | None:
        try:
            # Opening reads the header and `verify` looks for broken files; neither decodes the pixels.
            with Image.open(file) as picture:
                if picture.mode == "F":
                    return "its pixels are floating-point numbers of unknown range"
                picture.verify()
        except UnidentifiedImageError:
            return "no image format that Pillow knows"
        # For damaged files Pillow raises exceptions of almost any class.
        except Exception as error:
            return one_line(error)
        return None

    return check


def decode_image(file: Path) -> UInt8:
    """Return an image file as RGB, shape (H, W, 3), rotated by the EXIF orientation; transparent parts become white."""
    try:
        from PIL import Image, ImageOps
    except ImportError:
        raise MissingExtra("reading images", "Pillow") from None
    with Image.open(file) as opened:
        picture = ImageOps.exif_transpose(opened)
        if picture.mode.startswith("I"):
            # The upper 8 of the 16 bits per pixel are kept. Pillow's conversion would make all values above 255 white.
            grey = np.minimum(np.asarray(picture).astype(np.int64) >> 8, 255).astype(np.uint8)
            return np.repeat(grey[..., None], 3, axis=-1)
        # Pillow's conversion to RGB drops the transparency and shows colours that are invisible in the picture.
        if picture.has_transparency_data:
            white = Image.new("RGBA", picture.size, "white")
            picture = Image.alpha_composite(white, picture.convert("RGBA"))
        return np.array(picture.convert("RGB"), dtype=np.uint8)


def one_line(error: Exception) -> str:
    """Return the message of an error on one line, or the name of its class if it has no message."""
    return " ".join(str(error).split()) or type(error).__name__
