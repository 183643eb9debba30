"""The ambiguity sets: which weights an adversary may put on n losses.

With a convex ``phi``, ``phi(1) = 0``, and the divergence ``D(p) = (1/n) sum_i phi(n p_i)`` from uniform weights, a
*ball* bounds D and a *penalty* charges for it:

    ball:     risk = max { sum_i p_i x_i : p >= 0, sum p = 1, D(p) <= radius }
    penalty:  risk = max { sum_i p_i x_i - strength * D(p) : p >= 0, sum p = 1 }

The dual variables ``nu, s >= 0`` prove the risk from above: ``risk = min nu + s radius + s mean phi*((x - nu) / s)``.
Derivations: docs/theory/ambiguity.md, "The sets".
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
    """Base class of the seven sets. Sets are frozen and hashable, and their parameters are checked when they are built.

    A parameter is a real, finite number, or an array without axes, which is read once. Under jit it is a constant.
    """

    @abstractmethod
    def solve(self, slices: Slices, xp: Namespace) -> Solution:
        """Return the worst case of every slice. Called by `worst_case` after its checks; users call `worst_case`."""


def _store_checked(ambiguity_set: AmbiguitySet, name: str, rule: Rule) -> None:
    """Replace a parameter by its checked value, a Python number, when a set is built."""
    # The dataclass is frozen, so the value is stored past its own assignment.
    object.__setattr__(ambiguity_set, name, _validate.static_number(name, getattr(ambiguity_set, name), rule))


@dataclass(frozen=True)
class CVaR(AmbiguitySet):
    """Conditional value at risk: the mean of the share `alpha` of largest losses.

    ``phi`` is 0 on ``[0, 1 / alpha]`` and infinite elsewhere: no weight may exceed ``1 / (alpha n)``. Losses above the
    quantile get exactly that weight; losses tied at the quantile share the rest equally.

    ``risk = min_nu nu + mean(relu(x - nu)) / alpha`` (Rockafellar and Uryasev 2000); the dual is (quantile, 0).
    ``alpha n`` is evaluated without rounding error, and counts as an integer when it is within 4 units of float64's
    last place of an integer, so that ``alpha=0.1`` of 30 losses means 3.

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
    >>> from drrho_core import worst_case
    >>> worst_case(np.asarray([1.0, 2.0, 3.0, 6.0]), CVaR(0.5)).risk.item()
    4.5
    """

    alpha: float

    def __post_init__(self) -> None:
        _store_checked(self, "alpha", UNIT_INTERVAL)

    def solve(self, slices: Slices, xp: Namespace) -> Solution:
        """Return the worst case of every slice."""
        return solve_cvar(slices, self.alpha, xp)


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
        return solve_kl_penalty(slices, self.temperature, xp)


@dataclass(frozen=True)
class CappedKLPenalty(AmbiguitySet):
    """KL penalty whose weights may not exceed ``1 / (alpha n)``, as in CVaR: a smooth mean of the worst share.

    ``phi(t) = t log t - t + 1`` on ``[0, 1 / alpha]`` and infinite elsewhere; the weights are
    ``min(exp((x - nu) / temperature), 1 / alpha) / n``, with nu such that they sum to 1, and the dual is
    (nu, temperature). No single loss can take all the weight, however large it is, and no weight is 0. (KL-regularised
    CVaR of Levy et al., arXiv 2010.05893, whose `size` is alpha.)

    ``alpha n`` is evaluated as in `CVaR`.

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
        return solve_capped_kl_penalty(slices, self.temperature, self.alpha, xp)


