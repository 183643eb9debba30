"""Measurements of the theory's quantities: variances, effective sample size, generalization bound, mini-batch bias.

These functions describe a model or a run; they are not parts of a loss. Each is an ordinary formula of the Array API
and can be traced. Docs: docs/theory/measuring.md.

Sources: Model Steering / DRRho (arXiv 2505.06699), variance-based regularization (Duchi and Namkoong 2019), SogCLR
(arXiv 2202.12387).
"""

from __future__ import annotations

import math
from typing import NamedTuple

from drrho_core import _validate
from drrho_core._array_api import Array, Namespace, Scalar, power_of_two, values_visible, wide_dtype
from drrho_core._validate import FINITE, FINITE_NOT_NEGATIVE, NOT_NEGATIVE, POSITIVE, Call, Rule
from drrho_core.ambiguity.checks import check_losses
from drrho_core.risk import scaled_difference


class ExcessVariance(NamedTuple):
    """Result of `excess_variance`; ``over_pairs = within_anchors + between_anchors``.

    Attributes
    ----------
    over_pairs : array, shape ()
        Variance of the excess losses of all pairs.
    within_anchors : array, shape ()
        Variance over the pairs of one anchor, averaged over anchors. This part enters the risks of single anchors.
    between_anchors : array, shape ()
        Variance over anchors of their mean excess losses.
    """

    over_pairs: Array
    within_anchors: Array
    between_anchors: Array


def excess_variance(
    loss: Array,
    reference_loss: Array,
    /,
    *,
    reference_weight: Scalar = 1.0,
    where: Array | None = None,
    xp: Namespace | None = None,
) -> ExcessVariance:
    """Return the variance of the excess loss, over pairs and over anchors: a smaller variance gives a tighter bound.

    A pair is an entry of `loss`, and an anchor is a row of `loss`. With ``reference_weight=0`` the result is the
    variance of the plain loss, for comparison.

    Parameters
    ----------
    loss : array, shape (n,) or (m, n)
        The learner's losses, one row per anchor; a vector is a single anchor. For a contrastive model with similarities
        S, these are the pair losses ``S_ij - S_ii`` of image anchors, or those of text anchors with one row per text.
    reference_loss : array, the same shape
        The frozen reference model's losses on the same samples, in the same dtype.
    reference_weight : float or array of shape ()
        At least 0.
    where : array of bool, optional
        Marks the pairs that count, such as all but the diagonal; it is broadcast. Other pairs are never read.
    xp : namespace, optional
        The arrays' namespace; pass it under ``torch.compile``.

    Returns
    -------
    ExcessVariance
        The variances, in the square of the losses' unit, in float32 for half types. They are nan if no pair counts.

    Raises
    ------
    TypeError, ValueError
        If an argument breaks these rules, or `where` marks no pair. Values are checked on the host and outside tracing
        only.

    Notes
    -----
    These are population variances: the sums are divided by the number N of pairs that count, of which anchor i has N_i.
    ``within = (1/N) sum_ij (x_ij - mean_i)^2`` and ``between = (1/N) sum_i N_i (mean_i - mean)^2``. The bound of DRRho
    (arXiv 2505.06699) contains the variance of l - l_ref instead of the variance of l.

    Examples
    --------
    >>> import numpy as np
    >>> loss, reference = np.asarray([[0.0, 2.0], [4.0, 6.0]]), np.asarray([[0.0, 0.0], [4.0, 4.0]])
    >>> [float(value) for value in excess_variance(loss, reference)]
    [1.0, 1.0, 0.0]
    >>> [float(value) for value in excess_variance(loss, reference, reference_weight=0.0)]
    [5.0, 1.0, 4.0]
    """
    arrays = {"loss": loss, "reference_loss": reference_loss}
    call = check_losses(arrays, where, xp, options={"reference_weight": reference_weight})
    xp = call.xp
    weight = call.option("reference_weight", reference_weight, NOT_NEGATIVE, wide_dtype(loss.dtype, xp))
    if loss.ndim not in (1, 2) or 0 in loss.shape:
        raise ValueError(
            f"loss must have shape (num_pairs,) or (num_anchors, num_pairs) and hold a pair, got {tuple(loss.shape)}"
        )
    if where is not None:
        if (call.visible or values_visible(where, xp)) and not bool(xp.any(where)):
            raise ValueError("where must mark at least one pair, got none")
        arrays = {name: xp.where(where, array, xp.zeros_like(array)) for name, array in arrays.items()}
    for name, array in arrays.items():
        call.values(name, array, FINITE)
    x, scale = scaled_difference(arrays["loss"], arrays["reference_loss"], weight, xp)
    counted = xp.ones_like(x) if where is None else xp.astype(xp.broadcast_to(where, x.shape), x.dtype)
    x, counted = (xp.reshape(array, (-1, x.shape[-1])) for array in (x, counted))

    # Sums of very large losses would overflow. Therefore all losses are divided by a power of 2, and the results are
    # multiplied by the square of this power at the end.
    size = power_of_two(xp.max(xp.abs(x)), xp)
    x = counted * (x / size)
    # `unit` is the unit of the deviations. If this unit is too large for the dtype, the dtype's largest number is used
    # and not infinity, because infinity times a deviation of 0 would be nan.
    unit = xp.clip(size / scale, max=float(xp.finfo(x.dtype).max))
    # N_i, N and the mean excess loss of each anchor.
    numbers = xp.sum(counted, axis=1)
    number = xp.sum(numbers)
    divisors = xp.where(numbers > 0, numbers, xp.ones_like(numbers))
    means = xp.sum(x, axis=1) / divisors
    centred = counted * (x - means[:, None])
    # Deviations are centred twice, because the subtraction of a rounded mean leaves a remainder.
    rest = xp.sum(centred, axis=1) / divisors
    within = _mean_square(centred - counted * rest[:, None], counted, number, unit, xp)
    # The variance of the anchors' means. The means are centred twice for the same reason.
    means = means + rest
    means = xp.where(numbers > 0, means - xp.sum(numbers * means) / number, xp.zeros_like(means))
    means = means - xp.sum(numbers * means) / number
    between = _mean_square(means, numbers, number, unit, xp)
    return ExcessVariance(over_pairs=within + between, within_anchors=within, between_anchors=between)


