"""Excess losses and the DRRho risk: the worst-case weighted mean of how much worse a model is than a reference model.

Shapes: losses (..., n, ...), one entry per sample; the samples of one problem lie along `axis`. Any unit, any sign.

Source: Model Steering / DRRho, arXiv 2505.06699.
"""

from __future__ import annotations

import math

from drrho_core import _validate
from drrho_core._array_api import Array, Namespace, is_array, namespace_of, power_of_two, wide_dtype
from drrho_core.ambiguity import AmbiguitySet, WorstCase
from drrho_core.ambiguity.checks import check_ambiguity_set, check_losses, check_values
from drrho_core.ambiguity.worst_case import solve_unchecked


def excess_loss(
    loss: Array, reference_loss: Array, /, *, reference_weight: float | Array = 1.0, xp: Namespace | None = None
) -> Array:
    """Return ``loss - reference_weight * reference_loss``, the RHO loss: signed, sample by sample.

    It measures what can still be learned: a mislabelled or hopeless sample, on which both models are poor, has a small
    excess loss.

    Parameters
    ----------
    loss : array, any shape
        The learner's losses, real floating.
    reference_loss : array, the same shape
        The frozen reference model's losses on the same samples, in the same dtype. Not broadcast: one row of reference
        losses against many would hide a mistake.
    reference_weight : float or array without axes
        At least 0: 0 ignores the reference model, 1 is DRRho, above 1 is allowed.
    xp : namespace, optional
        The arrays' namespace; needed under ``torch.compile`` only.

    Returns
    -------
    array
        Shape and dtype of `loss`; half types are subtracted in float32.

    Raises
    ------
    TypeError
        If an argument has another type or the arrays have different dtypes or libraries.
    ValueError
        If the shapes or devices differ, `reference_weight` is negative, a value is nan or infinite (looked at on the
        host outside tracing only), or an array asks for autograd.

    Examples
    --------
    >>> import numpy as np
    >>> excess_loss(np.asarray([2.0, 0.5]), np.asarray([0.5, 1.5])).tolist()
    [1.5, -1.0]
    """
    arrays = {"loss": loss, "reference_loss": reference_loss}
    xp = check_losses(arrays, None, xp)
    weight = check_weight(reference_weight, loss, xp)
    for name, array in arrays.items():
        _validate.finite(name, array, xp)
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

    Minimising it asks the learner to be no worse than the reference model, above all where it still is. Shifting all
    reference losses by a constant changes no weight.

    Parameters
    ----------
    loss : array, shape (..., n, ...)
        The learner's losses, real floating, any unit.
    reference_loss : array, the same shape
        The frozen reference model's losses on the same samples, in the same dtype. Not broadcast.
    ambiguity_set : AmbiguitySet
        The weights that the adversary may choose, such as ``CVaR(0.1)``.
    reference_weight : float or array without axes
        At least 0: 0 is plain distributionally robust optimisation, 1 is DRRho.
    axis : int
        The axis of the n samples.
    where : array of bool, optional
        Marks the samples that count, broadcast to the losses' shape; neither loss of the others is read.
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
    >>> from drrho_core.ambiguity import CVaR
    >>> drrho_risk(np.asarray([3.0, 2.0]), np.asarray([2.9, 0.5]), CVaR(0.5)).weights.tolist()
    [0.0, 1.0]
    """
    check_ambiguity_set(ambiguity_set)
    arrays = {"loss": loss, "reference_loss": reference_loss}
    xp = check_losses(arrays, where, xp)
    weight = check_weight(reference_weight, loss, xp)
    axis = _validate.axis(axis, "loss", loss)
    if where is not None:
        arrays = {name: xp.where(where, array, xp.zeros_like(array)) for name, array in arrays.items()}
    for name, array in arrays.items():
        _validate.finite(name, array, xp)
    excess = difference(arrays["loss"], arrays["reference_loss"], weight, xp)
    check_values("loss - reference_weight * reference_loss", excess, axis, where, xp)
    return solve_unchecked(excess, ambiguity_set, axis, where, loss.dtype, xp)


def check_weight(reference_weight: float | Array, loss: Array, xp: Namespace) -> float | Array:
    """Check the weight of the reference loss and return it in the dtype that the difference is computed in."""
    together = {"loss": loss, "reference_weight": reference_weight}
    if is_array(reference_weight):
        namespace_of(together, xp)
        _validate.same_device(together, xp)
        _validate.detached(together, xp)
    dtype = wide_dtype(loss.dtype, xp)
    weight = _validate.parameter(
        "reference_weight", reference_weight, _validate.not_negative, "be at least 0", xp, dtype=dtype
    )
    return (
        xp.astype(_validate.within(weight, _validate.not_negative, xp), dtype, copy=False)
        if is_array(weight)
        else weight
    )


def difference(loss: Array, reference_loss: Array, weight: float | Array, xp: Namespace) -> Array:
    """Return the excess loss in float32 or wider; it is infinite only where the exact one is too large for it."""
    dtype = wide_dtype(loss.dtype, xp)
    loss, reference_loss = (xp.astype(array, dtype, copy=False) for array in (loss, reference_loss))
    if not is_array(weight) and weight <= 1:
        return loss - weight * reference_loss
    # A weight above 1 is subtracted in two halves: the product may be too large where the difference is not, but where
    # half the product is too large, the difference is, too. Up to 1 the second half is 0 and changes nothing.
    half = xp.where(weight > 1, 0.5 * weight, xp.zeros_like(weight)) if is_array(weight) else 0.5 * weight
    return loss - (weight - half) * reference_loss - half * reference_loss


def scaled_difference(
    loss: Array, reference_loss: Array, weight: float | Array, xp: Namespace
) -> tuple[Array, float | Array]:
    """Return the excess loss times a power of 2, at most 1/2, and that power: always finite, and in the same order."""
    dtype = wide_dtype(loss.dtype, xp)
    loss, reference_loss = (xp.astype(array, dtype, copy=False) for array in (loss, reference_loss))
    scale: float | Array
    if is_array(weight):
        scale = 0.25 / power_of_two(xp.where(weight > 1, weight, xp.ones_like(weight)), xp)
    else:
        scale = math.ldexp(0.5, -math.frexp(max(weight, 1.0))[1])
    return scale * loss - (scale * weight) * reference_loss, scale
