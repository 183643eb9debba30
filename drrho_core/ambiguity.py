"""Ambiguity sets and the worst case over them: risk, worst-case weights and the dual variables that certify both.

For losses ``x_1 .. x_n`` an ambiguity set holds the weights ``p`` on the simplex that an adversary may choose. With
a convex ``phi``, ``phi(1) = 0``, and ``D(p) = (1/n) sum_i phi(n p_i)``, a *ball* bounds D, a *penalty* charges for it::

    ball:     risk = max { sum_i p_i x_i : D(p) <= radius }
    penalty:  risk = max { sum_i p_i x_i - strength * D(p) }

and the dual variables ``nu, s >= 0`` prove it from above: ``risk = min nu + s radius + s mean phi*((x - nu) / s)``.

How the file is built: `worst_case` checks, moves the axis to the end, deals with half types and with `where`, and hands
the solvers `_Slices`. A solver is a formula about *shifted* losses ``z = x - max x <= 0`` and returns a `_Solution`. No
solver branches on data: they sort, search a fixed number of steps and select, so they can be traced and need no look
from the host. Losses are compared with losses as they came, never after a shift: rounding would merge distinct ones.

Sources: DRRho risk, arXiv 2505.06699. Chi-square balls and variance: Duchi and Namkoong 2019. CVaR: Rockafellar and
Uryasev 2000.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from drrho_core import _checks
from drrho_core._arrays import Array, Namespace, namespace_of, values_visible, wide_dtype


class WorstCase(NamedTuple):
    """The worst case of `worst_case` and `drrho_risk`. All arrays have the dtype of the losses.

    Attributes
    ----------
    risk : array
        The largest (penalised) weighted mean, the losses' shape without `axis`.
    weights : array
        The weights that reach it, the losses' shape; they sum to 1 along `axis`, and are the derivative of `risk` with
        respect to the losses.
    dual : tuple of two arrays
        ``(nu, s)``, each shaped like `risk`: threshold and scale of the dual form, which certify the risk from above.
    """

    risk: Array
    weights: Array
    dual: tuple[Array, Array]


class _Slices(NamedTuple):
    """Losses with the axis of interest last, float32 or wider, every entry finite. A trailing 1 keeps the axis."""

    losses: Array  # (..., n), as they came; an entry that does not count holds the smallest that does
    counted: Array  # (..., n) bool
    number: Array  # (..., 1), how many count, at least 1, an integer
    size: Array  # (..., 1), the same as a floating number
    top: Array  # (..., 1), the largest loss
    shifted: Array  # (..., n), losses - top


class _Solution(NamedTuple):
    """What a solver returns: risk and nu as differences from the largest loss, so that no common offset hurts."""

    weights: Array  # (..., n)
    excess: Array  # (..., 1), risk - top
    nu_excess: Array  # (..., 1), nu - top
    scale: Array  # (..., 1), the dual variable s


@dataclass(frozen=True)
class AmbiguitySet(ABC):
    """What the six sets share. They are frozen and hashable, and validated when built.

    A parameter is a real, finite number, or an array without axes, which is read once. Under jit it is a constant.
    """

    @abstractmethod
    def _solve(self, slices: _Slices, xp: Namespace) -> _Solution:
        """Return the worst case of every slice."""


def _validate(ambiguity_set: AmbiguitySet, name: str, holds: Callable[[float], bool], rule: str) -> None:
    """Replace a parameter by its checked value, a Python number, when a set is built."""
    object.__setattr__(ambiguity_set, name, _checks.static_number(name, getattr(ambiguity_set, name), holds, rule))


@dataclass(frozen=True)
class CVaR(AmbiguitySet):
    """Conditional value at risk: the mean of the share `alpha` of largest losses.

    ``phi`` is 0 on ``[0, 1 / alpha]`` and infinite elsewhere: no weight may exceed ``1 / (alpha n)``. Losses above the
    quantile get just that; those tied at the quantile share the rest equally.

    ``risk = min_nu nu + mean(relu(x - nu)) / alpha`` (Rockafellar and Uryasev 2000), the dual is (quantile, 0).
    ``alpha n`` is evaluated without rounding error, and taken as an integer where it is within 4 units of float64's
    last place of one, so that ``alpha=0.1`` of 30 losses means 3.

    Parameters
    ----------
    alpha : float
        In (0, 1]; 1 gives the mean, a value below 1 / n the maximum.

    Raises
    ------
    TypeError
        If `alpha` is not a real number.
    ValueError
        If `alpha` is not finite or lies outside (0, 1].

    Examples
    --------
    >>> import numpy as np
    >>> worst_case(np.asarray([1.0, 2.0, 3.0, 6.0]), CVaR(0.5)).risk.item()
    4.5
    """

    alpha: float

    def __post_init__(self) -> None:
        _validate(self, "alpha", lambda alpha: 0 < alpha <= 1, "lie in (0, 1]")

    def _solve(self, slices: _Slices, xp: Namespace) -> _Solution:
        return _largest_share(slices, self.alpha, xp)


@dataclass(frozen=True)
class KLPenalty(AmbiguitySet):
    """Kullback-Leibler penalty: a smooth maximum, ``risk = temperature * log mean exp(x / temperature)``.

    ``phi(t) = t log t - t + 1``; the weights are ``softmax(x / temperature)``, the dual is (risk, temperature).

    Parameters
    ----------
    temperature : float
        Positive, in units of the losses; towards 0 the risk is the maximum, towards infinity the mean.

    Raises
    ------
    TypeError
        If `temperature` is not a real number.
    ValueError
        If `temperature` is not finite and positive.

    Examples
    --------
    >>> import numpy as np
    >>> worst = worst_case(np.log(np.asarray([1.0, 2.0, 3.0])), KLPenalty(1.0))
    >>> round(float(np.exp(worst.risk)), 12), worst.weights.round(12).tolist()
    (2.0, [0.166666666667, 0.333333333333, 0.5])
    """

    temperature: float

    def __post_init__(self) -> None:
        _validate(self, "temperature", lambda temperature: temperature > 0, "be positive")

    def _solve(self, slices: _Slices, xp: Namespace) -> _Solution:
        return _soft_maximum(slices, self.temperature, xp)


@dataclass(frozen=True)
class ChiSquareBall(AmbiguitySet):
    """Chi-square ball: the mean plus the standard deviation, as long as no weight has to be clipped.

    ``phi(t) = (t - 1)^2 / 2``, ``D(p) <= radius``; the weights are ``relu(1 + (x - nu) / s) / n``. Where none is
    clipped, ``risk = mean(x) + sqrt(2 radius var(x))`` (Duchi and Namkoong 2019).

    Parameters
    ----------
    radius : float
        At least 0: 0 gives the mean; ``(n/m - 1) / 2`` and more give the maximum, where m losses reach it.

    Raises
    ------
    TypeError
        If `radius` is not a real number.
    ValueError
        If `radius` is not finite or negative.

    Examples
    --------
    >>> import numpy as np
    >>> worst_case(np.asarray([1.0, 2.0, 3.0, 4.0]), ChiSquareBall(0.1)).risk.item()  # mean 2.5, variance 1.25
    3.0
    """

    radius: float

    def __post_init__(self) -> None:
        _validate(self, "radius", lambda radius: radius >= 0, "be at least 0")

    def _solve(self, slices: _Slices, xp: Namespace) -> _Solution:
        # n D = sum (n p)^2 / 2 - n / 2: the bound reads n sum p^2 <= 1 + growth.
        growth = 2 * self.radius
        return _in_ball(slices, self.radius, growth, _clipped_line(slices, growth, xp), xp)


def worst_case(
    losses: Array,
    ambiguity_set: AmbiguitySet,
    /,
    *,
    axis: int = -1,
    where: Array | None = None,
    xp: Namespace | None = None,
) -> WorstCase:
    """Return the worst-case risk over an ambiguity set, its weights and its dual variables, along one axis.

    Parameters
    ----------
    losses : array, shape (..., n, ...)
        Real floating losses, in any unit; they may be negative. Half types are computed in float32.
    ambiguity_set : AmbiguitySet
        One of `CVaR`, `KLPenalty`, `KLBall`, `ChiSquarePenalty`, `ChiSquareBall`, `CressieReadBall`.
    axis : int
        The axis of the n samples; every slice along it is a problem of its own.
    where : array of bool, optional
        Marks the entries that count, broadcast to the losses' shape. The others are never read, not even when they are
        nan, have weight 0, and do not count in n.
    xp : namespace, optional
        The arrays' namespace; needed under ``torch.compile`` only.

    Returns
    -------
    WorstCase
        `risk` without `axis`, `weights` in the losses' shape, `dual` = (nu, s), all in the losses' dtype.

    Raises
    ------
    TypeError
        If an argument has another type, or the arrays come from different libraries.
    ValueError
        If the axis does not exist or is empty, `where` does not broadcast or leaves a slice without an entry, arrays
        are on different devices, a loss that counts is nan, infinite or so large that sums would overflow, or the
        losses ask for autograd. Values are looked at on the host outside tracing only; elsewhere such a slice comes
        back as nan.

    Notes
    -----
    By Danskin's theorem the derivative of the risk with respect to the losses is `weights`: no gradient through the
    solver is needed. Equal losses have equal weights. Results are constants to autograd.

    Examples
    --------
    >>> import numpy as np
    >>> worst = worst_case(np.asarray([[0.0, 1.0, 2.0], [5.0, 5.0, np.nan]]), CVaR(0.5),
    ...                    where=np.asarray([[True, True, True], [True, True, False]]))
    >>> worst.weights.round(3).tolist()
    [[0.0, 0.333, 0.667], [0.5, 0.5, 0.0]]
    """
    check_ambiguity_set(ambiguity_set)
    xp = check_losses({"losses": losses}, where, xp)
    _checks.axis(axis, "losses", losses)
    check_values("losses", losses, axis, where, xp)
    return solve(losses, ambiguity_set, axis, where, losses.dtype, xp)


# ---------------------------------------------------------------------------------------------------------------------
# What every set shares: checks, the axis, `where`, half types. `drrho_core.risk` uses these four, too.


def check_ambiguity_set(ambiguity_set: AmbiguitySet) -> None:
    """Check that this is one of the sets, not its class and not a number."""
    if not isinstance(ambiguity_set, AmbiguitySet):
        raise TypeError(
            f"ambiguity_set must be an ambiguity set such as CVaR(0.1), got {_checks.describe(ambiguity_set)}"
        )


def check_losses(arrays: dict[str, Array], where: Array | None, xp: Namespace | None) -> Namespace:
    """Check everything about losses of one shape but their axis and their values, and return their namespace."""
    together = arrays if where is None else {**arrays, "where": where}
    xp = namespace_of(together, xp)
    for name, array in arrays.items():
        _checks.floating(name, array, xp)
    _checks.same_dtype(arrays)
    _checks.same_device(together, xp)
    _checks.detached(arrays)
    (first, losses), *rest = arrays.items()
    for name, array in rest:
        _checks.shape(name, array, tuple(losses.shape), f"the shape of {first}")
    if where is not None:
        _checks.mask("where", where, first, losses, xp)
    return xp


def check_values(name: str, losses: Array, axis: int, where: Array | None, xp: Namespace) -> None:
    """Check, where looking is free, that every loss that counts is usable and that every slice has one."""
    if where is not None and values_visible(where, xp):
        filled = xp.any(xp.broadcast_to(where, losses.shape), axis=axis)
        if not bool(xp.all(filled)):
            empty = int(xp.sum(xp.astype(~filled, xp.int32)))
            raise ValueError(
                f"where must mark at least one entry of every slice along axis {axis}, "
                f"got {empty} of {math.prod(filled.shape)} slices without any"
            )
    limit = _largest_usable(losses, axis, xp)
    seen = losses if where is None else xp.where(where, losses, xp.zeros_like(losses))
    _checks.values(name, seen, lambda x: xp.abs(x) <= limit, f"be finite and at most {limit:.3g} in size", xp)


def solve(
    losses: Array, ambiguity_set: AmbiguitySet, axis: int, where: Array | None, dtype: object, xp: Namespace
) -> WorstCase:
    """Solve without checks; results in `dtype`. A slice with a bad loss, or with none that counts, becomes nan."""
    x = xp.moveaxis(xp.astype(losses, wide_dtype(losses.dtype, xp)), axis, -1)
    if where is None:
        counted = xp.ones_like(x, dtype=xp.bool)
    else:
        counted = xp.moveaxis(xp.broadcast_to(where, losses.shape), axis, -1)
    usable = xp.abs(x) <= _largest_usable(losses, axis, xp)
    valid = xp.all(usable | ~counted, axis=-1, keepdims=True) & xp.any(counted, axis=-1, keepdims=True)
    # An invalid slice is solved as n zeros, so that no solver has to think of it, and is overwritten at the end.
    counted = counted | ~valid
    x = xp.where(counted & usable, x, xp.zeros_like(x))
    top = xp.max(xp.where(counted, x, -xp.inf), axis=-1, keepdims=True)
    bottom = xp.min(xp.where(counted, x, xp.inf), axis=-1, keepdims=True)
    x = xp.where(counted, x, bottom)
    number = _count(counted, xp)
    solution = ambiguity_set._solve(_Slices(x, counted, number, xp.astype(number, x.dtype), top, x - top), xp)

    def finish(array: Array) -> Array:
        return xp.astype(xp.where(valid, array, xp.nan), dtype, copy=False)

    # Only s can leave the range of a half type.
    scale = xp.where(solution.scale > float(xp.finfo(dtype).max), xp.inf, solution.scale)
    risk, nu, scale = (
        xp.squeeze(finish(array), axis=-1) for array in (top + solution.excess, top + solution.nu_excess, scale)
    )
    return WorstCase(risk, xp.moveaxis(finish(solution.weights), -1, axis), (nu, scale))


def _largest_usable(losses: Array, axis: int, xp: Namespace) -> float:
    """Return how large a loss may be: sums over n differences of two losses still have to be finite."""
    largest = float(xp.finfo(wide_dtype(losses.dtype, xp)).max)
    return largest / (8 * int(losses.shape[axis]))


def _count(mask: Array, xp: Namespace, dtype: object = None) -> Array:
    """Return the number of True along the last axis, (..., 1), counted in integers, as `dtype`."""
    number = xp.sum(xp.astype(mask, xp.int32), axis=-1, keepdims=True)
    return number if dtype is None else xp.astype(number, dtype)


def _sum(values: Array, mask: Array, xp: Namespace) -> Array:
    """Return the sum of the marked entries along the last axis, (..., 1)."""
    return xp.sum(xp.where(mask, values, xp.zeros_like(values)), axis=-1, keepdims=True)


def _relu(values: Array, xp: Namespace) -> Array:
    """Return the positive part."""
    return xp.where(values > 0, values, xp.zeros_like(values))


def _or_one(values: Array, xp: Namespace) -> Array:
    """Return a denominator that is safe: 1 where a value is not positive, as in slices whose result is not used."""
    return xp.where(values > 0, values, xp.ones_like(values))


def _in_units(shifted: Array, parameter: float, xp: Namespace) -> tuple[Array, float, float]:
    """Return shifted losses and a positive parameter in a unit in which the dtype can hold them, and that unit.

    The unit is 1, but for parameters that float32 would make 0 or infinite. Losses far below -parameter, that no
    formula can tell from minus infinity, are moved up so that they fit.
    """
    limits = xp.finfo(shifted.dtype)
    smallest, largest = float(limits.smallest_normal), float(limits.max)
    if parameter > largest:
        unit = 2.0**100
    elif parameter < smallest:
        unit = 2.0**-100
        shifted = xp.where(shifted > -1, shifted, -xp.ones_like(shifted))
    else:
        return shifted, parameter, 1.0
    return shifted / unit, min(max(parameter / unit, smallest), largest), unit


def _constant(parameter: float, like: Array, xp: Namespace) -> Array:
    """Return a parameter as an array, the dtype's largest number if it is larger."""
    return xp.full_like(like, min(parameter, float(xp.finfo(like.dtype).max)))


