"""Solvers in closed form over sorted losses: CVaR, both chi-square sets, and both KL penalties.

With n losses x per slice, ``z = x - max x``, the temperature t, and the dual variables nu and s of `sets`, the weights
are (docs/theory/ambiguity.md, "The sets"):

    CVaR              1 / k above the quantile, the rest shared by losses equal to the quantile, k = alpha n
    KLPenalty         exp(z / t) / sum exp(z / t)
    CappedKLPenalty   min(exp((x - nu) / t), 1 / alpha) / n
    chi-square        relu(1 + (x - nu) / s) / n

A position among the sorted losses separates the losses whose weight is at the ceiling (capped losses), or the losses
with a positive weight (active losses), from all other losses. A binary search finds this position, and sums over the
losses on each side of the position give nu. Losses are compared before any shift, because the rounding of the shifted
losses would merge distinct losses.

Sources: CVaR: Rockafellar and Uryasev 2000. Chi-square: Duchi and Namkoong 2019. Capped KL: arXiv 2010.05893.
"""

from __future__ import annotations

import operator
from collections.abc import Callable

from drrho_core._array_api import Array, Namespace, known
from drrho_core._routines import descending
from drrho_core.ambiguity.balls import Ball, smallest_growth
from drrho_core.ambiguity.exponential import exponent_ratio, exponential_weights
from drrho_core.ambiguity.rounding import (
    constant,
    distance_in_units,
    in_units,
    log_one_plus,
    or_one,
    parameter_rounding,
    positive_part,
    product_minus,
    product_or_inf,
)
from drrho_core.ambiguity.search import last_active, smallest_active
from drrho_core.ambiguity.slices import (
    Slices,
    Solution,
    assemble,
    count,
    cut,
    cut_down_to,
    masked,
    masked_sum,
    mean_excess,
    sort_descending,
    totals,
)


def share_of_sample(slices: Slices, alpha: float, xp: Namespace) -> tuple[Array, Array]:
    """Return k = alpha n, at least 1, as two arrays: the nearest whole number, and k minus this number.

    A difference within the rounding error of `alpha` counts as 0, so that 0.1 of 30 losses is exactly 3.
    """
    size = slices.size
    nearest = xp.round(alpha * size)
    beyond = product_minus(max(alpha, smallest_growth()), size, nearest, slices.losses.shape[-1], xp)
    beyond = xp.where(xp.abs(beyond) <= parameter_rounding() * nearest, xp.zeros_like(beyond), beyond)
    below_one = nearest + beyond < 1
    return xp.where(below_one, xp.ones_like(nearest), nearest), xp.where(below_one, xp.zeros_like(beyond), beyond)


def solve_cvar(slices: Slices, alpha: float, xp: Namespace) -> Solution:
    """Solve CVaR. Docs: "CVaR: the worst share"."""
    x = slices.losses
    # The quantile is the ceil(k)-th largest loss; `index` counts from 0.
    nearest, beyond = share_of_sample(slices, alpha, xp)
    share = nearest + beyond
    index = xp.where(beyond > 0, nearest, nearest - 1)
    ordered = descending(x, xp)
    quantile = xp.take_along_axis(ordered, xp.astype(index, slices.number.dtype), axis=-1)
    del ordered  # it takes as much memory as the losses

    def above_and_tied(part: Slices) -> tuple[Array, Array]:
        return part.counted & (part.losses > quantile), part.counted & (part.losses == quantile)

    # The m losses above the quantile have the weight 1/k each. The losses equal to the quantile share the remaining
    # weight, (k - m)/k, equally.
    counts = [tuple(count(mask, xp) for mask in above_and_tied(part)) for part in cut(slices, xp)]
    above, tied = (xp.astype(number, x.dtype) for number in totals(counts, xp))
    rest = (nearest - above + beyond) / tied

    def weigh(part: Slices) -> tuple[Array, ...]:
        above, tied = (xp.astype(mask, x.dtype) for mask in above_and_tied(part))
        return ((above + rest * tied) / share,)

    # The dual variables are nu = quantile and s = 0.
    weights, excess, _ = assemble(slices, weigh, xp)
    return Solution(weights, excess, quantile - slices.top, xp.zeros_like(excess))


