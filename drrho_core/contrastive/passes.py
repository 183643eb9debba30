"""The two passes over all pairs of a batch. They compute every contrastive objective of this package.

    image anchor i:  D_ij = (Z_ij - Z_ii) r_i          text anchor j:  D'_ij = (Z_ij - Z_jj) r'_j          r = 1 / t

Z is the matrix of excess similarities (see `drrho_core.contrastive.tiles`), t the temperature and r the rate of an
anchor. A prime marks the text anchors.

Pass 1, `sum_negatives`, sums e = exp((Z - peak) r), and e times its exponent, over the negatives of each anchor.
`peak` is a value near the largest Z_ij of the anchor's negatives, so that nothing overflows. The sum of e is the
`total`. The positives Z_ii are read from the same matrix products as the negatives, so that logits of equal features
are equal to the last bit.

Pass 2, `pull_back`, gets the sum of each anchor's weights (`weight`) and returns ``V E2`` and ``V^T E1``. E1 and E2 are
the features of both sides, and V holds the weights of all pairs:

    w_ij = weight_i e_ij / total_i,   w'_ij = weight'_j e'_ij / total'_j,   V = w + w'

So each exponential is divided by a sum that contains the same exponential, and rounding errors cancel. The weights
could also be computed as w_ij = exp(D_ij - threshold_i). But the threshold has the size 1/t, and rounding it would
change the weights by 1 % for 1/t = 1e5 in float32.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from drrho_core._array_api import Array, Namespace, PerAnchor, Scalar
from drrho_core.contrastive.scaling import saturated
from drrho_core.contrastive.tiles import Tile, Tiles, Values, along, split
from drrho_core.extend import Batch, FirstSweep, SecondSweep
from drrho_core.numerics import log


class AnchorSums(NamedTuple):
    """For each anchor of one direction: the sums over its negatives, and its positive; all arrays are (b,)."""

    peak: Array  # a value of Z near the largest negative; without negatives any finite number
    total: Array  # sum exp((Z - peak) r), 0 without negatives
    mean: Array  # mean of (Z - peak) r with weights proportional to those exponentials, 0 without negatives
    count: Array  # number of negatives; until the pass ends, None if all anchors have b - 1 negatives
    positive: Array | None  # Z_ii; None before the tile on the diagonal is visited, and if both sides are one view


class PlainSweeps:
    """Both passes over tiles, in operations of the Array API standard; see `drrho_core.extend.Sweeps`."""

    def __init__(self, temperature: PerAnchor, tile_size: int | None, memory_budget: int | None, xp: Namespace) -> None:
        # A temperature that all anchors share stays a scalar, because then both directions can share exponentials.
        self._temperature, self._tile_size, self._memory_budget = temperature, tile_size, memory_budget
        self._xp = xp

    def declines(self, _batch: Batch, _mode: str, /) -> str | None:
        """Return None: no batch is declined."""
        return None

    def sum_negatives(self, batch: Batch, /) -> FirstSweep:
        """Pass 1: return the log-sum-exp over each anchor's negatives."""
        tiles = split(
            batch.image_features,
            batch.text_features,
            temperature=self._temperature,
            reference_features=batch.reference_features,
            reference_weight=batch.reference_weight,
            pair_mask=batch.pair_mask,
            tile_size=self._tile_size,
            memory_budget=self._memory_budget,
            xp=self._xp,
        )
        sums = sum_negatives(tiles)
        log_sums, means = log_sums_and_means(sums, tiles.scaling.rates, xp=self._xp)
        return FirstSweep(*log_sums, *means, sums[0].count, sums[1].count, saved=(tiles, sums))

    def pull_back(self, _batch: Batch, first: FirstSweep, weight_image: Array, weight_text: Array, /) -> SecondSweep:
        """Pass 2: return the weighted sums of features."""
        tiles, sums = first.saved
        return SecondSweep(*pull_back(tiles, sums, (weight_image, weight_text)))


