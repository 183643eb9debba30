"""The global contrastive loss with a reference model, SogCLR's estimator of it, and their gradients: pair by pair.

    S = E1 E2^T,   R = R1 R2^T,   Z = S - lambda R                        (rows: images, columns: texts)
    image anchor i, over texts  j != i:   D_ij  = (Z_ij - Z_ii) / t_i     g_i = mean_j exp(D_ij)
    text  anchor j, over images i != j:   D'_ij = (Z_ij - Z_jj) / t'_j    h_j = mean_i exp(D'_ij)
    objective = (1/2n) sum_i t_i (log(eps + g_i) + radius)  +  the same for text anchors

A batch sees only some of an anchor's negatives, so each anchor keeps u, a moving average of its g.

An anchor is treated the same way in both directions: it has a list of similarities, Z's row for an image and Z's column
for a text, and its positive stands at the anchor's own position. Everything is in the linear domain (u, g and exp, no
log of a sum), so float64 ends where exp(D) or u leaves its range: then a FloatingPointError says so.

Sources: SogCLR, arXiv 2202.12387, for u and the gradient; FastCLIP, arXiv 2407.01445, for the objective with
temperatures and radius; DRRho, arXiv 2505.06699, for the reference model inside.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from drrho_reference._checks import (
    BoolArray,
    FloatArray,
    Number,
    Pair,
    anchor_weights,
    feature_pair,
    gammas,
    log_estimates,
    mask,
    non_negative,
    real_array,
    reference_pair,
    temperatures,
)

__all__ = [
    "ContrastiveStep",
    "contrastive_objective",
    "contrastive_step",
    "feature_gradients",
    "inner_estimate",
    "moving_average",
    "pair_exponents",
    "pair_similarities",
    "pair_weights",
]


# ---------------------------------------------------------------------------------------------------------------------
# One anchor at a time: read these from top to bottom
# ---------------------------------------------------------------------------------------------------------------------


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
    Source: DRRho, arXiv 2505.06699: the excess loss of a pair is a difference of similarities.

    Examples
    --------
    >>> pair_similarities([[1.0, 0.0], [0.6, 0.8]], [[0.0, 1.0], [1.0, 0.0]]).tolist()
    [[0.0, 1.0], [0.8, 0.6]]
    """
    image, text = feature_pair("image_features", image_features, "text_features", text_features)
    weight = non_negative("reference_weight", reference_weight)
    b = image.shape[0]
    reference = reference_pair(reference_features, b)
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
    """Measure how much better each negative fits than the positive: D_j = (z_j - z_anchor) / t.

    Parameters
    ----------
    similarities : sequence of float (b,)
        Z's row of an image anchor, or Z's column of a text anchor.
    anchor : int
        Where the positive stands: the anchor's own position. With two views it is the other view's, see
        ``unimodal.py``.
    negatives : sequence of int
        The positions of its negatives.
    temperature : float
        t, above 0.

    Returns
    -------
    list of float
        One exponent per negative.

    Notes
    -----
    Source: the excess pair loss of FastCLIP, arXiv 2407.01445, and DRRho, arXiv 2505.06699.

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
        g, above 0. Below 1 the positive fits better than the negatives do.

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
        g = math.fsum(math.exp(D) for D in exponents) / len(exponents)
    except OverflowError:
        g = math.inf
    return within_range("temperature", temperature, g)


def within_range(argument: str, received: float, value: float) -> float:
    """Return a value of the linear domain, or say which argument took it out of float64's range."""
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
        The old estimate; 0 means never visited, for a mean of exponentials is above 0.
    g : float
        The batch's own estimate.
    gamma : float
        The weight of the new value, in (0, 1]; 1 has no memory.

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
    """Weigh an anchor's negatives: w_j = exp(D_j) / (eps + u) / N, N the number of negatives.

    Parameters
    ----------
    similarities, anchor, negatives, temperature
        As in :func:`pair_exponents`.
    u : float
        The anchor's updated estimate.
    eps : float
        The floor in log(eps + u), at least 0.

    Returns
    -------
    list of float (b,)
        0 at the anchor and at what is no negative. Without memory and floor they sum to 1.

    Notes
    -----
    The factor that the chain rule gives each pair; no gradient runs through u. Source: SogCLR, arXiv 2202.12387.

    Examples
    --------
    >>> weights = pair_weights([0.5, 1.0, 0.0], 1, [0, 2], 0.5, 0.251607)
    >>> [round(weight, 4) for weight in weights]
    [0.7311, 0.0, 0.2689]
    """
    weights = [0.0] * len(similarities)
    exponents = pair_exponents(similarities, anchor, negatives, temperature)
    for j, D in zip(negatives, exponents, strict=True):
        weights[j] = math.exp(D) / (eps + u) / len(negatives)
    return weights


