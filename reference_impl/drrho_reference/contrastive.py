"""The global contrastive loss with a reference model, SogCLR's estimator of this loss, and the gradients, pair by pair.

    S = E1 E2^T,   R = R1 R2^T,   Z = S - lambda R                        (rows: images, columns: texts)
    image anchor i, over texts  j != i:   D_ij  = (Z_ij - Z_ii) / t_i     g_i = mean_j exp(D_ij)
    text  anchor j, over images i != j:   D'_ij = (Z_ij - Z_jj) / t'_j    h_j = mean_i exp(D'_ij)
    objective = (1/2n) sum_i t_i (log(eps + g_i) + radius)  +  the same for text anchors

E1 and E2 hold the features of images and of texts, R1 and R2 those of the reference model; t and t' are temperatures,
and n is the number of pairs in the data set. A batch holds only some of an anchor's negatives, so each anchor keeps u,
a moving average of its g (or h).

Image anchors and text anchors are treated alike. An anchor has a list of similarities, a row of Z for an image and a
column of Z for a text, and its positive is at the anchor's own position. The code works in the linear domain: with u, g
and exp(D) themselves, not with their logarithms. If one of them leaves the range of float64, a FloatingPointError is
raised.

Sources: SogCLR, arXiv 2202.12387, for u and the gradient; FastCLIP, arXiv 2407.01445, for the objective with
temperatures and radius; DRRho, arXiv 2505.06699, for the reference model.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from drrho_reference._checks import (
    BoolArray,
    FloatArray,
    Number,
    Pair,
    anchor_weights,
    batch_size,
    gammas,
    log_estimates,
    mask,
    non_negative,
    temperatures,
)
from drrho_reference.anchor import anchor_step, feature_gradients, inner_estimate, pair_similarities

__all__ = ["ContrastiveStep", "contrastive_objective", "contrastive_step", "negative_pairs"]


class ContrastiveStep(NamedTuple):
    """Result of :func:`contrastive_step`.

    ``loss`` estimates the objective and is the value to monitor. ``surrogate`` is the scalar whose gradients, as
    autograd computes them, are in the fields below; its value is not meant to be monitored.
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
    """Process one batch of the global contrastive loss: update the estimates, then compute the loss and gradients.

    Parameters
    ----------
    image_features, text_features : array (b, d)
        Features of unit norm, b >= 2; row i of both is pair i.
    log_inner_image, log_inner_text : array (b,)
        Logarithms of the estimates u of these samples; -inf for samples that were never visited.
    temperature : float, or a pair of arrays (b,)
        Above 0. A pair holds one temperature per image anchor and one per text anchor.
    gamma : float, or a pair of arrays (b,)
        Weight of the batch's g in the moving average, in (0, 1]. A pair holds one gamma per image anchor and one per
        text anchor.
    reference_features : pair of arrays (b, r), optional
        The frozen reference model's features.
    reference_weight : float
        lambda, at least 0.
    radius : float
        At least 0. A radius above 0 changes no feature gradient, so it is useful only if temperatures are learned.
    eps : float
        The number that is added to u in log(eps + u), at least 0.
    pair_mask : array (b, b) of bool, optional
        Row i: image i; column j: text j. False means that the pair is not a negative. Pairs on the diagonal are never
        negatives.
    anchor_weight : array (b,), or a pair of arrays (b,), optional
        At least 0: a factor on each anchor's contribution to loss and gradients, 1 by default. Entry i of a single
        array is the factor of image anchor i and of text anchor i.

    Returns
    -------
    ContrastiveStep
        ``loss`` and ``surrogate`` are floats. The feature gradients have the shape (b, d). ``temperature_gradient`` is
        a float or, if ``temperature`` is a pair, a pair of arrays (b,). The new logarithms have the shape (b,).

    Raises
    ------
    TypeError, ValueError
        If shapes do not fit, values leave their domains, or b = 1.
    FloatingPointError
        If an exponential leaves the range of float64: |D| or |log u| above about 700.

    Notes
    -----
    loss = (1/2b) sum_i [a_i t_i (log(eps + u_i) + radius) + the same for text anchors], where a_i is the anchor's
    weight. The docstring of this module defines the other symbols.
    Sources: SogCLR, arXiv 2202.12387; FastCLIP, arXiv 2407.01445; iSogCLR, arXiv 2305.11965, for a temperature per
    anchor; DRRho, arXiv 2505.06699.

    Examples
    --------
    There are two pairs, so each anchor has one negative. Each image fits both texts equally well (D = 0). Text 0 fits
    image 1 worse than its own image (D = -2), and text 1 fits image 0 better than its own image (D = 2).

    >>> never = [-float("inf")] * 2
    >>> step = contrastive_step([[1, 0], [0, 1]], [[1, 0], [1, 0]], never, never, temperature=0.5)
    >>> step.log_inner_image.tolist(), step.log_inner_text.tolist()
    ([0.0, 0.0], [-2.0, 2.0])
    >>> step.loss, step.temperature_gradient
    (0.0, 0.0)
    """
    # Z of the batch, and the checked arguments of every anchor.
    similarities = pair_similarities(
        image_features, text_features, reference_features=reference_features, reference_weight=reference_weight
    )
    b = batch_size("image_features", similarities)
    old_image = log_estimates("log_inner_image", log_inner_image, b)
    old_text = log_estimates("log_inner_text", log_inner_text, b)
    temperature_image, temperature_text, per_anchor = temperatures(temperature, b)
    gamma_image, gamma_text = gammas(gamma, b)
    radius, eps = non_negative("radius", radius), non_negative("eps", eps)
    is_negative = negative_pairs(pair_mask, b)
    factor_image, factor_text = anchor_weights(anchor_weight, b)

    # Every index is an image anchor (a row of Z) and a text anchor (a column of Z), each with its own state log u.
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

    # The feature gradients need the weights of all anchors: W has image anchors as rows, W' text anchors as columns.
    all_anchors = of_images + of_texts
    image_gradient, text_gradient = feature_gradients(
        np.array([anchor.weights for anchor in of_images]),  # an image anchor's weights are a row
        np.array([anchor.weights for anchor in of_texts]).T,  # a text anchor's weights are a column
        image_features,
        text_features,
    )
    # All sums over the 2b anchors are divided by 2b. The gradient of a single temperature is the sum over all anchors.
    gradient_image = np.array([anchor.temperature_gradient for anchor in of_images]) / (2 * b)
    gradient_text = np.array([anchor.temperature_gradient for anchor in of_texts]) / (2 * b)
    return ContrastiveStep(
        loss=math.fsum(anchor.loss for anchor in all_anchors) / (2 * b),
        surrogate=math.fsum(anchor.surrogate for anchor in all_anchors) / (2 * b),
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
    """Evaluate the objective itself on all n pairs, with g and h themselves instead of estimates u.

    Parameters
    ----------
    image_features, text_features : array (n, d)
        Features of unit norm of the whole data set, n >= 2.
    temperature, reference_features, reference_weight, radius, eps, pair_mask, anchor_weight
        As in :func:`contrastive_step`.

    Returns
    -------
    float
        (1/2n) sum_i [a_i t_i (log(eps + g_i) + radius) + a'_i t'_i (log(eps + h_i) + radius)], where a_i and a'_i are
        the weights of image anchor i and of text anchor i.

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
    Every anchor has one negative with D = -1 / 0.5, so the value is 0.5 log exp(-2).

    >>> contrastive_objective([[1, 0], [0, 1]], [[1, 0], [0, 1]], temperature=0.5)
    -1.0
    """
    Z = pair_similarities(
        image_features, text_features, reference_features=reference_features, reference_weight=reference_weight
    )
    n = batch_size("image_features", Z)
    temperature_image, temperature_text, _ = temperatures(temperature, n)
    radius, eps = non_negative("radius", radius), non_negative("eps", eps)
    is_negative = negative_pairs(pair_mask, n)
    factor_image, factor_text = anchor_weights(anchor_weight, n)
    total = []
    # Each anchor with negatives adds t (log(eps + g) + radius), times the anchor's weight.
    for i in range(n):
        # Image anchor i: its negatives are texts, in row i.
        texts = [j for j in range(n) if is_negative[i, j]]
        if texts:
            t = float(temperature_image[i])
            total.append(float(factor_image[i]) * t * (math.log(eps + inner_estimate(Z[i, :], i, texts, t)) + radius))
        # Text anchor i: its negatives are images, in column i.
        images = [j for j in range(n) if is_negative[j, i]]
        if images:
            t = float(temperature_text[i])
            total.append(float(factor_text[i]) * t * (math.log(eps + inner_estimate(Z[:, i], i, images, t)) + radius))
    return math.fsum(total) / (2 * n)


# ---------------------------------------------------------------------------------------------------------------------
# Checks
# ---------------------------------------------------------------------------------------------------------------------


def negative_pairs(pair_mask: npt.ArrayLike | None, b: int) -> BoolArray:
    """Mark the pairs (i, j) in which image i and text j are negatives of each other; never the diagonal."""
    if pair_mask is not None and np.shape(pair_mask) != (b, b):
        raise ValueError(f"pair_mask must have the shape {(b, b)}, got {np.shape(pair_mask)}")
    # An image and its own text are never negatives of each other, whatever the mask's diagonal holds.
    allowed = mask("pair_mask", True if pair_mask is None else pair_mask, (b, b))
    return allowed & ~np.eye(b, dtype=np.bool_)