def solve_kl_penalty(slices: Slices, temperature: float, xp: Namespace) -> Solution:
    """Solve KLPenalty: ``risk - max x = t log mean exp(z / t)``. Docs: "KLPenalty and KLBall: the soft maximum"."""
    t, unit = in_units(temperature, slices.losses, xp)
    temperatures = xp.full_like(slices.top, t)

    def exponents(part: Slices) -> tuple[Array, Array]:
        return exponent_ratio(-distance_in_units(-part.shifted, unit, xp), temperatures, xp), part.counted

    weights, _, log_mean = exponential_weights(slices, exponents, xp)
    # If the temperature is far larger than all differences between losses, the exponents lose digits to underflow. Then
    # the mean is exact enough.
    reach = distance_in_units(slices.top - xp.min(slices.losses, axis=-1, keepdims=True), unit, xp)
    flat = reach <= t * (float(xp.finfo(reach.dtype).eps) / 4)
    excess = xp.where(flat, mean_excess(slices, xp), t * log_mean * unit)
    # The dual variable nu equals the risk.
    return Solution(weights, excess, excess, constant(temperature, excess, xp))


def solve_capped_kl_penalty(slices: Slices, temperature: float, alpha: float, xp: Namespace) -> Solution:
    """Solve CappedKLPenalty. Docs: "CappedKLPenalty: a soft maximum with a ceiling".

    The weights are given by ``k p = min(exp((x - theta) / t), 1)`` with k = alpha n, and theta such that k p sums to k.
    A loss is capped if its weight is at the ceiling, and free otherwise. To test a loss, set theta to this loss: the
    loss is capped if k p then sums to less than k. The sum is the number of losses that are not below this loss, plus
    ``sum exp((x - loss) / t)`` over the losses below it.

    With m capped losses, a the largest free loss and ``S = sum exp((x - a) / t)`` over the free losses:

        theta = a + t log(S / (k - m))
        nu    = theta - t log(n / k) = a + t log(S / (n - m)) + t log(1 + m (n - k) / (n (k - m)))
        risk  = nu + sum (x - theta) / k over the capped losses

    The three terms of the last form of nu do not cancel if t is large.
    """
    x, size = slices.losses, slices.size
    t, unit = in_units(temperature, x, xp)
    # A piece of the sorted losses is skipped if all its exponentials are below 1e-43. The sum of k p is at least 1, and
    # such small terms do not change this sum.
    far = min(100 * t * unit, float(xp.finfo(x.dtype).max) / 4)
    bottom = xp.min(x, axis=-1, keepdims=True)

    def exponents(part: Slices, anchor: Array) -> Array:
        distance = distance_in_units(positive_part(anchor - part.losses, xp), unit, xp)
        return exponent_ratio(-distance, xp.full_like(anchor, t), xp)

    # If t exceeds all differences between losses, a wrong m would change the risk by t times a rounding error. In this
    # case ``sum (1 - exp)`` is compared with n - k, which keeps the digits. In all other cases ``sum exp`` is compared
    # with k - m.
    reach = distance_in_units(slices.top - bottom, unit, xp)
    close, apart = known(reach <= t, xp), known(reach > t, xp)

    def term(exponent: Array) -> Array:
        if close or apart:
            return xp.expm1(exponent) if close else xp.exp(exponent)
        return xp.where(reach <= t, xp.expm1(exponent), xp.exp(exponent))

    def is_capped(ordered: Slices, loss: Array) -> Array:
        whole, beyond = share_of_sample(ordered, alpha, xp)
        rows: list[tuple[Array, ...]] = []
        for part in cut_down_to(ordered, loss - far, xp):
            below = part.counted & (part.losses < loss)
            rows.append((count(part.counted & ~below, xp), masked_sum(term(exponents(part, loss)), below, xp)))
        number, others = totals(rows, xp)
        room = (whole - xp.where(reach <= t, ordered.size, xp.astype(number, x.dtype))) + beyond
        # If k = n, all losses above the smallest are capped. Underflow would hide this if t is large.
        all_capped = (whole >= ordered.size) & (beyond >= 0) & (loss > bottom)
        return all_capped | (others < room)

    # Step 1: the number m of capped losses, the lowest capped loss and the largest free loss a (`anchor`).
    ordered = sort_descending(slices, xp)
    position = last_active(ordered, lambda part, loss: (loss == part.top) | is_capped(part, loss), xp)
    any_capped = is_capped(ordered, slices.top)
    lowest = xp.take_along_axis(ordered.losses, position, axis=-1)
    capped = xp.where(any_capped, position + 1, xp.zeros_like(position))
    anchor = xp.take_along_axis(ordered.losses, xp.minimum(capped, slices.number - 1), axis=-1)

    def masks(part: Slices) -> tuple[Array, Array]:
        above = part.counted & any_capped & (part.losses >= lowest)
        return above, part.counted & ~above

    # Step 2: S (`total`) and S - (n - m) (`change`). `change` keeps its digits if all exponents are near 0.
    rows: list[tuple[Array, ...]] = []
    for part in cut(ordered, xp):
        exponent, (_, free) = exponents(part, anchor), masks(part)
        rows.append((masked_sum(xp.exp(exponent), free, xp), masked_sum(xp.expm1(exponent), free, xp)))
    total, change = totals(rows, xp)
    del ordered

    # Step 3: theta - a = t log(S / (k - m)). The clip keeps theta between a and the lowest capped loss despite
    # rounding.
    whole, beyond = share_of_sample(slices, alpha, xp)
    share, number = whole + beyond, xp.astype(capped, x.dtype)
    left, missing = (whole - number) + beyond, (size - whole) - beyond  # k - m, n - k
    furthest = -exponents(slices._replace(losses=anchor), lowest)
    log_rise = xp.clip(log_one_plus((change + missing) / left, total / left, xp), min=0.0, max=furthest)
    rise = t * xp.where(any_capped, log_rise, 0.0) * unit

    # Step 4: the weights. The free losses share the weight 1 - m/k in proportion to their exponentials. If no loss is
    # capped, the weights do not depend on alpha at all, not even by a rounding error.
    factor = xp.where(any_capped, left / total / share, 1 / total)

    def weigh(part: Slices) -> tuple[Array, ...]:
        above, free = masks(part)
        free_weights = masked(xp.exp(exponents(part, anchor)), free, xp) * factor
        height = masked(positive_part(part.losses - anchor, xp) - rise, above, xp) / share
        return free_weights + xp.astype(above, x.dtype) / share, height

    # Step 5: nu and the risk, by the formulas above.
    weights, _, (height,) = assemble(slices, weigh, xp)
    log_mean = log_one_plus(change / (size - number), total / (size - number), xp)
    nu = (anchor - slices.top) + t * (log_mean + xp.log1p(number / size * (missing / left))) * unit
    # As in KLPenalty, the mean is exact enough if the temperature is far larger than all differences between losses.
    flat = reach <= t * (float(xp.finfo(x.dtype).eps) / 4)
    mean = mean_excess(slices, xp)
    excess = xp.where(flat, mean, nu + height)
    nu = xp.where(flat & ~any_capped, mean, nu)
    return Solution(weights, excess, nu, constant(temperature, excess, xp))