class Anchor(NamedTuple):
    """What one anchor adds, before the division by 2 b."""

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
    """Do one anchor: update u, then its loss t (L + radius) with L = log(eps + u), and what follows from it.

    surrogate: t (L + radius) + t g / (eps + u), of which autograd would see only g and the t of t (L + radius).
    temperature gradient: L + radius - sum_j w_j D_j.
    ``factor``, the anchor's own weight, multiplies all three and the weights w_j of its negatives, but not its state.
    Without negatives it adds nothing and keeps its state.
    """
    if not negatives:
        return Anchor(0.0, 0.0, 0.0, [0.0] * len(similarities), log_inner)
    g = inner_estimate(similarities, anchor, negatives, temperature)
    u = moving_average(estimate_of_state(log_inner), g, gamma)
    weights = pair_weights(similarities, anchor, negatives, temperature, u, eps=eps)
    exponents = pair_exponents(similarities, anchor, negatives, temperature)
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
    """Return u for log u: 0 where never visited (-inf)."""
    if log_inner == -math.inf:
        return 0.0
    try:
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
        Row i: image i; column j: text j; the weights of image anchors and of text anchors, 0 on the diagonal.
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
    The temperatures cancel: t_i times the change of D_ij is the change of Z_ij - Z_ii. So the pair (i, j) adds
    w_ij d(Z_ij - Z_ii) / 2b for the image anchor i and w'_ij d(Z_ij - Z_jj) / 2b for the text anchor j, where
    d Z_ij / d e1_i = e2_j and d Z_ij / d e2_j = e1_i. Source: SogCLR, arXiv 2202.12387.

    Examples
    --------
    Only image 0 as an anchor: it is pushed from text 1 to text 0.

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
            w = of_images[i, j] / (2 * b)  # Z_ij - Z_ii
            image_gradient[i] += w * (text[j] - text[i])
            text_gradient[j] += w * image[i]
            text_gradient[i] -= w * image[i]
            w = of_texts[i, j] / (2 * b)  # Z_ij - Z_jj
            text_gradient[j] += w * (image[i] - image[j])
            image_gradient[i] += w * text[j]
            image_gradient[j] -= w * text[j]
    return image_gradient, text_gradient


# ---------------------------------------------------------------------------------------------------------------------
# The batch
# ---------------------------------------------------------------------------------------------------------------------


class ContrastiveStep(NamedTuple):
    """What :func:`contrastive_step` returns.

    ``loss`` is the estimate of the objective, to be watched; ``surrogate`` is what autograd would see: the gradients
    are its gradients, and its value means nothing.
    """

    loss: float
    surrogate: float
    image_gradient: FloatArray
    text_gradient: FloatArray
    temperature_gradient: float | tuple[FloatArray, FloatArray]
    log_inner_image: FloatArray
    log_inner_text: FloatArray


