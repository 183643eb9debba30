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

from drrho_core import _validate
from drrho_core._array_api import Array, Namespace, device_of, known, namespace_of, values_visible, wide_dtype
from drrho_core._routines import descending, repeat
from drrho_core.extend import Carry


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

    @property
    def shifted(self) -> Array:
        """Losses less the largest; computed when asked for, because it is as large as they are."""
        return self.losses - self.top


class _Solution(NamedTuple):
    """What a solver returns: risk and nu as differences from the largest loss, so that no common offset hurts."""

    weights: Array  # (..., n)
    excess: Array  # (..., 1), risk - top
    nu_excess: Array  # (..., 1), nu - top
    scale: Array  # (..., 1), the dual variable s


@dataclass(frozen=True)
class AmbiguitySet(ABC):
    """What the seven sets share. They are frozen and hashable, and validated when built.

    A parameter is a real, finite number, or an array without axes, which is read once. Under jit it is a constant.
    """

    @abstractmethod
    def _solve(self, slices: _Slices, xp: Namespace) -> _Solution:
        """Return the worst case of every slice."""


def _store_checked(ambiguity_set: AmbiguitySet, name: str, holds: Callable[[float], bool], rule: str) -> None:
    """Replace a parameter by its checked value, a Python number, when a set is built."""
    object.__setattr__(ambiguity_set, name, _validate.static_number(name, getattr(ambiguity_set, name), holds, rule))


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
        _store_checked(self, "alpha", lambda alpha: 0 < alpha <= 1, "lie in (0, 1]")

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
        _store_checked(self, "temperature", lambda temperature: temperature > 0, "be positive")

    def _solve(self, slices: _Slices, xp: Namespace) -> _Solution:
        return _soft_maximum(slices, self.temperature, xp)


@dataclass(frozen=True)
class CappedKLPenalty(AmbiguitySet):
    """KL penalty whose weights may not exceed ``1 / (alpha n)``, as those of CVaR: a smooth mean of the worst share.

    ``phi(t) = t log t - t + 1`` on ``[0, 1 / alpha]`` and infinite elsewhere; the weights are
    ``min(exp((x - nu) / temperature), 1 / alpha) / n``, with nu such that they sum to 1, and the dual is
    (nu, temperature). No single loss can take everything, however large it is, and no weight is 0. (KL-regularised
    CVaR of Levy et al., arXiv 2010.05893, whose `size` is alpha.)

    ``alpha n`` is evaluated as for `CVaR`: an integer where it is one but for float64's rounding.

    Parameters
    ----------
    temperature : float
        Positive, in units of the losses; towards 0 the set is ``CVaR(alpha)``, towards infinity the risk is the mean.
    alpha : float
        In (0, 1]; 1 gives the mean, with nu the smallest loss; up to 1 / n the set is ``KLPenalty(temperature)``.

    Raises
    ------
    TypeError
        If a parameter is not a real number.
    ValueError
        If a parameter is not finite, `temperature` is not positive or `alpha` lies outside (0, 1].

    Examples
    --------
    >>> import numpy as np
    >>> losses = np.log(np.asarray([1.0, 2.0, 3.0, 40.0]))
    >>> worst_case(losses, KLPenalty(1.0)).weights.round(3).tolist()
    [0.022, 0.043, 0.065, 0.87]
    >>> worst_case(losses, CappedKLPenalty(1.0, 0.5)).weights.round(3).tolist()
    [0.083, 0.167, 0.25, 0.5]
    """

    temperature: float
    alpha: float

    def __post_init__(self) -> None:
        _store_checked(self, "temperature", lambda temperature: temperature > 0, "be positive")
        _store_checked(self, "alpha", lambda alpha: 0 < alpha <= 1, "lie in (0, 1]")

    def _solve(self, slices: _Slices, xp: Namespace) -> _Solution:
        return _capped_soft_maximum(slices, self.temperature, self.alpha, xp)


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
        _store_checked(self, "radius", lambda radius: radius >= 0, "be at least 0")

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
        _store_checked(self, "strength", lambda strength: strength > 0, "be positive")

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
        _store_checked(self, "radius", lambda radius: radius >= 0, "be at least 0")

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
        _store_checked(self, "order", lambda order: order > 1, "be greater than 1")
        _store_checked(self, "radius", lambda radius: radius >= 0, "be at least 0")

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
        One of `CVaR`, `KLPenalty`, `CappedKLPenalty`, `KLBall`, `ChiSquarePenalty`, `ChiSquareBall`,
        `CressieReadBall`.
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
    axis = _validate.axis(axis, "losses", losses)
    check_values("losses", losses, axis, where, xp)
    return solve(losses, ambiguity_set, axis, where, losses.dtype, xp)


# ---------------------------------------------------------------------------------------------------------------------
# What every set shares: checks, the axis, `where`, half types. `drrho_core.risk` uses these four, too.


def check_ambiguity_set(ambiguity_set: AmbiguitySet) -> None:
    """Check that this is one of the sets, not its class and not a number."""
    if not isinstance(ambiguity_set, AmbiguitySet):
        raise TypeError(
            f"ambiguity_set must be an ambiguity set such as CVaR(0.1), got {_validate.describe(ambiguity_set)}"
        )


