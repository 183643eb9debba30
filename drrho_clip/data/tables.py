"""Read records of images and captions from the files that people have: text tables, JSON Lines, Parquet, folders.

Every reader returns a `Table`. A record of a table is one image with its captions; the fields are as the file has them,
and `pair_table` checks them. So a new kind of file needs a reader here and nothing else.
"""

from __future__ import annotations

import codecs
import json
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

from drrho_clip.data.columns import ColumnNames, Columns
from drrho_clip.data.delimited import LINE_END, parse_delimited, trim
from drrho_clip.errors import BadInput, MissingExtra
from drrho_clip.terminal.safe_text import shown

__all__ = ["IMAGE_SUFFIXES", "Record", "Table", "open_table"]

IMAGE_SUFFIXES: Final = frozenset(
    f".{name}"
    for name in (
        *("png", "apng", "jpg", "jpeg", "jpe", "jfif", "webp", "gif", "bmp", "dib", "tif", "tiff"),
        *("ppm", "pgm", "pbm", "pnm", "pfm", "jp2", "j2k", "avif"),
    )
)
"""Suffixes of the image files that a folder of images with captions may hold."""

_JSON_SUFFIXES: Final = (".jsonl", ".ndjson", ".json")
_PARQUET_MAGIC: Final = b"PAR1"
# The beginnings of files that are often given in place of a table, and the remedy.
_OTHER_FILES: Final = (
    (b"PK\x03\x04", "a spreadsheet or a zip archive: export it as CSV"),
    (b"\xd0\xcf\x11\xe0", "a spreadsheet: export it as CSV"),
    (b"\x1f\x8b", "a file that gzip has compressed: unpack it"),
    (b"SQLite format 3", "a database: export it as CSV"),
)
# The longer marks stand first, because the mark of UTF-32 begins with that of UTF-16.
_BYTE_ORDER_MARKS: Final = (
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)


class Record(NamedTuple):
    """One image with its captions.

    Attributes
    ----------
    number : int
        The number of the record in its file, which messages show.
    image : object
        The path of the image, as the file has it; a text if the file is right.
    captions : object
        The caption, or a list of captions.
    label : object
        The label; None if there is no label.
    flaw : str or None
        The reason why the record cannot be read; then the other fields are None.
    """

    number: int
    image: object = None
    captions: object = None
    label: object = None
    flaw: str | None = None


class Table(NamedTuple):
    """The records of one file or folder.

    Attributes
    ----------
    path : Path
        The file or folder.
    folder : Path
        The folder to which relative paths of images refer.
    unit : str
        The name of a record in messages: "row", "line" or "image".
    columns : Columns
        The names of the fields, for messages.
    records : sequence of Record
    """

    path: Path
    folder: Path
    unit: str
    columns: Columns
    records: Sequence[Record]


def open_table(path: Path, names: ColumnNames) -> Table:
    """Read a table of any kind; the content decides the kind, except that JSON Lines are known by their suffix.

    Raises
    ------
    BadInput
        The file cannot be read as a table, or the columns are not found.
    MissingExtra
        The file is Parquet and pyarrow is not installed.
    """
    if os.path.isdir(path):
        return _read_folder(path)
    try:
        if _read_bytes(path, len(_PARQUET_MAGIC)) == _PARQUET_MAGIC:
            columns, records = _parquet_records(path, names)
            return Table(path, path.parent, "row", columns, records)
        text = _decode(_read_bytes(path))
        if not trim(text):
            raise BadInput("must have a header and rows, got an empty file")
        if path.suffix.lower() in _JSON_SUFFIXES:
            columns, records = _json_records(text, names)
            return Table(path, path.parent, "line", columns, records)
        columns, records = _text_records(path, text, names)
        return Table(path, path.parent, "row", columns, records)
    except BadInput as error:
        # The readers do not know the name of the file.
        separator = ", " if str(error).startswith(("row ", "line ")) else " "
        raise BadInput(shown(f"{path}{separator}{error}")) from error
    # A path with a zero byte is a ValueError.
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise BadInput(shown(f"cannot read {path}: {reason}")) from error


