"""The similarities of all pairs of a batch, in square tiles.

Rows are images, columns are texts; the b x b matrix Z is computed, read and dropped tile by tile:

    Z = [E1, -lambda R1] [E2, R2]^T        the excess similarity: one product serves learner and reference model

Tiles are either kept between the two passes (4 products b x b x d in all, half of them for the reference) or computed
again (6 products, and memory grows with b and not with b^2). A tile costs more than its products only by the work on
its b^2 entries, so that is little: two maxima, a difference, an exponential, a product and four sums in the first pass,
an outer sum and a product in the second. Everything else is of size b. `drrho_core.contrastive.passes` has both passes.

If both sides are one view, Z is symmetric, a sample has one anchor and not two, and the tiles on and above the diagonal
are enough: the rows and the columns of a tile are then different anchors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

from drrho_core import _validate, extend
from drrho_core._array_api import (
    Array,
    Namespace,
    PerAnchor,
    Scalar,
    all_visible,
    device_of,
    library,
    wide_dtype,
)
from drrho_core._routines import tile_routines
from drrho_core.contrastive.scaling import Scaling, find_scaling
from drrho_core.contrastive.shared import FLOOR, SharedExponentials

DEFAULT_TILE = 1024
"""Square tiles of this side run at the matrix product's own rate and stay in cache between their uses."""

DEFAULT_MEMORY_BUDGET = 2**30
"""Memory limit in bytes for caching the logits between the passes; above it they are recomputed."""

Values: TypeAlias = tuple[Any, ...]
"""Results of one tile for one block of anchors: arrays whose first axis is the anchors', or None."""

Visit: TypeAlias = Callable[[Any, Any, bool], tuple[Values, Values]]
"""``visit(i, j, diagonal)`` returns the results of tile (i, j) for its rows and for its columns."""

Merge: TypeAlias = Callable[[int, Any, Values, Values], Values]
"""``merge(side, block, old, new)`` joins the results of two tiles for a block of rows (side 0) or of columns (1)."""

Weigh: TypeAlias = Callable[[Any, Any, bool], tuple[Array, Values, Values]]
"""``weigh(i, j, diagonal)`` returns the weights V of a tile's pairs, and further results that are added up."""


class Tile(NamedTuple):
    """One tile of Z."""

    i: Any  # number of its block of rows: an int, or traced
    j: Any  # number of its block of columns
    diagonal: bool  # whether row k and column k belong to one sample
    z: Array  # (rows, columns)
    counts: Array | None  # which entries are pairs of an anchor and a negative; None: all of them

    def block(self, side: int) -> Any:
        """Return the number of the tile's block of rows (side 0) or of columns (side 1)."""
        return self.j if side else self.i


