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
import operator
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

from drrho_core import _checks
from drrho_core._arrays import Array, Namespace, device_of, namespace_of, values_visible, wide_dtype
from drrho_core._loops import Carry, descending, repeat


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
class KLBall(AmbiguitySet):
    """Kullback-Leibler ball: the smooth maximum whose temperature fits the radius.

    ``phi(t) = t log t - t + 1``, ``D(p) <= radius``; ``risk = min_{s >= 0} s log mean exp(x / s) + s radius``, the
    weights are ``softmax(x / s)``.

    Parameters
    ----------
    radius : float
        At least 0: 0 gives the mean; ``log(n/m)`` and more give the maximum, where m losses reach it.

    Raises
    ------
    TypeError
        If `radius` is not a real number.
    ValueError
        If `radius` is not finite or negative.

    Examples
    --------
    >>> import numpy as np
    >>> worst_case(np.asarray([1.0, 2.0, 3.0, 4.0]), KLBall(1.0)).weights.round(3).tolist()
    [0.001, 0.011, 0.097, 0.891]
    """

    radius: float

    def __post_init__(self) -> None:
        _validate(self, "radius", lambda radius: radius >= 0, "be at least 0")

    def _solve(self, slices: _Slices, xp: Namespace) -> _Solution:
        return _in_ball(slices, _exp_minus_one(self.radius), _tempered, xp)


@dataclass(frozen=True)
class ChiSquarePenalty(AmbiguitySet):
    """Chi-square penalty: weights that rise linearly with the loss, clipped at 0.

    ``phi(t) = (t - 1)^2 / 2``; the weights are ``relu(1 + (x - nu) / strength) / n``, with nu such that they sum
    to 1, and the dual is (nu, strength). Where none is clipped, ``risk = mean(x) + var(x) / (2 strength)``.

    Parameters
    ----------
    strength : float
        Positive, in units of the losses; towards 0 the risk is the maximum, towards infinity the mean.

    Raises
    ------
    TypeError
        If `strength` is not a real number.
    ValueError
        If `strength` is not finite and positive.

    Examples
    --------
    >>> import numpy as np
    >>> worst_case(np.asarray([1.0, 2.0, 3.0, 6.0]), ChiSquarePenalty(4.0)).weights.tolist()
    [0.125, 0.1875, 0.25, 0.4375]
    """

    strength: float

    def __post_init__(self) -> None:
        _validate(self, "strength", lambda strength: strength > 0, "be positive")

    def _solve(self, slices: _Slices, xp: Namespace) -> _Solution:
        return _tilted(slices, self.strength, xp)


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
        return _in_ball(slices, 2 * self.radius, _clipped_line, xp)


@dataclass(frozen=True)
class CressieReadBall(AmbiguitySet):
    """Cressie-Read ball of any order above 1: order 2 is the chi-square ball, towards 1 it becomes the KL ball.

    ``phi(t) = (t^k - k t + k - 1) / (k (k - 1))``, k the order, ``D(p) <= radius``; the weights are
    ``relu(1 + (k - 1) (x - nu) / s)^(1/(k - 1)) / n``. With ``k' = k / (k - 1)``,
    ``risk = min_theta theta + (1 + k (k - 1) radius)^(1/k) mean(relu(x - theta)^k')^(1/k')`` (Duchi and Namkoong 2019).

    Parameters
    ----------
    order : float
        Above 1. The larger, the more evenly the weights spread over the losses that have any.
    radius : float
        At least 0: 0 gives the mean; ``((n/m)^(k-1) - 1) / (k (k-1))`` and more give the maximum, where m losses
        reach it.

    Raises
    ------
    TypeError
        If a parameter is not a real number.
    ValueError
        If a parameter is not finite, `order` is not above 1 or `radius` is negative.

    Examples
    --------
    >>> import numpy as np
    >>> worst_case(np.asarray([1.0, 2.0, 3.0, 4.0]), CressieReadBall(3.0, 0.1)).weights.round(3).tolist()
    [0.072, 0.229, 0.316, 0.383]
    """

    order: float
    radius: float

    def __post_init__(self) -> None:
        _validate(self, "order", lambda order: order > 1, "be greater than 1")
        _validate(self, "radius", lambda radius: radius >= 0, "be at least 0")

    def _solve(self, slices: _Slices, xp: Namespace) -> _Solution:
        # Far above this order the weights are uniform in any dtype, and float32 still holds what is computed from it.
        order = min(self.order, 1e30)
        product = order * (order - 1) * self.radius
        if product < 1e15:
            logarithm = math.log1p(product)
        else:  # the product itself may overflow
            logarithm = math.log(order) + math.log(order - 1) + math.log(self.radius)

        def solver(slices: _Slices, ball: _Ball, xp: Namespace) -> _Solution:
            return _clipped_power(slices, order, ball, xp)

        return _in_ball(slices, _exp_minus_one(logarithm / (order - 1)), solver, xp)


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
        _checks.shape(name, array, tuple(losses.shape), f"{first}.shape")
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
    if not values_visible(losses, xp):  # also because a compiler that leaves shapes open cannot write the message
        return
    limit = _largest_usable(losses, axis, xp)
    seen = losses if where is None else xp.where(where, losses, xp.zeros_like(losses))
    _checks.values(name, seen, lambda x: xp.abs(x) <= limit, f"be finite and at most {limit:.3g} in size", xp)


