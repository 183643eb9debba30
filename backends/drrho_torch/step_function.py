"""One call of `ContrastiveLoss` as a `torch.autograd.Function`: a loss together with its closed-form gradients.

In eager mode the core (`drrho_core`) runs inside of the Function, because there `torch.func` has removed its wrappers
from the tensors. torch.compile traces the core outside of the Function; see `drrho_torch.closed_form.with_gradients`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import array_api_compat.torch
import torch
from torch import Tensor

from drrho_core.checks import values_visible
from drrho_core.contrastive.agreement import agreed
from drrho_core.contrastive.step import wide_contrastive_step
from drrho_core.state.table import check_index
from drrho_torch.accumulation import RepeatedRows
from drrho_torch.adapter import EstimatorAdapter
from drrho_torch.closed_form import detached, save_gradients, scaled_gradients
from drrho_torch.ranks import TorchRanks

_XP = array_api_compat.torch


class StepSettings(NamedTuple):
    """The settings of one call of `ContrastiveLoss`."""

    training: bool  # False: the state is not read, and every sample counts as never visited
    update: bool  # True: the state is written
    gamma: float | Tensor
    eps: float | Tensor
    reference_weight: float | Tensor
    radius: float | Tensor
    tile_size: int | None
    memory_budget: int | None
    table: EstimatorAdapter | None  # the estimator object; None: the two buffers among the arguments hold the estimates
    repeated: RepeatedRows | None
    pairs: tuple[bool, ...]  # whether references, anchor weights and temperatures are pairs
    ranks: TorchRanks | None = None  # the processes that share the batch
    form: str = "reduce"
    gradient_scale: float = 1.0  # factor of the features' gradients
    wait: bool = False  # True: the arguments of the ranks are compared even if the host has to wait for a device

    @property
    def shares_rows(self) -> bool:
        """Return True if each rank stores only a part of the estimates."""
        return self.table is not None and self.table.num_ranks > 1

    @property
    def waits(self) -> bool:
        """Return True if the ranks compare the rows that they read, even if the host has to wait for a device.

        An estimator on the host raises an error about a wrong id of its own rank, and the other ranks have to learn
        about the error. When such an estimator writes rows, the host waits for the device anyway.
        """
        return self.wait or self.reads_ids

    @property
    def reads_ids(self) -> bool:
        """Return True if the call reads the ids on the host."""
        return self.training and self.table is not None and self.table.reads_ids


class _Rows(NamedTuple):
    """The batch's rows of the state before the step."""

    row_ids: Tensor  # (b,)  the rows to write to
    old: tuple[Tensor, Tensor]  # (b,) each: logarithms of the inner estimates
    in_range: Tensor | None  # (b,) bool: the id is in range; None: all ids were checked, or are not used


