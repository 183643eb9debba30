"""The ambiguity sets: names and parameters. ``ambiguity.py`` holds the formula of each, one solver per set.

A set bounds how far the weights p may move from the uniform weights 1/n. D(p || 1/n) = (1/n) sum_i phi(n p_i) is the
distance, with a convex function phi that is 0 at 1.
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
    """Weights of at most ``1 / (alpha n)``: the mean of the worst share ``alpha`` of the losses.

    Parameters
    ----------
    alpha : float
        The share, in (0, 1]. 1 is the mean of all.

    Raises
    ------
    TypeError, ValueError
        If ``alpha`` is no number in (0, 1].

    Examples
    --------
    >>> CVaR(0.25)
    CVaR(alpha=0.25)
    """

    # phi(t) = 0 on [0, 1/alpha] and infinite above: weights up to the cap are free.
    alpha: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "alpha", fraction("alpha", self.alpha))


@dataclass(frozen=True)
class KLPenalty:
    """Weights pay ``temperature`` times their Kullback-Leibler divergence from uniform.

    Parameters
    ----------
    temperature : float
        The price, above 0. A small one gives the maximum, a large one the mean.

    Raises
    ------
    TypeError, ValueError
        If ``temperature`` is no positive number.

    Examples
    --------
    >>> KLPenalty(2)
    KLPenalty(temperature=2.0)
    """

    # The price of phi(t) = t log t - t + 1 in the objective; there is no bound.
    temperature: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "temperature", positive("temperature", self.temperature))


@dataclass(frozen=True)
class KLBall:
    """Weights within a Kullback-Leibler divergence of ``radius`` from uniform.

    Parameters
    ----------
    radius : float
        At least 0. 0 gives the mean, ``log n`` and more the maximum.

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
    """Weights pay ``strength`` times their chi-square divergence from uniform, phi(t) = (t - 1)^2 / 2.

    Parameters
    ----------
    strength : float
        The price, above 0. A small one gives the maximum, a large one the mean.

    Raises
    ------
    TypeError, ValueError
        If ``strength`` is no positive number.

    Examples
    --------
    >>> ChiSquarePenalty(1.5)
    ChiSquarePenalty(strength=1.5)
    """

    # The price of phi(t) = (t - 1)^2 / 2.
    strength: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "strength", positive("strength", self.strength))


@dataclass(frozen=True)
class ChiSquareBall:
    """Weights within a chi-square divergence of ``radius`` from uniform, phi(t) = (t - 1)^2 / 2.

    Parameters
    ----------
    radius : float
        At least 0. 0 gives the mean, ``(n - 1) / 2`` and more the maximum.

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
    """Weights within a Cressie-Read divergence of ``radius`` from uniform.

    phi(t) = (t^k - k t + k - 1) / (k (k - 1)) with k = ``order``: order 2 is chi-square, orders near 1 come near to
    Kullback-Leibler.

    Parameters
    ----------
    order : float
        Above 1.
    radius : float
        At least 0. 0 gives the mean, ``(n^(k-1) - 1) / (k (k - 1))`` and more the maximum.

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
        # phi divides by k (k - 1), so the order stays above 1; KL is the limit, and has a class of its own.
        order = number("order", self.order)
        if order <= 1.0:
            raise ValueError(f"order must be above 1, got {order}")
        object.__setattr__(self, "order", order)
        object.__setattr__(self, "radius", non_negative("radius", self.radius))


@dataclass(frozen=True)
class CappedKLPenalty:
    """Weights of at most ``1 / (alpha n)`` that pay ``temperature`` times their Kullback-Leibler divergence.

    phi(t) = t log t - t + 1 on [0, 1/alpha], infinite above it.

    Parameters
    ----------
    temperature : float
        The price, above 0. A large one gives the mean, a small one :class:`CVaR` of ``alpha``.
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
