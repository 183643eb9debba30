"""Checks of the arguments of one call of `ContrastiveLoss`, by one process or by all that share the batch."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from drrho_core.contrastive.agreement import agreed
from drrho_torch.arguments import check_batch, check_world_size, number_or_tensor, two_arguments
from drrho_torch.ranks import TorchRanks


def check_call(
    ranks: TorchRanks | None, batch: tuple[Any, Any, Any], pairs: tuple[Any, Any, Any], gathered: bool
) -> None:
    """Check features and index, and that every member of a pair is there.

    Parameters
    ----------
    ranks : TorchRanks or None
        The processes that share the batch.
    batch : tuple
        Image features, text features and index.
    pairs : tuple
        Reference features, anchor weights and temperature, each of which may be a pair.
    gathered : bool
        True if the caller has gathered the batches of all processes.
    """
    if ranks is None:
        check_world_size(gathered=gathered)
    elif gathered:
        raise ValueError("gathered must be False if the loss has a process_group, got True")
    check_batch(*batch)
    number_or_tensor(pairs[2])
    for value in pairs:
        two_arguments(value)


def check_call_together(
    ranks: TorchRanks, batch: tuple[Any, Any, Any], pairs: tuple[Any, Any, Any], gathered: bool, buffer: Any, wait: bool
) -> None:
    """Check as `check_call` does, and raise the error of this process on all processes.

    `buffer` is a tensor of the state on the device from which messages are sent, or None; see `agreed` for `wait`.
    """
    try:
        check_call(ranks, batch, pairs, gathered)
    except Exception as error:  # of any kind, because the other processes would wait for this one
        # The other processes compare their arguments in `drrho_torch.step_function`, where they meet this error. A
        # tensor that is split among processes cannot be sent in a message.
        candidates = (*batch[:2], buffer)
        tensors = (x for x in candidates if isinstance(x, Tensor) and not hasattr(x, "full_tensor"))
        like = next(tensors, torch.zeros(0))
        agreed(partial(_raise, error), {}, ranks, like=like.detach(), wait=wait)


def _raise(error: Exception) -> None:
    """Raise an error."""
    raise error
