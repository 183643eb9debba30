"""Several data sets as one, in a row."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np

from drrho_clip.data._checks import row_index
from drrho_clip.data.content import fingerprint_of, image_numbers
from drrho_clip.data.protocol import Dataset, ImageReading, Int64, Sample, UInt8, ZeroShot, captions_of

__all__ = ["JoinedDataset"]


class JoinedDataset:
    """The pairs of several data sets, those of the first data set first.

    Parameters
    ----------
    name : str
        A short name for tables and reports.
    parts : sequence of Dataset
        At least one.

    Examples
    --------
    >>> from drrho_clip.data import scene_splits
    >>> joined = JoinedDataset("scenes", scene_splits(4, heldout_size=2))
    >>> len(joined), joined[5].sample_index, joined[5].caption == scene_splits(4, heldout_size=2).validation[1].caption
    (8, 5, True)
    """

    def __init__(self, name: str, parts: Sequence[Dataset]) -> None:
        self.name = name
        self._parts = tuple(parts)
        self._ends = np.cumsum([len(part) for part in parts])

    def __len__(self) -> int:
        """Return the number of pairs."""
        return int(self._ends[-1])

    def __getitem__(self, index: int, /) -> Sample:
        """Return the pair with this row id."""
        row = row_index(index, len(self))
        # The first part whose end lies behind the row holds the row.
        part = int(np.searchsorted(self._ends, row, side="right"))
        start = int(self._ends[part - 1]) if part else 0
        return self._parts[part][row - start]._replace(sample_index=row)

    @cached_property
    def captions(self) -> Sequence[str]:
        """The captions in row order."""
        return tuple(caption for part in self._parts for caption in captions_of(part))

    def fingerprint(self) -> str:
        """Return the SHA-256, in hex, of the fingerprints of the parts."""
        return fingerprint_of([b"drrho joined 1"], (part.fingerprint() for part in self._parts))

    def image_digests(self) -> UInt8:
        """Return the digest of each row's image, shape (n, 16)."""
        return np.concatenate([part.image_digests() for part in self._parts])

    @cached_property
    def image_ids(self) -> Int64:
        """Numbers of the rows' images, shape (n,)."""
        return image_numbers(self.image_digests())

    def zero_shot(self, *, image_size: int | None = None, resize_mode: ImageReading | str = "crop") -> ZeroShot | None:
        """Return the classification task of the last part."""
        return self._parts[-1].zero_shot(image_size=image_size, resize_mode=resize_mode)
