"""The user's own pairs: a table of image paths and captions, or a folder of images with captions beside them.

All cheap checks run when the table is read, so that a run does not stop hours later because a file is missing. Images
are decoded when they are used.
"""

from __future__ import annotations

import hashlib
import os
import unicodedata
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Final

import numpy as np

from drrho_clip.data._checks import row_index, share, whole_number
from drrho_clip.data.columns import ColumnNames
from drrho_clip.data.content import DIGEST_SIZE, fingerprint_of, image_numbers
from drrho_clip.data.images import decode_image, one_line
from drrho_clip.data.pair_table import Row, read_rows
from drrho_clip.data.preprocess import resize
from drrho_clip.data.protocol import DataSplits, ImageReading, Int64, Sample, UInt8, ZeroShot
from drrho_clip.errors import BadInput, MissingExtra
from drrho_clip.terminal.safe_text import shown

__all__ = ["DEFAULT_PROMPT", "PairsDataset", "label_key", "pair_splits", "read_pairs"]

DEFAULT_PROMPT: Final = "a photo of a {}"
"""The text that stands for a class in zero-shot classification; ``{}`` is the place of the label."""

_ZERO_SHOT_SIZE: Final = 224
# Least number of images in each split. In a gallery of one image every answer would be right.
_LEAST_IMAGES: Final = 2


class PairsDataset:
    """Pairs of a table; an image is decoded when it is used.

    `read_pairs` and `pair_splits` make these data sets. An image keeps its size and is returned as RGB, rotated as its
    EXIF orientation says. Transparent parts become white, and of an animation the first picture is used.

    Attributes
    ----------
    name : str
    captions : tuple of str, length n
    labels : tuple of str, length n
        An empty text for each pair without a label.
    files : tuple of pathlib.Path, length n
    paths : tuple of str, length n
        The paths of the images as the table writes them.
    class_names : tuple of str
        The different labels of the table; if the splits have separate tables, of all tables.
    """

    def __init__(self, name: str, table: Path, rows: Sequence[Row], class_names: tuple[str, ...]) -> None:
        self.name = name
        self.captions = tuple(row.caption for row in rows)
        self.labels = tuple(row.label for row in rows)
        self.files = tuple(row.file for row in rows)
        self.paths = tuple(row.written for row in rows)
        self._table = table
        self._rows = tuple(rows)
        self.class_names = class_names

    def __repr__(self) -> str:
        """Return name, size and table."""
        return f"<{self.name}: {len(self)} pairs of {self._table}>"

    def __len__(self) -> int:
        """Return the number of pairs."""
        return len(self._rows)

    def __getitem__(self, index: int, /) -> Sample:
        """Return the pair with this row id, 0 .. n - 1 in the table's order; its image is decoded now.

        Raises
        ------
        BadInput
            The file cannot be decoded.
        """
        position = row_index(index, len(self))
        row = self._rows[position]
        return Sample(position, self._decode(row), row.caption)

    def fingerprint(self) -> str:
        """Return the SHA-256, in hex, of the rows' content: images, captions and labels, and not their paths."""
        parts = (part for row in self._rows for part in (row.digest, row.caption, row.label))
        return fingerprint_of([b"drrho pairs 2"], parts)

    def image_digests(self) -> UInt8:
        """Return the first 16 bytes of the SHA-256 of each row's image file, shape (n, 16)."""
        joined = b"".join(row.digest for row in self._rows)
        return np.frombuffer(joined, dtype=np.uint8).reshape(len(self), DIGEST_SIZE)

    @cached_property
    def image_ids(self) -> Int64:
        """Numbers of the rows' images, shape (n,): rows whose image files have equal bytes have equal numbers."""
        return image_numbers(self.image_digests())

    def subset(self, rows: Sequence[int] | Int64) -> PairsDataset:
        """Return the pairs of some rows as a new data set, numbered in the order of `rows`; the classes stay."""
        return PairsDataset(self.name, self._table, [self._rows[row] for row in rows], self.class_names)

    def zero_shot(self, *, image_size: int | None = None, resize_mode: ImageReading | str = "crop") -> ZeroShot | None:
        """Return the classification task whose classes are the labels, or None if there are fewer than two labels.

        The classes are all labels of the table; if the splits have separate tables, all labels of all tables. Labels
        that differ only in capitals and white space are one class, with the spelling that comes first. The images are
        those of this data set that have a label, as squares of side `image_size` (by default 224); see `resize`.

        Raises
        ------
        BadInput
            A file cannot be decoded.
        """
        size = _ZERO_SHOT_SIZE if image_size is None else whole_number(image_size, "image_size", at_least=1)
        labelled = [row for row in self._rows if label_key(row.label)]
        if len(self.class_names) < 2 or not labelled:
            return None
        images = np.empty((len(labelled), size, size, 3), dtype=np.uint8)
        for position, row in enumerate(labelled):
            images[position] = resize(self._decode(row)[None], size, resize_mode)[0]
        number = {label_key(name): position for position, name in enumerate(self.class_names)}
        labels = np.array([number[label_key(row.label)] for row in labelled], dtype=np.int64)
        return ZeroShot(
            self.class_names, tuple(DEFAULT_PROMPT.replace("{}", name) for name in self.class_names), images, labels
        )

    def _decode(self, row: Row) -> UInt8:
        try:
            return decode_image(row.file, row.digest)
        except MissingExtra:
            raise
        # For damaged files Pillow raises exceptions of almost any class.
        except Exception as error:
            reason = one_line(error)
            where = f"{self._table}, {row.place}"
            raise BadInput(shown(f"{where}: cannot decode image {row.file}: {reason}")) from error