def _read_bytes(path: Path, size: int = -1) -> bytes:
    """Return the first bytes of a file, or all bytes."""
    # A named pipe would wait for a writer, and it could not be read again when the run is resumed.
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError("it is not a regular file")
    with path.open("rb") as file:
        return file.read(size)


def _decode(content: bytes) -> str:
    """Return the text of a file; the message of the error names the encoding or the kind of file that was detected."""
    for start, kind in _OTHER_FILES:
        if content.startswith(start):
            raise BadInput(f"must be a table, got {kind}")
    encoding = next((name for mark, name in _BYTE_ORDER_MARKS if content.startswith(mark)), None)
    if encoding is not None:
        raise BadInput(f"must be UTF-8, got {encoding}: save it as UTF-8 (iconv -f {encoding} -t UTF-8)")
    # Without a mark, text in UTF-16 has a zero byte for each letter, digit and separator. A program can also append
    # lines in UTF-16 to a table in UTF-8.
    for number, row in enumerate(content.split(b"\n") if b"\x00" in content else (), start=1):
        zeros = row.count(0)
        if 3 * zeros >= len(row) > 2:
            encoding = "UTF-32" if 3 * zeros >= 2 * len(row) else "UTF-16"
            raise BadInput(f"must be UTF-8, got {encoding} on line {number}: save it as UTF-8")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise BadInput(
            f"must be UTF-8, got byte 0x{content[error.start]:02x} on line {line}: save it as UTF-8"
        ) from error


def _text_records(path: Path, text: str, names: ColumnNames) -> tuple[Columns, list[Record]]:
    def names_image(header: Sequence[str], fields: Sequence[str]) -> bool:
        column = names.image_column or names.choose(header).image
        written = trim(fields[header.index(column)])
        return os.path.splitext(written)[1].lower() in IMAGE_SUFFIXES or os.path.isfile(path.parent / written)

    reading = parse_delimited(text, names.in_header, names_image)
    header = reading.header
    columns = names.choose(header)
    image, caption = header.index(columns.image), header.index(columns.caption)
    label = None if columns.label is None else header.index(columns.label)
    records = []
    for number, fields in reading.records:
        if len(fields) != len(header):
            flaw = f"must have {len(header)} fields as the header has, got {len(fields)}"
            records.append(Record(number, flaw=flaw))
        else:
            captions = _listed(fields[caption])
            records.append(Record(number, fields[image], captions, None if label is None else fields[label]))
    return columns, records


def _listed(field: str) -> object:
    """Return the list that a field holds as JSON, or the field itself."""
    text = trim(field)
    if text.startswith("[") and text.endswith("]"):
        # A caption may stand in brackets without being a list of texts.
        try:
            values = _from_json(text)
        except (ValueError, RecursionError):
            return field
        if all(isinstance(value, str) for value in values):
            return values
    return field


def _from_json(text: str) -> Any:
    def unique(members: list[tuple[str, Any]]) -> dict[str, Any]:
        fields = dict(members)
        if len(fields) != len(members):
            raise ValueError("a field is there twice")
        return fields

    return json.loads(text, object_pairs_hook=unique)


def _json_records(text: str, names: ColumnNames) -> tuple[Columns, list[Record]]:
    if trim(text).startswith("["):
        raise BadInput("must hold one JSON object on each line, got a list: write each object on its own line")
    objects: list[tuple[int, Mapping[str, Any] | str]] = []
    header: dict[str, None] = {}
    # JSON may hold the other characters at which `str.splitlines` splits.
    for number, line in enumerate(text.split("\n"), start=1):
        if not trim(line):
            continue
        try:
            value = _from_json(trim(line))
        except RecursionError:
            value = "nested too deeply"
        except ValueError as error:
            value = " ".join(str(error).split())
        else:
            if isinstance(value, Mapping):
                header |= dict.fromkeys(value)
            else:
                value = f"got a value of type {type(value).__name__}"
        objects.append((number, value))
    if not header:
        raise BadInput(f"line {objects[0][0]}: must be a JSON object on one line: {objects[0][1]}")
    columns = names.choose(list(header))
    return columns, [_from_object(number, value, columns) for number, value in objects]