def sum_negatives(tiles: Tiles) -> tuple[AnchorSums, AnchorSums]:
    """Pass 1: return the sums of the image anchors and of the text anchors; for a symmetric Z both are the same."""
    xp, exp = tiles.xp, tiles.exp

    def summed(peak: Array, e: Array, moments: Array, axis: int, count: Any, positive: Any) -> AnchorSums:
        total, moment = xp.sum(e, axis=axis), xp.sum(moments, axis=axis)
        has_negatives = total > 0
        divisor = xp.where(has_negatives, total, xp.ones_like(total))
        mean = xp.where(has_negatives, moment / divisor, xp.zeros_like(total))
        return AnchorSums(peak, total, mean, count, positive)

    def visit(i: Any, j: Any, diagonal: bool) -> tuple[AnchorSums, AnchorSums]:
        tile = tiles.tile(i, j, diagonal)
        positive, counts = None, [None, None]
        # The positives are copied, because the tile may be overwritten, and a view would keep the tile in memory.
        if diagonal and not tiles.symmetric:
            positive = xp.asarray(xp.linalg.diagonal(tile.z), copy=True)
        if tiles.mask is not None:
            numbers = xp.astype(tile.counts, tile.z.dtype)
            counts = [xp.sum(numbers, axis=1), xp.sum(numbers, axis=0)]
        negatives = tile._replace(z=tiles.only_negatives(tile.z, tile))
        peaks = [xp.max(negatives.z, axis=1), xp.max(negatives.z, axis=0)]

        shared = None if tiles.shared is None else tiles.shared.first(tiles, negatives, peaks)
        if shared is not None:
            # There is one exponential e = exp((Z - top) r) per pair; `top` is the tile's largest entry. Both e and e
            # times the exponent x are summed over rows and over columns; the product overwrites x.
            (top, e), x = shared
            x *= e
            row, column = xp.zeros_like(peaks[0]) + top, xp.zeros_like(peaks[1]) + top
            return summed(row, e, x, 1, counts[0], positive), summed(column, e, x, 0, counts[1], positive)

        # The tile is cold: exponentials relative to the largest entry would underflow for an anchor (see the module
        # `shared`). So each direction has its own exponentials, relative to its anchors' peaks.
        tiles.keep(tile)
        results = []
        for side, peak in enumerate(peaks):
            if negatives.counts is not None:  # an anchor without negatives gets a finite peak below all others
                peak = xp.clip(peak, min=tiles.lowest)
            x = tiles.finite_exponents(tiles.exponent(side, negatives, peak), negatives)
            e = exp(x, False)
            results.append(summed(peak, e, x * e, 1 - side, counts[side], positive))
        return results[0], results[1]

    def combine(side: int, block: Any, old: Values, new: Values) -> AnchorSums:
        return merge(AnchorSums(*old), AnchorSums(*new), tiles.rate(side, block), xp=xp)

    to_rows, to_columns = tiles.sweep(visit, combine)
    image, text = AnchorSums(*to_rows), AnchorSums(*to_columns)
    if tiles.mask is not None:
        return image, text
    count = xp.full_like(image.total, float(tiles.batch_size - 1))
    return image._replace(count=count), text._replace(count=count)


def merge(a: AnchorSums, b: AnchorSums, rate: Scalar, *, xp: Namespace) -> AnchorSums:
    """Merge the sums over negatives that the same anchors have in two tiles, or in two matrices."""
    in_a, in_b = a.total > 0, b.total > 0  # whether the anchor has negatives in a, and in b
    a_log, b_log = (
        xp.log(xp.where(present, sums.total, xp.ones_like(sums.total))) for present, sums in ((in_a, a), (in_b, b))
    )
    gap = saturated(xp.where(in_a & in_b, a.peak - b.peak, xp.zeros_like(a.peak)), rate, xp=xp)
    # The result has the peak of the part with the larger sum, so that neither sum overflows or vanishes.
    lead = gap + (a_log - b_log)
    a_leads = in_a & (~in_b | (lead >= 0))
    ratio = xp.where(in_a & in_b, xp.exp(-xp.abs(lead)), xp.zeros_like(lead))  # smaller sum / larger sum
    gap = xp.where(ratio > 0, xp.where(a_leads, -gap, gap), xp.zeros_like(gap))
    total = xp.where(a_leads, a.total, b.total)
    mean, other_mean = xp.where(a_leads, a.mean, b.mean), xp.where(a_leads, b.mean, a.mean)
    return AnchorSums(
        peak=xp.where(a_leads, a.peak, b.peak),
        total=total + total * ratio,
        mean=(mean + ratio * (other_mean + gap)) / (1.0 + ratio),
        count=None if a.count is None else a.count + b.count,
        positive=a.positive if b.positive is None else b.positive,
    )


def part_of_sum(part: AnchorSums, whole: AnchorSums, rate: Scalar, *, xp: Namespace) -> Array:
    """Return which part, from 0 to 1, of each anchor's sum in `whole` comes from `part`; (b,)."""
    present = part.total > 0
    ones = xp.ones_like(part.total)
    gap = saturated(xp.where(present, part.peak - whole.peak, xp.zeros_like(part.peak)), rate, xp=xp)
    ratio = xp.log(xp.where(present, part.total, ones)) - xp.log(xp.where(present, whole.total, ones))
    return xp.where(present, xp.exp(xp.clip(gap + ratio, max=0.0)), xp.zeros_like(part.total))


def peak_above_positive(sums: AnchorSums, rate: Scalar, *, xp: Namespace) -> Array:
    """Return D at each anchor's peak, (b,); D is 0 without negatives."""
    return saturated(xp.where(sums.total > 0, sums.peak - sums.positive, xp.zeros_like(sums.peak)), rate, xp=xp)


