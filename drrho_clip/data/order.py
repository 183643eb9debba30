"""The order of samples in an epoch: a permutation of the rows that is computed, not drawn and stored.

A global batch holds the B samples of one step on all processes together. Global batch t of epoch e holds positions
t B .. (t + 1) B - 1 of a permutation of the n rows. Any part of the permutation can be computed alone, so the
whole state of the order is three integers: seed, epoch and position. The order depends neither on the number of
processes that share a batch nor on the number of threads that decode images.

The permutation is a Feistel network with 4 rounds on a grid of a x b cells, with cycle walking. Each line below is
exact integer arithmetic, so another language can repeat it:

    text      = "drrho order 1 SEED EPOCH", both numbers in decimal, in ASCII
    key[r]    = bytes 8r .. 8r + 7 of SHA-256(text) as a little-endian 64-bit number, r = 0 .. 3
    F(r, x)   = output number x (counted from 0) of the generator SplitMix64 with the seed key[r]
    a, b      = ceil(sqrt(n)), ceil(n / a)

    walk(p):  L, R = p // b, p % b
              L = (L + F(0, R) % a) % a;   R = (R + F(1, L) % b) % b
              L = (L + F(2, R) % a) % a;   R = (R + F(3, L) % b) % b
              return L b + R
    row(p)  = walk(p), or walk(walk(p)), ..., until the number is below n

Each round can be undone, so `walk` is a bijection of the grid's cells. Its cycles pass through the cells >= n, which
are no rows; row(p) skips these cells, so it is a bijection of 0 .. n - 1. There are fewer than sqrt(n) such cells, so a
second walk is rare. Every order has about the same chance if n is 50 or more; with fewer rows the chances of the
orders differ visibly, because 4 rounds on a few cells cannot reach every order equally often.

For slow disks there is a second order, "blocks", in which rows that are stored side by side are read at about the same
time. It is made of the same permutation, with other texts, so it can be computed in parts and has the same state:

    blocks    = the rows in blocks of S = 1024; the last block may be shorter
    sequence  = the blocks in the order of the text "drrho blocks 1 SEED EPOCH"
    windows   = W = 16 blocks of the sequence each; the last window may have fewer
    position  = a place in its window, whose rows are in the order of the text "drrho window 1 SEED EPOCH NUMBER"
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from drrho_clip.constants import ORDERS
from drrho_clip.data._checks import whole_number
from drrho_clip.data.protocol import Int64
from drrho_clip.errors import BadInput

__all__ = ["BLOCK_ROWS", "LARGEST", "WINDOW_BLOCKS", "EpochOrder", "PartOfOrder", "rows_at"]

BLOCK_ROWS: Final = 1024
"""Number of rows in a block of the order "blocks"."""

WINDOW_BLOCKS: Final = 16
"""Number of blocks that are mixed with each other."""

LARGEST: Final = 2**62
"""The largest number of rows: below it no sum of the network exceeds 64 bits."""

_ROUNDS: Final = 4

# Number of rows whose order is computed at a time, in about half a millisecond.
_ROWS_AT_ONCE: Final = 8192

# The constants of SplitMix64 (Steele, Lea and Flood 2014).
_STEP: Final = np.uint64(0x9E3779B97F4A7C15)
_FACTORS: Final = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))
_SHIFTS: Final = (np.uint64(30), np.uint64(27), np.uint64(31))

_UInt64 = npt.NDArray[np.uint64]


def rows_at(
    start: int,
    stop: int,
    num_samples: int,
    *,
    seed: int,
    epoch: int,
    order: str = "full",
    block_rows: int = BLOCK_ROWS,
    window_blocks: int = WINDOW_BLOCKS,
) -> Int64:
    """Return the rows at positions `start` to `stop` - 1 of the order of an epoch.

    Parameters
    ----------
    start, stop : int
        0 <= start <= stop <= n.
    num_samples : int
        Number n of rows, at most 2^62.
    seed, epoch : int
        At least 0.
    order : {"full", "blocks"}
        All rows are mixed, or blocks of rows within a window; see the docstring of the module.
    block_rows, window_blocks : int
        Number of rows in a block and of blocks in a window, at least 1, for the order "blocks".

    Returns
    -------
    ndarray of int64, shape (stop - start,)
        Distinct rows in 0 .. n - 1. Memory and time depend on the number of positions, not on n; for the order "blocks"
        they also depend on the number of blocks.

    Raises
    ------
    BadInput, TypeError
        An argument is outside its domain or has the wrong type.

    Notes
    -----
    The docstring of the module defines the permutation.

    Examples
    --------
    >>> rows_at(0, 10, 10, seed=3, epoch=2).tolist()
    [3, 7, 9, 6, 5, 0, 1, 8, 2, 4]
    >>> rows_at(999_999_997, 1_000_000_000, 1_000_000_000, seed=0, epoch=0).tolist()
    [262947511, 447719340, 268687073]
    >>> rows_at(0, 12, 12, seed=0, epoch=0, order="blocks", block_rows=2, window_blocks=2).tolist()
    [10, 9, 8, 11, 2, 1, 3, 0, 6, 4, 5, 7]
    """
    size = whole_number(num_samples, "num_samples", at_least=0)
    start = whole_number(start, "start", at_least=0)
    stop = whole_number(stop, "stop", at_least=start)
    seed = whole_number(seed, "seed", at_least=0)
    epoch = whole_number(epoch, "epoch", at_least=0)
    if size > LARGEST:
        raise BadInput(f"num_samples must be at most {LARGEST}, got {size}")
    if stop > size:
        raise BadInput(f"stop must be at most the number of samples ({size}), got {stop}")
    if order not in ORDERS:
        raise BadInput(f"order must be {' or '.join(map(repr, ORDERS))}, got {order!r}")
    if start == stop:
        return np.zeros(0, dtype=np.int64)
    if order == "full":
        return _permuted(start, stop, size, f"drrho order 1 {seed} {epoch}")
    sizes = whole_number(block_rows, "block_rows", at_least=1), whole_number(window_blocks, "window_blocks", at_least=1)
    return _in_blocks(start, stop, size, *sizes, seed, epoch)


class EpochOrder(NamedTuple):
    """The batches of an epoch, each of which can be computed alone.

    Attributes
    ----------
    num_samples, batch_size, seed, epoch : int
        See `batches`.
    order : {"full", "blocks"}
        See `rows_at`.
    rows : ndarray of int64, or None
        The rows that are used; positions count in this array. None: all rows.
    """

    num_samples: int
    batch_size: int
    seed: int
    epoch: int
    order: str = "full"
    rows: Int64 | None = None

    @property
    def num_batches(self) -> int:
        """Number of whole batches."""
        return self.num_samples // self.batch_size

    def batch(self, number: int) -> Int64:
        """Return the rows of a batch."""
        return self._at(number * self.batch_size, (number + 1) * self.batch_size)

    def batches(self, first_batch: int) -> Iterator[Int64]:
        """Yield the rows of the batches from a number on."""
        # The rows of several batches are computed at a time: one call for 10,000 rows is much faster than 100 calls.
        at_once = max(1, _ROWS_AT_ONCE // self.batch_size)
        for start in range(first_batch, self.num_batches, at_once):
            stop = min(start + at_once, self.num_batches)
            yield from self._at(start * self.batch_size, stop * self.batch_size).reshape(stop - start, self.batch_size)

    def after(self, number: int) -> Iterator[int]:
        """Yield the rows that follow a batch in the order; the start of the epoch follows its end."""
        places = range((number + 1) * self.batch_size, number * self.batch_size + self.num_samples)
        for place in places:
            position = place % self.num_samples
            yield int(self._at(position, position + 1)[0])

    def _at(self, start: int, stop: int) -> Int64:
        positions = rows_at(start, stop, self.num_samples, seed=self.seed, epoch=self.epoch, order=self.order)
        return positions if self.rows is None else self.rows[positions]


class PartOfOrder(NamedTuple):
    """The part of each batch of an epoch that one of several processes reads: b = B / W consecutive positions.

    Attributes
    ----------
    order : EpochOrder
        The whole batches, B rows each.
    rank, size : int
        Number of the process, and number W of processes, which divides B.
    """

    order: EpochOrder
    rank: int = 0
    size: int = 1

    @property
    def num_batches(self) -> int:
        """Number of batches, the same for all processes."""
        return self.order.num_batches

    @property
    def epoch(self) -> int:
        """Number of the epoch."""
        return self.order.epoch

    @property
    def places(self) -> slice:
        """The positions of the own rows in a batch."""
        length = self.order.batch_size // self.size
        return slice(self.rank * length, (self.rank + 1) * length)

    def batch(self, number: int) -> Int64:
        """Return the own rows of a batch."""
        return self.order.batch(number)[self.places]

    def batches(self, first_batch: int) -> Iterator[Int64]:
        """Yield the own rows of the batches from a number on."""
        return (whole[self.places] for whole in self.order.batches(first_batch))


def _in_blocks(start: int, stop: int, size: int, block_rows: int, window_blocks: int, seed: int, epoch: int) -> Int64:
    """Return a part of the order "blocks"."""
    num_blocks = -(-size // block_rows)
    sequence = _permuted(0, num_blocks, num_blocks, f"drrho blocks 1 {seed} {epoch}")
    # ends[k] is the number of rows in the first k blocks of the sequence; only the last block of the rows is shorter.
    ends = np.arange(num_blocks + 1, dtype=np.int64) * block_rows
    short_at = int(np.flatnonzero(sequence == num_blocks - 1)[0])
    ends[short_at + 1 :] -= num_blocks * block_rows - size
    parts = []
    first = (int(np.searchsorted(ends, start, side="right")) - 1) // window_blocks
    for window in range(first, -(-num_blocks // window_blocks)):
        low, high = window * window_blocks, min((window + 1) * window_blocks, num_blocks)
        begin, end = int(ends[low]), int(ends[high])
        if begin >= stop:
            break
        text = f"drrho window 1 {seed} {epoch} {window}"
        places = begin + _permuted(max(start, begin) - begin, min(stop, end) - begin, end - begin, text)
        block = np.searchsorted(ends, places, side="right") - 1
        parts.append(sequence[block] * block_rows + places - ends[block])
    return np.concatenate(parts)


def _permuted(start: int, stop: int, size: int, text: str) -> Int64:
    """Return positions `start` to `stop` - 1 of the permutation of 0 .. size - 1 that belongs to a text."""
    if start >= stop:
        return np.zeros(0, dtype=np.int64)
    keys = _keys(text)
    # ceil(sqrt(n)) and ceil(n / a), without floating-point numbers.
    height = math.isqrt(size - 1) + 1
    width = -(-size // height)
    cells = _walk(np.arange(start, stop, dtype=np.uint64), keys, height, width)
    outside = np.flatnonzero(cells >= size)
    while outside.size:
        cells[outside] = _walk(cells[outside], keys, height, width)
        outside = outside[cells[outside] >= size]
    return cells.astype(np.int64)


def _keys(text: str) -> _UInt64:
    """Return the keys of the rounds."""
    digest = hashlib.sha256(text.encode("ascii")).digest()
    return np.frombuffer(digest, dtype="<u8", count=_ROUNDS).astype(np.uint64)


def _walk(cells: _UInt64, keys: _UInt64, height: int, width: int) -> _UInt64:
    """Apply the 4 rounds once to each cell of a grid of `height` x `width` cells."""
    sides = np.uint64(height), np.uint64(width)
    halves = list(np.divmod(cells, sides[1]))
    for number, key in enumerate(keys):
        # Rounds 0 and 2 change the left half, rounds 1 and 3 the right half; the other half selects the summand.
        own = number % 2
        halves[own] = (halves[own] + _split_mix(key, halves[1 - own]) % sides[own]) % sides[own]
    walked: _UInt64 = halves[0] * sides[1] + halves[1]
    return walked


def _split_mix(key: np.uint64, positions: _UInt64) -> _UInt64:
    """Return the outputs of SplitMix64 at the given positions (counted from 0); products and sums are modulo 2^64."""
    z = positions + np.uint64(1)
    z *= _STEP
    z += key
    for shift, factor in zip(_SHIFTS, _FACTORS, strict=False):
        z ^= z >> shift
        z *= factor
    z ^= z >> _SHIFTS[2]
    return z
