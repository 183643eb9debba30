"""What the theory promises, as numbers that can be measured.

Sources: DRRho, arXiv 2505.06699, for the variances, the bound and the scaling law; Duchi and Namkoong 2019 for the
bound of a variance-regularised risk.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from drrho_reference._checks import (
    BoolArray,
    FloatArray,
    mask,
    non_negative,
    number,
    positive,
    raw_array,
    real_array,
    whole_number,
)
from drrho_reference.contrastive import within_range
from drrho_reference.risk import counted_excess

__all__ = [
    "ExcessVariance",
    "LogMeanExpBias",
    "ScalingLaw",
    "effective_sample_size",
    "excess_variance",
    "expected_log_mean_exp_bias",
    "fit_scaling_law",
    "generalization_bound",
    "log_mean_exp_bias",
]


class ExcessVariance(NamedTuple):
    """The variance of the excess losses of all pairs, and its two parts; ``over_pairs`` is their sum."""

    over_pairs: float
    within_anchors: float
    between_anchors: float


def excess_variance(
    loss: npt.ArrayLike,
    reference_loss: npt.ArrayLike,
    /,
    *,
    reference_weight: float = 1.0,
    where: npt.ArrayLike | None = None,
) -> ExcessVariance:
    """Measure what the reference model is good for: Var(l - lambda r), to be compared with that of lambda = 0.

    Parameters
    ----------
    loss : array (n,) or (m, n)
        The model's losses. A row is an anchor with its pairs; a vector is one anchor.
    reference_loss : array, the shape of ``loss``
        The frozen reference model's losses.
    reference_weight : float
        lambda, at least 0.
    where : array of bool, broadcast to the shape of ``loss``, optional
        The pairs that count.

    Returns
    -------
    ExcessVariance
        Over all pairs that count, within anchors and between anchors. Unit: the square of the losses' unit.

    Raises
    ------
    TypeError, ValueError
        If shapes do not fit, values leave their domains, or no pair counts.

    Notes
    -----
    N pairs count, N_i of them with anchor i: over pairs (1/N) sum (x_ij - mean)^2, within anchors
    (1/N) sum (x_ij - mean_i)^2, between anchors (1/N) sum_i N_i (mean_i - mean)^2. The bound of
    :func:`generalization_bound` has the variance of l - r where that of plain DRO has that of l.
    Source: DRRho, arXiv 2505.06699.

    Examples
    --------
    The reference model finds the same samples hard, if not as hard.

    >>> loss, reference_loss = [[1.0, 3.0], [5.0, 7.0]], [[0.0, 1.0], [2.0, 3.0]]
    >>> excess_variance(loss, reference_loss, reference_weight=0.0)
    ExcessVariance(over_pairs=5.0, within_anchors=1.0, between_anchors=4.0)
    >>> excess_variance(loss, reference_loss)
    ExcessVariance(over_pairs=1.25, within_anchors=0.25, between_anchors=1.0)
    """
    excess, counted = counted_excess(loss, reference_loss, reference_weight, where)
    if excess.ndim not in (1, 2):
        raise ValueError(f"loss must have one or two axes, got the shape {excess.shape}")
    if not counted.any():
        raise ValueError(f"loss must have an entry that counts, got {excess.size} entries, none of which counts")
    everything = excess[counted].tolist()
    mean = math.fsum(everything) / len(everything)
    within, between = [], []
    for row, chosen in zip(np.atleast_2d(excess), np.atleast_2d(counted), strict=True):
        pairs = row[chosen].tolist()
        if pairs:
            within.append(len(pairs) * _variance(pairs))
            between.append(len(pairs) * (math.fsum(pairs) / len(pairs) - mean) ** 2)
    return ExcessVariance(
        _variance(everything), math.fsum(within) / len(everything), math.fsum(between) / len(everything)
    )


def _variance(values: Sequence[float]) -> float:
    """(1/n) sum_i (x_i - mean)^2."""
    mean = math.fsum(values) / len(values)
    return math.fsum((value - mean) ** 2 for value in values) / len(values)


def effective_sample_size(weights: npt.ArrayLike, /, *, axis: int = -1) -> FloatArray:
    """Count on how many samples a risk rests: 1 / sum_i p_i^2.

    Parameters
    ----------
    weights : array of real numbers with at least one axis
        Weights p, of sum 1 along ``axis``.
    axis : int
        The axis of the samples.

    Returns
    -------
    array of float64, without ``axis``
        Between 1 (one sample has all the weight) and n (uniform).

    Raises
    ------
    TypeError, ValueError
        If the weights are no finite numbers of at least 0, or a slice has no weight above 0.

    Notes
    -----
    Source: Kish, Survey Sampling (1965).

    Examples
    --------
    >>> float(effective_sample_size([0.5, 0.0, 0.25, 0.25]).round(4))
    2.6667
    """
    p = real_array("weights", weights)
    if p.ndim == 0:
        raise ValueError("weights must have at least one axis, got a 0-d array")
    if np.any(p < 0.0):
        raise ValueError(f"weights must be at least 0, got {p.min()}")
    slices = np.moveaxis(p, whole_number("axis", axis, -p.ndim, p.ndim - 1), -1)
    sizes = np.empty(slices.shape[:-1])
    for index in np.ndindex(sizes.shape):
        squares = math.fsum(float(weight) ** 2 for weight in slices[index])
        if squares == 0.0:
            raise ValueError("weights must have an entry above 0 in every slice, got a slice without one")
        sizes[index] = 1.0 / squares
    return sizes


def expected_log_mean_exp_bias(losses: npt.ArrayLike, /, *, temperature: float, batch_size: int) -> float:
    """Tell how far below the risk of all samples that of a mini-batch lies on average.

    Parameters
    ----------
    losses : array (n,)
        Losses x of all samples; every batch of ``batch_size`` of them is looked at, so n must be small.
    temperature : float
        tau, above 0.
    batch_size : int
        b, 1 to n.

    Returns
    -------
    float
        At most 0; 0 at b = n. Unit: that of the losses.

    Raises
    ------
    TypeError, ValueError
        If an argument leaves its domain.
    FloatingPointError
        If an exponential leaves the range of float64.

    Notes
    -----
    mean over all subsets B of b samples of tau log mean_{i in B} exp(x_i / tau), minus the same of all samples.
    The logarithm is concave, hence the sign (Jensen). This bias is why SogCLR has a moving average: arXiv 2202.12387.

    Examples
    --------
    exp(x) is 1 and 3: the mean of log 1 and log 3 is below log 2.

    >>> import math
    >>> round(expected_log_mean_exp_bias([0.0, math.log(3.0)], temperature=1.0, batch_size=1), 6)
    -0.143841
    """
    x = real_array("losses", losses)
    if x.ndim != 1 or len(x) == 0:
        raise ValueError(f"losses must have one axis that is not empty, got the shape {x.shape}")
    tau, b = positive("temperature", temperature), whole_number("batch_size", batch_size, 1, len(x))
    exponentials = _exponentials(x.tolist(), tau)
    risks = [tau * math.log(math.fsum(batch) / b) for batch in combinations(exponentials, b)]
    return math.fsum(risks) / len(risks) - tau * math.log(math.fsum(exponentials) / len(x))


def _exponentials(x: list[float], tau: float) -> list[float]:
    """exp(x_i / tau), as long as float64 has them."""
    try:
        return [within_range("temperature", tau, math.exp(value / tau)) for value in x]
    except OverflowError:
        within_range("temperature", tau, math.inf)
        raise  # never reached: inf is out of range


class LogMeanExpBias(NamedTuple):
    """How far mini-batches miss the risk: as measured, and to first order in 1 / batch_size."""

    measured: FloatArray
    predicted: FloatArray


def log_mean_exp_bias(
    losses: npt.ArrayLike, /, *, batch_size: int, temperature: float = 1.0, axis: int = -1
) -> LogMeanExpBias:
    """Measure how far below the risk of all samples that of one batch after another lies on average.

    Parameters
    ----------
    losses : array of real numbers, at least 2 along ``axis``
        Losses in random order. They are cut into n // b batches, what is left over is left out.
    batch_size : int
        b, 1 to n.
    temperature : float
        tau, above 0.
    axis : int
        The axis of the samples.

    Returns
    -------
    LogMeanExpBias
        Two arrays in the shape of ``losses`` without ``axis``. Unit: that of the losses.

    Raises
    ------
    TypeError, ValueError
        If an argument leaves its domain.
    FloatingPointError
        If an exponential leaves the range of float64.

    Notes
    -----
    measured: mean over batches B of tau log mean_{i in B} exp(x_i / tau), minus the same of all m samples in batches.
    predicted: -(tau / 2) (m / E - 1) (m / b - 1) / (m - 1), E = 1 / sum p_i^2 and p = softmax(x / tau): the variance of
    a mean that is drawn without replacement, and the second derivative of the logarithm. Why a mini-batch loss needs
    large batches: SogCLR, arXiv 2202.12387. :func:`expected_log_mean_exp_bias` looks at all batches there are.

    Examples
    --------
    The exponentials are 1 and 3: log(1) and log(3) have a mean below log(2).

    >>> import math
    >>> bias = log_mean_exp_bias([0.0, math.log(3.0)], batch_size=1)
    >>> round(float(bias.measured), 6), round(float(bias.predicted), 6)
    (-0.143841, -0.125)
    """
    x = real_array("losses", losses)
    if x.ndim == 0:
        raise ValueError("losses must have at least one axis, got a 0-d array")
    slices = np.moveaxis(x, whole_number("axis", axis, -x.ndim, x.ndim - 1), -1)
    n = slices.shape[-1]
    if n < 2:
        raise ValueError(f"losses must have at least 2 entries along axis, got {n}")
    b, tau = whole_number("batch_size", batch_size, 1, n), positive("temperature", temperature)
    batches = n // b
    m = batches * b
    measured, predicted = np.empty(slices.shape[:-1]), np.empty(slices.shape[:-1])
    for index in np.ndindex(measured.shape):
        exponentials = _exponentials(slices[index][:m].tolist(), tau)
        total = math.fsum(exponentials)
        risks = [tau * math.log(math.fsum(exponentials[k * b : (k + 1) * b]) / b) for k in range(batches)]
        measured[index] = math.fsum(risks) / batches - tau * math.log(total / m)
        effective = 1.0 / math.fsum((value / total) ** 2 for value in exponentials)
        predicted[index] = -(tau / 2.0) * (m / effective - 1.0) * (m / b - 1.0) / max(m - 1, 1)
    return LogMeanExpBias(measured, predicted)


def generalization_bound(
    risk: npt.ArrayLike,
    variance: npt.ArrayLike,
    /,
    *,
    radius: float,
    num_samples: int,
    c1: float = 1.0,
    c2: float = 0.0,
) -> float:
    """Bound the risk of the trained model by the best compromise of risk and variance among all models.

    Parameters
    ----------
    risk : array of any shape
        R(theta) of some models theta, the expected loss.
    variance : array, the shape of ``risk``
        Var(l(theta, .) - l(theta_ref, .)) of the same models, at least 0.
    radius : float
        rho / n, the radius of the chi-square ball that was trained with, at least 0.
    num_samples : int
        n, the samples that were trained on, at least 1.
    c1, c2 : float
        The constants of the bound, at least 0; 1 and 0 give its form, enough to compare reference models.

    Returns
    -------
    float
        min over theta of (R + c1 sqrt(2 radius Var)) + c2 / n. Unit: that of the losses, as long as c2 has it too.

    Raises
    ------
    TypeError, ValueError
        If shapes do not fit or values leave their domains.

    Notes
    -----
    It holds with probability 1 - delta, where rho and the constants depend on delta, on the size of the model class and
    on the range of the losses. A model whose excess loss varies little, such as the reference model itself, makes the
    second term small. Sources: DRRho, arXiv 2505.06699; Duchi and Namkoong 2019.

    Examples
    --------
    The second model has the larger risk, but hardly any excess variance.

    >>> generalization_bound([1.0, 1.25], [2.0, 0.0], radius=0.25, num_samples=10, c1=1.0, c2=0.5)
    1.3
    """
    risks = real_array("risk", risk)
    if risks.size == 0:
        raise ValueError(f"risk must have at least one entry, got the shape {risks.shape}")
    variances = real_array("variance", variance, risks.shape)
    if np.any(variances < 0.0):
        raise ValueError(f"variance must be at least 0, got {variances.min()}")
    radius, n = non_negative("radius", radius), whole_number("num_samples", num_samples, 1)
    c1, c2 = non_negative("c1", c1), non_negative("c2", c2)
    compromises = [
        float(R) + c1 * math.sqrt(2.0 * radius * float(V)) for R, V in zip(risks.flat, variances.flat, strict=True)
    ]
    return min(compromises) + c2 / n


# ---------------------------------------------------------------------------------------------------------------------
# The scaling law
# ---------------------------------------------------------------------------------------------------------------------

Interval = tuple[float, float]


class ScalingLaw(NamedTuple):
    """error = floor + prefactor * compute^(-exponent), its bootstrap intervals, and what was fitted.

    ``residual`` is the root of the mean square of the residuals, in natural logarithms of the error; ``fitted`` marks
    the points that were fitted.
    """

    prefactor: float
    exponent: float
    floor: float
    prefactor_interval: Interval
    exponent_interval: Interval
    floor_interval: Interval
    residual: float
    fitted: BoolArray


def fit_scaling_law(
    compute: npt.ArrayLike,
    error: npt.ArrayLike,
    /,
    *,
    with_floor: bool = False,
    where: npt.ArrayLike | None = None,
    confidence: float = 0.95,
    num_resamples: int = 1000,
    seed: int = 0,
) -> ScalingLaw:
    """Fit error = e0 + a C^(-beta) by least squares on the logarithm of the error.

    Parameters
    ----------
    compute : array (n,)
        C of every run, above 0.
    error : array (n,)
        The errors of the same runs, above 0.
    with_floor : bool
        False holds e0 at 0: a straight line in logarithms. True looks for 0 <= e0 < the smallest error.
    where : array (n,) of bool, optional
        The points to fit: at least 3, with a floor 4. The others are never read.
    confidence : float
        The share of bootstrap fits inside an interval, in (0, 1).
    num_resamples : int
        How many bootstrap fits, at least 2. With a floor a fit takes some milliseconds here.
    seed : int
        Of the bootstrap.

    Returns
    -------
    ScalingLaw
        a, beta, e0; an interval for each; the size of the residuals and the points that were fitted.

    Raises
    ------
    TypeError, ValueError
        If shapes do not fit, values leave their domains, or there are too few points or different computes.

    Notes
    -----
    The bootstrap draws residuals with replacement, scaled by sqrt(n / (n - parameters)) because a fit makes them too
    small, adds them to the fitted logarithms and fits again; an interval cuts off (1 - confidence) / 2 of these fits
    on either side. Source: the power law of error in compute that DRRho, arXiv 2505.06699, reports.

    Examples
    --------
    >>> law = fit_scaling_law([1.0, 4.0, 16.0, 64.0], [8.0, 4.0, 2.0, 1.0], num_resamples=2)
    >>> round(law.prefactor, 6), round(law.exponent, 6), law.floor, law.fitted.tolist()
    (8.0, 0.5, 0.0, [True, True, True, True])
    """
    compute, error = raw_array("compute", compute), raw_array("error", error)
    if compute.ndim != 1 or len(compute) == 0:
        raise ValueError(f"compute must have one axis that is not empty, got the shape {compute.shape}")
    if error.shape != compute.shape:
        raise ValueError(f"error must have the shape {compute.shape}, got {error.shape}")
    fitted = mask("where", True if where is None else where, compute.shape)
    C, e = real_array("compute", compute[fitted]), real_array("error", error[fitted])
    if not isinstance(with_floor, bool):
        raise TypeError(f"with_floor must be True or False, got {with_floor!r}")
    parameters = 3 if with_floor else 2
    if len(C) <= parameters:
        raise ValueError(f"compute must have at least {parameters + 1} points to fit, got {len(C)}")
    for argument, values in (("compute", C), ("error", e)):
        if values.min() <= 0.0:
            raise ValueError(f"{argument} must be positive, got {values.min()}")
    if len(set(C.tolist())) < 2:
        raise ValueError(f"compute must have at least 2 different values, got {sorted(set(C.tolist()))}")
    confidence, num_resamples = number("confidence", confidence), whole_number("num_resamples", num_resamples, 2)
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence must lie in (0, 1), got {confidence}")

    fit = _fit_with_floor if with_floor else _fit_line
    prefactor, exponent, floor = fit(np.log(C), e)
    line = np.log(floor + prefactor * C**-exponent)
    residuals = np.log(e) - line
    rng = np.random.default_rng(whole_number("seed", seed, 0))
    wide = math.sqrt(len(C) / (len(C) - parameters)) * residuals
    fits = [fit(np.log(C), np.exp(line + rng.choice(wide, size=len(C)))) for _ in range(num_resamples)]
    prefactors, exponents, floors = zip(*fits, strict=True)
    return ScalingLaw(
        prefactor=prefactor,
        exponent=exponent,
        floor=floor,
        prefactor_interval=_interval(prefactors, confidence),
        exponent_interval=_interval(exponents, confidence),
        floor_interval=_interval(floors, confidence),
        residual=math.sqrt(math.fsum(residuals**2) / len(C)),
        fitted=np.array(fitted),
    )


def _interval(values: Sequence[float], confidence: float) -> Interval:
    """Cut off (1 - confidence) / 2 on either side."""
    low, high = np.quantile(values, [(1.0 - confidence) / 2.0, (1.0 + confidence) / 2.0])
    return float(low), float(high)


def _fit_line(log_compute: FloatArray, error: FloatArray) -> tuple[float, float, float]:
    """Return a, beta and 0: log e = log a - beta log C by least squares, slope = cov(log C, log e) / var(log C)."""
    log_error = np.log(error)
    x, y = log_compute - log_compute.mean(), log_error - log_error.mean()
    slope = math.fsum(x * y) / math.fsum(x * x)
    return math.exp(log_error.mean() - slope * log_compute.mean()), -slope, 0.0


def _fit_with_floor(log_compute: FloatArray, error: FloatArray) -> tuple[float, float, float]:
    """Return a, beta and e0: the best of a grid of floors, then golden sections around it.

    For each floor the best a and beta are found; what is left is a function of the floor alone.
    """

    def misfit(floor: float) -> float:
        return _fit_above(log_compute, error, floor)[2]

    grid = [0.05 * step * float(error.min()) for step in range(20)] + [float(error.min()) * (1.0 - 1e-9)]
    best = min(range(len(grid)), key=lambda step: misfit(grid[step]))
    low, high = grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)]
    ratio = (math.sqrt(5.0) - 1.0) / 2.0
    while high - low > 1e-7 * float(error.min()):
        left, right = high - ratio * (high - low), low + ratio * (high - low)
        if misfit(left) <= misfit(right):
            high = right
        else:
            low = left
    floor = min((low, 0.5 * (low + high), high), key=misfit)  # low may be 0 itself, the usual answer without a floor
    a, beta, _ = _fit_above(log_compute, error, floor)
    return a, beta, floor


def _fit_above(log_compute: FloatArray, error: FloatArray, floor: float) -> tuple[float, float, float]:
    """Return a, beta and the sum of squares of log e - log(e0 + a C^-beta) for a given e0: Gauss-Newton.

    The start is the line through log(e - e0), which is the answer at e0 = 0. With q = a C^-beta and m = e0 + q the
    derivatives of log m are q / m in log a and -(q / m) log C in beta.
    """
    a, beta, _ = _fit_line(log_compute, error - floor)
    parameters = np.array([math.log(a), beta])

    def residuals(at: FloatArray) -> FloatArray:
        with np.errstate(over="ignore", divide="ignore"):  # a step that is far too long misses by inf, and is halved
            miss: FloatArray = np.log(error) - np.log(floor + np.exp(at[0] - at[1] * log_compute))
        return miss

    def misfit(at: FloatArray) -> float:
        return math.fsum(miss**2 for miss in residuals(at))

    for _ in range(100):
        q = np.exp(parameters[0] - parameters[1] * log_compute)
        share = q / (floor + q)
        step = np.linalg.lstsq(np.stack([share, -share * log_compute], axis=1), residuals(parameters), rcond=None)[0]
        while misfit(parameters + step) > misfit(parameters) and np.any(np.abs(step) > 1e-12):
            step = step / 2.0  # too far: a shorter step goes down, as this direction does
        if np.all(np.abs(step) <= 1e-12):
            break
        parameters = parameters + step
    return math.exp(parameters[0]), float(parameters[1]), misfit(parameters)
