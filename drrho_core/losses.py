"""Contrastive losses to compare with, each with its value and closed-form gradients, and weighted sums of them.

Shapes, stated once: b pairs in the batch, features (b, d), reference features (b, r), S = E1 E2^T (b, b), row = image,
column = text, positives on the diagonal. Every loss averages its two directions (1/2) and the batch (1/b).

Which options they take. `pair_mask` drops pairs from a sum over negatives: SigLIP's and the hinge's. Under a softmax
(InfoNCE, distillation) a pair is a class and not a term, and both models' classes have to be the same ones; the masked
softmax over negatives is `contrastive_step`. Reference features are subtracted in `contrastive_step` alone: there only
differences of similarities count. SigLIP's bias and the hinge's margin are absolute amounts of similarity, which would
mean something else for an excess similarity, and distillation imitates the reference model, so it has no
`reference_weight` but its weight in a `weighted_sum`. These losses are here to compare with, and are as published.

Sources: CLIP (arXiv 2103.00020), SigLIP (arXiv 2303.15343), MobileCLIP (arXiv 2311.17049), TuneCLIP (arXiv 2601.09859).
"""

from __future__ import annotations

from typing import Any, NamedTuple

from drrho_core import _validate
from drrho_core._array_api import Array, Namespace, Scalar, device_of, is_array, namespace_of, wide_dtype
from drrho_core._validate import FINITE, NOT_NEGATIVE, POSITIVE
from drrho_core.contrastive.anchors import normalised
from drrho_core.contrastive.gradient import gradient
from drrho_core.contrastive.options import (
    AnchorWeight,
    check_anchor_weight,
    check_features,
    check_pair_mask,
    per_anchor,
)
from drrho_core.contrastive.passes import (
    find_sweeps,
    log_sum_and_mean,
    peak_above_positive,
    sum_negatives,
)
from drrho_core.contrastive.scaling import saturated
from drrho_core.contrastive.tiles import Tiles, Values, along, cast, split
from drrho_core.extend import Batch
from drrho_core.numerics import log_add_constant

FEATURES = ("image_gradient", "text_gradient")
"""The fields that hold the gradients with respect to the features."""


class LossGradients(NamedTuple):
    """A loss and its gradients, of `info_nce` and `distillation_loss`.

    Attributes
    ----------
    loss : array, shape ()
        The value.
    image_gradient, text_gradient : array, shape (b, d)
        Its gradient with respect to the features, in their dtype.
    temperature_gradient : array, shape ()
        Its gradient with respect to the temperature.
    """

    loss: Array
    image_gradient: Array
    text_gradient: Array
    temperature_gradient: Array


class SigmoidLossGradients(NamedTuple):
    """A loss and its gradients, of `sigmoid_loss`.

    Attributes
    ----------
    loss : array, shape ()
        The value.
    image_gradient, text_gradient : array, shape (b, d)
        Its gradient with respect to the features, in their dtype.
    scale_gradient, bias_gradient : array, shape ()
        Its gradient with respect to the scale and the bias.
    """

    loss: Array
    image_gradient: Array
    text_gradient: Array
    scale_gradient: Array
    bias_gradient: Array


class FeatureGradients(NamedTuple):
    """A loss without learned parameters and its gradients, of `hinge_margin_loss`.

    Attributes
    ----------
    loss : array, shape ()
        The value.
    image_gradient, text_gradient : array, shape (b, d)
        Its gradient with respect to the features, in their dtype.
    """

    loss: Array
    image_gradient: Array
    text_gradient: Array


class WeightedSum(NamedTuple):
    """Result of `weighted_sum`.

    Attributes
    ----------
    loss : array, shape ()
        Sum of the weighted losses.
    image_gradient, text_gradient : array, shape (b, d)
        Sum of the weighted gradients with respect to the features, in their dtype.
    parameter_gradients : tuple of dict
        One dict per term, in order: the weighted gradients of its own parameters by field name, such as
        ``temperature_gradient``. Add the entries of terms that share a parameter.
    """

    loss: Array
    image_gradient: Array
    text_gradient: Array
    parameter_gradients: tuple[dict[str, Any], ...]


