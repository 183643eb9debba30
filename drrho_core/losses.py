"""Contrastive losses to compare with, each with its value and closed-form gradients."""

from __future__ import annotations

from typing import NamedTuple

from drrho_core import _checks, _pairs
from drrho_core._arrays import Array, Namespace, namespace_of, wide_dtype
from drrho_core.contrastive import Scalar, check_features, optional_arrays, per_anchor, positive, prepare
from drrho_core.numerics import log_add_constant


class LossGradients(NamedTuple):
    """A loss and its gradients.

    Attributes
    ----------
    loss : array, shape ()
        The value.
    image_gradient, text_gradient : array, shape (b, d)
        Its gradient with respect to the features, in their dtype.
    temperature_gradient : array, shape ()
        Its gradient with respect to the temperature.
    """

    loss: Array
    image_gradient: Array
    text_gradient: Array
    temperature_gradient: Array


def info_nce(
    image_features: Array,
    text_features: Array,
    /,
    *,
    temperature: Scalar,
    tile_size: int | None = None,
    memory_budget: int | None = None,
    xp: Namespace | None = None,
) -> LossGradients:
    """Return CLIP's loss: cross-entropy of the scaled similarities over rows and over columns, averaged.

    Parameters
    ----------
    image_features, text_features : array, shape (b, d)
        Features of the batch, unit norm (not enforced), b >= 2. Row i of both is a positive pair.
    temperature : float or array of shape ()
        Temperature tau > 0.
    tile_size, memory_budget : int, optional
        How it is computed, never what: see `contrastive_step`.
    xp : namespace, optional
        The arrays' namespace; pass it under ``torch.compile``.

    Returns
    -------
    LossGradients
        Loss (not multiplied by tau) and gradients.

    Raises
    ------
    TypeError, ValueError
        As `contrastive_step`.

    Notes
    -----
    With S = E1 E2^T and the positive on the diagonal, anchor i contributes ``log sum_j exp((S_ij - S_ii) / tau)`` where
    j = i counts 1: InfoNCE as in CLIP (arXiv 2103.00020). ``contrastive_step`` with ``gamma=1`` and ``eps=1/(b-1)`` and
    no reference is exactly tau times (this - log(b - 1)).

    Examples
    --------
    >>> import numpy as np
    >>> result = info_nce(np.eye(3), np.eye(3), temperature=0.5)
    >>> round(float(result.loss), 6), round(float(np.log(1 + 2 * np.exp(-2))), 6)
    (0.239545, 0.239545)
    """
    arrays = {"image_features": image_features, "text_features": text_features}
    arrays |= optional_arrays(temperature=temperature)
    xp = namespace_of(arrays, xp)
    batch_size = check_features(arrays, xp)
    temperature = _checks.parameter("temperature", temperature, positive, "be > 0", xp)
    temperatures = per_anchor(temperature, image_features, wide_dtype(image_features.dtype, xp), xp)
    pairs = prepare(
        image_features, text_features, temperatures, tile_size=tile_size, memory_budget=memory_budget, xp=xp
    )
    negatives = _pairs.sum_negatives(pairs, xp=xp)
    # The positive itself is one more term of the sum: exp(0).
    log_image, log_text = (log_add_constant(side.log_sum, 1.0, xp=xp) for side in negatives)
    sums = _pairs.pull_back(pairs, log_image, log_text, xp=xp)
    scale = 1.0 / (2.0 * batch_size)
    tau = temperatures[0][0]
    return LossGradients(
        loss=scale * (xp.sum(log_image) + xp.sum(log_text)),
        image_gradient=xp.astype(scale / tau * sums.image_pull, image_features.dtype),
        text_gradient=xp.astype(scale / tau * sums.text_pull, text_features.dtype),
        temperature_gradient=-scale / tau * (xp.sum(sums.weighted_image) + xp.sum(sums.weighted_text)),
    )
