"""The user's own pairs: a table (CSV or TSV) of image path and caption.

The table is UTF-8 with a header line. Everything that can be checked cheaply is checked when it is read, so that a run
does not stop hours later at a file that was never there; images are decoded when they are asked for.
"""

from __future__ import annotations

import csv
import hashlib
import io
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np

from drrho_clip.data._checks import row_index, share, whole_number
from drrho_clip.data.preprocess import resize
from drrho_clip.data.protocol import DataSplits, Sample, UInt8, ZeroShot
from drrho_clip.errors import BadInput, MissingExtra

__all__ = ["PairsDataset", "pair_splits", "read_pairs"]

_DELIMITERS: Final = (",", "\t", ";")
_DEFAULT_LABEL: Final = "label"
_ZERO_SHOT_SIZE: Final = 224
_LEAST_IMAGES: Final = 2  # a gallery of one would always be right


class _Row(NamedTuple):
    """One pair. `number` counts as a spreadsheet does: the header is row 1."""

    number: int
    written: str
    file: Path
    size: int
    caption: str
    label: str


class PairsDataset:
    """Pairs of a table; images are decoded when they are asked for.

    Made by `read_pairs` and `pair_splits`. An image keeps its own size and comes as RGB, turned as its EXIF orientation
    says; what is transparent becomes white, and of an animation the first picture counts.

    Attributes
    ----------
    name : str
    captions : tuple of str, length n
    labels : tuple of str, length n
        Empty texts where the table has no label.
    files : tuple of pathlib.Path, length n
    """

    def __init__(self, name: str, table: Path, rows: Sequence[_Row], class_names: tuple[str, ...]) -> None:
        self.name = name
        self.captions = tuple(row.caption for row in rows)
        self.labels = tuple(row.label for row in rows)
        self.files = tuple(row.file for row in rows)
        self._table = table
        self._rows = tuple(rows)
        self._class_names = class_names

    def __repr__(self) -> str:
        """Name, size and table."""
        return f"<{self.name}: {len(self)} pairs of {self._table}>"

    def __len__(self) -> int:
        """Return the number of pairs."""
        return len(self._rows)

    def __getitem__(self, index: int, /) -> Sample:
        """Return the pair with that row id, 0 .. n - 1 in the table's order; its image is decoded now.

        Raises
        ------
        BadInput
            The file cannot be decoded.
        """
        position = row_index(index, len(self))
        row = self._rows[position]
        return Sample(position, self._decode(row), row.caption)

    def fingerprint(self) -> str:
        """Return the SHA-256, in hex, of the rows: image paths as written, file sizes, captions and labels."""
        digest = hashlib.sha256(b"drrho pairs 1")
        for row in self._rows:
            for part in (row.written, str(row.size), row.caption, row.label):
                encoded = part.encode()
                digest.update(len(encoded).to_bytes(8, "little"))
                digest.update(encoded)
        return digest.hexdigest()

    def zero_shot(self, *, image_size: int | None = None) -> ZeroShot | None:
        """Return the classification task of the label column, or None where there are fewer than two labels.

        The classes are those of the whole table; the images are those of this split that have a label, cut to a square
        of `image_size` (224 when left out).

        Raises
        ------
        BadInput
            A file cannot be decoded.
        """
        size = _ZERO_SHOT_SIZE if image_size is None else whole_number(image_size, "image_size", at_least=1)
        labelled = [row for row in self._rows if row.label]
        if len(self._class_names) < 2 or not labelled:
            return None
        images = np.empty((len(labelled), size, size, 3), dtype=np.uint8)
        for position, row in enumerate(labelled):
            images[position] = resize(self._decode(row)[None], size)[0]
        number = {label: position for position, label in enumerate(self._class_names)}
        labels = np.array([number[row.label] for row in labelled], dtype=np.int64)
        return ZeroShot(self._class_names, tuple(f"a photo of a {name}" for name in self._class_names), images, labels)

    def _decode(self, row: _Row) -> UInt8:
        try:
            return _decode(row.file)
        except MissingExtra:
            raise
        except Exception as error:  # Pillow's readers raise nearly everything on damaged files
            reason = _one_line(error)
            raise BadInput(f"{self._table}, row {row.number}: cannot decode image {row.file}: {reason}") from error


