"""Excess losses and the DRRho risk: how much worse than the reference model, where it is worst.

Source: DRRho risk minimization, arXiv 2505.06699; the excess loss is the RHO loss of arXiv 2206.07137.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from drrho_reference._checks import FloatArray, mask, non_negative, raw_array, real_array
from drrho_reference.ambiguity import AmbiguitySet, WorstCase, solve_slices

__all__ = ["drrho_risk", "excess_loss"]


def excess_loss(loss: npt.ArrayLike, reference_loss: npt.ArrayLike, /, *, reference_weight: float = 1.0) -> FloatArray:
    """Subtract the reference model's loss from the model's: x_i = l_i - lambda r_i.

    Parameters
    ----------
    loss : array of real numbers, any shape
        The model's losses l.
    reference_loss : array of real numbers, the shape of ``loss``
        The frozen reference model's losses r on the same samples.
    reference_weight : float
        lambda, at least 0. 0 forgets the reference model, 1 is DRRho, above 1 is allowed.

    Returns
    -------
    array of float64, the shape of ``loss``
        The excess losses, of either sign.

    Raises
    ------
    TypeError, ValueError
        If the losses are no finite real numbers of one shape, or ``reference_weight`` is no number of at least 0.

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
    """x_i = l_i - lambda r_i, one sample after the other."""
    weight = non_negative("reference_weight", reference_weight)
    excess = np.empty(learner.shape)
    for index in np.ndindex(learner.shape):
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
        What the weights may be.
    reference_weight : float
        lambda, at least 0.
    axis : int
        The axis of the samples.
    where : array of bool, broadcast to the shape of ``loss``, optional
        The entries that count. Neither loss is read at the others.

    Returns
    -------
    WorstCase
        As :func:`worst_case` returns it. ``weights`` is the gradient of the risk in ``loss``.

    Raises
    ------
    TypeError, ValueError
        As the two functions raise them.

    Notes
    -----
    F = sup over p of sum_i p_i (l_i - lambda r_i). Source: DRRho, arXiv 2505.06699.

    Examples
    --------
    The third sample has the largest loss, but the reference model finds it just as hard: the first one counts.

    >>> from drrho_reference import CVaR
    >>> result = drrho_risk([1.0, 0.5, 2.0], [0.25, 1.0, 2.0], CVaR(1 / 3))
    >>> float(result.risk), result.weights.tolist()
    (0.75, [1.0, 0.0, 0.0])
    """
    learner, reference = raw_array("loss", loss), raw_array("reference_loss", reference_loss)
    if reference.shape != learner.shape:
        raise ValueError(f"reference_loss must have the shape {learner.shape}, got {reference.shape}")
    counted = mask("where", True if where is None else where, learner.shape)
    # Entries that do not count are replaced before anything reads them: nan never enters.
    excess = _subtract(
        real_array("loss", np.where(counted, learner, 0)),
        real_array("reference_loss", np.where(counted, reference, 0)),
        reference_weight,
    )
    return solve_slices(excess, ambiguity_set, axis, counted, learner.dtype)
