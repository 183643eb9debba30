"""The global contrastive loss with a reference model, one SogCLR step at a time, with closed-form gradients.

Shapes: b pairs in the batch, image and text features E1 and E2 (b, d), reference features R1 and R2 (b, r), and for
each direction one temperature t_i and one inner estimate u_i per anchor (b,). A prime marks the text anchors. Formulas:
DRRho-CLIP (arXiv 2505.06699), SogCLR (arXiv 2202.12387), FastCLIP (arXiv 2407.01445); see docs/theory/contrastive.md.

    Z = E1 E2^T - lambda R1 R2^T                                   lambda: weight of the reference model
    image anchor i:  D_ij = (Z_ij - Z_ii) / t_i,   g_i = mean_{j != i} exp(D_ij)    text anchors: the same over columns
    u_i <- (1 - gamma) u_i + gamma g_i             (first visit: u_i <- g_i)
    w_ij = exp(D_ij) / (eps + u_i) / (b - 1),      c_i = sum_j w_ij + sum_j w'_ji,   V = w + w'
    loss = (1 / 2b) sum_i t_i (log(eps + u_i) + radius) + the same for text anchors
    dE1 = (V E2 - c E2) / 2b,   dE2 = (V^T E1 - c E1) / 2b
    dt_i = (1 / 2b) (log(eps + u_i) + radius - sum_j w_ij D_ij)
"""

from __future__ import annotations

from typing import NamedTuple, Unpack

from drrho_core._array_api import Array, Namespace, PerAnchor, Scalar, namespace_of
from drrho_core.contrastive.anchors import evaluate, update, with_old_unless
from drrho_core.contrastive.blocks import in_one_dtype
from drrho_core.contrastive.gradient import wide_gradient
from drrho_core.contrastive.options import (
    SIDES,
    AnchorWeight,
    StepArguments,
    check_step,
    check_step_on_ranks,
    per_anchor,
)
from drrho_core.contrastive.ranks import FORMS, Ranks
from drrho_core.contrastive.sharded_passes import find_sweeps
from drrho_core.extend import Batch


class ContrastiveStep(NamedTuple):
    """Result of `contrastive_step`.

    Attributes
    ----------
    loss : array, shape ()
        Estimate of the objective with the updated inner estimates. Monitor this number.
    surrogate : array, shape ()
        Scalar whose gradient the fields below hold. Do not monitor it.
    image_gradient, text_gradient : array, shape (b, d)
        Gradient of `surrogate` with respect to the features.
    temperature_gradient : array, shape (), or pair of arrays, shape (b,)
        Gradient of `surrogate` with respect to the temperature, in the shape of the argument `temperature`.
    log_inner_image, log_inner_text : array, shape (b,)
        Logarithms of the updated inner estimates.
    """

    loss: Array
    surrogate: Array
    image_gradient: Array
    text_gradient: Array
    temperature_gradient: Array | tuple[Array, Array]
    log_inner_image: Array
    log_inner_text: Array


