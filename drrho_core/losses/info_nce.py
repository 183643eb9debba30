"""InfoNCE, CLIP's loss: cross-entropy of the scaled similarities over rows and over columns.

    D_ij = (S_ij - S_ii) / tau,   loss = (1/2b) sum_i log sum_j exp(D_ij) + the same over columns

S_ij is the similarity of image i and text j. The sum over j includes the positive j = i, whose term is 1, and leaves
out the pairs that a mask excludes. The loss is computed by the two passes of `contrastive_step`.
Docs: docs/theory/selection.md, "Losses"; docs/theory/contrastive.md, "The exact relation to InfoNCE".
Source: CLIP (arXiv 2103.00020).
"""

from __future__ import annotations

from typing import Any

from drrho_core import _validate
from drrho_core._array_api import Array, Namespace, Scalar, wide_dtype
from drrho_core._routines import refuse_kernels
from drrho_core._validate import POSITIVE
from drrho_core.contrastive.agreement import agreed
from drrho_core.contrastive.anchors import normalised
from drrho_core.contrastive.blocks import choose_kernels
from drrho_core.contrastive.gradient import gradient
from drrho_core.contrastive.options import (
    SHARED,
    AnchorWeight,
    check_anchor_weight,
    check_features,
    check_how,
    check_pair_mask,
    per_anchor,
)
from drrho_core.contrastive.ranks import FORMS, Ranks, summed_over_ranks
from drrho_core.contrastive.scaling import saturated
from drrho_core.contrastive.sharded_passes import find_sweeps
from drrho_core.extend import Batch, BlockSweeps
from drrho_core.losses.results import LossGradients
from drrho_core.numerics import log_add_constant


