"""Distillation, MobileCLIP's loss: the learner's softmax imitates the softmax of the reference model.

    p_i = softmax_j(S_ij / tau),   q_i = softmax_j(R_ij / tau_R),   R = R1 R2^T
    loss = 1/2 [mean_i CE(q_i, p_i) + the same over columns],   CE(q, p) = -sum_j q_j log p_j

S (b, b) holds the similarities of the learner and R those of the reference model, whose image and text features are R1
and R2. The temperatures are tau for the learner and tau_R for the reference model. CE is the cross-entropy.
Docs: docs/theory/selection.md, "Losses". Source: MobileCLIP (arXiv 2311.17049).
"""

from __future__ import annotations

from typing import Any, NamedTuple

from drrho_core import _validate
from drrho_core._array_api import Array, Namespace, Scalar, wide_dtype
from drrho_core._validate import FINITE, POSITIVE
from drrho_core.contrastive.gradient import gradient
from drrho_core.contrastive.options import check_features
from drrho_core.contrastive.passes import log_sum_and_mean, peak_above_positive, sum_negatives
from drrho_core.contrastive.tiles import Tiles, Values, along, split
from drrho_core.losses.results import LossGradients
from drrho_core.numerics import log_add_constant


def distillation_loss(
    image_features: Array,
    text_features: Array,
    reference_image: Array,
    reference_text: Array,
    /,
    *,
    temperature: Scalar,
    reference_temperature: Scalar,
    tile_size: int | None = None,
    memory_budget: int | None = None,
    xp: Namespace | None = None,
) -> LossGradients:
    """Return MobileCLIP's distillation loss: the learner's softmax imitates the softmax of the reference model.

    Parameters
    ----------
    image_features, text_features : array, shape (b, d)
        As in `info_nce`.
    reference_image, reference_text : array, shape (b, r)
        Features of the same pairs by the frozen reference model, in the same dtype; r may differ from d.
    temperature : float or array of shape ()
        The learner's temperature tau > 0.
    reference_temperature : float or array of shape ()
        The temperature tau_R > 0 of the reference model. This temperature is frozen and gets no gradient.
    tile_size, memory_budget : int, optional
        As in `contrastive_step`. The budget covers the logits of both models.
    xp : namespace, optional
        The arrays' namespace; pass it under ``torch.compile``.

    Returns
    -------
    LossGradients
        Loss and gradients. If learner and reference model agree, the gradients are 0, and the loss is the entropy of
        the reference model's softmax, which is not 0.

    Raises
    ------
    TypeError, ValueError
        As `contrastive_step`.

    Notes
    -----
    The loss is ``1/2 [mean_i CE(softmax_j(R_ij / tau_R), softmax_j(S_ij / tau)) + the same over columns]`` with
    R = R1 R2^T. The diagonal is included. CE is the cross-entropy and not the KL divergence, as in MobileCLIP
    (arXiv 2311.17049).

    Examples
    --------
    >>> import numpy as np
    >>> learner, reference = np.eye(2), 2 * np.eye(2, 3)                        # another width, the same matches
    >>> result = distillation_loss(learner, learner, reference, reference, temperature=0.5, reference_temperature=2.0)
    >>> p = 1 / (1 + np.exp(-2))
    >>> round(float(result.loss), 6), round(float(-p * np.log(p) - (1 - p) * np.log(1 - p)), 6)
    (0.365334, 0.365334)
    >>> bool(np.max(np.abs(result.image_gradient)) < 1e-15)
    True
    """
    call = _validate.arrays(
        {
            "image_features": image_features,
            "text_features": text_features,
            "reference_image": reference_image,
            "reference_text": reference_text,
        },
        xp,
        options={"temperature": temperature, "reference_temperature": reference_temperature},
    )
    xp, batch_size, work = call.xp, check_features(call), wide_dtype(image_features.dtype, call.xp)
    for name in ("reference_image", "reference_text"):
        call.array(name, axes=2, meaning="(batch_size, reference_dim)")
    call.same_dtype("image_features", "reference_image", "reference_text")
    for name in ("reference_image", "reference_text"):
        width = int(reference_image.shape[1])
        call.array(name, shape=(batch_size, width), meaning="(batch_size, reference_dim)", rule=FINITE)
    temperature = call.option("temperature", temperature, POSITIVE, work)
    reference_temperature = call.option("reference_temperature", reference_temperature, POSITIVE, work)
    options: dict[str, Any] = {"tile_size": tile_size, "memory_budget": memory_budget, "matrices": 2, "share": False}
    learner = split(image_features, text_features, temperature=temperature, **options, xp=xp)
    reference = split(reference_image, reference_text, temperature=reference_temperature, **options, xp=xp)
    # Pass 1: the softmax p of the learner and q of the reference model, over rows and over columns.
    p, q = _softmax(learner, xp), _softmax(reference, xp)

    # Pass 2: the slopes p - q of both directions, and the sums of q x and (p - q) x with x = (S_ij - peak_i) / tau. The
    # peak of an anchor is a similarity near the largest of its negatives.
    def weigh(i: Any, j: Any, diagonal: bool) -> tuple[Array, Values, Values]:
        tile = learner.tile(i, j, diagonal)
        reference_tile = tile._replace(z=reference.z(i, j))
        slopes, moments = [], []
        for side, block in enumerate((i, j)):
            axis = 1 - side
            x = learner.only_negatives(learner.exponent(side, tile, p[side].peaks[block]), tile)
            y = learner.only_negatives(reference.exponent(side, reference_tile, q[side].peaks[block]), tile)
            # exp(x) times the anchor's factor in p, and exp(y) times the anchor's factor in q, are probabilities.
            target = reference.exp(y, True)
            target *= along(axis, q[side].factors[block])
            slope = learner.exp(x, False)
            slope *= along(axis, p[side].factors[block])
            slope -= target
            if tile.counts is not None:
                x = xp.where(tile.counts, x, xp.zeros_like(x))
            slopes.append(slope)
            moments.append((xp.sum(target * x, axis=axis), xp.sum(slope * x, axis=axis)))
        return slopes[0] + slopes[1], moments[0], moments[1]

    image_pull, text_pull, image_moments, text_moments = learner.pull(weigh)
    scale, loss, slope = 1.0 / (2.0 * batch_size), [], []
    for own, target, (moment, tilt) in zip(p, q, (image_moments, text_moments), strict=True):
        # CE = -sum q log p. A negative has log p = x + log_factor. The positive has log p = -log_denominator.
        loss.append(xp.exp(-target.log_denominator) * own.log_denominator - moment - target.weight * own.log_factor)
        slope.append(tilt + (own.weight - target.weight) * own.above)
    # c_i is the sum of the slopes over the negatives of image anchor i and of text anchor i. The gradients follow from
    # c as in `contrastive_step`.
    c = (p[0].weight - q[0].weight) + (p[1].weight - q[1].weight)
    return LossGradients(
        loss=xp.sum(scale * loss[0]) + xp.sum(scale * loss[1]),
        image_gradient=gradient(image_pull, c, text_features, xp, scale, 1.0 / temperature),
        text_gradient=gradient(text_pull, c, image_features, xp, scale, 1.0 / temperature),
        temperature_gradient=-(xp.sum(scale * slope[0]) + xp.sum(scale * slope[1])) / temperature,
    )


