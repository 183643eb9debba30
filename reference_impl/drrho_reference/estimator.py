"""Rules for gamma, the weight of the new value in the moving average.

Sources: FastCLIP, arXiv 2407.01445, for the cosine; DRRho, arXiv 2505.06699, its released code, for the smallest gamma;
SCENT, arXiv 2602.02877, for a gamma per sample.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from drrho_reference._checks import FloatArray, fraction, non_negative, number, positive, raw_array

__all__ = ["cosine_gamma", "recommended_gamma_min", "scent_gamma"]


def cosine_gamma(epoch: float, *, num_epochs: float, gamma_min: float) -> float:
    """Let gamma fall from 1 to ``gamma_min`` along half a cosine, then stay.

    Parameters
    ----------
    epoch : float
        The epoch e, from 0.
    num_epochs : float
        E, the epochs that the fall takes, above 0.
    gamma_min : float
        Where it ends, in (0, 1].

    Returns
    -------
    float
        gamma_min + (1 - gamma_min) (1 + cos(pi min(e, E) / E)) / 2.

    Raises
    ------
    TypeError, ValueError
        If an argument is no number in its domain.

    Notes
    -----
    Source: FastCLIP, arXiv 2407.01445.

    Examples
    --------
    >>> [round(cosine_gamma(epoch, num_epochs=4, gamma_min=0.2), 4) for epoch in (0, 1, 2, 4, 9)]
    [1.0, 0.8828, 0.6, 0.2, 0.2]
    """
    last, smallest = positive("num_epochs", num_epochs), fraction("gamma_min", gamma_min)
    reached = min(non_negative("epoch", epoch), last)
    return smallest + (1.0 - smallest) * (1.0 + math.cos(math.pi * reached / last)) / 2.0


def recommended_gamma_min(num_epochs: float) -> float:
    """Choose the smallest gamma by the number of epochs: min(1, 4.177 E^-0.7265).

    Parameters
    ----------
    num_epochs : float
        E, above 0.

    Returns
    -------
    float
        In (0, 1].

    Raises
    ------
    TypeError, ValueError
        If ``num_epochs`` is no positive number.

    Notes
    -----
    Source: the released code of DRRho, arXiv 2505.06699.

    Examples
    --------
    >>> recommended_gamma_min(5), round(recommended_gamma_min(30), 4)
    (1.0, 0.353)
    """
    return min(1.0, 4.177 * math.pow(positive("num_epochs", num_epochs), -0.7265))


def scent_gamma(log_inner: npt.ArrayLike, /, *, log_alpha: float, gamma_floor: float = 1e-3) -> FloatArray:
    """Choose gamma per sample from its old estimate: max(floor, alpha u / (1 + alpha u)), and 1 on the first visit.

    Parameters
    ----------
    log_inner : array of any shape
        log u before the update; -inf: never visited.
    log_alpha : float
        The logarithm of SCENT's step size.
    gamma_floor : float
        The smallest gamma, in (0, 1].

    Returns
    -------
    array of float64, the shape of ``log_inner``
        In [gamma_floor, 1].

    Raises
    ------
    TypeError, ValueError
        If an argument is no number in its domain.

    Notes
    -----
    alpha u / (1 + alpha u) is sigmoid(log_alpha + log u); written with the exponential that is at most 1.
    Source: SCENT, arXiv 2602.02877.

    Examples
    --------
    >>> scent_gamma([-float("inf"), 0.0, -50.0], log_alpha=0.0).tolist()
    [1.0, 0.5, 0.001]
    """
    state = raw_array("log_inner", log_inner).astype(np.float64)
    shift, floor = number("log_alpha", log_alpha), fraction("gamma_floor", gamma_floor)
    if np.any(np.isnan(state) | (state == np.inf)):
        raise ValueError(f"log_inner must be finite or -inf, got {state.tolist()}")
    gamma = np.ones(state.shape)
    for index in np.ndindex(state.shape):
        if state[index] != -math.inf:
            exponent = shift + float(state[index])
            small = math.exp(-abs(exponent))
            gamma[index] = max(floor, (1.0 if exponent >= 0.0 else small) / (1.0 + small))
    return gamma
