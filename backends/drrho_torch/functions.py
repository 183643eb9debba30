"""The core as `torch.autograd.Function`: values that bring their closed-form gradients along.

Autograd never enters the core. Backward multiplies the gradient that is there already by the incoming one. In eager
mode the core runs inside of the Function, because `torch.func` takes its wrappers off the tensors there. torch.compile
traces the core outside of it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import array_api_compat.torch
import torch
from torch import Tensor

from drrho_core import risk
from drrho_core._array_api import values_visible
from drrho_core.ambiguity import AmbiguitySet
from drrho_core.contrastive.step import wide_contrastive_step
from drrho_core.estimator import check_index
from drrho_torch.accumulation import RepeatedRows
from drrho_torch.estimator import Table

_XP = array_api_compat.torch


class Job(NamedTuple):
    """The settings of one call of `ContrastiveLoss`."""

    training: bool  # otherwise the state is not read
    update: bool  # the state is written
    gamma: float | Tensor
    eps: float | Tensor
    reference_weight: float | Tensor
    radius: float | Tensor
    tile_size: int | None
    memory_budget: int | None
    table: Table | None
    repeated: RepeatedRows | None
    pairs: tuple[bool, ...]  # whether references, anchor weights and temperatures take two arguments each


def evaluate(job: Job, *arguments: Any) -> tuple[Tensor, ...]:
    """Return the loss, the gradients of both features and those of temperatures that are tensors; update the state.

    `arguments` are those of `Step.forward`; no gradient is recorded.
    """
    images, texts, index, log_inner_image, log_inner_text, pair_mask, *rest = arguments
    references, anchor_weight, tau = (
        detached(tuple(rest[place : place + 2]) if pair else rest[place])
        for place, pair in zip((0, 2, 4), job.pairs, strict=True)
    )
    state = log_inner_image, log_inner_text
    table = job.table
    inside = None  # where an index is in the table, if nobody could look
    if not job.training:
        dtype = log_inner_image.dtype if table is None else table.dtype
        old = 2 * (torch.full(index.shape, -torch.inf, dtype=dtype, device=images.device),)
    elif table is not None:
        old = table.gather(index, images.device)
    else:
        index = check_index(index, log_inner_image.shape[0], like=log_inner_image, xp=_XP).to(torch.int64)
        if not values_visible(index, _XP):
            inside = (index >= 0) & (index < log_inner_image.shape[0])
            index = torch.where(inside, index, 0)
        old = log_inner_image[index], log_inner_text[index]
    given = old if inside is None else tuple(torch.where(inside, rows, torch.nan) for rows in old)
    step = wide_contrastive_step(
        images.detach(),
        texts.detach(),
        *given,
        temperature=tau,
        gamma=job.gamma,
        reference_features=references,
        reference_weight=job.reference_weight,
        radius=job.radius,
        eps=job.eps,
        pair_mask=pair_mask,
        anchor_weight=anchor_weight,
        tile_size=job.tile_size,
        memory_budget=job.memory_budget,
        xp=_XP,
    )
    loss = step.loss
    new: tuple[Tensor, ...] = (step.log_inner_image, step.log_inner_text)
    if inside is not None:
        # An index out of range stands for row 0 here, so then every row gets what it had before.
        valid = inside.all()
        loss = torch.where(valid, loss, torch.nan)
        new = tuple(torch.where(valid, rows, before) for rows, before in zip(new, old, strict=True))
    if job.update:
        if job.repeated is not None:  # before anything is written: a warning may be an error
            job.repeated.see(arguments[2], (images, texts), stacklevel=7)  # the caller of the module
        if table is not None:
            table.scatter(index, *new)
        else:
            for side, rows in zip(state, new, strict=True):
                side[index] = rows
    temperature_gradients = step.temperature_gradient if job.pairs[2] else (step.temperature_gradient,)
    learned = tau if job.pairs[2] else (tau,)
    return (
        loss,
        step.image_gradient,
        step.text_gradient,
        *(gradient for gradient, one in zip(temperature_gradients, learned, strict=True) if isinstance(one, Tensor)),
    )


evaluate_eagerly = torch.compiler.disable(  # type: ignore[no-untyped-call]
    evaluate, reason="an estimator object cannot be traced; keep the table in buffers (estimator=None)"
)


class Step(torch.autograd.Function):
    """One call of `ContrastiveLoss` on tensors without any wrapper of `torch.func`: the state is written here.

    The loss comes first. The gradients are results, too, because `torch.func` allows only results to be saved.
    """

    @staticmethod
    def forward(job: Job, *arguments: Any) -> tuple[Tensor, ...]:
        """Take the step; the arguments are images, texts, index, state (2), mask, and pairs as `Job` says."""
        return evaluate(job, *arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Keep the gradients."""
        ctx.learned = [isinstance(value, Tensor) for value in differentiable(inputs[1:])]
        _save(ctx, [value for value in differentiable(inputs[1:]) if isinstance(value, Tensor)], output)

    @staticmethod
    def backward(ctx: Any, *incoming: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return one gradient per argument, None for all but features and temperatures."""
        outgoing = iter(_outgoing(ctx, incoming[0]))
        first, second, *temperatures = (next(outgoing) if learned else None for learned in ctx.learned)
        return None, first, second, *[None] * 8, *temperatures

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], job: Job, *arguments: Any) -> tuple[Any, Any]:
        """Take one step after the other: the core knows one batch at a time."""
        dims = in_dims[1:]
        if job.update and (dims[3] is None or dims[4] is None):  # None, too, if an estimator object has the state
            raise RuntimeError(
                "ContrastiveLoss must be in eval() or have mapped buffers under torch.func.vmap, because several "
                "batches would write to one state at a time"
            )
        steps, job = [], job._replace(repeated=None)  # the rows of each problem go to a state of its own
        for row in range(info.batch_size):
            taken = (x if dim is None else x.select(dim, row) for x, dim in zip(arguments, dims, strict=True))
            steps.append(Step.apply(job, *taken))  # type: ignore[no-untyped-call]
        outputs = tuple(torch.stack(fields) for fields in zip(*steps, strict=True))
        return outputs, (0,) * len(outputs)


def differentiable(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return those of `Step`'s arguments that may have a gradient: both features and two temperatures."""
    return (*arguments[:2], *arguments[10:])  # numbers in the code: torch.compile takes those elsewhere for dynamic


class RiskJob(NamedTuple):
    """The settings of one call of `drrho_risk`."""

    ambiguity_set: AmbiguitySet
    axis: Any


def evaluate_risk(job: RiskJob, loss: Tensor, reference_loss: Any, weight: Any, where: Any) -> tuple[Tensor, Tensor]:
    """Return the risk and its gradient, the worst-case weights; no gradient is recorded."""
    worst = risk.drrho_risk(
        loss.detach(),
        detached(reference_loss),
        job.ambiguity_set,
        reference_weight=detached(weight),
        axis=job.axis,
        where=where,
        xp=_XP,
    )
    return worst.risk, worst.weights


class Risk(torch.autograd.Function):
    """`drrho_risk` on tensors without any wrapper of `torch.func`."""

    @staticmethod
    def forward(job: RiskJob, *arguments: Any) -> tuple[Tensor, Tensor]:
        """Solve for the worst-case weights."""
        return evaluate_risk(job, *arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Keep the weights."""
        _save(ctx, [inputs[1]], output)
        ctx.axis = inputs[0].axis

    @staticmethod
    def backward(ctx: Any, *incoming: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return one gradient per argument; only the losses have one."""
        upstream = None if incoming[0] is None else incoming[0].unsqueeze(ctx.axis)
        return None, *_outgoing(ctx, upstream), None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], job: RiskJob, *arguments: Any) -> tuple[Any, Any]:
        """Make one call for all, because the core takes losses with many axes."""
        loss, reference_loss, weight, where = arguments
        if in_dims[3] is not None:  # the core takes one weight per call
            rows = []
            for row in range(info.batch_size):
                taken = (x if d is None else x.select(d, row) for x, d in zip(arguments, in_dims[1:], strict=True))
                rows.append(Risk.apply(job, *taken))  # type: ignore[no-untyped-call]
            return tuple(torch.stack(fields) for fields in zip(*rows, strict=True)), (0, 0)
        # One call for all: the new axis comes first, so an axis that is counted from the front moves by one.
        loss, reference_loss = (
            x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)
            for x, dim in zip((loss, reference_loss), in_dims[1:3], strict=True)
        )
        if in_dims[4] is not None:
            where = where.movedim(in_dims[4], 0)
            where = where.reshape(where.shape[0], *(1,) * (loss.ndim - where.ndim), *where.shape[1:])
        axis = job.axis + 1 if job.axis >= 0 else job.axis
        return Risk.apply(job._replace(axis=axis), loss, reference_loss, weight, where), (0, 0)  # type: ignore[no-untyped-call]


