"""The squared hinge with a margin, TuneCLIP's loss: negatives that come too close to the positive contribute.

    loss = (1/2b) sum_i (1/N_i) sum_{j != i} relu(S_ij - S_ii + margin)^2 + the same over columns

S_ij is the similarity of image i and text j. The positives are the pairs i = j, and all other pairs are negatives. N_i
is the number of negatives of anchor i. An anchor is an image in the first sum, and a text in the sum over columns.
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
    """Return TuneCLIP's squared hinge: a negative contributes if its similarity is above the positive's minus a margin.

    Parameters
    ----------
    image_features, text_features : array, shape (b, d)
        As in `info_nce`.
    margin : float or array of shape ()
        A negative contributes nothing if its similarity is at least this much below the positive's similarity; >= 0.
    pair_mask : array of bool, shape (b, b), optional
        If entry (i, j) is False, the pair is not a negative, for example because image i and text j may belong
        together. The diagonal never is a negative, whatever the mask holds there.
    tile_size, memory_budget : int, optional
        As in `contrastive_step`, but a single pass over the tiles is enough for this loss.
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
    The terms are ``relu(S_ij - S_ii + margin)^2`` for image anchor i, ``relu(S_ij - S_jj + margin)^2`` for text anchor
    j. They are averaged over the negatives, then over the anchors, then over the two directions, as in TuneCLIP
    (arXiv 2601.09859). An anchor has b - 1 negatives, or as many as `pair_mask` leaves. An anchor without negatives
    contributes 0, and the mean over anchors still divides by b.

    Examples
    --------
    >>> import numpy as np
    >>> images, texts = np.eye(2), np.asarray([[1.0, 0.0], [0.8, 0.6]])         # S_11 = 1, S_12 = 0.8, S_22 = 0.6
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
    # If features or margin are so large that sums would overflow, `split` scales the features, and the margin is scaled
    # by the same factors here.
    left, right = tiles.scaling.left, tiles.scaling.right
    margin = margin * left * right
    # The similarity S_ii of each anchor's positive, and 1 over the anchor's number of negatives.
    own, *factors = tiles.cut(tiles.positives(), *_one_over_negatives(tiles, xp))

    def weigh(i: Any, j: Any, diagonal: bool) -> tuple[Array, Values, Values]:
        tile = tiles.tile(i, j, diagonal)
        slopes, values = [], []
        for side, block in enumerate((i, j)):
            axis = 1 - side
            # With h = relu(S_ij - S_ii + margin), the slope is h / N and the value h^2 / N. The factor 2 in the
            # derivative of h^2 is applied at the end.
            within = tile.z - along(axis, own[block]) + margin
            counted = within > 0 if tile.counts is None else tile.counts & (within > 0)
            within = xp.where(counted, within, xp.zeros_like(within))
            slope = within * along(axis, factors[side][block])
            slopes.append(slope)
            values.append((xp.sum(slope * within, axis=axis), xp.sum(slope, axis=axis)))
        return slopes[0] + slopes[1], values[0], values[1]

    image_pull, text_pull, image_sums, text_sums = tiles.pull(weigh)
    # c_i is the sum of the slopes of image anchor i and of text anchor i. The gradients follow from c as in
    # `contrastive_step`.
    scale, c = 1.0 / (2.0 * batch_size), image_sums[1] + text_sums[1]
    return FeatureGradients(
        loss=xp.sum(scale * (image_sums[0] + text_sums[0])) / left / right / left / right,
        image_gradient=gradient(image_pull, c, text_features, xp, 2.0 * scale, 1.0 / left, 1.0 / right),
        text_gradient=gradient(text_pull, c, image_features, xp, 2.0 * scale, 1.0 / left, 1.0 / right),
    )


def _one_over_negatives(tiles: Tiles, xp: Namespace) -> tuple[Array, Array]:
    """Return 1 / number of negatives for image anchors and for text anchors, (b,) each; 0 if there are no negatives."""
    batch_size, dtype, device = tiles.batch_size, tiles.dtype, tiles.device
    if tiles.pair_mask is None:
        factor = xp.full((batch_size,), 1.0 / (batch_size - 1), dtype=dtype, device=device)
        return factor, factor
    image, text = [], xp.zeros((batch_size,), dtype=dtype, device=device)
    every = xp.arange(batch_size, device=device)
    # The mask is summed block by block, so that no b x b array of numbers exists.
    for rows in tiles.spans:
        numbers = xp.astype(tiles.pair_mask[rows, :] & (every[rows][:, None] != every[None, :]), dtype)
        image.append(xp.sum(numbers, axis=1))
        text = text + xp.sum(numbers, axis=0)

    def one_over(number: Array) -> Array:
        return xp.where(number > 0, 1.0 / xp.clip(number, min=1.0), xp.zeros_like(number))

    return one_over(xp.concat(image)), one_over(text)
