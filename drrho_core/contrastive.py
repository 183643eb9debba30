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

from typing import Any, NamedTuple, TypeAlias

from drrho_core import _checks, _pairs
from drrho_core._arrays import Array, Namespace, device_of, is_array, namespace_of, wide_dtype
from drrho_core._fused import Batch, FirstSweep, SecondSweep, Sweeps
from drrho_core._fused import find as find_kernels
from drrho_core.numerics import log_add_constant, log_moving_average

Scalar: TypeAlias = float | Array
"""A number or an array of shape ()."""

PerAnchor: TypeAlias = Scalar | tuple[Array, Array]
"""A scalar, or one array (b,) for the image anchors and one for the text anchors."""


class ContrastiveStep(NamedTuple):
    """Result of `contrastive_step`.

    Attributes
    ----------
    loss : array, shape ()
        Estimate of the objective with the updated inner estimates: the curve to watch.
    surrogate : array, shape ()
        The function whose gradient this is; its value means nothing.
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
        Image and text features of the frozen reference model; r may differ from d. None: SogCLR / FastCLIP.
    reference_weight : float or array of shape ()
        lambda >= 0: 0 ignores the reference model, 1 is DRRho; may exceed 1.
    radius : float or array of shape ()
        Size of the ambiguity set, >= 0; it matters only where temperatures are learned.
    eps : float or array of shape ()
        Added to the inner estimate, >= 0. Part of the objective, not a guard: the log domain needs none.
    pair_mask : array of bool, shape (b, b), optional
        Entry (i, j) False: text j is not a negative of image i, nor image i one of text j. The diagonal never is one.
    tile_size : int, optional
        Largest side of square tiles: two passes, and no b x b array exists. How it is computed, never what.
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
        xp=xp,
    )
    temperatures = cast(setting.temperatures, wide_dtype(image_features.dtype, xp), xp)
    batch = Batch(
        image_features,
        text_features,
        reference_features,
        setting.reference_weight,
        temperatures[0],
        temperatures[1],
        pair_mask,
    )
    sweeps = find_sweeps(batch, setting.temperature, tile_size, memory_budget, xp)
    first = sweeps.sum_negatives(batch)
    image = update(first.log_sum_image, first.count_image, log_inner_image, setting.gammas[0], setting.eps, xp)
    text = update(first.log_sum_text, first.count_text, log_inner_text, setting.gammas[1], setting.eps, xp)
    sums = sweeps.pull_back(batch, first.positive, image.log_denominator, text.log_denominator)
    scale, loss, surrogate, temperature_gradient = evaluate(
        setting,
        (image, text),
        weights=(sums.weight_image, sums.weight_text),
        weighted=(sums.weighted_image, sums.weighted_text),
        xp=xp,
    )
    c = (sums.weight_image + sums.weight_text)[:, None]
    return ContrastiveStep(
        loss=loss,
        surrogate=surrogate,
        image_gradient=pull_back(sums.image_pull, c, text_features, scale, xp),
        text_gradient=pull_back(sums.text_pull, c, image_features, scale, xp),
        temperature_gradient=temperature_gradient,
        log_inner_image=image.log_inner,
        log_inner_text=text.log_inner,
    )


class Setting(NamedTuple):
    """The checked options of a step: one of each per direction, in the dtype that losses are computed in."""

    batch_size: int
    temperature: PerAnchor  # as it was given, in the dtype of the products
    temperatures: tuple[Array, Array]  # (b,) each
    gammas: tuple[Scalar, Scalar]
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
        sides=sides,
    )
    xp = namespace_of(arrays, xp)
    batch_size = check_features(arrays, xp, sides=sides)
    states = [f"log_inner_{side}" for side in sides]
    for name in states:
        check_state(name, arrays[name], batch_size, xp)
    temperature = _checks.parameter(
        "temperature", temperature, positive, "be > 0", xp, per_anchor=batch_size, sides=sides
    )
    gamma = _checks.parameter("gamma", gamma, in_unit_interval, "be in (0, 1]", xp, per_anchor=batch_size, sides=sides)
    reference_weight = _checks.parameter("reference_weight", reference_weight, _not_negative, "be >= 0", xp)
    radius = _checks.parameter("radius", radius, _not_negative, "be >= 0", xp)
    eps = _checks.parameter("eps", eps, _not_negative, "be >= 0", xp)
    if pair_mask is not None:
        _checks.shape("pair_mask", pair_mask, (batch_size, batch_size), "(batch_size, batch_size)")
        if pair_mask.dtype != xp.bool:
            raise TypeError(f"pair_mask must have dtype bool, got {pair_mask.dtype}")

    features = arrays[f"{sides[0]}_features"]
    work = wide_dtype(features.dtype, xp)
    wide = xp.result_type(work, *(arrays[name].dtype for name in states))
    gammas = gamma if isinstance(gamma, tuple) else (gamma, gamma)
    return xp, Setting(
        batch_size=batch_size,
        temperature=cast(temperature, work, xp),
        temperatures=per_anchor(temperature, features, wide, xp),
        gammas=(cast(gammas[0], wide, xp), cast(gammas[1], wide, xp)),
        reference_weight=cast(reference_weight, work, xp),
        radius=cast(radius, wide, xp),
        eps=cast(eps, wide, xp),
    )


class Side(NamedTuple):
    """One direction's anchors after the update; all (b,)."""

    log_inner: Array  # log u, in the state's dtype
    log_value: Array  # L = log(eps + u)
    log_denominator: Array  # log((eps + u) N)
    active: Array  # has a negative


