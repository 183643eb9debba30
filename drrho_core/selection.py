"""Selection of training samples by excess losses. RHO-LOSS selects sample by sample, JEST chunk by chunk.

A super-batch holds n candidates, of which k are selected. Shapes: losses (n,), logits (n, n) with images as rows, texts
as columns, and positives on the diagonal. Results are indices into the super-batch. Sizes are static: only the values
of the indices depend on data.

    RHO-LOSS   the k largest x_i = l_i - lambda r_i
    JEST       score_i = own_i + 1/2 [lse_{j in C} L_ij - lse_{j in C} R_ij + lse_{j in C} L_ji - lse_{j in C} R_ji]

Here l and L are losses and logits of the learner, r and R those of the reference model, and lambda is the weight of the
reference model. own_i = -(L_ii - R_ii), C holds the pairs chosen so far, and lse is log-sum-exp.
Docs: docs/theory/selection.md. Sources: RHO-LOSS (arXiv 2206.07137), JEST (arXiv 2406.17711).
"""

from __future__ import annotations

import math
import random

from drrho_core import _validate
from drrho_core._array_api import Array, Namespace, device_of, is_compiling, wide_dtype
from drrho_core._validate import FINITE, NOT_NEGATIVE
from drrho_core.ambiguity.checks import check_losses
from drrho_core.contrastive.agreement import agreed
from drrho_core.contrastive.ranks import Ranks
from drrho_core.numerics import log_sum_exp
from drrho_core.risk import scaled_difference


def select_top_excess(
    loss: Array,
    reference_loss: Array,
    /,
    *,
    k: int,
    reference_weight: float | Array = 1.0,
    ranks: Ranks | None = None,
    xp: Namespace | None = None,
) -> Array:
    """Return the indices of the k samples with the largest excess loss: RHO-LOSS selection from a super-batch.

    Parameters
    ----------
    loss : array, shape (n,)
        The learner's losses, real floating.
    reference_loss : array, shape (n,)
        The frozen reference model's losses on the same samples, in the same dtype.
    k : int
        Number of samples to keep, 1 <= k <= n; static under jit.
    reference_weight : float or array of shape ()
        At least 0. With 0 the samples with the largest losses are kept. With 1 the selection is RHO-LOSS.
    ranks : Ranks, optional
        The ranks that share the super-batch. The losses then belong to the own n samples, equally many on each rank,
        and sample i of rank r has the index r n + i. All ranks return the same k <= W n indices; W is the number of
        ranks. Two numbers per sample are exchanged.
    xp : namespace, optional
        The arrays' namespace; pass it under ``torch.compile``.

    Returns
    -------
    array of integers, shape (k,)
        The indices in the order of falling excess losses. For equal excess losses the lower index comes first.

    Raises
    ------
    TypeError, ValueError
        If an argument breaks these rules, a value is nan or infinite (checked on the host and outside tracing only), or
        an array requires gradients of autograd.

    Notes
    -----
    The selected samples have the k largest ``loss - reference_weight * reference_loss``: RHO-LOSS (arXiv 2206.07137).
    Losses of half types are subtracted in float32, so that rounding does not make different excess losses equal. Under
    tracing a nan counts as the smallest excess loss.

    Examples
    --------
    >>> import numpy as np
    >>> select_top_excess(np.asarray([5.0, 1.0, 2.0, 2.0]), np.asarray([4.9, 0.5, 0.0, 0.0]), k=3).tolist()
    [2, 3, 1]
    """
    arrays = {"loss": loss, "reference_loss": reference_loss}

    def check() -> tuple[Namespace, float | Array, int]:
        call = check_losses(arrays, None, xp, options={"reference_weight": reference_weight})
        weight = call.option("reference_weight", reference_weight, NOT_NEGATIVE, wide_dtype(loss.dtype, call.xp))
        call.array("loss", axes=1, meaning="(num_samples,)")
        num_samples = loss.shape[0] * (1 if ranks is None else ranks.size)
        size = _at_most(_validate.integer("k", k, minimum=1), num_samples)
        for name, array in arrays.items():
            call.values(name, array, FINITE)
        return call.xp, weight, size

    xp, weight, k = agreed(check, arrays | {"k": k, "reference_weight": reference_weight}, ranks)
    if ranks is not None:
        loss, reference_loss = (xp.reshape(x, (-1,)) for x in ranks.all_gather((loss, reference_loss)))
    return _top(scaled_difference(loss, reference_loss, weight, xp)[0], k, xp)