class _Softmax(NamedTuple):
    """Softmax of one direction over the negatives and the positive of each anchor.

    Z holds the similarities of one model, t is the temperature of this model, and D_ij = (Z_ij - Z_ii) / t. The arrays
    have shape (b,), but `peaks` and `factors` are cut into blocks, one block per tile (a block of the b x b matrix).
    """

    log_denominator: Array  # log(1 + sum_j exp(D_ij)), where the 1 is the term of the positive
    weight: Array  # sum of the probabilities of the negatives
    log_factor: Array  # log of the factor that turns exp((Z_ij - peak_i) / t) into a probability
    above: Array  # D of the peak
    peaks: Any  # for each anchor a value near the largest Z of its negatives
    factors: Any  # exp(log_factor)


def _softmax(tiles: Tiles, xp: Namespace) -> tuple[_Softmax, _Softmax]:
    """Return the softmax over rows and the softmax over columns."""
    sides = sum_negatives(tiles)
    softmaxes = []
    for negatives, rate in zip(sides, tiles.scaling.rates, strict=True):
        log_sum, _ = log_sum_and_mean(negatives, rate, xp=xp)
        log_weight = -log_add_constant(-log_sum, 1.0, xp=xp)
        log_factor = log_weight - xp.log(negatives.total)
        peaks, factors = tiles.cut(negatives.peak, xp.exp(log_factor))
        softmaxes.append(
            _Softmax(
                log_denominator=log_add_constant(log_sum, 1.0, xp=xp),
                weight=xp.exp(log_weight),
                log_factor=log_factor,
                above=peak_above_positive(negatives, rate, xp=xp),
                peaks=peaks,
                factors=factors,
            )
        )
    return softmaxes[0], softmaxes[1]
