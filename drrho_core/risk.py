"""DRRho risks: the worst-case weighted mean of how much worse a model is than a reference model.

Shapes: losses (..., n, ...), one entry per sample; the samples of one problem lie along `axis`. The losses l of the
learner and r of the reference model may have any unit and any sign, and lambda is the weight of the reference model.

    x_i = l_i - lambda r_i                                              excess_loss
    risk = max { sum_i p_i x_i : p in an ambiguity set }                drrho_risk

`moving_average_kl` estimates the KL-penalised risk of a whole data set from mini-batches, with one moving average u,
the temperature tau, and the weight gamma of the new batch:

    g = mean_i exp(x_i / tau) over the batch's b samples
    u <- (1 - gamma) u + gamma g                                        (first visit: u <- g)
    risk = tau log u,      weights_i = exp(x_i / tau) / u / b

u estimates the mean of exp(x_i / tau) over the data set. It is a single number for all samples, and its logarithm is
stored.

Sources: Model Steering / DRRho (arXiv 2505.06699), the moving average of SogCLR (arXiv 2202.12387). Docs:
docs/theory/ambiguity.md, docs/theory/estimator.md.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from drrho_core import _validate
from drrho_core._array_api import Array, Namespace, Scalar, device_of, is_array, power_of_two, wide_dtype
from drrho_core._validate import (
    FINITE,
    NOT_NEGATIVE,
    POSITIVE,
    STATE,
    UNIT_INTERVAL,
    Call,
    Rule,
    at_most_in_size,
)
from drrho_core.ambiguity import AmbiguitySet, WorstCase
from drrho_core.ambiguity.checks import check_ambiguity_set, check_losses, check_values
from drrho_core.ambiguity.worst_case import solve_unchecked
from drrho_core.numerics import log_moving_average, log_sum_exp

EXCESS = "loss - reference_weight * reference_loss"
"""The name of the excess loss in messages."""


def excess_loss(
    loss: Array, reference_loss: Array, /, *, reference_weight: float | Array = 1.0, xp: Namespace | None = None
) -> Array:
    """Return ``loss - reference_weight * reference_loss``, the RHO loss of each sample, which may be negative.

    The excess loss measures how much can still be learned from a sample. A mislabelled or hopeless sample, on which
    both models are poor, has a small excess loss.

    Parameters
    ----------
    loss : array, any shape
        The learner's losses, real floating.
    reference_loss : array, the same shape
        The frozen reference model's losses on the same samples, in the same dtype. The array is not broadcast, because
        one row of reference losses for many rows of losses is probably a mistake.
    reference_weight : float or array without axes
        At least 0. With 0 the reference model is ignored, 1 is DRRho, and values above 1 are allowed.
    xp : namespace, optional
        The arrays' namespace; needed under ``torch.compile`` only.

    Returns
    -------
    array
        The excess losses, in the shape and dtype of `loss`. Half types are subtracted in float32.

    Raises
    ------
    TypeError
        If an argument has a wrong type, or the arrays have different dtypes or libraries.
    ValueError
        If the shapes or devices differ, `reference_weight` is negative, a value is nan or infinite (checked on the host
        and outside tracing only), or an array requires gradients of autograd.

    Examples
    --------
    >>> import numpy as np
    >>> excess_loss(np.asarray([2.0, 0.5]), np.asarray([0.5, 1.5])).tolist()
    [1.5, -1.0]
    """
    arrays = {"loss": loss, "reference_loss": reference_loss}
    call = check_losses(arrays, None, xp, options={"reference_weight": reference_weight})
    xp = call.xp
    weight = call.option("reference_weight", reference_weight, NOT_NEGATIVE, wide_dtype(loss.dtype, xp))
    for name, array in arrays.items():
        call.values(name, array, FINITE)
    return xp.astype(difference(loss, reference_loss, weight, xp), loss.dtype, copy=False)


def drrho_risk(
    loss: Array,
    reference_loss: Array,
    ambiguity_set: AmbiguitySet,
    /,
    *,
    reference_weight: float | Array = 1.0,
    axis: int = -1,
    where: Array | None = None,
    xp: Namespace | None = None,
) -> WorstCase:
    """Return the DRRho risk: `worst_case` of the excess loss over an ambiguity set.

    Training with this risk pushes the learner to be no worse than the reference model, most of all on the samples on
    which the learner is worse. If a constant is added to all reference losses, no weight changes.

    Parameters
    ----------
    loss : array, shape (..., n, ...)
        The learner's losses, real floating, any unit.
    reference_loss : array, the same shape
        The frozen reference model's losses on the same samples, in the same dtype. The array is not broadcast.
    ambiguity_set : AmbiguitySet
        The weights that the adversary may choose, such as ``CVaR(0.1)``.
    reference_weight : float or array without axes
        At least 0; 0 is plain distributionally robust optimisation, 1 is DRRho.
    axis : int
        The axis of the n samples.
    where : array of bool, optional
        Marks the samples that count; it is broadcast to the losses' shape. The losses of all other samples are not
        read.
    xp : namespace, optional
        The arrays' namespace; needed under ``torch.compile`` only.

    Returns
    -------
    WorstCase
        `risk` without `axis`, `weights` in the losses' shape, `dual` = (nu, s), all in the losses' dtype. The weights
        are the derivative of the risk with respect to `loss`.

    Raises
    ------
    TypeError, ValueError
        As `excess_loss` and `worst_case` do.

    Examples
    --------
    >>> import numpy as np
    >>> from drrho_core import CVaR
    >>> drrho_risk(np.asarray([3.0, 2.0]), np.asarray([2.9, 0.5]), CVaR(0.5)).weights.tolist()
    [0.0, 1.0]
    """
    check_ambiguity_set(ambiguity_set)
    arrays = {"loss": loss, "reference_loss": reference_loss}
    call = check_losses(arrays, where, xp, options={"reference_weight": reference_weight})
    xp = call.xp
    weight = call.option("reference_weight", reference_weight, NOT_NEGATIVE, wide_dtype(loss.dtype, xp))
    axis = _validate.axis(axis, "loss", loss)
    # Both losses of samples that do not count are replaced by 0, so that the original values have no effect.
    if where is not None:
        arrays = {name: xp.where(where, array, xp.zeros_like(array)) for name, array in arrays.items()}
    for name, array in arrays.items():
        call.values(name, array, FINITE)
    excess = difference(arrays["loss"], arrays["reference_loss"], weight, xp)
    check_values(call, EXCESS, excess, axis, where)
    return solve_unchecked(excess, ambiguity_set, axis, where, loss.dtype, xp)


def difference(loss: Array, reference_loss: Array, weight: float | Array, xp: Namespace) -> Array:
    """Return the excess loss in float32 or wider. The result overflows only if the exact excess loss overflows."""
    dtype = wide_dtype(loss.dtype, xp)
    loss, reference_loss = (xp.astype(array, dtype, copy=False) for array in (loss, reference_loss))
    if not is_array(weight) and weight <= 1:
        return loss - weight * reference_loss
    # If the weight is above 1, the product of weight and reference loss is subtracted in two halves, because the
    # product may overflow although the difference does not. If half the product overflows, the difference overflows,
    # too. For weights up to 1 the second half is 0 and changes nothing.
    half = xp.where(weight > 1, 0.5 * weight, xp.zeros_like(weight)) if is_array(weight) else 0.5 * weight
    return loss - (weight - half) * reference_loss - half * reference_loss


def scaled_difference(
    loss: Array, reference_loss: Array, weight: float | Array, xp: Namespace
) -> tuple[Array, float | Array]:
    """Return the excess loss times a power of 2, and this power, at most 1/2. The scaled loss is always finite."""
    dtype = wide_dtype(loss.dtype, xp)
    loss, reference_loss = (xp.astype(array, dtype, copy=False) for array in (loss, reference_loss))
    scale: float | Array
    if is_array(weight):
        scale = 0.25 / power_of_two(xp.where(weight > 1, weight, xp.ones_like(weight)), xp)
    else:
        scale = math.ldexp(0.5, -math.frexp(max(weight, 1.0))[1])
    return scale * loss - (scale * weight) * reference_loss, scale


class MovingAverageKL(NamedTuple):
    """Result of `moving_average_kl`.

    Attributes
    ----------
    risk : array, shape ()
        Estimate of the data set's risk with the updated average. Monitor this value.
    weights : array, shape (b,)
        Weights of the batch's losses: the derivative of the estimate with respect to `loss`, with the average held
        constant. They sum to g / u, which is 1 if gamma is 1.
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
        The frozen reference model's losses on the same samples, in the same dtype. The array is not broadcast.
    log_inner : float or array of shape ()
        Logarithm of the average so far, a single number for the whole data set. ``-inf`` means that there is no average
        yet. Any other value is at most half the dtype's largest number in absolute value. An array must be float32 or
        wider and keeps its dtype. A Python number becomes an array of the losses' dtype, or of float32 for half types.
    temperature : float or array of shape ()
        tau > 0 in the unit of the losses: the price of the Kullback-Leibler divergence.
    gamma : float or array of shape ()
        Weight of this batch's mean in the new average, in (0, 1]. With 1 the old average is forgotten, and risk and
        weights are those of `drrho_risk` on the batch with ``KLPenalty(tau)``.
    reference_weight : float or array of shape ()
        lambda >= 0. With 0 the reference model is ignored, 1 is DRRho, and values above 1 are allowed.
    where : array of bool, optional
        Marks the samples that count; it is broadcast to (b,). In the formulas b is then the number of these samples.
        The losses of all other samples are not read, and their weights are 0.
    xp : namespace, optional
        The arrays' namespace; needed under ``torch.compile`` only.

    Returns
    -------
    MovingAverageKL
        `risk` and `weights` in the losses' dtype, `log_inner` in its own dtype. Under tracing all three are nan if a
        value breaks a rule, such as a loss that is not finite or a gamma above 1, or if `where` holds no True.

    Raises
    ------
    TypeError
        If an argument has a wrong type, or the arrays have different dtypes or libraries.
    ValueError
        If shapes, devices or values break the rules above, no sample counts, an excess loss divided by the temperature
        does not fit the dtype of `log_inner`, or an array requires gradients of autograd. Values are checked on the
        host and outside tracing only.

    Notes
    -----
    The formulas are at the top of this module (DRRho-CLIP, arXiv 2505.06699; SogCLR, arXiv 2202.12387). The largest
    excess loss is subtracted first, so nothing overflows. With ``gamma=1`` the weights keep their digits even if the
    losses are large.

    Examples
    --------
    The excess losses are 0 and log 3, and the mean g of their exponentials 1 and 3 is 2. So u changes from 4 to 3.

    >>> import numpy as np
    >>> step = moving_average_kl(np.log([2.0, 6.0]), np.log([2.0, 2.0]), np.log(4.0), temperature=1.0, gamma=0.5)
    >>> round(float(np.exp(step.risk)), 6), step.weights.round(4).tolist()
    (3.0, [0.1667, 0.5])
    """
    arrays = {"loss": loss, "reference_loss": reference_loss}
    options = {"log_inner": log_inner, "temperature": temperature, "gamma": gamma, "reference_weight": reference_weight}
    call = check_losses(arrays, where, xp, options=options)
    xp = call.xp
    log_u = _check_state(call, log_inner, loss)
    wide = xp.result_type(wide_dtype(loss.dtype, xp), log_u.dtype)
    tau = call.option("temperature", temperature, POSITIVE, wide)
    gamma = call.option("gamma", gamma, UNIT_INTERVAL, wide)
    weight = call.option("reference_weight", reference_weight, NOT_NEGATIVE, wide_dtype(loss.dtype, xp))
    call.array("loss", axes=1, meaning="(batch_size,)")
    _validate.axis(0, "loss", loss)
    counted = xp.ones_like(loss, dtype=xp.bool) if where is None else xp.broadcast_to(where, loss.shape)
    if where is not None:
        arrays = {name: xp.where(counted, array, xp.zeros_like(array)) for name, array in arrays.items()}
    for name, array in arrays.items():
        call.values(name, array, FINITE)

    # The excess losses x = l - lambda r. Both x / tau and the difference between two such quotients, which may be twice
    # as large, have to fit the dtype of `log_inner`.
    x = difference(arrays["loss"], arrays["reference_loss"], weight, xp)
    check_values(call, EXCESS, x, 0, where)
    x = xp.astype(x, wide, copy=False)
    if call.visible:
        limit = float(xp.finfo(log_u.dtype).max) / 8 * float(tau)
        call.values(EXCESS, x, at_most_in_size(limit, "fit log_inner when divided by temperature"))

    # Under tracing a bad batch is computed as a batch of zeros, so that no step below has to handle it, and all
    # results are overwritten by nan at the end.
    valid = xp.any(counted) & xp.all(xp.isfinite(x)) & _usable(log_u, xp)
    if is_array(tau):
        valid = valid & POSITIVE.holds(tau) & xp.isfinite(tau)
    if is_array(gamma):
        valid = valid & UNIT_INTERVAL.holds(gamma)
    x, counted = xp.where(valid, x, xp.zeros_like(x)), counted | ~valid
    number = xp.sum(xp.astype(counted, wide))

    # g = mean exp(x / tau) and u <- (1 - gamma) u + gamma g. The logarithms of g and u are taken relative to top / tau,
    # so that only the stored state loses its last digits if losses are large.
    top = xp.max(xp.where(counted, x, -xp.inf))
    y = xp.where(counted, (x - top) / tau, -xp.inf)
    shift = top / tau
    own = _log_mean_exp(y, counted, number, xp)
    old = xp.astype(log_u, wide) - shift
    ratio = _log_average(old, own, gamma, xp)

    # risk = tau log u and weights = exp(x / tau) / u / b. Halves and roots keep the intermediate results in range:
    # tau times the logarithm of the ratio, or b times a weight, may overflow although the result does not.
    risk = 2.0 * (0.5 * top + tau * (0.5 * ratio))
    root = xp.exp(0.5 * (y - ratio))
    risk, weights, new = (xp.where(valid, value, xp.nan) for value in (risk, root / number * root, shift + ratio))
    return MovingAverageKL(
        risk=xp.astype(risk, loss.dtype),
        weights=xp.astype(weights, loss.dtype),
        log_inner=xp.asarray(xp.astype(new, log_u.dtype)),
    )


def _check_state(call: Call, log_inner: Any, loss: Array) -> Array:
    """Check the logarithm of the average and return it as an array."""
    xp = call.xp
    if is_array(log_inner):
        call.array("log_inner", STATE, shape=(), meaning="()")
        # -inf, which means that there is no average yet, is replaced by 0 and so passes the check.
        seen = xp.where(log_inner == -xp.inf, xp.zeros_like(log_inner), log_inner)
        call.values("log_inner", seen, _state_rule(log_inner.dtype, xp))
        return log_inner
    dtype = wide_dtype(loss.dtype, xp)
    if log_inner != -math.inf:
        log_inner = _validate.number("log_inner", log_inner, _state_rule(dtype, xp))
    return xp.asarray(float(log_inner), dtype=dtype, device=device_of(loss))


def _state_rule(dtype: Any, xp: Namespace) -> Rule:
    """Return the rule for the logarithm of an average.

    The limit is four times the limit of a batch's excess losses divided by the temperature.
    """
    limit = _state_limit(dtype, xp)
    return at_most_in_size(limit, f"be finite and at most {limit:.3g} in size, or -inf before the first update")


def _state_limit(dtype: Any, xp: Namespace) -> float:
    """Return the largest absolute value of the logarithm of an average."""
    return float(xp.finfo(dtype).max) / 2


def _usable(log_inner: Array, xp: Namespace) -> Array:
    """Return whether the logarithm of an average keeps `_state_rule`, as an array, because the values may be traced."""
    return (xp.abs(log_inner) <= _state_limit(log_inner.dtype, xp)) | (log_inner == -xp.inf)


def _log_average(log_old: Array, log_new: Array, gamma: Scalar, xp: Namespace) -> Array:
    """Return `log_moving_average` with all digits, even if both logarithms are nearly equal and near 0."""
    change = log_old - log_new
    near = xp.abs(change) < 1
    change = xp.where(near, change, xp.zeros_like(change))
    return xp.where(
        near, log_new + xp.log1p((1 - gamma) * xp.expm1(change)), log_moving_average(log_old, log_new, gamma, xp=xp)
    )


def _log_mean_exp(y: Array, counted: Array, number: Array, xp: Namespace) -> Array:
    """Return ``log(mean(exp(y)))`` with all digits, even if all y are near 0. The largest y has to be 0."""
    change = xp.sum(xp.where(counted, xp.expm1(y), xp.zeros_like(y))) / number
    near = change > -0.5
    far = log_sum_exp(y, axis=0, where=counted, xp=xp) - xp.log(number)
    return xp.where(near, xp.log1p(xp.where(near, change, xp.zeros_like(change))), far)