def solve_chi_square_penalty(slices: Slices, strength: float, xp: Namespace) -> Solution:
    """Solve ChiSquarePenalty. Docs: "ChiSquareBall and ChiSquarePenalty".

    The weights are given by ``n p = relu(1 + tilt)`` with ``tilt = (lift + z) / s`` and ``lift = top - nu``, such that
    p sums to 1. A loss is active if its weight is positive. With m active losses, ``m lift = (n - m) s - sum z``, where
    the sum is over the active losses. To test a loss, choose nu such that its weight just becomes 0: the loss is active
    if p then sums to less than 1, ``mean relu(x - loss) < s``.
    """
    x, size = slices.losses, slices.size
    s, unit = in_units(strength, x, xp)

    def is_active(ordered: Slices, loss: Array) -> Array:
        heights = [
            (masked_sum(distance_in_units(positive_part(part.losses - loss, xp), unit, xp), part.counted, xp),)
            for part in cut_down_to(ordered, loss, xp)
        ]
        return totals(heights, xp)[0] / ordered.size < s

    def active_and_depth(part: Slices) -> tuple[Array, Array]:
        return part.counted & (part.losses >= lowest), -distance_in_units(-part.shifted, unit, xp)

    # Step 1: the lowest active loss, the number m of active losses and the sum of z over them give the lift.
    lowest = smallest_active(sort_descending(slices, xp), is_active, xp)
    rows = []
    for part in cut(slices, xp):
        active, z = active_and_depth(part)
        rows.append((count(active, xp), masked_sum(z, active, xp)))
    number, depth = totals(rows, xp)
    number = xp.astype(number, x.dtype)
    lift = ((size - number) * s - depth) / number

    # Step 2: the weights, and ``risk = sum p x - s D(p)`` with ``D(p) = mean tilt^2 / 2``. At weight 0 the tilt is -1.
    def weigh(part: Slices) -> tuple[Array, ...]:
        active, z = active_and_depth(part)
        tilt = xp.where(active, lift + z, -s) / s
        values = masked(positive_part(1 + tilt, xp), active, xp)
        return values, values, masked(tilt**2, part.counted, xp)

    values, excess, (total, squares) = assemble(slices, weigh, xp)  # the total is n, except for rounding
    excess = excess / total - s * (squares / (2 * size)) * unit
    return Solution(values / total, excess, -lift * unit, constant(strength, excess, xp))


