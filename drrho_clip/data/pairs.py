"""The user's own pairs as a data set, and the reader of tables and folders.

All cheap checks run when the data are read, so that a run does not stop hours later because a file is missing. Images
are decoded when they are used.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from drrho_clip.data._checks import row_index, whole_number
from drrho_clip.data.columns import ColumnNames
from drrho_clip.data.content import fingerprint_of, image_numbers
from drrho_clip.data.images import Changed, one_line
from drrho_clip.data.labels import label_key
from drrho_clip.data.pair_source import ChosenTexts, ImageStore, PairSource, TextColumn, require_readable
from drrho_clip.data.pair_table import read_table
from drrho_clip.data.preprocess import resize
from drrho_clip.data.protocol import ImageReading, Int64, Sample, UInt8, UnreadableImage, ZeroShot
from drrho_clip.data.unreadable import UnreadableRows
from drrho_clip.errors import BadInput, MissingExtra
from drrho_clip.terminal.safe_text import shown

__all__ = ["DEFAULT_PROMPT", "PairsDataset", "read_pairs"]

DEFAULT_PROMPT: Final = "a photo of a {}"
"""The text that stands for a class in zero-shot classification; ``{}`` is the place of the label."""

_ZERO_SHOT_SIZE: Final = 224
# The number of the test part in `PairSource.parts`.
_TEST_PART: Final = 2


class PairsDataset:
    """Pairs of a source; an image is decoded when it is used.

    `open_data`, `read_pairs` and `pair_splits` make these data sets. An image of a file keeps its size and is returned
    as RGB, rotated as its EXIF orientation says. Transparent parts become white, and of an animation the first picture
    is used.

    Parameters
    ----------
    source : PairSource
        The pairs and their images.
    name : str, optional
        A short name; by default that of the source.
    rows : ndarray of int64, shape (n,), optional
        The pairs of the source that belong to the data set, in order; by default all pairs.
    class_names : tuple of str, optional
        The classes; by default the different labels of the source.
    captions : sequence of str, length n, optional
        Captions in place of those of the source.
    max_unreadable : float
        The largest share of the pairs, in [0, 1], whose images may turn out to be unreadable later.

    Attributes
    ----------
    name : str
    source : PairSource
    captions : sequence of str, length n
        A tuple, or a sequence that reads the captions from an index when they are used.
    class_names : tuple of str
        The different labels of the table; if the splits have separate tables, of all tables.
    unreadable : dict of int to str
        Rows whose images turned out to be unreadable when they were used, with the reason.
    """

    def __init__(
        self,
        source: PairSource,
        *,
        name: str | None = None,
        rows: Int64 | None = None,
        class_names: tuple[str, ...] | None = None,
        captions: Sequence[str] | None = None,
        max_unreadable: float = 0.0,
    ) -> None:
        self.name = source.name if name is None else name
        self.source = source
        self.max_unreadable = max_unreadable
        self.unreadable: dict[int, str] = {}
        self.class_names = source.class_names if class_names is None else class_names
        self._rows = rows
        self._records = source.record_of if rows is None else source.record_of[rows]
        if captions is not None:
            self.captions: Sequence[str] = captions
        else:
            self.captions = source.captions if rows is None else _chosen(source.captions, rows)

    def __repr__(self) -> str:
        """Return name, size and source."""
        return f"<{self.name}: {len(self)} pairs of {self.source.path}>"

    def __len__(self) -> int:
        """Return the number of pairs."""
        return len(self._records)

    def __getitem__(self, index: int, /) -> Sample:
        """Return the pair with this row id, 0 .. n - 1 in the order of the source; its image is decoded now.

        Raises
        ------
        UnreadableImage
            The image cannot be decoded.
        BadInput
            The image is no longer that of the fingerprint.
        """
        position = row_index(index, len(self))
        return Sample(position, self._decode(int(self._records[position])), self.captions[position])

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels of the pairs; an empty text for each pair without a label."""
        return tuple(self.source.labels[record] for record in self._records.tolist())

    @property
    def paths(self) -> Sequence[str]:
        """The names of the pairs' images as the source writes them: the paths of a table."""
        return _chosen(self.source.image_names, self._records)

    @property
    def files(self) -> tuple[Path, ...]:
        """The places of the pairs' images: the path of the file, or shard and member."""
        return tuple(Path(self.source.store.image(record)) for record in self._records.tolist())

    def images_only(self) -> Pictures:
        """Return the part of this data set that reads images, which is small enough for other processes."""
        return Pictures(self.source.store, self._records, self.source.digests[self._records])

    def place(self, row: int) -> str:
        """Return the place of a pair in the source, for messages: "pairs.csv, row 3"."""
        return self.source.store.place(int(self._records[row]))

    def fingerprint(self) -> str:
        """Return the SHA-256, in hex, of the rows' content: images, captions and labels, and not their paths."""
        # An index holds the fingerprint of all pairs, so opening it reads no caption.
        if self._rows is None and self.captions is self.source.captions and self.source.fingerprint is not None:
            return self.source.fingerprint
        return fingerprint_of([b"drrho pairs 2"], self._content())

    def _content(self) -> Iterator[str | bytes]:
        digests, labels = self.source.digests, self.source.labels
        for record, caption in zip(self._records.tolist(), self.captions, strict=True):
            yield from (digests[record].tobytes(), caption, labels[record])

    def image_digests(self) -> UInt8:
        """Return the first 16 bytes of the SHA-256 of each row's image file, shape (n, 16)."""
        digests: UInt8 = self.source.digests[self._records]
        return digests

    @cached_property
    def image_ids(self) -> Int64:
        """Numbers of the rows' images, shape (n,): rows whose image files have equal bytes have equal numbers."""
        if self._rows is None and self.source.image_ids is not None:
            return self.source.image_ids
        return image_numbers(self.image_digests())

    @property
    def source_rows(self) -> Int64:
        """Rows of these pairs in the whole table or source, shape (n,)."""
        whole = np.arange(self.num_source_rows, dtype=np.int64)
        return whole if self._rows is None else self._rows

    @property
    def num_source_rows(self) -> int:
        """Number of pairs of the whole table or source."""
        return len(self.source.record_of)

    def subset(self, rows: Sequence[int] | Int64) -> PairsDataset:
        """Return the pairs of some rows as a new data set, numbered in the order of `rows`; the classes stay."""
        chosen = np.asarray(rows, dtype=np.int64)
        return PairsDataset(
            self.source,
            name=self.name,
            rows=chosen if self._rows is None else self._rows[chosen],
            class_names=self.class_names,
            captions=_chosen(self.captions, chosen),
            max_unreadable=self.max_unreadable,
        )

    def with_captions(self, captions: Sequence[str]) -> PairsDataset:
        """Return the same pairs with other captions, one for each row."""
        return PairsDataset(
            self.source,
            name=self.name,
            rows=self._rows,
            class_names=self.class_names,
            captions=captions,
            max_unreadable=self.max_unreadable,
        )

    def zero_shot(self, *, image_size: int | None = None, resize_mode: ImageReading | str = "crop") -> ZeroShot | None:
        """Return the classification task whose classes are the labels, or None if there are fewer than two labels.

        The classes are all labels of the table; if the splits have separate tables, all labels of all tables. Labels
        that differ only in capitals and white space are one class, with the spelling that comes first. The images are
        those of this data set that have a label, as squares of side `image_size` (by default 224); see `resize`.

        Raises
        ------
        BadInput
            An image cannot be decoded.
        """
        size = _ZERO_SHOT_SIZE if image_size is None else whole_number(image_size, "image_size", at_least=1)
        labelled = self.labelled_images()
        if labelled is None:
            return None
        # A few unreadable images are left out of the task, up to the limit of the data set.
        flaws, images, readable = UnreadableRows(self), [], []
        for place, row in enumerate(labelled.rows.tolist()):
            try:
                images.append(resize(self[row].image[None], size, resize_mode)[0])
                readable.append(place)
            except UnreadableImage as error:
                flaws.note(row, str(error))
        return ZeroShot(
            self.class_names,
            tuple(DEFAULT_PROMPT.replace("{}", name) for name in self.class_names),
            np.stack(images),
            labelled.labels[readable],
        )

    def labelled_images(self) -> LabelledImages | None:
        """Return the images that have a label, or None if there are fewer than two classes; no image is decoded.

        Labels that differ only in capitals and white space are one class, with the spelling that comes first. An image
        with several captions counts once, but an image with several labels counts once with each label.
        """
        number = {label_key(name): place for place, name in enumerate(self.class_names)}
        # Rows without a label get the number -1.
        keys = (label_key(self.source.labels[record]) for record in self._records.tolist())
        labels = np.array([number[key] if key else -1 for key in keys], dtype=np.int64)
        rows = np.flatnonzero(labels >= 0)
        if len(self.class_names) < 2 or not rows.size:
            return None
        pairs = np.stack([self.image_ids[rows], labels[rows]], axis=1)
        rows = rows[np.sort(np.unique(pairs, axis=0, return_index=True)[1])]
        parts = self.source.parts
        own = None if parts is None else parts[self._records[rows]] == _TEST_PART
        return LabelledImages(self.class_names, rows, labels[rows], own)

    def _decode(self, record: int) -> UInt8:
        return _decoded(self.source.store, record, self.source.digests[record].tobytes())


