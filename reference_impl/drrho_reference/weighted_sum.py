"""The weighted sum of losses of one batch, and its gradients."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from drrho_reference._checks import FloatArray, number, real_array, real_matrix

__all__ = ["WeightedSum", "weighted_sum"]


class WeightedSum(NamedTuple):
    """The loss of :func:`weighted_sum` and its gradients.

    ``parameter_gradients`` has one mapping per term, from names of gradients to gradients.
    """

    loss: float
    image_gradient: FloatArray
    text_gradient: FloatArray
    parameter_gradients: tuple[dict[str, Any], ...]


def weighted_sum(*terms: tuple[float, Any]) -> WeightedSum:
    """Add up losses of the same features, each with its weight.

    Parameters
    ----------
    *terms : pair of (weight, result)
        A number, and the result of a loss, of ``contrastive_step`` or of ``weighted_sum``.

    Returns
    -------
    WeightedSum
        ``loss``, feature gradients (b, d), and for each term the gradients of the term's parameters (such as the
        temperature), times the weight of the term. If two terms share a temperature, the caller adds their temperature
        gradients.

    Raises
    ------
    TypeError, ValueError
        If there is no term, a term is no such pair, or the gradients' shapes differ.

    Notes
    -----
    The gradient of a sum is the sum of the gradients. Source: calculus.

    Examples
    --------
    >>> from drrho_reference import hinge_margin_loss, info_nce
    >>> features = [[1, 0], [0.6, 0.8]], [[1, 0], [0, 0.5]]
    >>> hinge = hinge_margin_loss(*features, margin=0.1)
    >>> clip = info_nce(*features, temperature=0.5)
    >>> total = weighted_sum((2.0, hinge), (0.5, clip))
    >>> total.loss == 2.0 * hinge.loss + 0.5 * clip.loss
    True
    >>> [list(gradients) for gradients in total.parameter_gradients]
    [[], ['temperature_gradient']]
    """
    if not terms:
        raise ValueError("terms must hold at least one pair of (weight, result), got none")
    losses, parameter_gradients = [], []
    image_gradient, text_gradient = np.zeros(0), np.zeros(0)
    for position, term in enumerate(terms):
        if not isinstance(term, tuple) or len(term) != 2 or not hasattr(term[1], "image_gradient"):
            raise TypeError(f"terms[{position}] must be a pair of (weight, result of a loss), got {term!r}")
        weight, result = number(f"terms[{position}][0]", term[0]), term[1]
        of_image = real_matrix(f"terms[{position}].image_gradient", result.image_gradient)
        of_text = real_array(f"terms[{position}].text_gradient", result.text_gradient, of_image.shape)
        # All terms are functions of the same features, so all gradients have the shape of the first term's gradients.
        if position == 0:
            image_gradient, text_gradient = np.zeros(of_image.shape), np.zeros(of_image.shape)
        elif of_image.shape != image_gradient.shape:
            raise ValueError(
                f"terms[{position}] must have gradients of the shape {image_gradient.shape}, got {of_image.shape}"
            )
        # Losses and feature gradients are added. Each term has its own parameters, whose gradients stay separate.
        losses.append(weight * float(result.loss))
        image_gradient = image_gradient + weight * of_image
        text_gradient = text_gradient + weight * of_text
        parameter_gradients.append(_parameter_gradients(weight, result))
    return WeightedSum(math.fsum(losses), image_gradient, text_gradient, tuple(parameter_gradients))


def _parameter_gradients(weight: float, result: Any) -> dict[str, Any]:
    """Return all gradients of a result except the feature gradients, times the weight; a pair stays a pair."""
    gradients: dict[str, Any] = {}
    for name in result._fields:
        value = getattr(result, name)
        if name.endswith("_gradient") and name not in ("image_gradient", "text_gradient"):
            # A pair of arrays holds one gradient per image anchor and one per text anchor.
            pair = isinstance(value, tuple)
            gradients[name] = tuple(weight * np.asarray(side) for side in value) if pair else weight * float(value)
    return gradients