def solve_chi_square_ball(slices: Slices, ball: Ball, xp: Namespace) -> Solution:
    """Solve ChiSquareBall between its two limits. Docs: "ChiSquareBall and ChiSquarePenalty".

    The weights are ``p = relu(c + z) / sum relu(c + z)`` with c such that ``n sum p^2 = 1 + growth``. A loss is active
    if its weight is positive. With m active losses, whose z have the mean mu and the variance v,
    ``n sum p^2 = (n/m) (1 + v / (c + mu)^2)``, so ``c + mu = sqrt(n v / room)`` with ``room = (1 + growth) m - n``. To
    test a loss, choose c such that its weight just becomes 0: the loss is active if ``n sum p^2`` is then still too
    large, ``n v > room (mu - loss)^2``, where m, mu and v belong to the losses above this loss.
    """
    size = slices.size

    def moments(part: Slices, above: Callable[[Array, Array], Array], lowest: Array, span: Array) -> tuple[Array, ...]:
        # The span is the distance between the lowest active loss and the largest loss. A height is the distance of a
        # loss from the lowest active loss, divided by the span, so no height is extremely small or large.
        active = part.counted & above(part.losses, lowest)
        number = xp.astype(count(active, xp), part.losses.dtype)
        total = xp.clip(number, min=1)
        height = positive_part(part.losses - lowest, xp) / span
        mean = masked_sum(height, active, xp) / total
        variance = masked_sum((height - mean) ** 2, active, xp) / total
        return number, mean, variance, active, height

    def statistics(ordered: Slices, above: Callable[[Array, Array], Array], lowest: Array) -> tuple[Array, ...]:
        # The variance over all pieces is the mean of their variances plus the variance of their means.
        span = or_one(ordered.top - lowest, xp)
        pieces = [moments(part, above, lowest, span)[:3] for part in cut_down_to(ordered, lowest, xp)]
        number = xp.clip(sum(number for number, _, _ in pieces), min=1)
        mean = sum(number * mean for number, mean, _ in pieces) / number
        variance = sum(number * (variance + (own - mean) ** 2) for number, own, variance in pieces) / number
        return number, mean, variance, ball.room(number, ordered.size)

    def is_active(ordered: Slices, loss: Array) -> Array:
        # Only the losses above `loss` enter the comparison. If `loss` itself were included, the two sides of the
        # comparison would differ only in their last digits.
        _, mean, variance, room = statistics(ordered, operator.gt, loss)
        return ordered.size * variance > room * mean**2

    # Step 1: the lowest active loss, then ``c + mu`` (`reach`) in units of the span.
    ordered = sort_descending(slices, xp)
    lowest = smallest_active(ordered, is_active, xp)
    span = slices.top - lowest
    number, mean, variance, room = statistics(ordered, operator.ge, lowest)
    del ordered
    reach = xp.sqrt(size * variance / or_one(room, xp))

    # Step 2: the weights ``(1 + (x - mu) / (c + mu)) / m``.
    def weigh(part: Slices) -> tuple[Array, ...]:
        *_, active, height = moments(part, operator.ge, lowest, or_one(span, xp))
        tilt = (height - mean) / or_one(reach, xp)
        return (masked(positive_part(1 + tilt, xp), active, xp) / number,)

    # Step 3: the dual variables ``s = (c + mu) m / n`` and ``nu - top = mu - (c + mu) (n - m) / n``. The solution holds
    # this difference.
    weights, excess, _ = assemble(slices, weigh, xp)
    nu_excess = -span * (1 - mean + reach * ((size - number) / size))
    return Solution(weights, excess, nu_excess, product_or_inf(reach * (number / size), span, xp))
