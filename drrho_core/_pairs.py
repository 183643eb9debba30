"""The two sweeps over all pairs of a batch that every contrastive objective here is made of.

Notation of docs/theory. Rows are image anchors, columns text anchors; [b, b] matrices are met in square tiles:

    Z = scale [E1, -lambda R1] [E2, R2]^T        the (excess) similarity, or the logits: scale = 1 / t where t is global
    image anchor i:  D_ij = (Z_ij - Z_ii) / (scale t_i)          text anchor j:  D'_ij = (Z_ij - Z_jj) / (scale t'_j)

`sum_negatives` is the first sweep: for each anchor the largest Z among its negatives (the peak) and the sum of the
exponentials relative to it, so that nothing overflows. Positives come out of the same products: those of equal
features are then equal to the bit. What an objective makes of it is a logarithmic denominator per anchor.
`weigh` is the second sweep: with

    w_ij = exp(D_ij - log denominator_i),   w'_ij = exp(D'_ij - log denominator'_j),   V = w + w'

it returns ``V E2``, ``V^T E1`` and the sums over weights that the closed-form gradients need. A sweep either keeps the
tiles of Z (one pass: 4 products b x b x d in all, half of them for the reference) or computes them again (two passes:
6 products, memory grows with b). Tiles cost more than their products only by what is done to their b^2 entries, so that
is little: in the first sweep a maximum, a difference, an exponential and a sum per direction; in the second a
difference, an exponential, and a product and a sum for the temperature's gradient. Everything else is of size b.

Where both sides are one view (`symmetric`) Z is symmetric, a sample has one anchor and not two, and the tiles above the
diagonal are enough: such a tile's rows and its columns are different anchors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

from drrho_core import _checks, _loops, _routines
from drrho_core._arrays import Array, Namespace, device_of
from drrho_core.numerics import log

DEFAULT_TILE = 1024
"""Square tiles of this side run at the matrix product's own rate and stay in cache between their uses."""

DEFAULT_MEMORY_BUDGET = 2**30
"""Bytes that the logits of one batch may take before they are computed twice instead."""

ANCHORS = -1
"""In a shape: the axis that has an entry for each anchor."""

Scalar: TypeAlias = float | Array
"""A number or an array of shape ()."""

Blocks: TypeAlias = Any
"""An array cut into blocks, to be indexed by a block's number: a list of arrays, or one stack of them."""

Values: TypeAlias = tuple[Any, ...]
"""What a visit gives to one block of anchors: arrays; None where a tile has nothing to say."""


class Tile(NamedTuple):
    """One tile of Z."""

    i: Array  # number of its block of rows: an int, or traced
    j: Array  # and of its block of columns
    z: Array  # (rows, columns)
    counts: Array | None  # which entries are pairs of an anchor and a negative; None: all
    diagonal: bool

    def block(self, which: int) -> Array:
        """Return the number of its block of rows (0) or of columns (1)."""
        return self.j if which else self.i


Visit: TypeAlias = Callable[[Tile], tuple[Values, Values]]
"""``visit(tile)`` returns what a tile gives to its rows and to its columns."""

Combine: TypeAlias = Callable[[int, Array, Values, Values], Values]
"""``combine(which, block, old, new)`` merges what two tiles gave to a block: of rows (which = 0) or of columns (1)."""

Shapes: TypeAlias = Sequence[tuple[int, ...]]
"""Of what a visit gives to one block of anchors; `ANCHORS` is the block's own length."""

Stacks: TypeAlias = tuple[Array, ...]


class Negatives(NamedTuple):
    """What the first sweep gives back for one direction; (b,)."""

    peak: Array  # max Z over negatives; some number where there are none
    total: Array  # sum exp((Z - peak) / (scale t)), 0 without any
    count: Array  # how many they are


class Sums(NamedTuple):
    """What the second sweep gives back."""

    image_pull: Array  # (b, d)  V E2
    text_pull: Array  # (b, d)  V^T E1
    weighted_image: Array  # (b,)    sum_j w_ij Z_ij
    weighted_text: Array  # (b,)    sum_i w'_ij Z_ij


class SumsWithin(NamedTuple):
    """What the second sweep gives back where both sides are one view."""

    pull: Array  # (b, d)  (w + w^T) E
    weighted: Array  # (b,)    sum_j w_ij Z_ij


