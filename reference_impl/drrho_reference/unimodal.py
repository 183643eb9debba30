"""The contrastive loss of two views of one modality, with a reference model.

    Z = (Z1 on top of Z2),  A = Z Z^T - lambda R R^T                      (2 b rows: first view 1, then view 2)

Z1 and Z2 hold the features of the views of b samples, and R holds those of the reference model. An anchor is a row of
A. The positive of an anchor is the other view of the same sample; its 2 b - 2 negatives are both views of every other
sample. The exponents, the moving average u and the weights of an anchor are computed as in ``contrastive.py``. There is
one u per sample and view.

Sources: SogCLR, arXiv 2202.12387, for the loss of two views; DRRho, arXiv 2505.06699, for the reference model.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from drrho_reference._checks import (
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
    temperatures,
)
from drrho_reference.anchor import anchor_step, dot, inner_estimate

__all__ = ["UnimodalStep", "unimodal_contrastive_step", "unimodal_objective", "view_positions"]


class UnimodalStep(NamedTuple):
    """Result of :func:`unimodal_contrastive_step`.

    ``loss`` estimates the objective and is the value to monitor. ``surrogate`` is the scalar whose gradients, as
    autograd computes them, are in the fields below; its value is not meant to be monitored.
    """

    loss: float
    surrogate: float
    view1_gradient: FloatArray
    view2_gradient: FloatArray
    temperature_gradient: float | tuple[FloatArray, FloatArray]
    log_inner_view1: FloatArray
    log_inner_view2: FloatArray


def view_positions(anchor: int, b: int, /) -> tuple[int, list[int]]:
    """Return the positions of an anchor's positive and negatives among the 2 b rows.

    Parameters
    ----------
    anchor : int
        A row: i for view 1 of sample i, b + i for view 2 of sample i.
    b : int
        The number of samples.

    Returns
    -------
    positive : int
        The row of the other view of the same sample.
    negatives : list of int
        The 2 b - 2 rows of both views of all other samples.

    Notes
    -----
    Source: SogCLR, arXiv 2202.12387.

    Examples
    --------
    There are three samples, and the anchor is view 2 of sample 0.

    >>> view_positions(3, 3)
    (0, [1, 2, 4, 5])
    """
    sample = anchor % b
    positive = sample + b if anchor < b else sample
    return positive, [row for row in range(2 * b) if row % b != sample]


def unimodal_contrastive_step(
    view1_features: npt.ArrayLike,
    view2_features: npt.ArrayLike,
    log_inner_view1: npt.ArrayLike,
    log_inner_view2: npt.ArrayLike,
    /,
    *,
    temperature: Number | Pair,
    gamma: Number | Pair = 1.0,
    reference_features: Pair | None = None,
    reference_weight: float = 1.0,
    radius: float = 0.0,
    eps: float = 0.0,
    anchor_weight: npt.ArrayLike | Pair | None = None,
) -> UnimodalStep:
    """Process one batch of the two-view contrastive loss: update the estimates, then compute the loss and gradients.

    Parameters
    ----------
    view1_features, view2_features : array (b, d)
        Features of unit norm, b >= 2; row i of both is sample i.
    log_inner_view1, log_inner_view2 : array (b,)
        Logarithms of the estimates u of these samples, one per view; -inf for samples that were never visited.
    temperature : float, or a pair of arrays (b,)
        Above 0. A pair holds one temperature per anchor of view 1 and one per anchor of view 2.
    gamma : float, or a pair of arrays (b,)
        Weight of the batch's g in the moving average, in (0, 1]. A pair holds one gamma per anchor of view 1 and one
        per anchor of view 2.
    reference_features : pair of arrays (b, r), optional
        The frozen reference model's features of view 1 and view 2.
    reference_weight : float
        lambda, at least 0.
    radius : float
        At least 0. A radius above 0 changes no feature gradient, so it is useful only if temperatures are learned.
    eps : float
        The number that is added to u in log(eps + u), at least 0.
    anchor_weight : array (b,), or a pair of arrays (b,), optional
        At least 0: a factor on each anchor's contribution to loss and gradients, 1 by default. Entry i of a single
        array is the factor of both views of sample i.

    Returns
    -------
    UnimodalStep
        ``loss`` and ``surrogate`` are floats. The feature gradients have the shape (b, d). ``temperature_gradient`` is
        a float or, if ``temperature`` is a pair, a pair of arrays (b,). The new logarithms have the shape (b,).

    Raises
    ------
    TypeError, ValueError
        If shapes do not fit, values leave their domains, or b = 1.
    FloatingPointError
        If an exponential leaves the range of float64: an exponent or |log u| above about 700.

    Notes
    -----
    loss = (1/2b) sum over the 2 b anchors a of v_a t_a (log(eps + u_a) + radius), where v_a is the weight of the
    anchor. u_a is the moving average of g_a = mean over the 2 b - 2 negatives k of exp((A_ak - A_ap) / t_a), where p is
    the positive of a. The negative k of the anchor a adds w_ak d(A_ak - A_ap) / 2b to the gradient. w_ak is the
    negative's weight, z_a is row a of the features, d A_ak / d z_a = z_k and d A_ak / d z_k = z_a. Sources: SogCLR,
    arXiv 2202.12387; DRRho, arXiv 2505.06699.

    Examples
    --------
    There are two samples, so each anchor has two negatives. View 2 of sample 0 equals both views of sample 1.

    >>> never = [-float("inf")] * 2
    >>> step = unimodal_contrastive_step([[1, 0], [0, 1]], [[0, 1], [0, 1]], never, never, temperature=1.0)
    >>> step.log_inner_view1.round(4).tolist()  # log((e^0 + e^0)/2), log((e^-1 + e^0)/2)
    [0.0, -0.3799]
    """
    # All anchors in one list: view 1 of every sample, then view 2.
    A = _view_similarities(view1_features, view2_features, reference_features, reference_weight)
    b = len(A) // 2
    states = [
        *log_estimates("log_inner_view1", log_inner_view1, b),
        *log_estimates("log_inner_view2", log_inner_view2, b),
    ]
    temperature1, temperature2, per_anchor = temperatures(temperature, b)
    temperature_of = [*temperature1, *temperature2]
    gamma1, gamma2 = gammas(gamma, b)
    gamma_of = [*gamma1, *gamma2]
    radius, eps = non_negative("radius", radius), non_negative("eps", eps)
    factor1, factor2 = anchor_weights(anchor_weight, b)
    factor_of = [*factor1, *factor2]

    # Each row of A is an anchor, with the same step as an image anchor of contrastive.py.
    anchors = []
    for a in range(2 * b):
        positive, negatives = view_positions(a, b)
        anchors.append(
            anchor_step(
                A[a, :],
                positive,
                negatives,
                float(states[a]),
                float(temperature_of[a]),
                float(gamma_of[a]),
                radius,
                eps,
                float(factor_of[a]),
            )
        )

    # Feature gradients, pair by pair: the anchor, the negative and the positive are rows of the same table.
    features = np.vstack(feature_pair("view1_features", view1_features, "view2_features", view2_features))
    gradient = np.zeros_like(features)
    for a in range(2 * b):
        positive, negatives = view_positions(a, b)
        for k in negatives:
            w = anchors[a].weights[k] / (2 * b)  # the factor of A_ak - A_ap
            gradient[a] += w * (features[k] - features[positive])
            gradient[k] += w * features[a]
            gradient[positive] -= w * features[a]

    # The results are split into two views: the first b rows are view 1.
    temperature_gradient = np.array([anchor.temperature_gradient for anchor in anchors]) / (2 * b)
    log_inner = np.array([anchor.log_inner for anchor in anchors])
    return UnimodalStep(
        loss=math.fsum(anchor.loss for anchor in anchors) / (2 * b),
        surrogate=math.fsum(anchor.surrogate for anchor in anchors) / (2 * b),
        view1_gradient=gradient[:b],
        view2_gradient=gradient[b:],
        temperature_gradient=(
            (temperature_gradient[:b], temperature_gradient[b:]) if per_anchor else math.fsum(temperature_gradient)
        ),
        log_inner_view1=log_inner[:b],
        log_inner_view2=log_inner[b:],
    )


def unimodal_objective(
    view1_features: npt.ArrayLike,
    view2_features: npt.ArrayLike,
    /,
    *,
    temperature: Number | Pair,
    reference_features: Pair | None = None,
    reference_weight: float = 1.0,
    radius: float = 0.0,
    eps: float = 0.0,
    anchor_weight: npt.ArrayLike | Pair | None = None,
) -> float:
    """Evaluate the two-view objective itself on all n samples, with g itself instead of estimates u.

    Parameters
    ----------
    view1_features, view2_features : array (n, d)
        Features of unit norm of the whole data set, n >= 2.
    temperature, reference_features, reference_weight, radius, eps, anchor_weight
        As in :func:`unimodal_contrastive_step`.

    Returns
    -------
    float
        (1/2n) sum over the 2 n anchors a of v_a t_a (log(eps + g_a) + radius). The notes of
        :func:`unimodal_contrastive_step` define the symbols.

    Raises
    ------
    TypeError, ValueError, FloatingPointError
        As in :func:`unimodal_contrastive_step`.

    Notes
    -----
    :func:`unimodal_contrastive_step` with gamma = 1 on all samples gives this value and its exact gradient.
    Sources: SogCLR, arXiv 2202.12387; DRRho, arXiv 2505.06699.

    Examples
    --------
    Both views of a sample are equal, and the samples are orthogonal, so every negative has the exponent -1 / 0.5.

    >>> unimodal_objective([[1, 0], [0, 1]], [[1, 0], [0, 1]], temperature=0.5)
    -1.0
    """
    A = _view_similarities(view1_features, view2_features, reference_features, reference_weight)
    n = len(A) // 2
    temperature1, temperature2, _ = temperatures(temperature, n)
    radius, eps = non_negative("radius", radius), non_negative("eps", eps)
    factor1, factor2 = anchor_weights(anchor_weight, n)
    # Each anchor is compared with all data, so g itself is used instead of a moving average.
    total = []
    for a, (t, factor) in enumerate(zip([*temperature1, *temperature2], [*factor1, *factor2], strict=True)):
        positive, negatives = view_positions(a, n)
        # An anchor adds t (log(eps + g) + radius), with all negatives of the data set.
        g = inner_estimate(A[a, :], positive, negatives, float(t))
        total.append(float(factor) * float(t) * (math.log(eps + g) + radius))
    return math.fsum(total) / (2 * n)


def _view_similarities(
    view1_features: npt.ArrayLike,
    view2_features: npt.ArrayLike,
    reference_features: Pair | None,
    reference_weight: float,
) -> FloatArray:
    """Compute A = Z Z^T - lambda R R^T, the similarities of all rows; view 1 of all samples comes first."""
    views = feature_pair("view1_features", view1_features, "view2_features", view2_features)
    weight, b = non_negative("reference_weight", reference_weight), batch_size("view1_features", views[0])
    reference = reference_pair(reference_features, b)
    features = np.vstack(views)
    reference_rows = None if reference is None else np.vstack(reference)
    similarities = np.empty((2 * b, 2 * b))
    for a in range(2 * b):
        for k in range(2 * b):
            # A = Z Z^T - lambda R R^T, entry by entry.
            similarities[a, k] = dot(features[a], features[k])
            if reference_rows is not None:
                similarities[a, k] -= weight * dot(reference_rows[a], reference_rows[k])
    return similarities
