"""One exponential per pair for both directions, if all anchors have the same temperature t.

    e = exp((Z - m) r),   r = 1 / t,   m: the largest entry of a tile of Z

Z is the b x b matrix of excess similarities, which is processed in tiles. The anchors of the first direction are its
rows (images), those of the second are its columns (texts). In the first pass over the tiles e is summed over rows and
over columns. In the second pass the weight of a pair is the same e, divided by the sum of its row or column, times a
factor. So rounding errors of Z cancel in the quotient: at temperatures of .07 and .01, float32 gradients are 2 to 8
times more accurate than with two exponentials per pair.

The peak of an anchor is the largest entry of its row or column. If a peak in a tile is so far below m that e would
underflow, the tile is called *cold*. In a cold tile separate exponentials, relative to the peaks of the anchors, are
computed for each direction. The test for cold tiles reads values. If values cannot be read (under tracing, on a
device), every tile is treated as cold.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

from drrho_core._array_api import Array

if TYPE_CHECKING:
    from drrho_core.contrastive.tiles import Tile, Tiles

FLOOR = -1e4
"""A finite exponent whose exponential is 0 in every dtype. Because it is finite, its product with 0 is 0, not nan."""


class Shared(NamedTuple):
    """A tile's exponentials, which both directions use."""

    top: Array  # m, the tile's largest entry; shape ()
    exponential: Array  # exp((Z - m) r), 0 for a pair that is no negative


class SharedExponentials:
    """The shared exponentials of a batch's tiles: computed in the first pass, kept or recomputed for the second."""

    def __init__(self, smallest_normal: float) -> None:
        self.cold = -0.65 * math.log(smallest_normal)  # a tile is cold if the exponent of a peak is below -cold
        self._kept: dict[tuple[Any, Any], Shared] = {}
        self._tops: dict[tuple[Any, Any], Array] = {}  # m of every tile that is not cold

    # The methods get the tiles as an argument. If they were an attribute, both objects would refer to each other,
    # and the memory of a step would stay in use until Python's garbage collector runs, long after the step.

    def first(self, tiles: Tiles, tile: Tile, peaks: list[Array]) -> tuple[Shared, Array] | None:
        """Return a tile's exponentials and their exponents; None if the tile is cold.

        `peaks` hold the largest entry of each row and of each column. The tile is overwritten if it is not cold.
        """
        xp, lowest = tiles.xp, tiles.lowest
        top = xp.max(peaks[0])
        if not bool(top > lowest):
            return None
        # Rows and columns without negatives have no peak and do not make a tile cold.
        row = xp.min(xp.where(peaks[0] > lowest, peaks[0], top))
        column = xp.min(xp.where(peaks[1] > lowest, peaks[1], top))
        depth = float(top) - float(xp.minimum(row, column))
        if not depth * float(tiles.rates[0]) < self.cold:
            return None
        x = _exponents(tiles, tile, top)
        shared = Shared(top, tiles.exp(x, False))
        if tiles.keeps:
            self._kept[tile.i, tile.j] = shared
        self._tops[tile.i, tile.j] = top
        return shared, x

    def holds(self, i: Any, j: Any) -> bool:
        """Return whether the exponentials of a tile are kept for the second pass."""
        return (i, j) in self._kept

    def again(self, tiles: Tiles, i: Any, j: Any, diagonal: bool) -> Shared | None:
        """Return a tile's exponentials for the second pass, kept or recomputed; None if the tile is cold."""
        if (i, j) in self._kept:
            return self._kept.pop((i, j))
        if (i, j) not in self._tops:
            return None
        top, tile = self._tops[i, j], tiles.tile(i, j, diagonal)
        tile = tile._replace(z=tiles.only_negatives(tile.z, tile))
        return Shared(top, tiles.exp(_exponents(tiles, tile, top), True))


def _exponents(tiles: Tiles, tile: Tile, top: Array) -> Array:
    """Return ``(Z - top) r`` of a tile, finite even for pairs that are no negatives; the tile is overwritten."""
    x = tile.z
    x -= top
    return tiles.finite_exponents(tiles.scaled(0, tile, x), tile)
