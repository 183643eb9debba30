"""The similarities of all pairs of a batch, in square tiles.

Rows are images, columns are texts. The b x b matrix Z is computed, used and dropped tile by tile:

    Z = [E1, -lambda R1] [E2, R2]^T        the excess similarity: one product serves learner and reference model

E1 and E2 are the features, R1 and R2 the reference features, lambda is the weight of the reference model. Tiles are
either kept between the two passes or computed again in the second pass. If tiles are kept, a step takes four matrix
products of size b x b x d: for Z one of the learner's and one of the reference model's features, and two for the
gradients. If tiles are computed again, a step takes six products, and memory grows with b instead of b^2. The other
work on the b^2 entries is small: two maxima, a difference, an exponential, a product and four sums in pass 1, an outer
sum and a product in pass 2. All remaining work is of size b. `drrho_core.contrastive.passes` implements both
passes.

If both sides are one view, Z is symmetric, and a sample has one anchor instead of two. Then only the tiles on and above
the diagonal are computed. A tile above the diagonal gives results for the anchors of its rows and, because of the
symmetry, for the anchors of its columns.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

from drrho_core import _validate, extend
from drrho_core._array_api import Array, Namespace, PerAnchor, Scalar, all_visible, device_of, library, wide_dtype
from drrho_core._routines import tile_routines
from drrho_core.contrastive.scaling import Scaling, find_scaling, times_rate
from drrho_core.contrastive.shared_exponentials import FLOOR, SharedExponentials

DEFAULT_TILE = 1024
"""Side of a tile: large enough for a fast matrix product, small enough for the tile to stay in the cache."""

DEFAULT_MEMORY_BUDGET = 2**30
"""Bytes that the tiles of Z may take between the passes. If they need more, pass 2 computes them again."""

Values: TypeAlias = tuple[Any, ...]
"""Results of one tile for one block of anchors: arrays with one row or number per anchor, or None."""

Visit: TypeAlias = Callable[[Any, Any, bool], tuple[Values, Values]]
"""``visit(i, j, diagonal)`` returns the results of tile (i, j) for its rows and for its columns."""

Merge: TypeAlias = Callable[[int, Any, Values, Values], Values]
"""``merge(side, block, old, new)`` joins the results of two tiles for a block of rows (side 0) or of columns (1)."""

Weigh: TypeAlias = Callable[[Any, Any, bool], tuple[Array, Values, Values]]
"""``weigh(i, j, diagonal)`` returns the weights V of a tile's pairs, and further results for its rows and columns."""


class Tile(NamedTuple):
    """One tile of Z."""

    i: Any  # number of the tile's block of rows: an int, or traced
    j: Any  # number of the tile's block of columns
    diagonal: bool  # whether row k and column k belong to one sample
    z: Array  # (rows, columns)
    counts: Array | None  # which entries are pairs of an anchor and a negative; None: all of them

    def block(self, side: int) -> Any:
        """Return the number of the tile's block of rows (side 0) or of columns (side 1)."""
        return self.j if side else self.i


