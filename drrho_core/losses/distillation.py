"""Distillation, MobileCLIP's loss: the learner's softmax imitates the softmax of the reference model.

    p_i = softmax_j(S_ij / tau),   q_i = softmax_j(R_ij / tau_R),   R = R1 R2^T
    loss = 1/2 [mean_i CE(q_i, p_i) + the same over columns],   CE(q, p) = -sum_j q_j log p_j

S (b, b) holds the similarities of the learner and R those of the reference model, whose image and text features are R1
and R2. The temperatures are tau for the learner and tau_R for the reference model. CE is the cross-entropy.
Docs: docs/theory/selection.md, "Losses". Source: MobileCLIP (arXiv 2311.17049).
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias

from drrho_core import _validate
from drrho_core._array_api import Array, Namespace, Scalar, wide_dtype
from drrho_core._validate import FINITE, POSITIVE
from drrho_core.contrastive.agreement import agreed
from drrho_core.contrastive.gradient import gradient
from drrho_core.contrastive.options import check_features, check_how
from drrho_core.contrastive.passes import AnchorSums, log_sum_and_mean, peak_above_positive, sum_negatives
from drrho_core.contrastive.ranks import FORMS, Arrays, Ranks, summed_over_ranks
from drrho_core.contrastive.sharded_passes import Blocks, over_ranks, pull_over_ranks
from drrho_core.contrastive.tiles import Tiles, Values, Weigh, along, split
from drrho_core.extend import Batch
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
    ranks: Ranks | None = None,
    form: str = FORMS[0],
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
    ranks, form
        As in `info_nce`. With ``"ring"`` the texts and their reference features travel.
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
    required = {
        "image_features": image_features,
        "text_features": text_features,
        "reference_image": reference_image,
        "reference_text": reference_text,
    }
    options = {"temperature": temperature, "reference_temperature": reference_temperature}

    def check() -> tuple[Namespace, int, Scalar, Scalar]:
        num_ranks = check_how(ranks, form, tile_size, memory_budget)
        call = _validate.arrays(required, xp, options=options)
        num_local, work = check_features(call, num_ranks=num_ranks), wide_dtype(image_features.dtype, call.xp)
        for name in ("reference_image", "reference_text"):
            call.array(name, axes=2, meaning="(batch_size, reference_dim)")
        call.same_dtype("image_features", "reference_image", "reference_text")
        for name in ("reference_image", "reference_text"):
            width = int(reference_image.shape[1])
            call.array(name, shape=(num_local, width), meaning="(batch_size, reference_dim)", rule=FINITE)
        tau = call.option("temperature", temperature, POSITIVE, work)
        tau_reference = call.option("reference_temperature", reference_temperature, POSITIVE, work)
        return call.xp, num_ranks * num_local, tau, tau_reference

    xp, batch_size, temperature, reference_temperature = agreed(check, required | options | {"form": form}, ranks)
    models = (
        Batch(image_features, text_features, None, 1.0, temperature, temperature, None),
        Batch(reference_image, reference_text, None, 1.0, reference_temperature, reference_temperature, None),
    )
    if ranks is None:
        p, q, pulls = _passes(models, tile_size, memory_budget, xp)
    else:
        p, q, pulls = _passes_over_ranks(models, tile_size, memory_budget, ranks, form, xp)
    scale, loss, slope = 1.0 / (2.0 * batch_size), [], []
    for own, target, (moment, tilt) in zip(p, q, (pulls.of_images, pulls.of_texts), strict=True):
        # CE = -sum q log p. A negative has log p = x + log_factor. The positive has log p = -log_denominator.
        loss.append(xp.exp(-target.log_denominator) * own.log_denominator - moment - target.weight * own.log_factor)
        slope.append(tilt + (own.weight - target.weight) * own.above)
    # c_i is the sum of the slopes over the negatives of image anchor i and of text anchor i. The gradients follow from
    # c as in `contrastive_step`.
    c = (p[0].weight - q[0].weight) + (p[1].weight - q[1].weight)
    total, total_slope = (xp.sum(scale * each[0]) + xp.sum(scale * each[1]) for each in (loss, slope))
    if ranks is not None:
        total, total_slope = summed_over_ranks(ranks, (total, total_slope), xp)
    return LossGradients(
        loss=total,
        image_gradient=gradient(pulls.image, c, text_features, xp, scale, 1.0 / temperature),
        text_gradient=gradient(pulls.text, c, image_features, xp, scale, 1.0 / temperature),
        temperature_gradient=-total_slope / temperature,
    )


class _Softmax(NamedTuple):
    """Softmax of one direction over the negatives and the positive of each anchor; all arrays are (b,).

    Z holds the similarities of one model, t is the temperature of this model, and D_ij = (Z_ij - Z_ii) / t.
    """

    log_denominator: Array  # log(1 + sum_j exp(D_ij)), where the 1 is the term of the positive
    weight: Array  # sum of the probabilities of the negatives
    log_factor: Array  # log of the factor that turns exp((Z_ij - peak_i) / t) into a probability
    above: Array  # D of the peak
    peak: Array  # a value near the largest Z of the anchor's negatives
    factor: Array  # exp(log_factor)


class _Pulls(NamedTuple):
    """The results of pass 2 for the own images and texts."""

    image: Array  # V E2, V: slopes of both directions
    text: Array  # V^T E1
    of_images: tuple[Array, Array]  # for each image anchor the sums of q x and of (p - q) x; x: see `_slopes`
    of_texts: tuple[Array, Array]


_Softmaxes: TypeAlias = tuple[_Softmax, _Softmax]
"""The softmax over rows and the softmax over columns."""


def _passes(
    models: tuple[Batch, Batch], tile_size: int | None, memory_budget: int | None, xp: Namespace
) -> tuple[_Softmaxes, _Softmaxes, _Pulls]:
    """Return the softmaxes of the learner and of the reference model, and the results of pass 2."""
    learner, reference = (
        split(
            model.image_features,
            model.text_features,
            temperature=model.temperature_image,
            tile_size=tile_size,
            memory_budget=memory_budget,
            matrices=2,
            share=False,
            xp=xp,
        )
        for model in models
    )
    p, q = (_softmaxes(sum_negatives(tiles), tiles.scaling.rates, xp) for tiles in (learner, reference))
    sides = tuple((*_needed(p[side]), *_needed(q[side])) for side in (0, 1))
    image, text, of_images, of_texts = learner.pull(_slopes(learner, reference, sides, xp))
    return p, q, _Pulls(image, text, (of_images[0], of_images[1]), (of_texts[0], of_texts[1]))


def _passes_over_ranks(
    models: tuple[Batch, Batch],
    tile_size: int | None,
    memory_budget: int | None,
    ranks: Ranks,
    form: str,
    xp: Namespace,
) -> tuple[_Softmaxes, _Softmaxes, _Pulls]:
    """Return the results of `_passes` for the own pairs; negatives are those of all ranks."""
    keep = form == "reduce"
    blocks = [
        Blocks(model, model.temperature_image, tile_size, memory_budget, ranks, keep, xp, models=2, share=False)
        for model in models
    ]
    sweeps = [over_ranks(each, form) for each in blocks]
    firsts = [each.sum_negatives(model) for each, model in zip(sweeps, models, strict=True)]
    softmaxes = []
    for model, sweep, first in zip(blocks, sweeps, firsts, strict=True):
        rates = model.tiles(0, model.texts, True).scaling.rates
        softmaxes.append(_softmaxes(sweep.anchor_sums(first), rates, xp))
    p, q = softmaxes
    of_images = (*_needed(p[0]), *_needed(q[0]))
    # In the form ring the texts travel again; in the form reduce the tiles of pass 1 hold them.
    features = () if keep else (*blocks[0].texts, *blocks[1].texts)

    def pull(k: Any, texts: Arrays, paired: bool) -> tuple[Arrays, Arrays]:
        # The last four arrays are the peaks and the factors of both models.
        arrived, of_texts = texts[:-4], texts[-4:]
        learner = sweeps[0].table(firsts[0], k, arrived[:1], paired)
        reference = sweeps[1].table(firsts[1], k, arrived[1:], paired)
        weigh = _slopes(learner, reference, (of_images, of_texts), xp)
        image, text, to_images, to_texts = learner.pull(weigh)
        return (image, *to_images), (text, *to_texts)

    texts = (*features, *_needed(p[1]), *_needed(q[1]))
    own, theirs = pull_over_ranks(ranks, texts, form, pull, xp)
    return p, q, _Pulls(own[0], theirs[0], (own[1], own[2]), (theirs[1], theirs[2]))


def _softmaxes(sums: tuple[AnchorSums, AnchorSums], rates: tuple[Scalar, Scalar], xp: Namespace) -> _Softmaxes:
    """Return the softmax over rows and the softmax over columns."""
    softmaxes = []
    for negatives, rate in zip(sums, rates, strict=True):
        log_sum, _ = log_sum_and_mean(negatives, rate, xp=xp)
        log_weight = -log_add_constant(-log_sum, 1.0, xp=xp)
        log_factor = log_weight - xp.log(negatives.total)
        softmaxes.append(
            _Softmax(
                log_denominator=log_add_constant(log_sum, 1.0, xp=xp),
                weight=xp.exp(log_weight),
                log_factor=log_factor,
                above=peak_above_positive(negatives, rate, xp=xp),
                peak=negatives.peak,
                factor=xp.exp(log_factor),
            )
        )
    return softmaxes[0], softmaxes[1]


def _needed(softmax: _Softmax) -> tuple[Array, Array]:
    """Return the two numbers per anchor that pass 2 needs."""
    return softmax.peak, softmax.factor


def _slopes(learner: Tiles, reference: Tiles, sides: Any, xp: Namespace) -> Weigh:
    """Return the function that computes the slopes p - q of a tile, and sums of q x and (p - q) x.

    x is (S_ij - peak_i) / tau. `sides` holds four arrays for the anchors of the rows, and four for those of the
    columns: peak and factor of the learner, then peak and factor of the reference model.
    """
    cut = [learner.cut(*arrays) for arrays in sides]

    def weigh(i: Any, j: Any, diagonal: bool) -> tuple[Array, Values, Values]:
        tile = learner.tile(i, j, diagonal)
        reference_tile = tile._replace(z=reference.z(i, j))
        slopes, moments = [], []
        for side, block in enumerate((i, j)):
            axis = 1 - side
            peak, factor, reference_peak, reference_factor = (array[block] for array in cut[side])
            x = learner.only_negatives(learner.exponent(side, tile, peak), tile)
            y = learner.only_negatives(reference.exponent(side, reference_tile, reference_peak), tile)
            # exp(x) times the anchor's factor in p, and exp(y) times the anchor's factor in q, are probabilities.
            target = reference.exp(y, True)
            target *= along(axis, reference_factor)
            slope = learner.exp(x, False)
            slope *= along(axis, factor)
            slope -= target
            if tile.counts is not None:
                x = xp.where(tile.counts, x, xp.zeros_like(x))
            slopes.append(slope)
            moments.append((xp.sum(target * x, axis=axis), xp.sum(slope * x, axis=axis)))
        return slopes[0] + slopes[1], moments[0], moments[1]

    return weigh