def _product_minus(factor: float, count: Array, other: Array, longest: int, xp: Namespace) -> Array:
    """Return ``factor * count - other`` for whole numbers `count` <= `longest` and `other`, cancellation harmless.

    Which weights are 0 hangs on such a difference, and near 0 the weights move with its square root: a product rounded
    in float32 would cost them half of their digits. So the factor is cut into pieces so short that every piece times
    `count` is exact; the large ones meet `other` first, and only what is left is rounded.
    """
    precision = 1 - round(math.log2(float(xp.finfo(count.dtype).eps)))
    bits = max(precision - longest.bit_length(), 4)
    total = -other
    while factor > 0:
        step = math.ldexp(1.0, math.frexp(factor)[1] - bits)
        piece = math.floor(factor / step) * step
        total = total + piece * count
        factor -= piece
    return total


def _smallest_active(slices: _Slices, is_active: Callable[[Array], Array], xp: Namespace) -> Array:
    """Return the smallest loss whose weight is positive, (..., 1), by a binary search over the sorted losses.

    ``is_active(loss)``, (..., 1) to bool, has to be True down to that loss and False from there on.
    """
    ordered = xp.sort(slices.losses, axis=-1, descending=True)
    high = slices.number - 1
    low = xp.zeros_like(high)
    for _ in range((ordered.shape[-1] - 1).bit_length()):
        middle = (low + high + 1) // 2
        active = is_active(xp.take_along_axis(ordered, middle, axis=-1))
        low = xp.where(active, middle, low)
        high = xp.where(active, high, middle - 1)
    return xp.take_along_axis(ordered, low, axis=-1)


