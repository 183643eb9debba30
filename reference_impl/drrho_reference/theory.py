"""Quantities of the theory that can be measured on losses and weights.

Sources: DRRho, arXiv 2505.06699, for the variances and the generalisation bound; Duchi and Namkoong 2019 for the bound
of a variance-regularised risk.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from drrho_reference._checks import (
    FloatArray,
    non_negative,
    positive,
    real_array,
    whole_number,
)
from drrho_reference.anchor import within_range
from drrho_reference.risk import counted_excess

__all__ = [
    "ExcessVariance",
    "LogMeanExpBias",
    "effective_sample_size",
    "excess_variance",
    "expected_log_mean_exp_bias",
    "generalization_bound",
    "log_mean_exp_bias",
]


class ExcessVariance(NamedTuple):
    """The variance ``over_pairs`` of the excess losses of all pairs, and two parts whose sum is this variance."""

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
    """Measure the variance Var(l - lambda r) of excess losses.

    A comparison with the result for lambda = 0 shows how far the reference model lowers the variance.

    Parameters
    ----------
    loss : array (n,) or (m, n)
        The model's losses l. A row holds the pairs of one anchor; a vector is a single anchor.
    reference_loss : array, the shape of ``loss``
        The frozen reference model's losses r.
    reference_weight : float
        lambda, at least 0.
    where : array of bool, broadcast to the shape of ``loss``, optional
        The pairs that count.

    Returns
    -------
    ExcessVariance
        Variances over all pairs that count, within anchors and between anchors. Unit: the squared unit of the losses.

    Raises
    ------
    TypeError, ValueError
        If shapes do not fit, values leave their domains, or no pair counts.

    Notes
    -----
    N is the number of pairs that count, N_i is the number of these pairs with anchor i, and x = l - lambda r. The
    variance over pairs is (1/N) sum (x_ij - mean)^2, the variance within anchors is (1/N) sum (x_ij - mean_i)^2, and
    the variance between anchors is (1/N) sum_i N_i (mean_i - mean)^2. The bound of :func:`generalization_bound`
    contains the variance of l - r. The bound for distributionally robust optimisation without a reference model
    contains the variance of l. Source: DRRho, arXiv 2505.06699.

    Examples
    --------
    Here r = (l - 1) / 2, so the excess losses vary half as much as the losses, and all variances fall to a quarter.

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
    # The mean is over all pairs that count, so an anchor with more pairs has more influence.
    everything = excess[counted].tolist()
    mean = math.fsum(everything) / len(everything)
    within, between = [], []
    for row, chosen in zip(np.atleast_2d(excess), np.atleast_2d(counted), strict=True):
        pairs = row[chosen].tolist()
        if pairs:
            # The law of total variance: N_i var_i within anchor i, N_i (mean_i - mean)^2 between anchors.
            within.append(len(pairs) * _variance(pairs))
            between.append(len(pairs) * (math.fsum(pairs) / len(pairs) - mean) ** 2)
    return ExcessVariance(
        _variance(everything), math.fsum(within) / len(everything), math.fsum(between) / len(everything)
    )


def _variance(values: Sequence[float]) -> float:
    """Return (1/n) sum_i (x_i - mean)^2."""
    mean = math.fsum(values) / len(values)
    return math.fsum((value - mean) ** 2 for value in values) / len(values)


