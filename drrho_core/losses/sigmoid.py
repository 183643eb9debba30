"""The sigmoid loss of SigLIP: each pair is classified as positive or negative on its own.

    loss = (1/b) sum_ij -log sigmoid(y_ij (scale S_ij + bias)),   y_ij = 1 on the diagonal and -1 off it

S_ij is the similarity of image i and text j.
Docs: docs/theory/selection.md, "Losses". Source: SigLIP (arXiv 2303.15343).
"""

from __future__ import annotations

from typing import Any

from drrho_core import _validate
from drrho_core._array_api import Array, Namespace, Scalar, device_of, wide_dtype
from drrho_core._validate import FINITE, POSITIVE
from drrho_core.contrastive.agreement import agreed
from drrho_core.contrastive.options import check_features, check_how, check_pair_mask
from drrho_core.contrastive.ranks import FORMS, Arrays, Ranks, summed_over_ranks
from drrho_core.contrastive.scaling import saturated
from drrho_core.contrastive.sharded_passes import Blocks, pull_over_ranks
from drrho_core.contrastive.tiles import Tiles, Values, Weigh, split
from drrho_core.extend import Batch
from drrho_core.losses.results import SigmoidLossGradients


def sigmoid_loss(
    image_features: Array,
    text_features: Array,
    /,
    *,
    scale: Scalar,
    bias: Scalar,
    pair_mask: Array | None = None,
    tile_size: int | None = None,
    memory_budget: int | None = None,
    ranks: Ranks | None = None,
    form: str = FORMS[0],
    xp: Namespace | None = None,
) -> SigmoidLossGradients:
    """Return SigLIP's loss: each pair of the batch is classified as positive or negative on its own.

    Parameters
    ----------
    image_features, text_features : array, shape (b, d)
        As in `info_nce`.
    scale : float or array of shape ()
        Factor of the similarities, > 0: the inverse of a temperature. If a model learns the logarithm of the scale,
        multiply `scale_gradient` by the scale.
    bias : float or array of shape ()
        A number that is added to all logits. SigLIP starts with -10.
    pair_mask : array of bool, shape (b, b), optional
        If entry (i, j) is False, the pair is left out, for example because image i and text j may belong together. The
        diagonal is never left out, whatever the mask holds there.
    tile_size, memory_budget : int, optional
        As in `contrastive_step`, but a single pass over the tiles is enough for this loss.
    ranks, form
        As in `info_nce`.
    xp : namespace, optional
        The arrays' namespace; pass it under ``torch.compile``.

    Returns
    -------
    SigmoidLossGradients
        Loss, and gradients with respect to features, scale and bias.

    Raises
    ------
    TypeError, ValueError
        As `contrastive_step`.

    Notes
    -----
    The loss is ``(1/b) sum_ij -log sigmoid(y_ij (scale S_ij + bias))`` with y = 1 on the diagonal and -1 off it, as in
    SigLIP (arXiv 2303.15343). With ``a_ij = -y_ij sigmoid(-y_ij (scale S_ij + bias)) / b`` the gradients are
    ``scale a E2`` for the image features E1, ``scale a^T E1`` for the text features E2, ``sum a_ij S_ij`` for the scale
    and ``sum a_ij`` for the bias. Pairs that `pair_mask` excludes are not summed, but the sum is still divided by b.

    Examples
    --------
    >>> import numpy as np
    >>> result = sigmoid_loss(np.eye(2), np.eye(2), scale=2.0, bias=-1.0)       # logits: 1 on the diagonal, -1 off it
    >>> round(float(result.loss), 6), round(float(2 * np.log(1 + np.exp(-1))), 6)
    (0.626523, 0.626523)
    """
    required = {"image_features": image_features, "text_features": text_features}
    if pair_mask is not None:
        required["pair_mask"] = pair_mask
    options = {"scale": scale, "bias": bias}

    def check() -> tuple[Namespace, int, Scalar, Scalar]:
        num_ranks = check_how(ranks, form, tile_size, memory_budget)
        call = _validate.arrays(required, xp, options=options)
        num_local, work = check_features(call, num_ranks=num_ranks), wide_dtype(image_features.dtype, call.xp)
        check_pair_mask(call, num_local, num_ranks)
        checked_scale = call.option("scale", scale, POSITIVE, work)
        return call.xp, num_ranks * num_local, checked_scale, call.option("bias", bias, FINITE, work)

    xp, batch_size, scale, bias = agreed(check, required | options | {"form": form}, ranks)
    # With a = slope / b the gradients are scale a E2 for images, scale a^T E1 for texts, sum a_ij S_ij for the scale
    # and sum a_ij for the bias.
    share = 1.0 / batch_size
    if ranks is None:
        tiles = split(
            image_features,
            text_features,
            pair_mask=pair_mask,
            tile_size=tile_size,
            memory_budget=memory_budget,
            passes=1,
            xp=xp,
        )
        image_pull, text_pull, of_images, _ = tiles.pull(_weigh(tiles, scale, bias, xp))
        sums = list(of_images)
        scaling = tiles.scaling
    else:
        batch = Batch(image_features, text_features, None, 1.0, scale, scale, pair_mask)
        blocks = Blocks(batch, 1.0, tile_size, memory_budget, ranks, False, xp)

        def pull(k: Any, texts: Arrays, paired: bool) -> tuple[Arrays, Arrays]:
            tiles = blocks.tiles(k, texts, paired)
            image, text, of_images, _ = tiles.pull(_weigh(tiles, scale, bias, xp))
            return (image, *of_images), (text,)

        (image_pull, *sums), (text_pull,) = pull_over_ranks(ranks, blocks.texts, form, pull, xp)
        scaling = blocks.tiles(0, blocks.texts, True).scaling  # all blocks of all ranks are scaled alike
    loss, scale_gradient, bias_gradient = (xp.sum(each) for each in sums)
    if ranks is not None:
        loss, scale_gradient, bias_gradient = summed_over_ranks(ranks, (loss, scale_gradient, bias_gradient), xp)
    return SigmoidLossGradients(
        loss=share * loss,
        image_gradient=xp.astype(share * scale * image_pull, image_features.dtype),
        text_gradient=xp.astype(share * scale * text_pull, text_features.dtype),
        scale_gradient=share * scale_gradient / scaling.left / scaling.right,
        bias_gradient=share * bias_gradient,
    )