def info_nce(
    image_features: Array,
    text_features: Array,
    /,
    *,
    temperature: Scalar,
    anchor_weight: AnchorWeight = None,
    tile_size: int | None = None,
    memory_budget: int | None = None,
    xp: Namespace | None = None,
) -> LossGradients:
    """Return CLIP's loss: cross-entropy of the scaled similarities over rows and over columns, averaged.

    Parameters
    ----------
    image_features, text_features : array, shape (b, d)
        Features of the batch, unit norm (not enforced), b >= 2. Row i of both is a positive pair.
    temperature : float or array of shape ()
        Temperature tau > 0.
    anchor_weight : array of shape (b,) or pair of arrays of shape (b,), optional
        Factor >= 0 on each row's and each column's cross-entropy, as in `contrastive_step`.
    tile_size, memory_budget : int, optional
        Affects speed and memory only, not the result: see `contrastive_step`.
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
    With S = E1 E2^T and the positive on the diagonal, anchor i contributes ``log sum_j exp((S_ij - S_ii) / tau)`` where
    j = i counts 1: InfoNCE as in CLIP (arXiv 2103.00020). ``contrastive_step`` with ``gamma=1`` and ``eps=1/(b-1)`` and
    no reference is exactly tau times (this - log(b - 1)).

    Examples
    --------
    >>> import numpy as np
    >>> result = info_nce(np.eye(3), np.eye(3), temperature=0.5)
    >>> round(float(result.loss), 6), round(float(np.log(1 + 2 * np.exp(-2))), 6)
    (0.239545, 0.239545)
    """
    call = _validate.arrays(
        {"image_features": image_features, "text_features": text_features},
        xp,
        options={"temperature": temperature, "anchor_weight": anchor_weight},
    )
    xp, batch_size, work = call.xp, check_features(call), wide_dtype(image_features.dtype, call.xp)
    temperature = call.option("temperature", temperature, POSITIVE, work)
    factors = check_anchor_weight(call, anchor_weight, batch_size, work)
    temperatures = per_anchor(temperature, image_features, work, xp)
    batch = Batch(image_features, text_features, None, 1.0, temperatures[0], temperatures[1], None)
    sweeps = find_sweeps(batch, temperature, tile_size, memory_budget, xp)
    first = sweeps.sum_negatives(batch)
    losses, weights, slopes = [], [], []
    scale = 1.0 / (2.0 * batch_size)
    for factor, log_sum, mean in (
        (factors[0], first.log_sum_image, first.mean_image),
        (factors[1], first.log_sum_text, first.mean_text),
    ):
        log_denominator = log_add_constant(log_sum, 1.0, xp=xp)  # the positive adds exp(0)
        weight = xp.exp(-log_add_constant(-log_sum, 1.0, xp=xp))  # probability of all negatives together
        losses.append(xp.sum(factor * (scale * log_denominator)))
        slopes.append(xp.sum(factor * (scale * (weight * saturated(mean, 1.0 / temperature, xp=xp)))))
        weights.append(xp.clip(factor * weight, max=float(xp.finfo(work).max)))
    weight_sums, unit = normalised(weights, work, xp)
    sums, c = sweeps.pull_back(batch, first, *weight_sums), weight_sums[0] + weight_sums[1]
    return LossGradients(
        loss=losses[0] + losses[1],
        image_gradient=gradient(sums.image_pull, c, text_features, xp, unit, 1.0 / temperature),
        text_gradient=gradient(sums.text_pull, c, image_features, xp, unit, 1.0 / temperature),
        temperature_gradient=-(slopes[0] + slopes[1]),
    )


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
    xp: Namespace | None = None,
) -> SigmoidLossGradients:
    """Return SigLIP's loss: each pair of the batch is classified as positive or negative on its own.

    Parameters
    ----------
    image_features, text_features : array, shape (b, d)
        Features of the batch, unit norm (not enforced), b >= 2. Row i of both is a positive pair.
    scale : float or array of shape ()
        Factor of the similarities, > 0: one over a temperature. A model that learns its logarithm multiplies
        `scale_gradient` by the scale.
    bias : float or array of shape ()
        Added to all logits; SigLIP starts at -10.
    pair_mask : array of bool, shape (b, b), optional
        Entry (i, j) False: the pair is skipped because it may be a positive. The diagonal always counts, as positive.
    tile_size, memory_budget : int, optional
        Affects speed and memory only, not the result: see `contrastive_step`. One sweep is enough.
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
    ``(1/b) sum_ij -log sigmoid(y_ij (scale S_ij + bias))`` with y = 1 on the diagonal and -1 off it, SigLIP
    (arXiv 2303.15343). With ``a_ij = -y_ij sigmoid(-y_ij (scale S_ij + bias)) / b`` the gradients are ``scale a E2``,
    ``scale a^T E1``, ``sum a_ij S_ij`` and ``sum a_ij``. Pairs that `pair_mask` leaves out are not summed; the sum is
    still divided by b, the number of "yes".

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
    call = _validate.arrays(required, xp, options={"scale": scale, "bias": bias})
    xp, batch_size, work = call.xp, check_features(call), wide_dtype(image_features.dtype, call.xp)
    check_pair_mask(call, batch_size)
    scale = call.option("scale", scale, POSITIVE, work)
    bias = call.option("bias", bias, FINITE, work)
    tiles = split(
        image_features,
        text_features,
        pair_mask=pair_mask,
        tile_size=tile_size,
        memory_budget=memory_budget,
        passes=1,
        xp=xp,
    )
    # Features so large that S would overflow are scaled: S = z / (left right).
    left, right = tiles.scaling.left, tiles.scaling.right
    scaled = not (isinstance(left, float) and left == right == 1.0)
    rate = _bounded(scale / left / right, xp.finfo(work), xp) if scaled else scale

    def weigh(i: Any, j: Any, diagonal: bool) -> tuple[Array, Values, Values]:
        z = tiles.z(i, j)
        logits = (saturated(z, rate, xp=xp) if scaled else scale * z) + bias
        positives = _on_diagonal(z, xp) if diagonal else None
        # The logit of the wrong answer. Its softplus is the loss, its sigmoid the slope.
        wrong = logits if positives is None else xp.where(positives, -logits, logits)
        small = xp.exp(-xp.abs(wrong))  # never overflows, whichever side of 0 `wrong` is on
        terms = xp.where(wrong > 0, wrong, xp.zeros_like(wrong)) + xp.log1p(small)
        slope = xp.where(wrong >= 0, xp.ones_like(small), small) / (1.0 + small)
        if positives is not None:
            slope = xp.where(positives, -slope, slope)
        asked = tiles.counts(i, j, False)
        if asked is not None:
            asked = asked if positives is None else asked | positives
            terms, slope = (xp.where(asked, x, xp.zeros_like(x)) for x in (terms, slope))
        sums = (xp.sum(terms, axis=1), xp.sum(slope * z, axis=1), xp.sum(slope, axis=1))
        return slope, sums, ()

    image_pull, text_pull, sums, _ = tiles.pull(weigh)
    loss, scale_gradient, bias_gradient = (xp.sum(each) for each in sums)
    share = 1.0 / batch_size
    return SigmoidLossGradients(
        loss=share * loss,
        image_gradient=xp.astype(share * scale * image_pull, image_features.dtype),
        text_gradient=xp.astype(share * scale * text_pull, text_features.dtype),
        scale_gradient=share * scale_gradient / left / right,
        bias_gradient=share * bias_gradient,
    )


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
    """Return MobileCLIP's distillation loss: cross-entropy of the reference model's matches and the learner's.

    Parameters
    ----------
    image_features, text_features : array, shape (b, d)
        Features of the batch, unit norm (not enforced), b >= 2. Row i of both is a positive pair.
    reference_image, reference_text : array, shape (b, r)
        Features of the same pairs by the frozen reference model, in the same dtype; r may differ from d.
    temperature : float or array of shape ()
        The learner's temperature tau > 0.
    reference_temperature : float or array of shape ()
        The reference model's own, > 0. It is frozen, too: it gets no gradient.
    tile_size, memory_budget : int, optional
        Affects speed and memory only, not the result: see `contrastive_step`. The budget is for both models' logits.
    xp : namespace, optional
        The arrays' namespace; pass it under ``torch.compile``.

    Returns
    -------
    LossGradients
        Loss and gradients. Where learner and reference model agree the gradients are 0, the loss is not: it is the
        entropy of the reference model's matches.

    Raises
    ------
    TypeError, ValueError
        As `contrastive_step`.

    Notes
    -----
    ``1/2 [mean_i CE(softmax_j(R_ij / tau_R), softmax_j(S_ij / tau)) + the same over columns]``, diagonal included,
    R = R1 R2^T; cross-entropy and not the KL divergence: MobileCLIP (arXiv 2311.17049).

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
    teacher = split(reference_image, reference_text, temperature=reference_temperature, **options, xp=xp)
    p, q = _softmax(learner, xp), _softmax(teacher, xp)

    def weigh(i: Any, j: Any, diagonal: bool) -> tuple[Array, Values, Values]:
        tile = learner.tile(i, j, diagonal)
        reference_tile = tile._replace(z=teacher.z(i, j))
        slopes, moments = [], []
        for side, block in enumerate((i, j)):
            axis = 1 - side
            x = learner.only_negatives(learner.exponent(side, tile, p[side].peaks[block]), tile)
            y = learner.only_negatives(teacher.exponent(side, reference_tile, q[side].peaks[block]), tile)
            target = teacher.exp(y, True)
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
        # Negatives: log p = x + log(sum of p / total). The positive has D = 0, so p = exp(-log denominator).
        loss.append(xp.exp(-target.log_denominator) * own.log_denominator - moment - target.weight * own.log_factor)
        slope.append(tilt + (own.weight - target.weight) * own.above)
    c = (p[0].weight - q[0].weight) + (p[1].weight - q[1].weight)
    return LossGradients(
        loss=xp.sum(scale * loss[0]) + xp.sum(scale * loss[1]),
        image_gradient=gradient(image_pull, c, text_features, xp, scale, 1.0 / temperature),
        text_gradient=gradient(text_pull, c, image_features, xp, scale, 1.0 / temperature),
        temperature_gradient=-(xp.sum(scale * slope[0]) + xp.sum(scale * slope[1])) / temperature,
    )


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
    """Return TuneCLIP's squared hinge: a negative costs only where it comes within a margin of the positive.

    Parameters
    ----------
    image_features, text_features : array, shape (b, d)
        Features of the batch, unit norm (not enforced), b >= 2. Row i of both is a positive pair.
    margin : float or array of shape ()
        The distance to keep, >= 0, in units of the similarity.
    pair_mask : array of bool, shape (b, b), optional
        Entry (i, j) False: text j is not a negative of image i, nor image i one of text j. The diagonal never is one.
    tile_size, memory_budget : int, optional
        Affects speed and memory only, not the result: see `contrastive_step`. One sweep is enough.
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
    or as many as `pair_mask` leaves it: without any it contributes 0, and the mean over anchors still divides by b.

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
    own, *factors = tiles.cut(tiles.positives(), *_one_over_negatives(tiles, xp))

    def weigh(i: Any, j: Any, diagonal: bool) -> tuple[Array, Values, Values]:
        tile = tiles.tile(i, j, diagonal)
        slopes, values = [], []
        for side, block in enumerate((i, j)):
            axis = 1 - side
            within = tile.z - along(axis, own[block]) + margin
            counted = within > 0 if tile.counts is None else tile.counts & (within > 0)
            within = xp.where(counted, within, xp.zeros_like(within))
            slope = within * along(axis, factors[side][block])
            slopes.append(slope)
            values.append((xp.sum(slope * within, axis=axis), xp.sum(slope, axis=axis)))
        return slopes[0] + slopes[1], values[0], values[1]

    image_pull, text_pull, image_sums, text_sums = tiles.pull(weigh)
    scale, c = 1.0 / (2.0 * batch_size), image_sums[1] + text_sums[1]
    return FeatureGradients(
        loss=xp.sum(scale * (image_sums[0] + text_sums[0])) / left / right / left / right,
        image_gradient=gradient(image_pull, c, text_features, xp, 2.0 * scale, 1.0 / left, 1.0 / right),
        text_gradient=gradient(text_pull, c, image_features, xp, 2.0 * scale, 1.0 / left, 1.0 / right),
    )


def weighted_sum(*terms: tuple[Scalar, Any], xp: Namespace | None = None) -> WeightedSum:
    """Return the weighted sum of losses that were computed on the same features, such as DRRho plus distillation.

    Parameters
    ----------
    *terms : pair of (weight, result)
        A finite weight, float or array of shape (), and the result of a loss or of `contrastive_step`, or another
        weighted sum. All results belong to the same features.
    xp : namespace, optional
        The arrays' namespace; pass it under ``torch.compile``.

    Returns
    -------
    WeightedSum
        Sum of the losses and of the features' gradients, and every term's own parameter gradients times its weight.

    Raises
    ------
    TypeError, ValueError
        If there is no term, a term is no such pair, or shapes, dtypes, libraries or devices of the results differ.

    Notes
    -----
    The gradient of a sum is the sum of the gradients. For a `ContrastiveStep` they are the gradients of its surrogate.
    Parameters are kept apart, because only the caller knows whether the temperatures of two terms are one parameter.

    Examples
    --------
    >>> import numpy as np
    >>> features = np.eye(3), np.eye(3)[[0, 2, 1]]
    >>> clip, hinge = info_nce(*features, temperature=0.5), hinge_margin_loss(*features, margin=0.2)
    >>> total = weighted_sum((1.0, clip), (0.5, hinge))
    >>> bool(np.isclose(total.loss, clip.loss + 0.5 * hinge.loss))
    True
    >>> [list(gradients) for gradients in total.parameter_gradients]
    [['temperature_gradient'], []]
    """
    if not terms:
        raise ValueError("weighted_sum must get at least one pair (weight, result), got none")
    arrays: dict[str, Array] = {}
    features: dict[str, Array] = {}
    for n, term in enumerate(terms):
        if not isinstance(term, (tuple, list)) or len(term) != 2:
            raise TypeError(f"terms[{n}] must be a pair (weight, result), got {_validate.describe(term)}")
        weight, result = term
        if not all(field in getattr(result, "_fields", ()) for field in ("loss", *FEATURES)):
            raise TypeError(
                f"terms[{n}][1] must be a named tuple with loss, image_gradient and text_gradient, "
                f"got {_validate.describe(result)}"
            )
        features |= {f"terms[{n}][1].{field}": getattr(result, field) for field in FEATURES}
        # NumPy's sums are scalars and not arrays.
        scalars = {f"terms[{n}][0]": weight, f"terms[{n}][1].loss": result.loss}
        arrays |= {name: value for name, value in scalars.items() if is_array(value)}
    arrays = features | arrays
    xp = namespace_of(arrays, xp)
    _validate.detached(arrays, xp)
    _validate.same_device(arrays, xp)
    _validate.same_dtype(features)
    first = next(iter(features.values()))
    for name, array in features.items():
        _validate.shape(name, array, tuple(first.shape), "(batch_size, feature_dim)")

    work = wide_dtype(first.dtype, xp)
    total: list[Array] = []
    parameters: list[dict[str, Any]] = []
    for n, (weight, result) in enumerate(terms):
        weight = _validate.parameter(f"terms[{n}][0]", weight, lambda _: True, "be finite", xp, dtype=work)
        parts = [
            _times(weight, part, xp)
            for part in (
                result.loss,
                xp.astype(result.image_gradient, work),
                xp.astype(result.text_gradient, work),
            )
        ]
        total = [old + new for old, new in zip(total, parts, strict=True)] if total else parts
        own = result.parameter_gradients if isinstance(result, WeightedSum) else (_parameter_gradients(result),)
        parameters += [{name: _times(weight, gradient, xp) for name, gradient in one.items()} for one in own]
    loss, image_gradient, text_gradient = total
    return WeightedSum(
        loss=loss,
        image_gradient=xp.astype(image_gradient, first.dtype),
        text_gradient=xp.astype(text_gradient, first.dtype),
        parameter_gradients=tuple(parameters),
    )


def _parameter_gradients(result: Any) -> dict[str, Any]:
    """Return the parameter gradients of a result by field name."""
    names = [name for name in result._fields if name.endswith("_gradient")]
    return {name: getattr(result, name) for name in names if name not in FEATURES}


def _times(weight: Scalar, gradient: Any, xp: Namespace) -> Any:
    """Multiply a gradient, or both of a pair, by a weight, and keep its dtype."""
    if isinstance(gradient, tuple):
        return tuple(_times(weight, side, xp) for side in gradient)
    return cast(weight, gradient.dtype, xp) * gradient


def _bounded(rate: Scalar, finfo: Any, xp: Namespace) -> Scalar:
    """Return a rate that its dtype can hold."""
    largest = float(finfo.max)
    return min(rate, largest) if isinstance(rate, float) else xp.clip(rate, max=largest)


def _on_diagonal(tile: Array, xp: Namespace) -> Array:
    """Return where a square tile's diagonal is."""
    index = xp.arange(tile.shape[0], device=device_of(tile))
    return index[:, None] == index[None, :]


