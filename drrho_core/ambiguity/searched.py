"""Solvers that search for a scale: the KL ball and the Cressie-Read balls.

With the losses x of a slice and ``z = x - max x`` the weights are (docs/theory/ambiguity.md, "The sets"):

    KLBall            exp(z / s) / sum exp(z / s)
    CressieReadBall   relu(c + z)^b / sum relu(c + z)^b,  b = 1 / (order - 1)

The scale s or the offset c is such that the divergence of the weights equals the largest divergence in the ball.
Newton's method finds the logarithm of s, or a number that determines c. All sums are taken piece by piece, and relative
to their largest terms.

Sources: Cressie-Read balls: Duchi and Namkoong 2019. DRRho risk: arXiv 2505.06699.
"""

from __future__ import annotations

import math

from drrho_core._array_api import Array, Namespace
from drrho_core.ambiguity.balls import Ball, balance, log_bound, normalise
from drrho_core.ambiguity.exponential import (
    exp_and_change,
    exponent_floor,
    exponent_ratio,
    exponential_weights,
    large_exponent,
    negligible_exponent,
)
from drrho_core.ambiguity.rounding import log_one_plus, or_one, positive_part, product_or_inf
from drrho_core.ambiguity.search import find_root, last_active
from drrho_core.ambiguity.slices import (
    Slices,
    Solution,
    count,
    cut,
    cut_down_to,
    join,
    masked_sum,
    sort_descending,
    totals,
)


def solve_kl_ball(slices: Slices, ball: Ball, xp: Namespace) -> Solution:
    """Solve KLBall between its two limits. Docs: "KLPenalty and KLBall: the soft maximum".

    The weights are ``p = softmax(z / s)``, with s such that their divergence ``sum p z / s - log mean exp(z / s)``
    equals the radius. The divergence falls as s grows. The derivative of the divergence with respect to log s is the
    variance of z / s under p, times -1.
    """
    size = slices.size
    reach = or_one(slices.top - xp.min(slices.losses, axis=-1, keepdims=True), xp)
    # If differences between losses exceed the square root of the dtype's largest number, this square root becomes the
    # unit of losses and s. Otherwise s, which may be far larger than the losses, could overflow.
    half_range = 2.0 ** round(math.log2(float(xp.finfo(reach.dtype).max)) / 2)
    unit = xp.where(reach > half_range, half_range, xp.ones_like(reach))
    reach = reach / unit
    bound = log_bound(ball, xp)
    parts = cut(slices, xp)

    def exponents(part: Slices, s: Array) -> tuple[Array, Array]:
        exponent = exponent_ratio(part.shifted / unit, s, xp)
        return exponent, part.counted & (exponent > large_exponent())

    def surplus(s: Array) -> tuple[Array, Array]:
        """Return the divergence minus the radius, and its derivative with respect to log s, times -1."""
        # The centre is the mean of the large exponents, see `large_exponent`. It is subtracted so that the terms of the
        # surplus keep their digits if the surplus is tiny, see `normalise`.
        rows: list[tuple[Array, ...]] = []
        for part in parts:
            exponent, large = exponents(part, s)
            rows.append((count(large, xp), masked_sum(exponent, large, xp)))
        number, total = totals(rows, xp)
        centre = total / xp.astype(number, total.dtype)
        # With e the exponents relative to the centre and v = exp(e), the sum of v normalises the weights. The sums of
        # v e and v e^2 lead to the mean and the second moment of e under the weights p.
        rows = []
        for part in parts:
            exponent, large = exponents(part, s)
            relative = exponent - centre
            value, change = exp_and_change(relative, large, part.counted, xp)
            first = value * relative
            sums = first, first * relative
            rows.append((change, *(xp.sum(values, axis=-1, keepdims=True) for values in sums)))
        change, first, second = totals(rows, xp)
        total, others = normalise(change, number, size, bound, xp)
        mean = first / total
        return balance(mean, others, xp), xp.clip(second / total - mean**2, min=0.0)

    def second_largest(part: Slices) -> Array:
        below = part.counted & (part.losses < slices.top)
        return xp.max(xp.where(below, part.shifted / unit, -reach), axis=-1, keepdims=True)

    # The bracket of log s. If s is below a hundredth of the gap between the two largest values, all weight is on the
    # maximum. With `reach` the difference between the largest and the smallest loss, the divergence is at most
    # (reach / s)^2 / 8, which bounds s from above.
    nearest = [second_largest(part) for part in parts]
    gap = or_one(-xp.max(join(nearest, xp), axis=-1, keepdims=True), xp)
    low = xp.log(gap) - math.log(100)
    high = xp.log(reach) - 0.5 * math.log(8 * math.log1p(ball.growth))
    at_low = surplus(xp.exp(low))[0]
    s = xp.exp(find_root(lambda log_s: surplus(xp.exp(log_s)), low, high, at_low, ball.growth, xp))
    # The search rounds log s and not s, so s may have a relative error as large as the rounding error of log s. One
    # more Newton step, on s itself, removes this error.
    value, slope = surplus(s)
    s = s * (1 + xp.clip(value / xp.clip(slope, min=1e-9), min=-1e-3, max=1e-3))
    # The dual variables are nu = s log mean exp(x / s) and s.
    weights, excess, log_mean = exponential_weights(slices, lambda part: (exponents(part, s)[0], part.counted), xp)
    return Solution(weights, excess, s * log_mean * unit, product_or_inf(s, unit, xp))