def check_losses(arrays: dict[str, Array], where: Array | None, xp: Namespace | None) -> Namespace:
    """Check everything about losses of one shape but their axis and their values, and return their namespace."""
    together = arrays if where is None else {**arrays, "where": where}
    xp = namespace_of(together, xp)
    for name, array in arrays.items():
        _validate.floating(name, array, xp)
    _validate.same_dtype(arrays)
    _validate.same_device(together, xp)
    _validate.detached(arrays, xp)
    (first, losses), *rest = arrays.items()
    for name, array in rest:
        _validate.shape(name, array, tuple(losses.shape), f"{first}.shape")
    if where is not None:
        _validate.mask("where", where, first, losses, xp)
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
    _validate.values(name, seen, lambda x: xp.abs(x) <= limit, f"be finite and at most {limit:.3g} in size", xp)


def solve(
    losses: Array, ambiguity_set: AmbiguitySet, axis: int, where: Array | None, dtype: object, xp: Namespace
) -> WorstCase:
    """Solve without checks; results in `dtype`. A slice with a bad loss, or with none that counts, becomes nan."""
    x = _axis_moved(xp.astype(losses, wide_dtype(losses.dtype, xp), copy=False), axis, -1, xp)
    limit = _largest_usable(losses, axis, xp)
    if where is None:
        counted = xp.ones_like(x, dtype=xp.bool)
        valid = (xp.max(x, axis=-1, keepdims=True) <= limit) & (xp.min(x, axis=-1, keepdims=True) >= -limit)
    else:
        counted = _axis_moved(xp.broadcast_to(where, losses.shape), axis, -1, xp)
        usable = (xp.abs(x) <= limit) | ~counted
        valid = xp.all(usable, axis=-1, keepdims=True) & xp.any(counted, axis=-1, keepdims=True)
    plain = where is None and known(valid, xp)
    if not plain:
        # An invalid slice is solved as n zeros, so that no solver has to think of it, and is overwritten at the end.
        counted = counted | ~valid
        x = xp.where(counted & valid, x, xp.zeros_like(x))
        bottom = xp.min(xp.where(counted, x, xp.inf), axis=-1, keepdims=True)
        x = xp.where(counted, x, bottom)
    top = xp.max(x, axis=-1, keepdims=True)
    number = _count(counted, xp)
    solution = ambiguity_set._solve(_Slices(x, counted, number, xp.astype(number, x.dtype), top), xp)

    def finish(array: Array) -> Array:
        return xp.astype(array if plain else xp.where(valid, array, xp.nan), dtype, copy=False)

    # Only s can leave the range of a half type.
    scale = xp.where(solution.scale > float(xp.finfo(dtype).max), xp.inf, solution.scale)
    risk, nu, scale = (
        xp.squeeze(finish(array), axis=-1) for array in (top + solution.excess, top + solution.nu_excess, scale)
    )
    return WorstCase(risk, _axis_moved(finish(solution.weights), -1, axis, xp), (nu, scale))


def _axis_moved(array: Array, source: int, destination: int, xp: Namespace) -> Array:
    """Return ``moveaxis(array, source, destination)``, which torch cannot map over (`torch.vmap`)."""
    order = list(range(array.ndim))
    order.insert(destination % array.ndim, order.pop(source))
    return xp.permute_dims(array, tuple(order))


def _largest_usable(losses: Array, axis: int, xp: Namespace) -> float:
    """Return how large a loss may be: sums over n differences of two losses still have to be finite."""
    largest = float(xp.finfo(wide_dtype(losses.dtype, xp)).max)
    return min(largest / (8 * int(losses.shape[axis])), float(xp.finfo(losses.dtype).max))


def _count(mask: Array, xp: Namespace) -> Array:
    """Return the number of True along the last axis, (..., 1), an integer."""
    return xp.count_nonzero(mask, axis=-1, keepdims=True)


def _only(values: Array, mask: Array, xp: Namespace) -> Array:
    """Return finite values where they are marked, 0 elsewhere: a product, because to select at random costs more."""
    return values * xp.astype(mask, values.dtype)


def _sum(values: Array, mask: Array, xp: Namespace) -> Array:
    """Return the sum of the marked entries along the last axis, all of them finite, (..., 1)."""
    return xp.sum(_only(values, mask, xp), axis=-1, keepdims=True)


def _piece() -> int:
    """Return the number of losses per piece of a long axis: the results for one piece stay in the caches.

    A piece is also large enough to be shared among threads. With pieces of the size at which a library begins to share,
    some operations call for the other threads and some do not, and that was many times slower than one thread alone.
    """
    return 2**17


