"""The theory, made measurable: variances, effective sample size, bound, mini-batch bias and the scaling law.

Tools to look at a model or a run with, not parts of a loss: `fit_scaling_law` reads values on the host and is not
traced; the others are ordinary formulas of the Array API.

Sources: Model Steering / DRRho (arXiv 2505.06699), variance-based regularization (Duchi and Namkoong 2019).
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any, NamedTuple

from drrho_core import _validate
from drrho_core._array_api import (
    Array,
    Namespace,
    Scalar,
    device_of,
    is_array,
    namespace_of,
    power_of_two,
    values_visible,
    wide_dtype,
)
from drrho_core._validate import POSITIVE
from drrho_core.ambiguity.checks import check_losses
from drrho_core.numerics import log
from drrho_core.risk import check_weight, scaled_difference


class ExcessVariance(NamedTuple):
    """Result of `excess_variance`; ``over_pairs = within_anchors + between_anchors``.

    Attributes
    ----------
    over_pairs : array, shape ()
        Variance of the excess losses of all pairs.
    within_anchors : array, shape ()
        Variance over the pairs of one anchor, averaged over anchors: what the anchors' own risks pay for.
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
    """Return the variance of the excess loss, over pairs and over anchors: the smaller, the tighter the bound.

    With ``reference_weight=0`` it is the variance of the plain loss, to compare with.

    Parameters
    ----------
    loss : array, shape (n,) or (m, n)
        The learner's losses. One row per anchor; a vector is one anchor. For a contrastive model the pair losses
        ``S_ij - S_ii`` of image anchors, or those of text anchors with the texts along the rows.
    reference_loss : array, the same shape
        The frozen reference model's losses on the same samples, in the same dtype.
    reference_weight : float or array of shape ()
        At least 0.
    where : array of bool, optional
        Marks the pairs that count, such as all but the diagonal; broadcast. The others are never read.
    xp : namespace, optional
        The arrays' namespace; pass it under ``torch.compile``.

    Returns
    -------
    ExcessVariance
        In the square of the losses' unit; float32 for half types. Nan without any pair that counts.

    Raises
    ------
    TypeError, ValueError
        If an argument breaks these rules, or `where` marks nothing; values are looked at on the host outside tracing.

    Notes
    -----
    Population variances, divided by the number N of pairs that count. An anchor weighs as many as it has of them:
    ``within = (1/N) sum_ij (x_ij - mean_i)^2``, ``between = (1/N) sum_i N_i (mean_i - mean)^2``. The variance of
    l - l_ref takes the place of that of l in the bound of DRRho (arXiv 2505.06699).

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
    xp = check_losses(arrays, where, xp)
    weight = check_weight(reference_weight, loss, xp)
    if loss.ndim not in (1, 2) or 0 in loss.shape:
        raise ValueError(
            f"loss must have shape (num_pairs,) or (num_anchors, num_pairs) and hold a pair, got {tuple(loss.shape)}"
        )
    if where is not None:
        if values_visible(where, xp) and not bool(xp.any(where)):
            raise ValueError("where must mark at least one pair, got none")
        arrays = {name: xp.where(where, array, xp.zeros_like(array)) for name, array in arrays.items()}
    for name, array in arrays.items():
        _validate.finite(name, array, xp)
    x, scale = scaled_difference(arrays["loss"], arrays["reference_loss"], weight, xp)
    counted = xp.ones_like(x) if where is None else xp.astype(xp.broadcast_to(where, x.shape), x.dtype)
    x, counted = (xp.reshape(array, (-1, x.shape[-1])) for array in (x, counted))

    # Sums of the largest losses would overflow, so all are divided by a power of 2 until the end.
    size = power_of_two(xp.max(xp.abs(x)), xp)
    x = counted * (x / size)
    # The deviations' unit; where it is too large, every square but that of 0 is, too.
    unit = xp.clip(size / scale, max=float(xp.finfo(x.dtype).max))
    numbers = xp.sum(counted, axis=1)
    number = xp.sum(numbers)
    own = xp.where(numbers > 0, numbers, xp.ones_like(numbers))
    means = xp.sum(x, axis=1) / own
    centred = counted * (x - means[:, None])
    rest = xp.sum(centred, axis=1) / own  # twice, because one subtraction of a rounded mean leaves a rest
    within = _mean_square(centred - counted * rest[:, None], counted, number, unit, xp)
    means = means + rest
    means = xp.where(numbers > 0, means - xp.sum(numbers * means) / number, xp.zeros_like(means))
    means = means - xp.sum(numbers * means) / number
    between = _mean_square(means, numbers, number, unit, xp)
    return ExcessVariance(over_pairs=within + between, within_anchors=within, between_anchors=between)


def _mean_square(x: Array, counts: Array, number: Array, unit: Array, xp: Namespace) -> Array:
    """Return ``sum(counts x^2) / number * unit^2``; no square is too large or too small where the result is not."""
    size = power_of_two(xp.max(xp.where(counts > 0, xp.abs(x), xp.zeros_like(x))), xp)
    x = x / size
    return xp.sum(counts * x * x) / number * size * unit * (size * unit)


def effective_sample_size(weights: Array, /, *, axis: int = -1, xp: Namespace | None = None) -> Array:
    """Return ``1 / sum_i p_i^2``: how many samples carry the weights, n where they are equal, 1 where one has all.

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
        If an argument breaks these rules; values are looked at on the host outside tracing.

    Notes
    -----
    Kish's effective sample size. Of chi-square weights it is ``n / (1 + 2 D(p))``: the radius bounds it from below.

    Examples
    --------
    >>> import numpy as np
    >>> effective_sample_size(np.asarray([[0.25, 0.25, 0.25, 0.25], [0.5, 0.5, 0.0, 0.0]])).tolist()
    [4.0, 2.0]
    """
    xp = namespace_of({"weights": weights}, xp)
    _validate.detached({"weights": weights}, xp)
    _validate.floating("weights", weights, xp)
    axis = _validate.axis(axis, "weights", weights)
    _validate.values("weights", weights, lambda p: p >= 0, "be >= 0", xp)
    wide = xp.astype(weights, wide_dtype(weights.dtype, xp))
    near = math.sqrt(xp.finfo(weights.dtype).eps)
    total = xp.sum(wide, axis=axis)
    _validate.values("weights, summed along axis,", total, lambda s: xp.abs(s - 1.0) <= near, "be 1", xp)
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
        Risks R(theta) of the candidates.
    variance : array, the same shape
        Variances of their excess losses, >= 0, in the square of the unit of `risk`: see `excess_variance`.
    radius : float or array of shape ()
        Size of the ambiguity set, >= 0: rho / n of the theorem.
    num_samples : int
        n >= 1.
    c1, c2 : float or array of shape ()
        Constants of the theorem, >= 0. They depend on the confidence and on the range of the loss; 1 and 0 give the
        form of the bound, enough to compare a reference model with another or with none.
    xp : namespace, optional
        The arrays' namespace; pass it under ``torch.compile``.

    Returns
    -------
    array, shape ()
        ``min over candidates of (risk + c1 sqrt(2 radius variance)) + c2 / n``.

    Raises
    ------
    TypeError, ValueError
        If an argument breaks these rules; values are looked at on the host outside tracing.

    Notes
    -----
    With probability 1 - delta, ``R(theta_hat) <= inf_theta (R(theta) + c1 sqrt(2 rho Var(l - l_ref) / n)) + c2 / n``:
    DRRho (arXiv 2505.06699), after Duchi and Namkoong 2019. A model close to the reference model has a small variance,
    so the reference model itself is a candidate that costs nothing.

    Examples
    --------
    >>> import numpy as np
    >>> risk, variance = np.asarray([0.30, 0.25]), np.asarray([0.0, 0.02])     # the reference model, a better one
    >>> [round(float(generalization_bound(risk, variance, radius=r, num_samples=100)), 4) for r in (0.01, 1.0)]
    [0.27, 0.3]
    """
    scalars = {"radius": radius, "c1": c1, "c2": c2}
    arrays = {"risk": risk, "variance": variance}
    every = arrays | {name: value for name, value in scalars.items() if is_array(value)}
    xp = namespace_of(every, xp)
    _validate.detached(every, xp)
    _validate.same_device(every, xp)
    for name, array in arrays.items():
        _validate.floating(name, array, xp)
    _validate.same_dtype(arrays)
    _validate.shape("variance", variance, tuple(risk.shape), "the shape of risk")
    if 0 in risk.shape:
        raise ValueError(f"risk must hold at least one candidate, got shape {tuple(risk.shape)}")
    num_samples = _validate.integer("num_samples", num_samples, minimum=1)
    _validate.finite("risk", risk, xp)
    _validate.values("variance", variance, lambda x: xp.isfinite(x) & (x >= 0), "be finite and >= 0", xp)
    dtype = wide_dtype(risk.dtype, xp)
    radius, c1, c2 = (
        _scalar(name, value, _validate.not_negative, "be >= 0", risk, xp) for name, value in scalars.items()
    )
    # Half of c1 sqrt(2 radius variance) is added twice: twice the half may be too large where the sum is not.
    half = _product(xp.sqrt(xp.astype(variance, dtype)), math.sqrt(0.5) * xp.sqrt(radius), c1, xp)
    return xp.min(xp.astype(risk, dtype) + half + half) + c2 / float(num_samples)