def _save(ctx: Any, inputs: list[Tensor], output: tuple[Tensor, ...]) -> None:
    """Save the gradients, which follow the value in `output`, and the inputs that they belong to."""
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # otherwise (b, d) zeros would be made for the gradients' own gradients
    ctx.save_for_backward(*(None if x.is_inference() else x for x in inputs), *output[1:])


def _outgoing(ctx: Any, incoming: Tensor | None) -> list[Tensor | None]:
    """Multiply the saved gradients by the incoming one."""
    inputs, gradients = _inputs_and_gradients(ctx.saved_tensors)
    if incoming is None:
        return [None] * len(gradients)
    # The incoming gradient, maybe a loss scale, meets a gradient in float32; the product is rounded to a half type.
    outgoing = [
        incoming * gradient if x is None else (incoming * gradient).to(x.dtype)
        for x, gradient in zip(inputs, gradients, strict=True)
    ]
    if torch.is_grad_enabled():  # create_graph=True
        outgoing = [y if x is None else _Once.apply(y, x) for y, x in zip(outgoing, inputs, strict=True)]  # type: ignore[no-untyped-call]
    return list(outgoing)


def _inputs_and_gradients(tensors: tuple[Any, ...]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Split n inputs from the n gradients that follow them."""
    count = len(tensors) // 2
    return tensors[:count], tensors[count:]


def with_gradients(value: Tensor, inputs: list[Tensor], gradients: list[Tensor]) -> Tensor:
    """Return `value`, of which autograd says that its gradients with respect to `inputs` are `gradients`."""
    if not any(x.requires_grad for x in inputs):
        return value  # torch.compile cannot trace a Function that no gradient is asked of
    distinct: list[Tensor] = []
    for x in inputs:
        # torch.compile loses the gradient of a tensor that a Function receives twice.
        distinct.append(x.view_as(x) if any(x is other for other in distinct) else x)
    result: Tensor = _WithGradients.apply(value, *distinct, *gradients)  # type: ignore[no-untyped-call]
    return result


class _WithGradients(torch.autograd.Function):
    """The identity on its first argument, for torch.compile; n inputs follow, then their n gradients."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *incoming: Tensor) -> tuple[Tensor | None, ...]:
        outgoing = _outgoing(ctx, incoming[0])
        return None, *outgoing, *[None] * len(outgoing)


class _Once(torch.autograd.Function):
    """Identity on a closed-form gradient. It depends on its input: a second derivative is an error and not 0."""

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


def detached(value: Any) -> Any:
    """Cut a tensor, or the members of a pair, loose from autograd; numbers stay as they are."""
    if isinstance(value, (tuple, list)):
        return tuple(member.detach() if isinstance(member, Tensor) else member for member in value)
    return value.detach() if isinstance(value, Tensor) else value