def tiling(batch_size: int, item_size: int, tile_size: int | None, memory_budget: int | None) -> tuple[int, bool]:
    """Return the side of the tiles and whether the logits are kept between the passes.

    An integer `tile_size` asks for two passes without any b x b array. Otherwise the logits are kept if they fit the
    budget.
    """
    budget, side = DEFAULT_MEMORY_BUDGET, DEFAULT_TILE
    if memory_budget is not None:
        budget = _validate.integer("memory_budget", memory_budget, minimum=0)
    if batch_size < 2 * side:  # two tiles a side: a single one would be masked everywhere, and not stay in cache
        side = max(side // 2, -(-batch_size // 2))
    if tile_size is not None:
        side = _validate.integer("tile_size", tile_size, minimum=1)
    return side, tile_size is None and batch_size * batch_size * item_size <= budget


def split(
    image_features: Array,
    text_features: Array,
    *,
    temperature: PerAnchor = 1.0,
    reference_features: tuple[Array, Array] | None = None,
    reference_weight: Scalar = 1.0,
    pair_mask: Array | None = None,
    tile_size: int | None = None,
    memory_budget: int | None = None,
    matrices: int = 1,
    passes: int = 2,
    share: bool = True,
    symmetric: bool = False,
    margin: Scalar | None = None,
    xp: Namespace,
) -> Tiles:
    """Cast half types to float32 and split Z into tiles.

    The `matrices` of a step share one memory budget; each tile is read in so many `passes`. `share` allows one
    exponential for both directions. See `find_scaling` about `margin`.
    """
    dtype = work_dtype(image_features, reference_features, xp)
    images, texts = xp.astype(image_features, dtype, copy=False), xp.astype(text_features, dtype, copy=False)
    references = None
    if reference_features is not None:
        image, text = reference_features
        references = (xp.astype(image, dtype, copy=False), xp.astype(text, dtype, copy=False))
    if not isinstance(temperature, float):
        temperature = cast(temperature, dtype, xp)

    # If all values can be read, so can everything that is computed from them: tiles may share exponentials then.
    inputs = [images, texts, *(references or ())]
    for value in (reference_weight, margin, *(temperature if isinstance(temperature, tuple) else (temperature,))):
        if value is not None and not isinstance(value, float):
            inputs.append(value)
    visible = all_visible(inputs, xp)

    # The side of the tiles follows from the batch and the memory budget.
    batch_size = int(images.shape[0])
    side, keep = tiling(batch_size, matrices * xp.finfo(dtype).bits // 8, tile_size, memory_budget)
    # A single tile needs no loop, so a backend's rolled loop is for several tiles only.
    choose = extend.registered(library(xp)).tiles if batch_size > side else None
    rolled = None if choose is None else choose()
    return (Tiles if rolled is None else rolled)(
        images,
        texts,
        references=references,
        reference_weight=reference_weight,
        scaling=find_scaling(images, texts, references, reference_weight, temperature, margin, visible, xp),
        pair_mask=pair_mask,
        side=side,
        keep=keep and passes > 1,
        share=share and visible and (pair_mask is None or all_visible((pair_mask,), xp)),
        symmetric=symmetric,
        xp=xp,
    )


def work_dtype(features: Array, reference_features: tuple[Array, Array] | None, xp: Namespace) -> Any:
    """Return the dtype of the products: that of the features and of the reference features, at least float32."""
    dtype = features.dtype
    if reference_features is not None and reference_features[0].dtype != dtype:
        dtype = xp.result_type(dtype, reference_features[0].dtype)
    return wide_dtype(dtype, xp)


def cast(value: Any, dtype: Any, xp: Namespace) -> Any:
    """Give an array, or each array of a pair, a dtype; numbers stay numbers, which promote nothing."""
    if isinstance(value, tuple):
        return tuple(cast(member, dtype, xp) for member in value)
    return value if isinstance(value, float) else xp.astype(value, dtype)


class Tiles:
    """Z of one batch in tiles, ready for the passes. All arrays share one floating dtype, float32 or wider.

    Everything that is cut into blocks of anchors is indexed by the number of the block. A backend may subclass this
    class to roll up the loop over tiles while a compiler traces it; see `drrho_core.extend`.

    Parameters
    ----------
    images, texts : array, shape (b, d)
        The learner's features.
    references : pair of arrays, shape (b, r), or None
        The reference model's features, multiplied by ``-reference_weight`` on the image side.
    reference_weight : float or array of shape ()
        lambda.
    scaling : Scaling
        Factors of Z, and the rates of its exponents.
    pair_mask : array of bool, shape (b, b), or None
        False: not a negative.
    side : int
        Largest side of a tile.
    keep : bool
        Whether tiles are kept from the first pass for the second.
    share : bool
        Whether one exponential may serve both directions. Values have to be visible for it.
    symmetric : bool
        Whether both sides are one view.
    xp : namespace
        The arrays' namespace.
    """

    can_share = True
    """Whether exponentials can serve both directions; not in a traced loop, because the choice reads values."""

    def __init__(
        self,
        images: Array,
        texts: Array,
        *,
        references: tuple[Array, Array] | None,
        reference_weight: Scalar,
        scaling: Scaling,
        pair_mask: Array | None,
        side: int,
        keep: bool,
        share: bool,
        symmetric: bool,
        xp: Namespace,
    ) -> None:
        self.xp, self.scaling, self.pair_mask, self.symmetric, self.keeps = xp, scaling, pair_mask, symmetric, keep
        self.matmul, self.exp = tile_routines(images, xp)
        self.dtype, self.device = images.dtype, device_of(images)
        finfo = xp.finfo(images.dtype)
        self.lowest = -float(finfo.max) / 4  # below every Z: the peak of an anchor without negatives
        self.batch_size = int(images.shape[0])
        # Tiles are as equal as they can be: 2,500 pairs with a side of 1,024 make 834 + 834 + 832.
        self.side = -(-self.batch_size // -(-self.batch_size // side))
        starts = range(0, self.batch_size, self.side)
        self.spans = list(map(slice, starts, [*starts[1:], self.batch_size]))
        self.num_blocks = len(self.spans)

        # The right factor [E2, R2] is made once. The left one, [E1, -lambda R1], is made row by row in `left`.
        right = texts if references is None else xp.concat([texts, references[1]], axis=1)
        sides = [images, texts, _times(right, scaling.right)]
        self.images, self.texts, self.right, *cut = self.cut(*sides, *(references or ())[:1])
        self.reference_images = cut[0] if cut else None
        self.left_factors = scaling.left, -reference_weight * scaling.left
        self._row: tuple[int, Array] | None = None

        # Rates per anchor are cut like the anchors; a rate that serves all anchors stays a scalar.
        self.per_anchor = getattr(scaling.rates[0], "ndim", 0) == 1
        self.rates: Any = self.cut(*scaling.rates, fill=1.0) if self.per_anchor else scaling.rates
        self.floors: Any = self.cut(*scaling.floors, fill=1.0) if self.per_anchor else scaling.floors

        # Tiles that pass 1 leaves for pass 2, and masks of the diagonal by the size of the tile.
        self.mask = None if pair_mask is None else self.cut_mask(pair_mask)
        self._kept: dict[tuple[int, int], Array] = {}
        self._off_diagonals: dict[int, Array] = {}
        self._barriers: dict[int, Array] = {}
        can_share = share and self.can_share and not self.per_anchor
        self.shared = SharedExponentials(float(finfo.smallest_normal)) if can_share else None

    def cut(self, *arrays: Array, fill: float = 0.0) -> list[Any]:
        """Return the blocks of each array along its first axis.

        Subclasses whose blocks have one size put `fill` where the last block lacks entries.
        """
        del fill
        if self.num_blocks == 1:
            return list(zip(arrays, strict=True))
        return [[x[rows, ...] for rows in self.spans] for x in arrays]

    def cut_mask(self, mask: Array) -> Any:
        """Return the mask, cut as `counts` reads it."""
        return self.cut(mask)[0]

    def sweep(self, visit: Visit, merge: Merge) -> tuple[Values, Values]:
        """Visit every tile and merge the results of each block of rows and of columns; return both, joined.

        If Z is symmetric, rows and columns are the same anchors, and both results are one.
        """
        to_rows: list[Any] = [None] * self.num_blocks
        to_columns = to_rows if self.symmetric else list(to_rows)
        for i in range(self.num_blocks):
            # Many devices come in here: a rank visits the blocks of texts by their distance from its own. Only
            # distance 0 has positives on its diagonal, so `diagonal` is an argument and no visit compares i with j.
            for j in range(i if self.symmetric else 0, self.num_blocks):
                rows, columns = visit(i, j, i == j)
                to_rows[i] = rows if to_rows[i] is None else merge(0, i, to_rows[i], rows)
                if not (self.symmetric and i == j):
                    to_columns[j] = columns if to_columns[j] is None else merge(1, j, to_columns[j], columns)
        if self.num_blocks == 1:
            return to_rows[0], to_columns[0]
        rows = self._joined(to_rows)
        return rows, rows if self.symmetric else self._joined(to_columns)

    def pull(self, weigh: Weigh) -> tuple[Array, Array, Values, Values]:
        """Return ``V E2`` and ``V^T E1`` for weights V, and the sums of further results for rows and for columns.

        If Z is symmetric, both products are added up, and a tile on the diagonal brings its transpose along in V.
        """

        def visit(i: int, j: int, diagonal: bool) -> tuple[Values, Values]:
            v, rows, columns = weigh(i, j, diagonal)
            to_rows = (self.matmul(v, self.texts[j]), *rows)
            if self.symmetric and diagonal:
                return to_rows, ()
            return to_rows, (self.matmul(v.T, self.images[i]), *columns)

        (image, *rows), (text, *columns) = self.sweep(visit, add)
        return image, text, tuple(rows), tuple(columns)

    def tile(self, i: Any, j: Any, diagonal: bool) -> Tile:
        """Return a tile of Z and which of its entries count."""
        return Tile(i, j, diagonal, self.z(i, j), self.counts(i, j, diagonal))

    def z(self, i: Any, j: Any) -> Array:
        """Return the entries of a tile, kept or computed."""
        kept = self._kept.get((i, j))
        return self.matmul(self.left(i), self.right[j].T) if kept is None else kept

    def left(self, i: Any) -> Array:
        """Return the rows of ``[E1, -lambda R1]`` of a block: only these are made, once for all tiles of the row."""
        if self._row is not None and self._row[0] == i:
            return self._row[1]
        left = self.make_left(i)
        self._row = i, left
        return left

    def make_left(self, i: Any) -> Array:
        """Return the rows of ``[E1, -lambda R1]`` of a block, made anew."""
        # lambda is multiplied here and not to all of R1, so that no second array of its size exists.
        factor, reference_factor = self.left_factors
        left = _times(self.images[i], factor)
        if self.reference_images is None:
            return left
        return self.xp.concat([left, self.reference_images[i] * reference_factor], axis=1)

    def keep(self, tile: Tile) -> None:
        """Keep a tile of Z for the second pass, if there is room."""
        if self.keeps:
            self._kept[tile.i, tile.j] = tile.z

    def positives(self) -> Array:
        """Return the diagonal of Z (b,), from the products of its tiles: positives that tie are equal to the bit."""
        for i in range(self.num_blocks):  # no b x b array, and so kept in any case
            self._kept[i, i] = self.z(i, i)
        diagonals = [self.xp.linalg.diagonal(self._kept[i, i]) for i in range(self.num_blocks)]
        return diagonals[0] if len(diagonals) == 1 else self.xp.concat(diagonals)

    def counts(self, i: Any, j: Any, diagonal: bool) -> Array | None:
        """Return which entries of a tile are pairs of an anchor and a negative; None if all are."""
        counts = None if self.mask is None else self.mask[i][:, self.spans[j]]
        if not diagonal:
            return counts
        size = self.spans[i].stop - self.spans[i].start
        if size not in self._off_diagonals:
            index = self.xp.arange(size, device=self.device)
            self._off_diagonals[size] = index[:, None] != index[None, :]
        return self._off_diagonals[size] if counts is None else counts & self._off_diagonals[size]

    def only_negatives(self, x: Array, tile: Tile) -> Array:
        """Return numbers per pair of which the uncounted are -inf: ignored by a maximum, 0 as exponentials."""
        xp = self.xp
        if tile.counts is None:
            return x
        if self.mask is not None:
            return xp.where(tile.counts, x, -xp.inf)
        # Adding a matrix of 0 and -inf takes a quarter of the time that `where` takes.
        size = x.shape[0]
        if size not in self._barriers:
            self._barriers[size] = xp.where(tile.counts, xp.zeros_like(x), -xp.inf)
        return x + self._barriers[size]

    def rate(self, side: int, block: Any) -> Scalar:
        """Return the rates of a block's anchors, (side,) or a scalar."""
        return self.rates[side][block] if self.per_anchor else self.rates[side]

    def exponent(self, side: int, tile: Tile, threshold: Array) -> Array:
        """Return ``(Z - threshold_i) r_i`` of a tile, given a number for each of its anchors in one direction."""
        xp, axis, block = self.xp, 1 - side, tile.block(side)
        x = tile.z - along(axis, threshold)
        floor = self.floors[side]
        if floor is not None:  # the difference times the rate could overflow
            if tile.counts is not None:  # an entry that does not count may be far above
                x = xp.where(tile.counts, x, xp.zeros_like(x))
            x = xp.maximum(x, along(axis, floor[block])) if self.per_anchor else xp.clip(x, min=floor)
        return times_rate(x, along(axis, self.rates[side][block]) if self.per_anchor else self.rates[side])

    def finite_exponents(self, x: Array, tile: Tile) -> Array:
        """Return exponents of which those that do not count are finite, and 0 as exponentials."""
        if tile.counts is None:
            return x
        # Without a floor an entry that does not count is -inf already, and clipping takes half the time of `where`.
        return self.xp.clip(x, min=FLOOR) if self.floors[0] is None else self.xp.where(tile.counts, x, FLOOR)

    def _joined(self, blocks: list[Any]) -> Values:
        """Concatenate the results of all blocks."""
        parts = zip(*blocks, strict=True)
        return tuple(None if part[0] is None else self.xp.concat(list(part), axis=0) for part in parts)


def add(_side: int, _block: Any, old: Values, new: Values) -> Values:
    """Add the results of two tiles, in place if the library can."""
    sums = []
    for a, b in zip(old, new, strict=True):
        a += b
        sums.append(a)
    return tuple(sums)


def along(axis: int, x: Array) -> Array:
    """Lay one number per anchor out along the axis of a tile that its sums run over."""
    return x[:, None] if axis == 1 else x[None, :]


def times_rate(x: Array, rate: Scalar) -> Array:
    """Return exponents, a tile times a rate; the tile is overwritten if the library can."""
    if isinstance(rate, float) and rate == 1.0:
        return x
    x *= rate
    return x


def _times(x: Array, factor: Scalar) -> Array:
    """Return ``x * factor``, and `x` itself if the factor is 1."""
    return x if (isinstance(factor, float) and factor == 1.0) else x * factor