def _cut(slices: _Slices, xp: Namespace) -> list[_Slices]:
    """Cut slices along the last axis, so that sums over them can be taken piece by piece.

    A pass over n numbers costs mostly memory: to fetch them, and to be given room for results. A compiler knows that,
    and a device has room for more, so what is traced or lives there stays whole.
    """
    if not values_visible(slices.losses, xp):
        return [slices]
    *rows, n = slices.losses.shape
    length = max(_piece() // max(math.prod(rows), 1), _piece() // 64)
    if n <= length:
        return [slices]
    return [
        slices._replace(
            losses=slices.losses[..., start : start + length], counted=slices.counted[..., start : start + length]
        )
        for start in range(0, n, length)
    ]


def _ordered(slices: _Slices, xp: Namespace) -> _Slices:
    """Return slices sorted from the largest loss to the smallest, for sums: what is selected then comes in one run."""
    x = descending(slices.losses, xp)
    if known(slices.number == x.shape[-1], xp):
        return slices._replace(losses=x)
    return slices._replace(losses=x, counted=_first(slices.number, x, xp))


def _first(number: Array, like: Array, xp: Namespace) -> Array:
    """Return a mask of an array's shape that marks so many entries at the start of every slice."""
    return xp.arange(like.shape[-1], dtype=number.dtype, device=device_of(like)) < number


def _down_to(ordered: _Slices, lowest: Array, xp: Namespace) -> list[_Slices]:
    """Cut sorted slices, without the parts in which every loss is below `lowest`."""
    parts = _cut(ordered, xp)
    return [part for part in parts if len(parts) == 1 or not known(part.losses[..., :1] < lowest, xp)]


def _join(pieces: list[Array], xp: Namespace) -> Array:
    """Put the pieces of an array together."""
    return pieces[0] if len(pieces) == 1 else xp.concat(pieces, axis=-1)


def _totals(rows: list[tuple[Array, ...]], xp: Namespace) -> tuple[Array, ...]:
    """Add up what was summed piece by piece, (..., 1) each, as the library adds up."""
    if len(rows) == 1:
        return rows[0]
    return tuple(xp.sum(xp.concat(column, axis=-1), axis=-1, keepdims=True) for column in zip(*rows, strict=True))


def _assemble(
    slices: _Slices, weigh: Callable[[_Slices], tuple[Array, ...]], xp: Namespace
) -> tuple[Array, Array, tuple[Array, ...]]:
    """Return values, (..., n), the sum of values times losses less the largest, and the sums of further arrays.

    ``weigh(part)`` returns the values of a part and, if more is to be summed, what.
    """
    pieces, rows = [], []
    for part in _cut(slices, xp):
        values, *others = weigh(part)
        pieces.append(values)
        rows.append(tuple(xp.sum(array, axis=-1, keepdims=True) for array in (values * part.shifted, *others)))
    excess, *sums = _totals(rows, xp)
    return _join(pieces, xp), excess, tuple(sums)


def _relu(values: Array, xp: Namespace) -> Array:
    """Return the positive part."""
    return xp.clip(values, min=0.0)


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

# Limits are functions and not constants, here and below: ``torch.compile(dynamic=True)`` makes symbols of the numbers
# of a module, and a branch cannot depend on a symbol.


def _smallest_growth() -> float:
    """Return the growth below which a ball is radius 0 in any dtype; it lies in the range of float32."""
    return 1e-36


def _largest_growth() -> float:
    """Return the growth above which a ball is saturated on any axis; it lies in the range of float32."""
    return 1e18


def _double_ulps() -> float:
    """Return the relative rounding of a parameter that is a Python float and of the few operations on it."""
    return 8 * 2.0**-53


Table: TypeAlias = Callable[[Array, Array], Array]
"""What belongs to k of the n losses of a slice, k and n (..., 1), k an integer, n in the losses' dtype."""


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
    if growth < _smallest_growth():
        return _uniform(slices, xp)
    growth = min(growth, _largest_growth())
    x = slices.losses

    def room(number: Array, size: Array) -> Array:
        number = xp.astype(number, x.dtype)
        return _product_minus(growth, number, size - number, x.shape[-1], xp)

    ball = _Ball(growth, room)
    inner = solver(slices, ball, xp)
    at_top = slices.counted & (x == slices.top)
    ties = _count(at_top, xp)
    saturated = ball.room(ties, slices.size) >= -_double_ulps() * slices.size
    if known(~saturated, xp):
        return inner
    at_top_only = xp.where(at_top, 1 / xp.astype(ties, x.dtype), xp.zeros_like(inner.weights))
    zero = xp.zeros_like(slices.top)
    return _Solution(
        xp.where(saturated, at_top_only, inner.weights), *(xp.where(saturated, zero, value) for value in inner[1:])
    )


def _uniform(slices: _Slices, xp: Namespace) -> _Solution:
    """Return the mean, as a ball of radius 0 does; its dual is (mean, inf)."""
    weights = xp.where(slices.counted, 1 / slices.size, xp.zeros_like(slices.losses))
    mean = _mean(slices, xp)
    return _Solution(weights, mean, mean, xp.full_like(mean, xp.inf))


def _mean(slices: _Slices, xp: Namespace) -> Array:
    """Return the mean loss less the largest, (..., 1)."""
    rows = [(_sum(part.shifted / slices.size, part.counted, xp),) for part in _cut(slices, xp)]
    return _totals(rows, xp)[0]


def _run() -> int:
    """Return the number of neighbours among sorted losses that one number stands for in a first search."""
    return 4


def _thinned(ordered: _Slices, xp: Namespace) -> _Slices:
    """Return the means of runs of sorted losses, nearly the same problem."""
    *rows, n = ordered.losses.shape
    losses = xp.mean(xp.reshape(ordered.losses[..., : n - n % _run()], (*rows, n // _run(), _run())), axis=-1)
    number = xp.clip(ordered.number // _run(), min=1)
    return _Slices(losses, _first(number, losses, xp), number, xp.astype(number, losses.dtype), losses[..., :1])


def _last_active(ordered: _Slices, is_active: Callable[[_Slices, Array], Array], xp: Namespace) -> Array:
    """Return the position of the last sorted loss whose weight is positive, (..., 1), by a binary search.

    ``is_active(ordered, loss)``, (..., 1) to bool, has to be True up to that loss and False from there on. Many losses
    are thinned first, and searched from where the thinned ones end in steps that double.
    """
    n = ordered.losses.shape[-1]
    low, high = xp.zeros_like(ordered.number), ordered.number - 1
    count, step, probe = (n - 1).bit_length(), xp.full_like(low, n), (low + high + 1) // 2
    if len(_cut(ordered, xp)) > 1:
        guess = _run() * _last_active(_thinned(ordered, xp), is_active, xp) + _run() - 1
        count, step, probe = 2 * count + 1, xp.full_like(low, _run() // 2), xp.minimum(guess, high)

    def narrow(bracket: Carry) -> Carry:
        low, high, step, probe = bracket
        active = is_active(ordered, xp.take_along_axis(ordered.losses, probe, axis=-1))
        low, high = xp.where(active, probe, low), xp.where(active, high, xp.maximum(probe - 1, low))
        middle = (low + high + 1) // 2
        probe = xp.where(active, xp.minimum(low + step, middle), xp.maximum(high + 1 - step, middle))
        return low, high, xp.minimum(2 * step, xp.full_like(step, n)), probe

    bracket = (low, high, step, probe)
    return repeat(count, narrow, bracket, xp, finished=lambda bracket: bracket[0] >= bracket[1])[0]


def _smallest_active(ordered: _Slices, is_active: Callable[[_Slices, Array], Array], xp: Namespace) -> Array:
    """Return the smallest loss whose weight is positive, (..., 1); the largest loss always has one."""
    return xp.take_along_axis(
        ordered.losses,
        _last_active(ordered, lambda some, loss: (loss == some.top) | is_active(some, loss), xp),
        axis=-1,
    )


def _nothing() -> float:
    """Return a logarithm whose exponential is 0 in any dtype."""
    return -1e4


def _large() -> float:
    """Return the exponent, relative to the largest, above which exponents count as large."""
    return -0.5


def _floor(dtype: object, xp: Namespace) -> float:
    """Return the smallest exponent to be used: below it exponentials are subnormal, and forty times as slow."""
    return float(math.ceil(math.log(float(xp.finfo(dtype).smallest_normal))))


def _grown(exponent: Array, large: Array, active: Array, xp: Namespace) -> tuple[Array, Array]:
    """Return ``v = exp(e)``, from which ``p = v / sum v``, and the sum of ``v - 1`` or, where e is not large, v."""
    value = _only(xp.exp(exponent), active, xp)
    mask = xp.astype(large, value.dtype)
    return value, xp.sum(xp.expm1(exponent) * mask + (value - value * mask), axis=-1, keepdims=True)


def _normalise(
    grown: Array, number: Array, size: Array, allowed: Table, xp: Namespace
) -> tuple[Array, tuple[Array, Array]]:
    """Return ``sum exp(e)`` and ``-log mean exp(e) - log(1 + growth)`` as two terms, given `_grown`'s sum.

    The Renyi divergence of p less that of the ball is a mean of e plus the latter. Near uniform weights, and on a
    plateau where some losses are close together and the rest is far below, that difference is tiny and its digits
    decide the weights. So both logarithms are taken relative to uniform weights on the `number` = k losses with a
    large exponent, ``-log(sum exp(e) / k) - log((1 + growth) k / n)``, the second from the table `allowed`; and
    exponents come relative to the middle of those, so that all that is summed is of the order of the divergence.
    """
    total = xp.astype(number, grown.dtype)
    change = grown / total
    return total * (1 + change), (-xp.log1p(change), -allowed(number, size))


def _balance(mean: Array, others: tuple[Array, Array], xp: Namespace) -> Array:
    """Return the sum of three terms, 0 where it is less than their rounding: a search is over there."""
    total = mean + others[0] + others[1]
    rounding = float(xp.finfo(total.dtype).eps) / 4 * (xp.abs(mean) + xp.abs(others[0]) + xp.abs(others[1]))
    return xp.where(xp.abs(total) <= rounding, xp.zeros_like(total), total)


def _allowed(ball: _Ball, xp: Namespace) -> Table:
    """Return the table of ``log((1 + growth) k / n)``."""

    def allowed(number: Array, size: Array) -> Array:
        part = xp.astype(number, size.dtype) / size
        return _log_one_plus(ball.room(number, size) / size, (1 + ball.growth) * part, xp)

    return allowed


def _log_one_plus(change: Array, total: Array, xp: Namespace) -> Array:
    """Return ``log(total)``, ``total = 1 + change`` > 0, as precise near 0 as far from it."""
    near = xp.abs(change) < 0.5
    return xp.where(near, xp.log1p(xp.where(near, change, 0.0)), xp.log(xp.where(near, 1.0, total)))


def _exponential(
    slices: _Slices, exponents: Callable[[_Slices], tuple[Array, Array]], xp: Namespace
) -> tuple[Array, Array, Array]:
    """Return weights in proportion to exp(e), the mean loss less the largest, and log mean exp(e), as precise near 0.

    ``exponents(part)`` are e and the mask of the entries that have a weight; e is small at the others that count.
    """

    def weigh(part: _Slices) -> tuple[Array, ...]:
        exponent, active = exponents(part)
        values = _only(xp.exp(exponent), active, xp)
        return values, values, _only(xp.expm1(exponent), part.counted, xp)

    values, excess, (total, change) = _assemble(slices, weigh, xp)
    return values / total, excess / total, _log_one_plus(change / slices.size, total / slices.size, xp)


def _ratio(z: Array, scale: Array, xp: Namespace) -> Array:
    """Return the exponents ``z / scale``, z <= 0, or the smallest exponent; nothing overflows."""
    floor = _floor(z.dtype, xp)
    return xp.maximum(z, floor * xp.clip(scale, max=float(xp.finfo(z.dtype).max) / (-2 * floor))) / scale


def _steps() -> int:
    """Return the number of steps of `_root`.

    Of ten thousand problems, with losses from 1e-100 to 1e100, the hardest took 14 (float32: 16).
    """
    return 18


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
    at_low = xp.clip(at_low, min=_double_ulps())

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
    return repeat(_steps(), improve, start, xp, finished=lambda carry: carry[3] <= still)[0]


# ---------------------------------------------------------------------------------------------------------------------
# One solver per set; the balls' ends are dealt with above.


def _share(slices: _Slices, alpha: float, xp: Namespace) -> tuple[Array, Array]:
    """Return k = alpha n, at least 1, as the nearest whole number and the part beyond, without rounding error."""
    size = slices.size
    nearest = xp.round(alpha * size)
    part = _product_minus(max(alpha, _smallest_growth()), size, nearest, slices.losses.shape[-1], xp)
    part = xp.where(xp.abs(part) <= _double_ulps() * nearest, xp.zeros_like(part), part)
    less_than_one = nearest + part < 1
    return xp.where(less_than_one, xp.ones_like(nearest), nearest), xp.where(less_than_one, xp.zeros_like(part), part)


def _largest_share(slices: _Slices, alpha: float, xp: Namespace) -> _Solution:
    """CVaR. With k = alpha n, at least 1: 1/k above the ceil(k)-th largest loss, what is left of 1 shared at it."""
    x = slices.losses
    nearest, part = _share(slices, alpha, xp)
    share = nearest + part

    index = xp.where(part > 0, nearest, nearest - 1)  # of the ceil(k)-th largest, counted from 0
    ordered = descending(x, xp)
    quantile = xp.take_along_axis(ordered, xp.astype(index, slices.number.dtype), axis=-1)

    del ordered

    def above_and_tied(some: _Slices) -> tuple[Array, Array]:
        return some.counted & (some.losses > quantile), some.counted & (some.losses == quantile)

    counts = [tuple(_count(mask, xp) for mask in above_and_tied(some)) for some in _cut(slices, xp)]
    above, tied = (xp.astype(number, x.dtype) for number in _totals(counts, xp))
    rest = (nearest - above + part) / tied

    def weigh(some: _Slices) -> tuple[Array, ...]:
        above, tied = (xp.astype(mask, x.dtype) for mask in above_and_tied(some))
        return ((above + rest * tied) / share,)

    weights, excess, _ = _assemble(slices, weigh, xp)
    return _Solution(weights, excess, quantile - slices.top, xp.zeros_like(excess))


def _soft_maximum(slices: _Slices, temperature: float, xp: Namespace) -> _Solution:
    """KLPenalty. excess = t log mean exp(z / t), weights = softmax(z / t)."""
    t, unit = _in_units(temperature, slices.losses, xp)
    temperatures = xp.full_like(slices.top, t)

    def exponents(part: _Slices) -> tuple[Array, Array]:
        return _ratio(-_distance(-part.shifted, unit, xp), temperatures, xp), part.counted

    weights, _, log_mean = _exponential(slices, exponents, xp)
    # Where the temperature dwarfs the losses, the ratio loses its digits to underflow; there the mean is exact enough.
    reach = _distance(slices.top - xp.min(slices.losses, axis=-1, keepdims=True), unit, xp)
    flat = reach <= t * (float(xp.finfo(reach.dtype).eps) / 4)
    excess = xp.where(flat, _mean(slices, xp), t * log_mean * unit)
    return _Solution(weights, excess, excess, _constant(temperature, excess, xp))


def _capped_soft_maximum(slices: _Slices, temperature: float, alpha: float, xp: Namespace) -> _Solution:
    """CappedKLPenalty. ``k p = min(exp((x - theta) / t), 1)``, k = alpha n, with theta such that the sum of these is k.

    A loss is capped if the sum is too small where its own weight reaches the cap: the losses from it upwards and
    ``sum exp((x - loss) / t)`` over those below are less than k. With m capped and a the largest free loss,
    ``theta = a + t log(S / (k - m))``, ``S = sum exp((x - a) / t)`` over the free ones, who share ``1 - m/k`` like S.
    Then ``nu = theta - t log(n / k) = a + t log(S / (n - m)) + t log(1 + m (n - k) / (n (k - m)))``: three terms that
    do not cancel where t is large. A capped loss costs the adversary what theta does, so
    ``risk = nu + sum (x - theta) / k`` over the capped ones.
    """
    x, size = slices.losses, slices.size
    t, unit = _in_units(temperature, x, xp)
    # Parts of the sorted losses whose exponentials are all below 1e-43 add nothing to a sum of at least 1.
    far = min(100 * t * unit, float(xp.finfo(x.dtype).max) / 4)
    bottom = xp.min(x, axis=-1, keepdims=True)

    def exponents(some: _Slices, anchor: Array) -> Array:
        return _ratio(-_distance(_relu(anchor - some.losses, xp), unit, xp), xp.full_like(anchor, t), xp)

    # Where t exceeds all differences, a wrong count would cost the risk t times a rounding error. There the sums are
    # compared by what they lack, ``sum (1 - exp)`` with n - k.
    reach = _distance(slices.top - bottom, unit, xp)
    close, apart = known(reach <= t, xp), known(reach > t, xp)

    def term(exponent: Array) -> Array:
        if close or apart:
            return xp.expm1(exponent) if close else xp.exp(exponent)
        return xp.where(reach <= t, xp.expm1(exponent), xp.exp(exponent))

    def is_capped(some: _Slices, loss: Array) -> Array:
        whole, beyond = _share(some, alpha, xp)
        rows: list[tuple[Array, ...]] = []
        for part in _down_to(some, loss - far, xp):
            below = part.counted & (part.losses < loss)
            rows.append((_count(part.counted & ~below, xp), _sum(term(exponents(part, loss)), below, xp)))
        number, others = _totals(rows, xp)
        room = (whole - xp.where(reach <= t, some.size, xp.astype(number, x.dtype))) + beyond
        # With k = n all are capped, which underflow would hide where t is large.
        all_are = (whole >= some.size) & (beyond >= 0) & (loss > bottom)
        return all_are | (others < room)

    ordered = _ordered(slices, xp)
    position = _last_active(ordered, lambda some, loss: (loss == some.top) | is_capped(some, loss), xp)
    some_are = is_capped(ordered, slices.top)
    lowest = xp.take_along_axis(ordered.losses, position, axis=-1)
    capped = xp.where(some_are, position + 1, xp.zeros_like(position))
    anchor = xp.take_along_axis(ordered.losses, xp.minimum(capped, slices.number - 1), axis=-1)

    def masks(part: _Slices) -> tuple[Array, Array]:
        above = part.counted & some_are & (part.losses >= lowest)
        return above, part.counted & ~above

    rows: list[tuple[Array, ...]] = []
    for part in _cut(ordered, xp):
        exponent, (_, free) = exponents(part, anchor), masks(part)
        rows.append((_sum(xp.exp(exponent), free, xp), _sum(xp.expm1(exponent), free, xp)))
    total, change = _totals(rows, xp)
    del ordered
    whole, beyond = _share(slices, alpha, xp)
    share, number = whole + beyond, xp.astype(capped, x.dtype)
    left, missing = (whole - number) + beyond, (size - whole) - beyond  # k - m, n - k
    # theta - a, at most the distance of the lowest capped loss, which bounds it in spite of rounding.
    furthest = -exponents(slices._replace(losses=anchor), lowest)
    log_rise = xp.clip(_log_one_plus((change + missing) / left, total / left, xp), min=0.0, max=furthest)
    rise = t * xp.where(some_are, log_rise, 0.0) * unit

    # Where none is capped, alpha leaves no trace in the weights, not even a rounded one.
    factor = xp.where(some_are, left / total / share, 1 / total)

    def weigh(part: _Slices) -> tuple[Array, ...]:
        above, free = masks(part)
        free_weights = _only(xp.exp(exponents(part, anchor)), free, xp) * factor
        height = _only(_relu(part.losses - anchor, xp) - rise, above, xp) / share
        return free_weights + xp.astype(above, x.dtype) / share, height

    weights, _, (height,) = _assemble(slices, weigh, xp)
    log_mean = _log_one_plus(change / (size - number), total / (size - number), xp)
    nu = (anchor - slices.top) + t * (log_mean + xp.log1p(number / size * (missing / left))) * unit
    # As for KLPenalty: where the temperature dwarfs the losses, the mean is exact enough.
    flat = reach <= t * (float(xp.finfo(x.dtype).eps) / 4)
    mean = _mean(slices, xp)
    excess = xp.where(flat, mean, nu + height)
    nu = xp.where(flat & ~some_are, mean, nu)
    return _Solution(weights, excess, nu, _constant(temperature, excess, xp))


def _tilted(slices: _Slices, strength: float, xp: Namespace) -> _Solution:
    """ChiSquarePenalty. ``n p = relu(1 + tilt)``, ``tilt = (lift + z) / s``, lift = top - nu such that p sums to 1.

    With k losses active, ``k lift = (n - k) s - sum z`` over them. A loss is active if the sum is still too small where
    its own weight begins: ``mean relu(x - loss) < s``.
    """
    x, size = slices.losses, slices.size
    s, unit = _in_units(strength, x, xp)

    def is_active(some: _Slices, loss: Array) -> Array:
        heights = [
            (_sum(_distance(_relu(part.losses - loss, xp), unit, xp), part.counted, xp),)
            for part in _down_to(some, loss, xp)
        ]
        return _totals(heights, xp)[0] / some.size < s

    def active_and_depth(part: _Slices) -> tuple[Array, Array]:
        return part.counted & (part.losses >= lowest), -_distance(-part.shifted, unit, xp)

    lowest = _smallest_active(_ordered(slices, xp), is_active, xp)
    rows = []
    for part in _cut(slices, xp):
        active, z = active_and_depth(part)
        rows.append((_count(active, xp), _sum(z, active, xp)))
    number, depth = _totals(rows, xp)
    number = xp.astype(number, x.dtype)
    lift = ((size - number) * s - depth) / number

    def weigh(part: _Slices) -> tuple[Array, ...]:
        active, z = active_and_depth(part)
        tilt = xp.where(active, lift + z, -s) / s
        values = _only(_relu(1 + tilt, xp), active, xp)
        return values, values, _only(tilt**2, part.counted, xp)

    values, excess, (total, squares) = _assemble(slices, weigh, xp)  # the total is n, but for rounding
    excess = excess / total - s * (squares / (2 * size)) * unit
    return _Solution(values / total, excess, -lift * unit, _constant(strength, excess, xp))


def _clipped_line(slices: _Slices, ball: _Ball, xp: Namespace) -> _Solution:
    """ChiSquareBall. p = relu(c + z) / sum relu(c + z) with c such that n sum p^2 = 1 + growth.

    With k losses active, of mean mu and variance v, ``n sum p^2 = (n/k) (1 + v / (c + mu)^2)``. So
    ``c + mu = sqrt(n v / room)`` with ``room = (1 + growth) k - n``. A loss is active if at ``c = -loss`` the sum is
    still too large: ``n v > room (mu - loss)^2`` over the losses above it.
    """
    size = slices.size

    def moments(part: _Slices, above: Callable[[Array, Array], Array], lowest: Array, span: Array) -> tuple[Array, ...]:
        # Heights above the lowest loss, in units of the span from there to the top: scales from 1e-30 to 1e30 alike.
        x = part.losses
        active = part.counted & above(x, lowest)
        number = xp.astype(_count(active, xp), x.dtype)
        total = xp.clip(number, min=1)
        height = _relu(x - lowest, xp) / span
        mean = _sum(height, active, xp) / total
        variance = _sum((height - mean) ** 2, active, xp) / total
        return number, mean, variance, active, height

    def statistics(some: _Slices, above: Callable[[Array, Array], Array], lowest: Array) -> tuple[Array, ...]:
        span = _or_one(some.top - lowest, xp)
        found = [moments(part, above, lowest, span)[:3] for part in _down_to(some, lowest, xp)]
        number = xp.clip(sum(number for number, _, _ in found), min=1)
        mean = sum(number * mean for number, mean, _ in found) / number
        variance = sum(number * (variance + (own - mean) ** 2) for number, own, variance in found) / number
        return number, mean, variance, ball.room(number, some.size)

    def is_active(some: _Slices, loss: Array) -> Array:
        # Over the losses above it alone: with it the two sides would only differ in their last digits.
        _, mean, variance, room = statistics(some, operator.gt, loss)
        return some.size * variance > room * mean**2

    ordered = _ordered(slices, xp)
    lowest = _smallest_active(ordered, is_active, xp)
    span = slices.top - lowest
    number, mean, variance, room = statistics(ordered, operator.ge, lowest)
    del ordered
    reach = xp.sqrt(size * variance / _or_one(room, xp))  # c + mu, in units of the span

    def weigh(part: _Slices) -> tuple[Array, ...]:
        *_, active, height = moments(part, operator.ge, lowest, _or_one(span, xp))
        tilt = (height - mean) / _or_one(reach, xp)
        return (_only(_relu(1 + tilt, xp), active, xp) / number,)

    weights, excess, _ = _assemble(slices, weigh, xp)
    nu_excess = -span * (1 - mean + reach * ((size - number) / size))
    return _Solution(weights, excess, nu_excess, _times(reach * (number / size), span, xp))


def _tempered(slices: _Slices, ball: _Ball, xp: Namespace) -> _Solution:
    """KLBall. p = softmax(z / s), with s such that ``sum p z/s - log mean exp(z/s)``, its divergence, is the radius.

    The divergence falls as s grows; its derivative with respect to log s is minus the variance of z/s under p. It is at
    most ``(range / s)^2 / 8``, which bounds s from above; at a hundredth of the gap below the maximum it is saturated.
    """
    size = slices.size
    reach = _or_one(slices.top - xp.min(slices.losses, axis=-1, keepdims=True), xp)
    # Large losses in a unit that leaves room for a scale s far larger than they are.
    half_range = 2.0 ** round(math.log2(float(xp.finfo(reach.dtype).max)) / 2)
    unit = xp.where(reach > half_range, half_range, xp.ones_like(reach))
    reach = reach / unit
    allowed = _allowed(ball, xp)
    parts = _cut(slices, xp)

    def exponents(part: _Slices, s: Array) -> tuple[Array, Array]:
        exponent = _ratio(part.shifted / unit, s, xp)
        return exponent, part.counted & (exponent > _large())

    def surplus(s: Array) -> tuple[Array, Array]:
        rows: list[tuple[Array, ...]] = []
        for part in parts:
            exponent, large = exponents(part, s)
            rows.append((_count(large, xp), _sum(exponent, large, xp)))
        number, total = _totals(rows, xp)
        centre = total / xp.astype(number, total.dtype)
        rows = []
        for part in parts:
            exponent, large = exponents(part, s)
            relative = exponent - centre
            value, grown = _grown(relative, large, part.counted, xp)
            first = value * relative
            sums = first, first * relative
            rows.append((grown, *(xp.sum(values, axis=-1, keepdims=True) for values in sums)))
        grown, first, second = _totals(rows, xp)
        total, others = _normalise(grown, number, size, allowed, xp)
        mean = first / total
        return _balance(mean, others, xp), xp.clip(second / total - mean**2, min=0.0)

    def second_largest(part: _Slices) -> Array:
        below = part.counted & (part.losses < slices.top)
        return xp.max(xp.where(below, part.shifted / unit, -reach), axis=-1, keepdims=True)

    nearest = [second_largest(part) for part in parts]
    gap = _or_one(-xp.max(_join(nearest, xp), axis=-1, keepdims=True), xp)
    low = xp.log(gap) - math.log(100)
    high = xp.log(reach) - 0.5 * math.log(8 * math.log1p(ball.growth))
    at_low = surplus(xp.exp(low))[0]
    s = xp.exp(_root(lambda log_s: surplus(xp.exp(log_s)), low, high, at_low, ball.growth, xp))
    # The rounding of log s is not relative to s; one more step, on s itself, takes it away.
    value, slope = surplus(s)
    s = s * (1 + xp.clip(value / xp.clip(slope, min=1e-9), min=-1e-3, max=1e-3))
    weights, excess, log_mean = _exponential(slices, lambda part: (exponents(part, s)[0], part.counted), xp)
    return _Solution(weights, excess, s * log_mean * unit, _times(s, unit, xp))


def _clipped_power(slices: _Slices, order: float, ball: _Ball, xp: Namespace) -> _Solution:
    """CressieReadBall. p = relu(c + z)^b / sum, b = 1 / (order - 1), with c such that the divergence is the radius.

    With ``y = relu(c + z) / c``, the height relative to the largest, the Renyi divergence is
    ``b log m - log mean(y^b)``, ``m = sum p y``, and its derivative with respect to c is
    ``-b (b + 1) sum p (y / m - 1)^2 / (c y)``.

    The unknown is the logarithm of the distance d = c + z of the lowest active loss: for small b its power counts,
    however close to 0 d itself may be. That makes log d -1 or -1e30, so the steps are taken in arsinh(log d). Lengths
    are in units of the span from the lowest active loss to the top.
    """
    b = 1 / (order - 1)
    allowed = _allowed(ball, xp)
    limits = xp.finfo(slices.losses.dtype)
    tiny, floor = float(limits.smallest_normal), _floor(slices.losses.dtype, xp)

    def lengths(some: _Slices, part: _Slices, lowest: Array, d: Array) -> tuple[Array, ...]:
        alone = lowest == some.top  # only the largest loss is active: its length is 1, not 0
        span = xp.where(alone, xp.ones_like(lowest), some.top - lowest)
        height = _relu(part.losses - lowest, xp) / span + xp.astype(alone, span.dtype)
        depth = xp.maximum(part.shifted, -span) / span / (1 + d)  # y - 1
        active = part.counted & (part.losses >= lowest)
        return active, height, depth, active & (depth > math.expm1(_large() / b))

    def middles(some: _Slices, lowest: Array, d: Array) -> tuple[Array, Array, Array]:
        rows = []
        for part in _down_to(some, lowest, xp):
            _, height, depth, large = lengths(some, part, lowest, d)
            rows.append((_count(large, xp), _sum(height + d, large, xp), _sum(depth, large, xp)))
        number, middle, middle_depth = _totals(rows, xp)
        total = xp.astype(number, middle.dtype)
        return number, middle / total, middle_depth / total

    def powers(
        some: _Slices, part: _Slices, lowest: Array, log_d: Array, middles: tuple[Array, Array, Array]
    ) -> tuple[Array, ...]:
        _, middle, middle_depth = middles
        d = xp.clip(xp.exp(log_d), min=tiny)
        active, height, depth, large = lengths(some, part, lowest, d)
        length = height + d  # c + z
        relative = (depth - middle_depth) * ((1 + d) / middle)  # y / its mean over the large ones - 1
        log_y = xp.where(height > 0, xp.log(length), log_d) - xp.log(middle)
        log_y = xp.where(xp.abs(relative) < 0.5, xp.log1p(xp.clip(relative, min=-0.5, max=0.5)), log_y)
        exponent = xp.clip(b * log_y, min=floor)
        return exponent, active, large, relative, length, d / length

    def surplus(some: _Slices, lowest: Array, log_d: Array) -> tuple[Array, Array]:
        number, middle, _ = found = middles(some, lowest, xp.exp(log_d))
        rows = []
        for part in _down_to(some, lowest, xp):
            exponent, active, large, relative, length, steep = powers(some, part, lowest, log_d, found)
            value, grown = _grown(exponent, large, active, xp)
            zeroth = value * steep
            first = zeroth * relative
            sums = value * length, value * relative, zeroth, first, first * relative
            rows.append((grown, *(xp.sum(values, axis=-1, keepdims=True) for values in sums)))
        grown, *means = _totals(rows, xp)
        total, others = _normalise(grown, number, some.size, allowed, xp)
        mean, change, zeroth, first, second = (value / total for value in means)
        mean = mean / middle
        slope = b * (b + 1) * xp.clip(second - 2 * change * first + change**2 * zeroth, min=0.0) / mean**2
        return _balance(b * _log_one_plus(change, mean, xp), others, xp), slope

    # d = 0, its power too
    stretch = max(1.0, 1 / b)

    def at_zero(some: _Slices, lowest: Array) -> Array:
        return surplus(some, lowest, xp.full_like(lowest, _nothing() * stretch))[0]

    ordered = _ordered(slices, xp)
    position = _last_active(ordered, lambda some, loss: (loss == some.top) | (at_zero(some, loss) > 0), xp)
    lowest = xp.take_along_axis(ordered.losses, position, axis=-1)
    next_gap = lowest - xp.take_along_axis(ordered.losses, xp.minimum(position + 1, slices.number - 1), axis=-1)
    span = _or_one(slices.top - lowest, xp)
    # d lies between where its power is lost in rounding and where the next loss becomes active; if there is none, the
    # divergence, at most b (b + 1) / (2 d^2), bounds it.
    bound = 0.5 * math.log(b * (b + 1) / (2 * math.log1p(ball.growth)))
    high = xp.where(next_gap > 0, xp.log(_or_one(next_gap, xp)) - xp.log(span), bound)
    high = xp.clip(high, max=0.75 * math.log(float(limits.max)))
    low = xp.clip(high - 1, max=2 * math.log(float(limits.eps)) * stretch)
    at_low = at_zero(ordered, lowest)

    def surplus_at(position: Array) -> tuple[Array, Array]:
        value, slope = surplus(ordered, lowest, xp.sinh(position))
        return value, slope * xp.cosh(position)

    log_d = xp.sinh(_root(surplus_at, xp.asinh(low), xp.asinh(high), at_low, ball.growth, xp))
    _, middle, middle_depth = found = middles(ordered, lowest, xp.exp(log_d))

    def exponents(part: _Slices) -> tuple[Array, Array]:
        exponent, active, *_ = powers(slices, part, lowest, log_d, found)
        return xp.where(active, exponent, floor), active

    weights, excess, log_mean = _exponential(slices, exponents, xp)
    # s / (order - 1) is the mean of (c + z)^b, to the power of 1/b; nu = top + s / (order - 1) - c.
    c = 1 + xp.exp(log_d)
    log_ratio = log_mean / b + _log_one_plus(middle_depth, middle / c, xp)
    return _Solution(weights, excess, span * (c * xp.expm1(log_ratio)), _times(c * xp.exp(log_ratio) / b, span, xp))