class LabelledImages(NamedTuple):
    """The images of a data set that have a label; each image counts once.

    Attributes
    ----------
    class_names : tuple of str
    rows : ndarray of int64, shape (m,)
        The first row of each image.
    labels : ndarray of int64, shape (m,)
        Positions in `class_names`.
    is_test : ndarray of bool, shape (m,), or None
        True for the images of the test part, if the source has parts of its own.
    """

    class_names: tuple[str, ...]
    rows: Int64
    labels: Int64
    is_test: npt.NDArray[np.bool_] | None


class Pictures(NamedTuple):
    """The images of a data set without the captions.

    Attributes
    ----------
    store : ImageStore
    records : ndarray of int64, shape (n,)
        The record of each row.
    digests : ndarray of uint8, shape (n, 16)
    """

    store: ImageStore
    records: Int64
    digests: UInt8

    def __getitem__(self, index: Any, /) -> Any:
        """Return the image of a row as a sample without a caption."""
        image = _decoded(self.store, int(self.records[index]), self.digests[index].tobytes())
        return Sample(index, image, "")


def _decoded(store: ImageStore, record: int, digest: bytes) -> UInt8:
    try:
        return store.load(record, digest)
    except MissingExtra:
        raise
    # For damaged files Pillow raises exceptions of almost any class.
    except Exception as error:
        message = f"{store.place(record)}: cannot decode image {store.image(record)}: {one_line(error)}"
        # Another image in place of that of the fingerprint is no damage, and no other pair may replace it.
        raise (BadInput if isinstance(error, Changed) else UnreadableImage)(shown(message)) from error


def _chosen(texts: Sequence[str], rows: Int64) -> Sequence[str]:
    """Return some texts: a tuple, or a column that reads them when they are used if `texts` is such a column."""
    if isinstance(texts, TextColumn | ChosenTexts):
        return ChosenTexts(texts, rows)
    return tuple(texts[row] for row in rows.tolist())


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
    source = read_table(Path(path), ColumnNames(image_column, caption_column, label_column))
    require_readable(source, 0.0)
    return PairsDataset(source)
