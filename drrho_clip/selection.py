"""Selection of a batch from a super-batch by the learner and a reference model: RHO-LOSS and JEST.

A super-batch has n = super_batch * batch_size pairs. The encoders read it once without a gradient. The k = batch_size
pairs that are chosen then pass the encoders again, now with a gradient, so a step costs one more forward pass of the
super-batch. Logits are similarities divided by the temperature of their model, (n, n), with images as rows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from drrho_clip.processes.shared_rows import moved_rows
from drrho_core import Ranks, select_jest, select_top_excess
from drrho_core.checks import Array, Namespace, device_of

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from drrho_clip.config import TrainConfig
    from drrho_clip.step import StepBatch

# The fields of a batch with a row per pair, except for the mask, whose columns are chosen too.
_CHOSEN = ("images", "texts", "log_inner_image", "log_inner_text", "reference_features", "anchor_weight")

# Distinguishes the noise of the selection from other random numbers of the same seed.
_STREAM = 0x4A455354


def select_rho(learner: Array, reference: Array, batch: StepBatch, config: TrainConfig, xp: Namespace) -> Array:
    """Return the indices of the pairs with the largest excess loss: the InfoNCE of the pair minus the reference's."""
    losses = [_pair_losses(logits, batch.pair_mask, xp) for logits in (learner, reference)]
    return select_top_excess(losses[0], losses[1], k=config.batch_size, xp=xp)


def select_joint(learner: Array, reference: Array, batch: StepBatch, config: TrainConfig, xp: Namespace) -> Array:
    """Return the indices of a batch that JEST draws chunk by chunk; without noise in the batch: of JEST's top k."""
    return select_jest(
        _without_siblings(learner, batch.pair_mask, xp),
        _without_siblings(reference, batch.pair_mask, xp),
        k=config.batch_size,
        num_chunks=min(config.jest_chunks, config.batch_size),
        top_k=batch.gumbel is None,
        gumbel=batch.gumbel,
        xp=xp,
    )


def gumbel_noise(config: TrainConfig, step: int) -> npt.NDArray[np.float64]:
    """Return the noise of a step of JEST, (chunks, n), which depends on seed and step only."""
    shape = min(config.jest_chunks, config.batch_size), config.batch_size * config.super_batch
    # Imported here, because the help of the command line reads the table of methods, and NumPy loads slowly.
    import numpy as np

    return np.random.default_rng([config.seed, _STREAM, step]).gumbel(size=shape)


def part_of(batch: StepBatch, index: Array, xp: Namespace, ranks: Ranks | None = None) -> StepBatch:
    """Return the batch of the chosen pairs; `index` has their positions in the super-batch.

    If several processes share the super-batch, each gets an equal part of the chosen pairs, in the order of `index`.
    The pairs of other processes arrive in one message.
    """
    fields = {name: getattr(batch, name) for name in _CHOSEN if getattr(batch, name) is not None}
    if batch.pair_mask is not None:
        # The columns of the mask belong to all pairs of the super-batch, on every process.
        fields["pair_mask"] = xp.take(batch.pair_mask, index, axis=1)
    # A pair of arrays, such as the features of the reference model, travels as two arrays.
    flat = {name: value if isinstance(value, tuple) else (value,) for name, value in fields.items()}
    moved = iter(moved_rows(tuple(array for arrays in flat.values() for array in arrays), index, ranks, xp))
    parts = {name: tuple(next(moved) for _ in arrays) for name, arrays in flat.items()}
    return batch._replace(
        **{name: part if isinstance(fields[name], tuple) else part[0] for name, part in parts.items()}
    )


def _pair_losses(logits: Array, pair_mask: Array | None, xp: Namespace) -> Array:
    """Return the InfoNCE loss of each pair, (n,): the mean of its cross-entropies over its row and over its column."""
    own = xp.reshape(logits, (-1,))[:: logits.shape[0] + 1]
    logits = _without_siblings(logits, pair_mask, xp)
    sums = []
    for axis in (0, 1):
        peak = xp.max(logits, axis=axis, keepdims=True)
        sums.append(xp.log(xp.sum(xp.exp(logits - peak), axis=axis)) + xp.squeeze(peak, axis=axis))
    return 0.5 * (sums[0] + sums[1]) - own


def _without_siblings(logits: Array, pair_mask: Array | None, xp: Namespace) -> Array:
    """Return logits in which a caption of the same image, other than the pair's own caption, has no weight.

    Such a caption is no wrong answer. Its logit becomes so small that its exponential is 0 beside any other logit. The
    logit stays finite, so that two models that both lack the caption differ by 0.
    """
    if pair_mask is None:
        return logits
    index = xp.arange(logits.shape[0], device=device_of(logits))
    counted = pair_mask | (xp.expand_dims(index, axis=1) == xp.expand_dims(index, axis=0))
    # Half of the range leaves room for differences.
    return xp.where(counted, logits, xp.full_like(logits, 0.5 * float(xp.finfo(logits.dtype).min)))
