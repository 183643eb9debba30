"""The global contrastive loss with a reference model, one SogCLR step at a time, with closed-form gradients.

Shapes, stated once: b pairs in the batch, image and text features (b, d), reference features (b, r), one inner estimate
per anchor and direction (b,). Formulas: DRRho-CLIP (arXiv 2505.06699), SogCLR (arXiv 2202.12387), FastCLIP
(arXiv 2407.01445); see docs/theory/contrastive.md.

    Z = E1 E2^T - lambda R1 R2^T
    image anchor i:  D_ij = (Z_ij - Z_ii) / t_i,   g_i = mean_{j != i} exp(D_ij)         text anchors: over the columns
    u_i <- (1 - gamma) u_i + gamma g_i             (first visit: u_i <- g_i)
    w_ij = exp(D_ij) / (eps + u_i) / (b - 1),      c_i = sum_j w_ij + sum_j w'_ji,   V = w + w'
    loss = (1 / 2b) sum_i t_i (log(eps + u_i) + radius) + the same for text anchors
    dE1 = (V E2 - c E2) / 2b,   dE2 = (V^T E1 - c E1) / 2b
    dt_i = (1 / 2b) (log(eps + u_i) + radius - sum_j w_ij D_ij)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

from array_api_compat import is_writeable_array

from drrho_core import _validate
from drrho_core._array_api import Array, Namespace, device_of, is_array, namespace_of, values_visible, wide_dtype
from drrho_core._fused import Batch, FirstSweep, SecondSweep, Sweeps
from drrho_core._fused import find as find_kernels
from drrho_core._loops import traced
from drrho_core.contrastive import tiles as _pairs
from drrho_core.contrastive.tiles import Scaling
from drrho_core.numerics import log, log_add_constant, log_moving_average, log_share_of_new

Scalar: TypeAlias = float | Array
"""A number or an array of shape ()."""

PerAnchor: TypeAlias = Scalar | tuple[Array, Array]
"""A scalar, or one array (b,) for the image anchors and one for the text anchors."""

AnchorWeight: TypeAlias = Array | tuple[Array, Array] | None
"""One array (b,) for both directions' anchors, or one for the image anchors and one for the text anchors."""


ROWS = 8192
"""How many rows of a gradient are worked on at a time."""


class ContrastiveStep(NamedTuple):
    """Result of `contrastive_step`.

    Attributes
    ----------
    loss : array, shape ()
        Estimate of the objective with the updated inner estimates: the curve to watch.
    surrogate : array, shape ()
        Scalar whose gradient the fields below hold. Do not monitor it.
    image_gradient, text_gradient : array, shape (b, d)
        Gradient of `surrogate` with respect to the features.
    temperature_gradient : array, shape (), or pair of arrays, shape (b,)
        Gradient of `surrogate` with respect to the temperature, shaped like the temperature that was given.
    log_inner_image, log_inner_text : array, shape (b,)
        Logarithms of the updated inner estimates.
    """

    loss: Array
    surrogate: Array
    image_gradient: Array
    text_gradient: Array
    temperature_gradient: Array | tuple[Array, Array]
    log_inner_image: Array
    log_inner_text: Array


