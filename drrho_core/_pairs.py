"""The two sweeps over all pairs of a batch that every contrastive objective here is made of.

Notation of docs/theory. Rows are image anchors, columns text anchors, ``[b, b]`` matrices are met in square tiles:

    Z = left right^T,   left = [E1, -lambda R1],   right = [E2, R2]           the (excess) similarity
    image anchor i:  D_ij  = (Z_ij - Z_ii) / t_i       text anchor j:  D'_ij = (Z_ij - Z_jj) / t'_j

`sum_negatives` is the first sweep: the log-sum-exp of D over each row, of D' over each column. What an objective makes
of it is a logarithmic denominator per anchor. `pull_back` is the second: with

    w_ij = exp(D_ij - log denominator_i),   w'_ij = exp(D'_ij - log denominator'_j),   V = w + w'

it returns ``V E2``, ``V^T E1`` and the sums over weights that the closed-form gradients need. A sweep either keeps the
tiles of Z (one pass: 4 matrix products in all) or computes them again (two passes: 6 products, memory grows with b).

Where both sides are one view (`sum_negatives_within`, `weigh_within`) Z is symmetric, a sample has one anchor and not
two, and the tiles above the diagonal are enough: such a tile's rows and its columns are different anchors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from drrho_core import _checks
from drrho_core._arrays import Array, Namespace, device_of
from drrho_core.numerics import log_sum_exp

DEFAULT_TILE = 1024
"""Square tiles of this side run at the matrix product's own rate and stay in cache between their uses."""

DEFAULT_MEMORY_BUDGET = 2**30
"""Bytes that the logits of one batch may take before they are computed twice instead."""


class Pairs(NamedTuple):
    """One batch, ready for the sweeps. All arrays share one floating dtype, float32 or wider."""

    left: Array  # (b, d + r)
    right: Array  # (b, d + r)
    positive: Array  # (b,), the diagonal of Z
    image_features: Array  # (b, d)
    text_features: Array  # (b, d)
    temperature_image: Array  # (b,)
    temperature_text: Array  # (b,)
    pair_mask: Array | None  # (b, b) bool
    starts: tuple[int, ...]  # where tiles start; ends with b
    kept: dict[tuple[int, int], Array] | None  # tiles of Z, or None where they are computed again


class Negatives(NamedTuple):
    """What the first sweep gives back for one direction; (b,)."""

    log_sum: Array  # log sum exp(D) over negatives, -inf without any
    count: Array  # how many they are


class Sums(NamedTuple):
    """What the second sweep gives back."""

    image_pull: Array  # (b, d)  V E2;   after `pull_back`  V E2 - c * E2
    text_pull: Array  # (b, d)  V^T E1;   after `pull_back`  V^T E1 - c * E1
    weight_image: Array  # (b,)    sum_j w_ij
    weight_text: Array  # (b,)    sum_i w'_ij
    weighted_image: Array  # (b,)    sum_j w_ij D_ij
    weighted_text: Array  # (b,)    sum_i w'_ij D'_ij


class SumsWithin(NamedTuple):
    """What the second sweep gives back where both sides are one view."""

    pull: Array  # (b, d)  (w + w^T) E
    weight: Array  # (b,)    sum_j w_ij
    weighted: Array  # (b,)    sum_j w_ij D_ij


def tiling(
    batch_size: int, item_size: int, tile_size: int | None, memory_budget: int | None
) -> tuple[tuple[int, ...], bool]:
    """Return where tiles start (with the end appended) and whether the logits are kept between the sweeps.

    An integer `tile_size` asks for two passes and no b x b array; else one pass while the logits fit the budget.
    """
    budget, side = DEFAULT_MEMORY_BUDGET, DEFAULT_TILE
    if memory_budget is not None:
        budget = _checks.integer("memory_budget", memory_budget, minimum=0)
    if tile_size is not None:
        side = _checks.integer("tile_size", tile_size, minimum=1)
    keep = tile_size is None and batch_size * batch_size * item_size <= budget
    return (*range(0, batch_size, side), batch_size), keep


