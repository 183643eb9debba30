"""The global contrastive loss of two views of one modality, one SogCLR step at a time, with closed-form gradients.

Shapes: b samples in the batch, features Z1 and Z2 of two views (b, d), reference features R1 and R2 (b, r), one inner
estimate u and one temperature t per sample and view (b,). The negatives of an anchor are both views of every other
sample, 2b - 2 in all. A prime marks the anchors of view 2. Formulas: SogCLR (arXiv 2202.12387) with the reference model
of DRRho-CLIP (arXiv 2505.06699); see docs/theory/contrastive.md.

    A11 = Z1 Z1^T - lambda R1 R1^T,   A12, A22 likewise,   p = diag(A12)
    view 1's anchor i:  D11_ij = (A11_ij - p_i) / t_i,      D12_ij = (A12_ij - p_i) / t_i
    view 2's anchor j:  D22_ji = (A22_ji - p_j) / t'_j,     D21_ij = (A12_ij - p_j) / t'_j
    g of an anchor = mean of its exponentials;   w = exp(D) / (eps + u) / (2b - 2);   u and the loss as in `step`
    V11 = w11 + w11^T,   V12 = w12 + w21,   V22 = w22 + w22^T,   c_i = sum of all weights of both anchors of sample i
    dZ1 = (V11 Z1 + V12 Z2 - c Z2) / 2b,     dZ2 = (V22 Z2 + V12^T Z1 - c Z1) / 2b
"""

from __future__ import annotations

from typing import NamedTuple

from drrho_core._array_api import Array, Namespace, PerAnchor, Scalar
from drrho_core.contrastive.anchors import evaluate, update, with_old_unless
from drrho_core.contrastive.gradient import gradient
from drrho_core.contrastive.options import AnchorWeight, StepArguments, check_step, check_step_on_ranks
from drrho_core.contrastive.ranks import FORMS, Ranks
from drrho_core.contrastive.sharded_views import find_view_passes

VIEWS = ("view1", "view2")
"""The names of the anchors of the two views."""


class UnimodalStep(NamedTuple):
    """Result of `unimodal_contrastive_step`.

    Attributes
    ----------
    loss : array, shape ()
        Estimate of the objective with the updated inner estimates. Monitor this number.
    surrogate : array, shape ()
        Scalar whose gradient the fields below hold. Do not monitor it.
    view1_gradient, view2_gradient : array, shape (b, d)
        Gradient of `surrogate` with respect to the features.
    temperature_gradient : array, shape (), or pair of arrays, shape (b,)
        Gradient of `surrogate` with respect to the temperature, in the shape of the argument `temperature`.
    log_inner_view1, log_inner_view2 : array, shape (b,)
        Logarithms of the updated inner estimates.
    """

    loss: Array
    surrogate: Array
    view1_gradient: Array
    view2_gradient: Array
    temperature_gradient: Array | tuple[Array, Array]
    log_inner_view1: Array
    log_inner_view2: Array


