"""The squared hinge with a margin, TuneCLIP's loss: negatives within a margin of the positive contribute.

    loss = (1/2b) sum_i (1/N_i) sum_{j != i} relu(S_ij - S_ii + margin)^2 + the same over columns

Docs: docs/theory/selection.md, "Losses". Source: TuneCLIP (arXiv 2601.09859).
"""

from __future__ import annotations

from typing import Any

from drrho_core import _validate
from drrho_core._array_api import Array, Namespace, Scalar, wide_dtype
from drrho_core._validate import NOT_NEGATIVE
from drrho_core.contrastive.gradient import gradient
from drrho_core.contrastive.options import check_features, check_pair_mask
from drrho_core.contrastive.tiles import Tiles, Values, along, split
from drrho_core.losses.results import FeatureGradients


def hinge_margin_loss(
    image_features: Array,
    text_features: Array,
    /,
    *,
    margin: Scalar,
    pair_mask: Array | None = None,
    tile_size: int | None = None,
    memory_budget: int | None = None,
    xp: Namespace | None = None,
) -> FeatureGradients:
    """Return TuneCLIP's squared hinge: a negative contributes only if it comes within a margin of the positive.

    Parameters
    ----------
    image_features, text_features : array, shape (b, d)
        As in `info_nce`.
    margin : float or array of shape ()
        The distance to keep, >= 0, in units of the similarity.
    pair_mask : array of bool, shape (b, b), optional
        Entry (i, j) False: the pair is skipped because it may be a positive. The diagonal never is a negative.
    tile_size, memory_budget : int, optional
        As in `contrastive_step`; here a single pass over the tiles is enough.
    xp : namespace, optional
        The arrays' namespace; pass it under ``torch.compile``.

    Returns
    -------
    FeatureGradients
        Loss and gradients.

    Raises
    ------
    TypeError, ValueError
        As `contrastive_step`.

    Notes
    -----
    ``relu(S_ij - S_ii + margin)^2`` for image anchor i, ``relu(S_ij - S_jj + margin)^2`` for text anchor j: mean over
    the negatives and over anchors, half of each direction. TuneCLIP (arXiv 2601.09859). An anchor has b - 1 negatives,
    or as many as `pair_mask` leaves. An anchor without negatives contributes 0; the mean over anchors still divides by
    b.

    Examples
    --------
    >>> import numpy as np
    >>> images, texts = np.eye(2), np.asarray([[1.0, 0.0], [0.8, 0.6]])         # S_12 = 0.8: too close to 1 and to 0.6
    >>> result = hinge_margin_loss(images, texts, margin=0.3)
    >>> round(float(result.loss), 6), round((0.0 + 0.1**2 + 0.5**2 + 0.0) / 4, 6)
    (0.065, 0.065)
    """
    required = {"image_features": image_features, "text_features": text_features}
    if pair_mask is not None:
        required["pair_mask"] = pair_mask
    call = _validate.arrays(required, xp, options={"margin": margin})
    xp, batch_size, work = call.xp, check_features(call), wide_dtype(image_features.dtype, call.xp)
    check_pair_mask(call, batch_size)
    margin = call.option("margin", margin, NOT_NEGATIVE, work)
    tiles = split(
        image_features,
        text_features,
        pair_mask=pair_mask,
        tile_size=tile_size,
        memory_budget=memory_budget,
        passes=1,
        margin=margin,
        xp=xp,
    )
    # Features or a margin so large that sums would overflow are scaled.
    left, right = tiles.scaling.left, tiles.scaling.right
    margin = margin * left * right
    # The positive S_ii of each anchor, and 1 over its number of negatives.
    own, *factors = tiles.cut(tiles.positives(), *_one_over_negatives(tiles, xp))

    def weigh(i: Any, j: Any, diagonal: bool) -> tuple[Array, Values, Values]:
        tile = tiles.tile(i, j, diagonal)
        slopes, values = [], []
        for side, block in enumerate((i, j)):
            axis = 1 - side
            # With h = relu(S_ij - S_ii + margin): slope h / N and value h^2 / N. The factor 2 of d(h^2) comes last.
            within = tile.z - along(axis, own[block]) + margin
            counted = within > 0 if tile.counts is None else tile.counts & (within > 0)
            within = xp.where(counted, within, xp.zeros_like(within))
            slope = within * along(axis, factors[side][block])
            slopes.append(slope)
            values.append((xp.sum(slope * within, axis=axis), xp.sum(slope, axis=axis)))
        return slopes[0] + slopes[1], values[0], values[1]

    image_pull, text_pull, image_sums, text_sums = tiles.pull(weigh)
    # c is the sum of the slopes of both directions; the gradients follow as in `contrastive_step`.
    scale, c = 1.0 / (2.0 * batch_size), image_sums[1] + text_sums[1]
    return FeatureGradients(
        loss=xp.sum(scale * (image_sums[0] + text_sums[0])) / left / right / left / right,
        image_gradient=gradient(image_pull, c, text_features, xp, 2.0 * scale, 1.0 / left, 1.0 / right),
        text_gradient=gradient(text_pull, c, image_features, xp, 2.0 * scale, 1.0 / left, 1.0 / right),
    )


def _one_over_negatives(tiles: Tiles, xp: Namespace) -> tuple[Array, Array]:
    """Return 1 / number of negatives for image anchors and for text anchors, (b,) each; 0 without negatives."""
    batch_size, dtype, device = tiles.batch_size, tiles.dtype, tiles.device
    if tiles.pair_mask is None:
        factor = xp.full((batch_size,), 1.0 / (batch_size - 1), dtype=dtype, device=device)
        return factor, factor
    image, text = [], xp.zeros((batch_size,), dtype=dtype, device=device)
    every = xp.arange(batch_size, device=device)
    # Block by block, so that no b x b array of numbers exists.
    for rows in tiles.spans:
        numbers = xp.astype(tiles.pair_mask[rows, :] & (every[rows][:, None] != every[None, :]), dtype)
        image.append(xp.sum(numbers, axis=1))
        text = text + xp.sum(numbers, axis=0)

    def one_over(number: Array) -> Array:
        return xp.where(number > 0, 1.0 / xp.clip(number, min=1.0), xp.zeros_like(number))

    return one_over(xp.concat(image)), one_over(text)