# ---------------------------------------------------------------------------------------------------------------------
# The solvers.


def _uniform(slices: _Slices, xp: Namespace) -> _Solution:
    """Return the mean, as a ball of radius 0 does; its dual is (mean, inf)."""
    weights = xp.where(slices.counted, 1 / slices.size, xp.zeros_like(slices.losses))
    mean = _sum(slices.shifted / slices.size, slices.counted, xp)
    return _Solution(weights, mean, mean, xp.full_like(mean, xp.inf))


def _in_ball(slices: _Slices, radius: float, growth: float, inner: _Solution, xp: Namespace) -> _Solution:
    """Put the two ends of a ball around the solver's solution: radius 0, and a ball that holds the maximum's weights.

    With m losses at the maximum, their uniform weights are in the ball if and only if ``(1 + growth) m >= n``. They are
    taken, too, where the difference is within the rounding of `radius` itself.
    """
    if radius <= float(xp.finfo(slices.losses.dtype).smallest_normal):
        return _uniform(slices, xp)
    at_top = slices.counted & (slices.losses == slices.top)
    number = _count(at_top, xp, slices.losses.dtype)
    room = _product_minus(growth, number, slices.size - number, slices.losses.shape[-1], xp)
    saturated = room >= -_DOUBLE_ULPS * slices.size
    zero = xp.zeros_like(slices.top)
    return _Solution(
        xp.where(saturated, xp.where(at_top, 1 / number, xp.zeros_like(inner.weights)), inner.weights),
        *(xp.where(saturated, zero, value) for value in inner[1:]),
    )


