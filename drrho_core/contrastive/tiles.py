"""The two sweeps over all pairs of a batch that every contrastive objective here is made of.

Notation of docs/theory. Rows are image anchors, columns text anchors; [b, b] matrices are met in square tiles:

    Z = [E1, -lambda R1] [E2, R2]^T        the (excess) similarity, times a factor where features are so large that it
                                           would overflow
    image anchor i:  D_ij = (Z_ij - Z_ii) r_i          text anchor j:  D'_ij = (Z_ij - Z_jj) r'_j          r = 1 / t

`sum_negatives` is the first sweep. For each anchor it returns the sums over its negatives of e = exp((Z - peak) r) and
of e times that exponent. `peak` is a value of Z near the largest negative, so that nothing overflows. Positives come
out of the same products: those of equal features are then equal to the bit.
`weigh` is the second sweep. It is given the sum of each anchor's weights, and with

    w_ij = weight_i e_ij / total_i,   w'_ij = weight'_j e'_ij / total'_j,   V = w + w'

it returns ``V E2`` and ``V^T E1``. The weights are divided by sums of the same exponentials that make them. An
exponential relative to a threshold of size 1/t would be off by the rounding of that threshold: by 1 % where 1/t = 1e5
in float32.

One exponential per pair serves both directions where one temperature serves all anchors: e = exp((Z - m) r), m being
the tile's largest entry. A tile in which some anchor's peak is so far below m that e would underflow is *cold*: there
each direction takes exponentials relative to its own peaks. This choice looks at values, so where those cannot be seen
(under tracing, on a device) every tile is treated as cold.

A sweep either keeps the tiles (one pass: 4 products b x b x d in all, half of them for the reference) or computes them
again (two passes: 6 products, memory grows with b). Tiles cost more than their products only by what is done to their
b^2 entries, so that is little: in the first sweep two maxima, a difference, an exponential, a product and four sums; in
the second an outer sum and a product. Everything else is of size b.

Where both sides are one view (`symmetric`) Z is symmetric, a sample has one anchor and not two, and the tiles above the
diagonal are enough: such a tile's rows and its columns are different anchors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

from drrho_core import _loops, _routines, _validate
from drrho_core._array_api import Array, Namespace, device_of

DEFAULT_TILE = 1024
"""Square tiles of this side run at the matrix product's own rate and stay in cache between their uses."""

DEFAULT_MEMORY_BUDGET = 2**30
"""Memory limit in bytes for caching the logits between the passes; above it they are recomputed."""

FLOOR = -1e4
"""An exponent whose exponential is 0 in every dtype, and which is finite, so that 0 times it is 0."""

ANCHORS = -1
"""In a shape: the axis that has an entry for each anchor."""

Scalar: TypeAlias = float | Array
"""A number or an array of shape ()."""

Blocks: TypeAlias = Any
"""An array cut into blocks, to be indexed by a block's number: a list of arrays, or one stack of them."""

Values: TypeAlias = tuple[Any, ...]
"""Results of one tile for one block of anchors: arrays, or None where the tile has no such result."""


class Tile(NamedTuple):
    """One tile of Z."""

    i: Array  # number of its block of rows: an int, or traced
    j: Array  # and of its block of columns
    z: Array  # (rows, columns)
    counts: Array | None  # which entries are pairs of an anchor and a negative; None: all
    diagonal: bool

    def block(self, which: int) -> Array:
        """Return the number of the tile's block of rows (which = 0) or of columns (which = 1)."""
        return self.j if which else self.i


Visit: TypeAlias = Callable[[Tile], tuple[Values, Values]]
"""``visit(tile)`` returns the results of one tile for its rows and for its columns."""

Combine: TypeAlias = Callable[[int, Array, Values, Values], Values]
"""``combine(which, block, old, new)`` merges what two tiles gave to a block: of rows (which = 0) or of columns (1)."""

Shapes: TypeAlias = Sequence[tuple[int, ...]]
"""Shapes of these results; `ANCHORS` stands for the number of anchors in the block."""

Stacks: TypeAlias = tuple[Array, ...]


class Negatives(NamedTuple):
    """Sums over the negatives of each anchor of one direction; (b,), r being its rate."""

    peak: Array  # a value of Z near the largest negative; any finite number without negatives
    total: Array  # sum exp((Z - peak) r), 0 without negatives
    mean: Array  # mean of (Z - peak) r with weights proportional to those exponentials, 0 without negatives
    count: Array  # number of negatives


