"""Inputs of the loss beside the features of one process: the rows of all processes, reference features, temperature.

`drrho_torch.open_clip` and `drrho_torch.hugging_face` adapt `ContrastiveLoss` to the training loops of other programs
with these functions. b is the number of pairs of one process, W the number of processes.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
from torch import Tensor

from drrho_core import checks
from drrho_torch.arguments import check_tensor, is_pair
from drrho_torch.loss import ContrastiveLoss


def check_loss(contrastive_loss: Any) -> ContrastiveLoss:
    """Return the loss after checking its type.

    Raises
    ------
    TypeError, ValueError
        If it is no `ContrastiveLoss`, or if it has a process group.
    """
    if not isinstance(contrastive_loss, ContrastiveLoss):
        raise TypeError(f"contrastive_loss must be a ContrastiveLoss, got {type(contrastive_loss).__name__}")
    if contrastive_loss.process_group is not None:
        raise ValueError("contrastive_loss must have no process_group, because the batches are gathered here, got one")
    return contrastive_loss


def check_reference(reference: Any, num_samples: int) -> Any:
    """Return reference features after checking that they are None, a pair of arrays, or an object with rows.

    Parameters
    ----------
    reference : object
        The features. Each array of a pair has shape (num_samples, r).
    num_samples : int
        Size of the data set, as the loss knows it.

    Raises
    ------
    TypeError, ValueError
        If they are anything else, or if a pair holds the features of another number of samples.

    Warns
    -----
    UserWarning
        If the first features of a pair do not have unit norm.
    """
    if is_pair(reference):
        for name, side in zip(("image", "text"), reference, strict=True):
            shape: tuple[int, ...] = getattr(side, "shape", ())
            # Rows of another data set would otherwise be taken in silence, or fail at the first high row.
            if len(shape) != 2 or shape[0] != num_samples:
                raise ValueError(
                    f"reference must hold one row of {name} features per sample of the ContrastiveLoss, shape "
                    f"(num_samples, r) with num_samples = {num_samples}, got {checks.describe(side)}"
                )
            # torch warns of an array that it cannot write to, such as a memory-mapped file; a copy can be written to.
            rows = side[:64]
            _warn_of_norms(name, torch.as_tensor(rows.copy() if isinstance(rows, np.ndarray) else rows))
        return reference
    has_rows = hasattr(reference, "__getitem__") and not checks.is_array(reference)
    # A path or a mapping has rows for Python, but not those of pairs.
    if isinstance(reference, (tuple, list, str, bytes, PurePath, Mapping)) or not (reference is None or has_rows):
        raise TypeError(
            "reference must be a pair of arrays (image, text), or an object whose reference[sample_index] is such a "
            f"pair, got {checks.describe(reference)}"
        )
    return reference


def _warn_of_norms(name: str, features: Tensor) -> None:
    """Warn if features (b, r) do not have unit norm, as those that a model returns before they are normalised."""
    norms = torch.linalg.vector_norm(features.float(), dim=1)
    if bool(((norms - 1.0).abs() > 0.02).any()):
        warnings.warn(
            f"the {name} features of reference should have norm 1, got norms from {float(norms.min()):.3g} to "
            f"{float(norms.max()):.3g}: divide every row by its norm",
            stacklevel=4,
        )


def check_rows(name: str, index: Tensor) -> None:
    """Check that rows of pairs are a tensor of integers with one axis.

    Raises
    ------
    TypeError, ValueError
        If one of these rules is broken.
    """
    check_tensor(name, index)
    checks.ndim(name, index, 1, "(batch_size,)")
    if index.is_floating_point() or index.is_complex() or index.dtype == torch.bool:
        raise TypeError(f"{name} must have an integer dtype, got {index.dtype}")


def reference_rows(
    reference: Any, index: Tensor, device: torch.device, num_samples: int
) -> tuple[Tensor, Tensor] | None:
    """Return the reference features of the pairs in `index` (b,) on a device, (b, r) each; None without a reference.

    An index outside of [0, num_samples) has no features: the answer is then None, and the loss refuses the index.
    """
    rows = index.cpu().numpy()
    if reference is None or (rows.size and not 0 <= rows.min() <= rows.max() < num_samples):
        return None
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
