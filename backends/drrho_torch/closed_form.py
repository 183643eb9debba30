"""Closed-form gradients in torch's autograd.

The core (`drrho_core`) returns a value together with the gradient of that value with respect to each input. Autograd
never differentiates the core: a `torch.autograd.Function` saves the gradients in its forward pass and multiplies them
by the incoming gradient in its backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def save_gradients(ctx: Any, inputs: list[Tensor], output: tuple[Tensor, ...]) -> None:
    """Save the gradients, which follow the value in `output`, and the inputs that they belong to."""
    # The gradients are results of the Function, because `torch.func` allows a Function to save only its inputs and
    # its results.
    ctx.mark_non_differentiable(*output[1:])
    # The gradients among the results have no incoming gradients. Without this line autograd would allocate zeros for
    # them.
    ctx.set_materialize_grads(False)
    # A tensor made under inference_mode cannot be saved. Such a tensor gets no gradient, so None replaces it.
    ctx.save_for_backward(*(None if x.is_inference() else x for x in inputs), *output[1:])


def scaled_gradients(ctx: Any, incoming: Tensor | None) -> list[Tensor | None]:
    """Return the saved gradients times the incoming gradient, each in the dtype of the input that it belongs to."""
    inputs, gradients = _inputs_and_gradients(ctx.saved_tensors)
    if incoming is None:
        return [None] * len(gradients)
    # The incoming gradient may be a loss scale. It multiplies the float32 gradient first, and only the product is
    # rounded to float16 or bfloat16: a small gradient would otherwise be rounded to 0 before it is scaled.
    outgoing = [
        incoming * gradient if x is None else (incoming * gradient).to(x.dtype)
        for x, gradient in zip(inputs, gradients, strict=True)
    ]
    # Gradients are recorded here only if the caller asked for create_graph=True, that is for a second derivative.
    if torch.is_grad_enabled():
        outgoing = [
            y if x is None else _DifferentiableOnce.apply(y, x)  # type: ignore[no-untyped-call]
            for y, x in zip(outgoing, inputs, strict=True)
        ]
    return list(outgoing)


def with_gradients(value: Tensor, inputs: list[Tensor], gradients: list[Tensor]) -> Tensor:
    """Return a value equal to `value` for which autograd uses `gradients` as the gradients with respect to `inputs`.

    torch.compile needs this form: it traces the core outside of the Function and can then fuse the core's operations.
    """
    # torch.compile cannot trace a Function if none of the inputs requires a gradient.
    if not any(x.requires_grad for x in inputs):
        return value
    # torch.compile loses the gradient of a tensor that a Function receives twice, so each repetition becomes a view.
    distinct: list[Tensor] = []
    for x in inputs:
        distinct.append(x.view_as(x) if any(x is other for other in distinct) else x)
    result: Tensor = _ValueWithGradients.apply(value, *distinct, *gradients)  # type: ignore[no-untyped-call]
    return result


def detached(value: Any) -> Any:
    """Return a tensor, or the members of a pair, detached from autograd's graph; numbers are returned unchanged."""
    if isinstance(value, (tuple, list)):
        return tuple(member.detach() if isinstance(member, Tensor) else member for member in value)
    return value.detach() if isinstance(value, Tensor) else value


def _inputs_and_gradients(tensors: tuple[Any, ...]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Split n inputs from the n gradients that follow them."""
    count = len(tensors) // 2
    return tensors[:count], tensors[count:]


class _ValueWithGradients(torch.autograd.Function):
    """Returns its first argument, the value; the next arguments are n inputs and the n gradients to use for them."""

    # `forward` takes `ctx` and there is no `setup_context`, because torch.func never calls this Function. The gradients
    # are inputs here, so they may be saved.
    @staticmethod
    def forward(ctx: Any, value: Tensor, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *incoming: Tensor) -> tuple[Tensor | None, ...]:
        outgoing = scaled_gradients(ctx, incoming[0])
        return None, *outgoing, *[None] * len(outgoing)


class _DifferentiableOnce(torch.autograd.Function):
    """Returns a closed-form gradient, and raises an error if autograd differentiates this gradient.

    Autograd treats a closed-form gradient as a constant. Without this Function, which makes the gradient depend on the
    input `x`, the second derivative would silently be 0.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(gradient: Tensor, x: Tensor) -> Tensor:
        del x
        return gradient.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *incoming: Tensor) -> Any:
        del ctx, incoming
        raise RuntimeError(
            "the contrastive loss and the DRRho risk must be differentiated once only, because their gradient is a "
            "closed form, got a second derivative"
        )
