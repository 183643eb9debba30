"""The contrastive step of a batch that is distributed over several ranks, in two phases.

A rank is one of W processes. Every rank holds some rows of the batch. Z is the table of the similarities of all images
(rows) with all texts (columns). An anchor is an image or a text; ``anchor.py`` defines the anchor's negatives and the
estimate u. No rank computes the whole table Z. A rank computes two blocks of Z:

    row block       its own images x all texts    for its image anchors, and for its images as negatives of all texts
    column block    all images x its own texts    for its text anchors, and for its texts as negatives of all images

In phase 1 each rank reads the features of all ranks and updates the estimates u of its own anchors. In phase 2 each
rank also reads the updated estimates of all ranks and computes the gradient of its own rows. This file simulates the
ranks in one process: a phase of a rank is one call of a function. The data that the ranks exchange are an argument of
the call: ``_Features`` in phase 1, ``_Estimates`` in phase 2.

Source: FastCLIP, arXiv 2407.01445. There, too, ranks exchange estimates and similarities of positives, not gradients.
"""

from __future__ import annotations

import math
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
    batch_size,
    feature_pair,
    gammas,
    log_estimates,
    non_negative,
    reference_pair,
    rows_per_rank,
    temperatures,
)
from drrho_reference.anchor import Anchor, anchor_step, dot, estimate_of_state
from drrho_reference.contrastive import ContrastiveStep, negative_pairs

__all__ = ["sharded_contrastive_step"]


class _Features(NamedTuple):
    """The data that ranks exchange before phase 1.

    These are the features (n, d), the reference features (n, r), and the temperatures and anchor weights (n,).
    """

    image: FloatArray
    text: FloatArray
    reference: tuple[FloatArray, FloatArray] | None
    reference_weight: float
    temperature_image: FloatArray
    temperature_text: FloatArray
    anchor_weight_image: FloatArray
    anchor_weight_text: FloatArray

    def similarity(self, i: int, j: int) -> float:
        """Return Z_ij = <e1_i, e2_j> - lambda <r1_i, r2_j>: e1, e2 are features, r1, r2 are reference features."""
        z = dot(self.image[i], self.text[j])
        if self.reference is not None:
            z -= self.reference_weight * dot(self.reference[0][i], self.reference[1][j])
        return z


class _Estimates(NamedTuple):
    """The data that ranks exchange before phase 2; every list has one entry per row of the whole batch.

    ``positive`` holds Z_ii, the similarity of image i with its own text; image anchor i and text anchor i both use it.
    The estimate and the number of negatives of image anchor i and of text anchor i differ, so they have two lists each.
    """

    positive: list[float]
    log_inner_image: list[float]
    log_inner_text: list[float]
    number_image: list[int]
    number_text: list[int]


class _Phase1(NamedTuple):
    """The results of phase 1 on one rank. Keys are the rank's own rows. Ranks do not exchange the blocks of Z."""

    row_block: dict[int, FloatArray]
    column_block: dict[int, FloatArray]
    of_images: dict[int, Anchor]
    of_texts: dict[int, Anchor]