def tiling(batch_size: int, item_size: int, tile_size: int | None, memory_budget: int | None) -> tuple[int, bool]:
    """Return the side of the tiles and whether the logits are kept between the passes.

    If `tile_size` is an integer, logits are never kept, so no b x b array exists. Otherwise they are kept if they fit
    into the memory budget.
    """
    budget, side = DEFAULT_MEMORY_BUDGET, DEFAULT_TILE
    if memory_budget is not None:
        budget = _validate.integer("memory_budget", memory_budget, minimum=0)
    if batch_size < 2 * side:  # two tiles per side fit the cache, and only those on the diagonal need a mask
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
    paired: bool = True,
    sizes: list[Any] | None = None,
    xp: Namespace,
) -> Tiles:
    """Cast half types to float32 and split Z into tiles.

    The memory budget is shared by all matrices of a step, whose number is `matrices`. The number of `passes` says how
    often each tile is read. `share` allows one exponential for both directions. For `margin` and `sizes` see
    `find_scaling`, for `paired` see `Tiles`.
    """
    dtype = work_dtype(image_features, reference_features, xp)
    images, texts = cast((image_features, text_features), dtype, xp)
    references, temperature = cast(reference_features, dtype, xp), cast(temperature, dtype, xp)

    # If all inputs can be read, all results computed from them can be read, too. Then tiles may share exponentials.
    temperatures = temperature if isinstance(temperature, tuple) else (temperature,)
    inputs = (images, texts, *(references or ()), reference_weight, margin, *temperatures)
    visible = all_visible((x for x in inputs if x is not None and not isinstance(x, float)), xp)

    # The side of the tiles follows from the batch and the memory budget.
    batch_size = int(images.shape[0])
    side, keep = tiling(batch_size, matrices * xp.finfo(dtype).bits // 8, tile_size, memory_budget)
    # A single tile needs no loop, so a backend's own loop over tiles is used for several tiles only.
    choose = extend.registered(library(xp)).tiles if batch_size > side else None
    rolled = None if choose is None else choose()
    return (Tiles if rolled is None else rolled)(
        images,
        texts,
        references=references,
        reference_weight=reference_weight,
        scaling=find_scaling(images, texts, references, reference_weight, temperature, margin, visible, xp, sizes),
        pair_mask=pair_mask,
        side=side,
        keep=keep and passes > 1,
        share=share and visible and (pair_mask is None or all_visible((pair_mask,), xp)),
        symmetric=symmetric,
        paired=paired,
        xp=xp,
    )


def work_dtype(features: Array, reference_features: tuple[Array, Array] | None, xp: Namespace) -> Any:
    """Return the dtype of the products: that of the features and of the reference features, at least float32."""
    dtype = features.dtype
    if reference_features is not None and reference_features[0].dtype != dtype:
        dtype = xp.result_type(dtype, reference_features[0].dtype)
    return wide_dtype(dtype, xp)


def cast(value: Any, dtype: Any, xp: Namespace) -> Any:
    """Cast an array, or each array of a pair, to a dtype; a number or None is returned as it is."""
    if isinstance(value, (tuple, list)):
        return tuple(xp.astype(member, dtype, copy=False) for member in value)
    return value if value is None or isinstance(value, float) else xp.astype(value, dtype, copy=False)


class Tiles:
    """Z of one batch in tiles, ready for the passes. All arrays share one floating dtype, float32 or wider.

    Arrays that are cut into blocks of anchors are indexed by the number of the block. A backend may derive a class
    with a loop over tiles that no compiler unrolls; see `drrho_core.extend`.

    Parameters
    ----------
    images, texts : array, shape (b, d)
        The learner's features.
    references : pair of arrays, shape (b, r), or None
        The reference model's features. This class multiplies those of the images by ``-reference_weight``.
    reference_weight : float or array of shape ()
        lambda.
    scaling : Scaling
        Factors of Z, and the rates of its exponents.
    pair_mask : array of bool, shape (b, b), or None
        False: not a negative.
    side : int
        Largest side of a tile.
    keep : bool
        If True, the tiles of the first pass are kept for the second pass.
    share : bool
        If True, one exponential may serve both directions. The caller passes True only if values can be read.
    symmetric : bool
        If True, both sides are the same view.
    paired : bool
        If True, row k and column k belong to one sample. It is False if Z holds the images of one rank and the texts
        of another rank: then the entries on the diagonal are negatives, too.
    xp : namespace
        The arrays' namespace.
    """

    can_share = True
    """True if exponentials can serve both directions. A class with a traced loop cannot read values and says False."""

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
        paired: bool = True,
        xp: Namespace,
    ) -> None:
        self.xp, self.scaling, self.pair_mask, self.symmetric, self.keeps = xp, scaling, pair_mask, symmetric, keep
        self.paired = paired
        self.matmul, self.exp = tile_routines(images, xp)
        self.dtype, self.device = images.dtype, device_of(images)
        finfo = xp.finfo(images.dtype)
        self.lowest = -float(finfo.max) / 4  # a number below every Z, used as the peak of an anchor without negatives
        self.batch_size = int(images.shape[0])
        # All sides are nearly equal: 2,500 pairs with a largest side of 1,024 are cut into 834 + 834 + 832.
        self.side = -(-self.batch_size // -(-self.batch_size // side))
        starts = range(0, self.batch_size, self.side)
        self.spans = list(map(slice, starts, [*starts[1:], self.batch_size]))
        self.num_blocks = len(self.spans)

        # The right factor [E2, R2] is stored whole. The left factor [E1, -lambda R1] is made block by block in `left`.
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

        # Tiles that pass 1 keeps for pass 2, and masks of the diagonal, which depend only on the size of the tile.
        self.mask = None if pair_mask is None else self.cut_mask(pair_mask)
        self._kept: dict[tuple[int, int], Array] = {}
        self._off_diagonals: dict[int, Array] = {}
        self._barriers: dict[int, Array] = {}
        can_share = share and self.can_share and not self.per_anchor
        self.shared = SharedExponentials(float(finfo.smallest_normal)) if can_share else None

    def cut(self, *arrays: Array, fill: float = 0.0) -> list[Any]:
        """Return the blocks of each array along its first axis.

        In a subclass whose blocks all have the same size, `fill` is the value of entries that the last block lacks.
        """
        del fill
        if self.num_blocks == 1:
            return list(zip(arrays, strict=True))
        return [[x[rows, ...] for rows in self.spans] for x in arrays]

    def cut_mask(self, mask: Array) -> Any:
        """Return the mask in blocks, in the form that `counts` reads."""
        return self.cut(mask)[0]

    def sweep(self, visit: Visit, merge: Merge) -> tuple[Values, Values]:
        """Visit every tile, merge its results for its block of rows and for its block of columns, and return both.

        The results of all blocks are joined. If Z is symmetric, rows and columns are the same anchors, and the same
        result is returned twice.
        """
        to_rows: list[Any] = [None] * self.num_blocks
        to_columns = to_rows if self.symmetric else list(to_rows)
        for i in range(self.num_blocks):
            # `diagonal` is an argument, and no visit compares i with j, because Z may hold the images of one rank and
            # the texts of another rank. Such a matrix has no positives on its diagonal.
            for j in range(i if self.symmetric else 0, self.num_blocks):
                rows, columns = visit(i, j, self.paired and i == j)
                to_rows[i] = rows if to_rows[i] is None else merge(0, i, to_rows[i], rows)
                if not (self.symmetric and i == j):
                    to_columns[j] = columns if to_columns[j] is None else merge(1, j, to_columns[j], columns)
        rows = self._joined(to_rows)
        return rows, rows if self.symmetric else self._joined(to_columns)

    def pull(self, weigh: Weigh, *, to_columns: bool = True) -> tuple[Array, Any, Values, Values]:
        """Return ``V E2`` and ``V^T E1``, and the sums of further results for rows and for columns.

        If Z is symmetric, both products are summed into one result; in a tile on the diagonal, V has to contain the
        transposed weights, too. If `to_columns` is False, there are no results for columns: None and ().
        """

        def visit(i: int, j: int, diagonal: bool) -> tuple[Values, Values]:
            v, rows, columns = weigh(i, j, diagonal)
            to_rows = (self.matmul(v, self.texts[j]), *rows)
            if not to_columns or (self.symmetric and diagonal):
                return to_rows, ()
            return to_rows, (self.matmul(v.T, self.images[i]), *columns)

        (image, *rows), of_columns = self.sweep(visit, add)
        text, *columns = of_columns if to_columns else (None,)
        return image, text, tuple(rows), tuple(columns)

    def tile(self, i: Any, j: Any, diagonal: bool) -> Tile:
        """Return a tile of Z and which of its entries count."""
        return Tile(i, j, diagonal, self.z(i, j), self.counts(i, j, diagonal))

    def z(self, i: Any, j: Any) -> Array:
        """Return the entries of a tile: the kept ones, or else computed ones."""
        kept = self._kept.get((i, j))
        return self.matmul(self.left(i), self.right[j].T) if kept is None else kept

    def left(self, i: Any) -> Array:
        """Return the rows of ``[E1, -lambda R1]`` of one block, which are stored until another block is requested."""
        if self._row is not None and self._row[0] == i:
            return self._row[1]
        left = self.make_left(i)
        self._row = i, left
        return left

    def make_left(self, i: Any) -> Array:
        """Compute the rows of ``[E1, -lambda R1]`` of one block."""
        # Only this block of R1 is multiplied by lambda, so that no second array of the size of R1 exists.
        factor, reference_factor = self.left_factors
        left = _times(self.images[i], factor)
        if self.reference_images is None:
            return left
        return self.xp.concat([left, self.reference_images[i] * reference_factor], axis=1)

    def keep(self, tile: Tile) -> None:
        """Keep a tile of Z for the second pass, if tiles are kept."""
        if self.keeps:
            self._kept[tile.i, tile.j] = tile.z

    def release(self) -> None:
        """Release the arrays that only Z needs, if the second pass finds every tile or the exponentials of every tile.

        Several of these objects are kept at once if several ranks share a batch.
        """
        blocks = range(self.num_blocks)
        if all(
            (i, j) in self._kept or (self.shared is not None and self.shared.holds(i, j))
            for i in blocks
            for j in blocks
        ):
            self.right, self.reference_images, self._row = None, None, None

    def positives(self) -> Array:
        """Return the diagonal of Z (b,) from the products of its tiles, so that equal logits are exactly equal."""
        for i in range(self.num_blocks):  # these tiles are always kept: even together they are no b x b array
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
        """Return `x` with -inf for each pair that is no negative: a maximum ignores -inf, and its exponential is 0."""
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
        """Return the rates of a block's anchors: one per anchor, or one scalar for all."""
        return self.rates[side][block] if self.per_anchor else self.rates[side]

    def exponent(self, side: int, tile: Tile, threshold: Array) -> Array:
        """Return ``(Z - threshold_i) r_i`` of a tile, given one threshold per anchor of one direction."""
        return self.scaled(side, tile, tile.z - along(1 - side, threshold))

    def scaled(self, side: int, tile: Tile, x: Array) -> Array:
        """Return differences of a tile's Z times the rates of one direction's anchors; `x` may be overwritten."""
        xp, axis, block, floor = self.xp, 1 - side, tile.block(side), self.floors[side]
        if floor is not None:  # the difference times the rate could overflow
            if tile.counts is not None:  # an entry that is no negative may be far above the threshold
                x = xp.where(tile.counts, x, xp.zeros_like(x))
            x = xp.maximum(x, along(axis, floor[block])) if self.per_anchor else xp.clip(x, min=floor)
        return times_rate(x, along(axis, self.rates[side][block]) if self.per_anchor else self.rates[side])

    def finite_exponents(self, x: Array, tile: Tile) -> Array:
        """Return exponents in which each pair that is no negative has a finite exponent whose exponential is 0."""
        if tile.counts is None:
            return x
        # Without a floor the exponent of such a pair is -inf already, and `clip` takes half the time of `where`.
        return self.xp.clip(x, min=FLOOR) if self.floors[0] is None else self.xp.where(tile.counts, x, FLOOR)

    def _joined(self, blocks: list[Values]) -> Values:
        """Concatenate the results of all blocks."""
        if self.num_blocks == 1:
            return blocks[0]
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
    """Return one number per anchor in a shape that broadcasts over a tile; `axis` is the axis of the anchor's sums."""
    return x[:, None] if axis == 1 else x[None, :]


def _times(x: Array, factor: Scalar) -> Array:
    """Return ``x * factor``, and `x` itself if the factor is 1."""
    return x if isinstance(factor, float) and factor == 1.0 else x * factor
