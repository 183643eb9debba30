"""The contrastive loss of a single anchor: read these functions from top to bottom.

An anchor is an image, which is compared with all texts, or a text, which is compared with all images. Z is the table of
these similarities; an anchor's similarities are a row of Z for an image and a column of Z for a text. The anchor's
positive is the other half of its own pair, at the anchor's own position; its negatives are at other positions.
``contrastive.py`` combines all anchors of a batch.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from drrho_reference._checks import FloatArray, Pair, feature_pair, non_negative, real_array, reference_pair

__all__ = [
    "Anchor",
    "anchor_step",
    "dot",
    "estimate_of_state",
    "feature_gradients",
    "inner_estimate",
    "moving_average",
    "pair_exponents",
    "pair_similarities",
    "pair_weights",
    "within_range",
]


def pair_similarities(
    image_features: npt.ArrayLike,
    text_features: npt.ArrayLike,
    /,
    *,
    reference_features: Pair | None = None,
    reference_weight: float = 1.0,
) -> FloatArray:
    """Compare every image with every text: Z_ij = <e1_i, e2_j> - lambda <r1_i, r2_j>.

    Parameters
    ----------
    image_features, text_features : array (b, d)
        Features of unit norm; row i of both is pair i.
    reference_features : pair of arrays (b, r), optional
        The frozen reference model's image and text features. r may differ from d.
    reference_weight : float
        lambda, at least 0.

    Returns
    -------
    array (b, b) of float64
        Row i: image i; column j: text j.

    Raises
    ------
    TypeError, ValueError
        If shapes do not fit, entries are not finite, or lambda is no number of at least 0.

    Notes
    -----
    e1_i and e2_j are the features of image i and of text j; r1_i and r2_j are the reference model's features of the
    same image and text. Source: DRRho, arXiv 2505.06699, in which the excess loss of a pair is this difference.

    Examples
    --------
    >>> pair_similarities([[1.0, 0.0], [0.6, 0.8]], [[0.0, 1.0], [1.0, 0.0]]).tolist()
    [[0.0, 1.0], [0.8, 0.6]]
    """
    image, text = feature_pair("image_features", image_features, "text_features", text_features)
    weight = non_negative("reference_weight", reference_weight)
    b = image.shape[0]
    reference = reference_pair(reference_features, b)
    # Z = S - lambda R, entry by entry.
    similarities = np.empty((b, b))
    for i in range(b):
        for j in range(b):
            similarities[i, j] = dot(image[i], text[j])
            if reference is not None:
                similarities[i, j] -= weight * dot(reference[0][i], reference[1][j])
    return similarities


def dot(left: FloatArray, right: FloatArray) -> float:
    """Return <left, right>."""
    return math.fsum(float(a) * float(b) for a, b in zip(left, right, strict=True))


def pair_exponents(
    similarities: Sequence[float] | FloatArray, anchor: int, negatives: Sequence[int], temperature: float, /
) -> list[float]:
    """Measure how much better each negative fits than the positive: D_j = (z_j - z_anchor) / t, z the similarities.

    Parameters
    ----------
    similarities : sequence of float (b,)
        The row of Z that belongs to an image anchor, or the column of Z that belongs to a text anchor.
    anchor : int
        The position of the positive, which is the anchor's own position. With two views of one modality the positive is
        at the position of the other view, see ``unimodal.py``.
    negatives : sequence of int
        The positions of the anchor's negatives.
    temperature : float
        t, above 0.

    Returns
    -------
    list of float
        One exponent per negative.

    Notes
    -----
    Sources: FastCLIP, arXiv 2407.01445, and, for the excess loss of a pair, DRRho, arXiv 2505.06699.

    Examples
    --------
    >>> pair_exponents([0.5, 1.0, 0.0], 1, [0, 2], 0.5)
    [-1.0, -2.0]
    """
    return [(float(similarities[j]) - float(similarities[anchor])) / temperature for j in negatives]


def inner_estimate(
    similarities: Sequence[float] | FloatArray, anchor: int, negatives: Sequence[int], temperature: float, /
) -> float:
    """Average the exponentials of an anchor's negatives: g = mean_j exp(D_j).

    Parameters
    ----------
    similarities, anchor, negatives, temperature
        As in :func:`pair_exponents`.

    Returns
    -------
    float
        g, above 0. If g is below 1, the positive fits better than the negatives do.

    Raises
    ------
    FloatingPointError
        If g or one of the exponentials leaves the range of float64.

    Notes
    -----
    Source: SogCLR, arXiv 2202.12387.

    Examples
    --------
    >>> round(inner_estimate([0.5, 1.0, 0.0], 1, [0, 2], 0.5), 6)  # (e^-1 + e^-2) / 2
    0.251607
    """
    exponents = pair_exponents(similarities, anchor, negatives, temperature)
    try:
        # The mean is over the negatives only, without the positive.
        g = math.fsum(math.exp(D) for D in exponents) / len(exponents)
    except OverflowError:
        g = math.inf
    return within_range("temperature", temperature, g)


def within_range(argument: str, received: float, value: float) -> float:
    """Return the value if float64 can hold it at full precision; otherwise raise an error that names the argument."""
    if not sys.float_info.min <= value <= sys.float_info.max:
        raise FloatingPointError(
            f"{argument} must keep the linear domain within the range of float64, got {received} (value {value})"
        )
    return value


def moving_average(u: float, g: float, gamma: float, /) -> float:
    """Move the estimate towards the batch's value: u <- (1 - gamma) u + gamma g, and u <- g on the first visit.

    Parameters
    ----------
    u : float
        The old estimate. 0 means that the sample was never visited: a mean of exponentials is above 0.
    g : float
        The mean exponential of this batch.
    gamma : float
        The weight of g, in (0, 1]. With 1 the old estimate has no influence.

    Returns
    -------
    float
        The new estimate.

    Notes
    -----
    Source: SogCLR, arXiv 2202.12387.

    Examples
    --------
    >>> moving_average(2.0, 4.0, 0.25), moving_average(0.0, 4.0, 0.25)
    (2.5, 4.0)
    """
    # On the first visit the new estimate is g, whatever gamma is, because u = 0 is no estimate.
    return g if u == 0.0 else (1.0 - gamma) * u + gamma * g


def pair_weights(
    similarities: Sequence[float] | FloatArray,
    anchor: int,
    negatives: Sequence[int],
    temperature: float,
    u: float,
    /,
    *,
    eps: float = 0.0,
) -> list[float]:
    """Compute the weights of an anchor's negatives: w_j = exp(D_j) / (eps + u) / N, N the number of negatives.

    Parameters
    ----------
    similarities, anchor, negatives, temperature
        As in :func:`pair_exponents`.
    u : float
        The anchor's updated estimate.
    eps : float
        The number that is added to u in log(eps + u), at least 0.

    Returns
    -------
    list of float (b,)
        One weight per position. The weight is 0 at the positive and at positions that are no negatives. With gamma = 1
        and eps = 0 the weights sum to 1.

    Notes
    -----
    By the chain rule the gradient of an anchor's loss t log(eps + g) is t times the sum over j of w_j times the
    gradient of D_j; w_j contains the estimate u instead of g. Source: SogCLR, arXiv 2202.12387.

    Examples
    --------
    >>> weights = pair_weights([0.5, 1.0, 0.0], 1, [0, 2], 0.5, 0.251607)
    >>> [round(weight, 4) for weight in weights]
    [0.7311, 0.0, 0.2689]
    """
    weights = [0.0] * len(similarities)
    exponents = pair_exponents(similarities, anchor, negatives, temperature)
    # w_j = exp(D_j) / (eps + u) / N; eps is added to u, not to log u.
    for j, D in zip(negatives, exponents, strict=True):
        weights[j] = math.exp(D) / (eps + u) / len(negatives)
    return weights


class Anchor(NamedTuple):
    """The contribution of one anchor to the loss and the gradients, before the division by 2 b."""

    loss: float
    surrogate: float
    temperature_gradient: float
    weights: list[float]
    log_inner: float


def anchor_step(
    similarities: FloatArray,
    anchor: int,
    negatives: list[int],
    log_inner: float,
    temperature: float,
    gamma: float,
    radius: float,
    eps: float,
    factor: float,
) -> Anchor:
    """Process one anchor: update u, then compute the loss t (L + radius) with L = log(eps + u), and the gradients.

    The surrogate is t (L + radius) + t g / (eps + u). Its gradient is the gradient of the step if autograd holds L, u
    and the t before g constant. The temperature gradient is L + radius - sum_j w_j D_j.
    ``factor``, the anchor's own weight, multiplies the loss, the surrogate, the temperature gradient and the weights
    w_j of the negatives, but not the state. An anchor without negatives contributes 0, and its state is unchanged.
    """
    # If a mask leaves no negatives, the anchor has no loss, and u is unchanged.
    if not negatives:
        return Anchor(0.0, 0.0, 0.0, [0.0] * len(similarities), log_inner)
    # u is updated first, because the loss and the weights use the new estimate.
    g = inner_estimate(similarities, anchor, negatives, temperature)
    u = moving_average(estimate_of_state(log_inner), g, gamma)
    weights = pair_weights(similarities, anchor, negatives, temperature, u, eps=eps)
    exponents = pair_exponents(similarities, anchor, negatives, temperature)
    # L + radius, and the temperature gradient d/dt [t (L(t) + radius)] = L + radius - sum_j w_j D_j.
    level = math.log(eps + u) + radius
    slope = level - math.fsum(weights[j] * D for j, D in zip(negatives, exponents, strict=True))
    return Anchor(
        loss=factor * temperature * level,
        surrogate=factor * temperature * (level + g / (eps + u)),
        temperature_gradient=factor * slope,
        weights=[factor * weight for weight in weights],
        log_inner=math.log(u),
    )


def estimate_of_state(log_inner: float) -> float:
    """Return u for log u: 0 for a sample that was never visited (-inf)."""
    if log_inner == -math.inf:
        return 0.0
    try:
        # The state is log u, without eps.
        u = math.exp(log_inner)
    except OverflowError:
        u = math.inf
    return within_range("log_inner", log_inner, u)


def feature_gradients(
    image_weights: npt.ArrayLike,
    text_weights: npt.ArrayLike,
    image_features: npt.ArrayLike,
    text_features: npt.ArrayLike,
    /,
) -> tuple[FloatArray, FloatArray]:
    """Add up the feature gradients, one pair and one direction at a time.

    Parameters
    ----------
    image_weights, text_weights : array (b, b)
        Weights w_ij of image anchors and w'_ij of text anchors, 0 on the diagonal. Row i: image i; column j: text j.
    image_features, text_features : array (b, d)
        The features.

    Returns
    -------
    image_gradient, text_gradient : array (b, d) of float64

    Raises
    ------
    TypeError, ValueError
        If shapes do not fit or entries are not finite.

    Notes
    -----
    The temperatures cancel: the loss has the factor t_i, and D_ij = (Z_ij - Z_ii) / t_i. So the pair (i, j) adds
    w_ij d(Z_ij - Z_ii) / 2b for the image anchor i and w'_ij d(Z_ij - Z_jj) / 2b for the text anchor j, where
    d Z_ij / d e1_i = e2_j and d Z_ij / d e2_j = e1_i. Source: SogCLR, arXiv 2202.12387.

    Examples
    --------
    Only image 0 is an anchor. A descent step moves it away from text 1 and towards text 0.

    >>> image, text = feature_gradients([[0, 1], [0, 0]], [[0, 0], [0, 0]], [[1, 0], [0, 1]], [[0.6, 0.8], [1, 0]])
    >>> image.tolist(), text.tolist()
    ([[0.1, -0.2], [0.0, 0.0]], [[-0.25, 0.0], [0.25, 0.0]])
    """
    image, text = feature_pair("image_features", image_features, "text_features", text_features)
    b = image.shape[0]
    of_images, of_texts = (
        real_array("image_weights", image_weights, (b, b)),
        real_array("text_weights", text_weights, (b, b)),
    )
    image_gradient, text_gradient = np.zeros_like(image), np.zeros_like(text)
    for i in range(b):
        for j in range(b):
            # Image anchor i: its exponent contains Z_ij (row i, column j) and the positive Z_ii.
            w = of_images[i, j] / (2 * b)  # the factor of Z_ij - Z_ii
            image_gradient[i] += w * (text[j] - text[i])
            text_gradient[j] += w * image[i]
            text_gradient[i] -= w * image[i]
            # Text anchor j: its exponent contains Z_ij too, but the positive is Z_jj.
            w = of_texts[i, j] / (2 * b)  # the factor of Z_ij - Z_jj
            text_gradient[j] += w * (image[i] - image[j])
            image_gradient[i] += w * text[j]
            image_gradient[j] -= w * text[j]
    return image_gradient, text_gradient