def read_pairs(
    path: str | os.PathLike[str],
    *,
    image_column: str | None = None,
    caption_column: str | None = None,
    label_column: str | None = None,
) -> PairsDataset:
    r"""Read pairs of images and captions from a table or a folder.

    A table is a text file in UTF-8 with a header (CSV, TSV), JSON Lines (the suffix is .jsonl, .ndjson or .json) or
    Parquet. Commas, tabs or semicolons separate the fields of a text table; the separator of a table is the one that
    splits the header into the columns. Quotation marks either enclose fields, as in CSV, or are ordinary characters:
    `read_pairs` chooses the reading that gives every row as many fields as the header has. A byte-order mark and empty
    lines are skipped.

    In a folder, and in the folders below it, every image is read whose file name ends in a usual suffix. Each line of
    the text file (.txt) with the same name is a caption. Hidden files are left out.

    Parameters
    ----------
    path : path
        The table or folder. Image paths in a table are absolute or relative to the folder of the table.
    image_column, caption_column : str, optional
        Columns of the image's path and of the caption. By default the columns have usual names: "image", or else the
        only column among image_path, filepath, file_path, file_name, filename and path; "caption", or else the only
        column among captions, title, text and description. Capitals do not matter in these names. A field of the
        caption column may hold a list of captions; in a text table the list is written as JSON.
    label_column : str, optional
        Column with the class of each image, for zero-shot classification. By default a column "label" is used if the
        table has it.

    Returns
    -------
    PairsDataset
        One pair per image and caption, in the table's order. An image with several captions has several pairs.

    Raises
    ------
    BadInput
        The table is missing, empty, not UTF-8 or without the columns; or a row has the wrong number of fields, an empty
        caption, a web address in place of a path, or an image file that is missing or cannot be read. The message names
        the file, the number of the first bad row (the header is row 1) and the reason, and says how many more rows are
        bad.
    MissingExtra
        Pillow is not installed, or pyarrow for Parquet.

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
    rows = read_rows(table, ColumnNames(image_column, caption_column, label_column))
    return PairsDataset(table.stem, table, rows, _class_names(rows))


def pair_splits(
    path: str | os.PathLike[str],
    *,
    validation: str | os.PathLike[str] | None = None,
    test: str | os.PathLike[str] | None = None,
    validation_share: float = 0.1,
    test_share: float = 0.1,
    seed: int = 0,
    image_column: str | None = None,
    caption_column: str | None = None,
    label_column: str | None = None,
) -> DataSplits:
    """Read a table and hold out a part of its images for validation and test.

    A hash of the seed and of the image's content decides the split of an image. So the split does not change when rows
    are appended or files are renamed, and all captions of one image are in one split, also if the table names the image
    by several paths or has several copies of the file. A held-out split that would get fewer than two images also takes
    the images with the next hashes.

    Parameters
    ----------
    path : path
        The table, as `read_pairs` takes it.
    validation, test : path, optional
        Separate tables for these splits, with the same columns. No images of `path` are held out for such a split.
    validation_share, test_share : float
        Expected share of the images that are held out, in [0, 1]. The sum of the two shares must be below 1.
    seed : int
        At least 0; another seed holds out other images.
    image_column, caption_column, label_column
        As in `read_pairs`.

    Returns
    -------
    DataSplits
        No image is in two splits.

    Raises
    ------
    BadInput
        For the reasons of `read_pairs`, or because there are too few images or two tables share an image.
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

    def read(table: Path) -> list[Row]:
        return read_rows(table, ColumnNames(image_column, caption_column, label_column))

    table = Path(path)
    rows = read(table)
    keys = [row.digest.hex() for row in rows]
    # The images are sorted by their hashes: the first share is validation, the next is test, the rest is training.
    places = {key: _place(seed, key) for key in set(keys)}
    ordered = sorted(places, key=lambda key: (places[key], key))
    held: list[list[str]] = []
    start, limit = 0, 0.0
    for given, part in ((validation, shares[0]), (test, shares[1])):
        limit += part
        count = sum(place < limit for place in places.values()) - start
        stop = start if given is not None else start + max(count, _LEAST_IMAGES)
        held.append(ordered[start:stop])
        start = stop
    if len(ordered) - start < _LEAST_IMAGES:
        raise BadInput(
            f"{table} must have images for every split, got {len(ordered)} different ones, "
            f"of which {start} would be held out: lower the shares, or name tables for validation and test"
        )

    def select(chosen: Sequence[str]) -> list[Row]:
        kept = set(chosen)
        return [row for row, key in zip(rows, keys, strict=True) if key in kept]

    parts = [(table, select(ordered[start:]))]
    for given, chosen in zip((validation, test), held, strict=True):
        parts.append((table, select(chosen)) if given is None else (Path(given), read(Path(given))))
    _check_disjoint(parts)
    class_names = _class_names([row for _, part in parts for row in part])
    names = (table.stem, f"{table.stem}-validation", f"{table.stem}-test")
    return DataSplits(
        *(PairsDataset(name, source, part, class_names) for name, (source, part) in zip(names, parts, strict=True))
    )


