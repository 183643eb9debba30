"""The part of a step that computes one number per anchor: inner estimates, losses and sums of weights, all (b,).

    D_ij    = (Z_ij - Z_ii) / t_i                             Z: excess similarities, t_i: temperature
    log g_i = log sum_j exp(D_ij) - log N_i                   the batch's own estimate, N_i negatives
    u_i    <- (1 - gamma) u_i + gamma g_i                     SogCLR's moving average; first visit: u_i <- g_i
    L_i     = log(eps + u_i),   sum_j w_ij = g_i / (eps + u_i)
    loss    = (1 / 2b) sum_i t_i (L_i + radius) + the same for text anchors
    dt_i    = (1 / 2b) (L_i + radius - sum_j w_ij D_ij)

The sums of exp(D) and of w D over the negatives j come from the two passes over all pairs of the batch. w_ij is the
weight of negative j. Only logarithms of g and u are computed and stored, because g and u themselves may overflow. See
docs/theory/contrastive.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

from drrho_core._array_api import Array, Namespace, Scalar
from drrho_core.contrastive.options import StepOptions
from drrho_core.contrastive.ranks import Ranks, largest_on_ranks, summed_over_ranks
from drrho_core.contrastive.scaling import saturated
from drrho_core.numerics import log, log_add_constant, log_moving_average, log_share_of_new

Step = TypeVar("Step", bound=tuple[Any, ...])


class Anchors(NamedTuple):
    """The anchors of one direction after the update of their inner estimates; all arrays are (b,)."""

    log_inner: Array  # log u, in the state's dtype
    log_value: Array  # L = log(eps + u)
    log_weight_sum: Array  # log(g / (eps + u))
    active: Array  # whether the anchor has a negative


def update(log_sum: Array, count: Array, log_inner: Array, gamma: Scalar, eps: Scalar, xp: Namespace) -> Anchors:
    """Update the inner estimates u with the batch's own estimates g = exp(log_sum) / count of the negatives."""
    old = xp.astype(log_inner, xp.result_type(log_sum.dtype, log_inner.dtype))
    log_sum, count = xp.astype(log_sum, old.dtype), xp.astype(count, old.dtype)
    active = count > 0
    log_count = xp.log(xp.where(active, count, xp.ones_like(count)))
    # For an anchor without negatives u = g = 1 is used here, so that nothing infinite is subtracted below.
    log_g = xp.where(active, log_sum - log_count, xp.zeros_like(log_sum))
    old = xp.where(active, old, xp.zeros_like(old))
    log_u = log_moving_average(old, log_g, gamma, xp=xp)
    log_value = log_add_constant(log_u, eps, xp=xp)

    # log(g / (eps + u)) is computed as log(g / u) - log(1 + eps / u). The difference log g - log(eps + u) would have
    # few correct digits, because both logarithms may be large.
    log_weight_sum = log_share_of_new(old, log_g, gamma, xp=xp)
    if not (isinstance(eps, float) and eps == 0.0):
        log_eps = math.log(eps) if isinstance(eps, float) else log(eps, xp=xp)
        log_weight_sum = log_weight_sum - xp.logaddexp(xp.zeros_like(log_u), log_eps - log_u)
    kept = xp.where(active, xp.astype(log_u, log_inner.dtype), log_inner)
    return Anchors(kept, log_value, log_weight_sum, active)


class Evaluation(NamedTuple):
    """The loss, the surrogate (a scalar with the step's gradients), and other results that do not need pass 2."""

    loss: Array
    surrogate: Array
    temperature_gradient: Array | tuple[Array, Array]
    weight_sums: tuple[Array, Array]  # sum of each anchor's weights, (b,) per direction, divided by 2b and by `unit`
    unit: Array  # shape (), the largest sum of weights; nan unless all row ids are valid


