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
"""

from __future__ import annotations

import hashlib
import math
from typing import Final

import numpy as np
import numpy.typing as npt

from drrho_clip.data._checks import whole_number
from drrho_clip.data.protocol import Int64
from drrho_clip.errors import BadInput

__all__ = ["LARGEST", "rows_at"]

LARGEST: Final = 2**62
"""The largest number of rows: below it no sum of the network exceeds 64 bits."""

_ROUNDS: Final = 4

# The constants of SplitMix64 (Steele, Lea and Flood 2014).
_STEP: Final = np.uint64(0x9E3779B97F4A7C15)
_FACTORS: Final = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))
_SHIFTS: Final = (np.uint64(30), np.uint64(27), np.uint64(31))

_UInt64 = npt.NDArray[np.uint64]


def rows_at(start: int, stop: int, num_samples: int, *, seed: int, epoch: int) -> Int64:
    """Return the rows at positions `start` to `stop` - 1 of the order of an epoch.

    Parameters
    ----------
    start, stop : int
        0 <= start <= stop <= n.
    num_samples : int
        Number n of rows, at most 2^62.
    seed, epoch : int
        At least 0.

    Returns
    -------
    ndarray of int64, shape (stop - start,)
        Distinct rows in 0 .. n - 1. Memory and time depend on the number of positions, not on n.

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
    if start == stop:
        return np.zeros(0, dtype=np.int64)
    keys = _keys(seed, epoch)
    # ceil(sqrt(n)) and ceil(n / a), without floating-point numbers.
    height = math.isqrt(size - 1) + 1
    width = -(-size // height)
    cells = _walk(np.arange(start, stop, dtype=np.uint64), keys, height, width)
    outside = np.flatnonzero(cells >= size)
    while outside.size:
        cells[outside] = _walk(cells[outside], keys, height, width)
        outside = outside[cells[outside] >= size]
    return cells.astype(np.int64)


def _keys(seed: int, epoch: int) -> _UInt64:
    """Return the keys of the rounds."""
    digest = hashlib.sha256(f"drrho order 1 {seed} {epoch}".encode("ascii")).digest()
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