def solve(
    losses: Array, ambiguity_set: AmbiguitySet, axis: int, where: Array | None, dtype: object, xp: Namespace
) -> WorstCase:
    """Solve without checks; results in `dtype`. A slice with a bad loss, or with none that counts, becomes nan."""
    x = xp.moveaxis(xp.astype(losses, wide_dtype(losses.dtype, xp), copy=False), axis, -1)
    limit = _largest_usable(losses, axis, xp)
    if where is None:
        counted = xp.ones_like(x, dtype=xp.bool)
        valid = (xp.max(x, axis=-1, keepdims=True) <= limit) & (xp.min(x, axis=-1, keepdims=True) >= -limit)
    else:
        counted = xp.moveaxis(xp.broadcast_to(where, losses.shape), axis, -1)
        usable = (xp.abs(x) <= limit) | ~counted
        valid = xp.all(usable, axis=-1, keepdims=True) & xp.any(counted, axis=-1, keepdims=True)
    plain = where is None and _known(valid, xp)
    if not plain:
        # An invalid slice is solved as n zeros, so that no solver has to think of it, and is overwritten at the end.
        counted = counted | ~valid
        x = xp.where(counted & valid, x, xp.zeros_like(x))
        bottom = xp.min(xp.where(counted, x, xp.inf), axis=-1, keepdims=True)
        x = xp.where(counted, x, bottom)
    top = xp.max(x, axis=-1, keepdims=True)
    number = _count(counted, xp)
    solution = ambiguity_set._solve(_Slices(x, counted, number, xp.astype(number, x.dtype), top, x - top), xp)

    def finish(array: Array) -> Array:
        return xp.astype(array if plain else xp.where(valid, array, xp.nan), dtype, copy=False)

    # Only s can leave the range of a half type.
    scale = xp.where(solution.scale > float(xp.finfo(dtype).max), xp.inf, solution.scale)
    risk, nu, scale = (
        xp.squeeze(finish(array), axis=-1) for array in (top + solution.excess, top + solution.nu_excess, scale)
    )
    return WorstCase(risk, xp.moveaxis(finish(solution.weights), -1, axis), (nu, scale))


def _largest_usable(losses: Array, axis: int, xp: Namespace) -> float:
    """Return how large a loss may be: sums over n differences of two losses still have to be finite."""
    largest = float(xp.finfo(wide_dtype(losses.dtype, xp)).max)
    return min(largest / (8 * int(losses.shape[axis])), float(xp.finfo(losses.dtype).max))


def _count(mask: Array, xp: Namespace) -> Array:
    """Return the number of True along the last axis, (..., 1), an integer."""
    return xp.count_nonzero(mask, axis=-1, keepdims=True)


def _sum(values: Array, mask: Array, xp: Namespace) -> Array:
    """Return the sum of the marked entries along the last axis, (..., 1)."""
    return xp.sum(xp.where(mask, values, xp.zeros_like(values)), axis=-1, keepdims=True)


def _known(condition: Array, xp: Namespace) -> bool:
    """Tell whether a condition holds everywhere, as far as a look is free; False may mean that it is not."""
    return values_visible(condition, xp) and bool(xp.all(condition))


_PIECE = 2**15
"""How many losses are worked on at a time where they are many: what is computed from them stays in the caches."""


