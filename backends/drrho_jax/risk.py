"""The DRRho risk as a differentiable JAX function: the gradient is the vector of worst-case weights."""

from __future__ import annotations

from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from drrho_core import risk
from drrho_core.ambiguity import AmbiguitySet
from drrho_jax.arguments import as_constants, as_jax_array, as_jax_option
from drrho_jax.gradient import with_gradient

Array: TypeAlias = jax.Array | np.ndarray
Scalar: TypeAlias = float | Array


def drrho_risk(
    loss: Array,
    reference_loss: Array,
    ambiguity_set: AmbiguitySet,
    /,
    *,
    reference_weight: Scalar = 1.0,
    axis: int = -1,
    where: Array | None = None,
) -> Array:
    """Return the DRRho risk, differentiable in `loss`.

    Parameters
    ----------
    loss : array, shape (..., n, ...)
        The learner's losses, real floating, any unit. Every array may be a NumPy array.
    reference_loss : array, the same shape
        The frozen reference model's losses on the same samples, in the same dtype. They get no gradient.
    ambiguity_set : AmbiguitySet
        The weights that the adversary may choose, such as ``drrho_core.CVaR(0.1)``.
    reference_weight : float or array of shape ()
        lambda >= 0, as in `drrho_core.drrho_risk`.
    axis : int
        The axis of the n samples.
    where : array of bool, optional
        Marks the samples that count, as in `drrho_core.drrho_risk`. The gradient of the other samples is 0.

    Returns
    -------
    array
        The risk, in the shape of `loss` without `axis`; a scalar if `loss` has one axis.

    Raises
    ------
    TypeError, ValueError
        As `drrho_core.drrho_risk` does.
    NotImplementedError
        If the risk is differentiated twice.

    Notes
    -----
    The derivative of the risk with respect to the loss of sample i is the worst-case weight of sample i (Danskin's
    theorem), so JAX does not differentiate the solver. Forward and reverse mode both work, as in `contrastive_loss`.
    The risk is that of DRRho (arXiv 2505.06699).

    Examples
    --------
    >>> from drrho_core import CVaR
    >>> loss, reference_loss = jnp.asarray([3.0, 2.0, 1.0]), jnp.asarray([2.9, 0.5, 0.5])
    >>> risk, gradient = jax.value_and_grad(drrho_risk)(loss, reference_loss, CVaR(0.5))  # one sample and a half
    >>> round(float(risk), 4), [round(weight, 4) for weight in gradient.tolist()]
    (1.1667, [0.0, 0.6667, 0.3333])
    """
    like = loss if isinstance(loss, jax.Array) else reference_loss
    loss = as_jax_array("loss", loss, like)
    reference_loss = as_jax_array("reference_loss", reference_loss, like)
    where = as_jax_array("where", where, like)
    # The solver gets constants, so JAX differentiates none of its steps.
    worst = risk.drrho_risk(
        *as_constants((loss, reference_loss)),
        ambiguity_set,
        reference_weight=as_constants(as_jax_option("reference_weight", reference_weight, like)),
        axis=axis,
        where=where,
        xp=jnp,
    )
    # The risk gets an axis of length 1 in the place of the axis of the n samples: `with_gradient` sums over that axis.
    return jnp.squeeze(with_gradient(jnp.expand_dims(worst.risk, axis), [loss], [worst.weights]), axis)
