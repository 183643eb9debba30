r"""Worst-case weights over an ambiguity set, by the primal problem: find the weights, then compute the risk from them.

For losses :math:`x_1, \dots, x_n` every set (with a convex function phi, see ``sets.py``) defines a risk F and weights
p* that attain F:

    F = sup { sum_i p_i x_i : p in the simplex, D(p || 1/n) <= radius }          (a ball, and CVaR)
    F = sup { sum_i p_i x_i - strength D(p || 1/n) : p in the simplex }          (a penalty)
    D(p || 1/n) = (1/n) sum_i phi(n p_i)

The dual variables (nu, s) prove that no other weights give a larger value:

    F = min over nu and s >= 0 of  nu + s radius + s mean_i phi*((x_i - nu) / s).

For a penalty, s is the strength and the radius is 0. phi* is the convex conjugate of phi, phi*(y) = sup over t >= 0 of
(t y - phi(t)). Losses may be negative, because excess losses may be. Source: DRRho risk minimization, arXiv 2505.06699,
for the risk over excess losses; Duchi and Namkoong 2019 for the chi-square ball.

Every solver below takes a plain list of floats. Weights are computed from differences between losses, in most cases
between a loss and the largest loss. These differences are exact if the losses lie close together, the case in which
accuracy matters most.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from drrho_reference._checks import BoolArray, FloatArray, mask, raw_array
from drrho_reference.sets import (
    AmbiguitySet,
    CappedKLPenalty,
    ChiSquareBall,
    ChiSquarePenalty,
    CressieReadBall,
    CVaR,
    KLBall,
    KLPenalty,
)

__all__ = ["WorstCase", "solve_slices", "worst_case"]


# ---------------------------------------------------------------------------------------------------------------------
# The public function
# ---------------------------------------------------------------------------------------------------------------------


class WorstCase(NamedTuple):
    """Result of :func:`worst_case`: the risk, the weights that attain it, and the dual pair (nu, s)."""

    risk: FloatArray
    weights: FloatArray
    dual: tuple[FloatArray, FloatArray]


def worst_case(
    losses: npt.ArrayLike,
    ambiguity_set: AmbiguitySet,
    /,
    *,
    axis: int = -1,
    where: npt.ArrayLike | None = None,
) -> WorstCase:
    """Find the worst-case weights of every slice of losses.

    Parameters
    ----------
    losses : array of real numbers, any shape with at least one axis
        Losses of either sign. Every slice along ``axis`` is a separate problem.
    ambiguity_set : CVaR, KLPenalty, KLBall, ChiSquarePenalty, ChiSquareBall, CressieReadBall or CappedKLPenalty
        The set of weights over which the maximum is taken.
    axis : int
        The axis of the samples.
    where : array of bool, broadcast to the shape of ``losses``, optional
        The entries that count. All other entries get weight 0 and are never read, so they may hold nan; n is the
        number of entries that count.

    Returns
    -------
    WorstCase
        ``risk`` has the shape of ``losses`` without ``axis``, ``weights`` the shape of ``losses``, and ``dual`` is the
        pair (nu, s) of arrays in the shape of ``risk``; all are float64. At radius 0 the dual is (mean, inf); for CVaR
        it is (quantile, 0).

    Raises
    ------
    TypeError, ValueError
        If an argument has the wrong type or shape, a loss that counts is not finite, or a slice has no entry that
        counts.

    Notes
    -----
    The weights are the gradient of the risk in the losses (Danskin's theorem). If several choices of weights attain the
    risk, the function returns the choice in which equal losses have equal weights. Source: DRRho, arXiv 2505.06699.

    Examples
    --------
    The risk is the mean of the worst half of four losses. The two losses of 2 share equally the weight that the loss of
    5 leaves.

    >>> result = worst_case([5.0, 2.0, -1.0, 2.0], CVaR(0.5))
    >>> float(result.risk), result.weights.tolist()
    (3.5, [0.5, 0.25, 0.0, 0.25])
    """
    raw = raw_array("losses", losses)
    counted = mask("where", True if where is None else where, raw.shape)
    return solve_slices(raw, ambiguity_set, axis, counted, raw.dtype)


def solve_slices(
    values: npt.NDArray[Any],
    ambiguity_set: AmbiguitySet,
    axis: int,
    counted: BoolArray,
    input_dtype: np.dtype[Any],
) -> WorstCase:
    """Check the arguments of :func:`worst_case` and solve one slice after the other.

    ``input_dtype`` is the dtype of the caller's losses; CVaR rounds alpha n within 4 ulp of this dtype.
    """
    if values.ndim == 0:
        raise ValueError("losses must have at least one axis, got a 0-d array")
    if not isinstance(ambiguity_set, AmbiguitySet):
        raise TypeError(f"ambiguity_set must be one of the ambiguity sets, got {ambiguity_set!r}")
    if isinstance(axis, bool) or not isinstance(axis, (int, np.integer)):
        raise TypeError(f"axis must be an integer, got {axis!r}")
    if not -values.ndim <= axis < values.ndim:
        raise ValueError(f"axis must lie in [{-values.ndim}, {values.ndim}), got {axis}")
    ulp_dtype = input_dtype if input_dtype.kind == "f" else np.dtype(np.float64)  # integers count as float64
    values, counted = np.moveaxis(values, axis, -1), np.moveaxis(counted, axis, -1)

    weights = np.zeros(values.shape)
    risk, nu, s = (np.empty(values.shape[:-1]) for _ in range(3))
    for index in np.ndindex(values.shape[:-1]):
        # Each slice is a separate problem; its n is the number of entries that count.
        chosen = [i for i in range(values.shape[-1]) if counted[index][i]]
        if not chosen:
            raise ValueError("losses must have an entry that counts in every slice, got a slice without one")
        x = [float(values[index][i]) for i in chosen]
        if not all(math.isfinite(value) for value in x):
            raise ValueError(f"losses must be finite where they count, got {x}")
        solution = _solve(x, ambiguity_set, ulp_dtype)
        risk[index], nu[index], s[index] = solution.risk, solution.nu, solution.s
        for i, weight in zip(chosen, solution.weights, strict=True):
            weights[(*index, i)] = weight
    return WorstCase(risk, np.moveaxis(weights, -1, axis), (nu, s))


class _Solution(NamedTuple):
    """The solution of one slice: the risk, one weight per loss, and the dual pair (nu, s)."""

    risk: float
    weights: list[float]
    nu: float
    s: float


def _solve(x: list[float], ambiguity_set: AmbiguitySet, ulp_dtype: np.dtype[Any]) -> _Solution:
    """Solve one slice with the solver of the set; balls of radius 0 and saturated balls have separate solvers."""
    match ambiguity_set:
        case CVaR(alpha):
            return _cvar(x, alpha, ulp_dtype)
        case KLPenalty(temperature):
            return _kl_penalty(x, temperature)
        case ChiSquarePenalty(strength):
            return _chi_square_penalty(x, strength)
        case CappedKLPenalty(temperature, alpha):
            return _capped_kl_penalty(x, temperature, alpha)
        case _ if ambiguity_set.radius == 0.0:
            return _uniform(x)
        case KLBall(radius):
            return _saturated(x) if radius >= math.log(_crowding(x)) else _kl_ball(x, radius)
        case ChiSquareBall(radius):
            return _saturated(x) if radius >= (_crowding(x) - 1.0) / 2.0 else _chi_square_ball(x, radius)
        case CressieReadBall(order, radius):  # pragma: no branch
            # ((n/m)^(k-1) - 1) / (k (k-1)), computed with expm1 because the difference loses digits for k near 1.
            largest = math.expm1((order - 1.0) * math.log(_crowding(x))) / (order * (order - 1.0))
            return _saturated(x) if radius >= largest else _cressie_read_ball(x, order, radius)


# ---------------------------------------------------------------------------------------------------------------------
# Small functions that the solvers share
# ---------------------------------------------------------------------------------------------------------------------


def _expectation(weights: list[float], x: list[float]) -> float:
    """Return sum_i p_i x_i."""
    return math.fsum(p * value for p, value in zip(weights, x, strict=True))


def _crowding(x: list[float]) -> float:
    """Return n / m, where m is the number of losses that equal the largest of the n losses exactly."""
    return len(x) / x.count(max(x))


def _levels(x: list[float]) -> list[float]:
    """List the distinct losses, the largest first."""
    return sorted(set(x), reverse=True)


def _uniform(x: list[float]) -> _Solution:
    """Solve a ball of radius 0, which contains only the uniform weights. F = mean, dual (mean, inf)."""
    mean = math.fsum(x) / len(x)
    return _Solution(mean, [1.0 / len(x)] * len(x), mean, math.inf)


def _saturated(x: list[float]) -> _Solution:
    """Solve a saturated ball, one that contains equal weights on the largest losses alone. F = max, dual (max, 0)."""
    largest = max(x)
    weights = [1.0 / x.count(largest) if value == largest else 0.0 for value in x]
    return _Solution(largest, weights, largest, 0.0)


def _log_mean_exp(exponents: list[float]) -> float:
    """Return log mean_i exp(a_i). All a_i must be at most 0, and at least one of them 0; -inf is allowed.

    If the mean is near 1, the logarithm is computed with log1p from the mean minus 1, which keeps all digits.
    """
    excess = math.fsum(math.expm1(a) for a in exponents) / len(exponents)
    if excess > -0.5:
        return math.log1p(excess)
    return math.log(math.fsum(math.exp(a) for a in exponents) / len(exponents))


def _phi(log_t: float, order: float) -> float:
    """Return phi(t) = (t^k - k t + k - 1) / (k (k - 1)) with k the order, or t log t - t + 1 for order 1.

    Near t = 1 the terms cancel, so there the power series in L = log t is summed instead:
    phi = sum over j >= 2 of (1 + k + ... + k^(j-2)) L^j / j!.
    """
    if log_t == -math.inf:
        return 1.0 / order
    # If t is not near 1, the closed form is used, with expm1 for orders near 1.
    if abs(log_t) * order > 0.5:
        t = math.exp(log_t)
        if order == 1.0:
            return t * log_t - t + 1.0
        return (t * math.expm1((order - 1.0) * log_t) / (order - 1.0) - math.expm1(log_t)) / order
    # If t is near 1, the series is summed; 28 terms are exact to the last digit for |order L| <= 0.5.
    total, geometric, power = 0.0, 1.0, log_t
    for j in range(2, 30):
        power *= log_t / j  # L^j / j!
        total += geometric * power
        geometric = 1.0 + order * geometric
    return total


def _bisect(decreasing: Callable[[float], float], target: float, low: float, high: float) -> float:
    """Find where a decreasing function falls to ``target``: halve [low, high] until its ends are adjacent floats.

    ``decreasing`` must be above ``target`` at low and must not be above ``target`` at high.
    """
    while True:
        middle = low + (high - low) / 2.0
        if not low < middle < high:
            return high
        if decreasing(middle) > target:
            low = middle
        else:
            high = middle


# ---------------------------------------------------------------------------------------------------------------------
# One solver per set
# ---------------------------------------------------------------------------------------------------------------------


def _cvar(x: list[float], alpha: float, ulp_dtype: np.dtype[Any]) -> _Solution:
    """CVaR: distribute the weight 1 among the losses, the largest first, at most 1/(alpha n) on each.

    With k = alpha n, there are k units of weight 1/k, and each loss gets at most one unit. Equal losses get equal
    weights. The loss that gets the last unit is the quantile nu. If k lies within 4 ulp of an integer, k is replaced by
    the integer, because 0.07 * 100 is 7.000000000000001. Source: the primal form of CVaR (Rockafellar and Uryasev
    2000).
    """
    k = alpha * len(x)
    # k = alpha n units of weight; if k is an integer up to rounding, it is replaced by the integer.
    nearest = ulp_dtype.type(round(k))
    if abs(k - float(nearest)) <= 4.0 * float(np.spacing(nearest)):
        k = float(nearest)
    # A level is a distinct value of the losses. From the largest level on, each loss gets at most one unit of weight;
    # equal losses share the last units equally.
    share: dict[float, float] = {}  # the weight of each loss at a level
    left = k
    quantile = max(x)
    for level in _levels(x):
        if left <= 0.0:
            break
        taken = min(left, float(x.count(level)))
        share[level] = taken / k / x.count(level)
        left -= taken
        quantile = level
    weights = [share.get(value, 0.0) for value in x]
    return _Solution(_expectation(weights, x), weights, quantile, 0.0)


def _kl_penalty(x: list[float], temperature: float) -> _Solution:
    """KL penalty: p = softmax(x / t), and the risk is the weighted mean minus the penalty, sum p x - t D(p).

    D(p) = mean phi(n p) with phi(t) = t log t - t + 1. The dual nu is t log mean exp(x / t), the risk itself.
    Source: the Gibbs variational principle; as a training risk DRRho, arXiv 2505.06699.
    """
    weights, divergence = _tilted(x, temperature)
    risk = _expectation(weights, x) - temperature * divergence
    return _Solution(risk, weights, risk, temperature)


def _tilted(x: list[float], temperature: float) -> tuple[list[float], float]:
    """Return the weights softmax(x / t) and their Kullback-Leibler divergence from uniform."""
    # Softmax, shifted by the largest loss so that no exponential overflows: log(n p_i) = a_i - log mean exp(a).
    exponents = [(value - max(x)) / temperature for value in x]
    log_mean = _log_mean_exp(exponents)
    log_ratios = [a - log_mean for a in exponents]  # log(n p_i)
    weights = [math.exp(a) / len(x) for a in log_ratios]
    return weights, math.fsum(_phi(a, 1.0) for a in log_ratios) / len(x)


def _capped_kl_penalty(x: list[float], temperature: float, alpha: float) -> _Solution:
    """Capped KL penalty: give the largest losses the cap, level by level, until no other weight exceeds the cap.

    Weights are counted in units of the cap 1/k with k = alpha n. If the m largest losses have one unit each, the other
    losses share the remaining k - m units in proportion to their softmax. The solution is the first m for which no
    other loss gets more than one unit. With a smaller m a weight exceeds the cap, and with a larger m a loss has the
    cap although its softmax weight is smaller. The equation n p_i = exp((x_i - nu) / t) of any loss below the cap gives
    nu. The risk is sum p x - t D(p), as in :func:`_kl_penalty`. Source: the conditions of Karush, Kuhn and Tucker; the
    set is the "KL-regularised CVaR" of Levy et al. 2020, arXiv 2010.05893.
    """
    n, k = len(x), alpha * len(x)
    capped = 0
    for level in _levels(x):
        rest = [value for value in x if value <= level]
        exponents = [(value - level) / temperature for value in rest]
        log_mean = _log_mean_exp(exponents)
        # The largest of the other losses gets (k - m) / sum_i exp(a_i) units of weight; log_largest is its log(n p).
        if (k - capped) / math.fsum(math.exp(a) for a in exponents) <= 1.0:
            log_largest = math.log((k - capped) / k * (n / len(rest))) - log_mean
            break
        capped += x.count(level)
    # log(n p_i) is log(1/alpha) for losses with the cap as weight; softmax gives log(n p_i) for all other losses.
    log_ratios = [log_largest + (value - level) / temperature if value <= level else -math.log(alpha) for value in x]
    weights = [math.exp(a) / n if value <= level else 1.0 / k for value, a in zip(x, log_ratios, strict=True)]
    divergence = math.fsum(_phi(a, 1.0) for a in log_ratios) / n
    risk = _expectation(weights, x) - temperature * divergence
    return _Solution(risk, weights, level - temperature * log_largest, temperature)


def _kl_ball(x: list[float], radius: float) -> _Solution:
    """KL ball: p = softmax(x / s) with s such that D(p) = radius, by bisection in log s.

    D falls as s grows. The bisection starts at a thousandth of the gap between the largest and the next loss, because
    for such an s all weight is on the largest losses. The dual nu is s log mean exp(x / s), which is
    sum p x - s D(p). Source: Donsker and Varadhan's dual of the ball.
    """
    first, second = _levels(x)[:2]

    def s_of(log_ratio: float) -> float:
        # If the gap is tiny beside the other differences, the ratio alone may be too large for a float.
        if log_ratio > 700.0:
            return math.exp(math.log(first - second) + log_ratio)
        return (first - second) * math.exp(log_ratio)

    # Increase the upper end of log s until the divergence is at most the radius. Then bisect.
    low = high = -math.log(1000.0)
    while _tilted(x, s_of(high))[1] > radius:
        high += 1.0
    s = s_of(_bisect(lambda log_ratio: _tilted(x, s_of(log_ratio))[1], radius, low, high))
    weights, divergence = _tilted(x, s)
    risk = _expectation(weights, x)
    return _Solution(risk, weights, risk - s * divergence, s)


def _chi_square_weights(x: list[float], smallest: float, s: float) -> tuple[list[float], float] | None:
    """Return weights p_i = (1/n)(1 + (x_i - nu)/s) of the k losses of at least ``smallest``, and nu.

    All other losses have weight 0. The weights must sum to 1, so nu = mean - s (n - k)/k, where the mean is over these
    k losses. Hence
    p_i = 1/k + (x_i - mean)/(n s). If a weight is negative, ``smallest`` is not the right level, and the result is
    None. Weights between -1e-15 and 0 are rounding errors of 0.
    """
    # The largest loss is subtracted from the k losses, so that their differences are exact.
    n, largest = len(x), max(x)
    active = [value - largest for value in x if value >= smallest]
    k, mean = len(active), math.fsum(active) / len(active)
    weights = [1.0 / k + (value - largest - mean) / (n * s) if value >= smallest else 0.0 for value in x]
    if min(weights) < -1e-15:
        return None
    return [max(weight, 0.0) for weight in weights], largest + mean - s * (n - k) / k


def _chi_square_penalty(x: list[float], strength: float) -> _Solution:
    """Chi-square penalty: drop the smallest losses until no weight is negative.

    The formula of :func:`_chi_square_weights` gives the best weights on the k largest losses if negative weights are
    allowed. So the largest k for which no weight is negative gives the solution.
    The risk is sum p x - strength D(p), D(p) = mean (n p - 1)^2 / 2. Source: Duchi and Namkoong 2019.
    """
    for level in sorted(set(x)):
        # The first level without a negative weight is the solution.
        candidate = _chi_square_weights(x, level, strength)
        if candidate is not None:
            weights, nu = candidate
            divergence = math.fsum((len(x) * p - 1.0) ** 2 / 2.0 for p in weights) / len(x)
            return _Solution(_expectation(weights, x) - strength * divergence, weights, nu, strength)
    raise AssertionError("the maxima alone share 1 equally")  # pragma: no cover


def _chi_square_ball(x: list[float], radius: float) -> _Solution:
    """Chi-square ball: drop the smallest losses until no weight is negative.

    On the k largest losses the weights are p_i = 1/k + (x_i - mean)/(n s), and the condition D = radius fixes s. With
    D = (n sum p^2 - 1)/2 the condition is sum p^2 = (1 + 2 radius)/n, and these weights have
    sum p^2 = 1/k + k var/(n s)^2, where var is the variance of the k losses. Hence

        s = sqrt(k var / (n (2 radius - (n - k)/k))).

    As in :func:`_chi_square_penalty`, the largest k without a negative weight gives the solution. If no loss is
    dropped, k = n and F = mean + sqrt(2 radius var), a regularisation by the variance. Source: Duchi and Namkoong 2019.
    """
    n, largest = len(x), max(x)
    for level in sorted(set(x)):
        active = [value - largest for value in x if value >= level]
        k, mean = len(active), math.fsum(active) / len(active)
        # The condition D = radius fixes s for these losses.
        length = math.hypot(*(value - mean for value in active))  # sqrt(k var)
        s = length / math.sqrt(n * (2.0 * radius - (n - k) / k))
        candidate = _chi_square_weights(x, level, s)
        if candidate is not None:
            weights, nu = candidate
            return _Solution(_expectation(weights, x), weights, nu, s)
    raise AssertionError("below saturation the weights are positive at some level")  # pragma: no cover


def _cressie_read_ball(x: list[float], order: float, radius: float) -> _Solution:
    """Cressie-Read ball: p_i is proportional to relu(x_i - theta)^(1/(k-1)), theta such that D(p) = radius.

    D falls as theta falls. The solver first finds the two neighbouring levels between which theta lies. Then it bisects
    the logarithm of the distance from theta to the smallest loss above theta, because the weight of this loss changes
    most with theta. The unit of all distances is the range of the losses. Source: the family of divergences of Cressie
    and Read 1984; as a set of weights for losses, Duchi and Namkoong 2021.
    """
    levels = _levels(x)
    unit = levels[0] - levels[-1]
    for position in range(1, len(levels)):
        smallest = levels[position]

        def divergence(log_distance: float, smallest: float = smallest) -> float:
            return _power_weights(x, smallest, log_distance, order)[1]

        if position + 1 < len(levels):
            # If D is still too large with theta at the next level, theta lies below the next level.
            high = math.log((smallest - levels[position + 1]) / unit)
            if divergence(high) > radius:
                continue
        else:
            high = 0.0
            while divergence(high) > radius:
                high += 1.0
        # At this lower end the weight of the smallest loss is at most e^-800 (0 in float64) times the largest weight.
        low = min(high, math.log((levels[0] - smallest) / unit)) - 800.0 * (order - 1.0)
        log_distance = _bisect(divergence, radius, low, high)
        weights, _, nu, s = _power_weights(x, smallest, log_distance, order)
        return _Solution(_expectation(weights, x), weights, nu, s)
    raise AssertionError("the loop returns at the last level at the latest")  # pragma: no cover


def _power_weights(
    x: list[float], smallest: float, log_distance: float, order: float
) -> tuple[list[float], float, float, float]:
    """Return p_i proportional to relu(x_i - theta)^(1/(k-1)), their divergence, nu and s.

    The distance of theta below ``smallest`` is e^log_distance times the range of the losses. The quotients
    q_i = (x_i - theta)/(max - theta) lie in [0, 1] (0 for losses below theta), and
    n p_i = q_i^(1/(k-1)) / mean(q^(1/(k-1))). Comparison with p_i = (1/n) relu(1 + (k-1)(x_i - nu)/s)^(1/(k-1)) gives
    s = (k-1)(max - theta) mean(q^(1/(k-1)))^(k-1) and nu = theta + s/(k-1).
    """
    n, largest, unit, power = len(x), max(x), max(x) - min(x), 1.0 / (order - 1.0)
    distance = unit * math.exp(log_distance)
    reach = (largest - smallest) + distance  # max - theta
    exponents = []
    for value in x:
        if value < smallest:
            log_q = -math.inf
        elif largest - value < 0.5 * reach:
            # If q is near 1, log1p keeps the digits of the small difference.
            log_q = math.log1p((value - largest) / reach)
        elif value == smallest:
            log_q = log_distance - math.log(reach / unit)  # the distance may underflow, but not its logarithm
        else:
            log_q = math.log(((value - smallest) + distance) / reach)
        exponents.append(power * log_q)
    log_mean = _log_mean_exp(exponents)
    log_ratios = [a - log_mean for a in exponents]  # log(n p_i)
    weights = [math.exp(a) / n for a in log_ratios]
    divergence = math.fsum(_phi(a, order) for a in log_ratios) / n
    # theta = largest - reach gives the dual pair; expm1 is used because nu is near the largest loss for orders near 1.
    nu = largest + reach * math.expm1(log_mean / power)
    s = (order - 1.0) * reach * math.exp(log_mean / power)
    return weights, divergence, nu, s
