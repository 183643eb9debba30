"""The ambiguity sets: the weights p that an adversary may put on n losses x.

The divergence ``D(p) = (1/n) sum_i phi(n p_i)`` measures how far the weights are from uniform weights. Each set has its
own function ``phi``, which is convex with ``phi(1) = 0``. A *ball* bounds the divergence, and a *penalty* subtracts it:

    ball:     risk = max { sum_i p_i x_i : p >= 0, sum p = 1, D(p) <= radius }
    penalty:  risk = max { sum_i p_i x_i - strength * D(p) : p >= 0, sum p = 1 }

The dual variables nu and ``s >= 0`` prove that no weights give a larger risk. With phi* the convex conjugate of phi,
a ball has ``risk = min over nu and s of nu + s radius + s mean phi*((x - nu) / s)``. For a penalty s is the strength,
and the term ``s radius`` is absent. Derivations: docs/theory/ambiguity.md, "The sets".
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

from drrho_core import _validate
from drrho_core._array_api import Namespace
from drrho_core._validate import NOT_NEGATIVE, POSITIVE, UNIT_INTERVAL, Rule
from drrho_core.ambiguity.balls import Ball, exp_minus_one, solve_ball
from drrho_core.ambiguity.searched import solve_cressie_read_ball, solve_kl_ball
from drrho_core.ambiguity.slices import Slices, Solution
from drrho_core.ambiguity.sorted import (
    solve_capped_kl_penalty,
    solve_chi_square_ball,
    solve_chi_square_penalty,
    solve_cvar,
    solve_kl_penalty,
)

ABOVE_ONE = Rule("be > 1", low=1.0)


@dataclass(frozen=True)
class AmbiguitySet(ABC):
    """Base class of the seven sets. A set is frozen and hashable, and its parameters are checked when the set is built.

    Every parameter is a real, finite number, or an array without axes that holds such a number. An array is read once,
    when the set is built, so under jit its value is a constant. In the formulas of the sets n is the number of losses.

    Raises
    ------
    TypeError
        If a parameter of a set is not a real number.
    ValueError
        If a parameter is not finite, or lies outside the interval that its class states.
    """

    @abstractmethod
    def solve(self, slices: Slices, xp: Namespace) -> Solution:
        """Return the worst case of every slice. Users call `worst_case`, which checks its arguments first."""


def _store_checked(ambiguity_set: AmbiguitySet, name: str, rule: Rule) -> None:
    """Check a parameter while its set is built, and replace it by its value as a Python number."""
    # A frozen dataclass forbids an ordinary assignment.
    object.__setattr__(ambiguity_set, name, _validate.static_number(name, getattr(ambiguity_set, name), rule))


@dataclass(frozen=True)
class CVaR(AmbiguitySet):
    """Conditional value at risk: the mean of the share `alpha` of largest losses.

    ``phi`` is 0 on ``[0, 1 / alpha]`` and infinite elsewhere: no weight may exceed ``1 / (alpha n)``. If losses
    are sorted in descending order, the quantile is the loss at place ``alpha n``, rounded up. Losses above the quantile
    have exactly the largest weight. Losses equal to the quantile share the remaining weight equally.

    ``risk = min_nu nu + mean(relu(x - nu)) / alpha`` (Rockafellar and Uryasev 2000). The dual variables (nu, s) are
    (quantile, 0). ``alpha n`` is evaluated without rounding error. It counts as an integer if it differs from this
    integer by at most 4 units of float64's last place, so that ``alpha=0.1`` of 30 losses means 3 losses.

    Parameters
    ----------
    alpha : float
        In (0, 1]. With 1 the risk is the mean. With a value up to 1 / n the risk is the maximum.

    Examples
    --------
    >>> import numpy as np
    >>> from drrho_core import worst_case
    >>> worst_case(np.asarray([1.0, 2.0, 3.0, 6.0]), CVaR(0.5)).risk.item()
    4.5
    """

    alpha: float

    def __post_init__(self) -> None:
        _store_checked(self, "alpha", UNIT_INTERVAL)

    def solve(self, slices: Slices, xp: Namespace) -> Solution:
        """Return the worst case of every slice."""
        # The quantile decides all weights, and a sort finds the quantile.
        return solve_cvar(slices, self.alpha, xp)


@dataclass(frozen=True)
class KLPenalty(AmbiguitySet):
    """Kullback-Leibler penalty: a smooth maximum, ``risk = temperature * log mean exp(x / temperature)``.

    ``phi(t) = t log t - t + 1``. The weights are ``softmax(x / temperature)``, and the dual variables (nu, s) are
    (risk, temperature). The temperature is the strength of the penalty.

    Parameters
    ----------
    temperature : float
        Positive, in units of the losses. The risk goes to the maximum as the temperature goes to 0, and to the mean as
        the temperature goes to infinity.

    Examples
    --------
    >>> import numpy as np
    >>> from drrho_core import worst_case
    >>> worst = worst_case(np.log(np.asarray([1.0, 2.0, 3.0])), KLPenalty(1.0))
    >>> round(float(np.exp(worst.risk)), 12), worst.weights.round(12).tolist()
    (2.0, [0.166666666667, 0.333333333333, 0.5])
    """

    temperature: float

    def __post_init__(self) -> None:
        _store_checked(self, "temperature", POSITIVE)

    def solve(self, slices: Slices, xp: Namespace) -> Solution:
        """Return the worst case of every slice."""
        # The temperature is given, so the solver needs no search.
        return solve_kl_penalty(slices, self.temperature, xp)


@dataclass(frozen=True)
class CappedKLPenalty(AmbiguitySet):
    """KL penalty whose weights may not exceed ``1 / (alpha n)``, as in CVaR: a smooth version of CVaR.

    ``phi(t) = t log t - t + 1`` on ``[0, 1 / alpha]`` and infinite elsewhere. The weights are
    ``min(exp((x - nu) / temperature), 1 / alpha) / n``, with nu such that the weights sum to 1. The dual variables are
    nu and the temperature. No single loss can take all the weight, however large it is, and no weight is 0. This set is
    the KL-regularised CVaR of Levy et al. (arXiv 2010.05893), who call alpha `size`.

    ``alpha n`` is evaluated as in `CVaR`.

    Parameters
    ----------
    temperature : float
        Positive, in units of the losses. The set becomes ``CVaR(alpha)`` as the temperature goes to 0. The risk goes to
        the mean as the temperature goes to infinity.
    alpha : float
        In (0, 1]. With 1 the risk is the mean, and nu is the smallest loss. With a value up to 1 / n the set is
        ``KLPenalty(temperature)``.

    Examples
    --------
    >>> import numpy as np
    >>> from drrho_core import worst_case
    >>> losses = np.log(np.asarray([1.0, 2.0, 3.0, 40.0]))
    >>> worst_case(losses, KLPenalty(1.0)).weights.round(3).tolist()
    [0.022, 0.043, 0.065, 0.87]
    >>> worst_case(losses, CappedKLPenalty(1.0, 0.5)).weights.round(3).tolist()
    [0.083, 0.167, 0.25, 0.5]
    """

    temperature: float
    alpha: float

    def __post_init__(self) -> None:
        _store_checked(self, "temperature", POSITIVE)
        _store_checked(self, "alpha", UNIT_INTERVAL)

    def solve(self, slices: Slices, xp: Namespace) -> Solution:
        """Return the worst case of every slice."""
        # The temperature is given, and the solver searches for the number of weights at the ceiling.
        return solve_capped_kl_penalty(slices, self.temperature, self.alpha, xp)


@dataclass(frozen=True)
class KLBall(AmbiguitySet):
    """Kullback-Leibler ball: the smooth maximum of `KLPenalty` at the temperature that belongs to the radius.

    ``phi(t) = t log t - t + 1``, and the weights have ``D(p) <= radius``. The risk is
    ``min_{s >= 0} s log mean exp(x / s) + s radius``, and the weights are ``softmax(x / s)``.

    Parameters
    ----------
    radius : float
        At least 0. With 0 the risk is the mean. If m losses share the maximum, the risk is the maximum for every radius
        from ``log(n/m)`` upwards.

    Examples
    --------
    >>> import numpy as np
    >>> from drrho_core import worst_case
    >>> worst_case(np.asarray([1.0, 2.0, 3.0, 4.0]), KLBall(1.0)).weights.round(3).tolist()
    [0.001, 0.011, 0.097, 0.891]
    """

    radius: float

    def __post_init__(self) -> None:
        _store_checked(self, "radius", NOT_NEGATIVE)

    def solve(self, slices: Slices, xp: Namespace) -> Solution:
        """Return the worst case of every slice."""
        # `solve_ball` takes the growth (see `balls`) and not the radius. For a KL ball the growth is exp(radius) - 1.
        return solve_ball(slices, exp_minus_one(self.radius), solve_kl_ball, xp)


@dataclass(frozen=True)
class ChiSquarePenalty(AmbiguitySet):
    """Chi-square penalty: weights that rise linearly with the loss, clipped at 0.

    ``phi(t) = (t - 1)^2 / 2``. The weights are ``relu(1 + (x - nu) / strength) / n``, with nu such that the weights sum
    to 1. The dual variables are nu and the strength. If no weight is clipped at 0,
    ``risk = mean(x) + var(x) / (2 strength)``.

    Parameters
    ----------
    strength : float
        Positive, in units of the losses. The risk goes to the maximum as the strength goes to 0, and to the mean as the
        strength goes to infinity.

    Examples
    --------
    >>> import numpy as np
    >>> from drrho_core import worst_case
    >>> worst_case(np.asarray([1.0, 2.0, 3.0, 6.0]), ChiSquarePenalty(4.0)).weights.tolist()
    [0.125, 0.1875, 0.25, 0.4375]
    """

    strength: float

    def __post_init__(self) -> None:
        _store_checked(self, "strength", POSITIVE)

    def solve(self, slices: Slices, xp: Namespace) -> Solution:
        """Return the worst case of every slice."""
        # The strength is given, and the solver searches for the number of losses with a positive weight.
        return solve_chi_square_penalty(slices, self.strength, xp)


@dataclass(frozen=True)
class ChiSquareBall(AmbiguitySet):
    """Chi-square ball: the mean plus a multiple of the standard deviation, as long as no weight has to be clipped.

    ``phi(t) = (t - 1)^2 / 2``, and the weights have ``D(p) <= radius``. The weights are
    ``relu(1 + (x - nu) / s) / n``. If no weight is clipped at 0, ``risk = mean(x) + sqrt(2 radius var(x))`` (Duchi and
    Namkoong 2019).

    Parameters
    ----------
    radius : float
        At least 0. With 0 the risk is the mean. If m losses share the maximum, the risk is the maximum for every radius
        from ``(n/m - 1) / 2`` upwards.

    Examples
    --------
    >>> import numpy as np
    >>> from drrho_core import worst_case
    >>> worst_case(np.asarray([1.0, 2.0, 3.0, 4.0]), ChiSquareBall(0.1)).risk.item()  # mean 2.5, variance 1.25
    3.0
    """

    radius: float

    def __post_init__(self) -> None:
        _store_checked(self, "radius", NOT_NEGATIVE)

    def solve(self, slices: Slices, xp: Namespace) -> Solution:
        """Return the worst case of every slice."""
        # `solve_ball` takes the growth (see `balls`) and not the radius. For this ball the growth is 2 radius.
        return solve_ball(slices, 2 * self.radius, solve_chi_square_ball, xp)


@dataclass(frozen=True)
class CressieReadBall(AmbiguitySet):
    """Cressie-Read ball of an order above 1: the chi-square ball at order 2, and nearly the KL ball at orders near 1.

    With k the order, ``phi(t) = (t^k - k t + k - 1) / (k (k - 1))``, and the weights have ``D(p) <= radius``. The
    weights are ``relu(1 + (k - 1) (x - nu) / s)^(1/(k - 1)) / n``. With ``k' = k / (k - 1)``,
    ``risk = min_theta theta + (1 + k (k - 1) radius)^(1/k) mean(relu(x - theta)^k')^(1/k')`` (Duchi and Namkoong 2019).

    Parameters
    ----------
    order : float
        Above 1. The larger the order, the more evenly the weights spread over the losses that have a weight.
    radius : float
        At least 0. With 0 the risk is the mean. If m losses share the maximum, the risk is the maximum for every radius
        from ``((n/m)^(k-1) - 1) / (k (k-1))`` upwards.

    Examples
    --------
    >>> import numpy as np
    >>> from drrho_core import worst_case
    >>> worst_case(np.asarray([1.0, 2.0, 3.0, 4.0]), CressieReadBall(3.0, 0.1)).weights.round(3).tolist()
    [0.072, 0.229, 0.316, 0.383]
    """

    order: float
    radius: float

    def __post_init__(self) -> None:
        _store_checked(self, "order", ABOVE_ONE)
        _store_checked(self, "radius", NOT_NEGATIVE)

    def solve(self, slices: Slices, xp: Namespace) -> Solution:
        """Return the worst case of every slice."""
        # At order 1e30 the positive weights are already equal in any dtype, and float32 can still hold all numbers that
        # are computed from the order.
        order = min(self.order, 1e30)
        # For this ball the growth (see `balls`) is (1 + k (k - 1) radius)^(1 / (k - 1)) - 1. It is computed from the
        # logarithm of 1 + k (k - 1) radius, because the product k (k - 1) radius may overflow.
        product = order * (order - 1) * self.radius
        if product < 1e15:
            logarithm = math.log1p(product)
        else:
            logarithm = math.log(order) + math.log(order - 1) + math.log(self.radius)

        def solver(slices: Slices, ball: Ball, xp: Namespace) -> Solution:
            return solve_cressie_read_ball(slices, order, ball, xp)

        return solve_ball(slices, exp_minus_one(logarithm / (order - 1)), solver, xp)
