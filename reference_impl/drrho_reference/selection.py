"""Selection of training samples from a large batch: the samples whose loss exceeds the reference model's loss most.

Sources: RHO-LOSS, arXiv 2206.07137, for single samples; JEST, arXiv 2406.17711, for samples that are chosen together.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from drrho_reference._checks import FloatArray, real_array, real_matrix, whole_number
from drrho_reference.anchor import within_range
from drrho_reference.risk import excess_loss

__all__ = ["chunk_sizes", "joint_scores", "select_jest", "select_top_excess"]

IntegerArray: TypeAlias = npt.NDArray[np.int64]


def select_top_excess(
    loss: npt.ArrayLike, reference_loss: npt.ArrayLike, /, *, k: int, reference_weight: float = 1.0
) -> IntegerArray:
    """Keep the k samples of largest excess loss.

    Parameters
    ----------
    loss, reference_loss : array (n,)
        The losses of the model and of the frozen reference model.
    k : int
        The number of samples to keep, 1 to n.
    reference_weight : float
        lambda, at least 0. With 0 the samples of largest loss are kept.

    Returns
    -------
    array (k,) of int64
        The positions of these samples. The sample with the largest excess loss comes first; if excess losses are equal,
        the lower position comes first.

    Raises
    ------
    TypeError, ValueError
        If the losses are no finite real numbers along one axis, or k is out of range.

    Notes
    -----
    Source: RHO-LOSS, arXiv 2206.07137.

    Examples
    --------
    Sample 1 has the largest loss, but the reference model's loss on this sample is just as large.

    >>> select_top_excess([1.0, 9.0, 2.0, 3.0], [0.5, 9.0, 2.5, 2.5], k=2).tolist()
    [0, 3]
    """
    # RHO: x_i = l_i - lambda r_i, the largest first.
    excess = excess_loss(loss, reference_loss, reference_weight=reference_weight)
    if excess.ndim != 1:
        raise ValueError(f"loss must have one axis, got the shape {excess.shape}")
    k = whole_number("k", k, 1, len(excess))
    return np.array(_largest(excess, k), dtype=np.int64)


def _largest(scores: Sequence[float] | FloatArray, count: int) -> list[int]:
    """Return the positions of the largest scores, in descending order of scores; ties are in order of positions."""
    return sorted(range(len(scores)), key=lambda i: (-float(scores[i]), i))[:count]


def chunk_sizes(k: int, num_chunks: int, /) -> list[int]:
    """Divide k samples among the chunks: k // num_chunks each, and one more for the first k % num_chunks chunks.

    Parameters
    ----------
    k : int
        The number of samples, at least ``num_chunks``.
    num_chunks : int
        The number of chunks, at least 1.

    Returns
    -------
    list of int
        The sizes of the chunks; their sum is k.

    Notes
    -----
    Source: JEST, arXiv 2406.17711, chooses a batch chunk by chunk.

    Examples
    --------
    >>> chunk_sizes(8, 3)
    [3, 3, 2]
    """
    return [k // num_chunks + (1 if chunk < k % num_chunks else 0) for chunk in range(num_chunks)]


def joint_scores(learner_logits: FloatArray, reference_logits: FloatArray, chosen: Sequence[int], /) -> list[float]:
    """Score every pair by the excess loss that it would have in a batch with the pairs chosen so far.

    Parameters
    ----------
    learner_logits, reference_logits : array (n, n)
        L and R, the scaled similarities of the model and of the reference model. Row i: image i; column j: text j.
    chosen : sequence of int
        C, the positions of the pairs that are chosen so far.

    Returns
    -------
    list of float (n,)
        One score per pair; -inf for pairs that are already chosen.

    Raises
    ------
    FloatingPointError
        If an exponential leaves the range of float64: logits above about 700.

    Notes
    -----
    If C is empty, score_i = R_ii - L_ii. Otherwise
    score_i = R_ii - L_ii + [log sum_{j in C} e^L_ij - log sum_{j in C} e^R_ij + the same of e^L_ji and e^R_ji] / 2.
    This is the model's contrastive loss log sum_{j in C} e^(L_ij - L_ii), averaged over both directions, minus the same
    loss of the reference model. Source: JEST, arXiv 2406.17711.

    Examples
    --------
    No pair is chosen yet, so score_i = R_ii - L_ii: pair 0 gets the score 3 - 1, and pair 1 gets the score 1 - 1.

    >>> import numpy as np
    >>> joint_scores(np.array([[1.0, 0.0], [0.0, 1.0]]), np.array([[3.0, 0.0], [0.0, 1.0]]), [])
    [2.0, 0.0]
    """
    scores = []
    for i in range(len(learner_logits)):
        if i in chosen:
            scores.append(-math.inf)
            continue
        # The pair's own logits. The positive's logit has the sign -1 in a contrastive loss, so the score, which is the
        # model's loss minus the reference model's loss, contains R_ii - L_ii.
        score = float(reference_logits[i, i]) - float(learner_logits[i, i])
        if chosen:
            # The chosen pairs as negatives: rows (texts of image i), then columns (images of text i), each times 1/2.
            score += 0.5 * _log_sum("learner_logits", [learner_logits[i, j] for j in chosen])
            score -= 0.5 * _log_sum("reference_logits", [reference_logits[i, j] for j in chosen])
            score += 0.5 * _log_sum("learner_logits", [learner_logits[j, i] for j in chosen])
            score -= 0.5 * _log_sum("reference_logits", [reference_logits[j, i] for j in chosen])
        scores.append(score)
    return scores


def _log_sum(argument: str, logits: Sequence[float]) -> float:
    """Return log sum_j e^l_j; raise FloatingPointError if the sum of the exponentials leaves the range of float64."""
    try:
        total = math.fsum(math.exp(logit) for logit in logits)
    except OverflowError:
        total = math.inf
    return math.log(within_range(argument, float(max(logits)), total))


def select_jest(
    learner_logits: npt.ArrayLike,
    reference_logits: npt.ArrayLike,
    /,
    *,
    k: int,
    num_chunks: int,
    top_k: bool = False,
    gumbel: npt.ArrayLike | None = None,
) -> IntegerArray:
    """Choose k pairs chunk by chunk; before each chunk every pair is scored, given the pairs chosen so far.

    Parameters
    ----------
    learner_logits, reference_logits : array (n, n)
        Scaled similarities of the model and of the frozen reference model, row i: image i, column j: text j.
    k : int
        The number of pairs to choose, 1 to n.
    num_chunks : int
        The number of chunks, 1 to k.
    top_k : bool
        True chooses the pairs with the largest scores; if scores are equal, the pair with the lower position is chosen.
        False draws pairs without replacement, with probabilities proportional to e^score.
    gumbel : array (num_chunks, n), optional
        Gumbel noise, one row for each chunk. The noise is required if ``top_k`` is False and not allowed if ``top_k``
        is True.

    Returns
    -------
    array (k,) of int64
        The positions in the order in which they were chosen.

    Raises
    ------
    TypeError, ValueError
        If shapes do not fit or values leave their domains.
    FloatingPointError
        If an exponential leaves the range of float64: logits above about 700.

    Notes
    -----
    A chunk consists of the pairs with the largest sums score + noise; :func:`joint_scores` computes the scores.
    Choosing the largest sums is the same as drawing pairs without replacement with probabilities proportional to
    e^score, because the noise has a Gumbel distribution. Source: JEST, arXiv 2406.17711.

    Examples
    --------
    Pair 0 has the largest score at first, 3 - 0. Once pair 0 is chosen, pair 2 has a larger score than pair 1, because
    the model confuses image 2 with text 0 (their logit is 5).

    >>> learner = [[0.0, 1.0, 1.0], [1.0, 2.0, 0.0], [5.0, 0.0, 2.0]]
    >>> reference = [[3.0, 0.0, 0.0], [0.0, 3.0, 0.0], [0.0, 0.0, 3.0]]
    >>> select_jest(learner, reference, k=2, num_chunks=2, top_k=True).tolist()
    [0, 2]
    """
    learner = real_matrix("learner_logits", learner_logits)
    n = learner.shape[0]
    if learner.shape != (n, n):
        raise ValueError(f"learner_logits must be square, got the shape {learner.shape}")
    reference = real_array("reference_logits", reference_logits, (n, n))
    k = whole_number("k", k, 1, n)
    num_chunks = whole_number("num_chunks", num_chunks, 1, k)
    if not isinstance(top_k, bool):
        raise TypeError(f"top_k must be True or False, got {top_k!r}")
    if top_k != (gumbel is None):
        raise ValueError(f"gumbel must be given if and only if top_k is False, got {gumbel!r} with top_k={top_k}")
    noise = np.zeros((num_chunks, n)) if gumbel is None else real_array("gumbel", gumbel, (num_chunks, n))

    chosen: list[int] = []
    # The scores of the remaining pairs depend on the chosen pairs, so the scores are computed again for each chunk.
    for chunk, size in enumerate(chunk_sizes(k, num_chunks)):
        scores = joint_scores(learner, reference, chosen)
        chosen += _largest([score + float(noise[chunk, i]) for i, score in enumerate(scores)], size)
    return np.array(chosen, dtype=np.int64)