def contrastive_step(
    image_features: Array,
    text_features: Array,
    log_inner_image: Array,
    log_inner_text: Array,
    /,
    *,
    temperature: PerAnchor,
    gamma: PerAnchor = 1.0,
    reference_features: tuple[Array, Array] | None = None,
    reference_weight: Scalar = 1.0,
    radius: Scalar = 0.0,
    eps: Scalar = 0.0,
    pair_mask: Array | None = None,
    anchor_weight: AnchorWeight = None,
    tile_size: int | None = None,
    memory_budget: int | None = None,
    xp: Namespace | None = None,
) -> ContrastiveStep:
    """Take one SogCLR step of the global contrastive loss: new inner estimates, loss and closed-form gradients.

    Parameters
    ----------
    image_features, text_features : array, shape (b, d)
        Features of the batch, unit norm (not enforced), b >= 2. Row i of both arrays is a positive pair.
    log_inner_image, log_inner_text : array, shape (b,)
        The batch's rows of the estimator's state, float32 or wider; ``-inf`` = never visited.
    temperature : float, array of shape () or pair of arrays of shape (b,)
        Temperature tau > 0, global or one per image anchor and one per text anchor.
    gamma : float, array of shape () or pair of arrays of shape (b,)
        Weight of the batch's own estimate in the moving average, in (0, 1]. With 1 the old estimates are ignored,
        and the loss is the mini-batch loss.
    reference_features : pair of arrays, shape (b, r), optional
        Image and text features of the frozen reference model. Their width r and their dtype may differ from those of
        the learner's features. None: the loss of SogCLR and FastCLIP, without a reference model.
    reference_weight : float or array of shape ()
        lambda >= 0. With 0 the reference model is ignored, DRRho-CLIP uses 1, and numbers above 1 are allowed.
    radius : float or array of shape ()
        Radius >= 0 of the KL ball in which an anchor's weights have to lie. It matters only for learned temperatures.
    eps : float or array of shape ()
        Number >= 0 that is added to the inner estimate. It changes the objective and is no numerical safeguard.
    pair_mask : array of bool, shape (b, b), optional
        If entry (i, j) is False, text j is no negative of image i, and image i is no negative of text j. Entries on the
        diagonal are ignored, because a positive pair is never a negative.
    anchor_weight : array of shape (b,) or pair of arrays of shape (b,), optional
        Factor >= 0 on what each anchor contributes to loss and gradients. A pair has one array for the image anchors
        and one for the text anchors. The factors do not affect the inner estimates. See `reference_anchor_weight`.
    tile_size : int, optional
        Largest side of the square tiles in which the b x b logits are computed. If it is given, no b x b array exists,
        and each tile is computed twice. It affects speed and memory only.
    memory_budget : int, optional
        Bytes that the b x b logits may take (default 1 GiB). If they would take more, each tile is computed twice.
    xp : namespace, optional
        The arrays' namespace; pass it under ``torch.compile``.

    Returns
    -------
    ContrastiveStep
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
    A mean over negatives divides by the number of negatives. The loss is averaged over both directions (1/2) and over
    the batch (1/b), and each anchor's loss is multiplied by tau. An anchor that `pair_mask` leaves without negatives
    contributes 0 and keeps its state. The formulas are those of DRRho-CLIP (arXiv 2505.06699) and SogCLR (arXiv
    2202.12387); they are written out at the top of the source file.

    Examples
    --------
    >>> import numpy as np
    >>> images, texts = np.eye(3), np.eye(3)[[0, 2, 1]]            # the second and the third text are swapped
    >>> unseen = np.full(3, -np.inf)
    >>> step = contrastive_step(images, texts, unseen, unseen, temperature=0.5)
    >>> np.round(step.log_inner_image, 4).tolist()                 # log mean of exp(-2), exp(-2); of 1, exp(2); ...
    [-2.0, 1.4338, 1.4338]
    >>> round(float(step.loss), 4)
    0.1446
    """
    arguments: StepArguments = {
        "temperature": temperature, "gamma": gamma, "reference_features": reference_features,
        "reference_weight": reference_weight, "radius": radius, "eps": eps, "pair_mask": pair_mask,
        "anchor_weight": anchor_weight, "tile_size": tile_size, "memory_budget": memory_budget,
    }  # fmt: skip
    return _narrow_step(image_features, text_features, log_inner_image, log_inner_text, xp, arguments)


def _narrow_step(
    image_features: Array,
    text_features: Array,
    log_inner_image: Array,
    log_inner_text: Array,
    xp: Namespace | None,
    arguments: StepArguments,
) -> ContrastiveStep:
    """Return the result of `wide_contrastive_step` with the features' gradients in the features' dtype."""
    step = wide_contrastive_step(image_features, text_features, log_inner_image, log_inner_text, xp=xp, **arguments)
    if step.image_gradient.dtype == image_features.dtype:
        return step
    xp = namespace_of({"image_features": image_features}, xp)
    return step._replace(
        image_gradient=xp.astype(step.image_gradient, image_features.dtype),
        text_gradient=xp.astype(step.text_gradient, text_features.dtype),
    )


