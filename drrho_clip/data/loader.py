"""Batches of a data set: their order, and threads that decode the images of the next batches in advance."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from drrho_clip.constants import ORDERS
from drrho_clip.data._checks import whole_number
from drrho_clip.data.augment import Augmentation, KeptImages
from drrho_clip.data.order import EpochOrder
from drrho_clip.data.preprocess import check_resize_mode
from drrho_clip.data.protocol import (
    Dataset,
    ImageReading,
    Int32,
    Int64,
    Readable,
    Tokenizer,
    UInt8,
    captions_of,
    channels_of,
)
from drrho_clip.data.reading import ImageReader, Images, images_of_epoch
from drrho_clip.data.unreadable import UnreadableRows
from drrho_clip.errors import BadInput

__all__ = ["BatchSource", "HostBatch", "batches"]

# Number of batches that are decoded at the same time: large enough that a slow image delays no batch, and small enough
# to save memory.
_AHEAD = 3


class HostBatch(NamedTuple):
    """One batch of b pairs as NumPy arrays: images of side s with C channels, and L tokens per caption.

    Attributes
    ----------
    sample_index : ndarray of int64, shape (b,)
        Row ids without repeats.
    images : ndarray of uint8, shape (b, s, s, C)
    tokens : ndarray of int32, shape (b, L)
    pair_mask : ndarray of bool, shape (b, b), or None
        False if image i and caption j belong to the same image: the pair is then no negative, because every caption of
        an image is right. None for all batches of a data set in which no image has several rows.
    """

    sample_index: Int64
    images: UInt8
    tokens: Int32
    pair_mask: npt.NDArray[np.bool_] | None = None

    def parts(self, size: int) -> Iterator[HostBatch]:
        """Yield the batch in parts of `size` pairs, at least 1; the last part may have fewer."""
        for start in range(0, len(self.sample_index), size):
            rows = slice(start, start + size)
            mask = None if self.pair_mask is None else self.pair_mask[rows, rows]
            yield HostBatch(self.sample_index[rows], self.images[rows], self.tokens[rows], mask)


def batches(
    num_samples: int, batch_size: int, *, seed: int, epoch: int, first_batch: int = 0, order: str = "full"
) -> Iterator[Int64]:
    """Divide all samples into batches, in an order that differs by epoch.

    Batch t holds positions t b .. (t + 1) b - 1 of the permutation that `drrho_clip.data.order` computes from seed and
    epoch, so a resumed run needs only these two numbers to repeat the order. A last batch of fewer than b samples is
    dropped, so that every batch has the same shape.

    Parameters
    ----------
    num_samples : int
        Number n of samples.
    batch_size : int
        Number b of samples in a batch, from 2 to n.
    seed, epoch : int
        At least 0.
    first_batch : int
        Number of batches at the start of the epoch that are left out, at least 0.
    order : {"full", "blocks"}
        All samples are mixed, or blocks of samples within a window, which is faster on slow disks; see `rows_at`.

    Returns
    -------
    iterator of ndarray of int64, shape (b,)
        The n // b batches of the epoch from `first_batch` on; no sample is in two of them.

    Raises
    ------
    BadInput, TypeError
        An argument is outside its domain or has the wrong type.

    Examples
    --------
    >>> [len(index) for index in batches(10, 4, seed=0, epoch=0)]
    [4, 4]
    """
    return _epoch_order(num_samples, batch_size, seed, epoch, order).batches(
        whole_number(first_batch, "first_batch", at_least=0)
    )


def _epoch_order(
    num_samples: int, batch_size: int, seed: int, epoch: int, order: str, rows: Int64 | None = None
) -> EpochOrder:
    """Return the order of an epoch; raise the errors of `batches`."""
    num_samples = whole_number(num_samples, "num_samples", at_least=0)
    batch_size = whole_number(batch_size, "batch_size", at_least=2)
    if batch_size > num_samples:
        raise BadInput(f"batch_size must be at most the number of samples ({num_samples}), got {batch_size}")
    seed = whole_number(seed, "seed", at_least=0)
    epoch = whole_number(epoch, "epoch", at_least=0)
    if order not in ORDERS:
        raise BadInput(f"order must be {' or '.join(map(repr, ORDERS))}, got {order!r}")
    return EpochOrder(num_samples, batch_size, seed, epoch, order, rows)


CACHE_BYTES = 2 * 2**30
"""Memory limit for decoded images, unless the caller of `BatchSource` names another."""


class BatchSource:
    """Batches of a data set, with images of one size and captions as tokens.

    Captions are encoded once, when the source is built. Threads or other processes decode the images a few batches in
    advance. Decoded images stay in memory if all of them fit into `cache_bytes`. The content of the batches depends on
    none of `num_threads`, `num_workers` and `cache_bytes`.

    Parameters
    ----------
    dataset : Dataset
    tokenizer : Tokenizer
    image_size : int
        Side s of the square images, at least 1.
    resize_mode : {"crop", "fit"} or ImageReading
        How images become square; see `resize`.
    channels : int, optional
        1 or 3; by default the number of channels of the data set's first image.
    cache_bytes : int
        Memory limit for decoded images, 2 GiB by default; with 0 no image is kept.
    num_threads : int
        Threads that decode; with 0 the calling thread decodes.
    num_workers : int
        Processes that decode the batches of `epoch`, by the library grain; with 0 the threads decode.
    order : {"full", "blocks"}
        The order of the samples in an epoch; see `batches`.
    augmentation : Augmentation, optional
        `epoch` gives random parts of the original images, which stay in memory as far as `cache_bytes` allows; the
        images of `in_order` and `gather` are whole.
    max_unreadable : float, optional
        The largest share of the pairs, in [0, 1], whose images may turn out to be unreadable. `epoch` replaces such a
        pair by the next pair of the order, `in_order` and `gather` give a black image. With 0 every unreadable image is
        an error. By default the attribute of this name of the data set, or 0.

    Attributes
    ----------
    unreadable : dict of int to str
        The unreadable rows that were met so far, with the reason.

    Raises
    ------
    BadInput
        The data set is empty, or an argument is outside its domain.

    Examples
    --------
    >>> from drrho_clip.data import WordTokenizer, scenes
    >>> data = scenes(10, seed=0)
    >>> source = BatchSource(data, WordTokenizer.fit(data.captions), image_size=32)
    >>> [batch.images.shape for batch in source.epoch(4, seed=0, epoch=0)]
    [(4, 32, 32, 3), (4, 32, 32, 3)]
    """

    def __init__(
        self,
        dataset: Dataset,
        tokenizer: Tokenizer,
        *,
        image_size: int,
        resize_mode: ImageReading | str = "crop",
        channels: int | None = None,
        cache_bytes: int = CACHE_BYTES,
        num_threads: int = 2,
        num_workers: int = 0,
        order: str = "full",
        augmentation: Augmentation | None = None,
        max_unreadable: float | None = None,
    ) -> None:
        if len(dataset) == 0:
            raise BadInput("dataset must hold at least one pair, got none")
        self.dataset = dataset
        self.tokenizer = tokenizer
        self.image_size = whole_number(image_size, "image_size", at_least=1)
        check_resize_mode(resize_mode)
        self._resize_mode = resize_mode
        cache_bytes = whole_number(cache_bytes, "cache_bytes", at_least=0)
        self._num_threads = whole_number(num_threads, "num_threads", at_least=0)
        self._num_workers = whole_number(num_workers, "num_workers", at_least=0)
        self._order = order
        self._flaws = UnreadableRows(dataset, max_unreadable)
        self.unreadable = self._flaws.reasons
        self.channels = channels_of(dataset) if channels is None else channels
        if self.channels not in (1, 3):
            raise BadInput(f"channels must be 1 or 3, got {channels!r}")
        self._tokens = tokenizer.encode(captions_of(dataset))
        image_ids = dataset.image_ids
        self._image_ids = image_ids if np.unique(image_ids).size < image_ids.size else None
        self._shape = (self.image_size, self.image_size, self.channels)
        images_only = getattr(dataset, "images_only", None)
        # Other processes get a copy, so the reader holds no captions.
        samples: Readable = dataset if images_only is None else images_only()
        images: UInt8 | None = getattr(dataset, "images", None)
        if augmentation is not None and images is None:
            samples = KeptImages(samples, cache_bytes)
        self._reader = ImageReader(samples, self.image_size, self.channels, resize_mode, augmentation)
        # The cache holds the squares of all images, if they fit into `cache_bytes`; decoding a batch fills it.
        whole = (len(dataset), *self._shape)
        # Random parts are cut out of the original images, so squares would be of no use.
        as_they_are = isinstance(resize_mode, str) and augmentation is None
        if as_they_are and isinstance(images, np.ndarray) and images.dtype == np.uint8 and images.shape == whole:
            # If all images of the data set are in memory in the right size, they serve as the cache.
            self._cache: UInt8 | None = images
            self._cached = np.ones(len(dataset), dtype=np.bool_)
        else:
            fits = math.prod(whole) <= cache_bytes and augmentation is None
            self._cache = np.zeros(whole, dtype=np.uint8) if fits else None
            self._cached = np.zeros(len(dataset), dtype=np.bool_)

    def __len__(self) -> int:
        """Return the number of pairs."""
        return len(self.dataset)

    def epoch(
        self, batch_size: int, *, seed: int, epoch: int, first_batch: int = 0, rows: Int64 | None = None
    ) -> Iterator[HostBatch]:
        """Yield the batches of one epoch in the order of `batches`, beginning with number `first_batch`.

        If `rows` is given, only these rows are used, and `batches` orders their positions in `rows`.

        Raises
        ------
        BadInput
            The call itself raises the errors of `batches`. If an image cannot be decoded, the iterator raises an error
            instead of yielding the batch of that image.
        """
        num_samples = len(self) if rows is None else len(rows)
        order = _epoch_order(num_samples, batch_size, seed, epoch, self._order, rows)
        return self._epoch(order, whole_number(first_batch, "first_batch", at_least=0))

    def in_order(self, batch_size: int, *, rows: Int64 | None = None) -> Iterator[HostBatch]:
        """Yield every pair once in row order, or the pairs of `rows`; the last batch may be short."""
        batch_size = whole_number(batch_size, "batch_size", at_least=1)
        rows = np.arange(len(self), dtype=np.int64) if rows is None else rows
        return self._stream(rows[start : start + batch_size] for start in range(0, len(rows), batch_size))

    def gather(self, sample_index: Sequence[int] | Int64) -> HostBatch:
        """Return the batch of the given rows.

        Raises
        ------
        BadInput
            A row lies outside 0 .. n - 1, or there is no row.
        """
        index = np.asarray(sample_index, dtype=np.int64)
        if index.ndim != 1 or index.size == 0 or index.min() < 0 or index.max() >= len(self):
            raise BadInput(f"sample_index must hold rows in 0 .. {len(self) - 1}, got {sample_index!r}")
        return self._assemble(index, self._decode(index))

    def _epoch(self, order: EpochOrder, first_batch: int) -> Iterator[HostBatch]:
        """Yield the batches of an epoch, in which readable pairs take the place of unreadable ones."""
        # If most images are in memory already, starting processes would take longer than decoding the others.
        if self._num_workers and np.mean(self._cached) < 0.5:
            stream = self._from_workers(order, first_batch)
        else:
            stream = self._images(order.batches(first_batch), order.epoch)
        for number, (index, images) in enumerate(stream, start=first_batch):
            # Threads may have met unreadable images of later batches already; only those of this batch count.
            bad = np.array([row in self.unreadable for row in index.tolist()])
            yield self._replaced(order, number, index, images, bad) if bad.any() else self._assemble(index, images)

    def _replaced(
        self, order: EpochOrder, number: int, index: Int64, images: UInt8, bad: npt.NDArray[np.bool_]
    ) -> HostBatch:
        """Return a batch whose unreadable pairs are replaced by the pairs that follow the batch in the order.

        The choice depends only on the order and on the files, so a resumed run and any number of processes make the
        same choice. A pair that is taken comes a second time in the epoch, mostly in the next batch.
        """
        # The arrays may belong to the order or to the cache.
        index, images = index.copy(), images.copy()
        following = order.after(number)
        for position in np.flatnonzero(bad).tolist():
            while index[position] in self.unreadable:
                # The order is used up only if hardly any pair is readable.
                row = next(following, None)
                if row is None:
                    reason = self.unreadable[int(index[position])]
                    raise BadInput(f"data must have {order.batch_size} readable pairs, got fewer: {reason}")
                if row not in self.unreadable:
                    image = self._decode(np.array([row], dtype=np.int64), order.epoch)
                    index[position], images[position] = row, image[0]
        return self._assemble(index, images)

    def _from_workers(self, order: EpochOrder, first_batch: int) -> Iterator[tuple[Int64, UInt8]]:
        """Yield rows and images of the batches, which other processes read, and fill the cache with the images."""
        parts = images_of_epoch(self._reader, order, first_batch, self._num_workers)
        for index, part in zip(order.batches(first_batch), parts, strict=True):
            self._note(index, part)
            # The next epoch needs no processes if all images fit into the cache.
            if self._cache is not None:
                self._cache[index], self._cached[index] = part.images, True
            yield index, part.images

    def _stream(self, order: Iterable[Int64]) -> Iterator[HostBatch]:
        """Yield the batches of the given rows as they are."""
        for index, images in self._images(order):
            yield self._assemble(index, images)

    def _images(self, order: Iterable[Int64], epoch: int | None = None) -> Iterator[tuple[Int64, UInt8]]:
        """Yield rows and images, which threads read in advance."""
        if self._num_threads == 0 or (self._cache is not None and self._cached.all()):
            for index in order:
                yield index, self._decode(index, epoch)
            return
        # Each batch is divided among the threads. At most `_AHEAD` batches are decoded at the same time.
        pool = ThreadPoolExecutor(self._num_threads, thread_name_prefix="drrho-decode")
        try:
            waiting: deque[tuple[Int64, list[Future[UInt8]]]] = deque()
            for index in order:
                parts = np.array_split(index, min(self._num_threads, index.size))
                waiting.append((index, [pool.submit(self._decode, part, epoch) for part in parts]))
                if len(waiting) >= _AHEAD:
                    yield _collected(*waiting.popleft())
            while waiting:
                yield _collected(*waiting.popleft())
        finally:
            # The threads also end if the caller stops early or if an image cannot be decoded.
            pool.shutdown(wait=True, cancel_futures=True)

    def _assemble(self, index: Int64, images: UInt8) -> HostBatch:
        pair_mask = None
        if self._image_ids is not None:
            image_ids = self._image_ids[index]
            pair_mask = image_ids[:, None] != image_ids[None, :]
        return HostBatch(index, images, self._tokens[index], pair_mask)

    def _decode(self, index: Int64, epoch: int | None = None) -> UInt8:
        """Return the images of the given rows, black if unreadable; those of an epoch may be random parts."""
        if self._cache is None:
            part = self._reader.read(index, epoch)
            self._note(index, part)
            return part.images
        # No lock is needed: if two threads decode one image, they write the same bytes.
        missing = index[~self._cached[index]]
        if missing.size:
            part = self._reader.read(missing)
            self._note(missing, part)
            self._cache[missing], self._cached[missing] = part.images, True
        images: UInt8 = self._cache[index]
        return images

    def _note(self, index: Int64, part: Images) -> None:
        """Remember the unreadable rows of a part; raise UnreadableImage if there are too many of them."""
        for position, reason in zip(part.failed.tolist(), part.reasons, strict=True):
            self._flaws.note(int(index[position]), reason)


def _collected(index: Int64, parts: list[Future[UInt8]]) -> tuple[Int64, UInt8]:
    return index, np.concatenate([part.result() for part in parts])
