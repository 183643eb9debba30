"""The reference features of the training pairs of a run: arrays in memory, or rows of a cache on disk."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from drrho_clip.data.protocol import Int64
from drrho_clip.features.reading import ReferenceFeatures

__all__ = ["ArrayRows", "CacheRows", "FeatureRows"]

Floats = npt.NDArray[np.floating[Any]]


class FeatureRows(Protocol):
    """Features of n pairs."""

    def __len__(self) -> int:
        """Return the number n of pairs."""
        ...

    def __getitem__(self, rows: Int64, /) -> tuple[Floats, Floats]:
        """Return image features (b, d) and text features (b, e) of the given rows."""
        ...


@dataclass(frozen=True)
class ArrayRows:
    """Image features (n, d) and text features (n, e) in memory.

    Examples
    --------
    >>> import numpy as np
    >>> ArrayRows(np.eye(3), np.eye(3))[np.array([2, 0])][0].argmax(axis=1).tolist()
    [2, 0]
    """

    image: Floats
    text: Floats

    def __len__(self) -> int:
        """Return the number n of pairs."""
        return len(self.image)

    def __getitem__(self, rows: Int64, /) -> tuple[Floats, Floats]:
        """Return the features of the given rows."""
        return self.image[rows], self.text[rows]


@dataclass(frozen=True)
class CacheRows:
    """The rows of a cache that belong to the pairs of a data set.

    Attributes
    ----------
    features : ReferenceFeatures
        The cache.
    rows : ndarray of int64, shape (n,)
        The row of the cache for each pair.
    """

    features: ReferenceFeatures
    rows: Int64

    def __len__(self) -> int:
        """Return the number n of pairs."""
        return len(self.rows)

    def __getitem__(self, rows: Int64, /) -> tuple[Floats, Floats]:
        """Return the features of the given rows."""
        return self.features[self.rows[rows]]

    @property
    def num_unreadable(self) -> int:
        """Number of pairs whose image could not be read when the cache was written."""
        return int(np.isin(self.rows, [int(row) for row in self.features.manifest.unreadable]).sum())