def log_sum_and_mean(sums: AnchorSums, rate: Scalar, *, xp: Namespace) -> tuple[Array, Array]:
    """Return ``log sum exp(D)`` and the mean of D with weights exp(D), both (b,); without negatives -inf and 0."""
    above = peak_above_positive(sums, rate, xp=xp)
    return above + log(sums.total, xp=xp), above + sums.mean


def log_sums_and_means(
    sums: tuple[AnchorSums, AnchorSums], rates: tuple[Scalar, Scalar], *, xp: Namespace
) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    """Return both directions' `log_sum_and_mean`: the two logarithms, then the two means."""
    image, text = (log_sum_and_mean(side, rate, xp=xp) for side, rate in zip(sums, rates, strict=True))
    return (image[0], text[0]), (image[1], text[1])


def pull_back(
    tiles: Tiles, sums: tuple[AnchorSums, AnchorSums], weight_sums: tuple[Array, Array], *, to_columns: bool = True
) -> tuple[Array, Any]:
    """Pass 2: return ``V E2`` and ``V^T E1``, given the sum of each anchor's weights (b,).

    If both sides are one view, both results are ``(w + w^T) E``. In this case pass the same sums twice. If `to_columns`
    is False, the second result is None, and its product is not computed.
    """
    weights = _Weights(tiles, sums, weight_sums)

    def weigh(i: Any, j: Any, diagonal: bool) -> tuple[Array, Values, Values]:
        # In a tile on the diagonal of a symmetric matrix rows and columns are the same anchors, so w' is w^T.
        same_anchors = tiles.symmetric and diagonal
        shared = None if tiles.shared is None else tiles.shared.again(tiles, i, j, diagonal)
        if shared is not None:
            # V = e (a_i + a'_j) needs one factor per row and one per column, but no second exponential per pair.
            row = weights.shared_factor(0, i, shared.top)[:, None]
            if same_anchors:
                v = shared.exponential * row
            else:
                v = row + weights.shared_factor(1, j, shared.top)[None, :]
                v *= shared.exponential
        else:
            tile = tiles.tile(i, j, diagonal)
            v = weights.of_cold_tile(0, tile)
            if not same_anchors:
                v += weights.of_cold_tile(1, tile)
        return (v + v.T if same_anchors else v), (), ()

    image, text, _, _ = tiles.pull(weigh, to_columns=to_columns)
    return image, text


class _Weights:
    """The weights of the pairs of any tile, given both directions' sums and the sum of each anchor's weights."""

    def __init__(self, tiles: Tiles, sums: tuple[AnchorSums, AnchorSums], weight_sums: tuple[Array, Array]) -> None:
        xp = tiles.xp
        self._tiles = tiles
        self._directions = []
        for side, weight_sum in zip(sums, weight_sums, strict=True):
            has_negatives = side.total > 0  # an anchor without negatives has no peak and no weights
            total = xp.where(has_negatives, side.total, xp.ones_like(side.total))
            peak = xp.where(has_negatives, side.peak, xp.zeros_like(side.peak))
            # Exponentials relative to the anchor's peak, times the factor, are weights with the sum `weight_sum`.
            factor = xp.where(has_negatives, weight_sum / total, xp.zeros_like(weight_sum))
            limit = peak if tiles.shared is None else xp.log(total) + (tiles.shared.cold + 1.0)
            self._directions.append(tiles.cut(peak, factor, limit))

    def of_cold_tile(self, side: int, tile: Tile) -> Array:
        """Return the weights w (side 0) or w' (side 1) of a cold tile."""
        tiles, block = self._tiles, tile.block(side)
        peaks, factors, _ = self._directions[side]
        x = tiles.exponent(side, tile, peaks[block])
        # The mask is applied before the exponential, because an entry that is no negative may be huge.
        w = tiles.exp(tiles.only_negatives(x, tile), True)
        w *= along(1 - side, factors[block])
        return w

    def shared_factor(self, side: int, block: Any, top: Array) -> Array:
        """Return one direction's factors, which turn a tile's exponentials relative to `top` into weights."""
        tiles, xp = self._tiles, self._tiles.xp
        peaks, factors, limits = self._directions[side]
        gap = saturated(top - peaks[block], tiles.rates[0], xp=xp)
        # `cold` bounds the gap between `top` and the peak that an anchor has in this tile. So for an anchor with
        # negatives in this tile exp(gap) is at most the anchor's total times exp(cold). A larger gap belongs to an
        # anchor without negatives in this tile: all its exponentials are 0 here, so its factor may be 0.
        near = gap < limits[block]
        return factors[block] * xp.where(near, xp.exp(xp.where(near, gap, xp.zeros_like(gap))), 0.0)