def _weigh(tiles: Tiles, scale: Scalar, bias: Scalar, xp: Namespace) -> Weigh:
    """Return the function that computes the slopes of a tile's pairs, and three sums per row of the tile."""
    # If features are so large that S would overflow, `split` scales them. The tiles then hold z = left right S, and the
    # logits are rate z + bias with rate = scale / (left right).
    left, right = tiles.scaling.left, tiles.scaling.right
    scaled = not (isinstance(left, float) and left == right == 1.0)
    rate = _bounded(scale / left / right, xp.finfo(tiles.dtype), xp) if scaled else scale

    def weigh(i: Any, j: Any, diagonal: bool) -> tuple[Array, Values, Values]:
        z = tiles.z(i, j)
        logits = (saturated(z, rate, xp=xp) if scaled else scale * z) + bias
        positives = _on_diagonal(z, xp) if diagonal else None
        # `wrong` is the logit of the wrong class, -y (scale S + bias). The loss is the softplus of `wrong`, and the
        # slope is the sigmoid of `wrong`.
        wrong = logits if positives is None else xp.where(positives, -logits, logits)
        # softplus(x) = max(x, 0) + log1p(exp(-|x|)): the exponential never overflows.
        small = xp.exp(-xp.abs(wrong))
        terms = xp.where(wrong > 0, wrong, xp.zeros_like(wrong)) + xp.log1p(small)
        slope = xp.where(wrong >= 0, xp.ones_like(small), small) / (1.0 + small)
        if positives is not None:
            slope = xp.where(positives, -slope, slope)
        # Pairs that the mask excludes contribute nothing; the diagonal always counts.
        counted = tiles.counts(i, j, False)
        if counted is not None:
            counted = counted if positives is None else counted | positives
            terms, slope = (xp.where(counted, x, xp.zeros_like(x)) for x in (terms, slope))
        sums = (xp.sum(terms, axis=1), xp.sum(slope * z, axis=1), xp.sum(slope, axis=1))
        return slope, sums, ()

    return weigh


def _bounded(rate: Scalar, finfo: Any, xp: Namespace) -> Scalar:
    """Return the rate, or the largest number of the dtype if the rate is larger."""
    largest = float(finfo.max)
    return min(rate, largest) if isinstance(rate, float) else xp.clip(rate, max=largest)


def _on_diagonal(tile: Array, xp: Namespace) -> Array:
    """Return the mask of the diagonal of a square tile."""
    index = xp.arange(tile.shape[0], device=device_of(tile))
    return index[:, None] == index[None, :]
