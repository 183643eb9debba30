"""The worst case over an ambiguity set: risk, worst-case weights, and dual variables that prove both are right.

`worst_case` checks its arguments. `solve_unchecked` moves the axis of the samples to the end, converts half types to
float32, replaces entries that do not count, and calls the solver of the set. No solver branches on the values of
arrays: a solver sorts, takes a fixed number of search steps, and selects values with ``where``. Therefore a compiler
can trace the solvers, and they never wait for a device.

Sources: DRRho risk: arXiv 2505.06699. Docs: docs/theory/ambiguity.md.
"""

from __future__ import annotations

from typing import NamedTuple

from drrho_core import _validate
from drrho_core._array_api import Array, Namespace, known, wide_dtype
from drrho_core.ambiguity.checks import check_ambiguity_set, check_losses, check_values, largest_usable
from drrho_core.ambiguity.sets import AmbiguitySet
from drrho_core.ambiguity.slices import Slices, count


class WorstCase(NamedTuple):
    """Result of `worst_case` and `drrho_risk`. All arrays have the dtype of the losses.

    Attributes
    ----------
    risk : array
        The largest weighted mean, minus the penalty if the set is a penalty, in the losses' shape without `axis`.
    weights : array
        The weights at which the risk is attained, in the losses' shape. They sum to 1 along `axis`, and they are the
        derivative of `risk` with respect to the losses.
    dual : tuple of two arrays
        ``(nu, s)``, each in the shape of `risk`: the threshold and the scale of the dual form. They prove that no
        weights give a larger risk.
    """

    risk: Array
    weights: Array
    dual: tuple[Array, Array]


def worst_case(
    losses: Array,
    ambiguity_set: AmbiguitySet,
    /,
    *,
    axis: int = -1,
    where: Array | None = None,
    xp: Namespace | None = None,
) -> WorstCase:
    """Return the worst-case risk over an ambiguity set, its weights and its dual variables, along one axis.

    Parameters
    ----------
    losses : array, shape (..., n, ...)
        Real floating losses, in any unit; they may be negative. Half types are computed in float32.
    ambiguity_set : AmbiguitySet
        One of `CVaR`, `KLPenalty`, `CappedKLPenalty`, `KLBall`, `ChiSquarePenalty`, `ChiSquareBall`,
        `CressieReadBall`.
    axis : int
        The axis of the n samples; every slice along this axis is a separate problem.
    where : array of bool, optional
        Marks the entries that count; it is broadcast to the losses' shape. Other entries are never read, so they may
        be nan. They have weight 0 and do not count in n.
    xp : namespace, optional
        The arrays' namespace; needed under ``torch.compile`` only.

    Returns
    -------
    WorstCase
        `risk` without `axis`, `weights` in the losses' shape, `dual` = (nu, s), all in the losses' dtype.

    Raises
    ------
    TypeError
        If an argument has a wrong type, or the arrays come from different libraries.
    ValueError
        If the axis does not exist or is empty, `where` does not broadcast or marks no entry of a slice, arrays are on
        different devices, a loss that counts is nan, infinite or so large that sums would overflow, or the losses
        require gradients. Values are checked on the host and outside tracing only. Elsewhere a slice with
        such a loss, or without a marked entry, gets the result nan.

    Notes
    -----
    By Danskin's theorem the derivative of the risk with respect to the losses is `weights`, so no gradient through the
    solver is needed. Equal losses have equal weights. Autograd treats the results as constants.

    Examples
    --------
    >>> import numpy as np
    >>> from drrho_core import CVaR
    >>> worst = worst_case(np.asarray([[0.0, 1.0, 2.0], [5.0, 5.0, np.nan]]), CVaR(0.5),
    ...                    where=np.asarray([[True, True, True], [True, True, False]]))
    >>> worst.weights.round(3).tolist()
    [[0.0, 0.333, 0.667], [0.5, 0.5, 0.0]]
    """
    check_ambiguity_set(ambiguity_set)
    call = check_losses({"losses": losses}, where, xp)
    axis = _validate.axis(axis, "losses", losses)
    check_values(call, "losses", losses, axis, where)
    return solve_unchecked(losses, ambiguity_set, axis, where, losses.dtype, call.xp)


def solve_unchecked(
    losses: Array, ambiguity_set: AmbiguitySet, axis: int, where: Array | None, dtype: object, xp: Namespace
) -> WorstCase:
    """Solve without checks and return results in `dtype`.

    The results of a slice are nan if a loss that counts is unusable, or if no loss counts.
    """
    x = _axis_moved(xp.astype(losses, wide_dtype(losses.dtype, xp), copy=False), axis, -1, xp)
    limit = largest_usable(losses, axis, xp)
    if where is None:
        counted = xp.ones_like(x, dtype=xp.bool)
        valid = (xp.max(x, axis=-1, keepdims=True) <= limit) & (xp.min(x, axis=-1, keepdims=True) >= -limit)
    else:
        counted = _axis_moved(xp.broadcast_to(where, losses.shape), axis, -1, xp)
        usable = (xp.abs(x) <= limit) | ~counted
        valid = xp.all(usable, axis=-1, keepdims=True) & xp.any(counted, axis=-1, keepdims=True)
    plain = where is None and known(valid, xp)
    if not plain:
        # The losses of an invalid slice are replaced by 0, so that no solver has to handle them. At the end the results
        # of this slice are replaced by nan.
        counted = counted | ~valid
        x = xp.where(counted & valid, x, xp.zeros_like(x))
        # An entry that does not count becomes the smallest loss that counts, so it changes no maximum and no minimum.
        bottom = xp.min(xp.where(counted, x, xp.inf), axis=-1, keepdims=True)
        x = xp.where(counted, x, bottom)
    top = xp.max(x, axis=-1, keepdims=True)
    number = count(counted, xp)
    solution = ambiguity_set.solve(Slices(x, counted, number, xp.astype(number, x.dtype), top), xp)

    def finish(array: Array) -> Array:
        return xp.astype(array if plain else xp.where(valid, array, xp.nan), dtype, copy=False)

    # Only s can exceed the range of a half type; the other results cannot.
    scale = xp.where(solution.scale > float(xp.finfo(dtype).max), xp.inf, solution.scale)
    risk, nu, scale = (
        xp.squeeze(finish(array), axis=-1) for array in (top + solution.excess, top + solution.nu_excess, scale)
    )
    return WorstCase(risk, _axis_moved(finish(solution.weights), -1, axis, xp), (nu, scale))


def _axis_moved(array: Array, source: int, destination: int, xp: Namespace) -> Array:
    """Return ``moveaxis(array, source, destination)`` by a permutation, because `torch.vmap` cannot map `moveaxis`."""
    order = list(range(array.ndim))
    order.insert(destination % array.ndim, order.pop(source))
    return xp.permute_dims(array, tuple(order))