def evaluate(settings: StepSettings, *arguments: Any) -> tuple[Tensor, ...]:
    """Return the loss, the gradients of both features and those of temperatures that are tensors; update the state.

    `arguments` are those of `Step.forward`; no gradient is recorded.
    """
    images, texts, sample_index, log_inner_image, log_inner_text, pair_mask, *options = arguments
    # References, anchor weight and temperature each take two positions in `arguments` (see
    # `drrho_torch.arguments.two_arguments`): a pair fills both positions; any other value fills the first
    # position, and the second position is None.
    references, anchor_weight, temperature = (
        detached(tuple(options[first : first + 2]) if is_pair else options[first])
        for first, is_pair in zip((0, 2, 4), settings.pairs, strict=True)
    )
    buffers, ranks = (log_inner_image, log_inner_text), settings.ranks
    rows = _agreed_rows(settings, sample_index, buffers, images.detach())
    # If the host does not read the index, an id that occurs twice or is out of range makes the loss and the gradients
    # nan, because no error can be raised, and no estimate changes.
    checks_index = settings.training and (ranks is not None or rows.in_range is not None)
    step = wide_contrastive_step(
        images.detach(),
        texts.detach(),
        *rows.old,
        temperature=temperature,
        gamma=settings.gamma,
        reference_features=references,
        reference_weight=settings.reference_weight,
        radius=settings.radius,
        eps=settings.eps,
        pair_mask=pair_mask,
        anchor_weight=anchor_weight,
        tile_size=settings.tile_size,
        memory_budget=settings.memory_budget,
        ranks=ranks,
        form=settings.form,
        wait=settings.wait,
        # An estimator in the host's memory takes an index on the host, but messages are sent from the features' device.
        # On a GPU torch cannot sort unsigned integers.
        sample_index=sample_index.to(images.device, torch.int64) if checks_index else None,
        in_range=rows.in_range,
        xp=_XP,
    )
    # Over ranks the loss is an entry of the sums of all ranks. FSDP2 warns if a module returns a view.
    loss = step.loss if ranks is None else step.loss.clone()
    features: tuple[Tensor, ...] = (step.image_gradient, step.text_gradient)
    new: tuple[Tensor, ...] = (step.log_inner_image, step.log_inner_text)
    if settings.update:
        row_ids = rows.row_ids
        if ranks is not None and not settings.shares_rows:
            # Every process keeps the estimates of all samples, so all of them store the rows of all processes.
            message = (row_ids.to(images.device), *new)
            row_ids, *new_of_all = (x.flatten() for x in ranks.all_gather(message))
            new = tuple(new_of_all)
        # The warning comes before the first write: if a filter turns the warning into an error, no state has changed.
        # It comes after the last exchange, because an error before it would let the other processes wait. So rows that
        # are split among processes are written first.
        # Stack level 7 is the caller of the module; levels 1 to 6 are evaluate, Step.forward, apply, forward, and two
        # functions of nn.Module.
        if settings.repeated is not None and not settings.shares_rows:
            settings.repeated.warn_if_repeated(sample_index, (images, texts), stacklevel=7)
        if settings.table is not None:
            settings.table.scatter(row_ids, *new)
        else:
            for buffer, values in zip(buffers, new, strict=True):
                buffer[row_ids] = values
        if settings.repeated is not None and settings.shares_rows:
            settings.repeated.warn_if_repeated(sample_index, (images, texts), stacklevel=7)
    # Only tensors have a gradient: a temperature that is a number is a constant.
    temperatures = temperature if settings.pairs[2] else (temperature,)
    temperature_gradients = step.temperature_gradient if settings.pairs[2] else (step.temperature_gradient,)
    learned = [
        gradient
        for gradient, value in zip(temperature_gradients, temperatures, strict=True)
        if isinstance(value, Tensor)
    ]
    if settings.gradient_scale != 1.0:
        features = tuple(settings.gradient_scale * gradient for gradient in features)
    return (loss, *features, *learned)


def _agreed_rows(settings: StepSettings, index: Tensor, buffers: tuple[Tensor, Tensor], images: Tensor) -> _Rows:
    """Return the batch's rows of the state; what one process refuses is an error on all that share the batch."""

    def read() -> _Rows:
        return _read(settings, index, buffers, images.device)

    # Processes exchange other messages if the estimator is on the host and the features are not.
    is_apart = settings.reads_ids and not values_visible(images, _XP)
    facts = {
        "image_features": images,
        "estimator_on_host": is_apart,
        "num_samples": buffers[0].shape[0] if settings.table is None else settings.table.num_samples,
        "training": settings.training,
        "update": settings.update,
        "gradient_scale": settings.gradient_scale,
    }
    if not settings.shares_rows:
        return agreed(read, facts, settings.ranks, wait=settings.waits)
    # Rows that are split among ranks are exchanged, and the table has a check of its own for the index.
    agreed(lambda: None, facts, settings.ranks, wait=settings.waits)
    return read()