def tiling(batch_size: int, item_size: int, tile_size: int | None, memory_budget: int | None) -> tuple[int, bool]:
    """Return the side of tiles and whether the logits are kept between the sweeps.

    An integer `tile_size` asks for two passes and no b x b array; else one pass while the logits fit the budget.
    """
    budget, side = DEFAULT_MEMORY_BUDGET, DEFAULT_TILE
    if memory_budget is not None:
        budget = _checks.integer("memory_budget", memory_budget, minimum=0)
    if batch_size < 2 * side:  # two tiles: one alone would be masked from end to end, and its copies leave the cache
        side = max(side // 2, -(-batch_size // 2))
    if tile_size is not None:
        side = _checks.integer("tile_size", tile_size, minimum=1)
    return side, tile_size is None and batch_size * batch_size * item_size <= budget


class Pairs:
    """One batch, ready for the sweeps. All arrays share one floating dtype, float32 or wider.

    Parameters
    ----------
    image_features, text_features : array, shape (b, d)
        The learner's features.
    reference_features : pair of arrays, shape (b, r), or None
        The reference model's, multiplied by ``-reference_weight`` on the image side.
    scale : float or array of shape ()
        Factor of Z.
    rates : pair of arrays, shape (b,), or None
        ``1 / (scale t)`` of image and of text anchors; None where it is 1.
    pair_mask : array of bool, shape (b, b), or None
        False: not a negative.
    side : int
        Of a tile.
    keep : bool
        Keep the tiles of Z from the first sweep on.
    """

    def __init__(
        self,
        image_features: Array,
        text_features: Array,
        *,
        reference_features: tuple[Array, Array] | None = None,
        reference_weight: Scalar = 1.0,
        scale: Scalar = 1.0,
        rates: tuple[Array, Array] | None = None,
        pair_mask: Array | None = None,
        side: int = DEFAULT_TILE,
        keep: bool = True,
        xp: Namespace,
    ) -> None:
        self.xp = xp
        self.product, self.exp = _routines.product_for(image_features, xp), _routines.exp_for(xp)
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
        self._scale, self._reference_scale = scale, -reference_weight * scale
        self._images, self._right = self.cut(image_features), self.cut(right)
        self.images, self.texts = self._images, self.cut(text_features)
        self._turned = xp.permute_dims(self._images, (0, 2, 1)) if self.rolled else None
        self.anchor_rates: tuple[Array | None, Array | None] = (None, None) if rates is None else rates
        self.rates = None if rates is None else tuple(self.cut(side, fill=1.0) for side in rates)
        self.pair_mask, self.has_mask = pair_mask, pair_mask is not None
        self._mask = None if pair_mask is None else self._cut_mask(pair_mask)
        self._keep = keep
        self._kept: dict[tuple[int, int], Array] = {}
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
        z = self.product(self._left(i), self._right[j].T)
        if self._keep and not self.rolled:
            self._kept[i, j] = z
        return z

    def pull(self, tile: Tile, v: Array) -> tuple[Array, Array]:
        """Return ``V E2`` for a tile's rows and ``V^T E1`` for its columns, in the shapes that `pull_shapes` tells."""
        to_rows = self.product(v, self.texts[tile.j])
        if self._turned is None:
            return to_rows, self.product(v.T, self.images[tile.i])
        # Compiled, the product of a transposed tile takes half as long again; of the features a transpose exists.
        return to_rows, self.product(self._turned[tile.i], v)

    @property
    def pull_shapes(self) -> Shapes:
        """The shapes of what `pull` returns."""
        upright = (ANCHORS, self.feature_dim)
        return upright, upright if self._turned is None else upright[::-1]

    def _tile(self, i: Array, j: Array, *, diagonal: bool) -> Tile:
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
        self, visit: Visit, combine: Combine, rows: Shapes, columns: Shapes | None = None
    ) -> tuple[Stacks, Stacks]:
        """Visit every tile and combine what it gives to its rows and to its columns; return both, joined.

        `rows` and `columns` are the shapes of a visit's values. Without columns Z is symmetric: only the tiles on the
        diagonal and above it are visited, rows and columns are the same anchors, both results one.
        """
        if self.rolled:
            to_rows, to_columns = self._sweep_rolled(visit, combine, rows, columns)
        else:
            to_rows, to_columns = self._sweep_unrolled(visit, combine, symmetric=columns is None)

        def joined(parts: Any, shapes: Shapes) -> Stacks:
            both = zip(parts, shapes, strict=True)
            return tuple(self.join(part, anchors=shape.index(ANCHORS)) for part, shape in both)

        of_rows = joined(to_rows, rows)
        return of_rows, of_rows if columns is None else joined(to_columns, columns)

    def _sweep_unrolled(self, visit: Visit, combine: Combine, *, symmetric: bool) -> Any:
        to_rows: list[Any] = [None] * self.num_blocks
        to_columns = to_rows if symmetric else list(to_rows)

        def merge(which: int, block: int, collected: list[Any], new: Values) -> None:
            old = collected[block]
            collected[block] = new if old is None else combine(which, block, old, new)

        for i in range(self.num_blocks):
            for j in range(i if symmetric else 0, self.num_blocks):
                new = visit(self._tile(i, j, diagonal=i == j))
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
            tile = self._tile(i, j, diagonal=diagonal)
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
    """Return the negatives of the image anchors and of the text anchors, and the positives, the diagonal of Z; (b,)."""
    shapes: Shapes = [(ANCHORS,)] * (4 if pairs.has_mask else 3)
    image, text = pairs.sweep(_meet_negatives(pairs), _merge_negatives(pairs), shapes, shapes)
    if pairs.has_mask:
        return Negatives(image[0], image[1], image[3]), Negatives(text[0], text[1], text[3]), image[2]
    count = pairs.xp.full_like(image[0], float(pairs.batch_size - 1))
    return Negatives(image[0], image[1], count), Negatives(text[0], text[1], count), image[2]


