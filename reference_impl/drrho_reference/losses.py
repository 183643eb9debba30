"""Other losses of a batch of pairs, for comparison with DRRho: InfoNCE, SigLIP, distillation, hinge margin.

Each loss is a function of the table of similarities S_ij = <e1_i, e2_j> (rows: images, columns: texts). Each function
computes dS_ij, the derivative of the loss in S_ij, and from it the gradients in the features,
dE1_i = sum_j dS_ij e2_j and dE2_j = sum_i dS_ij e1_i.

Sources: CLIP, arXiv 2103.00020, and InfoNCE, arXiv 1807.03748; SigLIP, arXiv 2303.15343; MobileCLIP, arXiv 2311.17049,
for the distillation; TuneCLIP, arXiv 2601.09859, for the hinge.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from drrho_reference._checks import (
    FloatArray,
    Pair,
    anchor_weights,
    batch_size,
    feature_pair,
    non_negative,
    number,
    positive,
    real_array,
    real_matrix,
)
from drrho_reference.anchor import pair_similarities
from drrho_reference.contrastive import negative_pairs

__all__ = [
    "HingeLoss",
    "PairLoss",
    "SigmoidLoss",
    "cross_entropy",
    "distillation_loss",
    "hinge_margin_loss",
    "info_nce",
    "sigmoid_loss",
    "soft_cross_entropy",
]


class PairLoss(NamedTuple):
    """A loss of a batch of pairs and its gradients."""

    loss: float
    image_gradient: FloatArray
    text_gradient: FloatArray
    temperature_gradient: float


def cross_entropy(logits: npt.ArrayLike, target: int, /) -> tuple[float, list[float]]:
    """Compute the cross-entropy of logits with one correct answer: -log q_target, q = softmax(logits).

    Parameters
    ----------
    logits : array (n,)
        Logits of any size and sign.
    target : int
        The position of the correct answer.

    Returns
    -------
    loss : float
        The cross-entropy, at least 0.
    gradient : list of float (n,)
        The gradient of the loss in the logits, q_j - [j = target].

    Raises
    ------
    TypeError, ValueError
        If the logits are no finite real numbers along one axis.

    Notes
    -----
    -log q_target = log sum_j exp(l_j - max) - (l_target - max). Source: softmax regression, as in any textbook.

    Examples
    --------
    >>> loss, gradient = cross_entropy([0.0, 0.0], 1)
    >>> round(loss, 6), gradient
    (0.693147, [0.5, -0.5])
    """
    values = real_array("logits", logits)
    if values.ndim != 1:
        raise ValueError(f"logits must have one axis, got the shape {values.shape}")
    # The largest logit is subtracted, so that exponentials are at most 1. The loss does not depend on this shift.
    shifted = [float(value - values.max()) for value in values]
    total = math.fsum(math.exp(value) for value in shifted)
    gradient = [math.exp(value) / total for value in shifted]
    gradient[target] -= 1.0
    return math.log(total) - shifted[target], gradient


def info_nce(
    image_features: npt.ArrayLike,
    text_features: npt.ArrayLike,
    /,
    *,
    temperature: float,
    pair_mask: npt.ArrayLike | None = None,
    anchor_weight: npt.ArrayLike | Pair | None = None,
) -> PairLoss:
    """Compute InfoNCE, the loss of classifying the right text for each image and the right image for each text.

    Parameters
    ----------
    image_features, text_features : array (b, d)
        Features of unit norm; row i of both is pair i.
    temperature : float
        t, above 0.
    pair_mask : array (b, b) of bool, optional
        False for a pair that is no candidate: text j for image i, and image i for text j. A pair on the diagonal always
        is a candidate.
    anchor_weight : array (b,), or a pair of arrays (b,), optional
        At least 0: a factor on the cross-entropy of each image and of each text, 1 by default. A single array holds the
        factors of both sides.

    Returns
    -------
    PairLoss
        ``loss``, gradients (b, d) and ``temperature_gradient``. The loss is not multiplied by the temperature.

    Raises
    ------
    TypeError, ValueError
        If shapes do not fit or values leave their domains.

    Notes
    -----
    loss = (1/2b) sum_i [a_i CE(S_i: / t, i) + a'_i CE(S_:i / t, i)] with S_ij = <e1_i, e2_j>. S_i: is row i and S_:i is
    column i. CE is the cross-entropy over all candidates, the positive included; a_i and a'_i are the weights of image
    i and of text i. With a mask, CE is taken over the candidates that the mask leaves. If the positive is the only
    candidate, CE and its gradient are 0. Source: CLIP, arXiv 2103.00020.

    Examples
    --------
    All features are equal, so both candidates have the probability 1/2 and the loss is log 2.

    >>> round(info_nce([[1, 0], [1, 0]], [[1, 0], [1, 0]], temperature=0.1).loss, 6)
    0.693147
    """
    S = pair_similarities(image_features, text_features)
    t, b = positive("temperature", temperature), S.shape[0]
    factor_image, factor_text = anchor_weights(anchor_weight, b)
    is_candidate = negative_pairs(pair_mask, b) | np.eye(b, dtype=np.bool_)
    # Row i: the right text for image i. Column i: the right image for text i. Every cross-entropy is divided by 2b.
    losses = []
    logit_gradient = np.zeros((b, b))
    for i in range(b):
        texts = [j for j in range(b) if is_candidate[i, j]]
        loss, gradient = cross_entropy([S[i, j] / t for j in texts], texts.index(i))
        losses.append(factor_image[i] * loss)
        for j, slope in zip(texts, gradient, strict=True):
            logit_gradient[i, j] += factor_image[i] * slope / (2 * b)
        images = [j for j in range(b) if is_candidate[j, i]]
        loss, gradient = cross_entropy([S[j, i] / t for j in images], images.index(i))
        losses.append(factor_text[i] * loss)
        for j, slope in zip(images, gradient, strict=True):
            logit_gradient[j, i] += factor_text[i] * slope / (2 * b)

    # dS = d(logits) / t, because the logits are S / t.
    image_gradient, text_gradient = _through_similarities(logit_gradient / t, image_features, text_features)
    return PairLoss(
        math.fsum(losses) / (2 * b), image_gradient, text_gradient, _temperature_gradient(logit_gradient, S, t)
    )


def _through_similarities(
    dS: FloatArray, image_features: npt.ArrayLike, text_features: npt.ArrayLike
) -> tuple[FloatArray, FloatArray]:
    """Return the feature gradients for a gradient dS in the similarities: d S_ij = <d e1_i, e2_j> + <e1_i, d e2_j>."""
    image, text = real_matrix("image_features", image_features), real_matrix("text_features", text_features)
    image_gradient, text_gradient = np.zeros_like(image), np.zeros_like(text)
    for i in range(len(image)):
        for j in range(len(text)):
            image_gradient[i] += dS[i, j] * text[j]
            text_gradient[j] += dS[i, j] * image[i]
    return image_gradient, text_gradient


def _temperature_gradient(logit_gradient: FloatArray, S: FloatArray, t: float) -> float:
    """Return the gradient in t for a gradient in the logits S / t: d(S_ij / t) / dt = -S_ij / t^2."""
    return math.fsum(-logit_gradient[index] * S[index] / t**2 for index in np.ndindex(S.shape))


class SigmoidLoss(NamedTuple):
    """The loss of :func:`sigmoid_loss` and its gradients."""

    loss: float
    image_gradient: FloatArray
    text_gradient: FloatArray
    scale_gradient: float
    bias_gradient: float


def sigmoid_loss(
    image_features: npt.ArrayLike,
    text_features: npt.ArrayLike,
    /,
    *,
    scale: float,
    bias: float,
    pair_mask: npt.ArrayLike | None = None,
) -> SigmoidLoss:
    """Compute SigLIP's loss: each of the b^2 pairs of an image and a text is classified as belonging together or not.

    Parameters
    ----------
    image_features, text_features : array (b, d)
        Features of unit norm; row i of both is pair i.
    scale : float
        Factor of the similarities, above 0: the inverse of a temperature.
    bias : float
        Term added to the scaled similarities; a bias below 0 assumes that most pairs do not belong together.
    pair_mask : array (b, b) of bool, optional
        Row i: image i; column j: text j; False: the pair is skipped because it may be a positive. The diagonal holds
        the positives and is never skipped.

    Returns
    -------
    SigmoidLoss
        ``loss``, gradients (b, d), ``scale_gradient`` and ``bias_gradient``.

    Raises
    ------
    TypeError, ValueError
        If shapes do not fit or values leave their domains.

    Notes
    -----
    loss = (1/b) sum over all i, j of -log sigmoid(y_ij z_ij), z_ij = scale S_ij + bias, with y_ij = 1 for i = j and -1
    otherwise. The gradient in z_ij is -y_ij sigmoid(-y_ij z_ij) / b. Pairs that ``pair_mask`` excludes are left out of
    the sum; the divisor is still b. Source: SigLIP, arXiv 2303.15343.

    Examples
    --------
    All logits are almost 0, so each of the two pairs per image adds log 2.

    >>> result = sigmoid_loss([[1, 0], [0, 1]], [[0, 1], [0, 1]], scale=1e-9, bias=0)
    >>> round(result.loss, 6), round(result.bias_gradient, 6)
    (1.386294, 0.0)
    """
    S = pair_similarities(image_features, text_features)
    scale, bias, b = positive("scale", scale), number("bias", bias), S.shape[0]
    is_negative = negative_pairs(pair_mask, b)
    losses = []
    z_gradient = np.zeros((b, b))
    for i in range(b):
        for j in range(b):
            if i != j and not is_negative[i, j]:
                continue
            # The label of a pair is y = 1 for a positive, -1 for a negative.
            y = 1.0 if i == j else -1.0
            margin = y * (scale * S[i, j] + bias)
            losses.append(max(-margin, 0.0) + math.log1p(math.exp(-abs(margin))))  # log(1 + e^-margin), no overflow
            z_gradient[i, j] = -y * _sigmoid(-margin) / b
    # z = scale S + bias. So the gradient in S is scale dz, the gradient in the scale is sum dz S, and the gradient in
    # the bias is sum dz, where dz is the gradient in z.
    image_gradient, text_gradient = _through_similarities(scale * z_gradient, image_features, text_features)
    return SigmoidLoss(
        loss=math.fsum(losses) / b,
        image_gradient=image_gradient,
        text_gradient=text_gradient,
        scale_gradient=math.fsum(z_gradient[index] * S[index] for index in np.ndindex(S.shape)),
        bias_gradient=math.fsum(z_gradient.flat),
    )


def _sigmoid(z: float) -> float:
    """Return 1 / (1 + e^-z) without overflow."""
    # e^-z may overflow for z < 0, so e^z / (1 + e^z), which is equal, is used there.
    small = math.exp(-abs(z))
    return (1.0 if z >= 0.0 else small) / (1.0 + small)


def soft_cross_entropy(logits: Sequence[float] | FloatArray, target: Sequence[float], /) -> tuple[float, list[float]]:
    """Compute the cross-entropy of logits with a distribution p: -sum_j p_j log q_j, q = softmax(logits).

    Parameters
    ----------
    logits : sequence of float (n,)
        Logits of any size and sign.
    target : sequence of float (n,)
        The probabilities p_j; their sum is 1.

    Returns
    -------
    loss : float
        The cross-entropy, at least the entropy of p.
    gradient : list of float (n,)
        The gradient of the loss in the logits, q_j - p_j.

    Notes
    -----
    This is the mean of :func:`cross_entropy` if answer j is correct with probability p_j. Source: distillation,
    arXiv 1503.02531.

    Examples
    --------
    >>> loss, gradient = soft_cross_entropy([0.0, 0.0], [0.25, 0.75])
    >>> round(loss, 6), gradient
    (0.693147, [0.25, -0.25])
    """
    # -sum_j p_j log q_j is the mean of the cross-entropies of the answers j, weighted by p_j.
    answers = [cross_entropy(logits, j) for j in range(len(target))]
    loss = math.fsum(p * loss for p, (loss, _) in zip(target, answers, strict=True))
    gradient = [
        math.fsum(p * answer[j] for p, (_, answer) in zip(target, answers, strict=True)) for j in range(len(target))
    ]
    return loss, gradient


def distillation_loss(
    image_features: npt.ArrayLike,
    text_features: npt.ArrayLike,
    reference_image: npt.ArrayLike,
    reference_text: npt.ArrayLike,
    /,
    *,
    temperature: float,
    reference_temperature: float,
) -> PairLoss:
    """Compute a distillation loss: the model's softmax over texts and over images should equal the reference model's.

    Parameters
    ----------
    image_features, text_features : array (b, d)
        Features of unit norm; row i of both is pair i.
    reference_image, reference_text : array (b, r)
        The frozen reference model's features of the same pairs.
    temperature : float
        t, above 0.
    reference_temperature : float
        t_R, above 0: the temperature of the reference model.

    Returns
    -------
    PairLoss
        ``loss``, gradients (b, d) and ``temperature_gradient``, the gradient in t.

    Raises
    ------
    TypeError, ValueError
        If shapes do not fit or values leave their domains.

    Notes
    -----
    loss = (1/2b) sum_i [CE(softmax(R_i: / t_R), softmax(S_i: / t)) + the same for columns] with S_ij = <e1_i, e2_j> and
    R_ij = <r1_i, r2_j>; S_i: and R_i: are row i. The candidates include the positive. CE is the cross-entropy. It
    differs from the Kullback-Leibler divergence by the entropy of the reference model's softmax, which does not depend
    on the model's features. Source: MobileCLIP, arXiv 2311.17049.

    Examples
    --------
    At a low temperature this reference model gives the right pairs the probability 1, so the loss is InfoNCE.

    >>> image, text, sure = [[1, 0], [0, 1]], [[0.6, 0.8], [0, 1]], [[1, 0], [0, 1]]
    >>> result = distillation_loss(image, text, sure, sure, temperature=0.5, reference_temperature=1e-3)
    >>> result.loss == info_nce(image, text, temperature=0.5).loss
    True
    """
    S = pair_similarities(image_features, text_features)
    R = pair_similarities(*feature_pair("reference_image", reference_image, "reference_text", reference_text))
    t, t_R = positive("temperature", temperature), positive("reference_temperature", reference_temperature)
    b = S.shape[0]
    if R.shape != S.shape:
        raise ValueError(f"reference_image must have {b} rows, got {R.shape[0]}")
    losses = []
    logit_gradient = np.zeros((b, b))
    for i in range(b):
        # The target of the model's softmax over the texts, for image i, is the reference model's softmax.
        loss, gradient = soft_cross_entropy(S[i, :] / t, _softmax(R[i, :] / t_R))
        losses.append(loss)
        for j in range(b):
            logit_gradient[i, j] += gradient[j] / (2 * b)
        # The target of the model's softmax over the images, for text i, is the reference model's softmax, too.
        loss, gradient = soft_cross_entropy(S[:, i] / t, _softmax(R[:, i] / t_R))
        losses.append(loss)
        for j in range(b):
            logit_gradient[j, i] += gradient[j] / (2 * b)
    image_gradient, text_gradient = _through_similarities(logit_gradient / t, image_features, text_features)
    return PairLoss(
        math.fsum(losses) / (2 * b), image_gradient, text_gradient, _temperature_gradient(logit_gradient, S, t)
    )


def _softmax(logits: FloatArray) -> list[float]:
    """Return q_j = e^l_j / sum_k e^l_k; the largest logit is subtracted before exp."""
    exponentials = [math.exp(float(logit - logits.max())) for logit in logits]
    total = math.fsum(exponentials)
    return [exponential / total for exponential in exponentials]


class HingeLoss(NamedTuple):
    """The loss of :func:`hinge_margin_loss` and its gradients."""

    loss: float
    image_gradient: FloatArray
    text_gradient: FloatArray


def hinge_margin_loss(
    image_features: npt.ArrayLike,
    text_features: npt.ArrayLike,
    /,
    *,
    margin: float,
    pair_mask: npt.ArrayLike | None = None,
) -> HingeLoss:
    """Compute a hinge loss: a negative that comes within a margin of the positive adds the squared missing distance.

    Parameters
    ----------
    image_features, text_features : array (b, d)
        Features of unit norm, b >= 2; row i of both is pair i.
    margin : float
        m, at least 0.
    pair_mask : array (b, b) of bool, optional
        Row i: image i; column j: text j. False means that the pair is not a negative. Pairs on the diagonal are never
        negatives.

    Returns
    -------
    HingeLoss
        ``loss`` and gradients (b, d).

    Raises
    ------
    TypeError, ValueError
        If shapes do not fit, values leave their domains, or b = 1.

    Notes
    -----
    loss = (1/2b) sum_i (mean over j of [S_ij - S_ii + m]_+^2 + mean over j of [S_ji - S_ii + m]_+^2). A mean is over
    the N negatives of an anchor: b - 1 of them, or fewer with a mask. An anchor without negatives adds 0; the divisor
    is still 2b. The derivative of the term (i, j) of image anchor i is
    2 [S_ij - S_ii + m]_+ d(S_ij - S_ii) / (2b N). Source: TuneCLIP, arXiv 2601.09859.

    Examples
    --------
    Only image 1 adds to the loss: its similarity with text 0 is 0.6, and its similarity with its own text is 0.4. With
    the margin of 0.1 the missing distance is 0.3.

    >>> round(hinge_margin_loss([[1, 0], [0.6, 0.8]], [[1, 0], [0, 0.5]], margin=0.1).loss, 6)  # 0.3^2 / (2 b)
    0.0225
    """
    S = pair_similarities(image_features, text_features)
    m, b = non_negative("margin", margin), batch_size("image_features", S)
    is_negative = negative_pairs(pair_mask, b)
    losses = []
    dS = np.zeros((b, b))
    for i in range(b):
        texts = [j for j in range(b) if is_negative[i, j]]  # negatives of image i
        for j in texts:
            # The missing distance: 0 if the positive's similarity exceeds the negative's by m or more.
            short = max(S[i, j] - S[i, i] + m, 0.0)
            losses.append(short**2 / len(texts))
            dS[i, j] += 2.0 * short / (2 * b * len(texts))
            dS[i, i] -= 2.0 * short / (2 * b * len(texts))
        images = [j for j in range(b) if is_negative[j, i]]  # negatives of text i
        for j in images:
            # Text anchor i: its negatives are images, in column i.
            short = max(S[j, i] - S[i, i] + m, 0.0)
            losses.append(short**2 / len(images))
            dS[j, i] += 2.0 * short / (2 * b * len(images))
            dS[i, i] -= 2.0 * short / (2 * b * len(images))
    image_gradient, text_gradient = _through_similarities(dS, image_features, text_features)
    return HingeLoss(math.fsum(losses) / (2 * b), image_gradient, text_gradient)
