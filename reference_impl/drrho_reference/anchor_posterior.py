"""Weights of anchors that are the probability that a pair is right, estimated from pair losses by maximum likelihood.

A share p of the pairs is swapped: the image has the text of a random other pair. With the density ratio r of right
pairs to swapped pairs, Bayes' rule gives the probability (1 - p) r / ((1 - p) r + p) that a pair is right. The ratio is
an exponential tilt: r(l) = exp(-s l) / Z(s) at the pair loss l, where Z(s) is the mean of exp(-s l) over images with a
random text. The share p and the slope s maximise the likelihood of the pairs.

Source: mixtures with an exponential tilt, Anderson, Biometrika 66 (1979), "Multivariate logistic compounds"; the EM
algorithm, Dempster, Laird and Rubin, J. R. Stat. Soc. B 39 (1977). The use for anchors was designed for this library.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from drrho_reference._checks import FloatArray, real_array

__all__ = ["PosteriorWeights", "posterior_anchor_weight"]

_ROUNDS = 100_000


class PosteriorWeights(NamedTuple):
    """Weights with mean 1, the estimated share p of swapped pairs, and the estimated slope s."""

    anchor_weight: FloatArray
    swapped_share: float
    slope: float


def posterior_anchor_weight(pair_loss: npt.ArrayLike, swapped_pair_loss: npt.ArrayLike, /) -> PosteriorWeights:
    """Turn a reference model's pair losses into the probabilities that the pairs are right, divided by their mean.

    Parameters
    ----------
    pair_loss : array (b,)
        The reference model's pair losses, b >= 2.
    swapped_pair_loss : array (m,)
        Pair losses of images with the texts of random other pairs.

    Returns
    -------
    PosteriorWeights
        The weights, p and s.

    Raises
    ------
    TypeError, ValueError
        If the losses are no finite real numbers, or an array is empty or has not one axis.
    FloatingPointError
        If the algorithm does not converge in the linear domain, for example because no share in (0, 1) is best.

    Notes
    -----
    A random text of the data set is the own text with probability 1 / b, so Z(s) is (1 - 1/b) times the mean over
    swapped pairs plus 1/b times the mean over the pairs. The EM algorithm repeats two steps from p = 1/2, s = 1. It
    computes the probability w_i that pair i is right. Then p is 1 - mean w, and s is the slope at which the tilted
    random pairs have the mean loss of the right pairs, sum_i w_i l_i / sum_i w_i.

    Examples
    --------
    >>> swapped = [0.0, 1.0, 2.0, 3.0]
    >>> weights = posterior_anchor_weight([-3.0, -2.5, -2.0, -3.0, 1.5, 2.0, 0.5, -2.0], swapped)
    >>> round(weights.swapped_share, 3), weights.anchor_weight.round(2).tolist()
    (0.266, [1.33, 1.31, 1.27, 1.33, 0.43, 0.3, 0.75, 1.27])
    """
    losses, swapped = real_array("pair_loss", pair_loss), real_array("swapped_pair_loss", swapped_pair_loss)
    for argument, values in (("pair_loss", losses), ("swapped_pair_loss", swapped)):
        if values.ndim != 1 or values.size == 0:
            raise ValueError(f"{argument} must have one axis that is not empty, got the shape {values.shape}")
    b = len(losses)
    # The losses of images with a random text, and how often each of them counts in a mean.
    random = np.concatenate([swapped, losses])
    share_of = np.concatenate([np.full(len(swapped), (1 - 1 / b) / len(swapped)), np.full(b, 1 / b**2)])
    p, s = 0.5, 1.0
    for _ in range(_ROUNDS):
        r = np.exp(-s * losses) / math.fsum(share_of * np.exp(-s * random))
        w = (1 - p) * r / ((1 - p) * r + p)
        new_p = 1.0 - math.fsum(w) / b
        new_s = _slope(math.fsum(w * losses) / math.fsum(w), random, share_of)
        if abs(new_p - p) <= 1e-15 and abs(new_s - s) <= 1e-15 * s:
            return PosteriorWeights(w / (math.fsum(w) / b), p, s)
        p, s = new_p, new_s
    raise FloatingPointError(f"pair_loss must have a likelihood with a maximum, got p = {p} after {_ROUNDS} rounds")


def _slope(mean: float, losses: FloatArray, shares: FloatArray) -> float:
    """Return s such that the mean of the losses, with weights in proportion to shares exp(-s loss), is `mean`."""
    low, high = 1 / 16, 64.0
    # The tilted mean falls as the slope rises, so bisection finds the slope.
    middle = 0.5 * (low + high)
    while low < middle < high:
        tilted = shares * np.exp(-middle * (losses - losses.min()))
        if math.fsum(tilted * losses) / math.fsum(tilted) > mean:
            low = middle
        else:
            high = middle
        middle = 0.5 * (low + high)
    return middle
