"""The ambiguity sets: their names and parameters. ``ambiguity.py`` has one solver for each set.

A set limits how far the weights p of n losses may move from the uniform weights 1/n. The distance from the uniform
weights is D(p || 1/n) = (1/n) sum_i phi(n p_i), with a convex function phi that is 0 at 1. A ball bounds D by a radius.
A penalty subtracts D, times a price, from the weighted mean of the losses.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from drrho_reference._checks import fraction, non_negative, number, positive

__all__ = [
    "AmbiguitySet",
    "CVaR",
    "CappedKLPenalty",
    "ChiSquareBall",
    "ChiSquarePenalty",
    "CressieReadBall",
    "KLBall",
    "KLPenalty",
]


@dataclass(frozen=True)
class CVaR:
    """Weights of at most ``1 / (alpha n)``; the risk is the mean of the worst share ``alpha`` of the losses.

    Parameters
    ----------
    alpha : float
        The share, in (0, 1]. With 1 the risk is the mean of all losses.

    Raises
    ------
    TypeError, ValueError
        If ``alpha`` is no number in (0, 1].

    Examples
    --------
    >>> CVaR(0.25)
    CVaR(alpha=0.25)
    """

    # phi(t) is 0 on [0, 1/alpha] and infinite above 1/alpha: weights up to 1/(alpha n) add nothing to D.
    alpha: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "alpha", fraction("alpha", self.alpha))


@dataclass(frozen=True)
class KLPenalty:
    """A penalty: ``temperature`` times the Kullback-Leibler divergence of the weights from uniform weights.

    Parameters
    ----------
    temperature : float
        The price, above 0. A small price gives the maximum of the losses, a large price their mean.

    Raises
    ------
    TypeError, ValueError
        If ``temperature`` is no positive number.

    Examples
    --------
    >>> KLPenalty(2)
    KLPenalty(temperature=2.0)
    """

    # The price of the divergence with phi(t) = t log t - t + 1; the set does not bound the divergence.
    temperature: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "temperature", positive("temperature", self.temperature))


@dataclass(frozen=True)
class KLBall:
    """A ball: weights whose Kullback-Leibler divergence from uniform weights is at most ``radius``.

    Parameters
    ----------
    radius : float
        At least 0. 0 gives the mean of the losses, ``log n`` or more gives their maximum.

    Raises
    ------
    TypeError, ValueError
        If ``radius`` is no number of at least 0.

    Examples
    --------
    >>> KLBall(0.5)
    KLBall(radius=0.5)
    """

    # The bound on D(p || 1/n) with phi(t) = t log t - t + 1.
    radius: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "radius", non_negative("radius", self.radius))


@dataclass(frozen=True)
class ChiSquarePenalty:
    """A penalty: ``strength`` times the chi-square divergence, phi(t) = (t - 1)^2 / 2, from uniform weights.

    Parameters
    ----------
    strength : float
        The price, above 0. A small price gives the maximum of the losses, a large price their mean.

    Raises
    ------
    TypeError, ValueError
        If ``strength`` is no positive number.

    Examples
    --------
    >>> ChiSquarePenalty(1.5)
    ChiSquarePenalty(strength=1.5)
    """

    # The price of the divergence with phi(t) = (t - 1)^2 / 2.
    strength: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "strength", positive("strength", self.strength))


@dataclass(frozen=True)
class ChiSquareBall:
    """A ball: weights whose chi-square divergence, phi(t) = (t - 1)^2 / 2, from uniform weights is at most ``radius``.

    Parameters
    ----------
    radius : float
        At least 0. 0 gives the mean of the losses, ``(n - 1) / 2`` or more gives their maximum.

    Raises
    ------
    TypeError, ValueError
        If ``radius`` is no number of at least 0.

    Examples
    --------
    >>> ChiSquareBall(0.5)
    ChiSquareBall(radius=0.5)
    """

    radius: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "radius", non_negative("radius", self.radius))


@dataclass(frozen=True)
class CressieReadBall:
    """A ball: weights whose Cressie-Read divergence from uniform weights is at most ``radius``.

    phi(t) = (t^k - k t + k - 1) / (k (k - 1)) with k = ``order``. Order 2 is the chi-square divergence; the limit of
    order 1 is the Kullback-Leibler divergence.

    Parameters
    ----------
    order : float
        Above 1.
    radius : float
        At least 0. 0 gives the mean of the losses, ``(n^(k-1) - 1) / (k (k - 1))`` or more gives their maximum.

    Raises
    ------
    TypeError, ValueError
        If a parameter is no number in its domain.

    Examples
    --------
    >>> CressieReadBall(3, radius=0.5)
    CressieReadBall(order=3.0, radius=0.5)
    """

    order: float
    radius: float

    def __post_init__(self) -> None:
        # phi divides by k (k - 1), so the order must be above 1. Kullback-Leibler, the limit, is the class KLBall.
        order = number("order", self.order)
        if order <= 1.0:
            raise ValueError(f"order must be above 1, got {order}")
        object.__setattr__(self, "order", order)
        object.__setattr__(self, "radius", non_negative("radius", self.radius))


@dataclass(frozen=True)
class CappedKLPenalty:
    """A penalty, ``temperature`` times the Kullback-Leibler divergence, for weights of at most ``1 / (alpha n)``.

    phi(t) is t log t - t + 1 on [0, 1/alpha] and infinite above 1/alpha.

    Parameters
    ----------
    temperature : float
        The price, above 0. A large price gives the mean of the losses, a small price gives the risk of :class:`CVaR`.
    alpha : float
        The smallest share of the losses that the weights may concentrate on, in (0, 1]. 1 gives the mean. If
        ``alpha n`` is 1 or less, no weight can reach the cap, and the risk is that of :class:`KLPenalty`.

    Raises
    ------
    TypeError, ValueError
        If a parameter is no number in its domain.

    Examples
    --------
    >>> CappedKLPenalty(2, alpha=0.25)
    CappedKLPenalty(temperature=2.0, alpha=0.25)
    """

    temperature: float
    alpha: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "temperature", positive("temperature", self.temperature))
        object.__setattr__(self, "alpha", fraction("alpha", self.alpha))


AmbiguitySet: TypeAlias = (
    CVaR | KLPenalty | KLBall | ChiSquarePenalty | ChiSquareBall | CressieReadBall | CappedKLPenalty
)
