"""Weights per anchor from a reference model: how badly a pair fits, and a weight that leaves such pairs out softly.

An anchor's weights over its negatives sum to 1 however wrong the pair is, so a pair with a wrong caption pulls with
full strength, and a reference model in the similarity changes only which negatives push. `anchor_weight` of
`contrastive_step` is a factor on the whole anchor; here is one that a reference model chooses. See
docs/theory/contrastive.md, "Weights per anchor".
"""

from __future__ import annotations

import math

from drrho_core import _validate
from drrho_core._array_api import Array, Namespace, Scalar, wide_dtype
from drrho_core._validate import FINITE, POSITIVE
from drrho_core.contrastive.options import check_features, per_anchor
from drrho_core.contrastive.passes import find_sweeps
from drrho_core.contrastive.scaling import saturated
from drrho_core.extend import Batch


def pair_loss(
    image_features: Array,
    text_features: Array,
    /,
    *,
    temperature: Scalar,
    tile_size: int | None = None,
    memory_budget: int | None = None,
    xp: Namespace | None = None,
) -> Array:
    """Return how badly each pair of a batch fits: above 0 it fits worse than the batch's other pairs do on average.

    Parameters
    ----------
    image_features, text_features : array, shape (b, d)
        Features of the pairs by one model, unit norm (not enforced), b >= 2. Row i of both is a pair.
    temperature : float or array of shape ()
        Temperature tau > 0.
    tile_size, memory_budget : int, optional
        Affect speed and memory only, not the result: see `contrastive_step`. One sweep is enough.
    xp : namespace, optional
        The arrays' namespace; pass it under ``torch.compile``.

    Returns
    -------
    array, shape (b,)
        One loss per pair, dimensionless, in the features' dtype (float32 for half types).

    Raises
    ------
    TypeError, ValueError
        As `contrastive_step`.

    Notes
    -----
    Half of ``log mean_{j != i} exp((S_ij - S_ii) / tau)`` over row i, plus half of the same over column i: the
    logarithm of the inner estimate of SogCLR (arXiv 2202.12387) on this batch, averaged over both directions.

    Examples
    --------
    >>> import numpy as np
    >>> images, texts = np.eye(3), np.eye(3)[[0, 2, 1]]            # the second and third pair are the wrong way round
    >>> np.round(pair_loss(images, texts, temperature=0.5), 4).tolist()
    [-2.0, 1.4338, 1.4338]
    """
    features = {"image_features": image_features, "text_features": text_features}
    call = _validate.arrays(features, xp, options={"temperature": temperature})
    xp, batch_size, work = call.xp, check_features(call), wide_dtype(image_features.dtype, call.xp)
    temperature = call.option("temperature", temperature, POSITIVE, work)
    temperatures = per_anchor(temperature, image_features, work, xp)
    batch = Batch(image_features, text_features, None, 1.0, temperatures[0], temperatures[1], None)
    # Pass 1 alone: the mean over the negatives is the log-sum-exp less log(b - 1), the same for both directions.
    first = find_sweeps(batch, temperature, tile_size, memory_budget, xp).sum_negatives(batch)
    return 0.5 * first.log_sum_image + 0.5 * first.log_sum_text - math.log(batch_size - 1)


def reference_anchor_weight(
    pair_loss: Array,
    /,
    *,
    temperature: Scalar = 0.5,
    threshold: Scalar = -1.0,
    xp: Namespace | None = None,
) -> Array:
    """Return weights of anchors: large for pairs that a reference model finds plausible, next to 0 for all others.

    Parameters
    ----------
    pair_loss : array, shape (b,)
        Each pair's loss by a reference model that has not memorised the pairs: see `pair_loss`.
    temperature : float or array of shape ()
        Width > 0 of the transition, in units of the pair loss.
    threshold : float or array of shape ()
        The pair loss at which a pair gets half of the largest weight.
    xp : namespace, optional
        The array's namespace; pass it under ``torch.compile``.

    Returns
    -------
    array, shape (b,)
        Weights >= 0 with mean 1 over this array, in its dtype: the `anchor_weight` of `contrastive_step`. For a mean
        of 1 over a data set, pass the losses of all its pairs and take the rows of each batch.

    Raises
    ------
    TypeError
        If `pair_loss` is no array of a real floating dtype, or a number has another type.
    ValueError
        If a shape or a value breaks the rules above, or an input asks for autograd.

    Notes
    -----
    ``a_i = sigmoid(-(l_i - threshold) / temperature)``, divided by its mean. It leaves pairs out without a threshold on
    a share: a pair that fits worse than a random one pulls with next to nothing.

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
    # log sigmoid(-y), then a softmax: if all sigmoids underflow, their ratios still exist.
    largest = float(xp.finfo(work).max) / 8.0
    # Halves, because a loss and a threshold may differ by more than the largest number.
    y = 2.0 * saturated(0.5 * xp.astype(pair_loss, work, copy=False) - 0.5 * threshold, 1.0 / temperature, xp=xp)
    y = xp.clip(y, -largest, largest)
    log_weight = -xp.logaddexp(xp.zeros_like(y), y)
    weight = xp.exp(log_weight - xp.max(log_weight))
    return xp.astype(weight / xp.mean(weight), pair_loss.dtype, copy=False)