_DOUBLE_ULPS = 8 * 2.0**-53
"""Rounding of a parameter that is a Python float, and of the few operations on it, relative to its size."""


def _largest_share(slices: _Slices, alpha: float, xp: Namespace) -> _Solution:
    """CVaR. With k = alpha n, at least 1: 1/k above the ceil(k)-th largest loss, what is left of 1 shared at it."""
    x, counted, size = slices.losses, slices.counted, slices.size
    # k = nearest + part, the part without rounding error.
    nearest = xp.round(alpha * size)
    part = _product_minus(alpha, size, nearest, x.shape[-1], xp)
    part = xp.where(xp.abs(part) <= _DOUBLE_ULPS * nearest, xp.zeros_like(part), part)
    less_than_one = nearest + part < 1
    nearest = xp.where(less_than_one, xp.ones_like(nearest), nearest)
    part = xp.where(less_than_one, xp.zeros_like(part), part)
    share = nearest + part

    index = nearest - xp.where(part > 0, xp.zeros_like(part), xp.ones_like(part))  # ceil(k) - 1, from 0
    ordered = xp.sort(x, axis=-1, descending=True)
    quantile = xp.take_along_axis(ordered, xp.astype(index, slices.number.dtype), axis=-1)

    above, tied = counted & (x > quantile), counted & (x == quantile)
    rest = (nearest - _count(above, xp, x.dtype) + part) / _count(tied, xp, x.dtype)
    weights = (xp.where(above, xp.ones_like(x), xp.where(tied, rest, xp.zeros_like(x)))) / share
    excess = _sum(weights * slices.shifted, counted, xp)
    return _Solution(weights, excess, quantile - slices.top, xp.zeros_like(excess))