def info_nce(
    image_features: Array,
    text_features: Array,
    /,
    *,
    temperature: Scalar,
    pair_mask: Array | None = None,
    anchor_weight: AnchorWeight = None,
    tile_size: int | None = None,
    memory_budget: int | None = None,
    ranks: Ranks | None = None,
    form: str = FORMS[0],
    xp: Namespace | None = None,
) -> LossGradients:
    """Return CLIP's loss: cross-entropy of the scaled similarities over rows and over columns, averaged.

    Parameters
    ----------
    image_features, text_features : array, shape (b, d)
        Features of the batch, unit norm (not enforced), b >= 2. Row i of the images and row i of the texts are a
        positive pair.
    temperature : float or array of shape ()
        Temperature tau > 0.
    pair_mask : array of bool, shape (b, b), optional
        If entry (i, j) is False, the pair is left out of both denominators: text j is no wrong answer for image i, for
        example because it is another caption of the same image, and image i is no wrong answer for text j. The diagonal
        is never left out, whatever the mask holds there.
    anchor_weight : array of shape (b,) or pair of arrays of shape (b,), optional
        Factors >= 0 of the cross-entropy of each row and of each column, as in `contrastive_step`.
    tile_size, memory_budget : int, optional
        As in `contrastive_step`. They change only speed and memory, not the result.
    ranks : Ranks, optional
        The ranks that share the batch, as in `sharded_contrastive_step`. All arrays then belong to the own pairs, and
        loss and temperature gradient are those of the whole batch. The features' gradients are those of the whole
        batch's loss: multiply them by W, the number of ranks, for a wrapper that averages. None: the arguments hold the
        whole batch.
    form : {"reduce", "ring"}
        As in `sharded_contrastive_step`.
    xp : namespace, optional
        The arrays' namespace; pass it under ``torch.compile``.

    Returns
    -------
    LossGradients
        Loss (not multiplied by tau) and gradients.

    Raises
    ------
    TypeError, ValueError
        As `contrastive_step`.

    Notes
    -----
    With S = E1 E2^T and the positives on the diagonal, anchor i contributes ``log sum_j exp((S_ij - S_ii) / tau)``. The
    term j = i of the sum is 1. This is InfoNCE as in CLIP (arXiv 2103.00020). A pair that `pair_mask` excludes has no
    term in these sums. An anchor without negatives contributes 0 to loss and gradients, and the mean still divides by
    2 b. The loss of ``contrastive_step`` with
    ``gamma=1``, ``eps=1/(b-1)`` and no reference model is exactly ``tau * (info_nce - log(b - 1))``.

    Examples
    --------
    >>> import numpy as np
    >>> result = info_nce(np.eye(3), np.eye(3), temperature=0.5)
    >>> round(float(result.loss), 6), round(float(np.log(1 + 2 * np.exp(-2))), 6)
    (0.239545, 0.239545)
    >>> same_image = np.asarray([[True, True, False], [True, True, False], [False, False, True]])
    >>> result = info_nce(np.eye(3), np.eye(3), temperature=0.5, pair_mask=~same_image)
    >>> round(float(result.loss), 6)                                 # 1, 1 and 2 wrong answers
    0.164467
    """
    required = {"image_features": image_features, "text_features": text_features}
    if pair_mask is not None:
        required["pair_mask"] = pair_mask
    options = {"temperature": temperature, "anchor_weight": anchor_weight}

    def check() -> tuple[Namespace, int, Any, Scalar, tuple[Scalar, Scalar], Batch, BlockSweeps | None]:
        num_ranks = check_how(ranks, form, tile_size, memory_budget)
        call = _validate.arrays(required, xp, options=options)
        if ranks is not None:
            refuse_kernels(SHARED, call.xp)
        num_local, work = check_features(call, num_ranks=num_ranks), wide_dtype(image_features.dtype, call.xp)
        check_pair_mask(call, num_local, num_ranks)
        tau = call.option("temperature", temperature, POSITIVE, work)
        factors = check_anchor_weight(call, anchor_weight, num_local, work)
        temperatures = per_anchor(tau, image_features, work, call.xp)
        batch = Batch(image_features, text_features, None, 1.0, temperatures[0], temperatures[1], pair_mask)
        kernels = choose_kernels(batch, ranks, call.xp)
        return call.xp, num_ranks * num_local, work, tau, factors, batch, kernels

    xp, batch_size, work, temperature, factors, batch, kernels = agreed(
        check, required | options | {"form": form}, ranks, kernels=lambda result: result[-1]
    )
    # Pass 1: log sum_{j != i} exp(D_ij) and the weighted mean of D_ij, for all anchors of both directions. An anchor
    # that the mask leaves without negatives has -inf and 0, so its loss and its weights below are 0.
    sweeps = find_sweeps(batch, temperature, tile_size, memory_budget, xp, ranks, form, kernels)
    first = sweeps.sum_negatives(batch)
    # For each direction, compute the loss log(1 + sum exp(D_ij)), the sum of the probabilities of the negatives
    # (`weight`), and the slope: `weight` times the mean of D_ij, divided by tau. The slope is the derivative with
    # respect to the temperature times -1.
    losses, weights, slopes = [], [], []
    scale = 1.0 / (2.0 * batch_size)
    for factor, log_sum, mean in (
        (factors[0], first.log_sum_image, first.mean_image),
        (factors[1], first.log_sum_text, first.mean_text),
    ):
        log_denominator = log_add_constant(log_sum, 1.0, xp=xp)  # the positive adds exp(0) = 1
        weight = xp.exp(-log_add_constant(-log_sum, 1.0, xp=xp))
        losses.append(xp.sum(factor * (scale * log_denominator)))
        slopes.append(xp.sum(factor * (scale * (weight * saturated(mean, 1.0 / temperature, xp=xp)))))
        weights.append(xp.clip(factor * weight, max=float(xp.finfo(work).max)))
    # Pass 2: V E2 and V^T E1 with V = w + w'. The matrix w holds the probabilities of the negatives of image anchors,
    # and w' those of text anchors. c_i is the sum of these probabilities for image anchor i and text anchor i. The
    # gradients are (V E2 - c * E2) / (2 b tau) for images, and (V^T E1 - c * E1) / (2 b tau) for texts.
    weight_sums, unit = normalised(weights, batch_size, work, xp, ranks)
    sums, c = sweeps.pull_back(batch, first, *weight_sums), weight_sums[0] + weight_sums[1]
    loss, slope = losses[0] + losses[1], slopes[0] + slopes[1]
    if ranks is not None:
        loss, slope = summed_over_ranks(ranks, (loss, slope), xp)
    return LossGradients(
        loss=loss,
        image_gradient=gradient(sums.image_pull, c, text_features, xp, unit, 1.0 / temperature),
        text_gradient=gradient(sums.text_pull, c, image_features, xp, unit, 1.0 / temperature),
        temperature_gradient=-slope,
    )