def contrastive_step(
    image_features: npt.ArrayLike,
    text_features: npt.ArrayLike,
    log_inner_image: npt.ArrayLike,
    log_inner_text: npt.ArrayLike,
    /,
    *,
    temperature: Number | Pair,
    gamma: Number | Pair = 1.0,
    reference_features: Pair | None = None,
    reference_weight: float = 1.0,
    radius: float = 0.0,
    eps: float = 0.0,
    pair_mask: npt.ArrayLike | None = None,
    anchor_weight: npt.ArrayLike | Pair | None = None,
) -> ContrastiveStep:
    """Do one batch of the global contrastive loss: update the estimates, then loss and gradients.

    Parameters
    ----------
    image_features, text_features : array (b, d)
        Features of unit norm, b >= 2; row i of both is pair i.
    log_inner_image, log_inner_text : array (b,)
        Logarithms of the estimates u of these samples; -inf: never visited.
    temperature : float, or a pair of arrays (b,)
        Above 0; a pair gives every image anchor and every text anchor its own.
    gamma : float, or a pair of arrays (b,)
        Weight of the batch's value in the moving average, in (0, 1].
    reference_features : pair of arrays (b, r), optional
        The frozen reference model's features.
    reference_weight : float
        lambda, at least 0.
    radius : float
        At least 0; above 0 only where temperatures are learned.
    eps : float
        The floor in log(eps + u), at least 0.
    pair_mask : array (b, b) of bool, optional
        Row i: image i; column j: text j; False: not a negative. The diagonal never is one.
    anchor_weight : array (b,), or a pair of arrays (b,), optional
        At least 0: a factor on each anchor's part of loss and gradients, 1 if left out. One array serves image anchor i
        and text anchor i alike.

    Returns
    -------
    ContrastiveStep
        ``loss`` and ``surrogate`` float; gradients (b, d); ``temperature_gradient`` a float or, where ``temperature``
        is a pair, a pair of (b,); the new logarithms (b,).

    Raises
    ------
    TypeError, ValueError
        If shapes do not fit, values leave their domains, or b = 1.
    FloatingPointError
        If the linear domain leaves float64's range: |D| or |log u| above about 700.

    Notes
    -----
    loss = (1/2b) sum_i [a_i t_i (log(eps + u_i) + radius) + the same for text anchors], a_i the anchor's weight; see
    the top of this module.
    Sources: SogCLR, arXiv 2202.12387; FastCLIP, arXiv 2407.01445; iSogCLR, arXiv 2305.11965, for a temperature per
    anchor; DRRho, arXiv 2505.06699.

    Examples
    --------
    Two pairs, so one negative each. Image 0 fits text 1 as well as its own (D = 0), image 1 fits text 0 worse (D = -2).

    >>> never = [-float("inf")] * 2
    >>> step = contrastive_step([[1, 0], [0, 1]], [[1, 0], [1, 0]], never, never, temperature=0.5)
    >>> step.log_inner_image.tolist(), step.log_inner_text.tolist()
    ([0.0, 0.0], [-2.0, 2.0])
    >>> step.loss, step.temperature_gradient
    (0.0, 0.0)
    """
    similarities = pair_similarities(
        image_features, text_features, reference_features=reference_features, reference_weight=reference_weight
    )
    b = batch_size(similarities)
    old_image = log_estimates("log_inner_image", log_inner_image, b)
    old_text = log_estimates("log_inner_text", log_inner_text, b)
    temperature_image, temperature_text, per_anchor = temperatures(temperature, b)
    gamma_image, gamma_text = gammas(gamma, b)
    radius, eps = non_negative("radius", radius), non_negative("eps", eps)
    is_negative = negative_pairs(pair_mask, b)
    factor_image, factor_text = anchor_weights(anchor_weight, b)

    of_images, of_texts = [], []
    for anchor in range(b):
        of_images.append(
            anchor_step(
                similarities[anchor, :],
                anchor,
                [j for j in range(b) if is_negative[anchor, j]],
                float(old_image[anchor]),
                float(temperature_image[anchor]),
                float(gamma_image[anchor]),
                radius,
                eps,
                float(factor_image[anchor]),
            )
        )
        of_texts.append(
            anchor_step(
                similarities[:, anchor],
                anchor,
                [i for i in range(b) if is_negative[i, anchor]],
                float(old_text[anchor]),
                float(temperature_text[anchor]),
                float(gamma_text[anchor]),
                radius,
                eps,
                float(factor_text[anchor]),
            )
        )

    everybody = of_images + of_texts
    image_gradient, text_gradient = feature_gradients(
        np.array([anchor.weights for anchor in of_images]),  # an image anchor's weights are a row
        np.array([anchor.weights for anchor in of_texts]).T,  # a text anchor's weights are a column
        image_features,
        text_features,
    )
    gradient_image = np.array([anchor.temperature_gradient for anchor in of_images]) / (2 * b)
    gradient_text = np.array([anchor.temperature_gradient for anchor in of_texts]) / (2 * b)
    return ContrastiveStep(
        loss=math.fsum(anchor.loss for anchor in everybody) / (2 * b),
        surrogate=math.fsum(anchor.surrogate for anchor in everybody) / (2 * b),
        image_gradient=image_gradient,
        text_gradient=text_gradient,
        temperature_gradient=(
            (gradient_image, gradient_text) if per_anchor else math.fsum([*gradient_image, *gradient_text])
        ),
        log_inner_image=np.array([anchor.log_inner for anchor in of_images]),
        log_inner_text=np.array([anchor.log_inner for anchor in of_texts]),
    )