def _read(settings: StepSettings, index: Tensor, buffers: tuple[Tensor, Tensor], device: torch.device) -> _Rows:
    """Return the batch's rows of the state, after checking the index if its values can be read."""
    table = settings.table
    if not settings.training:
        dtype = buffers[0].dtype if table is None else table.dtype
        unseen = torch.full(index.shape, -torch.inf, dtype=dtype, device=device)
        return _Rows(index, (unseen, unseen), None)
    if table is None:
        num_samples = buffers[0].shape[0]
        index = check_index(index, num_samples, like=buffers[0], xp=_XP).to(torch.int64)
        is_checked = values_visible(index, _XP)
    else:
        num_samples, is_checked = table.num_samples, table.reads_ids
    in_range = None
    if not is_checked:
        # The values of the index are not read here: on a GPU reading would wait for the device, and under tracing there
        # are no values yet. An id out of range is replaced by 0. Otherwise it would fail an assertion on a GPU, and
        # after a failed assertion the process cannot use the device any more.
        index = index.to(device, torch.int64)
        in_range = (index >= 0) & (index < num_samples)
        index = torch.where(in_range, index, 0)
    old = (buffers[0][index], buffers[1][index]) if table is None else table.gather(index, device)
    return _Rows(index, old, in_range)


class Step(torch.autograd.Function):
    """One call of `ContrastiveLoss`. Here tensors have no wrapper of `torch.func`, so the state can be written.

    The first result is the loss. The gradients are results too, because `torch.func` allows a Function to save only
    its inputs and its results.
    """

    # `setup_context` is a method of its own, because `torch.func` refuses a Function whose `forward` takes `ctx`.

    @staticmethod
    def forward(settings: StepSettings, *arguments: Any) -> tuple[Tensor, ...]:
        """Compute one call.

        The arguments are images, texts, index, both estimates, mask, both references, both weights and both
        temperatures. References, weights and temperatures take two positions each; the second position is None if the
        value is no pair.
        """
        return evaluate(settings, *arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Save the gradients."""
        candidates = differentiable(inputs[1:])
        ctx.learned = [isinstance(value, Tensor) for value in candidates]
        save_gradients(ctx, [value for value in candidates if isinstance(value, Tensor)], output)

    @staticmethod
    def backward(ctx: Any, *incoming: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return one gradient per argument, None for all but features and temperatures."""
        gradients = iter(scaled_gradients(ctx, incoming[0]))
        image, text, *temperatures = (next(gradients) if learned else None for learned in ctx.learned)
        # The order is that of `forward`: settings, images, texts, the eight arguments that are constants, temperatures.
        return None, image, text, *[None] * 8, *temperatures

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], settings: StepSettings, *arguments: Any) -> tuple[Any, Any]:
        """Compute the calls for all mapped batches (the problems) one by one: the core takes one batch at a time."""
        axes = in_dims[1:]  # of each argument: the axis that counts the problems, None if all problems share it
        # An estimator object keeps the state outside of the arguments, and then the axes of the state are None as well.
        if settings.update and (axes[3] is None or axes[4] is None):
            raise RuntimeError(
                "ContrastiveLoss must be in eval() or have mapped buffers under torch.func.vmap, because several "
                "batches would otherwise write to one state"
            )
        # Each problem has a state of its own, so the same rows in two problems need no warning.
        settings = settings._replace(repeated=None)
        steps = []
        for number in range(info.batch_size):
            problem = (x if axis is None else x.select(axis, number) for x, axis in zip(arguments, axes, strict=True))
            steps.append(Step.apply(settings, *problem))  # type: ignore[no-untyped-call]
        outputs = tuple(torch.stack(fields) for fields in zip(*steps, strict=True))
        return outputs, (0,) * len(outputs)


def differentiable(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return those of `Step`'s arguments that may have a gradient: both features and two temperatures."""
    # The positions are literals, because torch.compile treats named integers as dynamic sizes.
    return (*arguments[:2], *arguments[10:])
