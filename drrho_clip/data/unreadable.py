"""Images that turn out to be unreadable while pairs are read: they are counted, named and limited in one place."""

from __future__ import annotations

import numpy as np

from drrho_clip.data._checks import share
from drrho_clip.data.protocol import Dataset, Int64, UnreadableImage

__all__ = ["UnreadableRows", "readable_rows"]


class UnreadableRows:
    """The unreadable rows of a data set that were met so far.

    The rows are also noted in the attribute `unreadable` of the data set if there is one, so that a command can leave
    them out of the figures and name them, whichever model has read the images.

    Parameters
    ----------
    dataset : Dataset
        The pairs.
    max_unreadable : float, optional
        The largest share of the pairs, in [0, 1], whose images may be unreadable. By default the attribute of this name
        of the data set, or 0.

    Attributes
    ----------
    reasons : dict of int to str
        The reason of each row.
    """

    def __init__(self, dataset: Dataset, max_unreadable: float | None = None) -> None:
        limit = getattr(dataset, "max_unreadable", 0.0) if max_unreadable is None else max_unreadable
        self._total = len(dataset)
        self._most = share(limit, "max_unreadable") * self._total
        self._of_dataset: dict[int, str] = getattr(dataset, "unreadable", {})
        self.reasons: dict[int, str] = {}

    def note(self, row: int, reason: str) -> None:
        """Remember a row; raise UnreadableImage if there are too many of them."""
        self.reasons.setdefault(row, reason)
        if len(self.reasons) > self._most:
            raise UnreadableImage(self._too_many(reason))
        self._of_dataset.setdefault(row, reason)

    def _too_many(self, reason: str) -> str:
        if not self._most:
            return reason
        others = len(self.reasons) - 1
        limit = f"at most {self._most / self._total:.2%} of {self._total:,} pairs may have unreadable images"
        return f"{reason} (and {others} more such images before); {limit}"


def readable_rows(dataset: Dataset) -> Int64:
    """Return the rows of a data set without those whose image has turned out to be unreadable, in rising order.

    An unreadable image leaves out all rows that show it.
    """
    unreadable = list(getattr(dataset, "unreadable", {}))
    image_ids = dataset.image_ids
    return np.flatnonzero(~np.isin(image_ids, image_ids[unreadable])).astype(np.int64)