def contrastive_objective(
    image_features: npt.ArrayLike,
    text_features: npt.ArrayLike,
    /,
    *,
    temperature: Number | Pair,
    reference_features: Pair | None = None,
    reference_weight: float = 1.0,
    radius: float = 0.0,
    eps: float = 0.0,
    pair_mask: npt.ArrayLike | None = None,
    anchor_weight: npt.ArrayLike | Pair | None = None,
) -> float:
    """Evaluate the objective itself on all n pairs: no state, no gamma, no estimate.

    Parameters
    ----------
    image_features, text_features : array (n, d)
        Features of unit norm of the whole data set, n >= 2.
    temperature, reference_features, reference_weight, radius, eps, pair_mask, anchor_weight
        As in :func:`contrastive_step`.

    Returns
    -------
    float
        (1/2n) sum_i [a_i t_i (log(eps + g_i) + radius) + a'_i t'_i (log(eps + h_i) + radius)].

    Raises
    ------
    TypeError, ValueError, FloatingPointError
        As in :func:`contrastive_step`.

    Notes
    -----
    :func:`contrastive_step` with gamma = 1 on all pairs gives this value and its exact gradient.
    Sources: SogCLR, arXiv 2202.12387; FastCLIP, arXiv 2407.01445; DRRho, arXiv 2505.06699.

    Examples
    --------
    Every image and text meets one negative with D = -1 / 0.5, so the value is 0.5 log exp(-2).

    >>> contrastive_objective([[1, 0], [0, 1]], [[1, 0], [0, 1]], temperature=0.5)
    -1.0
    """
    Z = pair_similarities(
        image_features, text_features, reference_features=reference_features, reference_weight=reference_weight
    )
    n = batch_size(Z)
    temperature_image, temperature_text, _ = temperatures(temperature, n)
    radius, eps = non_negative("radius", radius), non_negative("eps", eps)
    is_negative = negative_pairs(pair_mask, n)
    factor_image, factor_text = anchor_weights(anchor_weight, n)
    total = []
    for i in range(n):
        texts = [j for j in range(n) if is_negative[i, j]]
        if texts:
            t = float(temperature_image[i])
            total.append(float(factor_image[i]) * t * (math.log(eps + inner_estimate(Z[i, :], i, texts, t)) + radius))
        images = [j for j in range(n) if is_negative[j, i]]
        if images:
            t = float(temperature_text[i])
            total.append(float(factor_text[i]) * t * (math.log(eps + inner_estimate(Z[:, i], i, images, t)) + radius))
    return math.fsum(total) / (2 * n)


# ---------------------------------------------------------------------------------------------------------------------
# Checks
# ---------------------------------------------------------------------------------------------------------------------


def batch_size(similarities: FloatArray) -> int:
    """Return b, at least 2: a pair alone has no negatives."""
    b = len(similarities)
    if b < 2:
        raise ValueError(f"image_features must have at least 2 rows, got {b}")
    return b


def negative_pairs(pair_mask: npt.ArrayLike | None, b: int) -> BoolArray:
    """Mark where image i and text j are negatives of each other; never on the diagonal."""
    if pair_mask is not None and np.shape(pair_mask) != (b, b):
        raise ValueError(f"pair_mask must have the shape {(b, b)}, got {np.shape(pair_mask)}")
    allowed = mask("pair_mask", True if pair_mask is None else pair_mask, (b, b))
    return allowed & ~np.eye(b, dtype=np.bool_)
