"""The DRRho risk as a differentiable function of torch tensors: the gradient is the vector of worst-case weights."""

from __future__ import annotations

from typing import Any, NamedTuple

import array_api_compat.torch
import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import guard_scalar

from drrho_core import risk
from drrho_core.ambiguity import AmbiguitySet
from drrho_torch.arguments import check_tensor, traced_number
from drrho_torch.closed_form import detached, save_gradients, scaled_gradients, with_gradients

_XP = array_api_compat.torch


def drrho_risk(
    loss: Tensor,
    reference_loss: Tensor,
    ambiguity_set: AmbiguitySet,
    /,
    *,
    reference_weight: float | Tensor = 1.0,
    axis: int = -1,
    where: Tensor | None = None,
) -> Tensor:
    """Return the DRRho risk, differentiable in `loss`.

    Parameters
    ----------
    loss : tensor, shape (..., n, ...)
        The learner's losses, real floating, any unit.
    reference_loss : tensor, the same shape
        The frozen reference model's losses on the same samples, in the same dtype. They get no gradient.
    ambiguity_set : AmbiguitySet
        The weights that the adversary may choose, such as ``drrho_core.CVaR(0.1)``.
    reference_weight : float or tensor of shape ()
        lambda >= 0, as in `drrho_core.drrho_risk`.
    axis : int
        The axis of the n samples.
    where : tensor of bool, optional
        Marks the samples that count, as in `drrho_core.drrho_risk`. The gradient of the other samples is 0.

    Returns
    -------
    tensor
        The risk, in the shape of `loss` without `axis`; a scalar if `loss` has one axis.

    Raises
    ------
    TypeError, ValueError
        As `drrho_core.drrho_risk` does.
    RuntimeError
        In ``backward()``, if the risk is differentiated twice.

    Notes
    -----
    The derivative of the risk with respect to the loss of sample i is the worst-case weight of sample i (Danskin's
    theorem), so autograd does not differentiate the solver. The risk is that of DRRho (arXiv 2505.06699).

    Examples
    --------
    >>> from drrho_core import CVaR
    >>> loss = torch.tensor([3.0, 2.0, 1.0], requires_grad=True)
    >>> value = drrho_risk(loss, torch.tensor([2.9, 0.5, 0.5]), CVaR(0.5))  # the worst half: one sample and a half
    >>> value.backward()
    >>> round(value.item(), 4), [round(weight, 4) for weight in loss.grad.tolist()]
    (1.1667, [0.0, 0.6667, 0.3333])
    """
    check_tensor("loss", loss)
    settings = _RiskSettings(_with_constants(ambiguity_set), axis)
    # Autocast would round the losses to a half type on the way to the solver.
    with torch.autocast(loss.device.type, enabled=False):
        weight = traced_number(reference_weight, loss)
        value: Tensor
        if not torch.compiler.is_compiling():
            value = _Risk.apply(settings, loss, reference_loss, weight, where)[0]  # type: ignore[no-untyped-call]
            return value
        with torch.no_grad():
            value, weights = _evaluate(settings, loss, reference_loss, weight, where)
        return with_gradients(value.unsqueeze(axis), [loss], [weights]).squeeze(axis)


class _RiskSettings(NamedTuple):
    """The settings of one call of `drrho_risk`."""

    ambiguity_set: AmbiguitySet
    axis: Any


def _evaluate(
    settings: _RiskSettings, loss: Tensor, reference_loss: Any, reference_weight: Any, where: Any
) -> tuple[Tensor, Tensor]:
    """Return the risk and its gradient, the worst-case weights; no gradient is recorded."""
    worst = risk.drrho_risk(
        loss.detach(),
        detached(reference_loss),
        settings.ambiguity_set,
        reference_weight=detached(reference_weight),
        axis=settings.axis,
        where=where,
        xp=_XP,
    )
    return worst.risk, worst.weights


class _Risk(torch.autograd.Function):
    """One call of `drrho_risk`, written as `drrho_torch.step_function.Step` is."""

    @staticmethod
    def forward(settings: _RiskSettings, *arguments: Any) -> tuple[Tensor, Tensor]:
        """Solve for the worst-case weights."""
        return _evaluate(settings, *arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Save the weights."""
        save_gradients(ctx, [inputs[1]], output)
        ctx.axis = inputs[0].axis

    @staticmethod
    def backward(ctx: Any, *incoming: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return one gradient per argument, None for all arguments but `loss`."""
        # A slice is the n samples along `axis`. The incoming gradient has one number per slice, which multiplies the n
        # weights of the slice.
        per_slice = None if incoming[0] is None else incoming[0].unsqueeze(ctx.axis)
        return None, *scaled_gradients(ctx, per_slice), None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], settings: _RiskSettings, *arguments: Any) -> tuple[Any, Any]:
        """Solve all mapped problems in one call, because the core (`drrho_core`) takes losses with many axes."""
        loss, reference_loss, reference_weight, where = arguments
        _, loss_axis, reference_axis, weight_axis, where_axis = in_dims
        # The core takes one reference weight per call, so problems with different weights are solved one by one.
        if weight_axis is not None:
            results = []
            for number in range(info.batch_size):
                problem = (
                    x if mapped is None else x.select(mapped, number)
                    for x, mapped in zip(arguments, in_dims[1:], strict=True)
                )
                results.append(_Risk.apply(settings, *problem))  # type: ignore[no-untyped-call]
            return tuple(torch.stack(fields) for fields in zip(*results, strict=True)), (0, 0)
        # The axis that counts the problems becomes the first axis of both losses.
        loss, reference_loss = (
            x.expand(info.batch_size, *x.shape) if mapped is None else x.movedim(mapped, 0)
            for x, mapped in ((loss, loss_axis), (reference_loss, reference_axis))
        )
        # `where` broadcasts from the right, so axes of length 1 must follow the axis of the problems.
        if where_axis is not None:
            where = where.movedim(where_axis, 0)
            where = where.reshape(where.shape[0], *(1,) * (loss.ndim - where.ndim), *where.shape[1:])
        # The axis of the problems is the first, so an axis that is counted from the front moves by 1.
        settings = settings._replace(axis=settings.axis + 1 if settings.axis >= 0 else settings.axis)
        return _Risk.apply(settings, loss, reference_loss, reference_weight, where), (0, 0)  # type: ignore[no-untyped-call]


def _with_constants(ambiguity_set: AmbiguitySet) -> AmbiguitySet:
    """Return the set with parameters that are constants of the compiled graph, even with ``dynamic=True``."""
    fields = getattr(ambiguity_set, "__dataclass_fields__", None)
    if fields is None or not torch.compiler.is_compiling():
        return ambiguity_set
    return type(ambiguity_set)(*[guard_scalar(getattr(ambiguity_set, name)) for name in fields])