def contrastive_step(
    image_features: Array,
    text_features: Array,
    log_inner_image: Array,
    log_inner_text: Array,
    /,
    *,
    temperature: PerAnchor,
    gamma: PerAnchor = 1.0,
    reference_features: tuple[Array, Array] | None = None,
    reference_weight: Scalar = 1.0,
    radius: Scalar = 0.0,
    eps: Scalar = 0.0,
    pair_mask: Array | None = None,
    anchor_weight: AnchorWeight = None,
    tile_size: int | None = None,
    memory_budget: int | None = None,
    xp: Namespace | None = None,
) -> ContrastiveStep:
    """Take one SogCLR step of the global contrastive loss: new inner estimates, loss and closed-form gradients.

    Parameters
    ----------
    image_features, text_features : array, shape (b, d)
        Features of the batch, unit norm (not enforced), b >= 2. Row i of both is a positive pair.
    log_inner_image, log_inner_text : array, shape (b,)
        The batch's rows of the estimator's state, float32 or wider; ``-inf`` = never visited.
    temperature : float, array of shape () or pair of arrays of shape (b,)
        Temperature tau > 0, global or one per image anchor and one per text anchor.
    gamma : float, array of shape () or pair of arrays of shape (b,)
        Weight of the batch's own estimate, in (0, 1]; 1 has no memory: the mini-batch loss.
    reference_features : pair of arrays, shape (b, r), optional
        Image and text features of the frozen reference model; r may differ from d, and so may their dtype. None:
        SogCLR / FastCLIP.
    reference_weight : float or array of shape ()
        lambda >= 0: 0 ignores the reference model, 1 is DRRho; may exceed 1.
    radius : float or array of shape ()
        Size of the ambiguity set, >= 0; it matters only where temperatures are learned.
    eps : float or array of shape ()
        Added to the inner estimate, >= 0. Part of the objective, not a numerical safeguard.
    pair_mask : array of bool, shape (b, b), optional
        Entry (i, j) False: text j is not a negative of image i, nor image i one of text j. The diagonal never is one.
    anchor_weight : array of shape (b,) or pair of arrays of shape (b,), optional
        Factor >= 0 on each anchor's part of loss and gradients; a pair has one array for the image anchors and one for
        the text anchors. The inner estimates are updated as without it. See `reference_anchor_weight`.
    tile_size : int, optional
        Largest side of square tiles: two passes, and no b x b array exists. Affects speed and memory only.
    memory_budget : int, optional
        Bytes that the b x b logits may take (default 1 GiB): above it, two passes over tiles.
    xp : namespace, optional
        The arrays' namespace; pass it under ``torch.compile``.

    Returns
    -------
    ContrastiveStep
        Gradients have the features' dtype, the new state that of the old one.

    Raises
    ------
    TypeError
        If arrays come from different libraries or have a wrong dtype.
    ValueError
        If shapes, devices or values break the rules above, b = 1, or an input asks for autograd. Values are looked at
        on the host only and never under tracing.

    Notes
    -----
    Means over negatives divide by their number, both directions are averaged (1/2), the batch is averaged (1/b), losses
    are multiplied by tau. An anchor that `pair_mask` leaves without negatives contributes 0 and keeps its state.
    Formulas at the top of this module; DRRho-CLIP (arXiv 2505.06699), SogCLR (arXiv 2202.12387).

    Examples
    --------
    >>> import numpy as np
    >>> images, texts = np.eye(3), np.eye(3)[[0, 2, 1]]            # the second and third pair are the wrong way round
    >>> unseen = np.full(3, -np.inf)
    >>> step = contrastive_step(images, texts, unseen, unseen, temperature=0.5)
    >>> np.round(step.log_inner_image, 4).tolist()                 # log mean of exp(-2), exp(-2); of 1, exp(2); ...
    [-2.0, 1.4338, 1.4338]
    >>> round(float(step.loss), 4)
    0.1446
    """
    step = step_in_wide_dtype(
        image_features,
        text_features,
        log_inner_image,
        log_inner_text,
        temperature=temperature,
        gamma=gamma,
        reference_features=reference_features,
        reference_weight=reference_weight,
        radius=radius,
        eps=eps,
        pair_mask=pair_mask,
        anchor_weight=anchor_weight,
        tile_size=tile_size,
        memory_budget=memory_budget,
        xp=xp,
    )
    if step.image_gradient.dtype == image_features.dtype:
        return step
    xp = namespace_of({"image_features": image_features}, xp)
    return step._replace(
        image_gradient=xp.astype(step.image_gradient, image_features.dtype),
        text_gradient=xp.astype(step.text_gradient, text_features.dtype),
    )