def _soft_maximum(slices: _Slices, temperature: float, xp: Namespace) -> _Solution:
    """KLPenalty. excess = t log mean exp(z / t), weights = softmax(z / t)."""
    z, t, unit = _in_units(slices.shifted, temperature, xp)
    exponent = _ratio(z, t, xp)
    log_mean = _log_mean_exp(exponent, slices, xp)
    weights = xp.where(slices.counted, xp.exp(exponent), xp.zeros_like(z))
    weights = weights / xp.sum(weights, axis=-1, keepdims=True)
    # Where the temperature dwarfs the losses, the ratio loses its digits to underflow; there the mean is exact enough.
    flat = xp.min(exponent, axis=-1, keepdims=True) >= -float(xp.finfo(z.dtype).eps) / 4
    excess = xp.where(flat, _uniform(slices, xp).excess, t * log_mean * unit)
    return _Solution(weights, excess, excess, _constant(temperature, excess, xp))


def _ratio(z: Array, scale: Array | float, xp: Namespace) -> Array:
    """Return ``z / scale`` for z <= 0, not below -1000, where its exponential is 0 in any dtype: no overflow."""
    return xp.where(z / 1000 > -scale, z, -1000.0) / xp.where(z / 1000 > -scale, scale, 1.0)


def _log_mean_exp(exponent: Array, slices: _Slices, xp: Namespace) -> Array:
    """Return ``log mean exp`` of exponents <= 0 whose largest is 0, as precise near 0 as far from it."""
    mean = _sum(xp.exp(exponent), slices.counted, xp) / slices.size
    below_one = _sum(xp.expm1(exponent), slices.counted, xp) / slices.size
    return xp.where(mean > 0.5, xp.log1p(xp.where(mean > 0.5, below_one, 0.0)), xp.log(mean))


