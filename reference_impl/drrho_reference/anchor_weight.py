"""The pair loss, a measure of how badly a pair fits, and weights of anchors that are computed from pair losses.

The weights reduce the influence of wrong captions.

A pair has two anchors, its image and its text. The pair loss is the mean over both anchors of log g, where g, defined
in ``contrastive.py``, compares the anchor's negatives with its positive. A pair with a loss above 0 fits worse than a
random pair. So the pair losses of a reference model, even of a briefly trained one, show wrong captions. A falling
sigmoid of these losses gives the factors that ``contrastive_step``, ``unimodal_contrastive_step`` and ``info_nce`` take
as ``anchor_weight``.

Source: FastCLIP, arXiv 2407.01445, for the pair loss. The sigmoid of pair losses was designed for this library.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from drrho_reference._checks import FloatArray, batch_size, number, positive, real_array
from drrho_reference.anchor import inner_estimate, pair_similarities
from drrho_reference.contrastive import negative_pairs

__all__ = ["pair_loss", "reference_anchor_weight"]


def pair_loss(
    image_features: npt.ArrayLike,
    text_features: npt.ArrayLike,
    /,
    *,
    temperature: float,
    pair_mask: npt.ArrayLike | None = None,
) -> FloatArray:
    """Measure how badly each pair fits, compared with the other pairs of the batch.

    Parameters
    ----------
    image_features, text_features : array (b, d)
        Features of unit norm, b >= 2; row i of both is pair i.
    temperature : float
        t, above 0.
    pair_mask : array (b, b) of bool, optional
        False for a pair that is left out of both means: text j for image i, and image i for text j.

    Returns
    -------
    array (b,) of float64
        One number per pair: below 0 if the pair fits better than a random pair, above 0 if it fits worse.

    Raises
    ------
    TypeError, ValueError
        If shapes do not fit, values leave their domains, or b = 1.
    FloatingPointError
        If an exponential leaves the range of float64: a difference of similarities above about 700 temperatures.

    Notes
    -----
    l_i = 1/2 log mean_{j != i} exp((s_ij - s_ii) / t) + 1/2 log mean_{j != i} exp((s_ji - s_ii) / t),
    s_ij = <e1_i, e2_j>, the product of the features of image i and of text j. The two terms of l_i are 1/2 log g_i and
    1/2 log h_i; ``contrastive.py`` defines g_i for image i and h_i for text i. With a mask each mean is over the pairs
    that the mask leaves, and the term of a mean without pairs is 0. Source: FastCLIP, arXiv 2407.01445.

    Examples
    --------
    Each image fits both texts equally well (log g = 0). Text 0 fits image 1 worse than its own image (log h = -2), and
    text 1 fits image 0 better than its own image (log h = 2).

    >>> pair_loss([[1, 0], [0, 1]], [[1, 0], [1, 0]], temperature=0.5).tolist()
    [-1.0, 1.0]
    """
    S = pair_similarities(image_features, text_features)
    b, t = batch_size("image_features", S), positive("temperature", temperature)
    is_negative = negative_pairs(pair_mask, b)
    losses = np.zeros(b)
    for i in range(b):
        # The mean of log g of the image anchor and of the text anchor; an anchor without negatives counts as 0.
        texts = [j for j in range(b) if is_negative[i, j]]
        if texts:
            losses[i] += math.log(inner_estimate(S[i, :], i, texts, t)) / 2.0
        images = [j for j in range(b) if is_negative[j, i]]
        if images:
            losses[i] += math.log(inner_estimate(S[:, i], i, images, t)) / 2.0
    return losses


def reference_anchor_weight(
    pair_loss: npt.ArrayLike, /, *, temperature: float = 0.5, threshold: float = -1.0
) -> FloatArray:
    """Turn a reference model's pair losses into weights of anchors: small for pairs that do not fit.

    Parameters
    ----------
    pair_loss : array of real numbers, any shape but empty
        The reference model's pair losses, as :func:`pair_loss` returns them.
    temperature : float
        Above 0: the width of the sigmoid's step from 1 to 0, in units of the loss.
    threshold : float
        The loss at which the sigmoid is 1/2, half of its largest value.

    Returns
    -------
    array of float64, the shape of ``pair_loss``
        Weights of at least 0 with mean 1.

    Raises
    ------
    TypeError, ValueError
        If the losses are no finite real numbers, ``pair_loss`` is empty, or a number leaves its domain.

    Notes
    -----
    a_i = sigmoid(-(l_i - threshold) / temperature), divided by the mean of these numbers.

    Examples
    --------
    sigmoid(log 3) = 3/4 and sigmoid(0) = 1/2 have the mean 5/8.

    >>> reference_anchor_weight([-1.0 - math.log(3) / 2, -1.0]).round(6).tolist()
    [1.2, 0.8]
    """
    losses = real_array("pair_loss", pair_loss)
    if losses.size == 0:
        raise ValueError("pair_loss must have at least one entry, got none")
    width, middle = positive("temperature", temperature), number("threshold", threshold)
    # Logarithms are used because every sigmoid may underflow if all pairs fit badly; their ratios do not underflow.
    logarithms = np.empty(losses.shape)
    for index in np.ndindex(losses.shape):
        y = (float(losses[index]) - middle) / width
        logarithms[index] = -max(y, 0.0) - math.log1p(math.exp(-abs(y)))  # log sigmoid(-y)
    weights = np.empty(losses.shape)
    for index in np.ndindex(losses.shape):
        weights[index] = math.exp(logarithms[index] - logarithms.max())
    # The weights are divided by their mean, so that their mean is 1 and the loss keeps its size.
    mean = math.fsum(weights[index] for index in np.ndindex(losses.shape)) / losses.size
    for index in np.ndindex(losses.shape):
        weights[index] /= mean
    return weights