def step_in_wide_dtype(
    image_features: Array,
    text_features: Array,
    log_inner_image: Array,
    log_inner_text: Array,
    /,
    *,
    temperature: PerAnchor,
    gamma: PerAnchor = 1.0,
    reference_features: tuple[Array, Array] | None = None,
    reference_weight: Scalar = 1.0,
    radius: Scalar = 0.0,
    eps: Scalar = 0.0,
    pair_mask: Array | None = None,
    anchor_weight: AnchorWeight = None,
    tile_size: int | None = None,
    memory_budget: int | None = None,
    xp: Namespace | None = None,
) -> ContrastiveStep:
    """Do what `contrastive_step` does, but leave the features' gradients in float32 or wider.

    The wrappers call this: their incoming gradient, a loss scale, meets a gradient that no half type has rounded.
    """
    xp, setting = settle(
        {
            "image_features": image_features,
            "text_features": text_features,
            "log_inner_image": log_inner_image,
            "log_inner_text": log_inner_text,
        },
        temperature=temperature,
        gamma=gamma,
        reference_features=reference_features,
        reference_weight=reference_weight,
        radius=radius,
        eps=eps,
        pair_mask=pair_mask,
        anchor_weight=anchor_weight,
        xp=xp,
    )
    if reference_features is not None and reference_features[0].dtype != image_features.dtype:
        # One dtype for all of them: kernels know no other products.
        image_features, text_features, *references = (
            xp.astype(x, setting.work, copy=False) for x in (image_features, text_features, *reference_features)
        )
        reference_features = (references[0], references[1])
    batch = Batch(
        image_features,
        text_features,
        reference_features,
        setting.reference_weight,
        cast(setting.temperatures[0], setting.work, xp),
        cast(setting.temperatures[1], setting.work, xp),
        pair_mask,
    )
    # Pass 1: each anchor's sum over its negatives, averaged into its inner estimate.
    sweeps = find_sweeps(batch, setting.temperature, tile_size, memory_budget, xp)
    first = sweeps.sum_negatives(batch)
    image = update(first.log_sum_image, first.count_image, log_inner_image, setting.gammas[0], setting.eps, xp)
    text = update(first.log_sum_text, first.count_text, log_inner_text, setting.gammas[1], setting.eps, xp)
    # Pass 2: V E2 and V^T E1.
    values = evaluate(setting, (image, text), means=(first.mean_image, first.mean_text), xp=xp)
    sums, c = sweeps.pull_back(batch, first, *values.shares), values.shares[0] + values.shares[1]
    return ContrastiveStep(
        loss=values.loss,
        surrogate=values.surrogate,
        image_gradient=wide_gradient(sums.image_pull, c, text_features, xp, values.unit),
        text_gradient=wide_gradient(sums.text_pull, c, image_features, xp, values.unit),
        temperature_gradient=values.temperature_gradient,
        log_inner_image=image.log_inner,
        log_inner_text=text.log_inner,
    )


class Setting(NamedTuple):
    """The checked options of a step: one of each per direction, in the dtype that losses are computed in."""

    batch_size: int
    work: Any  # dtype of the products
    temperature: PerAnchor  # as it was given, in the dtype of the products
    temperatures: tuple[Array, Array]  # (b,) each
    gammas: tuple[Scalar, Scalar]
    anchor_weights: tuple[Scalar, Scalar]
    reference_weight: Scalar
    radius: Scalar
    eps: Scalar


def settle(
    required: dict[str, Array],
    *,
    temperature: PerAnchor,
    gamma: PerAnchor,
    reference_features: tuple[Array, Array] | None,
    reference_weight: Scalar,
    radius: Scalar,
    eps: Scalar,
    pair_mask: Array | None = None,
    anchor_weight: AnchorWeight = None,
    sides: tuple[str, str] = ("image", "text"),
    xp: Namespace | None,
) -> tuple[Namespace, Setting]:
    """Check all arguments of a step, given its features and state by name; return their namespace and the options."""
    arrays = required | optional_arrays(
        temperature=temperature,
        gamma=gamma,
        reference_features=reference_features,
        reference_weight=reference_weight,
        radius=radius,
        eps=eps,
        pair_mask=pair_mask,
        anchor_weight=anchor_weight,
        sides=sides,
    )
    xp = namespace_of(arrays, xp)
    batch_size = check_features(arrays, xp, sides=sides)
    states = [f"log_inner_{side}" for side in sides]
    for name in states:
        check_state(name, arrays[name], batch_size, xp)
    features = arrays[f"{sides[0]}_features"]
    work = work_dtype(features, reference_features, xp)
    wide = xp.result_type(work, *(arrays[name].dtype for name in states))
    anchors: dict[str, Any] = {"per_anchor": batch_size, "sides": sides}
    temperature = option("temperature", temperature, positive, "be > 0", work, xp, **anchors)
    gamma = option("gamma", gamma, in_unit_interval, "be in (0, 1]", wide, xp, **anchors)
    anchor_weights = check_anchor_weight(anchor_weight, batch_size, wide, xp)
    reference_weight = option("reference_weight", reference_weight, _validate.not_negative, "be >= 0", work, xp)
    radius = option("radius", radius, _validate.not_negative, "be >= 0", wide, xp)
    eps = option("eps", eps, _validate.not_negative, "be >= 0", wide, xp)
    check_pair_mask(pair_mask, batch_size, xp)

    gammas = gamma if isinstance(gamma, tuple) else (gamma, gamma)
    return xp, Setting(
        batch_size=batch_size,
        work=work,
        temperature=temperature,
        temperatures=per_anchor(temperature, features, wide, xp),
        gammas=gammas,
        anchor_weights=anchor_weights,
        reference_weight=reference_weight,
        radius=radius,
        eps=eps,
    )