def tiles(
    pairs: Pairs, xp: Namespace, *, symmetric: bool = False
) -> Iterator[tuple[int, int, slice, slice, Array, Array | None]]:
    """Yield each tile of Z with its place and, where not all its pairs count, the mask of those that do.

    Of a symmetric Z only the tiles on the diagonal and above it.
    """
    spans = [slice(start, stop) for start, stop in zip(pairs.starts, pairs.starts[1:], strict=False)]
    for i, rows in enumerate(spans):
        for j, columns in enumerate(spans):
            if symmetric and j < i:
                continue
            z = None if pairs.kept is None else pairs.kept.get((i, j))
            if z is None:
                z = pairs.left[rows, :] @ pairs.right[columns, :].T
                if pairs.kept is not None:
                    pairs.kept[i, j] = z
            counts = None if pairs.pair_mask is None else pairs.pair_mask[rows, columns]
            if i == j:
                index = xp.arange(rows.stop - rows.start, device=device_of(z))
                off_diagonal = index[:, None] != index[None, :]
                counts = off_diagonal if counts is None else counts & off_diagonal
            yield i, j, rows, columns, z, counts


def excess(pairs: Pairs, rows: slice, columns: slice, z: Array) -> tuple[Array, Array]:
    """Return a tile of D and of D'. The positive is subtracted before the division, while the difference is exact."""
    image = (z - pairs.positive[rows][:, None]) / pairs.temperature_image[rows][:, None]
    text = (z - pairs.positive[columns][None, :]) / pairs.temperature_text[columns][None, :]
    return image, text


def sum_negatives(pairs: Pairs, *, xp: Namespace) -> tuple[Negatives, Negatives]:
    """Return log-sum-exp and number of the negatives of the image anchors and of the text anchors."""
    image, text, image_count, text_count = Parts(xp), Parts(xp), Parts(xp), Parts(xp)
    for i, j, rows, columns, z, counts in tiles(pairs, xp):
        d_image, d_text = excess(pairs, rows, columns, z)
        image.merge(i, log_sum_exp(d_image, axis=1, where=counts, xp=xp), xp.logaddexp)
        text.merge(j, log_sum_exp(d_text, axis=0, where=counts, xp=xp), xp.logaddexp)
        if pairs.pair_mask is not None:
            numbers = xp.astype(counts if counts is not None else pairs.pair_mask[rows, columns], z.dtype)
            image_count.add(i, xp.sum(numbers, axis=1))
            text_count.add(j, xp.sum(numbers, axis=0))
    if pairs.pair_mask is not None:
        return Negatives(image.join(), image_count.join()), Negatives(text.join(), text_count.join())
    number = xp.full_like(pairs.positive, pairs.starts[-1] - 1)
    return Negatives(image.join(), number), Negatives(text.join(), number)


def sum_negatives_within(pairs: Pairs, *, xp: Namespace) -> Array:
    """Return the log-sum-exp (b,) of the negatives of each anchor in its own view."""
    log_sum = Parts(xp)
    for i, j, rows, columns, z, counts in tiles(pairs, xp, symmetric=True):
        d_rows, d_columns = excess(pairs, rows, columns, z)
        log_sum.merge(i, log_sum_exp(d_rows, axis=1, where=counts, xp=xp), xp.logaddexp)
        if i != j:
            log_sum.merge(j, log_sum_exp(d_columns, axis=0, where=counts, xp=xp), xp.logaddexp)
    return log_sum.join()