def solve_cressie_read_ball(slices: Slices, order: float, ball: Ball, xp: Namespace) -> Solution:
    """Solve CressieReadBall between its two limits. Docs: "CressieReadBall: between the sets above, and beyond".

    The weights are ``p = relu(c + z)^b / sum relu(c + z)^b`` with b = 1 / (order - 1), and c such that the divergence
    of p equals the largest divergence in the ball. Call ``relu(c + z)`` the length of a loss. The largest loss has the
    length c, so ``y = relu(c + z) / c`` is the relative length. Instead of the divergence of the ball, the search uses
    the Renyi divergence of the same order; both rise and fall together (see `balls`). With ``m = sum p y`` the Renyi
    divergence of p is ``b log m - log mean(y^b)``, and its derivative with respect to c is
    ``-b (b + 1) sum p (y / m - 1)^2 / (c y)``.

    A loss is active if its weight is positive. The unknown is log d, where d is the length of the lowest active loss.
    If b is small, the power d^b matters, however close to 0 d itself may be. Then log d may lie anywhere between -1 and
    -1e30, so the search takes its steps in arsinh(log d). Lengths are in units of the span, the difference between the
    largest loss and the lowest active loss. In these units c = 1 + d.
    """
    b = 1 / (order - 1)
    bound = log_bound(ball, xp)
    limits = xp.finfo(slices.losses.dtype)
    tiny, floor = float(limits.smallest_normal), exponent_floor(slices.losses.dtype, xp)

    def lengths(part: Slices, lowest: Array, d: Array) -> tuple[Array, ...]:
        """Return the mask of active losses, ``c + z - d``, ``y - 1`` and the mask of large exponents."""
        alone = lowest == part.top  # only the largest loss is active: then the span counts as 1, and c + z - d = 1
        span = xp.where(alone, xp.ones_like(lowest), part.top - lowest)
        height = positive_part(part.losses - lowest, xp) / span + xp.astype(alone, span.dtype)
        depth = xp.maximum(part.shifted, -span) / span / (1 + d)
        active = part.counted & (part.losses >= lowest)
        return active, height, depth, active & (depth > math.expm1(large_exponent() / b))

    def centre(ordered: Slices, lowest: Array, d: Array) -> tuple[Array, Array, Array]:
        """Return the number of losses with a large exponent, and the means of ``c + z`` and ``y - 1`` over them."""
        rows = []
        for part in cut_down_to(ordered, lowest, xp):
            _, height, depth, large = lengths(part, lowest, d)
            rows.append((count(large, xp), masked_sum(height + d, large, xp), masked_sum(depth, large, xp)))
        number, middle, middle_depth = totals(rows, xp)
        total = xp.astype(number, middle.dtype)
        return number, middle / total, middle_depth / total

    def powers(part: Slices, lowest: Array, log_d: Array, middle: Array, middle_depth: Array) -> tuple[Array, ...]:
        """Return exponents, active losses, large exponents, ``y / y' - 1``, ``c + z`` and ``d / (c + z)``.

        Here y' is the mean of y over the losses with a large exponent, and the exponents are ``b log(y / y')``. Active
        losses and large exponents are returned as masks.
        """
        d = xp.clip(xp.exp(log_d), min=tiny)
        active, height, depth, large = lengths(part, lowest, d)
        length = height + d
        # y / y' - 1 comes from a difference of depths y - 1. If y is near y', log1p of this number has all digits.
        relative = (depth - middle_depth) * ((1 + d) / middle)
        log_y = xp.where(height > 0, xp.log(length), log_d) - xp.log(middle)
        log_y = xp.where(xp.abs(relative) < 0.5, xp.log1p(xp.clip(relative, min=-0.5, max=0.5)), log_y)
        exponent = xp.clip(b * log_y, min=floor)
        return exponent, active, large, relative, length, d / length

    def surplus(ordered: Slices, lowest: Array, log_d: Array) -> tuple[Array, Array]:
        """Return the surplus of `find_root`, and the derivative of the surplus with respect to log d, times -1."""
        number, middle, middle_depth = centre(ordered, lowest, xp.exp(log_d))
        # With v = exp(exponent), l = length, r = relative and h = d / l, the sums are those of v l, v r, v h, v h r and
        # v h r^2.
        rows = []
        for part in cut_down_to(ordered, lowest, xp):
            exponent, active, large, relative, length, steep = powers(part, lowest, log_d, middle, middle_depth)
            value, change = exp_and_change(exponent, large, active, xp)
            zeroth = value * steep
            first = zeroth * relative
            sums = value * length, value * relative, zeroth, first, first * relative
            rows.append((change, *(xp.sum(values, axis=-1, keepdims=True) for values in sums)))
        change_of_sum, *sums_of_values = totals(rows, xp)
        total, others = normalise(change_of_sum, number, ordered.size, bound, xp)
        mean, change, zeroth, first, second = (value / total for value in sums_of_values)
        # The surplus is b log(sum p y / y') = b log(1 + sum p r) plus the two terms of `normalise`.
        mean = mean / middle
        slope = b * (b + 1) * xp.clip(second - 2 * change * first + change**2 * zeroth, min=0.0) / mean**2
        return balance(b * log_one_plus(change, mean, xp), others, xp), slope

    # Step 1: the lowest active loss. To test a loss, take it as the lowest active loss and set its length d to 0: the
    # loss is active if the divergence is then still too large. Here log d is so small that the power of d is 0, too.
    stretch = max(1.0, 1 / b)

    def at_zero(ordered: Slices, lowest: Array) -> Array:
        return surplus(ordered, lowest, xp.full_like(lowest, negligible_exponent() * stretch))[0]

    ordered = sort_descending(slices, xp)
    position = last_active(ordered, lambda part, loss: (loss == part.top) | (at_zero(part, loss) > 0), xp)
    lowest = xp.take_along_axis(ordered.losses, position, axis=-1)
    next_gap = lowest - xp.take_along_axis(ordered.losses, xp.minimum(position + 1, slices.number - 1), axis=-1)
    span = or_one(slices.top - lowest, xp)

    # Step 2: the bracket of log d. Below the bracket the power of d is smaller than a rounding error. Above the bracket
    # the next smaller loss would be active. If there is no smaller loss, the divergence is at most
    # b (b + 1) / (2 d^2), which bounds d.
    upper = 0.5 * math.log(b * (b + 1) / (2 * math.log1p(ball.growth)))
    high = xp.where(next_gap > 0, xp.log(or_one(next_gap, xp)) - xp.log(span), upper)
    high = xp.clip(high, max=0.75 * math.log(float(limits.max)))
    low = xp.clip(high - 1, max=2 * math.log(float(limits.eps)) * stretch)
    at_low = at_zero(ordered, lowest)

    # Step 3: the root. The position is arsinh(log d), so the chain rule multiplies the slope by cosh(position).
    def surplus_at(position: Array) -> tuple[Array, Array]:
        value, slope = surplus(ordered, lowest, xp.sinh(position))
        return value, slope * xp.cosh(position)

    log_d = xp.sinh(find_root(surplus_at, xp.asinh(low), xp.asinh(high), at_low, ball.growth, xp))
    _, middle, middle_depth = centre(ordered, lowest, xp.exp(log_d))

    # Step 4: the weights, from exponents relative to the mean length of the losses with a large exponent.
    def exponents(part: Slices) -> tuple[Array, Array]:
        exponent, active, *_ = powers(part, lowest, log_d, middle, middle_depth)
        return xp.where(active, exponent, floor), active

    weights, excess, log_mean = exponential_weights(slices, exponents, xp)
    # Step 5: the dual variables. With M = (mean of relu(c + z)^b)^(1/b) they are s = (order - 1) M and
    # nu = top + M - c. The difference M - c keeps its digits as c expm1(log(M / c)).
    c = 1 + xp.exp(log_d)
    log_ratio = log_mean / b + log_one_plus(middle_depth, middle / c, xp)
    scale = product_or_inf(c * xp.exp(log_ratio) / b, span, xp)
    return Solution(weights, excess, span * (c * xp.expm1(log_ratio)), scale)
