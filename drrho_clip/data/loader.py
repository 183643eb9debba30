"""Batches: which samples, in which order, decoded ahead of use."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from drrho_clip.data._checks import whole_number
from drrho_clip.data.preprocess import resize, to_channels
from drrho_clip.data.protocol import Dataset, Int32, Int64, UInt8, captions_of
from drrho_clip.data.tokenizer import WordTokenizer
from drrho_clip.errors import BadInput

__all__ = ["BatchSource", "HostBatch", "batches"]

_AHEAD = 3  # batches being decoded at a time: enough to hide a slow image, few enough to hold in memory


class HostBatch(NamedTuple):
    """One batch as NumPy arrays.

    Attributes
    ----------
    sample_index : ndarray of int64, shape (b,)
        Row ids, none twice.
    images : ndarray of uint8, shape (b, s, s, C)
    tokens : ndarray of int32, shape (b, L)
    """

    sample_index: Int64
    images: UInt8
    tokens: Int32


def batches(num_samples: int, batch_size: int, *, seed: int, epoch: int) -> Iterator[Int64]:
    """Deal all samples into batches, in an order of this epoch's own.

    The order is a permutation drawn from `numpy.random.default_rng([seed, epoch])`, so a resumed run needs no more than
    the two numbers. The last short batch is dropped: every anchor keeps its b - 1 negatives, and shapes stay fixed.

    Parameters
    ----------
    num_samples : int
        n.
    batch_size : int
        b, from 2 to n.
    seed, epoch : int
        At least 0.

    Returns
    -------
    iterator of ndarray of int64, shape (b,)
        n // b of them; no sample comes twice.

    Raises
    ------
    BadInput, TypeError
        An argument is outside its domain, or of another type.

    Examples
    --------
    >>> [len(index) for index in batches(10, 4, seed=0, epoch=0)]
    [4, 4]
    """
    num_samples = whole_number(num_samples, "num_samples", at_least=0)
    batch_size = whole_number(batch_size, "batch_size", at_least=2)
    if batch_size > num_samples:
        raise BadInput(f"batch_size must be at most the number of samples ({num_samples}), got {batch_size}")
    seed = whole_number(seed, "seed", at_least=0)
    epoch = whole_number(epoch, "epoch", at_least=0)
    order = np.random.default_rng([seed, epoch]).permutation(num_samples).astype(np.int64)
    full = num_samples // batch_size
    return iter(order[: full * batch_size].reshape(full, batch_size))


class BatchSource:
    """Batches of a data set, with images of one size and captions as tokens.

    Captions are encoded once, when the source is built. Images are decoded on first use by a few threads, some batches
    ahead; they stay in memory where the whole set fits the budget. What comes out depends on neither.

    Parameters
    ----------
    dataset : Dataset
    tokenizer : WordTokenizer
    image_size : int
        s, at least 1.
    channels : int, optional
        1 or 3; that of the data set's first image when left out.
    cache_bytes : int
        Memory that decoded images may take, 2 GiB by default; 0 keeps none.
    num_threads : int
        Threads that decode; 0 decodes where it is asked for.

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
        tokenizer: WordTokenizer,
        *,
        image_size: int,
        channels: int | None = None,
        cache_bytes: int = 2 * 2**30,
        num_threads: int = 2,
    ) -> None:
        if len(dataset) == 0:
            raise BadInput("dataset must hold at least one pair, got none")
        self.dataset = dataset
        self.tokenizer = tokenizer
        self.image_size = whole_number(image_size, "image_size", at_least=1)
        cache_bytes = whole_number(cache_bytes, "cache_bytes", at_least=0)
        self._num_threads = whole_number(num_threads, "num_threads", at_least=0)
        self.channels = int(dataset[0].image.shape[2]) if channels is None else channels
        if self.channels not in (1, 3):
            raise BadInput(f"channels must be 1 or 3, got {channels!r}")
        self._tokens = tokenizer.encode(captions_of(dataset))
        self._shape = (self.image_size, self.image_size, self.channels)
        images: UInt8 | None = getattr(dataset, "images", None)
        whole = (len(dataset), *self._shape)
        if isinstance(images, np.ndarray) and images.dtype == np.uint8 and images.shape == whole:
            self._cache: UInt8 | None = images  # in memory and of the right size already
            self._cached = np.ones(len(dataset), dtype=np.bool_)
        else:
            fits = math.prod(whole) <= cache_bytes
            self._cache = np.zeros(whole, dtype=np.uint8) if fits else None
            self._cached = np.zeros(len(dataset), dtype=np.bool_)

    def __len__(self) -> int:
        """Return the number of pairs."""
        return len(self.dataset)

    def epoch(self, batch_size: int, *, seed: int, epoch: int, first_batch: int = 0) -> Iterator[HostBatch]:
        """Yield one epoch's batches in the order of `batches`, from `first_batch` on.

        Raises
        ------
        BadInput
            As in `batches`, at once and not at the first batch; or an image that cannot be decoded, when it is met.
        """
        order = list(batches(len(self), batch_size, seed=seed, epoch=epoch))
        return self._stream(order[whole_number(first_batch, "first_batch", at_least=0) :])

    def in_order(self, batch_size: int) -> Iterator[HostBatch]:
        """Yield every pair once in row order, the last batch as short as it comes: for evaluation and encoding."""
        batch_size = whole_number(batch_size, "batch_size", at_least=1)
        rows = np.arange(len(self), dtype=np.int64)
        return self._stream([rows[start : start + batch_size] for start in range(0, len(self), batch_size)])

    def gather(self, sample_index: Sequence[int] | Int64) -> HostBatch:
        """Return the batch of those rows.

        Raises
        ------
        BadInput
            A row lies outside 0 .. n - 1, or none is given.
        """
        index = np.asarray(sample_index, dtype=np.int64)
        if index.ndim != 1 or index.size == 0 or index.min() < 0 or index.max() >= len(self):
            raise BadInput(f"sample_index must hold rows in 0 .. {len(self) - 1}, got {sample_index!r}")
        return self._assemble(index, self._decode(index))

    def _stream(self, order: list[Int64]) -> Iterator[HostBatch]:
        if self._num_threads == 0 or (self._cache is not None and self._cached.all()):
            for index in order:
                yield self._assemble(index, self._decode(index))
            return
        pool = ThreadPoolExecutor(self._num_threads, thread_name_prefix="drrho-decode")
        try:
            waiting: deque[tuple[Int64, list[Future[UInt8]]]] = deque()
            for index in order:
                parts = np.array_split(index, min(self._num_threads, index.size))
                waiting.append((index, [pool.submit(self._decode, part) for part in parts]))
                if len(waiting) >= _AHEAD:
                    yield self._collect(*waiting.popleft())
            while waiting:
                yield self._collect(*waiting.popleft())
        finally:
            pool.shutdown(wait=True, cancel_futures=True)  # also when the caller stops early or an image is broken

    def _collect(self, index: Int64, parts: list[Future[UInt8]]) -> HostBatch:
        return self._assemble(index, np.concatenate([part.result() for part in parts]))

    def _assemble(self, index: Int64, images: UInt8) -> HostBatch:
        return HostBatch(index, images, self._tokens[index])

    def _decode(self, index: Int64) -> UInt8:
        """Return the images of those rows; two threads may decode one image, and then write the same bytes."""
        if self._cache is None:
            return np.stack([self._decode_one(row) for row in index.tolist()])
        for row in index[~self._cached[index]].tolist():
            self._cache[row] = self._decode_one(row)
            self._cached[row] = True
        images: UInt8 = self._cache[index]
        return images

    def _decode_one(self, row: int) -> UInt8:
        image = to_channels(self.dataset[row].image, self.channels)
        resized: UInt8 = resize(image[None], self.image_size)[0]
        return resized
