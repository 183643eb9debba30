"""Functions that the Array API standard lacks: log-sum-exp with a mask, and averages of numbers given as logarithms.

The numbers are not negative, and every result is a logarithm. ``-inf``, the logarithm of 0, is a valid argument and a
valid result.
"""

from __future__ import annotations

import math

from drrho_core._array_api import Array, Namespace, device_of


def log_sum_exp(x: Array, /, *, axis: int, where: Array | None, xp: Namespace) -> Array:
    """Return ``log(sum(exp(x)))`` along one axis over the entries that `where` marks.

    The largest entry is subtracted first, so nothing overflows. A slice without a marked entry gives ``-inf``.

    Parameters
    ----------
    x : array
        Any shape, finite where `where` is True.
    axis : int
        The axis to sum over.
    where : array of bool or None
        The entries that count, in the shape of `x`. With None every entry counts.
    xp : namespace
        The arrays' namespace.

    Returns
    -------
    array
        The shape of `x` without `axis`.

    Examples
    --------
    >>> import numpy as np
    >>> float(log_sum_exp(np.asarray([1000.0, 1000.0]), axis=0, where=None, xp=np)) - 1000.0  # log 2
    0.693147180559...
    """
    if where is not None:
        x = xp.where(where, x, -xp.inf)
    peak = xp.max(x, axis=axis, keepdims=True)
    peak = xp.where(xp.isfinite(peak), peak, xp.zeros_like(peak))
    total = xp.squeeze(xp.sum(xp.exp(x - peak), axis=axis, keepdims=True), axis=axis)
    return log(total, xp=xp) + xp.squeeze(peak, axis=axis)


def log(x: Array, /, *, xp: Namespace) -> Array:
    """Return ``log(x)`` of non-negative numbers, with ``-inf`` at 0 and without NumPy's warning."""
    zero = x == 0  # False for nan, so that nan stays nan
    return xp.where(zero, -xp.inf, xp.log(xp.where(zero, xp.ones_like(x), x)))


def log_moving_average(log_old: Array, log_new: Array, gamma: Array | float, /, *, xp: Namespace) -> Array:
    """Return ``log((1 - gamma) exp(log_old) + gamma exp(log_new))``, or `log_new` if `log_old` is ``-inf``.

    This is SogCLR's update of the inner estimate, a moving average per sample (arXiv 2202.12387), in terms of
    logarithms. If `log_old` is ``-inf``, no batch has contained the sample yet. The first visit of a sample takes the
    new value, whatever gamma is.

    Parameters
    ----------
    log_old, log_new : array, shape (b,)
        Logarithms of the old estimate and of the new estimate, which comes from the batch.
    gamma : float or array of shape () or (b,)
        Weight of the new estimate, in (0, 1]. With 1 the old estimate is forgotten.
    xp : namespace
        The arrays' namespace.

    Examples
    --------
    >>> import numpy as np
    >>> old, new = np.log(np.asarray([2.0, 4.0])), np.log(np.asarray([1.0, 1.0]))
    >>> np.round(np.exp(log_moving_average(old, new, 0.25, xp=np)), 12).tolist()
    [1.75, 3.25]
    """
    keep, take = _log_gammas(gamma, xp)
    return xp.where(log_old == -xp.inf, log_new, xp.logaddexp(keep + log_old, take + log_new))


def log_share_of_new(log_old: Array, log_new: Array, gamma: Array | float, /, *, xp: Namespace) -> Array:
    """Return ``log_new - log_moving_average(log_old, log_new, gamma)`` without cancellation of digits.

    The result is 0 if `log_old` is ``-inf``. It is at most ``-log(gamma)``, so the weights of an anchor (an image or a
    text that is compared with the other samples of a batch) sum to at most 1 / gamma in SogCLR.

    Examples
    --------
    >>> import numpy as np
    >>> old, new = np.log(np.asarray([2.0, 4.0])), np.log(np.asarray([1.0, 1.0]))
    >>> np.round(np.exp(-log_share_of_new(old, new, 0.25, xp=np)), 12).tolist()
    [1.75, 3.25]
    """
    keep, take = _log_gammas(gamma, xp)
    unseen = log_old == -xp.inf
    gap = xp.where(unseen, xp.zeros_like(log_new), log_old - log_new)
    gap = xp.clip(gap, max=float(xp.finfo(gap.dtype).max))
    return xp.where(unseen, xp.zeros_like(gap), -xp.logaddexp(keep + gap, take + xp.zeros_like(gap)))


def _log_gammas(gamma: Array | float, xp: Namespace) -> tuple[Array | float, Array | float]:
    """Return ``log(1 - gamma)`` and ``log(gamma)``.

    The values of a traced array cannot be checked. An entry outside (0, 1] has nan for ``log(gamma)``.
    """
    if isinstance(gamma, float):
        return (math.log1p(-gamma) if gamma < 1 else -math.inf), math.log(gamma)
    valid = (gamma > 0) & (gamma <= 1)
    memory = valid & (gamma < 1)
    keep = xp.where(memory, xp.log1p(-xp.where(memory, gamma, xp.zeros_like(gamma))), -xp.inf)
    return keep, xp.where(valid, xp.log(xp.where(valid, gamma, xp.ones_like(gamma))), xp.nan)


def log_add_constant(log_x: Array, constant: Array | float, /, *, xp: Namespace) -> Array:
    """Return ``log(constant + exp(log_x))`` for a constant >= 0. With the constant 0 the result is exactly `log_x`.

    Examples
    --------
    >>> import numpy as np
    >>> float(log_add_constant(np.asarray(-1000.0), 1.0, xp=np))
    0.0
    """
    if isinstance(constant, float):
        if constant == 0.0:
            return log_x
        constant = xp.asarray(constant, dtype=log_x.dtype, device=device_of(log_x))
    return xp.logaddexp(log_x, log(constant, xp=xp))