def sum_negatives_within(pairs: Pairs) -> Negatives:
    """Return the negatives of each anchor in its own view."""
    (peak, total, _), _ = pairs.sweep(_meet_negatives(pairs), _merge_negatives(pairs), [(ANCHORS,)] * 3)
    return Negatives(peak, total, pairs.xp.full_like(peak, float(pairs.batch_size - 1)))


def merge(one: Negatives, other: Negatives, rate: Array | None, *, xp: Namespace) -> Negatives:
    """Return the negatives of the same anchors in two tiles or two matrices as one."""
    peak = xp.maximum(one.peak, other.peak)
    first, second = (part.total * xp.exp(_above(part, peak, rate, xp)) for part in (one, other))
    return Negatives(peak, first + second, one.count + other.count)


def log_sum(negatives: Negatives, positive: Array, rate: Array | None, *, xp: Namespace) -> Array:
    """Return ``log sum exp(D)`` (b,) over negatives, -inf without any."""
    return _above(negatives, positive, rate, xp) + log(negatives.total, xp=xp)


def threshold(positive: Array, log_denominator: Array, rate: Array | None) -> Array:
    """Return the Z (b,) at which an anchor's weight is 1: ``D - log denominator = rate (Z - threshold)``."""
    return positive + (log_denominator if rate is None else log_denominator / rate)


def sum_of_weights(negatives: Negatives, threshold: Array, rate: Array | None, *, xp: Namespace) -> Array:
    """Return ``sum_j w_ij`` (b,): what the second sweep would sum up, known from the first."""
    return xp.exp(_above(negatives, threshold, rate, xp)) * negatives.total


def weighted_excess(weighted: Array, positive: Array, weight: Array, rate: Array | None) -> Array:
    """Return ``sum_j w_ij D_ij`` (b,) given ``sum_j w_ij Z_ij``; it cancels no more than D itself does."""
    return _times(weighted - positive * weight, rate)


def _above(negatives: Negatives, z: Array, rate: Array | None, xp: Namespace) -> Array:
    """Return how far a peak is above some Z, as an exponent; 0 without negatives, for their peak is only a number."""
    difference = xp.where(negatives.total > 0, negatives.peak - z, xp.zeros_like(z))
    return _times(difference, rate)


