"""The pairs of one source of data, column by column, whatever the kind of the source.

A *record* is one image of the source with its captions: a row of a table, or a sample of a tar shard. A record with
several captions gives several pairs. Every reader of a kind of data returns a `PairSource`, so data sets, splits and
the index know nothing about kinds of files.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from drrho_clip.data.content import DIGEST_SIZE
from drrho_clip.data.labels import class_names_of
from drrho_clip.data.protocol import Int64, UInt8
from drrho_clip.errors import BadInput
from drrho_clip.terminal.safe_text import shown

__all__ = [
    "MAX_UNREADABLE",
    "ChosenTexts",
    "ImageStore",
    "PairSource",
    "SourceBuilder",
    "TextColumn",
    "Unreadable",
    "require_readable",
]

MAX_UNREADABLE: Final = 0.001
"""The default of the largest share of images that may be unreadable."""

# Number of texts that are decoded at a time when a column is read from the start to the end.
_TEXTS_AT_ONCE: Final = 4096


class TextColumn(Sequence[str]):
    """Texts in two arrays, which may be memory-mapped files: a text is decoded when it is used.

    Parameters
    ----------
    content : ndarray of uint8, shape (c,)
        The texts in UTF-8, without separators.
    ends : ndarray of int64, shape (n,)
        Where each text ends in `content`.

    Examples
    --------
    >>> column = TextColumn.of(["red", "", "grün"])
    >>> column[2], column[1:], len(column)
    ('grün', ['', 'grün'], 3)
    """

    def __init__(self, content: UInt8, ends: Int64) -> None:
        self.content, self.ends = content, ends

    @classmethod
    def of(cls, texts: Sequence[str]) -> TextColumn:
        """Return a column in memory."""
        # A caption from JSON may hold half of a surrogate pair, which strict UTF-8 cannot encode.
        parts = [text.encode("utf-8", "surrogatepass") for text in texts]
        ends = np.cumsum(np.fromiter(map(len, parts), dtype=np.int64, count=len(parts)))
        return cls(np.frombuffer(b"".join(parts), dtype=np.uint8), ends.astype(np.int64))

    def __len__(self) -> int:
        """Return the number of texts."""
        return len(self.ends)

    def __getitem__(self, index: Any, /) -> Any:
        """Return a text, or a list of texts for a slice."""
        if isinstance(index, slice):
            return [self[position] for position in range(*index.indices(len(self)))]
        position = int(index) + (len(self) if index < 0 else 0)
        if not 0 <= position < len(self):
            raise IndexError(f"index must lie in 0 .. {len(self) - 1}, got {index}")
        start = int(self.ends[position - 1]) if position else 0
        return self.content[start : int(self.ends[position])].tobytes().decode("utf-8", "surrogatepass")

    def __iter__(self) -> Iterator[str]:
        """Yield the texts; a block of the arrays is read at a time."""
        for first in range(0, len(self), _TEXTS_AT_ONCE):
            start = int(self.ends[first - 1]) if first else 0
            ends = (self.ends[first : first + _TEXTS_AT_ONCE] - start).tolist()
            block = self.content[start : start + ends[-1]].tobytes()
            for begin, end in zip([0, *ends], ends, strict=False):
                yield block[begin:end].decode("utf-8", "surrogatepass")


class ChosenTexts(Sequence[str]):
    """Some texts of a column, in the order of `rows`; a text is read when it is used."""

    def __init__(self, texts: Sequence[str], rows: Int64) -> None:
        self._texts, self._rows = texts, rows

    def __len__(self) -> int:
        """Return the number of texts."""
        return len(self._rows)

    def __getitem__(self, index: Any, /) -> Any:
        """Return a text, or a list of texts for a slice."""
        if isinstance(index, slice):
            return [self._texts[row] for row in self._rows[index].tolist()]
        return self._texts[int(self._rows[index])]


class ImageStore(Protocol):
    """Access to the images of a source, by the number of the record."""

    @property
    def kind(self) -> str:
        """The kind of the source; an index records it."""
        ...

    def load(self, record: int, digest: bytes) -> UInt8:
        """Return the image, shape (H, W, C), whose content must have this digest.

        Raises
        ------
        Exception
            Exceptions of almost any class for a damaged image, and `Changed` for an image with other content.
        """
        ...

    def place(self, record: int) -> str:
        """Return the place of a record, for messages: "pairs.csv, row 3"."""
        ...

    def image(self, record: int) -> str:
        """Return the name of the image, for messages."""
        ...

    def files(self) -> Sequence[Path]:
        """Return the files or folders that hold the images; an index checks that they are still there."""
        ...

    def describe(self) -> tuple[dict[str, Any], dict[str, npt.NDArray[Any]]]:
        """Return what an index needs to open the store again: values for JSON, and columns."""
        ...


class Unreadable(NamedTuple):
    """An image that cannot be read: the place of the record, the name of the image, and the reason."""

    place: str
    image: str
    reason: str

    def __str__(self) -> str:
        """Return one line for a message."""
        return shown(f"{self.place}: {self.image} is not a readable image: {self.reason}")


@dataclass(frozen=True)
class PairSource:
    """n pairs of m records.

    Attributes
    ----------
    name : str
        A short name for tables and reports.
    path : str
        The source, as the user names it.
    store : ImageStore
        The images.
    record_of : ndarray of int64, shape (n,)
        The record of each pair.
    captions : sequence of str, length n
    image_names : sequence of str, length m
        The names of the images as the source writes them.
    labels : sequence of str, length m
        An empty text for each record without a label.
    digests : ndarray of uint8, shape (m, 16)
        The digests of the images; see content.py.
    parts : ndarray of uint8, shape (m,), or None
        The part of the source to which each record belongs: 0 training, 1 validation, 2 test. None if the source has no
        parts of its own.
    class_names : tuple of str
        The different labels; see `class_names_of`.
    unreadable : tuple of Unreadable
        Images that were left out, because they cannot be read.
    image_ids, fingerprint : optional
        Those of a data set with all pairs, if an index holds them.
    text_files : tuple of Path
        Files of captions or labels, beside those of the images; an index records the content of these files.
    """

    name: str
    path: str
    store: ImageStore
    record_of: Int64
    captions: Sequence[str]
    image_names: Sequence[str]
    labels: Sequence[str]
    digests: UInt8
    class_names: tuple[str, ...]
    parts: UInt8 | None = None
    unreadable: tuple[Unreadable, ...] = ()
    image_ids: Int64 | None = None
    fingerprint: str | None = None
    text_files: tuple[Path, ...] = ()

    def __len__(self) -> int:
        """Return the number of pairs."""
        return len(self.record_of)

    @property
    def is_from_index(self) -> bool:
        """Whether the columns come from an index, which alone holds a fingerprint."""
        return self.fingerprint is not None


def require_readable(source: PairSource, max_unreadable: float) -> None:
    """Raise BadInput if a larger share of the images than `max_unreadable` cannot be read; an index has no limit."""
    # An index was made with a limit of its own, and its unreadable images are left out already.
    if source.is_from_index:
        return
    # The records that were left out count as well.
    count, total = len(source.unreadable), len(source.digests) + len(source.unreadable)
    if count > max_unreadable * total:
        more = f" (and {count - 1} more such images)" if count > 1 else ""
        limit = f"; at most {max_unreadable:.2%} of {total:,} images may be unreadable" if max_unreadable else ""
        raise BadInput(f"{source.unreadable[0]}{more}{limit}")


class SourceBuilder:
    """Collects the records of a source, one after another."""

    def __init__(self) -> None:
        self._record_of: list[int] = []
        self._captions: list[str] = []
        self._names: list[str] = []
        self._labels: list[str] = []
        self._digests: list[bytes] = []

    def __len__(self) -> int:
        """Return the number of records so far."""
        return len(self._names)

    def image_names(self) -> tuple[str, ...]:
        """Return the names of the images so far."""
        return tuple(self._names)

    def add(self, image_name: str, captions: Sequence[str], label: str, digest: bytes) -> None:
        """Add a record; the images of the store must come in the same order."""
        # Every caption is a pair with the image of this record.
        self._record_of += [len(self._names)] * len(captions)
        self._captions += captions
        self._names.append(image_name)
        self._labels.append(label)
        self._digests.append(digest)

    def build(
        self,
        name: str,
        path: str,
        store: ImageStore,
        *,
        parts: UInt8 | None = None,
        unreadable: Sequence[Unreadable] = (),
        text_files: Sequence[Path] = (),
    ) -> PairSource:
        """Return the source."""
        digests = np.frombuffer(b"".join(self._digests), dtype=np.uint8).reshape(len(self), DIGEST_SIZE)
        return PairSource(
            name=name,
            path=path,
            store=store,
            record_of=np.array(self._record_of, dtype=np.int64),
            captions=tuple(self._captions),
            image_names=tuple(self._names),
            labels=tuple(self._labels),
            digests=digests,
            class_names=class_names_of([self._labels]),
            parts=parts,
            unreadable=tuple(unreadable),
            text_files=tuple(text_files),
        )
