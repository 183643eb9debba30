"""Gradients of a batch whose activations do not fit into memory: encoders get micro-batches, the loss gets all rows.

The method is GradCache (arXiv 2101.06983). Shapes: b samples in the batch, `size` samples in a micro-batch, features
(b, d).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from drrho_core import checks


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
        ``encode(*micro_batch)`` returns the image and the text features of a micro-batch, (rows, d) each.
    inputs : tuple
        Arguments of `encode` for the whole batch: tensors, or tuples, lists and mappings of tensors. Each tensor is
        split along axis 0, which has b entries.
    loss : callable
        ``loss(image_features, text_features)`` returns a scalar tensor. It is called once, with the features of the
        whole batch, (b, d) each.
    size : int
        Rows of a micro-batch, at least 1; the last micro-batch may have fewer.
    scaler : torch.amp.GradScaler, optional
        ``scaler.scale`` multiplies the loss before the backward pass.
    model : Module, optional
        The module that `encode` calls. Needed if the module synchronises gradients with other processes, or has buffers
        that training changes. All micro-batches but the last run under ``model.no_sync()`` (DistributedDataParallel)
        or after ``model.set_requires_gradient_sync(False)`` (FSDP2). The loss may use parameters of a model in
        DistributedDataParallel, such as a temperature, if the loss computes their whole gradient on every process.

    Returns
    -------
    tensor, shape ()
        Value of the loss, detached from autograd's graph and not scaled. The gradients are added to the
        ``grad`` of the parameters, as ``backward()`` does.

    Raises
    ------
    TypeError, ValueError
        If an argument breaks these rules.
    RuntimeError
        If gradients are disabled.

    Notes
    -----
    Pass 1 computes all features without keeping activations; the loss gives the gradients of the features; pass 2
    encodes each micro-batch again and runs the backward pass of the encoders with these gradients (GradCache,
    arXiv 2101.06983). The encoders' forward pass runs once more than without micro-batches. The result is the gradient
    of the whole batch, if the features of a row depend on that row alone. Batch normalisation breaks this rule, because
    it then normalises per micro-batch.

    Pass 2 repeats pass 1: every micro-batch begins with the same state of the random generators (CPU and accelerator)
    and of the buffers of `model`, or of `encode` if `encode` is a module or a module's method. So dropout removes the
    same activations in both passes, and generators and buffers end in the state that one pass leaves. Autocast around
    the call applies to `encode` and `loss`, not to the backward passes.

    A batch that fits into one micro-batch is encoded once, unless `model` is a DistributedDataParallel with
    `find_unused_parameters`.

    Examples
    --------
    >>> from drrho_torch import ContrastiveLoss
    >>> _ = torch.manual_seed(0)
    >>> image_encoder, text_encoder = torch.nn.Linear(6, 3), torch.nn.Linear(5, 3)
    >>> contrastive_loss = ContrastiveLoss(10, temperature=0.5, gamma=0.9)
    >>> sample_index = torch.tensor([4, 0, 7, 2])
    >>> value = micro_batches(
    ...     lambda images, texts: (image_encoder(images), text_encoder(texts)),
    ...     (torch.randn(4, 6), torch.randn(4, 5)),
    ...     lambda image, text: contrastive_loss(image, text, sample_index),
    ...     size=3,
    ... )
    >>> value.shape, image_encoder.weight.grad.shape
    (torch.Size([]), torch.Size([3, 6]))
    """
    size = checks.integer("size", size, minimum=1)
    rows = _rows(inputs)
    for name, function in (("encode", encode), ("loss", loss)):
        if not callable(function):
            raise TypeError(f"{name} must be callable, got {checks.describe(function)}")
    if model is not None and not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if not torch.is_grad_enabled():
        raise RuntimeError("micro_batches must be called with gradients enabled, because it runs the backward pass")
    micro_batches = [slice(start, min(start + size, rows)) for start in range(0, rows, size)]
    # With `find_unused_parameters` DistributedDataParallel raises an error about a parameter that the loss uses and the
    # forward pass does not, such as a temperature. In two passes the loss is no part of the graph of the forward pass.
    if len(micro_batches) == 1 and not getattr(model, "find_unused_parameters", False):
        features = _encoded(encode, inputs, micro_batches[0])
        value = _scalar(loss(*features))
        _backward([value if scaler is None else scaler.scale(value)], None)
        return value.detach()

    # Pass 1: all features, no activations. The random state at the start of every micro-batch is kept for pass 2.
    buffers = _Buffers(model, encode)
    states, parts = [], []
    with torch.no_grad():
        for micro_batch in micro_batches:
            states.append(_random_states())
            parts.append(_encoded(encode, inputs, micro_batch))
    # The buffers are restored before the loss runs: the loss may be a module inside of `model` and write to its state.
    buffers.restore()
    # Autocast caches half-precision copies of the weights. Pass 2 must not use a copy that was made without gradients,
    # but some versions of torch would use the copy again.
    torch.clear_autocast_cache()

    # Compute the loss L of the whole batch and the gradient dL/dE with respect to the features E. The features are
    # leaves of autograd's graph, so this backward pass stops at them.
    images, texts = (torch.cat(side).requires_grad_() for side in zip(*parts, strict=True))
    del parts
    before = _versions(model)
    value = _scalar(loss(images, texts))
    _backward([value if scaler is None else scaler.scale(value)], None)
    of_loss = [parameter for parameter, version in _versions(model).items() if before[parameter] != version]
    final_state = _random_states()

    # Pass 2: encode each micro-batch again, with activations, and apply the chain rule: dL/dE times dE/dparameters.
    for micro_batch, state in zip(micro_batches, states, strict=True):
        _set_random_states(state)
        is_last = micro_batch is micro_batches[-1]
        with _synchronised(model, is_last):
            features = _encoded(encode, inputs, micro_batch)
            # The features of a frozen encoder require no gradient, and a loss may ignore the features of one side.
            pairs = [
                (feature, whole.grad[micro_batch])
                for feature, whole in zip(features, (images, texts), strict=True)
                if feature.requires_grad and whole.grad is not None
            ]
            if is_last:
                # DistributedDataParallel waits for a gradient of every parameter. A parameter that only the loss uses,
                # such as a temperature, has its gradient already, so a gradient of 0 is added.
                pairs += [(parameter, torch.zeros_like(parameter)) for parameter in of_loss]
            if pairs:
                _backward([feature for feature, _ in pairs], [gradient for _, gradient in pairs])
    # The generators end where one pass over the batch and the loss would have left them.
    _set_random_states(final_state)
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
            raise ValueError(f"{name} must have at least one axis, which is split into micro-batches, got shape ()")
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
    """Yield each leaf of nested tuples, lists and mappings, with a name such as ``inputs[1]['ids']``."""
    if isinstance(tree, (tuple, list)):
        for position, branch in enumerate(tree):
            yield from _leaves(f"{name}[{position}]", branch)
    elif isinstance(tree, Mapping):
        for key, branch in tree.items():
            yield from _leaves(f"{name}[{key!r}]", branch)
    else:
        yield name, tree


