"""Rules that choose gamma, the weight of a batch's own estimate in the moving average of the inner estimates.

cosine (FastCLIP):     gamma = gamma_min + (1 - gamma_min) (1 + cos(pi min(epoch, E) / E)) / 2
last value (DRRho):    gamma_min = min(1, 4.177 E^-0.7265)
per sample (SCENT):    gamma_i = max(gamma_floor, sigmoid(log_alpha + log_inner_i))

E is the number of epochs, gamma_min the last value of the schedule, and log_inner_i the logarithm of sample i's inner
estimate before the step.
"""

from __future__ import annotations

import math

from drrho_core import _validate
from drrho_core._array_api import Array, Namespace
from drrho_core._validate import FINITE, LOG_STATE, NOT_NEGATIVE, POSITIVE, UNIT_INTERVAL


def cosine_gamma(epoch: float, /, *, num_epochs: float, gamma_min: float) -> float:
    """Return gamma by FastCLIP's cosine schedule: 1 at the start, `gamma_min` from `num_epochs` on.

    Parameters
    ----------
    epoch : float
        Number of finished epochs, >= 0; it may be a fraction.
    num_epochs : float
        E > 0, the epoch at which the minimum is reached.
    gamma_min : float
        The last value of gamma, in (0, 1].

    Returns
    -------
    float
        ``gamma_min + (1 - gamma_min) (1 + cos(pi min(epoch, E) / E)) / 2``, in [gamma_min, 1].

    Raises
    ------
    TypeError, ValueError
        If an argument breaks these rules.

    Notes
    -----
    Cosine schedule of the inner learning rate, FastCLIP (arXiv 2407.01445).

    Examples
    --------
    >>> [round(cosine_gamma(epoch, num_epochs=4, gamma_min=0.2), 3) for epoch in (0, 1, 2, 4, 9)]
    [1.0, 0.883, 0.6, 0.2, 0.2]
    """
    epoch = _validate.static_number("epoch", epoch, NOT_NEGATIVE)
    num_epochs = _validate.static_number("num_epochs", num_epochs, POSITIVE)
    gamma_min = _validate.static_number("gamma_min", gamma_min, UNIT_INTERVAL)
    done = min(epoch, num_epochs) / num_epochs
    return gamma_min + (1.0 - gamma_min) * (1.0 + math.cos(math.pi * done)) / 2.0


def recommended_gamma_min(num_epochs: float, /) -> float:
    """Return the last gamma by the rule of the DRRho-CLIP code: ``min(1, 4.177 E^-0.7265)``.

    Parameters
    ----------
    num_epochs : float
        E > 0, the number of epochs of the run.

    Raises
    ------
    TypeError, ValueError
        If `num_epochs` is no number above 0.

    Notes
    -----
    The rule comes from the code released with DRRho-CLIP (arXiv 2505.06699). For up to seven epochs it returns 1.

    Examples
    --------
    >>> recommended_gamma_min(7), round(recommended_gamma_min(30), 3)
    (1.0, 0.353)
    """
    num_epochs = _validate.static_number("num_epochs", num_epochs, POSITIVE)
    return min(1.0, 4.177 * math.pow(num_epochs, -0.7265))


def scent_gamma(
    log_inner: Array,
    /,
    *,
    log_alpha: float | Array,
    gamma_floor: float | Array = 1e-3,
    xp: Namespace | None = None,
) -> Array:
    """Return SCENT's gamma, one per sample: ``max(gamma_floor, sigmoid(log_alpha + log_inner))``.

    Parameters
    ----------
    log_inner : array, shape (b,)
        The logarithms of the inner estimates before the step. A sample with ``-inf`` (never visited) has gamma 1.
    log_alpha : float or array of shape ()
        Logarithm of the step size alpha; about 10 for CLIP.
    gamma_floor : float or array of shape ()
        Smallest gamma, in (0, 1]. Without a floor the weights could become arbitrarily large, because gamma is close to
        0 if an estimate is much too small.
    xp : namespace, optional
        The arrays' namespace; pass it under ``torch.compile``.

    Returns
    -------
    array, shape (b,)
        gamma in [gamma_floor, 1], in the dtype of `log_inner`.

    Raises
    ------
    TypeError, ValueError
        If an argument breaks these rules.

    Notes
    -----
    SCENT (arXiv 2602.02877) takes proximal steps in nu, the logarithm of the inner estimate u, and uses the Bregman
    divergence of exp(-nu) as distance. Such a step computes the moving average of u with this gamma. The derivation is
    in docs/theory/estimator.md.

    Examples
    --------
    >>> import numpy as np
    >>> np.round(scent_gamma(np.asarray([-np.inf, -10.0, 0.0, -20.0]), log_alpha=10.0), 4).tolist()
    [1.0, 0.5, 1.0, 0.001]
    """
    call = _validate.arrays({"log_inner": log_inner}, xp, options={"log_alpha": log_alpha, "gamma_floor": gamma_floor})
    call.array("log_inner", _validate.STATE, rule=LOG_STATE)
    xp, dtype = call.xp, log_inner.dtype
    log_alpha = call.option("log_alpha", log_alpha, FINITE, dtype)
    gamma_floor = call.option("gamma_floor", gamma_floor, UNIT_INTERVAL, dtype)
    # At a first visit gamma is 1, unless the floor is nan: then the result has to be nan.
    unseen = (log_inner == -xp.inf) & (gamma_floor == gamma_floor)
    # Both terms are halved, because their sum may overflow. If the sum exceeds 2000 in size, its exponential is 0 or
    # infinite in every dtype, so larger sums are not needed.
    half = 0.5 * log_alpha + 0.5 * xp.where(unseen, xp.zeros_like(log_inner), log_inner)
    x = 2.0 * xp.clip(half, min=-1e3, max=1e3)
    # The exponential of -|x| never overflows, whichever side of 0 x is on.
    small = xp.exp(-xp.abs(x))
    sigmoid = xp.where(x >= 0, xp.ones_like(small), small) / (1.0 + small)
    return xp.where(unseen, xp.ones_like(sigmoid), xp.maximum(sigmoid, gamma_floor + xp.zeros_like(sigmoid)))