def read_pairs(
    path: str | os.PathLike[str],
    *,
    image_column: str = "image",
    caption_column: str = "caption",
    label_column: str | None = None,
) -> PairsDataset:
    r"""Read a table of image path and caption.

    Fields are parted by commas, tabs or semicolons, whichever cuts the header into the wanted columns. A byte-order
    mark is skipped, and so are empty lines.

    Parameters
    ----------
    path : path
        UTF-8, with a header. Image paths in it are relative to its own folder, or absolute.
    image_column, caption_column : str
        Names in the header.
    label_column : str, optional
        Column with each image's class, for zero-shot classification; "label" when left out and there is one.

    Returns
    -------
    PairsDataset
        One pair per row, in the table's order.

    Raises
    ------
    BadInput
        The table is missing, empty, not UTF-8 or without the columns; or a row has the wrong number of fields, an empty
        caption, or an image that is missing or not one. The message names file, row (as a spreadsheet counts) and
        reason of the first, and how many more there are.
    MissingExtra
        Pillow is not installed.

    Examples
    --------
    >>> import pathlib, tempfile
    >>> from PIL import Image
    >>> folder = pathlib.Path(tempfile.mkdtemp())
    >>> Image.new("RGB", (12, 8), "red").save(folder / "red.png")
    >>> _ = (folder / "pairs.csv").write_text("image,caption\nred.png,something red\n")
    >>> data = read_pairs(folder / "pairs.csv")
    >>> data[0].image.shape, data[0].caption
    ((8, 12, 3), 'something red')
    """
    table = Path(path)
    rows = _read_rows(table, image_column, caption_column, label_column)
    return PairsDataset(table.stem, table, rows, _class_names(rows))


def pair_splits(
    path: str | os.PathLike[str],
    *,
    validation: str | os.PathLike[str] | None = None,
    test: str | os.PathLike[str] | None = None,
    validation_share: float = 0.1,
    test_share: float = 0.1,
    seed: int = 0,
    image_column: str = "image",
    caption_column: str = "caption",
    label_column: str | None = None,
) -> DataSplits:
    """Read a table and hold some of its images out.

    An image's split follows from a hash of the seed and its path as written: it does not change when rows are appended,
    and all captions of one image fall on one side. A held-out split that gets fewer than two images this way takes
    those whose hashes come next.

    Parameters
    ----------
    path : path
        The table, as `read_pairs` takes it.
    validation, test : path, optional
        Tables of their own for these splits, with the same columns; nothing of `path` is held out for them then.
    validation_share, test_share : float
        In [0, 1]: expected share of the images that are held out. Together below 1.
    seed : int
        At least 0; another seed holds other images out.
    image_column, caption_column, label_column
        As in `read_pairs`.

    Returns
    -------
    DataSplits
        No image is in two of them.

    Raises
    ------
    BadInput
        As in `read_pairs`; or there are too few images, or tables share one.
    MissingExtra
        Pillow is not installed.
    """
    whole_number(seed, "seed", at_least=0)
    shares = (
        0.0 if validation is not None else share(validation_share, "validation_share"),
        0.0 if test is not None else share(test_share, "test_share"),
    )
    if sum(shares) >= 1.0:
        raise BadInput(f"validation_share + test_share must stay below 1, got {sum(shares):g}")

    def read(table: Path) -> list[_Row]:
        return _read_rows(table, image_column, caption_column, label_column)

    table = Path(path)
    rows = read(table)
    keys = _image_keys(rows)
    places = {key: _place(seed, key) for key in set(keys)}
    ordered = sorted(places, key=lambda key: (places[key], key))
    held: list[list[str]] = []
    start, limit = 0, 0.0
    for given, part in ((validation, shares[0]), (test, shares[1])):
        limit += part
        wanted = sum(place < limit for place in places.values()) - start
        stop = start if given is not None else start + max(wanted, _LEAST_IMAGES)
        held.append(ordered[start:stop])
        start = stop
    if len(ordered) - start < _LEAST_IMAGES:
        raise BadInput(
            f"{table} must have images for every split, got {len(ordered)} different ones, "
            f"of which {start} would be held out: lower the shares, or name tables for validation and test"
        )

    def select(chosen: Sequence[str]) -> list[_Row]:
        wanted = set(chosen)
        return [row for row, key in zip(rows, keys, strict=True) if key in wanted]

    parts = [(table, select(ordered[start:]))]
    for given, chosen in zip((validation, test), held, strict=True):
        parts.append((table, select(chosen)) if given is None else (Path(given), read(Path(given))))
    _check_disjoint(parts)
    class_names = _class_names([row for _, part in parts for row in part])
    names = (table.stem, f"{table.stem}-validation", f"{table.stem}-test")
    return DataSplits(
        *(PairsDataset(name, source, part, class_names) for name, (source, part) in zip(names, parts, strict=True))
    )


