"""Excess losses, and the DRRho risk: the excess loss of the model over the reference model on the worst samples.

Source: DRRho risk minimization, arXiv 2505.06699; the excess loss is the RHO loss of arXiv 2206.07137.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from drrho_reference._checks import (
    BoolArray,
    FloatArray,
    fraction,
    mask,
    non_negative,
    positive,
    raw_array,
    real_array,
    state_number,
)
from drrho_reference.ambiguity import WorstCase, solve_slices
from drrho_reference.anchor import estimate_of_state, moving_average, within_range
from drrho_reference.sets import AmbiguitySet

__all__ = ["MovingAverageKL", "drrho_risk", "drrho_risk_vjp", "excess_loss", "moving_average_kl"]


def excess_loss(loss: npt.ArrayLike, reference_loss: npt.ArrayLike, /, *, reference_weight: float = 1.0) -> FloatArray:
    """Subtract the reference model's loss from the model's: x_i = l_i - lambda r_i.

    Parameters
    ----------
    loss : array of real numbers, any shape
        The model's losses l.
    reference_loss : array of real numbers, the shape of ``loss``
        The frozen reference model's losses r on the same samples.
    reference_weight : float
        lambda, at least 0. 0 ignores the reference model, 1 is DRRho, and numbers above 1 are allowed.

    Returns
    -------
    array of float64, the shape of ``loss``
        The excess losses, which may be positive or negative.

    Raises
    ------
    TypeError, ValueError
        If the losses are not finite real numbers in two arrays of one shape, or ``reference_weight`` is no number of at
        least 0.

    Notes
    -----
    Source: the RHO loss, arXiv 2206.07137, as DRRho uses it, arXiv 2505.06699.

    Examples
    --------
    >>> excess_loss([1.0, 0.5, 2.0], [0.25, 1.0, 2.0]).tolist()
    [0.75, -0.5, 0.0]
    """
    learner = real_array("loss", loss)
    return _subtract(learner, real_array("reference_loss", reference_loss, learner.shape), reference_weight)


def _subtract(learner: FloatArray, reference: FloatArray, reference_weight: float) -> FloatArray:
    """Compute x_i = l_i - lambda r_i, one sample after the other."""
    weight = non_negative("reference_weight", reference_weight)
    excess = np.empty(learner.shape)
    for index in np.ndindex(learner.shape):
        # The reference model's loss is subtracted, so a sample that is hard for both models has a small excess loss.
        excess[index] = learner[index] - weight * reference[index]
    return excess


def drrho_risk(
    loss: npt.ArrayLike,
    reference_loss: npt.ArrayLike,
    ambiguity_set: AmbiguitySet,
    /,
    *,
    reference_weight: float = 1.0,
    axis: int = -1,
    where: npt.ArrayLike | None = None,
) -> WorstCase:
    """Find the worst case of the excess losses: :func:`worst_case` of :func:`excess_loss`.

    Parameters
    ----------
    loss : array of real numbers, any shape with at least one axis
        The model's losses.
    reference_loss : array of real numbers, the shape of ``loss``
        The frozen reference model's losses on the same samples.
    ambiguity_set : ambiguity set
        The set of weights over which the maximum is taken.
    reference_weight : float
        lambda, at least 0.
    axis : int
        The axis of the samples.
    where : array of bool, broadcast to the shape of ``loss``, optional
        The entries that count. All other entries of ``loss`` and ``reference_loss`` are never read.

    Returns
    -------
    WorstCase
        The result of :func:`worst_case`. ``weights`` is the gradient of the risk in ``loss``.

    Raises
    ------
    TypeError, ValueError
        If an argument is refused by :func:`worst_case` or :func:`excess_loss`.

    Notes
    -----
    F is the supremum of sum_i p_i (l_i - lambda r_i) over all weights p in the ambiguity set; if the set is a penalty,
    the penalty of p is subtracted from the sum. Source: DRRho, arXiv 2505.06699.

    Examples
    --------
    The third sample has the largest loss, but the reference model's loss on this sample is just as large. The first
    sample has the largest excess loss.

    >>> from drrho_reference import CVaR
    >>> result = drrho_risk([1.0, 0.5, 2.0], [0.25, 1.0, 2.0], CVaR(1 / 3))
    >>> float(result.risk), result.weights.tolist()
    (0.75, [1.0, 0.0, 0.0])
    """
    excess, counted = counted_excess(loss, reference_loss, reference_weight, where)
    return solve_slices(excess, ambiguity_set, axis, counted, raw_array("loss", loss).dtype)


def drrho_risk_vjp(
    loss: npt.ArrayLike,
    reference_loss: npt.ArrayLike,
    ambiguity_set: AmbiguitySet,
    upstream: npt.ArrayLike,
    /,
    *,
    reference_weight: float = 1.0,
    axis: int = -1,
    where: npt.ArrayLike | None = None,
) -> FloatArray:
    """Return the gradient, with respect to ``loss``, of a scalar that is a function of DRRho risks.

    By the chain rule this gradient is the upstream gradient (the derivative of the scalar in each risk) times the
    worst-case weights.

    Parameters
    ----------
    loss, reference_loss, ambiguity_set, reference_weight, axis, where
        As in :func:`drrho_risk`.
    upstream : array of real numbers, the shape of the risk
        The derivative of the scalar in each risk.

    Returns
    -------
    array of float64, the shape of ``loss``
        The derivative of the scalar in each loss; 0 for entries that do not count.

    Raises
    ------
    TypeError, ValueError
        If an argument is refused by :func:`drrho_risk`, or ``upstream`` does not have the shape of the risk.

    Notes
    -----
    d (sum_s v_s F_s) / d l_si = v_s p_si, where F_s is the risk of slice s, p_s its weights and v_s its upstream
    gradient (Danskin's theorem). Source: DRRho, arXiv 2505.06699.

    Examples
    --------
    Each slice has two samples, so the worst half of a slice is one sample. The upstream gradient is 1 for the first
    slice and 3 for the second slice.

    >>> from drrho_reference import CVaR
    >>> drrho_risk_vjp([[1.0, 2.0], [5.0, 4.0]], [[0.0, 0.0], [0.0, 0.0]], CVaR(0.5), [1.0, 3.0]).tolist()
    [[0.0, 1.0], [3.0, 0.0]]
    """
    # The weights are the gradient of the risk; the chain rule multiplies each slice by the upstream gradient.
    worst = drrho_risk(loss, reference_loss, ambiguity_set, reference_weight=reference_weight, axis=axis, where=where)
    factors = real_array("upstream", upstream, worst.risk.shape)
    gradient = np.moveaxis(worst.weights.copy(), axis, -1)
    for index in np.ndindex(factors.shape):
        gradient[index] *= factors[index]
    return np.moveaxis(gradient, -1, axis)


def counted_excess(
    loss: npt.ArrayLike, reference_loss: npt.ArrayLike, reference_weight: float, where: npt.ArrayLike | None
) -> tuple[FloatArray, BoolArray]:
    """Return the excess losses, 0 for entries that do not count, and the mask of the entries that count."""
    learner, reference = raw_array("loss", loss), raw_array("reference_loss", reference_loss)
    if reference.shape != learner.shape:
        raise ValueError(f"reference_loss must have the shape {learner.shape}, got {reference.shape}")
    counted = mask("where", True if where is None else where, learner.shape)
    # Entries that do not count are replaced by 0 before any other use, so they may be nan.
    excess = _subtract(
        real_array("loss", np.where(counted, learner, 0)),
        real_array("reference_loss", np.where(counted, reference, 0)),
        reference_weight,
    )
    return excess, counted


class MovingAverageKL(NamedTuple):
    """Result of :func:`moving_average_kl`."""

    risk: float
    weights: FloatArray
    log_inner: float


def moving_average_kl(
    loss: npt.ArrayLike,
    reference_loss: npt.ArrayLike,
    log_inner: float,
    /,
    *,
    temperature: float,
    gamma: float = 1.0,
    reference_weight: float = 1.0,
    where: npt.ArrayLike | None = None,
) -> MovingAverageKL:
    """Estimate the KL-penalised risk of a whole data set batch by batch, with one estimate u for the whole data set.

    Parameters
    ----------
    loss : array of real numbers, any shape
        The model's losses of a batch.
    reference_loss : array of real numbers, the shape of ``loss``
        The frozen reference model's losses on the same samples.
    log_inner : float
        The logarithm of u, the estimate from earlier batches; -inf before the first batch.
    temperature : float
        tau, above 0: the factor of the Kullback-Leibler divergence that the risk subtracts.
    gamma : float
        Weight of the batch's value in the moving average, in (0, 1]. With 1 the old estimate has no influence.
    reference_weight : float
        lambda, at least 0.
    where : array of bool, broadcast to the shape of ``loss``, optional
        The entries that count. All other entries are never read and get weight 0.

    Returns
    -------
    MovingAverageKL
        ``risk`` (tau log u), ``weights`` in the shape of ``loss``, and the new ``log_inner``.

    Raises
    ------
    TypeError, ValueError
        If shapes do not fit, values leave their domains, or no entry counts.
    FloatingPointError
        If an exponential leaves the range of float64: |x / tau| or |log u| above about 700.

    Notes
    -----
    With x_i = l_i - lambda r_i, u becomes (1 - gamma) u + gamma mean_i exp(x_i / tau); on the first batch u becomes the
    mean alone. The risk is tau log u, and the weights are exp(x_i / tau) / u / n, where n is the number of entries that
    count. The weights are the gradient of (tau / u) mean_i exp(x_i / tau) in the losses l_i, if the new u counts as a
    constant. If gamma = 1, the weights are those of :class:`KLPenalty` and sum to 1.
    Sources: SogCLR, arXiv 2202.12387, for the moving average; DRRho, arXiv 2505.06699, for the risk.

    Examples
    --------
    The excess losses are log 1 and log 3, so the exponentials are 1 and 3, and their mean is 2. The old u is 4, and the
    new u is (4 + 2) / 2 = 3.

    >>> import math
    >>> result = moving_average_kl([1, 1 + math.log(3)], [1, 1], math.log(4), temperature=1, gamma=0.5)
    >>> round(result.risk, 6) == round(math.log(3), 6), result.weights.round(4).tolist()
    (True, [0.1667, 0.5])
    """
    excess, counted = counted_excess(loss, reference_loss, reference_weight, where)
    tau, new = positive("temperature", temperature), fraction("gamma", gamma)
    # The old u, from all batches so far.
    old = estimate_of_state(state_number("log_inner", log_inner))
    chosen = [index for index in np.ndindex(excess.shape) if counted[index]]
    if not chosen:
        raise ValueError(f"loss must have an entry that counts, got {excess.size} entries, none of which counts")
    try:
        # g of this batch: the mean of exp(x / tau) over the entries that count.
        exponentials = {index: math.exp(excess[index] / tau) for index in chosen}
    except OverflowError:
        exponentials = dict.fromkeys(chosen, math.inf)
    batch = within_range("temperature", tau, math.fsum(exponentials.values()) / len(chosen))
    # The risk and the weights use the new u.
    u = moving_average(old, batch, new)
    weights = np.zeros(excess.shape)
    for index in chosen:
        weights[index] = exponentials[index] / u / len(chosen)
    return MovingAverageKL(tau * math.log(u), weights, math.log(u))