def weigh(pairs: Pairs, threshold_image: Array, threshold_text: Array) -> Sums:
    """Return the weighted sums of the closed-form gradients, given each anchor's threshold (b,)."""
    weights = _weights(pairs, (pairs.cut(threshold_image), pairs.cut(threshold_text)))

    def visit(tile: Tile) -> tuple[Values, Values]:
        v, weighted_image = weights(0, tile)
        w, weighted_text = weights(1, tile)
        v += w
        image_pull, text_pull = pairs.pull(tile, v)
        return (image_pull, weighted_image), (text_pull, weighted_text)

    of_rows, of_columns = pairs.pull_shapes
    image, text = pairs.sweep(visit, add, [of_rows, (ANCHORS,)], [of_columns, (ANCHORS,)])
    return Sums(image[0], text[0], image[1], text[1])


def weigh_within(pairs: Pairs, threshold: Array) -> SumsWithin:
    """Return the same sums where both sides are one view."""
    thresholds = pairs.cut(threshold)
    weights = _weights(pairs, (thresholds, thresholds))

    def visit(tile: Tile) -> tuple[Values, Values]:
        v, weighted = weights(0, tile)
        if tile.diagonal:  # both its anchors and its others are of the same block
            return (pairs.product(v + v.T, pairs.images[tile.i]), weighted), (None, None)
        w, weighted_columns = weights(1, tile)
        v += w
        to_rows = pairs.product(v, pairs.images[tile.j])
        return (to_rows, weighted), (pairs.product(v.T, pairs.images[tile.i]), weighted_columns)

    (pull, weighted), _ = pairs.sweep(visit, add, [(ANCHORS, pairs.feature_dim), (ANCHORS,)])
    return SumsWithin(pull, weighted)


def _meet_negatives(pairs: Pairs) -> Visit:
    """Return the first sweep's visit: peak, sum, positive (of the diagonal's tiles) and, with a mask, number."""
    xp, exp = pairs.xp, pairs.exp
    lowest = -float(xp.finfo(pairs.image_features.dtype).max) / 4

    def one_side(which: int, tile: Tile, positive: Array | None) -> Values:
        axis, block, z, counts = 1 - which, tile.block(which), tile.z, tile.counts
        peak = xp.max(z, axis=axis)
        if counts is not None:  # an anchor without negatives gets a peak that any other exceeds
            peak = xp.where(peak < lowest, lowest, peak)
        x = z - along(axis, peak)
        if pairs.rates is not None:
            x *= along(axis, pairs.rates[which][block])
        total = xp.sum(exp(x), axis=axis)
        if not pairs.has_mask:
            return peak, total, positive
        return peak, total, positive, xp.sum(xp.astype(counts, z.dtype), axis=axis)

    def visit(tile: Tile) -> tuple[Values, Values]:
        positive = xp.linalg.diagonal(tile.z) if tile.diagonal else None
        tile = tile._replace(z=pairs.only_counted(tile.z, tile))
        return one_side(0, tile, positive), one_side(1, tile, positive)

    return visit


def _merge_negatives(pairs: Pairs) -> Combine:
    """Return how two tiles' peaks, sums, positives and numbers become one."""

    def combine(which: int, block: Array, old: Values, new: Values) -> Values:
        rate = None if pairs.rates is None else pairs.rates[which][block]
        first, second = (Negatives(part[0], part[1], part[3] if pairs.has_mask else 0) for part in (old, new))
        merged = merge(first, second, rate, xp=pairs.xp)
        positive = old[2] if new[2] is None else new[2]
        return (merged.peak, merged.total, positive, *((merged.count,) if pairs.has_mask else ()))

    return combine


def _weights(pairs: Pairs, thresholds: tuple[Blocks, Blocks]) -> Callable[[int, Tile], tuple[Array, Array]]:
    """Return a function that gives a tile's weights in one direction and each anchor's ``sum w Z``."""
    xp, exp = pairs.xp, pairs.exp

    def weights(which: int, tile: Tile) -> tuple[Array, Array]:
        axis, block = 1 - which, tile.block(which)
        x = tile.z - along(axis, thresholds[which][block])
        if pairs.rates is not None:
            x *= along(axis, pairs.rates[which][block])
        w = exp(pairs.only_counted(x, tile))  # before the exponential: what does not count may be huge
        return w, xp.sum(w * tile.z, axis=axis)

    return weights


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


def _times(x: Array, factor: Scalar | None) -> Array:
    """Return ``x * factor``; `x` itself where the factor is 1."""
    return x if factor is None or (isinstance(factor, float) and factor == 1.0) else x * factor