def _place(seed: int, key: str) -> float:
    """Return an image's place in [0, 1): a hash, divided by the number of possible hashes; equal on every machine."""
    digest = hashlib.blake2b(f"{seed}\0{key}".encode(), digest_size=8).digest()
    # 53 bits of the hash are used, because a float64 holds 53 bits exactly.
    return (int.from_bytes(digest, "little") >> 11) / 2.0**53


def _class_names(rows: Sequence[Row]) -> tuple[str, ...]:
    """Return the first spelling of each class, sorted without regard to capitals."""
    spellings: dict[str, str] = {}
    for row in rows:
        spellings.setdefault(label_key(row.label), row.label)
    return tuple(spellings[key] for key in sorted(spellings) if key)


def label_key(label: str) -> str:
    """Return the text by which labels are compared: without capitals, and with single spaces between words.

    Examples
    --------
    >>> label_key(" Red  Car") == label_key("red car")
    True
    """
    # One letter with an accent can be written as one character or as two, and the texts look the same.
    return " ".join(unicodedata.normalize("NFC", label).split()).casefold()


def _check_disjoint(parts: Sequence[tuple[Path, Sequence[Row]]]) -> None:
    # `seen` holds, for each image, the split, the table and the place at which the image came first.
    seen: dict[bytes, tuple[int, Path, str]] = {}
    shared: dict[bytes, str] = {}
    for split, (table, rows) in enumerate(parts):
        for row in rows:
            earlier = seen.setdefault(row.digest, (split, table, row.place))
            if earlier[0] != split:
                where = f"{table}, {row.place}: image {row.file} is in another split too ({earlier[1]}, {earlier[2]})"
                shared.setdefault(row.digest, where)
    if shared:
        raise BadInput(
            f"{shown(next(iter(shared.values())))}; training, validation and test must not share images, got "
            f"{len(shared)} shared images"
        )
