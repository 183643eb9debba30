"""A warning for training loops that accumulate gradients and call the loss several times for one batch.

Each training call updates the inner estimates u, two moving averages per row of the batch: ``u <- (1 - gamma) u +
gamma g``, where g is the estimate from this batch alone and gamma is its weight. Some loops accumulate gradients over
micro-batches and call the loss once per micro-batch, each time with the whole batch. Such a loop updates the same rows
several times per optimiser step and gets wrong gradients.
"""

from __future__ import annotations

import warnings
import weakref
from typing import Any, Self

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook


class _OptimizerSteps:
    """Counts the steps of all optimizers of this process, from the first training call of a loss on."""

    def __init__(self) -> None:
        self.count = 0
        self._is_counting = False

    def start(self) -> None:
        """Start to count; a second call changes nothing."""
        if not self._is_counting:
            self._is_counting = True
            register_optimizer_step_post_hook(self._add)

    def _add(self, *_: Any) -> None:
        self.count += 1


_STEPS = _OptimizerSteps()


class RepeatedRows:
    """Detects a training call that repeats the rows of the previous call, if no parameter has changed in between.

    torch counts the in-place changes of each tensor in a version counter. A change through ``parameter.data`` does not
    raise this counter, so the change is not noticed.

    No method waits for a GPU: the values of two indices are compared only if both indices are on the host. Two indices
    on a GPU count as equal if they share the same memory and no operation has written to this memory in between.
    """

    def __init__(self) -> None:
        self._warned = False
        self._index: Tensor | None = None
        self._versions: tuple[int, ...] = ()
        self._leaves: list[weakref.ref[Tensor]] = []

    def __reduce__(self) -> tuple[type[Self], tuple[()]]:
        """Make a copy start without a record of earlier calls, because weak references cannot be copied."""
        return type(self), ()

    def warn_if_repeated(self, index: Tensor, features: tuple[Tensor, Tensor], *, stacklevel: int) -> None:
        """Warn once if this call updates the rows of the previous call again, and record this call.

        Parameters
        ----------
        index : tensor of integers, shape (b,)
            Rows of this call.
        features : pair of tensors, shape (b, d)
            Features of this call. A call whose features require no gradient trains nothing and is skipped.
        stacklevel : int
            As in `warnings.warn`, counted from the caller of this method.
        """
        if self._warned or not any(side.requires_grad for side in features) or index.is_inference():
            return
        _STEPS.start()
        # A leaf is a parameter of an encoder, see `_source`. One leaf per encoder is enough, because the steps of
        # optimisers that do not change this leaf are counted below. The features of a frozen encoder are new tensors in
        # each call and do not depend on a trained parameter, so these features are left out.
        leaves = [leaf for side in features if side.requires_grad and (leaf := _source(side)) is not None]
        is_on_host = index.device.type == "cpu"
        # A change of a leaf in place raises the leaf's version counter. The number of optimiser steps is compared as
        # well, because an optimiser may update only parameters other than these leaves.
        versions = _STEPS.count, 0 if is_on_host else index._version, *(leaf._version for leaf in leaves)
        same_leaves = len(leaves) == len(self._leaves) and all(
            before() is leaf for before, leaf in zip(self._leaves, leaves, strict=True)
        )
        unchanged = same_leaves and versions == self._versions
        # On the host the index is copied, because the caller may write the next batch into the same tensor. Weak
        # references do not keep an encoder in memory after the caller has deleted it.
        previous, self._index = self._index, index.detach().clone() if is_on_host else index.detach()
        self._versions, self._leaves = versions, [weakref.ref(leaf) for leaf in leaves]
        if previous is None or not unchanged or not _same(previous, index):
            return
        self._warned, self._index = True, None
        warnings.warn(
            "ContrastiveLoss was called with the rows of the previous call, and no parameter has changed in between. "
            "Each call updates the estimates of its rows once more, so a loop that calls the loss once per "
            "micro-batch gets wrong gradients (33 % off in a trial at gamma = 0.5). Call the loss once per batch: "
            "drrho_torch.micro_batches does so and encodes the batch in micro-batches",
            UserWarning,
            stacklevel=stacklevel + 1,
        )


def _same(previous: Tensor, index: Tensor) -> bool:
    """Tell whether two indices hold the same rows; on a GPU, whether they share the same memory."""
    if previous.shape != index.shape or previous.dtype != index.dtype or previous.device != index.device:
        return False
    if index.device.type == "cpu":
        return torch.equal(previous, index)
    # `previous` keeps its memory allocated, so no later tensor can get the same address.
    return previous.data_ptr() == index.data_ptr() and previous.stride() == index.stride()


def _source(features: Tensor) -> Tensor | None:
    """Return a leaf of autograd's graph: a parameter that the features depend on, or the features themselves.

    The loop follows a single path of the graph, so the time grows with the depth of the encoder only.
    """
    node = features.grad_fn
    if node is None:
        return features
    while node.next_functions:
        following = next((parent for parent, _ in node.next_functions if parent is not None), None)
        if following is None:
            return None
        node = following
    # The last node of a path adds gradients to a leaf and holds this leaf as `variable`.
    leaf = getattr(node, "variable", None)
    return leaf if isinstance(leaf, Tensor) else None