def sharded_contrastive_step(
    image_features: Array,
    text_features: Array,
    log_inner_image: Array,
    log_inner_text: Array,
    /,
    *,
    ranks: Ranks,
    form: str = "reduce",
    temperature: PerAnchor,
    gamma: PerAnchor = 1.0,
    reference_features: tuple[Array, Array] | None = None,
    reference_weight: Scalar = 1.0,
    radius: Scalar = 0.0,
    eps: Scalar = 0.0,
    pair_mask: Array | None = None,
    anchor_weight: AnchorWeight = None,
    tile_size: int | None = None,
    memory_budget: int | None = None,
    sample_index: Array | None = None,
    xp: Namespace | None = None,
) -> ContrastiveStep:
    """Take one step of a batch that several ranks share: the same numbers as `contrastive_step` on the whole batch.

    Each of W ranks calls this function with its own b pairs; the batch has W b pairs. Every pair of every rank is a
    negative of every anchor.

    Parameters
    ----------
    image_features, text_features, log_inner_image, log_inner_text
        As in `contrastive_step`, for the own pairs; b >= 1, the same number on each rank, and W b >= 2.
    ranks : Ranks
        The operations by which the ranks exchange arrays, such as a `ThreadRanks`.
    form : {"reduce", "ring"}
        ``"reduce"`` gathers the texts of all ranks on each rank. ``"ring"`` passes the texts from rank to rank, so that
        no rank holds all texts; it sends more and computes all logits twice.
    temperature, gamma, reference_features, anchor_weight
        As in `contrastive_step`; arrays per pair or per anchor are those of the own pairs.
    reference_weight, radius, eps
        As in `contrastive_step`, the same on all ranks.
    pair_mask : array of bool, shape (b, W b), optional
        As in `contrastive_step`, the rows of the own images. The columns are the texts of all ranks in order.
    tile_size, memory_budget : int, optional
        As in `contrastive_step`; the budget is for all logits of the own images. With ``"ring"`` no logits are kept.
    sample_index : array of integers, shape (b,), optional
        The row ids of the own pairs. If it is given, an id that occurs twice in the whole batch is an error. If the
        host does not read the ids, on a GPU and under tracing, no error is raised: loss and gradients are nan on every
        rank, and the estimates keep the old values.
    xp : namespace, optional
        The arrays' namespace; pass it under ``torch.compile``.

    Returns
    -------
    ContrastiveStep
        Feature gradients, estimates and temperature gradients per anchor are those of the own pairs, and they are
        gradients of the loss of the whole batch. ``loss``, ``surrogate`` and the gradient of a global temperature are
        the same on all ranks. A wrapper that averages gradients over ranks divides by W, so multiply the feature
        gradients by W for such a wrapper.

    Raises
    ------
    TypeError, ValueError
        As in `contrastive_step`. All ranks raise an error if the arguments of one rank are wrong, or if sizes, dtypes
        or options differ between ranks; values are compared on the host only and never under tracing.

    Notes
    -----
    Only blocks of own images and texts of one rank are computed, b x b each. Per own pair a rank receives from every
    other rank, in numbers: 2 d + r + p + 4 in the form ``"reduce"``, 3 d + 2 r + 2 p + 6 in the form ``"ring"``, one
    more with `pair_mask`; p = 1 if temperatures are per anchor, else 0. The distributed form is that of FastCLIP (arXiv
    2407.01445), with sums instead of gathered estimates; see docs/theory/ranks.md.

    Examples
    --------
    >>> import numpy as np
    >>> from drrho_core import ThreadRanks
    >>> images, texts = np.eye(4), np.eye(4)[[0, 2, 1, 3]]
    >>> unseen = np.full(4, -np.inf)
    >>> def step(ranks):                                           # rank 0 has pairs 0 and 1, rank 1 has pairs 2 and 3
    ...     own = slice(2 * ranks.rank, 2 * ranks.rank + 2)
    ...     own_arrays = (x[own] for x in (images, texts, unseen, unseen))
    ...     return sharded_contrastive_step(*own_arrays, ranks=ranks, temperature=0.5)
    >>> [round(float(rank.loss), 6) for rank in ThreadRanks.run(2, step)]
    [-0.214767, -0.214767]
    >>> round(float(contrastive_step(images, texts, unseen, unseen, temperature=0.5).loss), 6)
    -0.214767
    """
    arguments: StepArguments = {
        "temperature": temperature, "gamma": gamma, "reference_features": reference_features,
        "reference_weight": reference_weight, "radius": radius, "eps": eps, "pair_mask": pair_mask,
        "anchor_weight": anchor_weight, "tile_size": tile_size, "memory_budget": memory_budget,
        "ranks": ranks, "form": form, "sample_index": sample_index,
    }  # fmt: skip
    return _narrow_step(image_features, text_features, log_inner_image, log_inner_text, xp, arguments)


