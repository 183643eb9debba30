"""Gradients of a batch whose activations do not fit into memory: encoders in chunks, the loss once (GradCache)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from drrho_core import _validate


def micro_batches(
    encode: Callable[..., tuple[Tensor, Tensor]],
    inputs: tuple[Any, ...],
    loss: Callable[[Tensor, Tensor], Tensor],
    /,
    *,
    size: int,
    scaler: torch.amp.GradScaler | None = None,
    model: nn.Module | None = None,
) -> Tensor:
    """Compute a batch's loss and run its backward pass, with the activations of `size` samples in memory at a time.

    Parameters
    ----------
    encode : callable
        ``encode(*chunk)`` returns the image and the text features of a chunk, (rows, d) each.
    inputs : tuple
        Arguments of `encode` for the whole batch: tensors, or tuples, lists and mappings of tensors. Each tensor is
        split along axis 0, which has b entries.
    loss : callable
        ``loss(image_features, text_features)`` returns a scalar tensor. It is called once, with the features of the
        whole batch, (b, d) each.
    size : int
        Rows of a chunk, at least 1; the last chunk may have fewer.
    scaler : torch.amp.GradScaler, optional
        Its ``scale`` multiplies the loss before the backward pass.
    model : Module, optional
        The module that `encode` calls, if it synchronises gradients or has buffers that training changes. All chunks
        but the last run under its ``no_sync()`` (DistributedDataParallel), or after its
        ``set_requires_gradient_sync(False)`` (FSDP2).

    Returns
    -------
    tensor, shape ()
        Value of the loss, without history and not scaled. The gradients are added to the ``grad`` of the parameters,
        as ``backward()`` does.

    Raises
    ------
    TypeError, ValueError
        If an argument breaks these rules.
    RuntimeError
        If gradients are disabled.

    Notes
    -----
    The features are first computed without activations; the loss gives their gradients; then each chunk is encoded
    again and its part of these gradients is pushed backward (GradCache, arXiv 2101.06983). That costs one more forward
    pass of the encoders. The result is the gradient of the whole batch, because the features of a row depend on that
    row alone. Batch normalisation breaks this: it then normalises per chunk.

    The second pass repeats the first one: it begins every chunk with the same state of the random generators (CPU and
    accelerator) and, for buffers of `model`, or of `encode` if it is a module or a module's method, with the same
    buffers. So dropout is the same, and generators and buffers end as after one pass. Autocast around the call holds
    for `encode` and `loss` and not for the backward passes.

    A batch that fits into one chunk is encoded once.

    Examples
    --------
    >>> from drrho_torch import ContrastiveLoss
    >>> _ = torch.manual_seed(0)
    >>> image_encoder, text_encoder = torch.nn.Linear(6, 3), torch.nn.Linear(5, 3)
    >>> loss_function = ContrastiveLoss(10, temperature=0.5, gamma=0.9)
    >>> sample_index = torch.tensor([4, 0, 7, 2])
    >>> value = micro_batches(
    ...     lambda images, texts: (image_encoder(images), text_encoder(texts)),
    ...     (torch.randn(4, 6), torch.randn(4, 5)),
    ...     lambda image, text: loss_function(image, text, sample_index),
    ...     size=3,
    ... )
    >>> value.shape, image_encoder.weight.grad.shape
    (torch.Size([]), torch.Size([3, 6]))
    """
    size = _validate.integer("size", size, minimum=1)
    rows = _rows(inputs)
    for name, function in (("encode", encode), ("loss", loss)):
        if not callable(function):
            raise TypeError(f"{name} must be callable, got {_validate.describe(function)}")
    if model is not None and not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if not torch.is_grad_enabled():
        raise RuntimeError("micro_batches must be called with gradients enabled, because it runs the backward pass")
    chunks = [slice(start, min(start + size, rows)) for start in range(0, rows, size)]
    if len(chunks) == 1:
        features = _encoded(encode, inputs, chunks[0])
        value = _scalar(loss(*features))
        _backward([value if scaler is None else scaler.scale(value)], None)
        return value.detach()

    # Pass 1: all features, no activations. What the encoders read beside their inputs is remembered per chunk.
    buffers = _Buffers(model, encode)
    states, parts = [], []
    with torch.no_grad():
        for chunk in chunks:
            states.append(_random_states())
            parts.append(_encoded(encode, inputs, chunk))
    buffers.restore()  # before the loss, which may have buffers of its own inside of `model`
    # Autocast caches half-precision copies of the weights. A copy that was made without gradients must not be used
    # again in pass 2; whether autocast would do so depends on the version of torch.
    torch.clear_autocast_cache()

    # The loss sees the whole batch, and autograd stops at its features.
    images, texts = (torch.cat(side).requires_grad_() for side in zip(*parts, strict=True))
    del parts
    value = _scalar(loss(images, texts))
    _backward([value if scaler is None else scaler.scale(value)], None)
    last = _random_states()

    # Pass 2: each chunk again, with activations; its features get their part of the gradient.
    for chunk, state in zip(chunks, states, strict=True):
        _set_random_states(state)
        with _synchronised(model, chunk is chunks[-1]):
            features = _encoded(encode, inputs, chunk)
            pairs = [
                (feature, whole.grad[chunk])
                for feature, whole in zip(features, (images, texts), strict=True)
                if feature.requires_grad and whole.grad is not None
            ]
            if pairs:
                _backward([feature for feature, _ in pairs], [gradient for _, gradient in pairs])
    _set_random_states(last)
    return value.detach()


def _rows(inputs: Any) -> int:
    """Check `inputs` and return the number of rows that all tensors in it have."""
    if not isinstance(inputs, tuple):
        raise TypeError(f"inputs must be a tuple of arguments of encode, got {type(inputs).__name__}")
    lengths: dict[str, int] = {}
    for name, leaf in _leaves("inputs", inputs):
        if not isinstance(leaf, Tensor):
            raise TypeError(f"{name} must be a tensor, or tuples, lists and mappings of tensors, got {_named(leaf)}")
        if leaf.ndim == 0:
            raise ValueError(f"{name} must have at least one axis, which is split into chunks, got shape ()")
        lengths[name] = leaf.shape[0]
    if not lengths:
        raise ValueError("inputs must hold at least one tensor, got none")
    (first, rows), *rest = lengths.items()
    for name, length in rest:
        if length != rows:
            raise ValueError(f"{name} must have as many rows as {first} ({rows}), got {length}")
    if rows == 0:
        raise ValueError(f"{first} must have at least one row, got 0")
    return rows


def _leaves(name: str, tree: Any) -> Iterator[tuple[str, Any]]:
    """Yield what tuples, lists and mappings hold in the end, and where."""
    if isinstance(tree, (tuple, list)):
        for position, branch in enumerate(tree):
            yield from _leaves(f"{name}[{position}]", branch)
    elif isinstance(tree, Mapping):
        for key, branch in tree.items():
            yield from _leaves(f"{name}[{key!r}]", branch)
    else:
        yield name, tree


def _part(tree: Any, chunk: slice) -> Any:
    """Return a tree with the rows of a chunk."""
    if isinstance(tree, (tuple, list)):
        branches = [_part(branch, chunk) for branch in tree]
        return type(tree)(*branches) if hasattr(tree, "_fields") else type(tree)(branches)
    if isinstance(tree, Mapping):
        return {key: _part(branch, chunk) for key, branch in tree.items()}
    return tree[chunk]


def _encoded(encode: Callable[..., Any], inputs: tuple[Any, ...], chunk: slice) -> tuple[Tensor, Tensor]:
    """Encode a chunk and check that two tensors with its rows come back."""
    features = encode(*_part(inputs, chunk))
    if not isinstance(features, (tuple, list)) or len(features) != 2:
        raise TypeError(f"encode must return a pair (image features, text features), got {_named(features)}")
    rows = chunk.stop - chunk.start
    for side, feature in zip(("image", "text"), features, strict=True):
        if not isinstance(feature, Tensor):
            raise TypeError(f"encode must return tensors, got {_named(feature)} as {side} features")
        if feature.ndim == 0 or feature.shape[0] != rows:
            raise ValueError(
                f"encode must return one row per row of its inputs ({rows}), got {side} features of shape "
                f"{tuple(feature.shape)}"
            )
    return features[0], features[1]


def _scalar(value: Any) -> Tensor:
    """Check what the loss returned."""
    if not isinstance(value, Tensor):
        raise TypeError(f"loss must return a tensor of shape (), got {_named(value)}")
    if value.ndim != 0:
        raise ValueError(f"loss must return a tensor of shape (), got shape {tuple(value.shape)}")
    return value


def _named(value: Any) -> str:
    """Name the type of a value, and the length of a pair that is none."""
    kind = type(value).__name__
    return f"{kind} of {len(value)}" if isinstance(value, (tuple, list)) else kind


def _backward(tensors: list[Tensor], gradients: list[Tensor] | None) -> None:
    """Run a backward pass outside of autocast, as torch asks for."""
    accelerator = _accelerator()
    with ExitStack() as stack:
        for kind in ("cpu",) if accelerator is None else ("cpu", accelerator):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        torch.autograd.backward(tensors, gradients)


def _accelerator() -> str | None:
    """Name the kind of accelerator, if this process uses one."""
    if not torch.accelerator.is_available():
        return None
    device = torch.accelerator.current_accelerator()
    return None if device is None else device.type


def _random_states() -> tuple[Tensor, Any]:
    """Return the state of the random generators of the CPU and of all accelerators."""
    kind = _accelerator()
    if kind is None:
        return torch.get_rng_state(), None
    module = torch.get_device_module(kind)
    get = getattr(module, "get_rng_state_all", None) or module.get_rng_state
    return torch.get_rng_state(), get()


def _set_random_states(states: tuple[Tensor, Any]) -> None:
    """Put the random generators back to states that `_random_states` returned."""
    torch.set_rng_state(states[0])
    kind = _accelerator()
    if kind is not None and states[1] is not None:
        module = torch.get_device_module(kind)
        put = getattr(module, "set_rng_state_all", None) or module.set_rng_state
        put(states[1])


class _Buffers:
    """The buffers of the modules that are known, as they were before the first pass."""

    def __init__(self, model: nn.Module | None, encode: Any) -> None:
        owner = encode if isinstance(encode, nn.Module) else getattr(encode, "__self__", None)
        roots = [root for root in (model, owner) if isinstance(root, nn.Module)]
        modules = {id(module): module for root in roots for module in root.modules()}.values()
        self._saved = [
            (module, name, buffer, buffer.detach().clone())
            for module in modules
            for name, buffer in module._buffers.items()
            if buffer is not None and not buffer.is_inference()
        ]

    def restore(self) -> None:
        """Take back what the first pass wrote, in place or by assignment."""
        with torch.no_grad():
            for module, name, buffer, saved in self._saved:
                module._buffers[name] = buffer
                buffer.copy_(saved)  # always: batch normalisation writes without raising the version of its buffers


@contextmanager
def _synchronised(model: Any, last: bool) -> Iterator[None]:
    """Let only the last chunk exchange gradients with other processes."""
    if last or model is None:
        yield
    elif hasattr(model, "no_sync"):
        with model.no_sync():
            yield
    elif hasattr(model, "set_requires_gradient_sync"):
        model.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            model.set_requires_gradient_sync(True)
    else:
        yield
