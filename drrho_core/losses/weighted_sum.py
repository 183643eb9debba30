"""Weighted sums of losses: the gradient of the sum is the sum of the gradients.

loss = sum_k a_k loss_k,   and likewise for the gradients with respect to features and parameters
"""

from __future__ import annotations

from typing import Any

from drrho_core import _validate
from drrho_core._array_api import Array, Namespace, Scalar, is_array, wide_dtype
from drrho_core._validate import FINITE
from drrho_core.contrastive.tiles import cast
from drrho_core.losses.results import FEATURES, WeightedSum


def weighted_sum(*terms: tuple[Scalar, Any], xp: Namespace | None = None) -> WeightedSum:
    """Return the weighted sum of losses of the same features, such as DRRho plus distillation.

    Parameters
    ----------
    *terms : pair of (weight, result)
        A finite weight (a float or an array of shape ()) and a result: that of a loss, of `contrastive_step` or of
        another weighted sum. All results belong to the same features.
    xp : namespace, optional
        The arrays' namespace; pass it under ``torch.compile``.

    Returns
    -------
    WeightedSum
        Sum of the losses and of the features' gradients, and the weighted parameter gradients of every term.

    Raises
    ------
    TypeError, ValueError
        If there is no term, if a term is not such a pair, or if the results differ in shape, dtype, library or device.

    Notes
    -----
    The gradient of a sum is the sum of the gradients. The gradients of a `ContrastiveStep` are those of its field
    `surrogate` and not those of its field `loss`. The gradients of parameters are not added, because only the caller
    knows whether the temperatures of two terms are the same parameter. Nothing is exchanged between ranks: if all terms
    are results of ranks that share a batch, so is the sum, with the same rules for a wrapper that averages gradients.

    Examples
    --------
    >>> import numpy as np
    >>> from drrho_core import hinge_margin_loss, info_nce
    >>> features = np.eye(3), np.eye(3)[[0, 2, 1]]
    >>> clip, hinge = info_nce(*features, temperature=0.5), hinge_margin_loss(*features, margin=0.2)
    >>> total = weighted_sum((1.0, clip), (0.5, hinge))
    >>> bool(np.isclose(total.loss, clip.loss + 0.5 * hinge.loss))
    True
    >>> [list(gradients) for gradients in total.parameter_gradients]
    [['temperature_gradient'], []]
    """
    if not terms:
        raise ValueError("weighted_sum must get at least one pair (weight, result), got none")
    arrays: dict[str, Array] = {}
    features: dict[str, Array] = {}
    for n, term in enumerate(terms):
        if not isinstance(term, (tuple, list)) or len(term) != 2:
            raise TypeError(f"terms[{n}] must be a pair (weight, result), got {_validate.describe(term)}")
        weight, result = term
        if not all(field in getattr(result, "_fields", ()) for field in ("loss", *FEATURES)):
            raise TypeError(
                f"terms[{n}][1] must be a named tuple with loss, image_gradient and text_gradient, "
                f"got {_validate.describe(result)}"
            )
        features |= {f"terms[{n}][1].{field}": getattr(result, field) for field in FEATURES}
        # A number or a NumPy scalar, such as a sum over all entries of an array, needs no check against the arrays.
        scalars = {f"terms[{n}][0]": weight, f"terms[{n}][1].loss": result.loss}
        arrays |= {name: value for name, value in scalars.items() if is_array(value)}
    call = _validate.arrays(features | arrays, xp)
    xp = call.xp
    call.same_dtype(*features)
    first = next(iter(features.values()))
    for name, array in features.items():
        _validate.shape(name, array, tuple(first.shape), "(batch_size, feature_dim)")

    # Losses and gradients are added in float32 or wider and rounded to the features' dtype once, at the end.
    work = wide_dtype(first.dtype, xp)
    total: list[Array] = []
    parameters: list[dict[str, Any]] = []
    for n, (weight, result) in enumerate(terms):
        weight = _validate.parameter(f"terms[{n}][0]", weight, FINITE, xp, dtype=work)
        parts = [
            _times(weight, part, xp)
            for part in (
                result.loss,
                xp.astype(result.image_gradient, work),
                xp.astype(result.text_gradient, work),
            )
        ]
        total = [old + new for old, new in zip(total, parts, strict=True)] if total else parts
        # A result that is a weighted sum itself already has one dict of parameter gradients per term.
        dicts = result.parameter_gradients if isinstance(result, WeightedSum) else (_parameter_gradients(result),)
        parameters += [{name: _times(weight, gradient, xp) for name, gradient in term.items()} for term in dicts]
    loss, image_gradient, text_gradient = total
    return WeightedSum(
        loss=loss,
        image_gradient=xp.astype(image_gradient, first.dtype),
        text_gradient=xp.astype(text_gradient, first.dtype),
        parameter_gradients=tuple(parameters),
    )


def _parameter_gradients(result: Any) -> dict[str, Any]:
    """Return the gradients of a result with respect to parameters, by field name."""
    names = [name for name in result._fields if name.endswith("_gradient")]
    return {name: getattr(result, name) for name in names if name not in FEATURES}


def _times(weight: Scalar, gradient: Any, xp: Namespace) -> Any:
    """Multiply a gradient, or both gradients of a pair, by a weight, and keep the dtype."""
    if isinstance(gradient, tuple):
        return tuple(_times(weight, side, xp) for side in gradient)
    return cast(weight, gradient.dtype, xp) * gradient