def wide_contrastive_step(
    image_features: Array,
    text_features: Array,
    log_inner_image: Array,
    log_inner_text: Array,
    /,
    *,
    xp: Namespace | None = None,
    **arguments: Unpack[StepArguments],
) -> ContrastiveStep:
    """Return the result of `contrastive_step` with the features' gradients in float32 or wider.

    The wrappers for autograd call this function. They multiply the gradients by the incoming gradient, which may be a
    loss scale, before the product is rounded to a half type.
    """
    features, states = (image_features, text_features), (log_inner_image, log_inner_text)
    ranks, form = arguments.get("ranks"), arguments.get("form", FORMS[0])
    check = check_step if ranks is None else check_step_on_ranks
    xp, options = check(features, states, SIDES, xp, arguments)

    # The batch defines Z = E1 E2^T - lambda R1 R2^T. Each of the two passes reads Z once, tile by tile.
    weight, temperatures = options.reference_weight, per_anchor(options.temperature, features[0], options.work, xp)
    references, pair_mask = arguments.get("reference_features"), arguments.get("pair_mask")
    batch = Batch(*features, references, weight, *temperatures, pair_mask)
    if ranks is None and references is not None and references[0].dtype != image_features.dtype:
        # Kernels support only one dtype for all features. Over ranks the features are cast after they were sent.
        batch = in_one_dtype(batch, xp)
    tile_size, memory_budget = arguments.get("tile_size"), arguments.get("memory_budget")
    sweeps = find_sweeps(batch, options.temperature, tile_size, memory_budget, xp, ranks, form, options.kernels)

    # Pass 1: the sum of exp(D) over each anchor's negatives, which gives g, and the weighted mean of D, which the
    # gradient of the temperature needs.
    first = sweeps.sum_negatives(batch)

    # Update u, the moving average of each anchor's g. Now g / (eps + u), the sum of the anchor's weights w, is known.
    image = update(first.log_sum_image, first.count_image, log_inner_image, options.gammas[0], options.eps, xp)
    text = update(first.log_sum_text, first.count_text, log_inner_text, options.gammas[1], options.eps, xp)
    step = evaluate(options, (image, text), means=(first.mean_image, first.mean_text), xp=xp, ranks=ranks)

    # Pass 2: V E2 and V^T E1 with V = w + w', the weighted sums of the negatives' features.
    pulls = sweeps.pull_back(batch, first, *step.weight_sums)

    # c: the factor of a positive, which is the sum of the weights of both anchors of its pair.
    c = step.weight_sums[0] + step.weight_sums[1]
    result = ContrastiveStep(
        loss=step.loss,
        surrogate=step.surrogate,
        image_gradient=wide_gradient(pulls.image_pull, c, features[1], xp, step.unit),
        text_gradient=wide_gradient(pulls.text_pull, c, features[0], xp, step.unit),
        temperature_gradient=step.temperature_gradient,
        log_inner_image=image.log_inner,
        log_inner_text=text.log_inner,
    )
    return result if options.valid is None else with_old_unless(options.valid, result, states, xp)