def update(log_sum: Array, count: Array, log_inner: Array, gamma: Scalar, eps: Scalar, xp: Namespace) -> Side:
    """Average the batch's own estimate, the mean over its negatives, into the state: in the log domain."""
    old = xp.astype(log_inner, xp.result_type(log_sum.dtype, log_inner.dtype))
    log_sum, count = xp.astype(log_sum, old.dtype), xp.astype(count, old.dtype)
    active = count > 0
    log_count = xp.log(xp.where(active, count, xp.ones_like(count)))
    # An anchor without negatives is given u = 1 in between, so that nothing infinite is subtracted later.
    own = xp.where(active, log_sum - log_count, xp.zeros_like(log_sum))
    new = log_moving_average(xp.where(active, old, xp.zeros_like(old)), own, gamma, xp=xp)
    log_value = log_add_constant(new, eps, xp=xp)
    kept = xp.where(active, xp.astype(new, log_inner.dtype), log_inner)
    return Side(kept, log_value, log_value + log_count, active)


def evaluate(
    setting: Setting,
    sides: tuple[Side, Side],
    *,
    weights: tuple[Array, Array],
    weighted: tuple[Array, Array],
    xp: Namespace,
) -> tuple[float, Array, Array, Array | tuple[Array, Array]]:
    """Return 1/2b, the loss, the surrogate and the temperature's gradient, given both directions' sums over weights."""
    temperatures, wide = setting.temperatures, setting.temperatures[0].dtype
    scale = 1.0 / (2.0 * setting.batch_size)
    values = [xp.where(side.active, side.log_value + setting.radius, xp.zeros_like(side.log_value)) for side in sides]
    loss = scale * (xp.sum(temperatures[0] * values[0]) + xp.sum(temperatures[1] * values[1]))
    first, second = (xp.astype(side, wide) for side in weights)  # g / (eps + u)
    ratio = scale * (xp.sum(temperatures[0] * first) + xp.sum(temperatures[1] * second))
    slopes = tuple(scale * (value - xp.astype(side, wide)) for value, side in zip(values, weighted, strict=True))
    is_pair = isinstance(setting.temperature, tuple)
    return scale, loss, loss + ratio, slopes if is_pair else xp.sum(slopes[0]) + xp.sum(slopes[1])


def pull_back(pull: Array, c: Array, features: Array, scale: Scalar, xp: Namespace) -> Array:
    """Return ``scale (pull - c * features)``, what negatives and positives pull together, in the features' dtype."""
    pull -= c * xp.astype(features, pull.dtype, copy=False)  # into what the sweep made: b x d numbers less
    pull *= scale
    return xp.astype(pull, features.dtype, copy=False)


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
        self._pairs = pairs = prepare(
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
        image, text, positive = _pairs.sum_negatives(pairs)
        self._negatives = image, text
        rates = pairs.anchor_rates
        return FirstSweep(
            positive=positive,
            log_sum_image=_pairs.log_sum(image, positive, rates[0], xp=xp),
            log_sum_text=_pairs.log_sum(text, positive, rates[1], xp=xp),
            count_image=image.count,
            count_text=text.count,
        )

    def pull_back(
        self, _batch: Batch, positive: Array, log_denominator_image: Array, log_denominator_text: Array, /
    ) -> SecondSweep:
        """Sweep again, for the weighted sums."""
        xp, pairs, rates = self._xp, self._pairs, self._pairs.anchor_rates
        thresholds = [
            _pairs.threshold(positive, xp.astype(log_denominator, positive.dtype), rate)
            for log_denominator, rate in zip((log_denominator_image, log_denominator_text), rates, strict=True)
        ]
        sums = _pairs.weigh(pairs, thresholds[0], thresholds[1])
        weights = [
            _pairs.sum_of_weights(negatives, threshold, rate, xp=xp)
            for negatives, threshold, rate in zip(self._negatives, thresholds, rates, strict=True)
        ]
        return SecondSweep(
            image_pull=sums.image_pull,
            text_pull=sums.text_pull,
            weight_image=weights[0],
            weight_text=weights[1],
            weighted_image=_pairs.weighted_excess(sums.weighted_image, positive, weights[0], rates[0]),
            weighted_text=_pairs.weighted_excess(sums.weighted_text, positive, weights[1], rates[1]),
        )


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
    xp: Namespace,
) -> _pairs.Pairs:
    """Widen half types and lay out the tiles of what is one of so many `matrices` and met in so many `sweeps`.

    Their entries are logits where the temperature is global, else similarities.
    """
    dtype = wide_dtype(image_features.dtype, xp)
    scale: Scalar = 1.0
    rates = None
    if isinstance(temperature, tuple):
        rates = (1.0 / xp.astype(temperature[0], dtype), 1.0 / xp.astype(temperature[1], dtype))
    else:
        scale = 1.0 / temperature
    reference = None
    if reference_features is not None:
        reference = (
            xp.astype(reference_features[0], dtype, copy=False),
            xp.astype(reference_features[1], dtype, copy=False),
        )
    side, keep = _pairs.tiling(
        int(image_features.shape[0]), matrices * xp.finfo(dtype).bits // 8, tile_size, memory_budget
    )
    return _pairs.Pairs(
        xp.astype(image_features, dtype, copy=False),
        xp.astype(text_features, dtype, copy=False),
        reference_features=reference,
        reference_weight=reference_weight,
        scale=scale,
        rates=rates,
        pair_mask=pair_mask,
        side=side,
        keep=keep and sweeps > 1,
        xp=xp,
    )