class Side(NamedTuple):
    """One direction's anchors after the update; all (b,)."""

    log_inner: Array  # log u, in the state's dtype
    log_value: Array  # L = log(eps + u)
    log_weight: Array  # log(g / (eps + u)): of the sum of its weights
    active: Array  # has a negative


def update(log_sum: Array, count: Array, log_inner: Array, gamma: Scalar, eps: Scalar, xp: Namespace) -> Side:
    """Average the batch's own estimate, the mean over its negatives, into the state: in the log domain."""
    old = xp.astype(log_inner, xp.result_type(log_sum.dtype, log_inner.dtype))
    log_sum, count = xp.astype(log_sum, old.dtype), xp.astype(count, old.dtype)
    active = count > 0
    log_count = xp.log(xp.where(active, count, xp.ones_like(count)))
    # An anchor without negatives is given u = 1 in between, so that nothing infinite is subtracted later.
    own = xp.where(active, log_sum - log_count, xp.zeros_like(log_sum))
    old = xp.where(active, old, xp.zeros_like(old))
    new = log_moving_average(old, own, gamma, xp=xp)
    log_value = log_add_constant(new, eps, xp=xp)
    # log(g / (eps + u)) as log(g / u) - log(1 + eps / u): a difference of two large logarithms has lost its digits.
    log_weight = log_share_of_new(old, own, gamma, xp=xp)
    if not (isinstance(eps, float) and eps == 0.0):
        log_eps = math.log(eps) if isinstance(eps, float) else log(eps, xp=xp)
        log_weight = log_weight - xp.logaddexp(xp.zeros_like(new), log_eps - new)
    kept = xp.where(active, xp.astype(new, log_inner.dtype), log_inner)
    return Side(kept, log_value, log_weight, active)


class Values(NamedTuple):
    """Everything of a step that has one number per anchor, or one in all."""

    loss: Array
    surrogate: Array
    temperature_gradient: Array | tuple[Array, Array]
    shares: tuple[Array, Array]  # (b,) the sums of each anchor's weights, as shares of `unit`; together at most 1
    unit: Array  # ()


def evaluate(setting: Setting, sides: tuple[Side, Side], *, means: tuple[Array, Array], xp: Namespace) -> Values:
    """Return losses, the temperature's gradient and sums of weights, given both directions' means of D."""
    temperatures, scale = setting.temperatures, 1.0 / (2.0 * setting.batch_size)
    wide = temperatures[0].dtype
    loss, ratio, slopes, weights = [], [], [], []
    for side, temperature, factor, mean in zip(sides, temperatures, setting.anchor_weights, means, strict=True):
        zero = xp.zeros_like(side.log_value)
        value = xp.where(side.active, side.log_value + setting.radius, zero)
        weight = xp.where(side.active, xp.exp(side.log_weight), zero)  # g / (eps + u)
        # The anchor's factor comes last: what it multiplies has cancelled by then.
        loss.append(xp.sum(factor * (scale * _pairs.saturated(value, temperature, xp=xp))))
        ratio.append(xp.sum(factor * (scale * _pairs.saturated(weight, temperature, xp=xp))))
        slopes.append(factor * (scale * (value - weight * xp.astype(mean, wide))))
        weights.append(xp.clip(factor * weight, max=float(xp.finfo(wide).max)))
    is_pair, (shares, unit) = isinstance(setting.temperature, tuple), in_shares(weights, setting.work, xp)
    return Values(
        loss=loss[0] + loss[1],
        surrogate=loss[0] + loss[1] + (ratio[0] + ratio[1]),
        temperature_gradient=(slopes[0], slopes[1]) if is_pair else xp.sum(slopes[0]) + xp.sum(slopes[1]),
        shares=shares,
        unit=unit,
    )


def in_shares(weights: list[Array], dtype: Any, xp: Namespace) -> tuple[tuple[Array, Array], Array]:
    """Return both directions' sums of weights, divided by 2b and by the largest of them, and that largest one.

    In this range no half type overflows or loses them.
    """
    top = xp.maximum(xp.max(weights[0]), xp.max(weights[1]))
    top = xp.where(top > 0, top, xp.ones_like(top))
    scale = 1.0 / (2.0 * weights[0].shape[0])
    image, text = (xp.astype(scale * (weight / top), dtype, copy=False) for weight in weights)
    return (image, text), xp.astype(top, dtype, copy=False)