def _from_object(number: int, value: Mapping[str, Any] | str, columns: Columns) -> Record:
    if isinstance(value, str):
        return Record(number, flaw=f"must be a JSON object on one line: {value}")
    missing = [name for name in (columns.image, columns.caption) if name not in value]
    if missing:
        return Record(number, flaw=f"must have the field {missing[0]!r}, got the fields {', '.join(value)}")
    label = None if columns.label is None else value.get(columns.label)
    return Record(number, value[columns.image], value[columns.caption], label)


def _parquet_records(path: Path, names: ColumnNames) -> tuple[Columns, list[Record]]:
    try:
        from pyarrow import parquet
    except ImportError:
        raise MissingExtra("reading Parquet files", "pyarrow") from None
    try:
        with parquet.ParquetFile(path, page_checksum_verification=True) as file:
            header = file.schema_arrow.names
            columns = names.choose(header)
            needed = [name for name in columns if name is not None]
            table = file.read(columns=needed)
            about = file.metadata
            in_groups = sum(about.row_group(number).num_rows for number in range(about.num_row_groups))
            # No checksum covers the description of the file, but the description holds the number of rows twice.
            if not about.num_rows == in_groups == table.num_rows:
                raise BadInput(f"must have the {about.num_rows} rows of its description, got {table.num_rows} rows")
            values = {name: table.column(name).to_pylist() for name in needed}
    except BadInput:
        raise
    # For damaged files pyarrow raises exceptions of several classes that share no base class of its own.
    except Exception as error:
        raise BadInput(f"must be a Parquet file: {' '.join(str(error).split())}") from error
    size = len(values[columns.image])
    labels = [None] * size if columns.label is None else values[columns.label]
    fields = zip(values[columns.image], values[columns.caption], labels, strict=True)
    return columns, [Record(number, *record) for number, record in enumerate(fields, start=1)]


def _read_folder(folder: Path) -> Table:
    """Read the images of a folder and of the folders in it; each line of the text file beside an image is a caption."""
    images: list[Path] = []
    texts: dict[Path, Path] = {}
    for path in _visible_files(folder):
        if path.suffix.lower() in IMAGE_SUFFIXES:
            images.append(path)
        elif path.suffix.lower() == ".txt":
            texts[path.with_suffix("")] = path
    if not images:
        raise BadInput(shown(f"{folder} must hold images with captions in text files beside them, got no image"))
    # A text without an image is a pair that would be lost: its image is missing or has an unknown format.
    lone = sorted(texts.keys() - {image.with_suffix("") for image in images})
    if lone:
        raise BadInput(
            shown(f"{folder} must have an image of a known format beside every text file, got {texts[lone[0]]} without")
            + f" an image ({len(lone)} such files)"
        )
    records = []
    for number, image in enumerate(images, start=1):
        written = str(image.relative_to(folder))
        text = texts.get(image.with_suffix(""))
        try:
            if text is None:
                raise BadInput("there is no such file")
            captions = [line for line in LINE_END.split(_decode(_read_bytes(text))) if trim(line)]
        except (BadInput, OSError) as error:
            name = image.with_suffix(".txt").name
            records.append(Record(number, flaw=f"{written} must have captions in {name} beside it, got: {error}"))
        else:
            records.append(Record(number, written, captions))
    return Table(folder, folder, "image", Columns("image", "caption", None), records)


def _visible_files(folder: Path) -> Iterator[Path]:
    """Yield the files of a folder and of the folders in it, in the order of their names, without hidden files."""

    def refuse(error: OSError) -> None:
        # Without this function, `os.walk` leaves out a folder that cannot be read.
        raise BadInput(shown(f"cannot read {error.filename}: {error.strerror}"))

    visited: set[str] = set()
    for parent, folders, files in os.walk(folder, onerror=refuse, followlinks=True):
        # Links to folders can lead in a circle, so no folder is visited twice.
        real = os.path.realpath(parent)
        if real in visited:
            folders.clear()
            continue
        visited.add(real)
        # Programs put hidden files beside pictures, such as "._photo.png".
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(parent, name) for name in sorted(files) if not name.startswith("."))
