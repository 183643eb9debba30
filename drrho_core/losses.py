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

from drrho_core import _checks, _pairs
from drrho_core._arrays import Array, Namespace, device_of, is_array, namespace_of, wide_dtype
from drrho_core.contrastive import Scalar, cast, check_features, per_anchor, positive, prepare
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
    tile_size, memory_budget : int, optional
        How it is computed, never what: see `contrastive_step`.
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
    xp, arrays = _gather(image_features, text_features, {}, {"temperature": temperature}, xp)
    batch_size = check_features(arrays, xp)
    temperature = _checks.parameter("temperature", temperature, positive, "be > 0", xp)
    temperatures = per_anchor(temperature, image_features, wide_dtype(image_features.dtype, xp), xp)
    pairs = prepare(
        image_features, text_features, temperatures, tile_size=tile_size, memory_budget=memory_budget, xp=xp
    )
    log_image, log_text = _log_denominators(pairs, xp)
    sums = _pairs.pull_back(pairs, log_image, log_text, xp=xp)
    scale = 1.0 / (2.0 * batch_size)
    tau = temperatures[0][0]
    return LossGradients(
        loss=scale * (xp.sum(log_image) + xp.sum(log_text)),
        image_gradient=xp.astype(scale / tau * sums.image_pull, image_features.dtype),
        text_gradient=xp.astype(scale / tau * sums.text_pull, text_features.dtype),
        temperature_gradient=-scale / tau * (xp.sum(sums.weighted_image) + xp.sum(sums.weighted_text)),
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
    """Return SigLIP's loss: every pair of the batch is a question of its own, positive or not.

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
        Entry (i, j) False: image i and text j are no question, for their answer is not known to be "no". The diagonal
        always is one, and its answer "yes".
    tile_size, memory_budget : int, optional
        How it is computed, never what: see `contrastive_step`. One sweep is enough, so neither costs a product.
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
    more = {} if pair_mask is None else {"pair_mask": pair_mask}
    xp, arrays = _gather(image_features, text_features, more, {"scale": scale, "bias": bias}, xp)
    batch_size = check_features(arrays, xp)
    _check_pair_mask(pair_mask, batch_size, xp)
    work = wide_dtype(image_features.dtype, xp)
    scale = cast(_checks.parameter("scale", scale, positive, "be > 0", xp), work, xp)
    bias = cast(_checks.parameter("bias", bias, lambda _: True, "be finite", xp), work, xp)
    pairs = prepare(
        image_features,
        text_features,
        per_anchor(1.0, image_features, work, xp),
        pair_mask=pair_mask,
        tile_size=tile_size,
        memory_budget=memory_budget,
        xp=xp,
    )
    pull = _Pull(pairs, xp)
    loss = scale_gradient = bias_gradient = xp.sum(xp.zeros_like(pairs.positive))
    for i, j, rows, columns, z, negatives in _pairs.tiles(pairs, xp):
        logits = scale * z + bias
        positives = _on_diagonal(z, xp) if i == j else None
        # The logit of the wrong answer. Its softplus is the loss, its sigmoid the slope.
        wrong = logits if positives is None else xp.where(positives, -logits, logits)
        small = xp.exp(-xp.abs(wrong))  # never overflows, whichever side of 0 `wrong` is on
        terms = xp.where(wrong > 0, wrong, xp.zeros_like(wrong)) + xp.log1p(small)
        slope = xp.where(wrong >= 0, xp.ones_like(small), small) / (1.0 + small)
        if positives is not None:
            slope = xp.where(positives, -slope, slope)
        if pair_mask is not None:
            asked = negatives if positives is None else negatives | positives
            terms, slope = (xp.where(asked, x, xp.zeros_like(x)) for x in (terms, slope))
        loss = loss + xp.sum(terms)
        scale_gradient = scale_gradient + xp.sum(slope * z)
        bias_gradient = bias_gradient + xp.sum(slope)
        pull.add(i, j, rows, columns, slope)
    image_pull, text_pull = pull.join()
    share = 1.0 / batch_size
    return SigmoidLossGradients(
        loss=share * loss,
        image_gradient=xp.astype(share * scale * image_pull, image_features.dtype),
        text_gradient=xp.astype(share * scale * text_pull, text_features.dtype),
        scale_gradient=share * scale_gradient,
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
        How it is computed, never what: see `contrastive_step`. The budget is for the logits of both models together.
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
    reference = {"reference_image": reference_image, "reference_text": reference_text}
    scalars = {"temperature": temperature, "reference_temperature": reference_temperature}
    xp, arrays = _gather(image_features, text_features, reference, scalars, xp)
    batch_size = check_features(arrays, xp)
    for name, array in reference.items():
        _checks.floating(name, array, xp)
        _checks.ndim(name, array, 2, "(batch_size, reference_dim)")
    _checks.same_dtype({"image_features": image_features, **reference})
    for name, array in reference.items():
        _checks.shape(name, array, (batch_size, reference_image.shape[1]), "(batch_size, reference_dim)")
        _checks.finite(name, array, xp)
    work = wide_dtype(image_features.dtype, xp)
    temperatures, reference_temperatures = (
        per_anchor(_checks.parameter(name, value, positive, "be > 0", xp), image_features, work, xp)
        for name, value in scalars.items()
    )
    learner, teacher = (
        prepare(*two, t, tile_size=tile_size, memory_budget=memory_budget, matrices=2, xp=xp)
        for two, t in (
            ((image_features, text_features), temperatures),
            ((reference_image, reference_text), reference_temperatures),
        )
    )
    log_p, log_q = _log_denominators(learner, xp), _log_denominators(teacher, xp)
    pull, c = _Pull(learner, xp), _pairs.Parts(xp)
    # The positives' own terms: D is 0 there, so -q log p is exp(-log_q) log_p.
    loss = xp.sum(xp.exp(-log_q[0]) * log_p[0]) + xp.sum(xp.exp(-log_q[1]) * log_p[1])
    weighted = xp.zeros_like(loss)
    both = zip(_pairs.tiles(learner, xp), _pairs.tiles(teacher, xp), strict=True)
    for (i, j, rows, columns, z, negatives), (*_, reference_z, _) in both:
        slopes = []
        for side, (d, reference_d) in enumerate(
            zip(
                _pairs.excess(learner, rows, columns, z),
                _pairs.excess(teacher, rows, columns, reference_z),
                strict=True,
            )
        ):
            place = (rows, None) if side == 0 else (None, columns)
            log_match = d - log_p[side][place]
            q = xp.exp(reference_d - log_q[side][place])
            slope = xp.exp(log_match) - q
            if negatives is not None:
                q, slope = (xp.where(negatives, x, xp.zeros_like(x)) for x in (q, slope))
            loss = loss - xp.sum(q * log_match)
            weighted = weighted + xp.sum(slope * d)
            c.add(j if side else i, xp.sum(slope, axis=1 - side))
            slopes.append(slope)
        pull.add(i, j, rows, columns, slopes[0] + slopes[1])
    image_pull, text_pull = pull.join(c)
    scale = 1.0 / (2.0 * batch_size)
    tau = temperatures[0][0]
    return LossGradients(
        loss=scale * loss,
        image_gradient=xp.astype(scale / tau * image_pull, image_features.dtype),
        text_gradient=xp.astype(scale / tau * text_pull, text_features.dtype),
        temperature_gradient=-scale / tau * weighted,
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
        How it is computed, never what: see `contrastive_step`. One sweep is enough, so neither costs a product.
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
    more = {} if pair_mask is None else {"pair_mask": pair_mask}
    xp, arrays = _gather(image_features, text_features, more, {"margin": margin}, xp)
    batch_size = check_features(arrays, xp)
    _check_pair_mask(pair_mask, batch_size, xp)
    work = wide_dtype(image_features.dtype, xp)
    margin = cast(_checks.parameter("margin", margin, lambda x: x >= 0, "be >= 0", xp), work, xp)
    pairs = prepare(
        image_features,
        text_features,
        per_anchor(1.0, image_features, work, xp),
        pair_mask=pair_mask,
        tile_size=tile_size,
        memory_budget=memory_budget,
        xp=xp,
    )
    pull, c = _Pull(pairs, xp), _pairs.Parts(xp)
    image_share, text_share = _one_over_negatives(pairs, xp)
    loss = xp.sum(xp.zeros_like(pairs.positive))
    for i, j, rows, columns, z, negatives in _pairs.tiles(pairs, xp):
        image, text = (d + margin for d in _pairs.excess(pairs, rows, columns, z))
        counted = xp.ones_like(z, dtype=xp.bool) if negatives is None else negatives
        image, text = (xp.where(counted & (h > 0), h, xp.zeros_like(h)) for h in (image, text))
        image_slope, text_slope = image * image_share[rows][:, None], text * text_share[columns][None, :]
        loss = loss + xp.sum(image_slope * image) + xp.sum(text_slope * text)
        c.add(i, xp.sum(image_slope, axis=1))
        c.add(j, xp.sum(text_slope, axis=0))
        pull.add(i, j, rows, columns, image_slope + text_slope)
    image_pull, text_pull = pull.join(c)
    scale = 1.0 / (2.0 * batch_size)
    return FeatureGradients(
        loss=scale * loss,
        image_gradient=xp.astype(2.0 * scale * image_pull, image_features.dtype),
        text_gradient=xp.astype(2.0 * scale * text_pull, text_features.dtype),
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
            raise TypeError(f"terms[{n}] must be a pair (weight, result), got {_checks.describe(term)}")
        weight, result = term
        if not all(field in getattr(result, "_fields", ()) for field in ("loss", *FEATURES)):
            raise TypeError(
                f"terms[{n}][1] must be a named tuple with loss, image_gradient and text_gradient, "
                f"got {_checks.describe(result)}"
            )
        features |= {f"terms[{n}][1].{field}": getattr(result, field) for field in FEATURES}
        # NumPy's sums are scalars and not arrays.
        scalars = {f"terms[{n}][0]": weight, f"terms[{n}][1].loss": result.loss}
        arrays |= {name: value for name, value in scalars.items() if is_array(value)}
    arrays = features | arrays
    xp = namespace_of(arrays, xp)
    _checks.detached(arrays)
    _checks.same_device(arrays, xp)
    _checks.same_dtype(features)
    first = next(iter(features.values()))
    for name, array in features.items():
        _checks.shape(name, array, tuple(first.shape), "(batch_size, feature_dim)")

    work = wide_dtype(first.dtype, xp)
    total: list[Array] = []
    parameters: list[dict[str, Any]] = []
    for n, (weight, result) in enumerate(terms):
        weight = _checks.parameter(f"terms[{n}][0]", weight, lambda _: True, "be finite", xp)
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


def _gather(
    image_features: Array,
    text_features: Array,
    more: dict[str, Array],
    scalars: dict[str, Any],
    xp: Namespace | None,
) -> tuple[Namespace, dict[str, Array]]:
    """Return the namespace of all arguments and those of them that are arrays, by name."""
    arrays = {"image_features": image_features, "text_features": text_features, **more}
    arrays |= {name: value for name, value in scalars.items() if is_array(value)}
    return namespace_of(arrays, xp), arrays


def _check_pair_mask(pair_mask: Array | None, batch_size: int, xp: Namespace) -> None:
    """Check what marks the negatives, as `contrastive_step` does."""
    if pair_mask is not None:
        _checks.shape("pair_mask", pair_mask, (batch_size, batch_size), "(batch_size, batch_size)")
        if pair_mask.dtype != xp.bool:
            raise TypeError(f"pair_mask must have dtype bool, got {pair_mask.dtype}")


def _on_diagonal(tile: Array, xp: Namespace) -> Array:
    """Return where a square tile's diagonal is."""
    index = xp.arange(tile.shape[0], device=device_of(tile))
    return index[:, None] == index[None, :]


def _one_over_negatives(pairs: _pairs.Pairs, xp: Namespace) -> tuple[Array, Array]:
    """Return one over the number of negatives of each image anchor and each text anchor, 0 without any; (b,)."""
    positive = pairs.positive
    batch_size = positive.shape[0]
    if pairs.pair_mask is None:
        share = xp.full_like(positive, 1.0 / (batch_size - 1))
        return share, share
    image, text = _pairs.Parts(xp), _pairs.Parts(xp)
    every = xp.arange(batch_size, device=device_of(positive))
    for i, (start, stop) in enumerate(zip(pairs.starts, pairs.starts[1:], strict=False)):  # no b x b array of numbers
        negatives = pairs.pair_mask[start:stop, :] & (every[start:stop][:, None] != every[None, :])
        numbers = xp.astype(negatives, positive.dtype)
        image.add(i, xp.sum(numbers, axis=1))
        text.add(0, xp.sum(numbers, axis=0))

    def share_of(number: Array) -> Array:
        return xp.where(number > 0, 1.0 / xp.clip(number, min=1.0), xp.zeros_like(number))

    return share_of(image.join()), share_of(text.join())


def _log_denominators(pairs: _pairs.Pairs, xp: Namespace) -> tuple[Array, Array]:
    """Return ``log sum_j exp(D_ij)`` with the positive, which adds exp(0), for image and for text anchors; (b,)."""
    image, text = (log_add_constant(side.log_sum, 1.0, xp=xp) for side in _pairs.sum_negatives(pairs, xp=xp))
    return image, text


class _Pull:
    """What tiles of the slope V (b, b) pull the features by, collected tile by tile."""

    def __init__(self, pairs: _pairs.Pairs, xp: Namespace) -> None:
        self._pairs = pairs
        self._image, self._text = _pairs.Parts(xp), _pairs.Parts(xp)

    def add(self, i: int, j: int, rows: slice, columns: slice, v: Array) -> None:
        """Add a tile of V."""
        self._image.add(i, v @ self._pairs.text_features[columns, :])
        self._text.add(j, v.T @ self._pairs.image_features[rows, :])

    def join(self, c: _pairs.Parts | None = None) -> tuple[Array, Array]:
        """Return ``V E2`` and ``V^T E1``; with the sums c (b,) that positives take back, less ``c E2`` and ``c E1``."""
        image, text = self._image.join(), self._text.join()
        if c is None:
            return image, text
        taken = c.join()[:, None]
        return image - taken * self._pairs.text_features, text - taken * self._pairs.image_features