def _clipped_line(slices: _Slices, growth: float, xp: Namespace) -> _Solution:
    """ChiSquareBall. p = relu(c + z) / sum relu(c + z) with c such that n sum p^2 = 1 + growth.

    With k losses active, of mean mu and variance v, ``n sum p^2 = (n/k) (1 + v / (c + mu)^2)``. So
    ``c + mu = sqrt(n v / room)`` with ``room = (1 + growth) k - n``. A loss is active if at ``c = -loss`` the sum is
    still too large: ``n v > room (mu - loss)^2`` over the losses above it.
    """
    x, counted, size = slices.losses, slices.counted, slices.size

    def moments(active: Array, lowest: Array) -> tuple[Array, ...]:
        # Heights above the lowest loss, in units of the span from there to the top: scales from 1e-30 to 1e30 alike.
        number = _or_one(_count(active, xp, x.dtype), xp)
        span = slices.top - lowest
        height = xp.where(active, x - lowest, xp.zeros_like(x)) / _or_one(span, xp)
        mean = _sum(height, active, xp) / number
        variance = _sum((height - mean) ** 2, active, xp) / number
        room = _product_minus(growth, number, size - number, x.shape[-1], xp)
        return number, span, height, mean, variance, room

    def is_active(loss: Array) -> Array:
        _, _, _, mean, variance, room = moments(counted & (x > loss), loss)
        return (loss == slices.top) | (size * variance > room * mean**2)

    lowest = _smallest_active(slices, is_active, xp)
    active = counted & (x >= lowest)
    number, span, height, mean, variance, room = moments(active, lowest)
    reach = xp.sqrt(size * variance / _or_one(room, xp))  # c + mu, in units of the span
    tilt = (height - mean) / _or_one(reach, xp)
    weights = xp.where(active, _relu(1 + tilt, xp), xp.zeros_like(x)) / number
    excess = _sum(weights * slices.shifted, active, xp)
    nu_excess = -span * (1 - mean + reach * ((size - number) / size))
    return _Solution(weights, excess, nu_excess, span * reach * (number / size))