def unimodal_contrastive_step(
    view1_features: Array,
    view2_features: Array,
    log_inner_view1: Array,
    log_inner_view2: Array,
    /,
    *,
    temperature: PerAnchor,
    gamma: PerAnchor = 1.0,
    reference_features: tuple[Array, Array] | None = None,
    reference_weight: Scalar = 1.0,
    radius: Scalar = 0.0,
    eps: Scalar = 0.0,
    anchor_weight: AnchorWeight = None,
    tile_size: int | None = None,
    memory_budget: int | None = None,
    ranks: Ranks | None = None,
    form: str = FORMS[0],
    sample_index: Array | None = None,
    xp: Namespace | None = None,
) -> UnimodalStep:
    """Take one SogCLR step of the contrastive loss of two views: new inner estimates, loss, closed-form gradients.

    Parameters
    ----------
    view1_features, view2_features : array, shape (b, d)
        Features of two views of each sample, unit norm (not enforced), b >= 2. Row i of both arrays is a positive pair.
    log_inner_view1, log_inner_view2 : array, shape (b,)
        The batch's rows of the estimator's state, float32 or wider; ``-inf`` = never visited. An `InnerEstimator` can
        hold the state, view 1 as its images and view 2 as its texts.
    temperature, gamma, reference_weight, radius, eps
        As in `contrastive_step`; the arrays of a pair belong to the anchors of view 1 and of view 2.
    reference_features : pair of arrays, shape (b, r), optional
        The frozen reference model's features of view 1 and of view 2; r may differ from d. None: the loss of SogCLR,
        without a reference model.
    anchor_weight : array of shape (b,) or pair of arrays of shape (b,), optional
        As in `contrastive_step`; a pair has one array for the anchors of view 1 and one for those of view 2.
    tile_size, memory_budget : int, optional
        As in `contrastive_step`; the budget is the memory for all matrices of logits together.
    ranks : Ranks, optional
        The ranks that share the batch, as in `sharded_contrastive_step`. All arrays then belong to the own samples; the
        loss and the gradient of a global temperature are those of the whole batch. The features' gradients are those of
        the whole batch's loss: multiply them by W, the number of ranks, for a wrapper that averages. None: the
        arguments hold the whole batch.
    form : {"reduce", "ring"}
        ``"reduce"`` gathers the features of all ranks on each rank. ``"ring"`` passes them from rank to rank, so that
        no rank holds all of them; it sends them twice and computes all logits twice.
    sample_index : array of integers, shape (b,), optional
        The row ids of the own samples. If it is given, an id that occurs twice in the whole batch is an error, as in
        `sharded_contrastive_step`, with and without `ranks`.
    xp : namespace, optional
        The arrays' namespace; pass it under ``torch.compile``.

    Returns
    -------
    UnimodalStep
        Gradients have the features' dtype, the new state has the dtype of the old state.

    Raises
    ------
    TypeError
        If arrays come from different libraries or have a wrong dtype.
    ValueError
        If shapes, devices or values break the rules above, if b = 1, or if an input requires gradients of autograd.
        Values are checked on the host only and never under tracing.

    Notes
    -----
    A mean over negatives divides by 2b - 2. The loss is averaged over both views (1/2) and over the batch (1/b), and
    each anchor's loss is multiplied by tau. The formulas are those of SogCLR (arXiv 2202.12387) and DRRho-CLIP (arXiv
    2505.06699); they are written out at the top of the source file. With ``gamma=1``, ``eps=1/(2b-2)`` and no reference
    model the loss is exactly tau times (NT-Xent - log(2b - 2)); NT-Xent is the loss of SimCLR (arXiv 2002.05709).

    Examples
    --------
    >>> import numpy as np
    >>> view1, view2 = np.eye(3), np.eye(3)[[0, 2, 1]]            # view 2 of samples 1 and 2 is swapped
    >>> unseen = np.full(3, -np.inf)
    >>> step = unimodal_contrastive_step(view1, view2, unseen, unseen, temperature=0.5)
    >>> np.round(step.log_inner_view1, 4).tolist()                # log mean of four exp(-2); of three 1 and exp(2); ...
    [-2.0, 0.9545, 0.9545]
    >>> round(float(step.loss), 4)
    -0.0152
    """
    views, states = (view1_features, view2_features), (log_inner_view1, log_inner_view2)
    arguments: StepArguments = {
        "temperature": temperature, "gamma": gamma, "reference_features": reference_features,
        "reference_weight": reference_weight, "radius": radius, "eps": eps, "anchor_weight": anchor_weight,
        "tile_size": tile_size, "memory_budget": memory_budget,
        "ranks": ranks, "form": form, "sample_index": sample_index,
    }  # fmt: skip
    check = check_step if ranks is None else check_step_on_ranks
    xp, options = check(views, states, VIEWS, xp, arguments)
    passes = find_view_passes(views, reference_features, options, tile_size, memory_budget, xp, ranks, form)

    # Pass 1: the sum of exp(D) over each anchor's negatives, and the weighted mean of D.
    log_sums, means, sums = passes.sum_negatives()

    # Update u, the moving average of each anchor's g.
    anchors = [
        update(log_sums[view], sums[view].count, states[view], options.gammas[view], options.eps, xp) for view in (0, 1)
    ]
    step = evaluate(options, (anchors[0], anchors[1]), means=means, xp=xp, ranks=ranks)

    # Pass 2: V11 Z1 + V12 Z2 and V22 Z2 + V12^T Z1, the weighted sums of the negatives' features.
    pulls = passes.pull_back(sums, step.weight_sums)
    c = step.weight_sums[0] + step.weight_sums[1]
    result = UnimodalStep(
        loss=step.loss,
        surrogate=step.surrogate,
        view1_gradient=gradient(pulls[0], c, view2_features, xp, step.unit),
        view2_gradient=gradient(pulls[1], c, view1_features, xp, step.unit),
        temperature_gradient=step.temperature_gradient,
        log_inner_view1=anchors[0].log_inner,
        log_inner_view2=anchors[1].log_inner,
    )
    return result if options.valid is None else with_old_unless(options.valid, result, states, xp)