def check_features(arrays: dict[str, Array], xp: Namespace, *, sides: tuple[str, str] = ("image", "text")) -> int:
    """Check what every contrastive objective asks of its features; return the batch size."""
    _checks.detached(arrays)
    _checks.same_device(arrays, xp)
    features = {name: array for name, array in arrays.items() if "features" in name}
    for name, array in features.items():
        _checks.floating(name, array, xp)
        _checks.ndim(name, array, 2, "(batch_size, feature_dim)")
    _checks.same_dtype(features)
    first, second = (f"{side}_features" for side in sides)
    batch_size, feature_dim = features[first].shape
    if batch_size < 2:
        raise ValueError(f"{first} must hold at least 2 pairs, because one has no negatives, got {batch_size}")
    _checks.shape(second, features[second], (batch_size, feature_dim), "(batch_size, feature_dim)")
    if "reference_features[0]" in features:
        width = features["reference_features[0]"].shape[1]
        for name in ("reference_features[0]", "reference_features[1]"):
            _checks.shape(name, features[name], (batch_size, width), "(batch_size, reference_dim)")
    for name, array in features.items():
        _checks.finite(name, array, xp)
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
    sides: tuple[str, str] = ("image", "text"),
) -> dict[str, Array]:
    """Return the arrays among the options by name, members of pairs as ``name[0]`` and ``name[1]``."""
    arrays: dict[str, Array] = {}
    if reference_features is not None:
        if not isinstance(reference_features, (tuple, list)) or len(reference_features) != 2:
            pair, received = ", ".join(sides), _checks.describe(reference_features)
            raise TypeError(f"reference_features must be a pair ({pair}) of arrays, got {received}")
        arrays |= {f"reference_features[{side}]": array for side, array in enumerate(reference_features)}
    if pair_mask is not None:
        arrays["pair_mask"] = pair_mask
    options = {
        "temperature": temperature, "gamma": gamma, "reference_weight": reference_weight, "radius": radius, "eps": eps
    }  # fmt: skip
    for name, value in options.items():
        is_pair = isinstance(value, (tuple, list))
        members = {f"{name}[{side}]": member for side, member in enumerate(value)} if is_pair else {name: value}
        arrays |= {label: member for label, member in members.items() if is_array(member)}
    return arrays


def check_state(name: str, log_inner: Array, batch_size: int, xp: Namespace) -> None:
    """Check one direction's rows of the estimator's state."""
    _checks.state_dtype(name, log_inner, xp)
    _checks.shape(name, log_inner, (batch_size,), "(batch_size,)")
    _checks.values(name, log_inner, lambda x: x < xp.inf, "be finite, or -inf for never visited", xp)


def cast(value: Any, dtype: Any, xp: Namespace) -> Any:
    """Give an array, or each of a pair, a dtype; numbers stay numbers, which promote nothing."""
    if isinstance(value, tuple):
        return tuple(xp.astype(member, dtype) for member in value)
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


def _not_negative(x: Any) -> Any:
    return x >= 0


def in_unit_interval(x: Any) -> Any:
    """Say whether 0 < x <= 1, for numbers and arrays."""
    # `&` for arrays; the comparison of Python numbers gives bools, for which it is `and`.
    return (x > 0) & (x <= 1)
