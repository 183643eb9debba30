"""Inputs of the loss beside the features of one process: the rows of all processes, reference features, temperature.

`drrho_torch.open_clip` and `drrho_torch.hugging_face` adapt `ContrastiveLoss` to the training loops of other programs
with these functions. b is the number of pairs of one process, W the number of processes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from drrho_core import checks
from drrho_torch.arguments import check_tensor, is_pair
from drrho_torch.loss import ContrastiveLoss


def check_loss(contrastive_loss: Any) -> ContrastiveLoss:
    """Return the loss after checking its type.

    Raises
    ------
    TypeError
        If it is no `ContrastiveLoss`.
    """
    if not isinstance(contrastive_loss, ContrastiveLoss):
        raise TypeError(f"contrastive_loss must be a ContrastiveLoss, got {type(contrastive_loss).__name__}")
    return contrastive_loss


def check_reference(reference: Any) -> Any:
    """Return reference features after checking that they are None, a pair of arrays, or an object with rows.

    Raises
    ------
    TypeError
        If they are anything else.
    """
    has_rows = hasattr(reference, "__getitem__") and not checks.is_array(reference)
    if reference is not None and not is_pair(reference) and (isinstance(reference, (tuple, list)) or not has_rows):
        raise TypeError(
            "reference must be a pair of arrays (image, text), or an object whose reference[sample_index] is such a "
            f"pair, got {checks.describe(reference)}"
        )
    return reference


def reference_rows(reference: Any, index: Tensor, device: torch.device) -> tuple[Tensor, Tensor] | None:
    """Return the reference features of the pairs in `index` (b,) on a device, (b, r) each; None without a reference."""
    if reference is None:
        return None
    rows = index.cpu().numpy()
    images, texts = [side[rows] for side in reference] if is_pair(reference) else reference[rows]
    return torch.as_tensor(images, device=device), torch.as_tensor(texts, device=device)


def check_scale(contrastive_loss: ContrastiveLoss, scale: Any) -> None:
    """Check that a scale of the logits is a tensor, and that a learned scale has a radius.

    Raises
    ------
    TypeError, ValueError
        If one of these rules is broken.
    """
    check_tensor("logit_scale", scale)
    if scale.requires_grad and contrastive_loss.radius == 0.0:
        raise ValueError(
            "radius of the ContrastiveLoss must be > 0 if logit_scale is learned, because the temperature would rise "
            "without end, got 0 (freeze logit_scale, or see docs/theory/temperature.md)"
        )


class _Gathered(torch.autograd.Function):
    """The rows of all processes; the gradient of the own rows is multiplied by the number of processes."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        """Gather the rows in the order of the ranks."""
        world_size, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
        ctx.place = slice(rank * rows.shape[0], (rank + 1) * rows.shape[0])
        ctx.world_size = world_size
        parts = [torch.empty_like(rows) for _ in range(world_size)]
        torch.distributed.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *incoming: Tensor) -> Tensor:
        """Return the gradient of the own rows. Every process has computed it, so nothing has to be exchanged."""
        own: Tensor = ctx.world_size * incoming[0][ctx.place]
        return own


def gathered(rows: Tensor, /) -> Tensor:
    """Return the rows of all processes in the order of the ranks, (W b, ...), or the given rows if W = 1.

    The gradient of a process's own rows is multiplied by W, because the wrappers for several processes
    (`DistributedDataParallel`, FSDP) average gradients. Every process has to hold the same number of rows.
    """
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return rows
    if torch.distributed.get_world_size() == 1:
        return rows
    whole: Tensor = _Gathered.apply(rows)  # type: ignore[no-untyped-call]
    return whole
