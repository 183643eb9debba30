"""Weights per anchor from a reference model: small for pairs whose image and text do not fit together.

Every image and every text of a batch is an anchor, which the loss compares with its negatives: the texts or images of
the other pairs. In the gradient the weights of an anchor's negatives sum to 1, even if the anchor's own pair is wrong
(an image with the caption of another image). So a wrong pair changes the gradient as much as a correct pair. The
argument `reference_features` of `contrastive_step` does not prevent this, because the reference model then changes only
the weight of each negative, not their sum. The argument `anchor_weight` does prevent it: this is a factor on everything
that an anchor contributes. This module computes such factors with a reference model. See docs/theory/contrastive.md,
"Weights per anchor".
"""

from __future__ import annotations

import math

from drrho_core import _validate
from drrho_core._array_api import Array, Namespace, Scalar, wide_dtype
from drrho_core._routines import refuse_kernels
from drrho_core._validate import FINITE, POSITIVE
from drrho_core.contrastive.agreement import agreed
from drrho_core.contrastive.blocks import choose_kernels
from drrho_core.contrastive.options import SHARED, check_features, check_how, check_pair_mask, per_anchor
from drrho_core.contrastive.ranks import FORMS, Ranks
from drrho_core.contrastive.scaling import saturated
from drrho_core.contrastive.sharded_passes import find_sweeps
from drrho_core.extend import Batch, BlockSweeps


def pair_loss(
    image_features: Array,
    text_features: Array,
    /,
    *,
    temperature: Scalar,
    pair_mask: Array | None = None,
    tile_size: int | None = None,
    memory_budget: int | None = None,
    ranks: Ranks | None = None,
    form: str = FORMS[0],
    xp: Namespace | None = None,
) -> Array:
    """Return one loss per pair of a batch; it says how badly the image and the text of the pair fit together.

    If the loss is above 0, the pair fits worse than a random image and a random text of the batch.

    Parameters
    ----------
    image_features, text_features : array, shape (b, d)
        Features that one model computed, unit norm (not enforced), b >= 2. Row i of both arrays is one pair.
    temperature : float or array of shape ()
        Temperature tau > 0.
    pair_mask : array of bool, shape (b, b), optional
        If entry (i, j) is False, text j is left out of the mean of image i, and image i is left out of the mean of text
        j, for example because text j is another caption of image i. The diagonal is always left out.
    tile_size, memory_budget : int, optional
        As in `contrastive_step`. They affect speed and memory only, not the result.
    ranks, form
        As in `info_nce`: the arguments and the result belong to the own pairs, and the means are over the texts and the
        images of all ranks.
    xp : namespace, optional
        The arrays' namespace; pass it under ``torch.compile``.

    Returns
    -------
    array, shape (b,)
        One loss per pair, dimensionless, in the features' dtype (float32 for half types).

    Raises
    ------
    TypeError, ValueError
        As in `contrastive_step`.

    Notes
    -----
    With the similarities S the loss is half of ``log mean_{j != i} exp((S_ij - S_ii) / tau)`` over row i, plus half of
    the same over column i. Each of these two means is the inner estimate of SogCLR (arXiv 2202.12387) that this batch
    alone gives. A mean is over the pairs that `pair_mask` leaves. If the mask leaves none, the half of that row or
    column is 0, because nothing says whether the pair fits worse than a random pair.

    Examples
    --------
    >>> import numpy as np
    >>> images, texts = np.eye(3), np.eye(3)[[0, 2, 1]]            # the second and the third text are swapped
    >>> np.round(pair_loss(images, texts, temperature=0.5), 4).tolist()
    [-2.0, 1.4338, 1.4338]

    If images 1 and 2 are the same image, both captions are right for both rows:

    >>> images, texts = np.eye(3)[[0, 1, 1]], np.eye(3)
    >>> same_image = np.asarray([[True, False, False], [False, True, True], [False, True, True]])
    >>> np.round(pair_loss(images, texts, temperature=0.5, pair_mask=~same_image), 4).tolist()
    [-2.0, -2.0, 0.0]
    """
    arrays = {"image_features": image_features, "text_features": text_features}
    if pair_mask is not None:
        arrays["pair_mask"] = pair_mask

    def check() -> tuple[Namespace, int, Scalar, Batch, BlockSweeps | None]:
        num_ranks = check_how(ranks, form, tile_size, memory_budget)
        call = _validate.arrays(arrays, xp, options={"temperature": temperature})
        if ranks is not None:
            refuse_kernels(SHARED, call.xp)
        num_local, work = check_features(call, num_ranks=num_ranks), wide_dtype(image_features.dtype, call.xp)
        check_pair_mask(call, num_local, num_ranks)
        tau = call.option("temperature", temperature, POSITIVE, work)
        temperatures = per_anchor(tau, image_features, work, call.xp)
        batch = Batch(image_features, text_features, None, 1.0, temperatures[0], temperatures[1], pair_mask)
        return call.xp, num_ranks * num_local, tau, batch, choose_kernels(batch, ranks, call.xp)

    xp, batch_size, temperature, batch, kernels = agreed(
        check, arrays | {"temperature": temperature, "form": form}, ranks, kernels=lambda result: result[-1]
    )
    # The first of the two passes over all pairs (see `passes`) is enough. The logarithm of the mean over the negatives
    # is the log-sum-exp minus the logarithm of the number of negatives, which is b - 1 without a mask.
    sweeps = find_sweeps(batch, temperature, tile_size, memory_budget, xp, ranks, form, kernels)
    first = sweeps.sum_negatives(batch)
    if pair_mask is None:
        return 0.5 * first.log_sum_image + 0.5 * first.log_sum_text - math.log(batch_size - 1)
    halves = []
    for log_sum, count in ((first.log_sum_image, first.count_image), (first.log_sum_text, first.count_text)):
        has_negatives = count > 0
        log_count = xp.log(xp.where(has_negatives, count, xp.ones_like(count)))
        halves.append(0.5 * xp.where(has_negatives, log_sum - log_count, xp.zeros_like(log_sum)))
    return halves[0] + halves[1]