def _scalar(name: str, value: Scalar, holds: Callable[[Any], Any], rule: str, like: Array, xp: Namespace) -> Array:
    """Check a parameter and return it as an array () of the dtype that `like` is computed in."""
    dtype = wide_dtype(like.dtype, xp)
    checked = _validate.within(_validate.parameter(name, value, holds, rule, xp, dtype=dtype), holds, xp)
    if is_array(checked):
        return xp.astype(checked, dtype)
    return xp.asarray(checked, dtype=dtype, device=device_of(like))


def _product(a: Array, b: Array, c: Array, xp: Namespace) -> Array:
    """Return ``a b c`` of numbers >= 0: the largest times the smallest comes first, so only the result can overflow."""
    low, high = xp.minimum(a, b), xp.maximum(a, b)
    middle = xp.maximum(low, xp.minimum(high, c))
    return xp.minimum(low, c) * xp.maximum(high, c) * middle


class LogMeanExpBias(NamedTuple):
    """Result of `log_mean_exp_bias`, in the losses' unit.

    Attributes
    ----------
    measured : array
        Mean over mini-batches minus the value on all samples; the losses' shape without `axis`.
    predicted : array, the same shape
        The same to first order in 1 / batch_size.
    """

    measured: Array
    predicted: Array


def log_mean_exp_bias(
    losses: Array, /, *, batch_size: int, temperature: Scalar = 1.0, axis: int = -1, xp: Namespace | None = None
) -> LogMeanExpBias:
    """Return how far mini-batches of one size miss ``temperature * log mean exp(losses / temperature)`` on average.

    The logarithm of a batch's mean is too small on average, more so the smaller the batch: that is why an estimator
    with a memory beats the mini-batch loss.

    Parameters
    ----------
    losses : array, shape (..., n, ...)
        Losses in random order, n >= 2. They are cut into ``n // batch_size`` batches; the rest is left out.
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
        At most 0, up to rounding; float32 for half types.

    Raises
    ------
    TypeError, ValueError
        If an argument breaks these rules; values are looked at on the host outside tracing.

    Notes
    -----
    Measured against the samples that the batches hold, so that ``b = n`` gives 0. With E the effective sample size of
    the weights softmax(losses / tau), batches drawn without replacement have to first order the bias
    ``-(tau / 2) (n / E - 1) (n / b - 1) / (n - 1)``. Why a mini-batch loss needs large batches: SogCLR
    (arXiv 2202.12387).

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
    arrays = {"losses": losses} | ({"temperature": temperature} if is_array(temperature) else {})
    xp = namespace_of(arrays, xp)
    _validate.detached(arrays, xp)
    _validate.same_device(arrays, xp)
    _validate.floating("losses", losses, xp)
    axis = _validate.axis(axis, "losses", losses)
    n = int(losses.shape[axis])
    if n < 2:
        raise ValueError(f"losses must have at least 2 entries along axis {axis}, got shape {tuple(losses.shape)}")
    batch_size = _validate.integer("batch_size", batch_size, minimum=1)
    if batch_size > n:
        raise ValueError(f"batch_size must be at most the number of samples {n}, got {batch_size}")
    _validate.finite("losses", losses, xp)
    dtype = wide_dtype(losses.dtype, xp)
    tau = _scalar("temperature", temperature, POSITIVE.holds, "be > 0", losses, xp)

    batches = n // batch_size
    n = batches * batch_size
    # Halves, because a difference of two losses may be too large. The bias does not depend on a shift.
    x = 0.5 * xp.moveaxis(xp.astype(losses, dtype), axis, -1)[..., :n]
    x = x - xp.max(x, axis=-1, keepdims=True)
    whole, log_whole = _half_log_mean_exp(x, tau, xp)
    parts, _ = _half_log_mean_exp(xp.reshape(x, (*x.shape[:-1], batches, batch_size)), tau, xp)
    measured = xp.sum((parts - whole[..., None]) / batches, axis=-1)
    # n / E - 1 is the mean of (n p - 1)^2 over the weights p; n p - 1 has all its digits where they are nearly equal.
    excess = xp.expm1(_whole(x, tau) - log_whole[..., None])
    predicted = xp.sum((tau * (excess / n)) * excess, axis=-1) * (-0.5 * (batches - 1) / (n - 1))
    return LogMeanExpBias(measured=2.0 * measured, predicted=predicted)


def _half_log_mean_exp(x: Array, tau: Array, xp: Namespace) -> tuple[Array, Array]:
    """Return ``(tau / 2) log mean exp(2 x / tau)`` along the last axis, and the logarithm.

    No quotient by tau is too large, because the largest entry is taken out first and stays in the unit of the losses;
    and a logarithm near 0 has all its digits, as a large tau makes it.
    """
    top = xp.max(x, axis=-1, keepdims=True)
    y = _whole(x - top, tau)
    change = xp.mean(xp.expm1(y), axis=-1)
    # At least one exponential is 1: the mean of n is at least 1 / n.
    logarithm = xp.where(
        change > -0.5, xp.log1p(xp.maximum(change, xp.full_like(change, -0.5))), xp.log(xp.mean(xp.exp(y), axis=-1))
    )
    # Where all quotients are less than the rounding of 1, the temperature is as good as infinite: a plain mean.
    flat = xp.min(y, axis=-1) > -0.25 * float(xp.finfo(x.dtype).eps)
    inner = xp.where(flat, xp.mean(x - top, axis=-1), tau * (0.5 * logarithm))
    top = xp.squeeze(top, axis=-1)
    return top + inner, _whole(top, tau) + logarithm


def _whole(x: Array, tau: Array) -> Array:
    """Return ``2 x / tau`` of x <= 0: ``-inf`` where it is too large, which an exponential turns into 0."""
    return 2.0 * (x / tau)


class ScalingLaw(NamedTuple):
    """Result of `fit_scaling_law`: ``error = floor + prefactor * compute ** -exponent``. Arrays of shape ().

    Attributes
    ----------
    prefactor, exponent, floor : array
        The fit. The floor is 0 where none was asked for.
    prefactor_interval, exponent_interval, floor_interval : tuple of two arrays
        Ends of the bootstrap intervals.
    residual : array
        Root of the mean square of the residuals, in natural logarithms of the error: 0.01 is about one percent.
    fitted : array of bool, shape (n,)
        Which of the points that were given the fit rests on.
    """

    prefactor: Array
    exponent: Array
    floor: Array
    prefactor_interval: tuple[Array, Array]
    exponent_interval: tuple[Array, Array]
    floor_interval: tuple[Array, Array]
    residual: Array
    fitted: Array


def fit_scaling_law(
    compute: Array,
    error: Array,
    /,
    *,
    with_floor: bool = False,
    where: Array | None = None,
    confidence: float = 0.95,
    num_resamples: int = 1000,
    seed: int = 0,
    xp: Namespace | None = None,
) -> ScalingLaw:
    """Fit ``error = a C^-beta``, or ``e0 + a C^-beta``, and say how sure it is.

    Parameters
    ----------
    compute : array, shape (n,)
        C > 0, such as GFLOP x samples; at least two different values among the fitted points.
    error : array, shape (n,)
        Errors > 0 as fractions, in the same dtype; float64 is wise.
    with_floor : bool
        Whether to fit a floor e0, ``0 <= e0 < the smallest error``. It needs one more point, and many to be sure.
    where : array of bool, shape (n,), optional
        Marks the points to fit: at least 3, with a floor 4. The others are not read.
    confidence : float
        Of the intervals, in (0, 1).
    num_resamples : int
        Size of the bootstrap, at least 2.
    seed : int
        Of the bootstrap: the same seed, the same intervals on every library.
    xp : namespace, optional
        The arrays' namespace.

    Returns
    -------
    ScalingLaw
        Estimates, intervals and which points were fitted.

    Raises
    ------
    TypeError, ValueError
        If an argument breaks these rules. Values are read, so it cannot be traced.

    Notes
    -----
    Least squares on the logarithm of the error. Without a floor this is a straight line. With one, every floor of a
    grid is tried, amplitude and exponent by a damped Gauss-Newton iteration, and the grid is refined around the best.
    Intervals are percentiles of a residual bootstrap: residuals, scaled by ``sqrt(n / (n - parameters))``, are drawn
    with replacement, added to the fit and fitted again. Published fits: OpenCLIP 5.77 C^-0.116, DRRho-CLIP
    7.15 C^-0.127 (arXiv 2505.06699, code).

    Examples
    --------
    >>> import numpy as np
    >>> compute = np.asarray([1e8, 1e9, 1e10, 1e11])
    >>> law = fit_scaling_law(compute, 5.77 * compute**-0.116)
    >>> round(float(law.prefactor), 6), round(float(law.exponent), 6), law.fitted.tolist()
    (5.77, 0.116, [True, True, True, True])
    """
    arrays = {"compute": compute, "error": error} | ({} if where is None else {"where": where})
    xp = namespace_of(arrays, xp)
    _validate.detached(arrays, xp)
    _validate.same_device(arrays, xp)
    for name in ("compute", "error"):
        _validate.floating(name, arrays[name], xp)
        _validate.ndim(name, arrays[name], 1, "(num_points,)")
    _validate.same_dtype({"compute": compute, "error": error})
    n = int(compute.shape[0])
    _validate.shape("error", error, (n,), "(num_points,)")
    if where is not None:
        _validate.mask("where", where, "compute", compute, xp)
        where = xp.broadcast_to(where, (n,))
    if not isinstance(with_floor, bool):
        raise TypeError(f"with_floor must be True or False, got {_validate.describe(with_floor)}")
    confidence = _validate.static_number("confidence", confidence, lambda x: 0 < x < 1, "be in (0, 1)")
    num_resamples = _validate.integer("num_resamples", num_resamples, minimum=2)
    seed = _validate.integer("seed", seed, minimum=0)
    device, dtype = device_of(compute), wide_dtype(compute.dtype, xp)
    fitted = xp.ones((n,), dtype=xp.bool, device=device) if where is None else where
    positions = [position for position in range(n) if bool(fitted[position])]
    needed = 4 if with_floor else 3
    if len(positions) < needed:
        raise ValueError(f"compute must have at least {needed} points to fit, got {len(positions)}")
    index = xp.asarray(positions, dtype=xp.int64, device=device)
    compute, error = (xp.astype(xp.take(array, index), dtype) for array in (compute, error))
    for name, array in (("compute", compute), ("error", error)):
        bad = ~((array > 0) & xp.isfinite(array))
        if bool(xp.any(bad)):
            at = int(xp.argmax(xp.astype(bad, xp.int8)))
            raise ValueError(f"{name} must be finite and > 0, got {float(array[at])} at position {positions[at]}")
    x, y = xp.log(compute), xp.log(error)
    if not bool(xp.max(x) > xp.min(x)):
        raise ValueError("compute must have at least two different values at the fitted points, got one")
    centre = xp.mean(x)
    x = x - centre

    fit = _fit_with_floor if with_floor else _fit_line
    level, slope, floor = fit(x, y[None, :], xp)
    value = _predict(x, level, slope, floor, xp)[0, :]
    residuals = y - value
    spread = residuals * math.sqrt(len(positions) / (len(positions) - needed + 1))
    draws = random.Random(seed).choices(range(len(positions)), k=num_resamples * len(positions))
    drawn = xp.take(spread, xp.asarray(draws, dtype=xp.int64, device=device))
    again = fit(x, value[None, :] + xp.reshape(drawn, (num_resamples, len(positions))), xp)

    def constants(level: Array, slope: Array, floor: Array) -> tuple[Array, Array, Array]:
        return xp.exp(level + slope * centre)[:, 0], slope[:, 0], floor[:, 0]

    (prefactor, exponent, e0), samples = constants(level, slope, floor), constants(*again)
    intervals = [_interval(sample, confidence, xp) for sample in samples]
    return ScalingLaw(
        prefactor=prefactor[0],
        exponent=exponent[0],
        floor=e0[0],
        prefactor_interval=intervals[0],
        exponent_interval=intervals[1],
        floor_interval=intervals[2],
        residual=xp.sqrt(xp.mean(residuals * residuals)),
        fitted=fitted,
    )


# Fits of many data sets at once: x (n,) is log C, centred; y (m, n) is log error. A fit is (level, slope, floor), each
# (m, 1), for log error = log(floor + exp(level - slope x)).


def _predict(x: Array, level: Array, slope: Array, floor: Array, xp: Namespace) -> Array:
    """Return the logarithm of the error; (..., n)."""
    return xp.logaddexp(log(floor, xp=xp) + xp.zeros_like(x), level - slope * x)


def _fit_line(x: Array, y: Array, xp: Namespace) -> tuple[Array, Array, Array]:
    """Fit without a floor: a straight line, in closed form."""
    slope = -xp.sum(x * y, axis=-1, keepdims=True) / xp.sum(x * x)
    level = xp.mean(y, axis=-1, keepdims=True)
    return level, slope, xp.zeros_like(level)


def _fit_with_floor(x: Array, y: Array, xp: Namespace) -> tuple[Array, Array, Array]:
    """Fit with a floor: a grid over [0, smallest error), refined around its best point, whatever the profile's form."""
    smallest = xp.exp(xp.min(y, axis=-1, keepdims=True))[..., None]  # (m, 1, 1)
    side = 17
    steps = xp.reshape(xp.arange(side, dtype=y.dtype, device=device_of(y)), (1, side, 1))
    low, width = xp.zeros_like(smallest), xp.ones_like(smallest) / side
    for _ in range(10):  # each round narrows by 8: 1e-9 in the end
        share = low + width * steps
        level, slope = _fit_given_floor(x, y[:, None, :], share * smallest, xp)
        squares = xp.sum((y[:, None, :] - _predict(x, level, slope, share * smallest, xp)) ** 2, axis=-1, keepdims=True)
        best = steps == xp.astype(xp.argmin(squares, axis=1, keepdims=True), y.dtype)
        level, slope, share = (
            xp.sum(xp.where(best, value, xp.zeros_like(value)), axis=1) for value in (level, slope, share)
        )
        low = share[:, None, :] - width
        low, high = xp.maximum(low, xp.zeros_like(low)), low + 2.0 * width
        width = (high - low) / (side - 1)
    return level, slope, share * smallest[:, 0, :]


