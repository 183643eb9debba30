"""InfoNCE, the loss of plain CLIP, to compare with.

Source: CLIP, arXiv 2103.00020; InfoNCE, arXiv 1807.03748.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from drrho_reference._checks import FloatArray, positive, real_array, real_matrix
from drrho_reference.contrastive import pair_similarities

__all__ = ["PairLoss", "cross_entropy", "info_nce"]


class PairLoss(NamedTuple):
    """A loss of a batch of pairs and its gradients."""

    loss: float
    image_gradient: FloatArray
    text_gradient: FloatArray
    temperature_gradient: float


def cross_entropy(logits: npt.ArrayLike, target: int, /) -> tuple[float, list[float]]:
    """Compare the softmax of logits with one correct answer: -log q_target, q = softmax(logits).

    Parameters
    ----------
    logits : array (n,)
        Of any size and sign; the largest is subtracted before exp.
    target : int
        The position of the correct answer.

    Returns
    -------
    loss : float
        At least 0.
    gradient : list of float (n,)
        Its gradient in the logits, q_j - [j = target].

    Raises
    ------
    TypeError, ValueError
        If the logits are no finite real numbers along one axis.

    Notes
    -----
    -log q_target = log sum_j exp(l_j - max) - (l_target - max). Source: the softmax regression of any textbook.

    Examples
    --------
    >>> loss, gradient = cross_entropy([0.0, 0.0], 1)
    >>> round(loss, 6), gradient
    (0.693147, [0.5, -0.5])
    """
    values = real_array("logits", logits)
    if values.ndim != 1:
        raise ValueError(f"logits must have one axis, got the shape {values.shape}")
    shifted = [float(value - values.max()) for value in values]
    total = math.fsum(math.exp(value) for value in shifted)
    gradient = [math.exp(value) / total for value in shifted]
    gradient[target] -= 1.0
    return math.log(total) - shifted[target], gradient


def info_nce(
    image_features: npt.ArrayLike, text_features: npt.ArrayLike, /, *, temperature: float | npt.ArrayLike
) -> PairLoss:
    """Classify the right text for each image and the right image for each text.

    Parameters
    ----------
    image_features, text_features : array (b, d)
        Features of unit norm; row i of both is pair i.
    temperature : float
        t, above 0.

    Returns
    -------
    PairLoss
        ``loss``, gradients (b, d) and ``temperature_gradient``. Not multiplied by the temperature.

    Raises
    ------
    TypeError, ValueError
        If shapes do not fit or values leave their domains.

    Notes
    -----
    loss = (1/2b) sum_i [CE(S_i: / t, i) + CE(S_:i / t, i)], S_ij = <e1_i, e2_j>, the positive among the candidates.
    Source: CLIP, arXiv 2103.00020.

    Examples
    --------
    Nothing to tell the two pairs apart: log 2.

    >>> round(info_nce([[1, 0], [1, 0]], [[1, 0], [1, 0]], temperature=0.1).loss, 6)
    0.693147
    """
    S = pair_similarities(image_features, text_features)
    image, text = real_matrix("image_features", image_features), real_matrix("text_features", text_features)
    t, b = positive("temperature", temperature), S.shape[0]
    losses = []
    logit_gradient = np.zeros((b, b))
    for i in range(b):
        loss, gradient = cross_entropy(S[i, :] / t, i)
        losses.append(loss)
        for j in range(b):
            logit_gradient[i, j] += gradient[j] / (2 * b)
        loss, gradient = cross_entropy(S[:, i] / t, i)
        losses.append(loss)
        for j in range(b):
            logit_gradient[j, i] += gradient[j] / (2 * b)

    image_gradient, text_gradient = np.zeros_like(image), np.zeros_like(text)
    temperature_terms = []
    for i in range(b):
        for j in range(b):
            image_gradient[i] += logit_gradient[i, j] * text[j] / t
            text_gradient[j] += logit_gradient[i, j] * image[i] / t
            temperature_terms.append(-logit_gradient[i, j] * S[i, j] / t**2)
    return PairLoss(math.fsum(losses) / (2 * b), image_gradient, text_gradient, math.fsum(temperature_terms))