def select_jest(
    learner_logits: Array,
    reference_logits: Array,
    /,
    *,
    k: int,
    num_chunks: int,
    top_k: bool = False,
    gumbel: Array | None = None,
    xp: Namespace | None = None,
) -> Array:
    """Return the indices of a batch that is hard for the learner and easy for the reference model: JEST.

    The batch grows chunk by chunk, and the choice of a chunk depends on the pairs that are already in the batch.

    Parameters
    ----------
    learner_logits, reference_logits : array, shape (n, n)
        Similarities of the super-batch's images and texts, divided by the temperature of the model. Both arrays have
        the same floating dtype.
    k : int
        Number of pairs to keep, 1 <= k <= n; static under jit.
    num_chunks : int
        Number of chunks, at least 1. A chunk has ``k // num_chunks`` pairs. The first ``k % num_chunks`` chunks have
        one pair more.
    top_k : bool
        If False, chunks are drawn at random, with higher probability for higher scores. If True, a chunk holds the
        pairs with the largest scores; for equal scores the lower index comes first.
    gumbel : array, shape (num_chunks, n), optional
        Standard Gumbel noise ``-log(-log(u))`` with u uniform in (0, 1), one row per chunk, in the dtype of the logits.
        The same noise gives the same choice. With None the noise is drawn with Python's ``random``. Under tracing None
        is an error, because the noise would be a constant of the compiled code.
    xp : namespace, optional
        The arrays' namespace; pass it under ``torch.compile``.

    Returns
    -------
    array of integers, shape (k,)
        The indices in the order of the choice: chunk by chunk, and within a chunk by falling score plus noise. No index
        occurs twice.

    Raises
    ------
    TypeError, ValueError
        If an argument breaks these rules, noise is given together with ``top_k=True``, or noise is missing under
        tracing. Whether values are finite is checked on the host and outside tracing only.

    Notes
    -----
    With C the pairs chosen so far,
    ``score_i = own_i + 1/2 [lse_{j in C} L_ij - lse_{j in C} R_ij + lse_{j in C} L_ji - lse_{j in C} R_ji]``, with
    ``own_i = -(L_ii - R_ii)``, as in JEST (arXiv 2406.17711). The score of pairs in C is ``-inf``. For the first chunk
    the score is ``own``. The pairs with the largest score plus Gumbel noise are a draw without replacement from
    softmax(score). Such a draw needs no exponential of a score, which would overflow at the scale of CLIP's logits.

    The score of a pair depends on rows and on columns of both matrices. So if ranks share the super-batch, gather the
    features of all ranks on each rank, and pass the same noise on each of them: then all ranks make the same choice.

    Examples
    --------
    >>> import numpy as np
    >>> learner = np.asarray([[0.0, 9.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 2.0]])   # image 0 is close to text 1
    >>> select_jest(learner, np.zeros((3, 3)), k=2, num_chunks=1, top_k=True).tolist()
    [0, 1]
    >>> select_jest(learner, np.zeros((3, 3)), k=2, num_chunks=2, gumbel=np.asarray([[0.0, 5, 0], [0, 0, 0]])).tolist()
    [1, 0]
    """
    arrays = {"learner_logits": learner_logits, "reference_logits": reference_logits}
    if gumbel is not None:
        arrays["gumbel"] = gumbel
    call = _validate.arrays(arrays, xp)
    xp = call.xp
    for name in arrays:
        meaning = "(num_chunks, num_samples)" if name == "gumbel" else "(num_samples, num_samples)"
        call.array(name, axes=2, meaning=meaning)
    call.same_dtype(*arrays)
    n = int(learner_logits.shape[0])
    for name in ("learner_logits", "reference_logits"):
        call.array(name, shape=(n, n), meaning="(num_samples, num_samples)")
    k = _at_most(_validate.integer("k", k, minimum=1), n)
    num_chunks = _validate.integer("num_chunks", num_chunks, minimum=1)
    if not isinstance(top_k, bool):
        raise TypeError(f"top_k must be True or False, got {_validate.describe(top_k)}")
    if gumbel is not None:
        if top_k:
            raise ValueError("gumbel must be None if top_k is True, because no noise is drawn, got an array")
        _validate.shape("gumbel", gumbel, (num_chunks, n), "(num_chunks, num_samples)")
    for name, array in arrays.items():
        call.values(name, array, FINITE)

    dtype = wide_dtype(learner_logits.dtype, xp)
    learner, reference = xp.astype(learner_logits, dtype), xp.astype(reference_logits, dtype)
    if gumbel is None and not top_k:
        gumbel = _draw_gumbel(num_chunks, learner, xp)
    samples = xp.arange(n, device=device_of(learner))
    # Only the order of scores matters. Scores are divided by 8, so that differences of the largest logits stay finite.
    # own_i = -(L_ii - R_ii) comes from the diagonal of the flattened matrix.
    own = xp.reshape(0.125 * reference - 0.125 * learner, (-1,))[:: n + 1]
    free = xp.ones((n,), dtype=xp.bool, device=device_of(learner))
    reach: list[Array] | None = None  # the four log-sum-exp over the pairs chosen so far
    chosen = []
    for chunk in range(min(num_chunks, k)):
        score = own
        if reach is not None:
            learner_image, reference_image, learner_text, reference_text = (0.0625 * array for array in reach)
            score = score + ((learner_image - reference_image) + (learner_text - reference_text))
        # The pairs with the largest score plus Gumbel noise are a draw without replacement from softmax(score).
        if gumbel is not None:
            score = score + 0.125 * xp.astype(gumbel[chunk, :], dtype)
        size = k // num_chunks + (chunk < k % num_chunks)
        index = _top(xp.where(free, score, -xp.inf), size, xp)
        chosen.append(index)
        free = free & xp.all(samples[:, None] != index[None, :], axis=1)
        # lse over C of L_ij, R_ij, L_ji and R_ji, extended by the new chunk.
        new = [
            log_sum_exp(xp.take(logits, index, axis=axis), axis=axis, where=None, xp=xp)
            for axis in (1, 0)
            for logits in (learner, reference)
        ]
        reach = new if reach is None else [xp.logaddexp(old, more) for old, more in zip(reach, new, strict=True)]
    return chosen[0] if len(chosen) == 1 else xp.concat(chosen)


def _at_most(k: int, n: int) -> int:
    """Return k after checking that n samples are enough."""
    if k > n:
        raise ValueError(f"k must be at most the number of samples {n}, got {k}")
    return k


def _top(score: Array, k: int, xp: Namespace) -> Array:
    """Return the indices of the k largest entries of (n,). The sort is stable, so ties go to the lower index."""
    return xp.argsort(-score, stable=True)[:k]


def _draw_gumbel(num_chunks: int, like: Array, xp: Namespace) -> Array:
    """Return standard Gumbel noise (num_chunks, n), drawn on the host because the Array API has no random numbers."""
    if is_compiling(xp) or device_of(xp.zeros(())) is None:
        raise ValueError("gumbel must be given if code is traced and top_k is False, got None")
    n = like.shape[0]
    # Gumbel noise is -log(-log(u)), and an exponential variate is -log(u). Once in 2^53 draws the variate is 0. It is
    # replaced by 1e-17, because the logarithm of 0 would be an error.
    noise = [[-math.log(random.expovariate(1.0) or 1e-17) for _ in range(n)] for _ in range(num_chunks)]
    return xp.asarray(noise, dtype=like.dtype, device=device_of(like))