def sharded_contrastive_step(
    image_features: npt.ArrayLike,
    text_features: npt.ArrayLike,
    log_inner_image: npt.ArrayLike,
    log_inner_text: npt.ArrayLike,
    /,
    *,
    num_shards: int,
    temperature: Number | Pair,
    gamma: Number | Pair = 1.0,
    reference_features: Pair | None = None,
    reference_weight: float = 1.0,
    radius: float = 0.0,
    eps: float = 0.0,
    pair_mask: npt.ArrayLike | None = None,
    anchor_weight: npt.ArrayLike | Pair | None = None,
) -> list[ContrastiveStep]:
    """Process one batch as W ranks would, each with its own rows of the batch.

    Together the ranks return the same numbers as :func:`contrastive_step` returns for the whole batch.

    Parameters
    ----------
    image_features, text_features, log_inner_image, log_inner_text
        As in :func:`contrastive_step`, for the whole batch of n rows. Rank r holds the r-th block of n / W rows.
    num_shards : int
        W, a divisor of n.
    temperature, gamma, reference_features, reference_weight, radius, eps, pair_mask, anchor_weight
        As in :func:`contrastive_step`, for the whole batch. A rank reads its own rows and columns of ``pair_mask``.

    Returns
    -------
    list of ContrastiveStep
        One result per rank. The feature gradients and the estimates are those of the rank's own rows, and so are the
        temperature gradients if ``temperature`` is a pair. ``loss``, ``surrogate`` and the gradient of a single
        temperature are sums over all ranks, so they are equal on every rank.

    Raises
    ------
    TypeError, ValueError, FloatingPointError
        As in :func:`contrastive_step`, or if W does not divide n.

    Notes
    -----
    w_ij is the weight of text j as a negative of image anchor i, and w'_ij is the weight of image i as a negative of
    text anchor j. The gradient of image i is [sum_j V_ij e2_j - c_i e2_i] / 2n with V_ij = w_ij + w'_ij and
    c_i = sum_j w_ij + sum_k w'_ki. A rank computes V_ij of its own image i from the row block and the estimates of all
    ranks. It computes c_i from the weights of image anchor i and of text anchor i, which are both its own. The gradient
    of a parameter is the sum of the parts that the W ranks compute from these gradients. A data-parallel wrapper
    divides this sum by W, so with such a wrapper the gradients must be multiplied by W first.
    Source: FastCLIP, arXiv 2407.01445.

    Examples
    --------
    >>> never = [-float("inf")] * 2
    >>> batch = ([[1, 0], [0, 1]], [[1, 0], [1, 0]], never, never)
    >>> ranks = sharded_contrastive_step(*batch, num_shards=2, temperature=0.5)
    >>> [rank.log_inner_text.tolist() for rank in ranks]  # one row per rank, the values of contrastive_step
    [[-2.0], [2.0]]
    """
    image, text = feature_pair("image_features", image_features, "text_features", text_features)
    n = batch_size("image_features", image)
    share = rows_per_rank(n, num_shards)
    old_image = log_estimates("log_inner_image", log_inner_image, n)
    old_text = log_estimates("log_inner_text", log_inner_text, n)
    temperature_image, temperature_text, per_anchor = temperatures(temperature, n)
    gamma_image, gamma_text = gammas(gamma, n)
    radius, eps = non_negative("radius", radius), non_negative("eps", eps)
    is_negative = negative_pairs(pair_mask, n)
    anchor_weight_image, anchor_weight_text = anchor_weights(anchor_weight, n)
    features = _Features(
        image=image,
        text=text,
        reference=reference_pair(reference_features, n),
        reference_weight=non_negative("reference_weight", reference_weight),
        temperature_image=temperature_image,
        temperature_text=temperature_text,
        anchor_weight_image=anchor_weight_image,
        anchor_weight_text=anchor_weight_text,
    )

    # Phase 1 runs on every rank, then the ranks exchange the estimates, then phase 2 runs on every rank.
    rows = [range(start, start + share) for start in range(0, n, share)]
    phase1 = [
        _phase_1(
            own, features, old_image[own], old_text[own], gamma_image[own], gamma_text[own], is_negative, radius, eps
        )
        for own in rows
    ]
    estimates = _gather(rows, phase1, is_negative)
    gradients = [
        _phase_2(own, features, results, estimates, is_negative, eps) for own, results in zip(rows, phase1, strict=True)
    ]

    # The loss, the surrogate and the gradient of a single temperature are sums over all ranks.
    all_anchors = [anchor for results in phase1 for anchor in (*results.of_images.values(), *results.of_texts.values())]
    loss = math.fsum(anchor.loss for anchor in all_anchors) / (2 * n)
    surrogate = math.fsum(anchor.surrogate for anchor in all_anchors) / (2 * n)
    shared = math.fsum(anchor.temperature_gradient for anchor in all_anchors) / (2 * n)
    steps = []
    for results, (image_gradient, text_gradient) in zip(phase1, gradients, strict=True):
        # A rank keeps the temperature gradients and states of its own anchors; n is the size of the whole batch.
        of_images, of_texts = list(results.of_images.values()), list(results.of_texts.values())
        own_temperatures = (
            np.array([anchor.temperature_gradient for anchor in of_images]) / (2 * n),
            np.array([anchor.temperature_gradient for anchor in of_texts]) / (2 * n),
        )
        steps.append(
            ContrastiveStep(
                loss=loss,
                surrogate=surrogate,
                image_gradient=image_gradient,
                text_gradient=text_gradient,
                temperature_gradient=own_temperatures if per_anchor else shared,
                log_inner_image=np.array([anchor.log_inner for anchor in of_images]),
                log_inner_text=np.array([anchor.log_inner for anchor in of_texts]),
            )
        )
    return steps


