"""Batches of a data set: their order, and threads that decode the images of the next batches in advance."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from drrho_clip.constants import ORDERS
from drrho_clip.data._checks import whole_number
from drrho_clip.data.augment import Augmentation, KeptImages
from drrho_clip.data.order import EpochOrder, PartOfOrder
from drrho_clip.data.pair_masks import PairMasks
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
from drrho_clip.processes.protocol import Processes
from drrho_clip.processes.together import together, together_with_values

__all__ = ["BatchSource", "HostBatch", "batches"]

# Number of batches that are decoded at the same time: large enough that a slow image delays no batch, and small enough
# to save memory.
_AHEAD = 3

# Number of captions that are encoded at a time.
_CAPTIONS_AT_ONCE = 65_536


class HostBatch(NamedTuple):
    """One batch of b pairs as NumPy arrays: images of side s with C channels, and L tokens per caption.

    If several processes train together, b is the number of the own pairs, and the whole batch has B pairs.

    Attributes
    ----------
    sample_index : ndarray of int64, shape (b,)
        Row ids without repeats.
    images : ndarray of uint8, shape (b, s, s, C)
    tokens : ndarray of int32, shape (b, L)
    pair_mask : ndarray of bool, shape (b, b) or (b, B), or None
        False if own image i and caption j of the whole batch belong to the same image: the pair is then no negative,
        because every caption of an image is right. None for all batches of a data set in which no image has several
        rows.
    whole_index : ndarray of int64, shape (B,), or None
        Row ids of the whole batch, in the order of the processes; None if the own pairs are the whole batch.
    """

    sample_index: Int64
    images: UInt8
    tokens: Int32
    pair_mask: npt.NDArray[np.bool_] | None = None
    whole_index: Int64 | None = None

    @property
    def rows(self) -> Int64:
        """Row ids of the whole batch."""
        return self.sample_index if self.whole_index is None else self.whole_index

    def check_rows(self, rank: int, size: int) -> None:
        """Raise ValueError unless the batch has no row twice, and the own rows are part `rank` of `size` parts."""
        whole, length = self.rows, len(self.sample_index)
        if len(np.unique(whole)) < len(whole):
            raise ValueError("sample_index must hold each row once in a batch of all processes, got a row twice")
        differ = np.flatnonzero(self.sample_index != whole[rank * length : (rank + 1) * length])
        if len(whole) != length * size or len(differ):
            row = self.sample_index[differ[0]] if len(differ) else length
            raise ValueError(f"sample_index must hold the own rows of the batch, got {row} on process {rank}")

    def parts(self, size: int) -> Iterator[HostBatch]:
        """Yield the batch in parts of `size` pairs, at least 1; the last part may have fewer."""
        for start in range(0, len(self.sample_index), size):
            rows = slice(start, start + size)
            # The captions of other processes belong to no part.
            mask = None if self.pair_mask is None or self.whole_index is not None else self.pair_mask[rows, rows]
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
        self._tokens = _small_tokens(tokenizer, captions_of(dataset))
        self._pair_masks = PairMasks(dataset.image_ids)
        self._shape = (self.image_size, self.image_size, self.channels)
        images_only = getattr(dataset, "images_only", None)
        # Other processes get a copy, so the reader holds no captions.
        samples: Readable = dataset if images_only is None else images_only()
        images: UInt8 | None = getattr(dataset, "images", None)
        self._in_files = images is None
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
        self,
        batch_size: int,
        *,
        seed: int,
        epoch: int,
        first_batch: int = 0,
        rows: Int64 | None = None,
        processes: Processes | None = None,
    ) -> Iterator[HostBatch]:
        """Yield the batches of one epoch in the order of `batches`, beginning with number `first_batch`.

        If `rows` is given, only these rows are used, and `batches` orders their positions in `rows`. If `processes` is
        given, their number divides the batch size, each process gets the own rows of each batch, and all processes
        have to iterate at the same time. The whole batches are the same for any number of processes.

        Raises
        ------
        BadInput
            The call itself raises the errors of `batches`. If an image cannot be decoded, the iterator raises an error
            instead of yielding the batch of that image.
        """
        num_samples = len(self) if rows is None else len(rows)
        order = _epoch_order(num_samples, batch_size, seed, epoch, self._order, rows)
        part = PartOfOrder(order) if processes is None else PartOfOrder(order, processes.rank, processes.size)
        return self._epoch(part, whole_number(first_batch, "first_batch", at_least=0), processes)

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

    def _epoch(self, part: PartOfOrder, first_batch: int, processes: Processes | None) -> Iterator[HostBatch]:
        """Yield the batches of an epoch, in which readable pairs take the place of unreadable ones."""
        # If most images are in memory already, starting processes would take longer than decoding the others.
        if self._num_workers and np.mean(self._cached) < 0.5:
            stream = self._from_workers(part, first_batch)
        else:
            stream = self._images(part.batches(first_batch), part.epoch)
        for number, whole in enumerate(part.order.batches(first_batch), start=first_batch):
            index, images, every = self._filled(part, number, whole, stream, processes)
            yield self._assemble(index, images, every if part.size > 1 else None)

    def _filled(
        self,
        part: PartOfOrder,
        number: int,
        whole: Int64,
        stream: Iterator[tuple[Int64, UInt8]],
        processes: Processes | None,
    ) -> tuple[Int64, UInt8, Int64]:
        """Return own rows, own images and all rows of a batch, without unreadable pairs.

        The pairs that follow the batch in the order take their places. The choice depends only on the order and on the
        files, so a resumed run and any number of processes make the same choice. A pair that is taken comes a second
        time in the epoch, mostly in the next batch.
        """

        def read() -> tuple[tuple[Int64, UInt8], dict[str, str]]:
            index, images = next(stream)
            # Threads may have met unreadable images of later batches already; only those of this batch count.
            bad = {place: self.unreadable.get(row) for place, row in enumerate(index.tolist(), start=part.places.start)}
            return (index, images), {str(place): reason for place, reason in bad.items() if reason is not None}

        # Images that are in memory cannot be unreadable, so their processes need not ask each other.
        asked = processes if self._in_files else None
        (index, images), answers = together_with_values(asked, read)
        bad = {int(place): reason for of_process in answers for place, reason in of_process.items()}
        if not bad:
            return index, images, whole
        # The arrays may belong to the order or to the cache.
        index, images, whole = index.copy(), images.copy(), whole.copy()
        following = part.order.after(number)
        for place in sorted(bad):
            # One process has this place and reads the pairs that follow, until a pair is readable.
            is_own, owner = part.places.start <= place < part.places.stop, place // len(index)
            reason: str | None = bad[place]
            while reason is not None:
                # Too many such rows are an error on all processes.
                together(asked, partial(self._flaws.note, int(whole[place]), reason))
                row = next(following, None)
                # The order is used up only if hardly any pair is readable.
                if row is None:
                    raise BadInput(f"data must have {part.order.batch_size} readable pairs, got fewer: {reason}")
                whole[place] = row
                reading: Callable[[], tuple[UInt8 | None, str | None]]
                reading = partial(self._read_own, row, part.epoch) if is_own else _nothing
                image, reasons = together_with_values(asked, reading)
                reason = reasons[owner]
                if image is not None:
                    index[place - part.places.start], images[place - part.places.start] = row, image
        return index, images, whole

    def _read_own(self, row: int, epoch: int) -> tuple[UInt8, str | None]:
        """Return the image of a row, and the reason if the image is unreadable."""
        image = self._decode(np.array([row], dtype=np.int64), epoch)[0]
        return image, self.unreadable.get(row)

    def _from_workers(self, order: PartOfOrder, first_batch: int) -> Iterator[tuple[Int64, UInt8]]:
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

    def _assemble(self, index: Int64, images: UInt8, whole: Int64 | None = None) -> HostBatch:
        """Return the batch of some rows; `whole` has the rows of all processes, if there are several."""
        tokens = self._tokens[index].astype(np.int32)
        return HostBatch(index, images, tokens, self._pair_masks.of(index, whole), whole)

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


def _small_tokens(tokenizer: Tokenizer, captions: Sequence[str]) -> npt.NDArray[np.integer]:
    """Return the tokens (n, L) of n captions in the smallest dtype that holds the vocabulary: two bytes for CLIP."""
    dtype = np.uint16 if tokenizer.vocabulary_size <= 2**16 else np.int32
    tokens = np.zeros((len(captions), tokenizer.context_length), dtype=dtype)
    # The tokenizer returns four bytes per token, so it gets a part of the captions at a time.
    for start in range(0, len(captions), _CAPTIONS_AT_ONCE):
        part = captions[start : start + _CAPTIONS_AT_ONCE]
        tokens[start : start + len(part)] = tokenizer.encode(part)
    return tokens


def _nothing() -> tuple[None, None]:
    """Do nothing, because another process has the work."""
    return None, None


def _collected(index: Int64, parts: list[Future[UInt8]]) -> tuple[Int64, UInt8]:
    return index, np.concatenate([part.result() for part in parts])