def _one_over_negatives(tiles: Tiles, xp: Namespace) -> tuple[Array, Array]:
    """Return one over the number of negatives of each image anchor and each text anchor, 0 without any; (b,)."""
    batch_size, dtype, device = tiles.batch_size, tiles.dtype, tiles.device
    if tiles.pair_mask is None:
        factor = xp.full((batch_size,), 1.0 / (batch_size - 1), dtype=dtype, device=device)
        return factor, factor
    image, text = [], xp.zeros((batch_size,), dtype=dtype, device=device)
    every = xp.arange(batch_size, device=device)
    for rows in tiles.spans:  # no b x b array of numbers
        numbers = xp.astype(tiles.pair_mask[rows, :] & (every[rows][:, None] != every[None, :]), dtype)
        image.append(xp.sum(numbers, axis=1))
        text = text + xp.sum(numbers, axis=0)

    def one_over(number: Array) -> Array:
        return xp.where(number > 0, 1.0 / xp.clip(number, min=1.0), xp.zeros_like(number))

    return one_over(xp.concat(image)), one_over(text)


class _Softmax(NamedTuple):
    """One direction's softmax over all others and the positive; (b,) each, or cut into blocks."""

    log_denominator: Array  # log sum_j exp(D_ij), the positive's 1 included
    weight: Array  # probability of all negatives together
    log_factor: Array  # log of what turns a negative's exponential into its probability
    above: Array  # D of the peak
    peaks: Any
    factors: Any


def _softmax(tiles: Tiles, xp: Namespace) -> tuple[_Softmax, _Softmax]:
    """Return the softmax over rows and over columns."""
    sides = sum_negatives(tiles)
    both = []
    for negatives, rate in zip(sides, tiles.scaling.rates, strict=True):
        log_sum, _ = log_sum_and_mean(negatives, rate, xp=xp)
        log_weight = -log_add_constant(-log_sum, 1.0, xp=xp)
        log_factor = log_weight - xp.log(negatives.total)
        peaks, factors = tiles.cut(negatives.peak, xp.exp(log_factor))
        both.append(
            _Softmax(
                log_denominator=log_add_constant(log_sum, 1.0, xp=xp),
                weight=xp.exp(log_weight),
                log_factor=log_factor,
                above=peak_above_positive(negatives, rate, xp=xp),
                peaks=peaks,
                factors=factors,
            )
        )
    return both[0], both[1]