def _phase_1(
    own: range,
    features: _Features,
    old_image: FloatArray,
    old_text: FloatArray,
    gamma_image: FloatArray,
    gamma_text: FloatArray,
    is_negative: BoolArray,
    radius: float,
    eps: float,
) -> _Phase1:
    """Compute phase 1 of one rank: its two blocks of Z and the updated estimates of its own anchors.

    ``old_image``, ``old_text``, ``gamma_image`` and ``gamma_text`` hold the rank's own rows only.
    """
    n = len(features.image)
    results = _Phase1({}, {}, {}, {})
    for local, a in enumerate(own):
        # Image a with all texts, then all images with text a.
        results.row_block[a] = np.array([features.similarity(a, j) for j in range(n)])
        results.column_block[a] = np.array([features.similarity(i, a) for i in range(n)])
        results.of_images[a] = anchor_step(
            results.row_block[a],
            a,
            [j for j in range(n) if is_negative[a, j]],
            float(old_image[local]),
            float(features.temperature_image[a]),
            float(gamma_image[local]),
            radius,
            eps,
            float(features.anchor_weight_image[a]),
        )
        results.of_texts[a] = anchor_step(
            results.column_block[a],
            a,
            [i for i in range(n) if is_negative[i, a]],
            float(old_text[local]),
            float(features.temperature_text[a]),
            float(gamma_text[local]),
            radius,
            eps,
            float(features.anchor_weight_text[a]),
        )
    return results


def _gather(rows: Sequence[range], phase1: Sequence[_Phase1], is_negative: BoolArray) -> _Estimates:
    """Collect the data that ranks exchange between the phases: five numbers per row."""
    estimates = _Estimates([], [], [], [], [])
    for own, results in zip(rows, phase1, strict=True):
        for a in own:
            # Z_aa is in both blocks of the rank that owns row a, and in no block of other ranks.
            estimates.positive.append(float(results.row_block[a][a]))
            estimates.log_inner_image.append(results.of_images[a].log_inner)
            estimates.log_inner_text.append(results.of_texts[a].log_inner)
            estimates.number_image.append(int(is_negative[a, :].sum()))
            estimates.number_text.append(int(is_negative[:, a].sum()))
    return estimates


def _phase_2(
    own: range, features: _Features, results: _Phase1, estimates: _Estimates, is_negative: BoolArray, eps: float
) -> tuple[FloatArray, FloatArray]:
    """Compute phase 2 of one rank: the gradients of its own rows, from its two blocks and all ranks' estimates."""
    n = len(features.image)
    image_gradient, text_gradient = np.zeros((2, len(own), features.image.shape[1]))
    for local, a in enumerate(own):
        of_image, of_text = results.of_images[a].weights, results.of_texts[a].weights
        # c is the sum of all weights of image anchor a and of text anchor a.
        c = math.fsum(of_image) + math.fsum(of_text)
        for k in range(n):
            # Image a as a negative of text anchor k, which may belong to another rank.
            as_negative = 0.0
            if is_negative[a, k]:
                # w'_ak = exp((Z_ak - Z_kk) / t'_k) / (eps + u'_k) / N'_k, where N'_k is the number of negatives of text
                # anchor k. The rank received Z_kk, t'_k, u'_k and N'_k in the exchanges.
                D = (results.row_block[a][k] - estimates.positive[k]) / features.temperature_text[k]
                u = estimate_of_state(estimates.log_inner_text[k])
                as_negative = features.anchor_weight_text[k] * math.exp(D) / (eps + u) / estimates.number_text[k]
            image_gradient[local] += (of_image[k] + as_negative) * features.text[k] / (2 * n)
            # Text a as a negative of image anchor k.
            as_negative = 0.0
            if is_negative[k, a]:
                # w_ka is computed in the same way: image anchor k with text a as the negative.
                D = (results.column_block[a][k] - estimates.positive[k]) / features.temperature_image[k]
                u = estimate_of_state(estimates.log_inner_image[k])
                as_negative = features.anchor_weight_image[k] * math.exp(D) / (eps + u) / estimates.number_image[k]
            text_gradient[local] += (of_text[k] + as_negative) * features.image[k] / (2 * n)
        # Every exponent of image anchor a and of text anchor a contains -Z_aa. So the gradient of Z_aa has the factor
        # -c.
        image_gradient[local] -= c * features.text[a] / (2 * n)
        text_gradient[local] -= c * features.image[a] / (2 * n)
    return image_gradient, text_gradient
