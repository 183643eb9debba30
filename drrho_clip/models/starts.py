"""The shape of a parameter and the distribution from which the initial values of the parameter are drawn."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["Start"]


class Start(NamedTuple):
    """Shape of a parameter, and mean and standard deviation of the normal distribution of the initial values.

    Attributes
    ----------
    shape : tuple of int
        The shape.
    deviation : float
        The standard deviation; with 0 all values are equal to the mean.
    mean : float
        The mean.
    """

    shape: tuple[int, ...]
    deviation: float = 0.0
    mean: float = 0.0