def _mean_square(x: Array, counts: Array, number: Array, unit: Array, xp: Namespace) -> Array:
    """Return ``sum(counts x^2) / number * unit^2``. A square overflows or vanishes only if the result does."""
    size = power_of_two(xp.max(xp.where(counts > 0, xp.abs(x), xp.zeros_like(x))), xp)
    x = x / size
    return xp.sum(counts * x * x) / number * size * unit * (size * unit)


def effective_sample_size(weights: Array, /, *, axis: int = -1, xp: Namespace | None = None) -> Array:
    """Return ``1 / sum_i p_i^2``: n for equal weights, 1 if a single sample has all the weight.

    Parameters
    ----------
    weights : array, shape (..., n, ...)
        Weights p >= 0 that sum to 1 along `axis`, such as ``worst_case(...).weights``.
    axis : int
        The axis of the n samples.
    xp : namespace, optional
        The arrays' namespace; pass it under ``torch.compile``.

    Returns
    -------
    array
        The shape of `weights` without `axis`, in [1, n]; float32 for half types.

    Raises
    ------
    TypeError, ValueError
        If an argument breaks these rules; values are checked on the host and outside tracing only.

    Notes
    -----
    This is Kish's effective sample size. With the chi-square divergence D it equals ``n / (1 + 2 D(p))``. Therefore the
    radius of a chi-square ball bounds the effective sample size from below.

    Examples
    --------
    >>> import numpy as np
    >>> effective_sample_size(np.asarray([[0.25, 0.25, 0.25, 0.25], [0.5, 0.5, 0.0, 0.0]])).tolist()
    [4.0, 2.0]
    """
    call = _validate.arrays({"weights": weights}, xp)
    xp = call.xp
    call.array("weights")
    axis = _validate.axis(axis, "weights", weights)
    call.values("weights", weights, NOT_NEGATIVE)
    wide = xp.astype(weights, wide_dtype(weights.dtype, xp))
    near = math.sqrt(xp.finfo(weights.dtype).eps)
    total = xp.sum(wide, axis=axis)
    call.values("weights, summed along axis,", total, Rule("be 1", 1.0 - near, 1.0 + near, True, True))
    return 1.0 / xp.sum(wide * wide, axis=axis)