class Scaling(NamedTuple):
    """Factors of Z, and what makes exponents of it: ``(Z - reference) * rate``.

    The factors are 1 unless the features are so large that Z would overflow; then they make |Z| at most its width, and
    the rates undo that as far as they can be represented. Differences of Z are taken before they are divided by a
    temperature: for logits that nearly tie they are exact.
    """

    left: Scalar = 1.0
    right: Scalar = 1.0
    rates: tuple[Scalar, Scalar] = (1.0, 1.0)  # 1 / (left right t) per direction: a scalar or (b,)
    floors: tuple[Scalar | None, Scalar | None] = (None, None)  # differences at which exponentials are 0; None: no need


class Shared(NamedTuple):
    """A tile's exponentials that serve both directions."""

    top: Array  # m, the tile's largest entry; shape ()
    exponential: Array  # exp((Z - m) r), 0 where a pair does not count


def tiling(batch_size: int, item_size: int, tile_size: int | None, memory_budget: int | None) -> tuple[int, bool]:
    """Return the side of tiles and whether the logits are kept between the sweeps.

    An integer `tile_size` asks for two passes and no b x b array; else one pass while the logits fit the budget.
    """
    budget, side = DEFAULT_MEMORY_BUDGET, DEFAULT_TILE
    if memory_budget is not None:
        budget = _validate.integer("memory_budget", memory_budget, minimum=0)
    if batch_size < 2 * side:  # two tiles: one alone would be masked from end to end, and its copies leave the cache
        side = max(side // 2, -(-batch_size // 2))
    if tile_size is not None:
        side = _validate.integer("tile_size", tile_size, minimum=1)
    return side, tile_size is None and batch_size * batch_size * item_size <= budget


class Pairs:
    """One batch, ready for the sweeps. All arrays share one floating dtype, float32 or wider.

    Parameters
    ----------
    image_features, text_features : array, shape (b, d)
        The learner's features.
    reference_features : pair of arrays, shape (b, r), or None
        The reference model's, multiplied by ``-reference_weight`` on the image side.
    scaling : Scaling
        Factors of Z and what is left of the temperatures.
    pair_mask : array of bool, shape (b, b), or None
        False: not a negative.
    side : int
        Side of a tile.
    keep : bool
        Whether tiles are kept from the first sweep on.
    share : bool
        Whether exponentials may serve both directions, which are kept instead of Z. Values have to be visible for it.
    """

    def __init__(
        self,
        image_features: Array,
        text_features: Array,
        *,
        reference_features: tuple[Array, Array] | None = None,
        reference_weight: Scalar = 1.0,
        scaling: Scaling | None = None,
        pair_mask: Array | None = None,
        side: int = DEFAULT_TILE,
        keep: bool = True,
        share: bool = True,
        xp: Namespace,
    ) -> None:
        self.xp = xp
        self.product, self.exp = _routines.product_for(image_features, xp), _routines.exp_for(xp)
        self.scaling = scaling = Scaling() if scaling is None else scaling
        finfo = xp.finfo(image_features.dtype)
        self.lowest = -float(finfo.max) / 4  # below every Z: the peak of an anchor without negatives
        self.cold = -0.65 * math.log(float(finfo.smallest_normal))  # exponents further apart than this share nothing
        self.image_features, self.text_features = image_features, text_features
        self.batch_size = batch_size = int(image_features.shape[0])
        self.feature_dim = int(image_features.shape[1])
        in_one_row = -(-batch_size // side)
        self.rolled = in_one_row > 1 and _loops.rolls(xp)  # unrolled tiles compile slowly, and all live at once
        self.side = -(-batch_size // in_one_row)  # tiles as alike as can be
        self.num_blocks = -(-batch_size // self.side)
        starts = range(0, batch_size, self.side)
        self.spans = [slice(start, min(start + self.side, batch_size)) for start in starts]
        self.padding = self.num_blocks * self.side - batch_size if self.rolled else 0
        self._reference_image = None
        right = text_features
        if reference_features is not None:
            self._reference_image = self.cut(reference_features[0])
            right = xp.concat([text_features, reference_features[1]], axis=1)
        right = _times(right, scaling.right)
        self._scale, self._reference_scale = scaling.left, -reference_weight * scaling.left
        self._images, self._right = self.cut(image_features), self.cut(right)
        self.images, self.texts = self._images, self.cut(text_features)
        self._turned = xp.permute_dims(self._images, (0, 2, 1)) if self.rolled else None
        self.rates = tuple(self._cut_rate(rate) for rate in scaling.rates)
        self._floors = tuple(self._cut_rate(floor) for floor in scaling.floors)
        self.pair_mask, self.has_mask = pair_mask, pair_mask is not None
        self._mask = None if pair_mask is None else self._cut_mask(pair_mask)
        per_anchor = not _is_scalar(scaling.rates[0])
        # Whether tiles are cold must be seen, and exponents must be the same in both directions.
        self.shares = share and not per_anchor and not self.rolled
        self._keep = keep
        self._kept: dict[tuple[int, int], Array] = {}
        self._shared: dict[tuple[int, int], Shared] = {}
        self._tops: dict[tuple[int, int], Array] = {}  # of the tiles that are not cold
        self._stack: Array | None = None  # of all tiles, where they are met in a rolled loop
        self._row: tuple[int, Array] | None = None
        self._off_diagonals: dict[int, Array] = {}
        self._walls: dict[int, Array] = {}

    def cut(self, x: Array, *, fill: float = 0.0) -> Blocks:
        """Return the blocks of an array along its first axis, to be indexed by a block's number.

        Blocks of a stack have one size: what is missing at the end is filled.
        """
        xp = self.xp
        if not self.rolled:
            return [x[rows, ...] for rows in self.spans]
        if self.padding:
            missing = xp.full((self.padding, *x.shape[1:]), fill, dtype=x.dtype)
            x = xp.concat([x, missing], axis=0)
        return xp.reshape(x, (self.num_blocks, self.side, *x.shape[1:]))

    def join(self, blocks: Blocks, *, anchors: int = 0) -> Array:
        """Undo `cut`; in a stack the anchors may be another axis of each block, and come first afterwards."""
        if not self.rolled:
            return blocks[0] if len(blocks) == 1 else self.xp.concat(list(blocks), axis=0)
        if anchors != 0:
            blocks = self.xp.permute_dims(blocks, (0, 2, 1))
        flat = self.xp.reshape(blocks, (self.num_blocks * self.side, *blocks.shape[2:]))
        return flat[: self.batch_size, ...]

    def _cut_rate(self, rate: Scalar | None) -> Any:
        return rate if rate is None or _is_scalar(rate) else self.cut(rate, fill=1.0)

    def rate(self, which: int, block: Array) -> Scalar:
        """Return the rates of a block's anchors, (side,) or a scalar."""
        return _of_block(self.rates[which], block)

    def exponent(self, which: int, tile: Tile, reference: Array) -> Array:
        """Return ``(Z - reference_i) r_i`` of a tile, given a number for each of its anchors in one direction."""
        axis, block = 1 - which, tile.block(which)
        x = tile.z - along(axis, reference)
        floor = _of_block(self._floors[which], block)
        if floor is not None:  # times the rate the difference could overflow
            if tile.counts is not None:  # what does not count may be far above
                x = self.xp.where(tile.counts, x, self.xp.zeros_like(x))
            x = self.xp.clip(x, min=floor) if _is_scalar(floor) else self.xp.maximum(x, along(axis, floor))
        return _multiplied(x, self.rate(which, block), axis)

    def _cut_mask(self, mask: Array) -> Blocks:
        rows = self.cut(mask)
        if not self.rolled:
            return rows
        if self.padding:
            fill = self.xp.zeros((self.num_blocks, self.side, self.padding), dtype=mask.dtype)
            rows = self.xp.concat([rows, fill], axis=2)
        tiles = self.xp.reshape(rows, (self.num_blocks, self.side, self.num_blocks, self.side))
        return self.xp.permute_dims(tiles, (0, 2, 1, 3))

    def similarity(self, i: Array, j: Array) -> Array:
        """Return tile (i, j) of Z."""
        if self._stack is not None:
            return self._stack[i, j]
        if not self.rolled and (i, j) in self._kept:
            return self._kept[i, j]
        return self.product(self._left(i), self._right[j].T)

    def keep(self, tile: Tile) -> None:
        """Keep a tile of Z for the second sweep, if there is room."""
        if self._keep and not self.rolled:
            self._kept[tile.i, tile.j] = tile.z

    def share(self, tile: Tile, rows: Array, columns: Array) -> tuple[Shared, Array] | None:
        """Return the exponentials that serve both directions, and their exponents; None if the tile is cold.

        `rows` and `columns` hold each anchor's largest entry in the tile. The tile itself is overwritten.
        """
        xp = self.xp
        top = xp.max(rows)
        if not bool(top > self.lowest):
            return None
        lowest = [xp.min(xp.where(peaks > self.lowest, peaks, top)) for peaks in (rows, columns)]
        depth = float(top) - float(xp.minimum(*lowest))
        if not depth * float(self.scaling.rates[0]) < self.cold:
            return None
        x = self._below(tile, top)
        shared = Shared(top, self.exp(x, False))
        if self._keep:
            self._shared[tile.i, tile.j] = shared
        self._tops[tile.i, tile.j] = top
        return shared, x

    def shared(self, i: Array, j: Array, *, diagonal: bool) -> Shared | None:
        """Return what `share` made of a tile in the first sweep, or make it again; None if the tile is cold."""
        if (i, j) in self._shared:
            return self._shared.pop((i, j))
        if (i, j) not in self._tops:
            return None
        top, tile = self._tops[i, j], self.tile(i, j, diagonal=diagonal)
        return Shared(top, self.exp(self._below(tile._replace(z=self.only_counted(tile.z, tile)), top), True))

    def _below(self, tile: Tile, top: Array) -> Array:
        """Return ``(Z - top) r`` of a tile, finite where pairs do not count; the tile itself is overwritten."""
        x, floor = tile.z, self.scaling.floors[0]
        x -= top
        if floor is not None:
            x = self.xp.clip(x, min=floor)
        x = _multiplied(x, self.scaling.rates[0], 1)
        return self.uncounted_at_floor(x, tile)

    def uncounted_at_floor(self, x: Array, tile: Tile) -> Array:
        """Return exponents of which those that do not count are finite, and 0 as exponentials."""
        if tile.counts is None:
            return x
        # Without a floor what does not count is -inf already, and clipping takes half the time of `where`.
        return self.xp.clip(x, min=FLOOR) if self.scaling.floors[0] is None else self.xp.where(tile.counts, x, FLOOR)

    def pull(self, i: Array, j: Array, v: Array) -> tuple[Array, Array]:
        """Return ``V E2`` for a tile's rows and ``V^T E1`` for its columns, in the shapes of `pull_shapes`."""
        to_rows = self.product(v, self.texts[j])
        if self._turned is None:
            return to_rows, self.product(v.T, self.images[i])
        # Compiled, the product of a transposed tile takes half as long again; of the features a transpose exists.
        return to_rows, self.product(self._turned[i], v)

    @property
    def pull_shapes(self) -> Shapes:
        """The shapes of what `pull` returns."""
        upright = (ANCHORS, self.feature_dim)
        return upright, upright if self._turned is None else upright[::-1]

    def tile(self, i: Array, j: Array, *, diagonal: bool) -> Tile:
        """Return a tile of Z and which of its entries count."""
        return Tile(i, j, self.similarity(i, j), self.counts(i, j, diagonal=diagonal), diagonal)

    def _left(self, i: Array) -> Array:
        """Return the rows of ``scale [E1, -lambda R1]``: only those of a block, and once for all its tiles."""
        if not self.rolled and self._row is not None and self._row[0] == i:
            return self._row[1]
        left = _times(self._images[i], self._scale)
        if self._reference_image is not None:
            reference = _times(self._reference_image[i], self._reference_scale)
            left = self.xp.concat([left, reference], axis=1)
        self._row = None if self.rolled else (i, left)
        return left

    def positives(self) -> Array:
        """Return the diagonal of Z (b,), out of the same products as all the rest."""
        if not self.rolled:
            for i in range(self.num_blocks):  # no b x b array, and so kept in any case
                self._kept[i, i] = self.similarity(i, i)
            return self.join([self.xp.linalg.diagonal(self._kept[i, i]) for i in range(self.num_blocks)])
        put = _loops.put(self.xp)

        def step(carry: Stacks) -> Stacks:
            i, positives = carry
            return i + 1, put(positives, i, self.xp.linalg.diagonal(self.similarity(i, i)))

        start = self.xp.zeros((), dtype=self.xp.int32), self.xp.zeros_like(self.images[:, :, 0])
        return self.join(_loops.repeat(self.num_blocks, step, start, self.xp)[1])

    def counts(self, i: Array, j: Array, *, diagonal: bool) -> Array | None:
        """Return which entries of a tile count; None where all do."""
        xp = self.xp
        counts = None
        if self._mask is not None:
            counts = self._mask[i, j] if self.rolled else self._mask[i][:, self.spans[j]]
        size = int(self._images[i].shape[0])
        if diagonal:
            off_diagonal = self._off_diagonal(size)
            counts = off_diagonal if counts is None else counts & off_diagonal
        if self.padding:
            index = xp.arange(size, device=device_of(self.image_features))
            real = (i * size + index < self.batch_size)[:, None] & (j * size + index < self.batch_size)[None, :]
            counts = real if counts is None else counts & real
        return counts

    def _off_diagonal(self, size: int) -> Array:
        if size in self._off_diagonals:
            return self._off_diagonals[size]
        index = self.xp.arange(size, device=device_of(self.image_features))
        off_diagonal = index[:, None] != index[None, :]
        if not self.rolled:  # what one traced loop makes is of no use to another
            self._off_diagonals[size] = off_diagonal
        return off_diagonal

    def only_counted(self, x: Array, tile: Tile) -> Array:
        """Return a tile's values, those that do not count as -inf: nothing to a maximum, and 0 as an exponential."""
        xp = self.xp
        if tile.counts is None:
            return x
        if self.has_mask or self.rolled:
            return xp.where(tile.counts, x, -xp.inf)
        size = int(x.shape[0])
        if size not in self._walls:
            self._walls[size] = xp.where(tile.counts, xp.zeros_like(x), -xp.inf)
        return x + self._walls[size]  # a fourth of what `where` takes

    def sweep(
        self,
        visit: Visit,
        combine: Combine,
        rows: Shapes,
        columns: Shapes | None = None,
        *,
        meet: Callable[[int, int, bool], tuple[Values, Values] | None] | None = None,
    ) -> tuple[Stacks, Stacks]:
        """Visit every tile and combine what it gives to its rows and to its columns; return both, joined.

        `rows` and `columns` are the shapes of a visit's values. Without columns Z is symmetric: only the tiles on the
        diagonal and above it are visited, rows and columns are the same anchors, both results one. `meet`, given the
        blocks' numbers and whether they are the same, may return the values without a tile of Z; None asks for a visit.
        """
        if self.rolled:
            to_rows, to_columns = self._sweep_rolled(visit, combine, rows, columns)
        else:
            to_rows, to_columns = self._sweep_unrolled(visit, combine, meet, symmetric=columns is None)

        def joined(parts: Any, shapes: Shapes) -> Stacks:
            both = zip(parts, shapes, strict=True)
            return tuple(self.join(part, anchors=shape.index(ANCHORS)) for part, shape in both)

        of_rows = joined(to_rows, rows)
        return of_rows, of_rows if columns is None else joined(to_columns, columns)

    def _sweep_unrolled(self, visit: Visit, combine: Combine, meet: Any, *, symmetric: bool) -> Any:
        to_rows: list[Any] = [None] * self.num_blocks
        to_columns = to_rows if symmetric else list(to_rows)

        def merge(which: int, block: int, collected: list[Any], new: Values) -> None:
            old = collected[block]
            collected[block] = new if old is None else combine(which, block, old, new)

        for i in range(self.num_blocks):
            for j in range(i if symmetric else 0, self.num_blocks):
                new = None if meet is None else meet(i, j, i == j)
                if new is None:
                    new = visit(self.tile(i, j, diagonal=i == j))
                merge(0, i, to_rows, new[0])
                if not (symmetric and i == j):
                    merge(1, j, to_columns, new[1])
        return zip(*to_rows, strict=True), zip(*to_columns, strict=True)

    def _sweep_rolled(self, visit: Visit, combine: Combine, rows: Shapes, columns: Shapes | None) -> Any:
        """Do the same with the library's own loop: first along the diagonal, then over all other tiles."""
        xp, put = self.xp, _loops.put(self.xp)
        split = 1 + len(rows)

        # The first sweep of one pass leaves all tiles behind, as one more thing that is handed from step to step.
        keeps = self._keep and self._stack is None

        def visited(i: Array, j: Array, carry: Stacks, *, diagonal: bool) -> tuple[Stacks, tuple[Values, Values]]:
            tile = self.tile(i, j, diagonal=diagonal)
            return (put(carry[-1], (i, j), tile.z),) if keeps else (), visit(tile)

        def merge(which: int, block: Array, stacks: Stacks, new: Values) -> Stacks:
            both = combine(which, block, tuple(stack[block] for stack in stacks), new)
            return tuple(put(stack, block, value) for stack, value in zip(stacks, both, strict=True))

        def on_diagonal(carry: Stacks) -> Stacks:
            i = carry[0]
            kept, new = visited(i, i, carry, diagonal=True)
            values = new[0] if columns is None else (*new[0], *new[1])
            stacks = (put(stack, i, value) for stack, value in zip(carry[1:end], values, strict=True))
            return (i + 1, *stacks, *kept)

        def off_diagonal(carry: Stacks) -> Stacks:
            i, j = places[carry[0], 0], places[carry[0], 1]
            kept, new = visited(i, j, carry, diagonal=False)
            to_rows = merge(0, i, carry[1:split], new[0])
            if columns is None:
                return (carry[0] + 1, *merge(1, j, to_rows, new[1]), *kept)
            return (carry[0] + 1, *to_rows, *merge(1, j, carry[split:end], new[1]), *kept)

        number, dtype = self.num_blocks, self.image_features.dtype
        whole = [(number, *shape) for shape in (*rows, *(columns or ()))]
        shapes = [tuple(self.side if length == ANCHORS else length for length in shape) for shape in whole]
        end = 1 + len(shapes)
        if keeps:
            shapes.append((number, number, self.side, self.side))
        zero = xp.zeros((), dtype=xp.int32)
        carry = _loops.repeat(number, on_diagonal, (zero, *(xp.zeros(shape, dtype=dtype) for shape in shapes)), xp)
        blocks = range(number)
        order = [(i, j) for i in blocks for j in blocks if (i < j if columns is None else i != j)]
        places = xp.asarray(order, dtype=xp.int32)
        carry = _loops.repeat(len(order), off_diagonal, (zero, *carry[1:]), xp)
        if keeps:
            self._stack = carry[-1]
        return carry[1:split], carry[split:end]


def sum_negatives(pairs: Pairs) -> tuple[Negatives, Negatives, Array]:
    """Return the sums of the image anchors and of the text anchors, and the positives, the diagonal of Z; (b,)."""
    shapes: Shapes = [(ANCHORS,)] * (5 if pairs.has_mask else 4)
    image, text = pairs.sweep(_meet_negatives(pairs), _merge_negatives(pairs), shapes, shapes)
    if pairs.has_mask:
        return _negatives(image, image[4]), _negatives(text, text[4]), image[3]
    count = pairs.xp.full_like(image[0], float(pairs.batch_size - 1))
    return _negatives(image, count), _negatives(text, count), image[3]


def sum_negatives_within(pairs: Pairs) -> Negatives:
    """Return the sums over the negatives of each anchor in its own view."""
    sums, _ = pairs.sweep(_meet_negatives(pairs), _merge_negatives(pairs), [(ANCHORS,)] * 4)
    return _negatives(sums, pairs.xp.full_like(sums[0], float(pairs.batch_size - 1)))


def _negatives(values: Values, count: Any) -> Negatives:
    return Negatives(values[0], values[1], values[2], count)


def merge(one: Negatives, other: Negatives, rate: Scalar, *, xp: Namespace) -> Negatives:
    """Return the sums over the same anchors' negatives in two tiles or two matrices as one."""
    some = [part.total > 0 for part in (one, other)]
    logs = [
        xp.log(xp.where(any_, part.total, xp.ones_like(part.total)))
        for any_, part in zip(some, (one, other), strict=True)
    ]
    gap = saturated(xp.where(some[0] & some[1], one.peak - other.peak, xp.zeros_like(one.peak)), rate, xp=xp)
    # The part with the larger sum stays the reference, so that neither sum overflows or is lost.
    lead = gap + (logs[0] - logs[1])
    first = some[0] & (~some[1] | (lead >= 0))
    share = xp.where(some[0] & some[1], xp.exp(-xp.abs(lead)), xp.zeros_like(lead))  # smaller sum / larger sum
    gap = xp.where(share > 0, xp.where(first, -gap, gap), xp.zeros_like(gap))
    total = xp.where(first, one.total, other.total)
    mean, less = xp.where(first, one.mean, other.mean), xp.where(first, other.mean, one.mean)
    return Negatives(
        peak=xp.where(first, one.peak, other.peak),
        total=total + total * share,
        mean=(mean + share * (less + gap)) / (1.0 + share),
        count=one.count + other.count,
    )


def above(negatives: Negatives, positive: Array, rate: Scalar, *, xp: Namespace) -> Array:
    """Return how far each peak is above the positive, as an exponent (b,); 0 without negatives."""
    return saturated(xp.where(negatives.total > 0, negatives.peak - positive, xp.zeros_like(positive)), rate, xp=xp)


def shares(negatives: Negatives, weight: Array, *, xp: Namespace) -> Array:
    """Return the factor (b,) that turns an anchor's exponentials into weights, given the sum of its weights."""
    some = negatives.total > 0
    return xp.where(some, weight / xp.where(some, negatives.total, xp.ones_like(weight)), xp.zeros_like(weight))


def saturated(x: Array, rate: Scalar, /, *, xp: Namespace) -> Array:
    """Return ``x * rate``, but a quarter of the largest number instead of an overflow."""
    if isinstance(rate, float) and rate == 1.0:
        return x
    limit = float(xp.finfo(x.dtype).max) / 4
    bound = limit / max(rate, 1.0) if isinstance(rate, float) else limit / xp.clip(rate, min=1.0)
    return xp.clip(x, -bound, bound) * rate


def weigh(
    pairs: Pairs, negatives: tuple[Negatives, Negatives], weight_image: Array, weight_text: Array
) -> tuple[Array, Array]:
    """Return ``V E2`` and ``V^T E1``, given the sum of each anchor's weights (b,)."""
    weights = _Weights(pairs, negatives, (weight_image, weight_text))

    def pulled(i: Array, j: Array, v: Array) -> tuple[Values, Values]:
        image_pull, text_pull = pairs.pull(i, j, v)
        return (image_pull,), (text_pull,)

    def meet(i: int, j: int, diagonal: bool) -> tuple[Values, Values] | None:
        shared = pairs.shared(i, j, diagonal=diagonal)
        return None if shared is None else pulled(i, j, weights.of_shared(shared, i, j))

    def visit(tile: Tile) -> tuple[Values, Values]:
        v = weights.of_tile(0, tile)
        v += weights.of_tile(1, tile)
        return pulled(tile.i, tile.j, v)

    of_rows, of_columns = pairs.pull_shapes
    (image,), (text,) = pairs.sweep(visit, add, [of_rows], [of_columns], meet=meet)
    return image, text


def weigh_within(pairs: Pairs, negatives: Negatives, weight: Array) -> Array:
    """Return ``(w + w^T) E`` where both sides are one view."""
    weights = _Weights(pairs, (negatives, negatives), (weight, weight))

    def pulled(i: Array, j: Array, v: Array) -> tuple[Values, Values]:
        to_rows = pairs.product(v, pairs.images[j])
        return (to_rows,), (pairs.product(v.T, pairs.images[i]),)

    def on_diagonal(i: Array, w: Array) -> tuple[Values, Values]:
        return (pairs.product(w + w.T, pairs.images[i]),), (None,)  # its anchors and its others are of one block

    def meet(i: int, j: int, diagonal: bool) -> tuple[Values, Values] | None:
        shared = pairs.shared(i, j, diagonal=diagonal)
        if shared is None:
            return None
        if diagonal:
            return on_diagonal(i, shared.exponential * along(1, weights.factor(0, i, shared.top)))
        return pulled(i, j, weights.of_shared(shared, i, j))

    def visit(tile: Tile) -> tuple[Values, Values]:
        v = weights.of_tile(0, tile)
        if tile.diagonal:
            return on_diagonal(tile.i, v)
        v += weights.of_tile(1, tile)
        return pulled(tile.i, tile.j, v)

    (pull,), _ = pairs.sweep(visit, add, [(ANCHORS, pairs.feature_dim)], meet=meet)
    return pull


def _meet_negatives(pairs: Pairs) -> Visit:
    """Return the first sweep's visit: peak, total, mean, positive (of the diagonal's tiles) and, with a mask, count."""
    xp, exp = pairs.xp, pairs.exp

    def sums(peak: Array, e: Array, x: Array, axis: int) -> Values:
        total, moment = xp.sum(e, axis=axis), xp.sum(x, axis=axis)
        some = total > 0
        return peak, total, xp.where(some, moment / xp.where(some, total, xp.ones_like(total)), xp.zeros_like(total))

    def own(which: int, tile: Tile, peak: Array) -> Values:
        # Cold: this direction's exponentials, relative to its own peaks.
        x = pairs.exponent(which, tile, peak)
        x = pairs.uncounted_at_floor(x, tile)
        e = exp(x, False)
        return sums(peak, e, x * e, 1 - which)

    def visit(tile: Tile) -> tuple[Values, Values]:
        positive = xp.linalg.diagonal(tile.z) if tile.diagonal else None
        if positive is not None:  # a view would keep the tile alive, which may be overwritten, too
            positive = xp.asarray(positive, copy=True)
        met = tile._replace(z=pairs.only_counted(tile.z, tile))
        peaks = [xp.max(met.z, axis=axis) for axis in (1, 0)]
        shared = pairs.share(met, *peaks) if pairs.shares else None
        if shared is not None:
            (top, e), x = shared
            x *= e
            both = [sums(xp.zeros_like(peaks[which]) + top, e, x, 1 - which) for which in (0, 1)]
        else:
            pairs.keep(tile)
            if met.counts is not None:  # an anchor without negatives gets a peak that any other exceeds
                peaks = [xp.clip(peak, min=pairs.lowest) for peak in peaks]
            both = [own(which, met, peaks[which]) for which in (0, 1)]
        ends: list[Values] = [(positive,), (positive,)]
        if pairs.has_mask:
            numbers = xp.astype(tile.counts, tile.z.dtype)
            ends = [(positive, xp.sum(numbers, axis=axis)) for axis in (1, 0)]
        return (*both[0], *ends[0]), (*both[1], *ends[1])

    return visit


def _merge_negatives(pairs: Pairs) -> Combine:
    """Return how the sums, positives and counts of two tiles become one."""

    def combine(which: int, block: Array, old: Values, new: Values) -> Values:
        first, second = (_negatives(part, part[4] if pairs.has_mask else 0) for part in (old, new))
        merged = merge(first, second, pairs.rate(which, block), xp=pairs.xp)
        positive = old[3] if new[3] is None else new[3]
        return (*merged[:3], positive, *((merged.count,) if pairs.has_mask else ()))

    return combine


class _Weights:
    """The weights of a batch's tiles, given each anchor's sums and the sum of its weights, per direction."""

    def __init__(self, pairs: Pairs, negatives: tuple[Negatives, Negatives], weights: tuple[Array, Array]) -> None:
        self._pairs, xp = pairs, pairs.xp
        both = list(zip(negatives, weights, strict=True))
        zero = xp.zeros_like(both[0][1])  # an anchor without negatives has no peak
        self._peaks = [pairs.cut(xp.where(sums.total > 0, sums.peak, zero)) for sums, _ in both]
        self._factors = [pairs.cut(shares(sums, weight, xp=xp)) for sums, weight in both]
        ones = xp.ones_like(zero)
        self._limits = [
            pairs.cut(xp.log(xp.where(sums.total > 0, sums.total, ones)) + (pairs.cold + 1.0)) for sums, _ in both
        ]

    def of_tile(self, which: int, tile: Tile) -> Array:
        """Return a cold tile's weights in one direction."""
        pairs, block = self._pairs, tile.block(which)
        x = pairs.exponent(which, tile, self._peaks[which][block])
        w = pairs.exp(pairs.only_counted(x, tile), True)  # before the exponential: what does not count may be huge
        w *= along(1 - which, self._factors[which][block])
        return w

    def factor(self, which: int, block: Array, top: Array) -> Array:
        """Return the factors of a shared tile's exponentials, which are relative to `top`, in one direction."""
        pairs, xp = self._pairs, self._pairs.xp
        gap = saturated(top - self._peaks[which][block], pairs.scaling.rates[0], xp=xp)
        # For an anchor with negatives in this tile exp(gap) is at most its total times exp(cold). A larger gap belongs
        # to an anchor without any: all its exponentials are 0.
        near = gap < self._limits[which][block]
        return self._factors[which][block] * xp.where(near, xp.exp(xp.where(near, gap, xp.zeros_like(gap))), 0.0)

    def of_shared(self, shared: Shared, i: Array, j: Array) -> Array:
        """Return ``V = w + w'`` of a tile whose exponentials serve both directions."""
        v = along(1, self.factor(0, i, shared.top)) + along(0, self.factor(1, j, shared.top))
        v *= shared.exponential
        return v


def add(_which: int, _block: Array, old: Values, new: Values) -> Values:
    """Add what two tiles gave."""
    sums = []
    for a, b in zip(old, new, strict=True):
        a += b  # into what an earlier tile gave, where the library can
        sums.append(a)
    return tuple(sums)


def along(axis: int, x: Array) -> Array:
    """Lay one number per anchor out along the axis that its tile is summed over."""
    return x[:, None] if axis == 1 else x[None, :]


def _is_scalar(x: Any) -> bool:
    """Tell whether a rate or a floor is one number for all anchors."""
    return isinstance(x, float) or getattr(x, "ndim", 1) == 0


def _of_block(blocks: Any, block: Array) -> Any:
    """Return a block's entries of what was cut, or the scalar that serves all blocks."""
    return blocks if blocks is None or _is_scalar(blocks) else blocks[block]


def _multiplied(x: Array, rate: Scalar, axis: int) -> Array:
    """Return a tile times the rates of its anchors; it is overwritten where the library can."""
    if isinstance(rate, float) and rate == 1.0:
        return x
    x *= rate if _is_scalar(rate) else along(axis, rate)
    return x


def _times(x: Array, factor: Scalar) -> Array:
    """Return ``x * factor``; `x` itself where the factor is 1."""
    return x if (isinstance(factor, float) and factor == 1.0) else x * factor