def _cut(slices: _Slices, xp: Namespace) -> list[_Slices]:
    """Cut slices along the last axis, so that sums over them can be taken piece by piece.

    A pass over n numbers costs mostly memory: to fetch them, and to be given room for results. A compiler knows that,
    and a device has room for more, so what is traced or lives there stays whole.
    """
    if not values_visible(slices.losses, xp):
        return [slices]
    *rows, n = slices.losses.shape
    length = max(_PIECE // max(math.prod(rows), 1), _PIECE // 64)
    if n <= length:
        return [slices]
    return [
        slices._replace(**{name: getattr(slices, name)[..., start : start + length] for name in _LONG})
        for start in range(0, n, length)
    ]


_LONG = ("losses", "counted", "shifted")


def _ordered(slices: _Slices, xp: Namespace) -> _Slices:
    """Return slices sorted from the largest loss to the smallest, for sums: what is selected then comes in one run."""
    x = descending(slices.losses, xp)
    position = xp.arange(x.shape[-1], dtype=slices.number.dtype, device=device_of(x))
    return slices._replace(losses=x, counted=position < slices.number, shifted=x - slices.top)


def _down_to(parts: list[_Slices], lowest: Array, xp: Namespace) -> list[_Slices]:
    """Leave out parts of sorted slices in which every loss is below `lowest`. More than one means: a look is free."""
    return [part for part in parts if len(parts) == 1 or bool(xp.any(part.losses[..., :1] >= lowest))]


def _join(pieces: list[Array], xp: Namespace) -> Array:
    """Put the pieces of an array together."""
    return pieces[0] if len(pieces) == 1 else xp.concat(pieces, axis=-1)


def _relu(values: Array, xp: Namespace) -> Array:
    """Return the positive part."""
    return xp.where(values > 0, values, xp.zeros_like(values))


def _or_one(values: Array, xp: Namespace) -> Array:
    """Return a denominator that is safe: 1 where a value is not positive, as in slices whose result is not used."""
    return xp.where(values > 0, values, xp.ones_like(values))


def _in_units(parameter: float, like: Array, xp: Namespace) -> tuple[float, float]:
    """Return a positive parameter in a unit in which the array's dtype can hold it, and that unit, a power of two.

    The unit is 1, but for parameters that float32 would make 0 or infinite.
    """
    smallest, largest = float(xp.finfo(like.dtype).smallest_normal), float(xp.finfo(like.dtype).max)
    unit = 2.0**100 if parameter > largest else 2.0**-100 if parameter < smallest else 1.0
    return min(max(parameter / unit, smallest), largest), unit


def _distance(distance: Array, unit: float, xp: Namespace) -> Array:
    """Return distances >= 0 in that unit; in a tiny one those above 1 become 1, which is as good as infinite there."""
    if unit < 1:
        distance = xp.where(distance < 1, distance, xp.ones_like(distance))
    return distance / unit


def _times(scale: Array, unit: Array, xp: Namespace) -> Array:
    """Return a product of positive numbers, infinite where the dtype cannot hold it."""
    fits = scale < float(xp.finfo(scale.dtype).max) / xp.clip(unit, min=1.0)
    return xp.where(fits, xp.where(fits, scale, 0.0) * unit, xp.inf)


def _constant(parameter: float, like: Array, xp: Namespace) -> Array:
    """Return a parameter as an array, the dtype's largest number if it is larger."""
    return xp.full_like(like, min(parameter, float(xp.finfo(like.dtype).max)))


def _product_minus(factor: float, count: Array, other: Array, longest: int, xp: Namespace) -> Array:
    """Return ``factor * count - other`` for whole numbers, `count` at most `longest`, cancellation harmless.

    Which weights are 0 hangs on such a difference, and near 0 the weights move with its square root: a product rounded
    in float32 would cost them half of their digits. So the factor is cut into pieces so short that every piece times
    `count` is exact; the large ones meet `other` first, and only what is left is rounded.
    """
    precision = 1 - round(math.log2(float(xp.finfo(count.dtype).eps)))
    bits = max(precision - longest.bit_length(), 4)
    total = -other
    negligible = factor * 2.0**-60
    while factor > negligible:
        step = math.ldexp(1.0, math.frexp(factor)[1] - bits)
        piece = math.floor(factor / step) * step
        total = total + piece * count
        factor -= piece
    return total


# ---------------------------------------------------------------------------------------------------------------------
# Balls. Each divergence here is an increasing function of the Renyi divergence R of its order k (KL: order 1), so each
# ball is a bound on R. Solvers get it as ``exp(R) <= 1 + growth``, because a comparison with uniform weights on k of n
# losses, whose exp(R) is n/k, is then a comparison of ``(1 + growth) k`` with n, and can be exact:
#
#     KL          growth = exp(radius) - 1
#     chi-square  growth = 2 radius
#     order k     growth = (1 + k (k - 1) radius)^(1 / (k - 1)) - 1

_SMALLEST_GROWTH, _LARGEST_GROWTH = 1e-36, 1e18
"""Less is radius 0 in any dtype; more is saturated on any axis. Both are within the range of float32."""

_DOUBLE_ULPS = 8 * 2.0**-53
"""Rounding of a parameter that is a Python float, and of the few operations on it, relative to its size."""


Table: TypeAlias = Callable[[Array], Array]
"""What belongs to k of the n losses of a slice, k (..., 1), an integer."""


class _Ball(NamedTuple):
    """A bound on a divergence, compared with uniform weights on k losses."""

    growth: float
    room: Table  # (1 + growth) k - n, without rounding error


def _exp_minus_one(logarithm: float) -> float:
    """Return ``exp(logarithm) - 1``, or something large."""
    return math.expm1(min(logarithm, 50.0))


def _in_ball(
    slices: _Slices, growth: float, solver: Callable[[_Slices, _Ball, Namespace], _Solution], xp: Namespace
) -> _Solution:
    """Solve a ball, its two ends first: radius 0, and a ball that holds uniform weights on the m largest, equal losses.

    Those are taken, too, where the difference is within the rounding of `growth` itself.
    """
    if growth < _SMALLEST_GROWTH:
        return _uniform(slices, xp)
    growth = min(growth, _LARGEST_GROWTH)
    x = slices.losses

    def room(number: Array) -> Array:
        number = xp.astype(number, x.dtype)
        return _product_minus(growth, number, slices.size - number, x.shape[-1], xp)

    ball = _Ball(growth, room)
    inner = solver(slices, ball, xp)
    at_top = slices.counted & (x == slices.top)
    ties = _count(at_top, xp)
    saturated = ball.room(ties) >= -_DOUBLE_ULPS * slices.size
    if _known(~saturated, xp):
        return inner
    at_top_only = xp.where(at_top, 1 / xp.astype(ties, x.dtype), xp.zeros_like(inner.weights))
    zero = xp.zeros_like(slices.top)
    return _Solution(
        xp.where(saturated, at_top_only, inner.weights), *(xp.where(saturated, zero, value) for value in inner[1:])
    )


def _uniform(slices: _Slices, xp: Namespace) -> _Solution:
    """Return the mean, as a ball of radius 0 does; its dual is (mean, inf)."""
    weights = xp.where(slices.counted, 1 / slices.size, xp.zeros_like(slices.losses))
    mean = _sum(slices.shifted / slices.size, slices.counted, xp)
    return _Solution(weights, mean, mean, xp.full_like(mean, xp.inf))


def _smallest_active(ordered: _Slices, is_active: Callable[[Array], Array], xp: Namespace) -> Array:
    """Return the smallest loss whose weight is positive, (..., 1), by a binary search over the sorted losses.

    ``is_active(loss)``, (..., 1) to bool, has to be True down to that loss and False from there on.
    """
    losses = ordered.losses

    def halve(bracket: Carry) -> Carry:
        low, high = bracket
        middle = (low + high + 1) // 2
        active = is_active(xp.take_along_axis(losses, middle, axis=-1))
        return xp.where(active, middle, low), xp.where(active, high, middle - 1)

    bracket = (xp.zeros_like(ordered.number), ordered.number - 1)
    low, _ = repeat((losses.shape[-1] - 1).bit_length(), halve, bracket, xp)
    return xp.take_along_axis(losses, low, axis=-1)


_NONE = -1000.0
"""An exponent whose exponential is 0 in any dtype, and that may be multiplied with 0."""

_LARGE = -0.5
"""Exponents above this, relative to the largest, are large."""


def _grown(exponent: Array, large: Array, xp: Namespace) -> tuple[Array, Array]:
    """Return ``v = exp(e)``, from which ``p = v / sum v``, and the sum of ``v - 1`` or, where e is not large, v."""
    value = xp.exp(exponent)
    return value, xp.sum(xp.where(large, xp.expm1(exponent), value), axis=-1, keepdims=True)


def _normalise(grown: Array, number: Array, allowed: Table, xp: Namespace) -> tuple[Array, Array]:
    """Return ``sum exp(e)`` and ``-log mean exp(e) - log(1 + growth)``, given `_grown`'s sum.

    The Renyi divergence of p less that of the ball is a mean of e plus the latter. Near uniform weights, and on a
    plateau where some losses are close together and the rest is far below, that difference is tiny and its digits
    decide the weights. So both logarithms are taken relative to uniform weights on the `number` = k losses with a
    large exponent, ``-log(sum exp(e) / k) - log((1 + growth) k / n)``, the second from the table `allowed`; and
    exponents come relative to the middle of those, so that all that is summed is of the order of the divergence.
    """
    total = xp.astype(number, grown.dtype)
    change = grown / total
    return total * (1 + change), -xp.log1p(change) - allowed(number)


def _allowed(slices: _Slices, ball: _Ball, xp: Namespace) -> Table:
    """Return the table of ``log((1 + growth) k / n)``."""
    size = slices.size

    def allowed(number: Array) -> Array:
        part = xp.astype(number, size.dtype) / size
        return _log_one_plus(ball.room(number) / size, (1 + ball.growth) * part, xp)

    return allowed


def _log_one_plus(change: Array, total: Array, xp: Namespace) -> Array:
    """Return ``log(total)``, ``total = 1 + change`` > 0, as precise near 0 as far from it."""
    near = xp.abs(change) < 0.5
    return xp.where(near, xp.log1p(xp.where(near, change, 0.0)), xp.log(xp.where(near, 1.0, total)))


def _log_mean_exp(exponent: Array, slices: _Slices, xp: Namespace) -> Array:
    """Return ``log mean exp`` of exponents, as precise near 0 as far from it."""
    change: Array = 0.0
    total: Array = 0.0
    for part in _cut(slices._replace(losses=exponent), xp):
        change = change + _sum(xp.expm1(part.losses), part.counted, xp)
        total = total + xp.sum(xp.exp(part.losses), axis=-1, keepdims=True)
    return _log_one_plus(change / slices.size, total / slices.size, xp)


def _ratio(slices: _Slices, z: Array, scale: Array, xp: Namespace) -> Array:
    """Return the exponents ``z / scale``; `_NONE` for what does not count and for all below, so nothing overflows."""
    usable = slices.counted & (z / _NONE < scale)
    divisor = xp.full_like(z, scale) if isinstance(scale, float) else scale
    return xp.where(usable, z, _NONE) / xp.where(usable, divisor, xp.ones_like(z))


_STEPS = 18
"""Steps of `_root`. Of ten thousand problems, with losses from 1e-100 to 1e100, the hardest took 14 (float32: 16)."""


def _root(
    surplus: Callable[[Array], tuple[Array, Array]],
    low: Array,
    high: Array,
    at_low: Array,
    growth: float,
    xp: Namespace,
) -> Array:
    """Return where a divergence is that of the ball, by Newton's method within a bracket.

    ``surplus(position)`` gives the divergence less the ball's, which falls from `at_low` > 0 to minus the ball's, and
    minus its derivative. Newton's method works on ``log(divergence) - log(largest divergence - divergence)``, almost
    linear at both ends. A step that leaves the bracket, is not half as long as the one before, or starts where nothing
    moves any more, gives way to bisection; one at the noise floor is taken in any case.
    """
    small = math.sqrt(float(xp.finfo(low.dtype).eps))
    target = math.log1p(growth)
    at_low = xp.clip(at_low, min=_DOUBLE_ULPS)

    def improve(carry: Carry) -> Carry:
        position, low, high, last = carry
        value, slope = surplus(position)
        low, high = xp.where(value > 0, position, low), xp.where(value > 0, high, position)
        gained = xp.clip(value / target, min=small - 1)  # divergence / target - 1
        lost = xp.clip(value / at_low, max=1 - small)
        rate = slope / (target * (1 + gained)) + slope / (at_low * (1 - lost))
        step = (xp.log1p(gained) - xp.log1p(-lost)) / xp.clip(rate, min=1e-9)
        newton = position + step
        length, middle = xp.abs(step), (low + high) / 2
        moving = (gained > small - 1) & (lost < 1 - small) & (newton > low) & (newton < high) & (length < last / 2)
        settled = (length < small) & (xp.abs(gained) < small) & (xp.abs(lost) < small)
        taken = moving | settled
        return xp.where(taken, newton, middle), low, high, xp.where(taken, length, middle - low)

    high = high + 1  # a bound may be the root itself, and a step end just beyond it
    # Newton's steps are quadratic: the one after a step of this length would be lost in rounding.
    still = max(small / 1000, 8 * small**2)
    start = ((low + high) / 2, low, high, high - low)
    return repeat(_STEPS, improve, start, xp, finished=lambda carry: carry[3] <= still)[0]


# ---------------------------------------------------------------------------------------------------------------------
# One solver per set; the balls' ends are dealt with above.


def _largest_share(slices: _Slices, alpha: float, xp: Namespace) -> _Solution:
    """CVaR. With k = alpha n, at least 1: 1/k above the ceil(k)-th largest loss, what is left of 1 shared at it."""
    x, counted, size = slices.losses, slices.counted, slices.size
    # k = nearest + part, the part without rounding error.
    nearest = xp.round(alpha * size)
    part = _product_minus(max(alpha, _SMALLEST_GROWTH), size, nearest, x.shape[-1], xp)
    part = xp.where(xp.abs(part) <= _DOUBLE_ULPS * nearest, xp.zeros_like(part), part)
    less_than_one = nearest + part < 1
    nearest = xp.where(less_than_one, xp.ones_like(nearest), nearest)
    part = xp.where(less_than_one, xp.zeros_like(part), part)
    share = nearest + part

    index = xp.where(part > 0, nearest, nearest - 1)  # of the ceil(k)-th largest, counted from 0
    ordered = descending(x, xp)
    quantile = xp.take_along_axis(ordered, xp.astype(index, slices.number.dtype), axis=-1)

    above, tied = counted & (x > quantile), counted & (x == quantile)
    rest = (nearest - xp.astype(_count(above, xp), x.dtype) + part) / xp.astype(_count(tied, xp), x.dtype)
    weights = xp.where(above, xp.ones_like(x), xp.where(tied, rest, xp.zeros_like(x))) / share
    excess = xp.sum(weights * slices.shifted, axis=-1, keepdims=True)
    return _Solution(weights, excess, quantile - slices.top, xp.zeros_like(excess))


def _soft_maximum(slices: _Slices, temperature: float, xp: Namespace) -> _Solution:
    """KLPenalty. excess = t log mean exp(z / t), weights = softmax(z / t)."""
    t, unit = _in_units(temperature, slices.shifted, xp)
    z = -_distance(-slices.shifted, unit, xp)
    exponent = _ratio(slices, z, xp.full_like(slices.top, t), xp)
    weights = xp.exp(exponent)
    weights = weights / xp.sum(weights, axis=-1, keepdims=True)
    # Where the temperature dwarfs the losses, the ratio loses its digits to underflow; there the mean is exact enough.
    flat = xp.min(z, axis=-1, keepdims=True) >= -t * (float(xp.finfo(z.dtype).eps) / 4)
    excess = xp.where(flat, _uniform(slices, xp).excess, t * _log_mean_exp(exponent, slices, xp) * unit)
    return _Solution(weights, excess, excess, _constant(temperature, excess, xp))


def _tilted(slices: _Slices, strength: float, xp: Namespace) -> _Solution:
    """ChiSquarePenalty. ``n p = relu(1 + tilt)``, ``tilt = (lift + z) / s``, lift = top - nu such that p sums to 1.

    With k losses active, ``k lift = (n - k) s - sum z`` over them. A loss is active if the sum is still too small where
    its own weight begins: ``mean relu(x - loss) < s``.
    """
    x, counted, size = slices.losses, slices.counted, slices.size
    s, unit = _in_units(strength, x, xp)

    ordered = _ordered(slices, xp)
    parts = _cut(ordered, xp)

    def is_active(loss: Array) -> Array:
        height: Array = sum(
            _sum(_distance(_relu(part.losses - loss, xp), unit, xp), part.counted, xp)
            for part in _down_to(parts, loss, xp)
        )
        return (loss == slices.top) | (height / size < s)

    active = counted & (x >= _smallest_active(ordered, is_active, xp))
    number = xp.astype(_count(active, xp), x.dtype)
    z = -_distance(-slices.shifted, unit, xp)
    lift = ((size - number) * s - _sum(z, active, xp)) / number
    tilt = xp.where(active, lift + z, -s) / s
    weights = xp.where(active, _relu(1 + tilt, xp), xp.zeros_like(x))
    weights = weights / xp.sum(weights, axis=-1, keepdims=True)  # n, but for rounding
    divergence = _sum(tilt**2, counted, xp) / (2 * size)
    excess = xp.sum(weights * slices.shifted, axis=-1, keepdims=True) - s * divergence * unit
    return _Solution(weights, excess, -lift * unit, _constant(strength, excess, xp))


def _clipped_line(slices: _Slices, ball: _Ball, xp: Namespace) -> _Solution:
    """ChiSquareBall. p = relu(c + z) / sum relu(c + z) with c such that n sum p^2 = 1 + growth.

    With k losses active, of mean mu and variance v, ``n sum p^2 = (n/k) (1 + v / (c + mu)^2)``. So
    ``c + mu = sqrt(n v / room)`` with ``room = (1 + growth) k - n``. A loss is active if at ``c = -loss`` the sum is
    still too large: ``n v > room (mu - loss)^2`` over the losses above it.
    """
    size = slices.size
    ordered = _ordered(slices, xp)
    parts = _cut(ordered, xp)

    def moments(part: _Slices, above: Callable[[Array, Array], Array], lowest: Array, span: Array) -> tuple[Array, ...]:
        # Heights above the lowest loss, in units of the span from there to the top: scales from 1e-30 to 1e30 alike.
        x = part.losses
        active = part.counted & above(x, lowest)
        number = xp.astype(_count(active, xp), x.dtype)
        total = xp.clip(number, min=1)
        height = xp.where(active, x - lowest, xp.zeros_like(x)) / span
        mean = xp.sum(height, axis=-1, keepdims=True) / total
        variance = _sum((height - mean) ** 2, active, xp) / total
        return number, mean, variance, active, height

    def statistics(above: Callable[[Array, Array], Array], lowest: Array) -> tuple[Array, ...]:
        span = _or_one(slices.top - lowest, xp)
        found = [moments(part, above, lowest, span)[:3] for part in _down_to(parts, lowest, xp)]
        number = xp.clip(sum(number for number, _, _ in found), min=1)
        mean = sum(number * mean for number, mean, _ in found) / number
        variance = sum(number * (variance + (own - mean) ** 2) for number, own, variance in found) / number
        return number, mean, variance, ball.room(number)

    def is_active(loss: Array) -> Array:
        # Over the losses above it alone: with it the two sides would only differ in their last digits.
        _, mean, variance, room = statistics(operator.gt, loss)
        return (loss == slices.top) | (size * variance > room * mean**2)

    lowest = _smallest_active(ordered, is_active, xp)
    span = slices.top - lowest
    number, mean, variance, room = statistics(operator.ge, lowest)
    reach = xp.sqrt(size * variance / _or_one(room, xp))  # c + mu, in units of the span
    excess: Array = 0.0
    pieces = []
    for part in _cut(slices, xp):
        *_, active, height = moments(part, operator.ge, lowest, _or_one(span, xp))
        tilt = (height - mean) / _or_one(reach, xp)
        pieces.append(xp.where(active, _relu(1 + tilt, xp), xp.zeros_like(tilt)) / number)
        excess = excess + xp.sum(pieces[-1] * part.shifted, axis=-1, keepdims=True)
    weights = _join(pieces, xp)
    nu_excess = -span * (1 - mean + reach * ((size - number) / size))
    return _Solution(weights, excess, nu_excess, _times(reach * (number / size), span, xp))


def _tempered(slices: _Slices, ball: _Ball, xp: Namespace) -> _Solution:
    """KLBall. p = softmax(z / s), with s such that ``sum p z/s - log mean exp(z/s)``, its divergence, is the radius.

    The divergence falls as s grows; its derivative with respect to log s is minus the variance of z/s under p. It is at
    most ``(range / s)^2 / 8``, which bounds s from above; at a hundredth of the gap below the maximum it is saturated.
    """
    reach = _or_one(-xp.min(slices.shifted, axis=-1, keepdims=True), xp)
    # Large losses in a unit that leaves room for a scale s far larger than they are.
    half_range = 2.0 ** round(math.log2(float(xp.finfo(reach.dtype).max)) / 2)
    unit = xp.where(reach > half_range, half_range, xp.ones_like(reach))
    z, reach = slices.shifted / unit, reach / unit
    allowed = _allowed(slices, ball, xp)

    parts = _cut(slices, xp)

    def exponents(part: _Slices, s: Array) -> tuple[Array, Array]:
        exponent = _ratio(part, part.shifted / unit, s, xp)
        return exponent, exponent > _LARGE

    def middle(s: Array) -> tuple[Array, Array]:
        number: Array = 0
        total: Array = 0.0
        for part in parts:
            exponent, large = exponents(part, s)
            number, total = number + _count(large, xp), total + _sum(exponent, large, xp)
        return number, total / xp.astype(number, total.dtype)

    def surplus(s: Array) -> tuple[Array, Array]:
        number, centre = middle(s)
        grown: Array = 0.0
        first: Array = 0.0
        second: Array = 0.0
        for part in parts:
            exponent, large = exponents(part, s)
            relative = exponent - centre
            value, more = _grown(relative, large, xp)
            grown, weighted = grown + more, value * relative
            first = first + xp.sum(weighted, axis=-1, keepdims=True)
            second = second + xp.sum(weighted * relative, axis=-1, keepdims=True)
        total, rest = _normalise(grown, number, allowed, xp)
        mean = first / total
        return mean + rest, xp.clip(second / total - mean**2, min=0.0)

    gap = _or_one(-xp.max(xp.where(slices.losses < slices.top, z, -reach), axis=-1, keepdims=True), xp)
    low = xp.log(gap) - math.log(100)
    high = xp.log(reach) - 0.5 * math.log(8 * math.log1p(ball.growth))
    at_low = surplus(xp.exp(low))[0]
    s = xp.exp(_root(lambda log_s: surplus(xp.exp(log_s)), low, high, at_low, ball.growth, xp))
    # The rounding of log s is not relative to s; one more step, on s itself, takes it away.
    value, slope = surplus(s)
    s = s * (1 + xp.clip(value / xp.clip(slope, min=1e-9), min=-1e-3, max=1e-3))
    exponent = _join([exponents(part, s)[0] for part in parts], xp)
    weights = xp.exp(exponent)
    weights = weights / xp.sum(weights, axis=-1, keepdims=True)
    excess = xp.sum(weights * slices.shifted, axis=-1, keepdims=True)
    return _Solution(weights, excess, s * _log_mean_exp(exponent, slices, xp) * unit, _times(s, unit, xp))


def _clipped_power(slices: _Slices, order: float, ball: _Ball, xp: Namespace) -> _Solution:
    """CressieReadBall. p = relu(c + z)^b / sum, b = 1 / (order - 1), with c such that the divergence is the radius.

    With ``y = relu(c + z) / c``, the height relative to the largest, the Renyi divergence is
    ``b log m - log mean(y^b)``, ``m = sum p y``, and its derivative with respect to c is
    ``-b (b + 1) sum p (y / m - 1)^2 / (c y)``.

    The unknown is the logarithm of the distance d = c + z of the lowest active loss: for small b its power counts,
    however close to 0 d itself may be. That makes log d -1 or -1e30, so the steps are taken in arsinh(log d). Lengths
    are in units of the span from the lowest active loss to the top.
    """
    x = slices.losses
    b = 1 / (order - 1)
    allowed = _allowed(slices, ball, xp)
    limits = xp.finfo(x.dtype)
    ordered = _ordered(slices, xp)
    parts = _cut(ordered, xp)

    def lengths(part: _Slices, lowest: Array, span: Array, d: Array) -> tuple[Array, ...]:
        x, zero = part.losses, xp.zeros_like(part.losses)
        active = part.counted & (x >= lowest)
        height = xp.where(x == slices.top, xp.ones_like(x), xp.where(active, x - lowest, zero) / span)
        depth = xp.where(active, part.shifted, zero) / span / (1 + d)  # y - 1
        return active, height, depth, active & (depth > math.expm1(_LARGE / b))

    def middles(lowest: Array, d: Array) -> tuple[Array, ...]:
        span = _or_one(slices.top - lowest, xp)
        number: Array = 0
        middle: Array = 0.0
        middle_depth: Array = 0.0
        for part in _down_to(parts, lowest, xp):
            _, height, depth, large = lengths(part, lowest, span, d)
            number = number + _count(large, xp)
            middle, middle_depth = middle + _sum(height + d, large, xp), middle_depth + _sum(depth, large, xp)
        total = xp.astype(number, x.dtype)
        return number, middle / total, middle_depth / total, span

    def powers(part: _Slices, lowest: Array, log_d: Array, middles: tuple[Array, ...]) -> tuple[Array, ...]:
        _, middle, middle_depth, span = middles
        d = xp.exp(log_d)
        active, height, depth, large = lengths(part, lowest, span, d)
        above = height > 0
        distance = xp.where(above, height + d, 1.0)  # c + z
        relative = (depth - middle_depth) * ((1 + d) / middle)  # y / its mean over the large ones - 1
        log_y = xp.where(above, xp.log(distance), log_d) - xp.log(middle)
        log_y = xp.where(xp.abs(relative) < 0.5, xp.log1p(xp.clip(relative, min=-0.5, max=0.5)), log_y)
        exponent = xp.where(active, xp.clip(b * log_y, min=_NONE), _NONE)
        return exponent, large, relative, height + d, xp.where(above, d / distance, 1.0)

    def surplus(lowest: Array, log_d: Array) -> tuple[Array, Array]:
        number, middle, *_ = found = middles(lowest, xp.exp(log_d))
        grown: Array = 0.0
        means: list[Array] = [0.0] * 5
        for part in _down_to(parts, lowest, xp):
            exponent, large, relative, length, steep = powers(part, lowest, log_d, found)
            value, more = _grown(exponent, large, xp)
            grown, steep = grown + more, value * steep
            averaged = (value * length, value * relative, steep, steep * relative, steep * relative**2)
            means = [old + xp.sum(new, axis=-1, keepdims=True) for old, new in zip(means, averaged, strict=True)]
        total, rest = _normalise(grown, number, allowed, xp)
        mean, change, zeroth, first, second = (value / total for value in means)
        mean = mean / middle
        slope = b * (b + 1) * xp.clip(second - 2 * change * first + change**2 * zeroth, min=0.0) / mean**2
        return b * _log_one_plus(change, mean, xp) + rest, slope

    # d = 0, its power too
    stretch = max(1.0, 1 / b)
    at_zero = xp.full_like(slices.top, 10 * _NONE * stretch)
    lowest = _smallest_active(ordered, lambda loss: (loss == slices.top) | (surplus(loss, at_zero)[0] > 0), xp)
    span = _or_one(slices.top - lowest, xp)
    # d lies between where its power is lost in rounding and where the next loss becomes active; if there is none, the
    # divergence, at most b (b + 1) / (2 d^2), bounds it.
    lower = x < lowest
    some = xp.any(lower, axis=-1, keepdims=True)
    next_gap = xp.where(some, -xp.max(xp.where(lower, x - lowest, -xp.inf), axis=-1, keepdims=True), 1.0)
    bound = 0.5 * math.log(b * (b + 1) / (2 * math.log1p(ball.growth)))
    high = xp.where(some, xp.log(next_gap) - xp.log(span), bound)
    high = xp.clip(high, max=0.75 * math.log(float(limits.max)))
    low = xp.clip(high - 1, max=2 * math.log(float(limits.eps)) * stretch)
    at_low = surplus(lowest, at_zero)[0]

    def surplus_at(position: Array) -> tuple[Array, Array]:
        value, slope = surplus(lowest, xp.sinh(position))
        return value, slope * xp.cosh(position)

    log_d = xp.sinh(_root(surplus_at, xp.asinh(low), xp.asinh(high), at_low, ball.growth, xp))
    _, middle, middle_depth, _ = found = middles(lowest, xp.exp(log_d))
    exponent = _join([powers(part, lowest, log_d, found)[0] for part in _cut(slices, xp)], xp)
    weights = xp.exp(exponent)
    weights = weights / xp.sum(weights, axis=-1, keepdims=True)
    excess = xp.sum(weights * slices.shifted, axis=-1, keepdims=True)
    # s / (order - 1) is the mean of (c + z)^b, to the power of 1/b; nu = top + s / (order - 1) - c.
    c = 1 + xp.exp(log_d)
    log_ratio = _log_mean_exp(exponent, slices, xp) / b + _log_one_plus(middle_depth, middle / c, xp)
    return _Solution(weights, excess, span * (c * xp.expm1(log_ratio)), _times(c * xp.exp(log_ratio) / b, span, xp))