def generalization_bound(
    risk: Array,
    variance: Array,
    /,
    *,
    radius: Scalar,
    num_samples: int,
    c1: Scalar = 1.0,
    c2: Scalar = 0.0,
    xp: Namespace | None = None,
) -> Array:
    """Return the right-hand side of the bound on the risk of the DRRho minimiser, over a set of candidate models.

    Parameters
    ----------
    risk : array, any shape
        Risks R(theta) of the candidates, whose parameters are theta.
    variance : array, the same shape
        Variances of their excess losses, >= 0, in the square of the unit of `risk`: see `excess_variance`.
    radius : float or array of shape ()
        Size of the ambiguity set, >= 0: the quotient rho / n in the theorem below.
    num_samples : int
        Number n >= 1 of training samples.
    c1, c2 : float or array of shape ()
        Constants of the theorem, >= 0. They depend on the confidence and on the range of the loss. The values 1 and 0
        give the form of the bound. This form is enough to compare two reference models, or training with and without a
        reference model.
    xp : namespace, optional
        The arrays' namespace; pass it under ``torch.compile``.

    Returns
    -------
    array, shape ()
        ``min over candidates of (risk + c1 sqrt(2 radius variance)) + c2 / n``.

    Raises
    ------
    TypeError, ValueError
        If an argument breaks these rules; values are checked on the host and outside tracing only.

    Notes
    -----
    The minimiser theta_hat of the DRRho risk satisfies, with probability 1 - delta,
    ``R(theta_hat) <= inf_theta (R(theta) + c1 sqrt(2 rho Var(l - l_ref) / n)) + c2 / n``: DRRho (arXiv 2505.06699),
    after Duchi and Namkoong 2019. A model close to the reference model has a small variance, and the reference model
    itself has variance 0.

    Examples
    --------
    >>> import numpy as np
    >>> risk, variance = np.asarray([0.30, 0.25]), np.asarray([0.0, 0.02])  # the reference model and a better model
    >>> [round(float(generalization_bound(risk, variance, radius=r, num_samples=100)), 4) for r in (0.01, 1.0)]
    [0.27, 0.3]
    """
    scalars = {"radius": radius, "c1": c1, "c2": c2}
    call = _validate.arrays({"risk": risk, "variance": variance}, xp, options=scalars)
    xp = call.xp
    for name in ("risk", "variance"):
        call.array(name)
    call.same_dtype("risk", "variance")
    _validate.shape("variance", variance, tuple(risk.shape), "the shape of risk")
    if 0 in risk.shape:
        raise ValueError(f"risk must hold at least one candidate, got shape {tuple(risk.shape)}")
    num_samples = _validate.integer("num_samples", num_samples, minimum=1)
    call.values("risk", risk, FINITE)
    call.values("variance", variance, FINITE_NOT_NEGATIVE)
    dtype = wide_dtype(risk.dtype, xp)
    radius, c1, c2 = (_scalar(call, name, value, NOT_NEGATIVE, dtype) for name, value in scalars.items())
    # Half of c1 sqrt(2 radius variance) is added twice, because the whole term may overflow although the sum does not.
    half = _product(xp.sqrt(xp.astype(variance, dtype)), math.sqrt(0.5) * xp.sqrt(radius), c1, xp)
    return xp.min(xp.astype(risk, dtype) + half + half) + c2 / float(num_samples)


def _scalar(call: Call, name: str, value: Scalar, rule: Rule, dtype: object) -> Array:
    """Check a parameter and return it as an array of shape () on the device of the call."""
    checked = call.option(name, value, rule, dtype)
    return call.xp.asarray(checked, dtype=dtype, device=call.device) if isinstance(checked, float) else checked


def _product(a: Array, b: Array, c: Array, xp: Namespace) -> Array:
    """Return ``a b c`` for numbers >= 0, and overflow only if the result does.

    The largest number is multiplied by the smallest first.
    """
    low, high = xp.minimum(a, b), xp.maximum(a, b)
    middle = xp.maximum(low, xp.minimum(high, c))
    return xp.minimum(low, c) * xp.maximum(high, c) * middle


class LogMeanExpBias(NamedTuple):
    """Result of `log_mean_exp_bias`, in the losses' unit.

    Attributes
    ----------
    measured : array
        Mean of the values of mini-batches, minus the value on all samples, in the losses' shape without `axis`.
    predicted : array, the same shape
        The same difference as a formula predicts it, to first order in 1 / batch_size.
    """

    measured: Array
    predicted: Array


