"""One exponential per pair for both directions, if one temperature serves all anchors.

    e = exp((Z - m) r),   m the largest entry of the tile

The sums of e over rows and over columns serve the anchors of both directions, and in the second pass the weights are
products of the same e. Compared with two exponentials per pair, float32 gradients are 2 to 8 times more accurate at
temperatures of .07 and .01, because the rounding of Z cancels between a weight and the sum that divides it.

A tile in which the peak of some anchor is so far below m that e would underflow is *cold*: there each direction takes
exponentials relative to its own peaks. The choice reads values. If they cannot be read (under tracing, on a device)
every tile is treated as cold.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

from drrho_core._array_api import Array

if TYPE_CHECKING:
    from drrho_core.contrastive.tiles import Tile, Tiles

FLOOR = -1e4
"""An exponent whose exponential is 0 in every dtype, and which is finite, so that 0 times it is 0."""


class Shared(NamedTuple):
    """A tile's exponentials that serve both directions."""

    top: Array  # m, the tile's largest entry; shape ()
    exponential: Array  # exp((Z - m) r), 0 for a pair that does not count


class SharedExponentials:
    """The shared exponentials of a batch's tiles: made in the first pass, kept or made again for the second."""

    def __init__(self, tiles: Tiles) -> None:
        self._tiles = tiles
        smallest = float(tiles.xp.finfo(tiles.dtype).smallest_normal)
        self.cold = -0.65 * math.log(smallest)  # exponents further apart than this share nothing
        self._kept: dict[tuple[Any, Any], Shared] = {}
        self._tops: dict[tuple[Any, Any], Array] = {}  # of the tiles that are not cold

    def first(self, tile: Tile, peaks: list[Array]) -> tuple[Shared, Array] | None:
        """Return a tile's exponentials and their exponents; None if the tile is cold.

        `peaks` hold the largest entry of each row and of each column. The tile is overwritten if it is not cold.
        """
        xp, lowest = self._tiles.xp, self._tiles.lowest
        top = xp.max(peaks[0])
        if not bool(top > lowest):
            return None
        # Rows and columns without negatives have no peak and do not make a tile cold.
        row, column = (xp.min(xp.where(peak > lowest, peak, top)) for peak in peaks)
        depth = float(top) - float(xp.minimum(row, column))
        if not depth * float(self._tiles.rates[0]) < self.cold:
            return None
        x = self._exponents(tile, top)
        shared = Shared(top, self._tiles.exp(x, False))
        if self._tiles.keeps:
            self._kept[tile.i, tile.j] = shared
        self._tops[tile.i, tile.j] = top
        return shared, x

    def again(self, i: Any, j: Any, diagonal: bool) -> Shared | None:
        """Return a tile's exponentials of the first pass, or make them again; None if the tile is cold."""
        if (i, j) in self._kept:
            return self._kept.pop((i, j))
        if (i, j) not in self._tops:
            return None
        top, tile = self._tops[i, j], self._tiles.tile(i, j, diagonal)
        tile = tile._replace(z=self._tiles.only_negatives(tile.z, tile))
        return Shared(top, self._tiles.exp(self._exponents(tile, top), True))

    def _exponents(self, tile: Tile, top: Array) -> Array:
        """Return ``(Z - top) r`` of a tile, finite for pairs that do not count; the tile is overwritten."""
        x, floor, rate = tile.z, self._tiles.floors[0], self._tiles.rates[0]
        x -= top
        if floor is not None:
            x = self._tiles.xp.clip(x, min=floor)
        if not (isinstance(rate, float) and rate == 1.0):
            x *= rate
        return self._tiles.finite_exponents(x, tile)