def _read_rows(table: Path, image_column: str, caption_column: str, label_column: str | None) -> list[_Row]:
    text = _read_text(table)
    records, header = _parse(table, text, (image_column, caption_column))
    wanted = [image_column, caption_column] + ([] if label_column is None else [label_column])
    for column in wanted:
        if header.count(column) != 1:
            raise BadInput(f"{table} must have one column named {column!r}, got the columns {', '.join(header)}")
    if label_column is None and header.count(_DEFAULT_LABEL) == 1:
        label_column = _DEFAULT_LABEL
    check_image = _image_checker()

    rows: list[_Row] = []
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
            rows.append(_Row(number, written, file, file.stat().st_size, caption, label))
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
    if not text.strip():
        raise BadInput(f"{table} must have a header and rows, got an empty file")
    return text


def _parse(table: Path, text: str, wanted: tuple[str, str]) -> tuple[list[tuple[int, list[str]]], list[str]]:
    """Return the numbered records below the header, and the header."""
    headers = {mark: _header(text, mark) for mark in _DELIMITERS}
    # Where none fits, the one that finds most columns makes the error that follows easiest to read.
    delimiter = max(headers, key=lambda mark: (set(wanted) <= set(headers[mark]), len(headers[mark])))
    records = []
    try:
        # Blank lines count as rows, as in a spreadsheet, but are passed over.
        for number, fields in enumerate(_reader(text, delimiter), start=1):
            if _holds_text(fields):
                records.append((number, fields))
    except csv.Error as error:
        last = records[-1][0] if records else 0
        raise BadInput(f"{table}, after row {last}: cannot be read as a table: {error}") from error
    return records[1:], [field.strip() for field in records[0][1]]


def _header(text: str, delimiter: str) -> list[str]:
    """Return the header cut at that delimiter, or nothing where that cannot be read."""
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
    """Return a function that tells why a file is no image, or None: it reads headers, not pixels."""
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError:
        raise MissingExtra("reading images", "Pillow") from None

    def check(file: Path) -> str | None:
        try:
            with Image.open(file) as picture:
                if picture.mode == "F":
                    return "its pixels are floating-point numbers of unknown range"
                picture.verify()
        except UnidentifiedImageError:
            return "no image format that Pillow knows"
        except Exception as error:  # Pillow's readers raise nearly everything on damaged files
            return _one_line(error)
        return None

    return check


def _decode(file: Path) -> UInt8:
    try:
        from PIL import Image, ImageOps
    except ImportError:
        raise MissingExtra("reading images", "Pillow") from None
    with Image.open(file) as opened:
        picture = ImageOps.exif_transpose(opened)
        if picture.mode.startswith("I"):  # 16 bits a pixel: Pillow's own conversion would cut off all above 255
            grey = np.minimum(np.asarray(picture).astype(np.int64) >> 8, 255).astype(np.uint8)
            return np.repeat(grey[..., None], 3, axis=-1)
        if picture.has_transparency_data:
            white = Image.new("RGBA", picture.size, "white")
            picture = Image.alpha_composite(white, picture.convert("RGBA"))
        return np.array(picture.convert("RGB"), dtype=np.uint8)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _image_keys(rows: Sequence[_Row]) -> list[str]:
    """Return what names each row's image: its path as the table writes it first, whatever way later rows write it."""
    first: dict[str, str] = {}
    return [
        first.setdefault(os.path.realpath(row.file), os.path.normpath(row.written).replace(os.sep, "/")) for row in rows
    ]


def _place(seed: int, key: str) -> float:
    """Return the image's place in [0, 1), the same on every machine."""
    digest = hashlib.blake2b(f"{seed}\0{key}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) / 2.0**53


def _class_names(rows: Sequence[_Row]) -> tuple[str, ...]:
    return tuple(sorted({row.label for row in rows} - {""}))


def _check_disjoint(parts: Sequence[tuple[Path, Sequence[_Row]]]) -> None:
    seen: dict[str, tuple[int, Path, int]] = {}
    for split, (table, rows) in enumerate(parts):
        for row in rows:
            earlier = seen.setdefault(os.path.realpath(row.file), (split, table, row.number))
            if earlier[0] != split:
                raise BadInput(
                    f"{table}, row {row.number}: image {row.file} is in another split too "
                    f"({earlier[1]}, row {earlier[2]}); training, validation and test must not share images"
                )