def effective_sample_size(weights: npt.ArrayLike, /, *, axis: int = -1) -> FloatArray:
    """Compute the number of samples that effectively share the weights of a risk: 1 / sum_i p_i^2.

    Parameters
    ----------
    weights : array of real numbers with at least one axis
        Weights p, whose sum along ``axis`` is 1.
    axis : int
        The axis of the samples.

    Returns
    -------
    array of float64, without ``axis``
        One number per slice, between 1 (one sample has all the weight) and n (uniform weights).

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
        # 1 / sum p^2 is n for uniform weights and 1 if a single weight is not 0.
        squares = math.fsum(float(weight) ** 2 for weight in slices[index])
        if squares == 0.0:
            raise ValueError("weights must have an entry above 0 in every slice, got a slice without one")
        sizes[index] = 1.0 / squares
    return sizes


def expected_log_mean_exp_bias(losses: npt.ArrayLike, /, *, temperature: float, batch_size: int) -> float:
    """Compute the bias of the risk on mini-batches: the mean over all possible batches, minus the risk of all samples.

    Parameters
    ----------
    losses : array (n,)
        Losses x of all samples. Every subset of ``batch_size`` samples is evaluated, so n must be small.
    temperature : float
        tau, above 0.
    batch_size : int
        b, 1 to n.

    Returns
    -------
    float
        The bias, which is at most 0, and 0 if b = n. Unit: the unit of the losses.

    Raises
    ------
    TypeError, ValueError
        If an argument leaves its domain.
    FloatingPointError
        If an exponential leaves the range of float64.

    Notes
    -----
    The result is the mean over all subsets B of b samples of tau log mean_{i in B} exp(x_i / tau), minus the same
    expression for all samples. It is at most 0 because the logarithm is concave (Jensen's inequality). This bias is the
    reason for SogCLR's moving average: arXiv 2202.12387.

    Examples
    --------
    The exponentials exp(x) are 1 and 3. The mean of log 1 and log 3 is below log 2.

    >>> import math
    >>> round(expected_log_mean_exp_bias([0.0, math.log(3.0)], temperature=1.0, batch_size=1), 6)
    -0.143841
    """
    x = real_array("losses", losses)
    if x.ndim != 1 or len(x) == 0:
        raise ValueError(f"losses must have one axis that is not empty, got the shape {x.shape}")
    tau, b = positive("temperature", temperature), whole_number("batch_size", batch_size, 1, len(x))
    # The mean over all subsets of b samples is the exact expectation.
    exponentials = _exponentials(x.tolist(), tau)
    risks = [tau * math.log(math.fsum(batch) / b) for batch in combinations(exponentials, b)]
    return math.fsum(risks) / len(risks) - tau * math.log(math.fsum(exponentials) / len(x))


def _exponentials(x: list[float], tau: float) -> list[float]:
    """Return all exp(x_i / tau), or raise an error if one of them leaves the range of float64."""
    try:
        return [within_range("temperature", tau, math.exp(value / tau)) for value in x]
    except OverflowError:
        within_range("temperature", tau, math.inf)
        raise  # never reached: inf is out of range


class LogMeanExpBias(NamedTuple):
    """The bias of the risk on mini-batches: as measured, and as predicted to first order in 1 / batch_size."""

    measured: FloatArray
    predicted: FloatArray


def log_mean_exp_bias(
    losses: npt.ArrayLike, /, *, batch_size: int, temperature: float = 1.0, axis: int = -1
) -> LogMeanExpBias:
    """Measure the mean of the risks of consecutive batches, minus the risk of all samples in these batches.

    Parameters
    ----------
    losses : array of real numbers, at least 2 along ``axis``
        Losses in random order. They are cut into n // b batches; the remaining losses are left out.
    batch_size : int
        b, 1 to n.
    temperature : float
        tau, above 0.
    axis : int
        The axis of the samples.

    Returns
    -------
    LogMeanExpBias
        Two arrays in the shape of ``losses`` without ``axis``. Unit: the unit of the losses.

    Raises
    ------
    TypeError, ValueError
        If an argument leaves its domain.
    FloatingPointError
        If an exponential leaves the range of float64.

    Notes
    -----
    measured: the mean over the batches B of tau log mean_{i in B} exp(x_i / tau), minus the same expression for all m
    samples in the batches. predicted: -(tau / 2) (m / E - 1) (m / b - 1) / (m - 1) with E = 1 / sum p_i^2 and
    p = softmax(x / tau). The prediction is half of the second derivative of tau log(u) at the mean u of all
    exponentials, times the variance of the mean of b exponentials drawn without replacement. The bias is the reason why
    a mini-batch loss needs large batches: SogCLR, arXiv 2202.12387. :func:`expected_log_mean_exp_bias` averages over
    all possible batches.

    Examples
    --------
    The exponentials are 1 and 3. The mean of log(1) and log(3) is below log(2).

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
        # Measured: the mean over the batches of tau log mean exp, minus tau log mean exp of all m samples.
        risks = [tau * math.log(math.fsum(exponentials[k * b : (k + 1) * b]) / b) for k in range(batches)]
        measured[index] = math.fsum(risks) / batches - tau * math.log(total / m)
        # Predicted: half the second derivative of the logarithm times the variance of a mean drawn without replacement.
        # 1/E = sum p^2 is the second moment of the softmax weights.
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
    """Bound the risk of the trained model by the best compromise between risk and variance among all models.

    Parameters
    ----------
    risk : array of any shape
        R(theta), the expected loss, of each model theta.
    variance : array, the shape of ``risk``
        Var(l(theta, .) - l(theta_ref, .)) of the same models, at least 0.
    radius : float
        rho / n, the radius of the chi-square ball that the training used, at least 0.
    num_samples : int
        n, the number of training samples, at least 1.
    c1, c2 : float
        The constants of the bound, at least 0. The defaults 1 and 0 are enough to compare reference models.

    Returns
    -------
    float
        min over theta of (R + c1 sqrt(2 radius Var)) + c2 / n. The bound and c2 have the unit of the losses.

    Raises
    ------
    TypeError, ValueError
        If shapes do not fit or values leave their domains.

    Notes
    -----
    The bound holds with probability 1 - delta; rho and the constants depend on delta, on the size of the model class
    and on the range of the losses. A model whose excess loss varies little, such as the reference model itself, makes
    the term with the variance small. Sources: DRRho, arXiv 2505.06699; Duchi and Namkoong 2019.

    Examples
    --------
    The second model has the larger risk, but its excess variance is 0, so its sum is the smaller one.

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
    # The bound is the smallest R + c1 sqrt(2 radius Var) among all models, plus c2 / n.
    compromises = [
        float(R) + c1 * math.sqrt(2.0 * radius * float(V)) for R, V in zip(risks.flat, variances.flat, strict=True)
    ]
    return min(compromises) + c2 / n
