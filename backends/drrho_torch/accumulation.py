"""A warning for loops that accumulate gradients and call the loss several times for one batch."""

from __future__ import annotations

import warnings
import weakref
from typing import Any, Self

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook


class _OptimizerSteps:
    """How many steps all optimizers of this process have taken since the first call of a loss."""

    def __init__(self) -> None:
        self.count = 0
        self._counting = False

    def start(self) -> None:
        """Count from now on; a second call changes nothing."""
        if not self._counting:
            self._counting = True
            register_optimizer_step_post_hook(self._add)

    def _add(self, *_: Any) -> None:
        self.count += 1


_STEPS = _OptimizerSteps()


class RepeatedRows:
    """Recognises a training call with the rows of the call before, if no parameter has changed in between.

    A change that hides itself from autograd, through ``parameter.data``, is not seen.

    Nothing here waits for a GPU: the values of an index are compared on the host only. An index on a GPU equals the
    one before if both are the same memory and no operation has written to it since.
    """

    def __init__(self) -> None:
        self._warned = False
        self._index: Tensor | None = None
        self._versions: tuple[int, ...] = ()
        self._leaves: list[weakref.ref[Tensor]] = []

    def __reduce__(self) -> tuple[type[Self], tuple[()]]:
        """Let a copy of the module start without memory of earlier calls."""
        return type(self), ()

    def see(self, index: Tensor, features: tuple[Tensor, Tensor], *, stacklevel: int) -> None:
        """Warn once if this call averages the rows of the call before again.

        Parameters
        ----------
        index : tensor of integers, shape (b,)
            Rows of this call.
        features : pair of tensors, shape (b, d)
            Features of this call. A call whose features ask for no gradient trains nothing and is not looked at.
        stacklevel : int
            As `warnings.warn` takes it.
        """
        if self._warned or not any(side.requires_grad for side in features) or index.is_inference():
            return
        _STEPS.start()
        # Features of a frozen tower are new tensors in each call, which say nothing about parameters.
        leaves = [leaf for side in features if side.requires_grad and (leaf := _source(side)) is not None]
        host = index.device.type == "cpu"
        versions = _STEPS.count, 0 if host else index._version, *(leaf._version for leaf in leaves)
        same_leaves = len(leaves) == len(self._leaves) and all(
            before() is leaf for before, leaf in zip(self._leaves, leaves, strict=True)
        )
        unchanged = same_leaves and versions == self._versions
        last, self._index = self._index, index.detach().clone() if host else index.detach()
        self._versions, self._leaves = versions, [weakref.ref(leaf) for leaf in leaves]
        if last is None or not unchanged or not _same(last, index):
            return
        self._warned, self._index = True, None
        warnings.warn(
            "ContrastiveLoss was called with the rows of the call before, and no parameter has changed in between. "
            "Each call averages the estimates of its rows once more, so a loop that calls the loss once per chunk of "
            "a batch gets wrong gradients (33 % off in a trial at gamma = 0.5). Call it once per batch: "
            "drrho_torch.micro_batches does so and encodes in chunks",
            UserWarning,
            stacklevel=stacklevel + 1,
        )


def _same(last: Tensor, index: Tensor) -> bool:
    """Tell whether two indices hold the same rows; on a device, whether they are the same memory."""
    if last.shape != index.shape or last.dtype != index.dtype or last.device != index.device:
        return False
    if index.device.type == "cpu":
        return torch.equal(last, index)
    # `last` keeps its memory alive, so no later tensor can lie at the same place.
    return last.data_ptr() == index.data_ptr() and last.stride() == index.stride()


def _source(features: Tensor) -> Tensor | None:
    """Return one leaf that features were computed from: a parameter of the encoder, or the features themselves.

    The walk follows one path of the graph and not all of them, so it costs as much as the encoder is deep.
    """
    node = features.grad_fn
    if node is None:
        return features
    while node.next_functions:
        following = next((parent for parent, _ in node.next_functions if parent is not None), None)
        if following is None:
            return None
        node = following
    leaf = getattr(node, "variable", None)
    return leaf if isinstance(leaf, Tensor) else None