def log_mean_exp_bias(
    losses: Array, /, *, batch_size: int, temperature: Scalar = 1.0, axis: int = -1, xp: Namespace | None = None
) -> LogMeanExpBias:
    """Return the bias of mini-batches as estimates of ``temperature * log mean exp(losses / temperature)``.

    The logarithm of a batch's mean is too small on average, and the bias grows as the batch shrinks. Therefore an
    estimator that averages over earlier batches, too, is better than the loss of a mini-batch.

    Parameters
    ----------
    losses : array, shape (..., n, ...)
        Losses in random order, n >= 2. They are cut into ``n // batch_size`` batches; the remaining losses are
        not used.
    batch_size : int
        b, 1 <= b <= n.
    temperature : float or array of shape ()
        Temperature tau > 0.
    axis : int
        The axis of the n samples.
    xp : namespace, optional
        The arrays' namespace; pass it under ``torch.compile``.

    Returns
    -------
    LogMeanExpBias
        The measured and the predicted bias, at most 0 up to rounding, in float32 for half types.

    Raises
    ------
    TypeError, ValueError
        If an argument breaks these rules; values are checked on the host and outside tracing only.

    Notes
    -----
    The value on all samples uses only samples that belong to a batch, so that the bias is 0 for ``b = n``. With E the
    effective sample size of the weights ``softmax(losses / tau)``, batches drawn without replacement have, to first
    order, the bias ``-(tau / 2) (n / E - 1) (n / b - 1) / (n - 1)``. SogCLR (arXiv 2202.12387) explains why a
    mini-batch loss needs large batches.

    Examples
    --------
    >>> import numpy as np
    >>> losses = np.random.default_rng(0).normal(size=2**14)
    >>> for batch_size in (8, 64, 512):
    ...     bias = log_mean_exp_bias(losses, batch_size=batch_size)
    ...     print(f"{batch_size:3d}  {float(bias.measured):.4f}  {float(bias.predicted):.4f}")
      8  -0.0851  -0.0973
     64  -0.0147  -0.0121
    512  -0.0015  -0.0015
    """
    call = _validate.arrays({"losses": losses}, xp, options={"temperature": temperature})
    xp = call.xp
    call.array("losses")
    axis = _validate.axis(axis, "losses", losses)
    n = int(losses.shape[axis])
    if n < 2:
        raise ValueError(f"losses must have at least 2 entries along axis {axis}, got shape {tuple(losses.shape)}")
    batch_size = _validate.integer("batch_size", batch_size, minimum=1)
    if batch_size > n:
        raise ValueError(f"batch_size must be at most the number of samples {n}, got {batch_size}")
    call.values("losses", losses, FINITE)
    dtype = wide_dtype(losses.dtype, xp)
    tau = _scalar(call, "temperature", temperature, POSITIVE, dtype)

    # Only the samples of whole batches count, also for the value on all samples.
    batches = n // batch_size
    n = batches * batch_size
    # Losses are halved, because a difference of two losses may overflow. The largest loss is subtracted from all
    # losses, which does not change the bias.
    x = 0.5 * xp.moveaxis(xp.astype(losses, dtype), axis, -1)[..., :n]
    x = x - xp.max(x, axis=-1, keepdims=True)
    # Measured: the mean of the values of all batches, minus the value on all samples.
    whole, log_whole = _half_log_mean_exp(x, tau, xp)
    parts, _ = _half_log_mean_exp(xp.reshape(x, (*x.shape[:-1], batches, batch_size)), tau, xp)
    measured = xp.sum((parts - whole[..., None]) / batches, axis=-1)
    # Predicted: n / E - 1 is the mean of (n p_i - 1)^2 over the samples i. With expm1, n p_i - 1 keeps its digits if
    # the weights p_i are nearly equal.
    excess = xp.expm1(_twice_over(x, tau) - log_whole[..., None])
    predicted = xp.sum((tau * (excess / n)) * excess, axis=-1) * (-0.5 * (batches - 1) / (n - 1))
    return LogMeanExpBias(measured=2.0 * measured, predicted=predicted)


def _half_log_mean_exp(x: Array, tau: Array, xp: Namespace) -> tuple[Array, Array]:
    """Return ``(tau / 2) log mean exp(2 x / tau)`` along the last axis, and ``log mean exp(2 x / tau)``.

    The largest entry is subtracted first, and added again without a division by tau, so the result does not overflow. A
    logarithm near 0, which a large tau causes, keeps all its digits.
    """
    top = xp.max(x, axis=-1, keepdims=True)
    y = _twice_over(x - top, tau)
    change = xp.mean(xp.expm1(y), axis=-1)
    # log1p near 0, log elsewhere. At least one exponential is 1, so the mean of n exponentials is at least 1 / n.
    logarithm = xp.where(
        change > -0.5, xp.log1p(xp.maximum(change, xp.full_like(change, -0.5))), xp.log(xp.mean(xp.exp(y), axis=-1))
    )
    # If all quotients are below the rounding error of 1, the result is the mean, as for an infinite temperature.
    flat = xp.min(y, axis=-1) > -0.25 * float(xp.finfo(x.dtype).eps)
    inner = xp.where(flat, xp.mean(x - top, axis=-1), tau * (0.5 * logarithm))
    top = xp.squeeze(top, axis=-1)
    return top + inner, _twice_over(top, tau) + logarithm


def _twice_over(x: Array, tau: Array) -> Array:
    """Return ``2 x / tau`` for halved losses x <= 0. An overflow to ``-inf`` is harmless: its exponential is 0."""
    return 2.0 * (x / tau)
