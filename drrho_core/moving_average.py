"""The KL-penalised DRRho risk of a whole data set from mini-batches, with one moving average.

    x_i = l_i - lambda r_i,      g = mean_i exp(x_i / tau) over the batch's b samples
    u <- (1 - gamma) u + gamma g                    (first visit: u <- g)
    risk = tau log u,      weights_i = exp(x_i / tau) / u / b

u estimates the mean over the data set, so one number is enough for all samples. Stored is its logarithm. Sources: the
risk of Model Steering / DRRho (arXiv 2505.06699) with the moving average of SogCLR (arXiv 2202.12387); see
docs/theory/estimator.md.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from drrho_core import _validate
from drrho_core._array_api import Array, Namespace, Scalar, device_of, is_array, namespace_of, wide_dtype
from drrho_core._validate import POSITIVE, UNIT_INTERVAL
from drrho_core.ambiguity.checks import check_losses, check_values
from drrho_core.contrastive.tiles import cast
from drrho_core.numerics import log_moving_average, log_sum_exp
from drrho_core.risk import check_weight, difference


class MovingAverageKL(NamedTuple):
    """Result of `moving_average_kl`.

    Attributes
    ----------
    risk : array, shape ()
        Estimate of the data set's risk with the updated average: the curve to watch.
    weights : array, shape (b,)
        What to weigh the batch's losses with: the estimate's derivative with respect to `loss`, the average being a
        constant. They sum to g / u, so to 1 only without memory.
    log_inner : array, shape ()
        Logarithm of the updated average.
    """

    risk: Array
    weights: Array
    log_inner: Array


def moving_average_kl(
    loss: Array,
    reference_loss: Array,
    log_inner: Scalar,
    /,
    *,
    temperature: Scalar,
    gamma: Scalar = 1.0,
    reference_weight: Scalar = 1.0,
    where: Array | None = None,
    xp: Namespace | None = None,
) -> MovingAverageKL:
    """Take one step of the KL-penalised DRRho risk on a batch: risk, weights and the new average.

    Parameters
    ----------
    loss : array, shape (b,)
        The learner's losses of a batch, real floating, any unit, any sign.
    reference_loss : array, shape (b,)
        The frozen reference model's losses on the same samples, in the same dtype. Not broadcast.
    log_inner : float or array of shape ()
        Logarithm of the average so far, one for the whole data set; ``-inf`` = never visited, else at most half the
        dtype's largest number in size. An array is float32 or
        wider and keeps its dtype; a number becomes an array of the losses' dtype, float32 at least.
    temperature : float or array of shape ()
        tau > 0 in the unit of the losses: the price of the Kullback-Leibler divergence.
    gamma : float or array of shape ()
        Weight of the batch's own mean, in (0, 1]; 1 has no memory: `drrho_risk` of the batch with ``KLPenalty(tau)``.
    reference_weight : float or array of shape ()
        lambda >= 0: 0 ignores the reference model, 1 is DRRho; may exceed 1.
    where : array of bool, optional
        Marks the samples that count, broadcast to (b,); neither loss of the others is read, their weight is 0, and b
        is the number of those that count.
    xp : namespace, optional
        The arrays' namespace; needed under ``torch.compile`` only.

    Returns
    -------
    MovingAverageKL
        `risk` and `weights` in the losses' dtype, `log_inner` in its own. Under tracing a value that breaks a rule,
        such as a loss that is not finite or a gamma above 1, or a `where` without a True, makes all of them nan.

    Raises
    ------
    TypeError
        If an argument has another type or the arrays have different dtypes or libraries.
    ValueError
        If shapes, devices or values break the rules above, nothing counts, an excess loss over the temperature does not
        fit `log_inner`, or an array asks for autograd. Values are looked at on the host outside tracing only.

    Notes
    -----
    Formulas at the top of this module; DRRho-CLIP (arXiv 2505.06699), SogCLR (arXiv 2202.12387). The largest excess
    loss is taken out first, so nothing overflows, and without memory nothing is lost where it is large.

    Examples
    --------
    The excess losses are 0 and log 3, their exponentials 1 and 3; u was 4 and becomes 3.

    >>> import numpy as np
    >>> step = moving_average_kl(np.log([2.0, 6.0]), np.log([2.0, 2.0]), np.log(4.0), temperature=1.0, gamma=0.5)
    >>> round(float(np.exp(step.risk)), 6), step.weights.round(4).tolist()
    (3.0, [0.1667, 0.5])
    """
    arrays = {"loss": loss, "reference_loss": reference_loss}
    xp = check_losses(arrays, where, xp)
    log_inner = _check_state(log_inner, loss, xp)
    scalars = {"temperature": temperature, "gamma": gamma}
    scalars = {name: value for name, value in scalars.items() if is_array(value)}
    together = {"loss": loss, "log_inner": log_inner} | scalars
    namespace_of(together, xp)
    _validate.same_device(together, xp)
    _validate.detached(together, xp)
    wide = xp.result_type(wide_dtype(loss.dtype, xp), log_inner.dtype)
    temperature = _validate.parameter("temperature", temperature, POSITIVE, xp, dtype=wide)
    gamma = _validate.parameter("gamma", gamma, UNIT_INTERVAL, xp, dtype=wide)
    weight = check_weight(reference_weight, loss, xp)
    _validate.ndim("loss", loss, 1, "(batch_size,)")
    _validate.axis(0, "loss", loss)
    counted = xp.ones_like(loss, dtype=xp.bool) if where is None else xp.broadcast_to(where, loss.shape)
    if where is not None:
        arrays = {name: xp.where(counted, array, xp.zeros_like(array)) for name, array in arrays.items()}
    for name, array in arrays.items():
        _validate.finite(name, array, xp)

    tau, gamma = cast(temperature, wide, xp), cast(gamma, wide, xp)
    x = difference(arrays["loss"], arrays["reference_loss"], weight, xp)
    excess = "loss - reference_weight * reference_loss"
    check_values(excess, x, 0, where, xp)
    x = xp.astype(x, wide, copy=False)
    # The quotient may be twice as large between two losses, and some room is left for the sum of both logarithms.
    limit = float(xp.finfo(log_inner.dtype).max) / 8 * (tau if isinstance(tau, float) else xp.where(tau < 1, tau, 1.0))
    _validate.values(excess, x, lambda z: xp.abs(z) <= limit, "fit log_inner when divided by temperature", xp)

    valid = xp.any(counted) & xp.all(xp.isfinite(x)) & _usable(log_inner, xp)
    if is_array(tau):
        valid = valid & (tau > 0) & xp.isfinite(tau)
    if is_array(gamma):
        valid = valid & UNIT_INTERVAL.holds(gamma)
    # A bad batch is computed as one of zeros, so that nothing below has to think of it, and is overwritten at the end.
    x, counted = xp.where(valid, x, xp.zeros_like(x)), counted | ~valid
    number = xp.sum(xp.astype(counted, wide))
    top = xp.max(xp.where(counted, x, -xp.inf))
    y = xp.where(counted, (x - top) / tau, -xp.inf)
    shift = top / tau
    own = _log_mean_exp(y, counted, number, xp)
    # All logarithms are those of u / exp(top / tau): where losses are large only the state loses their last digits.
    old = xp.astype(log_inner, wide) - shift
    ratio = _log_average(old, own, gamma, xp)
    # Halves and roots, because tau log u may be representable where tau times the ratio's logarithm is not, and a
    # weight where number times the weight is not.
    risk = 2.0 * (0.5 * top + tau * (0.5 * ratio))
    root = xp.exp(0.5 * (y - ratio))
    risk, weights, new = (xp.where(valid, value, xp.nan) for value in (risk, root / number * root, shift + ratio))
    return MovingAverageKL(
        risk=xp.astype(risk, loss.dtype),
        weights=xp.astype(weights, loss.dtype),
        log_inner=xp.asarray(xp.astype(new, log_inner.dtype)),
    )


def _check_state(log_inner: Any, loss: Array, xp: Namespace) -> Array:
    """Check the average and return it as an array."""
    dtype = wide_dtype(loss.dtype, xp)
    if is_array(log_inner):
        namespace_of({"loss": loss, "log_inner": log_inner}, xp)
        _validate.state_dtype("log_inner", log_inner, xp)
        _validate.shape("log_inner", log_inner, (), "()")
        rule = f"be finite and at most {_limit(log_inner.dtype, xp):.3g} in size, or -inf for never visited"
        _validate.values("log_inner", log_inner, lambda x: _usable(x, xp), rule, xp)
        return log_inner
    if log_inner != -math.inf:
        limit = _limit(dtype, xp)
        rule = f"be finite and at most {limit:.3g} in size, or -inf for never visited"
        log_inner = _validate.number("log_inner", log_inner, lambda x: abs(x) <= limit, rule)
    return xp.asarray(float(log_inner), dtype=dtype, device=device_of(loss))


def _limit(dtype: Any, xp: Namespace) -> float:
    """Return how large the logarithm of an average may be: a batch's own excess losses are at most a fourth of it."""
    return float(xp.finfo(dtype).max) / 2


def _usable(log_inner: Array, xp: Namespace) -> Array:
    return (xp.abs(log_inner) <= _limit(log_inner.dtype, xp)) | (log_inner == -xp.inf)


def _log_average(log_old: Array, log_new: Array, gamma: Scalar, xp: Namespace) -> Array:
    """Return `log_moving_average`, with all digits also where both are nearly the same and near 0."""
    change = log_old - log_new
    near = xp.abs(change) < 1
    change = xp.where(near, change, xp.zeros_like(change))
    return xp.where(
        near, log_new + xp.log1p((1 - gamma) * xp.expm1(change)), log_moving_average(log_old, log_new, gamma, xp=xp)
    )


def _log_mean_exp(y: Array, counted: Array, number: Array, xp: Namespace) -> Array:
    """Return ``log(mean(exp(y)))`` of y <= 0, one of which is 0, with all digits also where all are near 0."""
    change = xp.sum(xp.where(counted, xp.expm1(y), xp.zeros_like(y))) / number
    near = change > -0.5
    far = log_sum_exp(y, axis=0, where=counted, xp=xp) - xp.log(number)
    return xp.where(near, xp.log1p(xp.where(near, change, xp.zeros_like(change))), far)
