"""Number of steps of an epoch, the same for a run and for the plan of a run."""

from __future__ import annotations

from drrho_clip.config import TrainConfig
from drrho_clip.errors import BadInput

__all__ = ["pairs_per_step", "steps_per_epoch"]


def pairs_per_step(config: TrainConfig) -> int:
    """Return how many pairs a step reads: the batch, or the super-batch of which the method chooses a batch.

    Examples
    --------
    >>> pairs_per_step(TrainConfig(data="scenes", method="rho", reference="runs/r", backend="numpy", batch_size=32))
    320
    """
    return config.batch_size * config.super_batch


def steps_per_epoch(config: TrainConfig, num_pairs: int) -> int:
    """Return the number of steps of an epoch over `num_pairs` training pairs; a last batch that is short is dropped.

    Raises
    ------
    BadInput
        If there are fewer pairs than a step reads.
    """
    drawn = pairs_per_step(config)
    if drawn <= num_pairs:
        return num_pairs // drawn
    # The user knows the two factors, not their product.
    if config.super_batch > 1:
        raise BadInput(
            f"batch_size times super_batch must be at most the number of samples ({num_pairs}), got "
            f"{config.batch_size} times {config.super_batch}"
        )
    raise BadInput(f"batch_size must be at most the number of samples ({num_pairs}), got {config.batch_size}")
