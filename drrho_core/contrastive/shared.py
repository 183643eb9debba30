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

    def __init__(self, smallest_normal: float) -> None:
        self.cold = -0.65 * math.log(smallest_normal)  # exponents further apart than this share nothing
        self._kept: dict[tuple[Any, Any], Shared] = {}
        self._tops: dict[tuple[Any, Any], Array] = {}  # of the tiles that are not cold

    # The methods get the tiles as an argument. An attribute would make a cycle, and a cycle would keep the memory of
    # a step until Python looks for cycles, long after the step.

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

    def again(self, tiles: Tiles, i: Any, j: Any, diagonal: bool) -> Shared | None:
        """Return a tile's exponentials of the first pass, or make them again; None if the tile is cold."""
        if (i, j) in self._kept:
            return self._kept.pop((i, j))
        if (i, j) not in self._tops:
            return None
        top, tile = self._tops[i, j], tiles.tile(i, j, diagonal)
        tile = tile._replace(z=tiles.only_negatives(tile.z, tile))
        return Shared(top, tiles.exp(_exponents(tiles, tile, top), True))


def _exponents(tiles: Tiles, tile: Tile, top: Array) -> Array:
    """Return ``(Z - top) r`` of a tile, finite for pairs that do not count; the tile is overwritten."""
    x, floor, rate = tile.z, tiles.floors[0], tiles.rates[0]
    x -= top
    if floor is not None:
        x = tiles.xp.clip(x, min=floor)
    if not (isinstance(rate, float) and rate == 1.0):
        x *= rate
    return tiles.finite_exponents(x, tile)