def wide_gradient(pull: Array, c: Array, features: Array, xp: Namespace, *factors: Scalar) -> Array:
    """Return ``pull - c * features`` times the factors, in the dtype of `pull`.

    It is the attraction to the negatives' features, less that to the positive's. Factors are taken one by one: their
    product may be too large for the dtype where the gradient is not.
    """
    if not traced(xp) and is_writeable_array(pull):
        # Into what the sweep made, some rows at a time: at b = 65,536 this spares 400 MB.
        size = pull.shape[0]
        for start in range(0, size, ROWS):
            rows = slice(start, min(start + ROWS, size))
            pull[rows, :] -= c[rows][:, None] * xp.astype(features[rows, :], pull.dtype, copy=False)
    else:
        pull = pull - c[:, None] * xp.astype(features, pull.dtype, copy=False)
    for factor in factors:
        pull *= factor
    return pull


def gradient(pull: Array, c: Array, features: Array, xp: Namespace, *factors: Scalar) -> Array:
    """Return `wide_gradient` in the features' dtype."""
    return xp.astype(wide_gradient(pull, c, features, xp, *factors), features.dtype, copy=False)


class PlainSweeps:
    """The two sweeps in the standard's own operations; see `drrho_core._fused.Sweeps`."""

    def __init__(self, temperature: PerAnchor, tile_size: int | None, memory_budget: int | None, xp: Namespace) -> None:
        self._temperature, self._tile_size, self._memory_budget = temperature, tile_size, memory_budget
        self._xp = xp

    def declines(self, _batch: Batch, _mode: str, /) -> str | None:
        """Take every batch."""
        return None

    def sum_negatives(self, batch: Batch, /) -> FirstSweep:
        """Sweep once over all pairs, for the log-sum-exps."""
        xp = self._xp
        pairs = prepare(
            batch.image_features,
            batch.text_features,
            temperature=self._temperature,
            reference_features=batch.reference_features,
            reference_weight=batch.reference_weight,
            pair_mask=batch.pair_mask,
            tile_size=self._tile_size,
            memory_budget=self._memory_budget,
            xp=xp,
        )
        *sides, positive = _pairs.sum_negatives(pairs)
        facts = [
            directed(negatives, positive, rate, xp=xp)
            for negatives, rate in zip(sides, pairs.scaling.rates, strict=True)
        ]
        (log_sum_image, mean_image), (log_sum_text, mean_text) = facts
        return FirstSweep(
            log_sum_image=log_sum_image,
            log_sum_text=log_sum_text,
            mean_image=mean_image,
            mean_text=mean_text,
            count_image=sides[0].count,
            count_text=sides[1].count,
            saved=(pairs, (sides[0], sides[1])),
        )

    def pull_back(self, _batch: Batch, first: FirstSweep, weight_image: Array, weight_text: Array, /) -> SecondSweep:
        """Sweep again, for the weighted sums of features."""
        pairs, negatives = first.saved
        return SecondSweep(*_pairs.weigh(pairs, negatives, weight_image, weight_text))


def directed(negatives: _pairs.Negatives, positive: Array, rate: Scalar, *, xp: Namespace) -> tuple[Array, Array]:
    """Return ``log sum exp(D)`` and the mean of D (b,), -inf and 0 without negatives."""
    above = _pairs.above(negatives, positive, rate, xp=xp)
    return above + log(negatives.total, xp=xp), above + negatives.mean


def find_sweeps(
    batch: Batch, temperature: PerAnchor, tile_size: int | None, memory_budget: int | None, xp: Namespace
) -> Sweeps:
    """Return the library's own kernels where they are wanted and apply, else the plain sweeps."""
    kernels = find_kernels(batch, xp)
    return PlainSweeps(temperature, tile_size, memory_budget, xp) if kernels is None else kernels