def evaluate(
    options: StepOptions,
    anchors: tuple[Anchors, Anchors],
    *,
    means: tuple[Array, Array],
    xp: Namespace,
    ranks: Ranks | None = None,
) -> Evaluation:
    """Return the results that do not need the second pass; `means` holds sum_j w_ij D_ij / sum_j w_ij per direction.

    If the anchors are those of one of several `ranks`, the scalars of the result are those of the whole batch.
    """
    temperatures, scale = options.temperatures, 1.0 / (2.0 * options.batch_size)
    losses, ratios, slopes, weights = [], [], [], []
    for side, temperature, factor, mean in zip(anchors, temperatures, options.anchor_weights, means, strict=True):
        zero = xp.zeros_like(side.log_value)
        value = xp.where(side.active, side.log_value + options.radius, zero)
        weight = xp.where(side.active, xp.exp(side.log_weight_sum), zero)  # g / (eps + u)
        # The anchor's factor is applied last, when the large terms in the parentheses have already cancelled.
        losses.append(xp.sum(factor * (scale * saturated(value, temperature, xp=xp))))
        ratios.append(xp.sum(factor * (scale * saturated(weight, temperature, xp=xp))))
        slopes.append(factor * (scale * (value - weight * xp.astype(mean, temperature.dtype))))
        weights.append(xp.clip(factor * weight, max=float(xp.finfo(temperature.dtype).max)))
    # Temperatures per anchor have one gradient per anchor. The gradient of a global temperature is the sum of these.
    gradient: Array | tuple[Array, Array] = (slopes[0], slopes[1])
    if not isinstance(options.temperature, tuple):
        gradient = xp.sum(slopes[0]) + xp.sum(slopes[1])
    weight_sums, unit = normalised(weights, options.batch_size, options.work, xp, ranks)
    loss = losses[0] + losses[1]
    surrogate = loss + (ratios[0] + ratios[1])
    if ranks is not None and isinstance(gradient, tuple):
        loss, surrogate = summed_over_ranks(ranks, (loss, surrogate), xp)
    elif ranks is not None:
        loss, surrogate, gradient = summed_over_ranks(ranks, (loss, surrogate, gradient), xp)
    if options.valid is not None:
        # The gradients of the features are multiplied by `unit`, so they become nan without another array (b, d).
        loss, surrogate, unit = (nan_unless(options.valid, x, xp) for x in (loss, surrogate, unit))
        if isinstance(gradient, tuple):
            gradient = nan_unless(options.valid, gradient[0], xp), nan_unless(options.valid, gradient[1], xp)
        else:
            gradient = nan_unless(options.valid, gradient, xp)
    return Evaluation(
        loss=loss,
        surrogate=surrogate,
        temperature_gradient=gradient,
        weight_sums=weight_sums,
        unit=unit,
    )


def normalised(
    weight_sums: Sequence[Array], batch_size: int, dtype: Any, xp: Namespace, ranks: Ranks | None = None
) -> tuple[tuple[Array, Array], Array]:
    """Divide both directions' sums of weights by 2b and by the largest sum; return the quotients and the largest sum.

    If several ranks share a batch, b is the number of pairs on all ranks, and the largest sum is that of all ranks.

    The largest quotient is 1 / 2b. So no quotient overflows if a kernel rounds the quotients to a half type (float16 or
    bfloat16), and they do not all become 0. If all sums are 0, they are divided by 1.
    """
    image, text = weight_sums
    unit = xp.maximum(xp.max(image), xp.max(text))
    if ranks is not None:
        unit = largest_on_ranks(ranks, unit, xp)
    unit = xp.where(unit > 0, unit, xp.ones_like(unit))
    scale = 1.0 / (2.0 * batch_size)
    image = xp.astype(scale * (image / unit), dtype, copy=False)
    text = xp.astype(scale * (text / unit), dtype, copy=False)
    return (image, text), xp.astype(unit, dtype, copy=False)


def nan_unless(valid: Array, numbers: Array, xp: Namespace) -> Array:
    """Return the numbers if `valid`, of shape (), is True, else nan."""
    return xp.where(valid, numbers, float("nan"))


def with_old_unless(valid: Array, step: Step, states: tuple[Array, Array], xp: Namespace) -> Step:
    """Return a step whose estimates, the last two fields, are the old `states` unless `valid`, of shape (), is True."""
    *numbers, first, second = step
    return type(step)(*numbers, *(xp.where(valid, new, old) for new, old in zip((first, second), states, strict=True)))
