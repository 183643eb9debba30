"""Batches of stored features: heads over features read rows of two tables in place of pixels and tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from drrho_clip.data._checks import whole_number
from drrho_clip.data.loader import HostBatch, batches
from drrho_clip.data.order import EpochOrder, PartOfOrder
from drrho_clip.data.pair_masks import PairMasks
from drrho_clip.data.protocol import Dataset, Int64
from drrho_clip.data.unreadable import UnreadableRows
from drrho_clip.errors import BadInput
from drrho_clip.processes.protocol import Processes

__all__ = ["PairRows", "RowSource"]


class PairRows(Protocol):
    """Stored features of pairs; `drrho_clip.ReferenceFeatures` is such a store."""

    def rows_of(self, dataset: Dataset, /) -> Int64:
        """Return the row of each pair of a data set; raise BadInput if a pair is missing."""
        ...

    def rows_of_side(self, side: str, rows: Int64, /) -> npt.NDArray[np.float32]:
        """Return the features (b, D) of one side, "image" or "text"."""
        ...

    def unreadable_rows(self, dataset: Dataset, /) -> Mapping[int, str]:
        """Return the rows of a data set whose features are those of a black image, with the reason."""
        ...


class RowSource:
    """Batches of a data set whose images and tokens are rows of stored features; see `BatchSource`.

    Parameters
    ----------
    dataset : Dataset
        The pairs.
    features : PairRows
        The features, which must have all pairs of the data set.
    order : {"full", "blocks"}
        The order of the samples in an epoch; see `batches`.

    Attributes
    ----------
    unreadable : dict of int to str
        The rows whose image could not be read when the features were computed, with the reason.

    Raises
    ------
    BadInput
        The data set is empty, a pair has no features, or more images were unreadable than the data set permits.
    """

    def __init__(self, dataset: Dataset, features: PairRows, *, order: str = "full") -> None:
        if len(dataset) == 0:
            raise BadInput("dataset must hold at least one pair, got none")
        self.dataset = dataset
        self._features, self._order = features, order
        # Features of a black image would be learned as if they were those of the caption's image.
        flaws = UnreadableRows(dataset)
        for row, reason in features.unreadable_rows(dataset).items():
            flaws.note(row, reason)
        self.unreadable = flaws.reasons
        self._rows = features.rows_of(dataset)
        self._pair_masks = PairMasks(dataset.image_ids)

    def __len__(self) -> int:
        """Return the number of pairs."""
        return len(self.dataset)

    def epoch(
        self,
        batch_size: int,
        *,
        seed: int,
        epoch: int,
        first_batch: int = 0,
        rows: Int64 | None = None,
        processes: Processes | None = None,
    ) -> Iterator[HostBatch]:
        """Yield the batches of one epoch in the order of `BatchSource.epoch`, which replaces unreadable pairs."""
        # No thread reads in advance: the rows are mapped into memory, and the system keeps those that were read.
        count = len(self) if rows is None else len(rows)
        stream = batches(count, batch_size, seed=seed, epoch=epoch, first_batch=first_batch, order=self._order)
        order = EpochOrder(count, batch_size, seed, epoch, self._order, rows)
        numbered = enumerate((index if rows is None else rows[index] for index in stream), start=first_batch)
        # All processes know the unreadable rows from the start, so they make the same replacements.
        readable = (self._readable(order, number, index) for number, index in numbered)
        if processes is None or processes.size == 1:
            return map(self.gather, readable)
        places = PartOfOrder(order, processes.rank, processes.size).places
        return (self._batch(whole[places], whole) for whole in readable)

    def _readable(self, order: EpochOrder, number: int, index: Int64) -> Int64:
        """Return the rows of a batch, in which readable rows that follow in the order replace the unreadable ones."""
        bad = [place for place, row in enumerate(index.tolist()) if row in self.unreadable]
        following = (row for row in order.after(number) if row not in self.unreadable)
        index = index.copy()
        for place in bad:
            row = next(following, None)
            if row is None:
                reason = self.unreadable[int(index[place])]
                raise BadInput(f"data must have {order.batch_size} readable pairs, got fewer: {reason}")
            index[place] = row
        return index

    def in_order(self, batch_size: int, *, rows: Int64 | None = None) -> Iterator[HostBatch]:
        """Yield every pair once in row order, or the pairs of `rows`; the last batch may be short."""
        batch_size = whole_number(batch_size, "batch_size", at_least=1)
        rows = np.arange(len(self), dtype=np.int64) if rows is None else rows
        return (self.gather(rows[start : start + batch_size]) for start in range(0, len(rows), batch_size))

    def gather(self, sample_index: Sequence[int] | Int64) -> HostBatch:
        """Return the batch of the given rows of the data set."""
        return self._batch(np.asarray(sample_index, dtype=np.int64))

    def _batch(self, index: Int64, whole: Int64 | None = None) -> HostBatch:
        """Return the batch of some rows; `whole` has the rows of all processes, if there are several."""
        # The rows of the cache may stand in another order than the pairs.
        places = self._rows[index]
        images: Any = self._features.rows_of_side("image", places)
        texts: Any = self._features.rows_of_side("text", places)
        return HostBatch(index, images, texts, self._pair_masks.of(index, whole), whole)