def reference_anchor_weight(
    pair_loss: Array,
    /,
    *,
    temperature: Scalar = 0.5,
    threshold: Scalar = -1.0,
    xp: Namespace | None = None,
) -> Array:
    """Return weights of anchors: large for pairs that a reference model finds plausible, close to 0 for all others.

    Parameters
    ----------
    pair_loss : array, shape (b,)
        `pair_loss` of each pair, from the features of a reference model that has not memorised the pairs.
    temperature : float or array of shape ()
        Width > 0 of the transition from large to small weights, in units of the pair loss.
    threshold : float or array of shape ()
        The pair loss at which a pair gets half of the largest possible weight.
    xp : namespace, optional
        The array's namespace; pass it under ``torch.compile``.

    Returns
    -------
    array, shape (b,)
        Weights >= 0 with mean 1, in the dtype of `pair_loss`. Pass them to `contrastive_step` as `anchor_weight`. For a
        mean of 1 over a data set, pass the losses of all its pairs at once, and select the weights of each batch.

    Raises
    ------
    TypeError
        If `pair_loss` is no array of a real floating dtype, or another argument has a wrong type.
    ValueError
        If a shape or a value breaks the rules above, or an input requires gradients of autograd.

    Notes
    -----
    The weight of a pair with loss l_i is ``sigmoid(-(l_i - threshold) / temperature)``, divided by the mean of these
    sigmoids. The share of wrong pairs need not be known: the weight falls as the loss rises, and is close to 0 for any
    pair that fits clearly worse than a random pair.

    Examples
    --------
    >>> import numpy as np
    >>> np.round(reference_anchor_weight(np.asarray([-4.0, -1.0, 3.0])), 3).tolist()
    [1.998, 1.001, 0.001]
    """
    call = _validate.arrays({"pair_loss": pair_loss}, xp, options={"temperature": temperature, "threshold": threshold})
    xp = call.xp
    call.array("pair_loss", axes=1, meaning="(batch_size,)")
    if pair_loss.shape[0] == 0:
        raise ValueError("pair_loss must hold at least 1 entry, got shape (0,)")
    call.values("pair_loss", pair_loss, FINITE)
    work = wide_dtype(pair_loss.dtype, xp)
    temperature = call.option("temperature", temperature, POSITIVE, work)
    threshold = call.option("threshold", threshold, FINITE, work)
    # With y = (pair_loss - threshold) / temperature the weights are computed from log sigmoid(-y), so that their ratios
    # are right even if all sigmoids would underflow.
    largest = float(xp.finfo(work).max) / 8.0
    # Pair loss and threshold are halved before the subtraction, because their difference may overflow.
    y = 2.0 * saturated(0.5 * xp.astype(pair_loss, work, copy=False) - 0.5 * threshold, 1.0 / temperature, xp=xp)
    y = xp.clip(y, -largest, largest)
    log_weight = -xp.logaddexp(xp.zeros_like(y), y)
    weight = xp.exp(log_weight - xp.max(log_weight))
    return xp.astype(weight / xp.mean(weight), pair_loss.dtype, copy=False)