def _part(tree: Any, rows: slice) -> Any:
    """Return a copy of nested tuples, lists and mappings that keeps only these rows of every tensor."""
    if isinstance(tree, (tuple, list)):
        branches = [_part(branch, rows) for branch in tree]
        # The type of a named tuple takes the fields one by one, `tuple` and `list` take them as one sequence.
        return type(tree)(*branches) if hasattr(tree, "_fields") else type(tree)(branches)
    if isinstance(tree, Mapping):
        return {key: _part(branch, rows) for key, branch in tree.items()}
    return tree[rows]


def _encoded(encode: Callable[..., Any], inputs: tuple[Any, ...], micro_batch: slice) -> tuple[Tensor, Tensor]:
    """Encode a micro-batch; return both features after checking that they are tensors with one row per sample."""
    features = encode(*_part(inputs, micro_batch))
    if not isinstance(features, (tuple, list)) or len(features) != 2:
        raise TypeError(f"encode must return a pair (image features, text features), got {_named(features)}")
    rows = micro_batch.stop - micro_batch.start
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
    """Return the result of `loss` after checking that it is a scalar tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"loss must return a tensor of shape (), got {_named(value)}")
    if value.ndim != 0:
        raise ValueError(f"loss must return a tensor of shape (), got shape {tuple(value.shape)}")
    return value


def _named(value: Any) -> str:
    """Describe a value for a message: the type, and the length of a tuple or list."""
    kind = type(value).__name__
    return f"{kind} of {len(value)}" if isinstance(value, (tuple, list)) else kind


def _backward(tensors: list[Tensor], gradients: list[Tensor] | None) -> None:
    """Run a backward pass without autocast, so that each gradient has the dtype of its forward operation."""
    accelerator = _accelerator()
    with ExitStack() as stack:
        for kind in ("cpu",) if accelerator is None else ("cpu", accelerator):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        torch.autograd.backward(tensors, gradients)


def _accelerator() -> str | None:
    """Return the kind of accelerator that this process uses, such as ``"cuda"``; None without an accelerator."""
    if not torch.accelerator.is_available():
        return None
    device = torch.accelerator.current_accelerator()
    return None if device is None else device.type


def _versions(model: Any) -> dict[nn.Parameter, tuple[int, int]]:
    """Return what changes if a backward pass adds to the gradient of a parameter: the tensor, and its version.

    The result is empty if `model` does not wait for gradients of parameters that a micro-batch does not use.
    """
    # With `find_unused_parameters` the wrapper itself finds out which parameters a micro-batch does not use.
    if not hasattr(model, "no_sync") or getattr(model, "find_unused_parameters", False):
        return {}
    return {x: (id(x.grad), 0 if x.grad is None else x.grad._version) for x in model.parameters() if x.requires_grad}


def _random_states() -> tuple[Tensor, Any]:
    """Return the state of the random generators of the CPU and of all accelerators."""
    kind = _accelerator()
    if kind is None:
        return torch.get_rng_state(), None
    # CUDA has a function for the generators of all devices; other accelerators may have only a function for one.
    module = torch.get_device_module(kind)
    get = getattr(module, "get_rng_state_all", None) or module.get_rng_state
    return torch.get_rng_state(), get()


def _set_random_states(states: tuple[Tensor, Any]) -> None:
    """Set the random generators to states that `_random_states` returned."""
    torch.set_rng_state(states[0])
    kind = _accelerator()
    if kind is not None and states[1] is not None:
        module = torch.get_device_module(kind)
        set_state = getattr(module, "set_rng_state_all", None) or module.set_rng_state
        set_state(states[1])


class _Buffers:
    """Copies of the buffers of `model` and of the module behind `encode`, taken before pass 1."""

    def __init__(self, model: nn.Module | None, encode: Any) -> None:
        # A bound method such as `model.encode` names its module as `__self__`.
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
        """Undo the changes of pass 1 to the buffers, whether they were made in place or by assignment."""
        with torch.no_grad():
            for module, name, buffer, saved in self._saved:
                module._buffers[name] = buffer
                # Batch normalisation changes buffers without raising their version counters, so the counters cannot
                # tell which buffers have changed, and all buffers are restored.
                buffer.copy_(saved)


@contextmanager
def _synchronised(model: Any, is_last: bool) -> Iterator[None]:
    """Let only the last micro-batch exchange gradients with other processes: only then are the sums complete."""
    if is_last or model is None:
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