def weigh(pairs: Pairs, log_denominator_image: Array, log_denominator_text: Array, *, xp: Namespace) -> Sums:
    """Return the weighted sums of the closed-form gradients, given one logarithmic denominator (b,) per anchor."""
    image_pull, weight_image, weighted_image = Parts(xp), Parts(xp), Parts(xp)
    text_pull, weight_text, weighted_text = Parts(xp), Parts(xp), Parts(xp)
    log_denominator_image = xp.astype(log_denominator_image, pairs.left.dtype)
    log_denominator_text = xp.astype(log_denominator_text, pairs.left.dtype)
    for i, j, rows, columns, z, counts in tiles(pairs, xp):
        d_image, d_text = excess(pairs, rows, columns, z)
        log_w_image = d_image - log_denominator_image[rows][:, None]
        log_w_text = d_text - log_denominator_text[columns][None, :]
        if counts is not None:  # before the exponential: what does not count may be huge
            log_w_image = xp.where(counts, log_w_image, -xp.inf)
            log_w_text = xp.where(counts, log_w_text, -xp.inf)
        w_image, w_text = xp.exp(log_w_image), xp.exp(log_w_text)
        v = w_image + w_text
        image_pull.add(i, v @ pairs.text_features[columns, :])
        text_pull.add(j, v.T @ pairs.image_features[rows, :])
        weight_image.add(i, xp.sum(w_image, axis=1))
        weight_text.add(j, xp.sum(w_text, axis=0))
        weighted_image.add(i, xp.sum(w_image * d_image, axis=1))
        weighted_text.add(j, xp.sum(w_text * d_text, axis=0))
    return Sums(
        *(part.join() for part in (image_pull, text_pull, weight_image, weight_text, weighted_image, weighted_text))
    )


def weigh_within(pairs: Pairs, log_denominator: Array, *, xp: Namespace) -> SumsWithin:
    """Return the same sums where both sides are one view."""
    pull, weight, weighted = Parts(xp), Parts(xp), Parts(xp)
    log_denominator = xp.astype(log_denominator, pairs.left.dtype)
    for i, j, rows, columns, z, counts in tiles(pairs, xp, symmetric=True):
        d_rows, d_columns = excess(pairs, rows, columns, z)
        log_w = d_rows - log_denominator[rows][:, None]
        w = xp.exp(log_w if counts is None else xp.where(counts, log_w, -xp.inf))
        weight.add(i, xp.sum(w, axis=1))
        weighted.add(i, xp.sum(w * d_rows, axis=1))
        if i == j:
            v = w + w.T
        else:
            w_columns = xp.exp(d_columns - log_denominator[columns][None, :])
            weight.add(j, xp.sum(w_columns, axis=0))
            weighted.add(j, xp.sum(w_columns * d_columns, axis=0))
            v = w + w_columns
            pull.add(j, v.T @ pairs.image_features[rows, :])
        pull.add(i, v @ pairs.image_features[columns, :])
    return SumsWithin(pull.join(), weight.join(), weighted.join())


def pull_back(pairs: Pairs, log_denominator_image: Array, log_denominator_text: Array, *, xp: Namespace) -> Sums:
    """Return what `weigh` does, less what the positives pull: ``V E2 - c * E2`` and ``V^T E1 - c * E1``."""
    sums = weigh(pairs, log_denominator_image, log_denominator_text, xp=xp)
    c = (sums.weight_image + sums.weight_text)[:, None]
    return sums._replace(
        image_pull=sums.image_pull - c * pairs.text_features, text_pull=sums.text_pull - c * pairs.image_features
    )


class Parts:
    """A vector or matrix that grows row block by row block: one part per tile index, merged, joined at the end."""

    def __init__(self, xp: Namespace) -> None:
        self._xp = xp
        self._parts: dict[int, Array] = {}

    def merge(self, tile: int, value: Array, combine: Callable[[Array, Array], Array]) -> None:
        """Combine `value` with what is there."""
        self._parts[tile] = combine(self._parts[tile], value) if tile in self._parts else value

    def add(self, tile: int, value: Array) -> None:
        """Add `value` to what is there."""
        self.merge(tile, value, lambda old, new: old + new)

    def join(self) -> Array:
        """Concatenate all parts in order."""
        parts = [self._parts[tile] for tile in sorted(self._parts)]
        return parts[0] if len(parts) == 1 else self._xp.concat(parts, axis=0)