def prepare(
    image_features: Array,
    text_features: Array,
    *,
    temperature: PerAnchor = 1.0,
    reference_features: tuple[Array, Array] | None = None,
    reference_weight: Scalar = 1.0,
    pair_mask: Array | None = None,
    tile_size: int | None = None,
    memory_budget: int | None = None,
    matrices: int = 1,
    sweeps: int = 2,
    share: bool = True,
    margin: Scalar | None = None,
    xp: Namespace,
) -> _pairs.Pairs:
    """Cast half types to float32 and split Z into tiles.

    The `matrices` of a step share one memory budget; each tile is read in so many `sweeps`. See `_pairs.Pairs` about
    `share`, `find_scaling` about `margin`.
    """
    dtype = work_dtype(image_features, reference_features, xp)
    images, texts = (xp.astype(features, dtype, copy=False) for features in (image_features, text_features))
    reference = None
    if reference_features is not None:
        reference = (
            xp.astype(reference_features[0], dtype, copy=False),
            xp.astype(reference_features[1], dtype, copy=False),
        )
    temperature = cast(temperature, dtype, xp)
    inputs = [images, texts, *(reference or ()), reference_weight, margin]
    inputs += temperature if isinstance(temperature, tuple) else [temperature]
    seen = all(values_visible(x, xp) for x in inputs if is_array(x))
    side, keep = _pairs.tiling(int(images.shape[0]), matrices * xp.finfo(dtype).bits // 8, tile_size, memory_budget)
    return _pairs.Pairs(
        images,
        texts,
        reference_features=reference,
        reference_weight=reference_weight,
        scaling=find_scaling(images, texts, reference, reference_weight, temperature, margin, seen, xp),
        pair_mask=pair_mask,
        side=side,
        keep=keep and sweeps > 1,
        share=share and seen and (pair_mask is None or values_visible(pair_mask, xp)),
        xp=xp,
    )


def find_scaling(
    images: Array,
    texts: Array,
    reference: tuple[Array, Array] | None,
    reference_weight: Scalar,
    temperature: PerAnchor,
    margin: Scalar | None,
    seen: bool,
    xp: Namespace,
) -> Scaling:
    """Return factors of the features, usually 1, with which no entry of Z overflows, and the rates of all anchors.

    With a `margin`, sums of Z and margin do not overflow either, nor do their products with the features.
    """
    finfo = xp.finfo(images.dtype)
    largest, smallest = float(finfo.max), 4.0 * float(finfo.smallest_normal)
    width = float(images.shape[1] + (0 if reference is None else reference[0].shape[1]))
    if not seen and not traced(xp):  # a look would wait for the device: features are taken to be of a usual size
        return Scaling(1.0, 1.0, *_rates(temperature, 1e4, largest, smallest, xp))

    # A bound on |Z|: the largest entries of both factors.
    sizes = [_largest(images, seen, xp), _largest(texts, seen, xp)]
    if reference is not None:
        weight = float(reference_weight) if seen else reference_weight
        own = None if seen else images[:1, :1]
        sizes[0] = _larger(sizes[0], weight * _largest(reference[0], seen, xp, own), xp)
        sizes[1] = _larger(sizes[1], _largest(reference[1], seen, xp, own), xp)
    reach = sizes[0] * sizes[1] * width
    room = reach
    if margin is not None:
        margin = float(margin) if seen else margin
        room = (reach + margin) * _larger(1.0, _larger(sizes[0], sizes[1], xp), xp) * float(images.shape[0])
    if seen:
        fits = room <= largest / 8.0
        units = [1.0, 1.0] if fits else _units(sizes, margin, largest, smallest, xp)
        if not isinstance(temperature, (tuple, float)):
            temperature = float(temperature)
    else:
        fits = ~(room > largest / 8.0)  # asked this way round, a feature that is nan reaches its own anchors only
        units = [xp.where(fits, 1.0, unit) for unit in _units(sizes, margin, largest, smallest, xp)]
    left, right = 1.0 / units[0], 1.0 / units[1]
    if isinstance(temperature, tuple):
        rest: PerAnchor = (temperature[0] * left * right, temperature[1] * left * right)
    else:
        rest = temperature * left * right
    return Scaling(left, right, *_rates(rest, reach if seen and fits else None, largest, smallest, xp))


def _largest(x: Array, seen: bool, xp: Namespace, traced_too: Array | None = None) -> Any:
    """Return the largest absolute value, a float if values can be seen."""
    if 0 in x.shape:
        return 0.0 if seen else xp.zeros((), dtype=x.dtype)
    if seen:
        return max(float(xp.max(x)), -float(xp.min(x)))
    size = xp.abs(x)
    if traced_too is not None:
        # Reference features may be constants of the traced function. XLA would take seconds to reduce them while it
        # compiles; it does not where the result depends on an argument.
        size = size + xp.zeros_like(x[:1, :1]) * traced_too
    return xp.max(size)


def _larger(one: Any, other: Any, xp: Namespace) -> Any:
    if isinstance(one, float):
        return max(one, other) if isinstance(other, float) else xp.clip(other, min=one)
    return xp.maximum(one, other)


def _units(sizes: list[Any], margin: Any, largest: float, smallest: float, xp: Namespace) -> list[Any]:
    """Return what to divide both factors by, so that the entries of Z, and the margin, are of size 1."""
    one, other = (_larger(smallest, size, xp) for size in sizes)
    if margin is not None:
        one = one * _larger(1.0, margin / one / other, xp)
    return [min(one, largest / 8.0) if isinstance(one, float) else xp.clip(one, max=largest / 8.0), other]


def _rates(temperature: PerAnchor, reach: float | None, largest: float, smallest: float, xp: Namespace) -> Any:
    """Return both directions' rates 1 / t, as large as can be represented, and floors of differences of Z.

    No floors are needed if one temperature times `reach`, the largest |Z|, is known not to overflow.
    """
    if isinstance(temperature, float):
        rate = 1.0 / min(max(temperature, smallest), 4.0 / smallest)  # no subnormal number: some compilers flush them
        floor = None
        if reach is None or reach * rate > largest / 8.0:
            floor = -largest / 4.0 * min(1.0 / rate, 1.0)
        return (rate, rate), (floor, floor)
    pair = temperature if isinstance(temperature, tuple) else (temperature, temperature)
    kept = [xp.clip(t, min=smallest, max=4.0 / smallest) for t in pair]
    floors = [xp.clip(t, max=1.0) * (-largest / 4.0) for t in kept]
    return (1.0 / kept[0], 1.0 / kept[1]), (floors[0], floors[1])


def check_features(arrays: dict[str, Array], xp: Namespace, *, sides: tuple[str, str] = ("image", "text")) -> int:
    """Check what every contrastive objective asks of its features; return the batch size."""
    _validate.detached(arrays, xp)
    _validate.same_device(arrays, xp)
    features = {name: array for name, array in arrays.items() if "features" in name}
    for name, array in features.items():
        _validate.floating(name, array, xp)
        _validate.ndim(name, array, 2, "(batch_size, feature_dim)")
    first, second = (f"{side}_features" for side in sides)
    references = {name: array for name, array in features.items() if name.startswith("reference")}
    _validate.same_dtype({name: features[name] for name in (first, second)})
    if references:
        _validate.same_dtype(references)
    batch_size, feature_dim = features[first].shape
    if batch_size < 2:
        raise ValueError(f"{first} must hold at least 2 pairs, because one has no negatives, got {batch_size}")
    _validate.shape(second, features[second], (batch_size, feature_dim), "(batch_size, feature_dim)")
    if "reference_features[0]" in features:
        width = features["reference_features[0]"].shape[1]
        for name in ("reference_features[0]", "reference_features[1]"):
            _validate.shape(name, features[name], (batch_size, width), "(batch_size, reference_dim)")
    for name, array in features.items():
        _validate.finite(name, array, xp)
    return int(batch_size)


def optional_arrays(
    *,
    temperature: Any = None,
    gamma: Any = None,
    reference_features: Any = None,
    reference_weight: Any = None,
    radius: Any = None,
    eps: Any = None,
    pair_mask: Any = None,
    anchor_weight: Any = None,
    sides: tuple[str, str] = ("image", "text"),
) -> dict[str, Array]:
    """Return the arrays among the options by name, members of pairs as ``name[0]`` and ``name[1]``."""
    arrays: dict[str, Array] = {}
    if reference_features is not None:
        if not isinstance(reference_features, (tuple, list)) or len(reference_features) != 2:
            pair, received = ", ".join(sides), _validate.describe(reference_features)
            raise TypeError(f"reference_features must be a pair ({pair}) of arrays, got {received}")
        arrays |= {f"reference_features[{side}]": array for side, array in enumerate(reference_features)}
    if pair_mask is not None:
        arrays["pair_mask"] = pair_mask
    options = {
        "temperature": temperature, "gamma": gamma, "anchor_weight": anchor_weight,
        "reference_weight": reference_weight, "radius": radius, "eps": eps,
    }  # fmt: skip
    for name, value in options.items():
        is_pair = isinstance(value, (tuple, list))
        members = {f"{name}[{side}]": member for side, member in enumerate(value)} if is_pair else {name: value}
        arrays |= {label: member for label, member in members.items() if is_array(member)}
    return arrays


def work_dtype(features: Array, reference_features: tuple[Array, Array] | None, xp: Namespace) -> Any:
    """Return the dtype of products: that of the features and of the reference features, float32 at least."""
    dtype = features.dtype
    if reference_features is not None and reference_features[0].dtype != dtype:
        dtype = xp.result_type(dtype, reference_features[0].dtype)
    return wide_dtype(dtype, xp)


def check_pair_mask(pair_mask: Array | None, batch_size: int, xp: Namespace) -> None:
    """Check the mask of negatives, if there is one."""
    if pair_mask is not None:
        _validate.shape("pair_mask", pair_mask, (batch_size, batch_size), "(batch_size, batch_size)")
        if pair_mask.dtype != xp.bool:
            raise TypeError(f"pair_mask must have dtype bool, got {pair_mask.dtype}")


def check_anchor_weight(anchor_weight: Any, batch_size: int, dtype: Any, xp: Namespace) -> tuple[Scalar, Scalar]:
    """Check the factors on the anchors and return those of both directions in a dtype; 1.0 for none."""
    if anchor_weight is None:
        return 1.0, 1.0
    is_pair = isinstance(anchor_weight, (tuple, list))
    both = tuple(anchor_weight) if is_pair else (anchor_weight,)
    if is_pair and len(both) != 2:
        raise ValueError(f"anchor_weight must be an array or a pair of arrays, got {len(both)} entries")
    for position, weight in enumerate(both):
        name = f"anchor_weight[{position}]" if is_pair else "anchor_weight"
        if not is_array(weight):
            raise TypeError(f"{name} must be an array of shape (batch_size,), got {_validate.describe(weight)}")
        _validate.floating(name, weight, xp)
        _validate.shape(name, weight, (batch_size,), "(batch_size,)")
        _validate.parameter_values(name, weight, _validate.not_negative, "be finite and >= 0", dtype, xp)
    checked = _validate.within(cast(both, dtype, xp), _validate.not_negative, xp)
    return checked[0], checked[-1]


def check_state(name: str, log_inner: Array, batch_size: int, xp: Namespace) -> None:
    """Check one direction's rows of the estimator's state."""
    _validate.state_dtype(name, log_inner, xp)
    _validate.shape(name, log_inner, (batch_size,), "(batch_size,)")
    _validate.values(name, log_inner, lambda x: x < xp.inf, "be finite, or -inf for never visited", xp)


def option(
    name: str,
    value: Any,
    holds: Callable[[Any], Any],
    rule: str,
    dtype: Any,
    xp: Namespace,
    *,
    per_anchor: int | None = None,
    sides: tuple[str, str] = ("image", "text"),
) -> Any:
    """Check an option and return it in a dtype; under tracing an array is nan outside its domain. See `parameter`."""
    checked = _validate.parameter(name, value, holds, rule, xp, per_anchor=per_anchor, sides=sides, dtype=dtype)
    return _validate.within(cast(checked, dtype, xp), holds, xp)


def cast(value: Any, dtype: Any, xp: Namespace) -> Any:
    """Give an array, or each of a pair, a dtype; numbers stay numbers, which promote nothing."""
    if isinstance(value, tuple):
        return tuple(cast(member, dtype, xp) for member in value)
    return value if isinstance(value, float) else xp.astype(value, dtype)


def per_anchor(value: Any, like: Array, dtype: Any, xp: Namespace) -> tuple[Array, Array]:
    """Return one array (b,) for the image anchors and one for the text anchors from a scalar or such a pair."""
    shape, device = (like.shape[0],), device_of(like)

    def spread(side: Any) -> Array:
        if isinstance(side, float):
            return xp.full(shape, side, dtype=dtype, device=device)
        return xp.broadcast_to(xp.astype(side, dtype), shape)

    if isinstance(value, tuple):
        return spread(value[0]), spread(value[1])
    both = spread(value)
    return both, both


def positive(x: Any) -> Any:
    """Say whether x > 0, for numbers and arrays."""
    return x > 0


def in_unit_interval(x: Any) -> Any:
    """Say whether 0 < x <= 1, for numbers and arrays."""
    # `&` for arrays; the comparison of Python numbers gives bools, for which it is `and`.
    return (x > 0) & (x <= 1)