@dataclass(frozen=True)
class KLBall(AmbiguitySet):
    """Kullback-Leibler ball: the smooth maximum whose temperature fits the radius.

    ``phi(t) = t log t - t + 1``, ``D(p) <= radius``; ``risk = min_{s >= 0} s log mean exp(x / s) + s radius``, the
    weights are ``softmax(x / s)``.

    Parameters
    ----------
    radius : float
        At least 0: 0 gives the mean; ``log(n/m)`` and more give the maximum if m losses share the maximum.

    Raises
    ------
    TypeError
        If `radius` is not a real number.
    ValueError
        If `radius` is not finite or negative.

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
        return solve_ball(slices, exp_minus_one(self.radius), solve_kl_ball, xp)


@dataclass(frozen=True)
class ChiSquarePenalty(AmbiguitySet):
    """Chi-square penalty: weights that rise linearly with the loss, clipped at 0.

    ``phi(t) = (t - 1)^2 / 2``; the weights are ``relu(1 + (x - nu) / strength) / n``, with nu such that they sum
    to 1, and the dual is (nu, strength). If no weight is clipped, ``risk = mean(x) + var(x) / (2 strength)``.

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
    >>> from drrho_core import worst_case
    >>> worst_case(np.asarray([1.0, 2.0, 3.0, 6.0]), ChiSquarePenalty(4.0)).weights.tolist()
    [0.125, 0.1875, 0.25, 0.4375]
    """

    strength: float

    def __post_init__(self) -> None:
        _store_checked(self, "strength", POSITIVE)

    def solve(self, slices: Slices, xp: Namespace) -> Solution:
        """Return the worst case of every slice."""
        return solve_chi_square_penalty(slices, self.strength, xp)


@dataclass(frozen=True)
class ChiSquareBall(AmbiguitySet):
    """Chi-square ball: the mean plus a multiple of the standard deviation, as long as no weight has to be clipped.

    ``phi(t) = (t - 1)^2 / 2``, ``D(p) <= radius``; the weights are ``relu(1 + (x - nu) / s) / n``. If no weight is
    clipped, ``risk = mean(x) + sqrt(2 radius var(x))`` (Duchi and Namkoong 2019).

    Parameters
    ----------
    radius : float
        At least 0: 0 gives the mean; ``(n/m - 1) / 2`` and more give the maximum if m losses share the maximum.

    Raises
    ------
    TypeError
        If `radius` is not a real number.
    ValueError
        If `radius` is not finite or negative.

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
        return solve_ball(slices, 2 * self.radius, solve_chi_square_ball, xp)


@dataclass(frozen=True)
class CressieReadBall(AmbiguitySet):
    """Cressie-Read ball of any order above 1: order 2 is the chi-square ball, towards 1 it becomes the KL ball.

    ``phi(t) = (t^k - k t + k - 1) / (k (k - 1))``, k the order, ``D(p) <= radius``; the weights are
    ``relu(1 + (k - 1) (x - nu) / s)^(1/(k - 1)) / n``. With ``k' = k / (k - 1)``,
    ``risk = min_theta theta + (1 + k (k - 1) radius)^(1/k) mean(relu(x - theta)^k')^(1/k')`` (Duchi and Namkoong 2019).

    Parameters
    ----------
    order : float
        Above 1. The larger the order, the more evenly the weights spread over the losses that have a weight.
    radius : float
        At least 0: 0 gives the mean; ``((n/m)^(k-1) - 1) / (k (k-1))`` and more give the maximum if m losses share
        the maximum.

    Raises
    ------
    TypeError
        If a parameter is not a real number.
    ValueError
        If a parameter is not finite, `order` is not above 1 or `radius` is negative.

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
        # Far above this order the weights are uniform in any dtype. float32 still holds the numbers derived from it.
        order = min(self.order, 1e30)
        # log(1 + k (k - 1) radius), from which the growth of the ball follows. The product itself may overflow.
        product = order * (order - 1) * self.radius
        if product < 1e15:
            logarithm = math.log1p(product)
        else:
            logarithm = math.log(order) + math.log(order - 1) + math.log(self.radius)

        def solver(slices: Slices, ball: Ball, xp: Namespace) -> Solution:
            return solve_cressie_read_ball(slices, order, ball, xp)

        return solve_ball(slices, exp_minus_one(logarithm / (order - 1)), solver, xp)