def _fit_given_floor(x: Array, y: Array, floor: Array, xp: Namespace) -> tuple[Array, Array]:
    """Fit level and slope (m, g, 1) for floors (m, g, 1) by Gauss-Newton steps that are damped until they improve."""
    above = xp.exp(y) - floor
    level, slope, _ = _fit_line(x, xp.log(xp.maximum(above, 0.05 * xp.exp(y))), xp)
    damping = xp.full_like(level, 1e-3)

    def residual(level: Array, slope: Array) -> tuple[Array, Array, Array]:
        value = _predict(x, level, slope, floor, xp)
        rest = y - value
        return value, rest, xp.sum(rest * rest, axis=-1, keepdims=True)

    value, rest, squares = residual(level, slope)
    for _ in range(12):
        share = xp.exp(level - slope * x - value)  # of the error that is not floor: d value / d level
        a, b, d = (xp.sum(share * share * x**power, axis=-1, keepdims=True) for power in (0, 1, 2))
        right, down = xp.sum(share * rest, axis=-1, keepdims=True), xp.sum(share * x * rest, axis=-1, keepdims=True)
        a, d = a * (1.0 + damping), d * (1.0 + damping)
        determinant = a * d - b * b
        new_level = level + (d * right - b * down) / determinant
        new_slope = slope - (a * down - b * right) / determinant
        new_value, new_rest, new_squares = residual(new_level, new_slope)
        better = new_squares <= squares
        level, slope = xp.where(better, new_level, level), xp.where(better, new_slope, slope)
        value, rest = xp.where(better, new_value, value), xp.where(better, new_rest, rest)
        squares = xp.where(better, new_squares, squares)
        damping = xp.where(better, damping * 0.1, damping * 10.0)
    return level, slope


def _interval(samples: Array, confidence: float, xp: Namespace) -> tuple[Array, Array]:
    """Return the central interval of samples (m,): order statistics, interpolated."""
    ordered = xp.sort(samples)
    ends = []
    for level in ((1.0 - confidence) / 2.0, (1.0 + confidence) / 2.0):
        place = level * (samples.shape[0] - 1)
        lower = min(math.floor(place), samples.shape[0] - 2)
        below, above = ordered[lower], ordered[lower + 1]
        step = xp.where(above > below, above - below, xp.zeros_like(above))  # two infinite ones have no difference
        ends.append(below + (place - lower) * step if place > lower else below)
    return ends[0], ends[1]
