"""The contrastive step of two views whose batch is distributed over several ranks, in two phases.

Every rank holds some samples of the batch, each in two views. A is the table of the similarities of all rows, where a
row is one view of one sample: first view 1 of all samples, then view 2 of all samples (``unimodal.py``). Each row is an
anchor. A rank computes only the rows of A that belong to its own samples. The table is symmetric, so these rows are the
columns of the same samples, too.

In phase 1 each rank reads the features of all ranks and updates the estimates u of its own anchors. In phase 2 each
rank also reads the updated estimates of all ranks and computes the gradient of its own rows. As in ``distributed.py``
the ranks are simulated in one process, and the data that they exchange are an argument of each phase.

Source: FastCLIP, arXiv 2407.01445, for the exchange of estimates instead of gradients.
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
    rows_per_rank,
    temperatures,
)
from drrho_reference.anchor import Anchor, anchor_step, dot, estimate_of_state
from drrho_reference.unimodal import UnimodalStep, view_positions

__all__ = ["sharded_unimodal_step"]


class _Rows(NamedTuple):
    """The data that ranks exchange before phase 1; every array has one entry per row of A."""

    features: FloatArray
    reference: FloatArray | None
    reference_weight: float
    temperature: FloatArray
    anchor_weight: FloatArray

    def similarities(self, a: int) -> FloatArray:
        """Return row a of A: <z_a, z_k> - lambda <r_a, r_k> for all rows k."""
        row = np.array([dot(self.features[a], other) for other in self.features])
        if self.reference is not None:
            row -= self.reference_weight * np.array([dot(self.reference[a], other) for other in self.reference])
        return row


class _Estimates(NamedTuple):
    """The data that ranks exchange before phase 2; keys are all rows of A."""

    positive: dict[int, float]
    log_inner: dict[int, float]


def sharded_unimodal_step(
    view1_features: npt.ArrayLike,
    view2_features: npt.ArrayLike,
    log_inner_view1: npt.ArrayLike,
    log_inner_view2: npt.ArrayLike,
    /,
    *,
    num_shards: int,
    temperature: Number | Pair,
    gamma: Number | Pair = 1.0,
    reference_features: Pair | None = None,
    reference_weight: float = 1.0,
    radius: float = 0.0,
    eps: float = 0.0,
    anchor_weight: npt.ArrayLike | Pair | None = None,
) -> list[UnimodalStep]:
    """Process one batch of two views as W ranks would, each with its own samples.

    Together the ranks return the same numbers as :func:`unimodal_contrastive_step` returns for the whole batch.

    Parameters
    ----------
    view1_features, view2_features, log_inner_view1, log_inner_view2
        As in :func:`unimodal_contrastive_step`, for the whole batch of n samples. Rank r holds the r-th block of n / W
        samples.
    num_shards : int
        W, a divisor of n.
    temperature, gamma, reference_features, reference_weight, radius, eps, anchor_weight
        As in :func:`unimodal_contrastive_step`, for the whole batch.

    Returns
    -------
    list of UnimodalStep
        One result per rank. The feature gradients and the estimates are those of the rank's own samples, and so are the
        temperature gradients if ``temperature`` is a pair. ``loss``, ``surrogate`` and the gradient of a single
        temperature are sums over all ranks, so they are equal on every rank.

    Raises
    ------
    TypeError, ValueError, FloatingPointError
        As in :func:`unimodal_contrastive_step`, or if W does not divide n.

    Notes
    -----
    w_ak is the weight of row k as a negative of anchor a, and p is the positive of a. The gradient of row a is
    [sum_k (w_ak + w_ka) z_k - c z_p] / 2n with c = sum_k w_ak + sum_k w_pk: row p is an anchor, too, and a is the
    positive of this anchor. A rank has the weights w_ak and w_pk, because a and p are views of one sample. It computes
    w_ka of the anchors of other ranks from its own row of A and the estimates of all ranks.
    Source: FastCLIP, arXiv 2407.01445.

    Examples
    --------
    >>> never = [-float("inf")] * 2
    >>> batch = ([[1, 0], [0, 1]], [[0, 1], [0, 1]], never, never)
    >>> ranks = sharded_unimodal_step(*batch, num_shards=2, temperature=1.0)
    >>> [rank.log_inner_view1.round(4).tolist() for rank in ranks]  # one sample per rank
    [[0.0], [-0.3799]]
    """
    views = feature_pair("view1_features", view1_features, "view2_features", view2_features)
    n = batch_size("view1_features", views[0])
    share = rows_per_rank(n, num_shards)
    old = [*log_estimates("log_inner_view1", log_inner_view1, n), *log_estimates("log_inner_view2", log_inner_view2, n)]
    temperature1, temperature2, per_anchor = temperatures(temperature, n)
    gamma_of = np.concatenate(gammas(gamma, n))
    radius, eps = non_negative("radius", radius), non_negative("eps", eps)
    reference = reference_pair(reference_features, n)
    rows = _Rows(
        features=np.vstack(views),
        reference=None if reference is None else np.vstack(reference),
        reference_weight=non_negative("reference_weight", reference_weight),
        temperature=np.concatenate([temperature1, temperature2]),
        anchor_weight=np.concatenate(anchor_weights(anchor_weight, n)),
    )

    # Phase 1 runs on every rank, then the ranks exchange the estimates, then phase 2 runs on every rank.
    own = [[*range(start, start + share), *range(n + start, n + start + share)] for start in range(0, n, share)]
    tables = [{a: rows.similarities(a) for a in mine} for mine in own]
    phase1 = [_phase_1(table, rows, old, gamma_of, radius, eps) for table in tables]
    estimates = _Estimates({}, {})
    for table, anchors in zip(tables, phase1, strict=True):
        for a, anchor in anchors.items():
            estimates.positive[a] = float(table[a][view_positions(a, n)[0]])
            estimates.log_inner[a] = anchor.log_inner
    gradients = [_phase_2(table, rows, anchors, estimates, eps) for table, anchors in zip(tables, phase1, strict=True)]

    # The loss, the surrogate and the gradient of a single temperature are sums over all ranks.
    everyone = [anchor for anchors in phase1 for anchor in anchors.values()]
    loss = math.fsum(anchor.loss for anchor in everyone) / (2 * n)
    surrogate = math.fsum(anchor.surrogate for anchor in everyone) / (2 * n)
    shared = math.fsum(anchor.temperature_gradient for anchor in everyone) / (2 * n)
    steps = []
    for anchors, gradient in zip(phase1, gradients, strict=True):
        # The first half of a rank's rows is view 1.
        slopes = np.array([anchor.temperature_gradient for anchor in anchors.values()]) / (2 * n)
        log_inner = np.array([anchor.log_inner for anchor in anchors.values()])
        steps.append(
            UnimodalStep(
                loss=loss,
                surrogate=surrogate,
                view1_gradient=gradient[:share],
                view2_gradient=gradient[share:],
                temperature_gradient=(slopes[:share], slopes[share:]) if per_anchor else shared,
                log_inner_view1=log_inner[:share],
                log_inner_view2=log_inner[share:],
            )
        )
    return steps


def _phase_1(
    table: dict[int, FloatArray], rows: _Rows, old: list[float], gamma_of: FloatArray, radius: float, eps: float
) -> dict[int, Anchor]:
    """Compute phase 1 of one rank: the updated estimates of its own anchors, given its rows of A."""
    n = len(rows.features) // 2
    return {
        a: anchor_step(
            similarities,
            *view_positions(a, n),
            float(old[a]),
            float(rows.temperature[a]),
            float(gamma_of[a]),
            radius,
            eps,
            float(rows.anchor_weight[a]),
        )
        for a, similarities in table.items()
    }


def _phase_2(
    table: dict[int, FloatArray], rows: _Rows, anchors: dict[int, Anchor], estimates: _Estimates, eps: float
) -> FloatArray:
    """Compute phase 2 of one rank: the gradients of its own rows, from its rows of A and all ranks' estimates."""
    n = len(rows.features) // 2
    gradient = np.zeros((len(table), rows.features.shape[1]))
    for local, (a, similarities) in enumerate(table.items()):
        positive, negatives = view_positions(a, n)
        for k in negatives:
            # Row a as a negative of anchor k, which may belong to another rank:
            # w_ka = exp((A_ka - p_k) / t_k) / (eps + u_k) / (2 n - 2), where p_k is the similarity of k's positive and
            # A_ka = A_ak. The rank received p_k, t_k and u_k in the exchanges.
            D = (similarities[k] - estimates.positive[k]) / rows.temperature[k]
            u = estimate_of_state(estimates.log_inner[k])
            as_negative = rows.anchor_weight[k] * math.exp(D) / (eps + u) / (2 * n - 2)
            gradient[local] += (anchors[a].weights[k] + as_negative) * rows.features[k] / (2 * n)
        # Every exponent of anchor a contains -A_ap, and every exponent of anchor p contains -A_pa.
        c = math.fsum(anchors[a].weights) + math.fsum(anchors[positive].weights)
        gradient[local] -= c * rows.features[positive] / (2 * n)
    return gradient
