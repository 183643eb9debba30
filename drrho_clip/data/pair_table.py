"""Read a table of image paths and captions, and check the images that it names."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final, NamedTuple

from drrho_clip.data.images import inspect_images
from drrho_clip.errors import BadInput

__all__ = ["Row", "read_rows"]

_DELIMITERS: Final = (",", "\t", ";")
_DEFAULT_LABEL: Final = "label"


class Row(NamedTuple):
    """One pair of a table.

    `number` is the row's number in a spreadsheet, in which the header is row 1. `written` is the image's path as the
    table writes it, `file` is the path to open, and `digest` identifies the content of that file (see content.py).
    """

    number: int
    written: str
    file: Path
    digest: bytes
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

    # All rows are read before an error is raised, so that the message can count the rows that are wrong.
    candidates: list[Row] = []
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
        else:
            candidates.append(Row(number, written, file, b"", caption, label))
    inspections = inspect_images(row.file for row in candidates)
    rows = []
    for row in candidates:
        digest, flaw = inspections[row.file]
        if flaw is None:
            rows.append(row._replace(digest=digest))
        else:
            problems.append((row.number, f"{row.file} is not a readable image: {flaw}"))
    if problems:
        number, reason = min(problems)
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
