"""One call of `ContrastiveLoss` as an operator that torch.compile calls without looking inside.

torch.compile cannot trace every collective of torch.distributed, nor an estimator object. A compiler may also change
the order of operations, and processes that run collectives in different orders wait for each other forever. So the
whole step is one operator of torch: in a compiled graph it runs as in eager mode, with all checks and kernels.

An operator takes tensors, numbers and texts only. So a loss registers the function that makes the settings of a call,
and passes the name under which the function was registered.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import array_api_compat.torch
import torch
from torch import Tensor

from drrho_core.contrastive.tiles import work_dtype
from drrho_torch.step_function import StepSettings, evaluate

_XP = array_api_compat.torch

MakeSettings = Callable[[bool, bool, float, tuple[bool, ...]], StepSettings]
"""``make(training, update, gamma, pairs)`` returns the settings of a call; see `StepSettings`."""

# A weak reference does not keep a loss alive that nobody uses any more.
_MAKERS: dict[str, weakref.WeakMethod[MakeSettings]] = {}
_NUMBERS = itertools.count()


def register(make_settings: MakeSettings) -> str:
    """Return a name under which `step` finds a method of a loss."""
    name = str(next(_NUMBERS))
    _MAKERS[name] = weakref.WeakMethod(make_settings, lambda _: _MAKERS.pop(name))
    return name


@torch.library.custom_op("drrho_torch::step", mutates_args=("state",))
def step(
    state: Sequence[Tensor],
    images: Tensor,
    texts: Tensor,
    sample_index: Tensor,
    constants: Sequence[Tensor | None],
    temperatures: Sequence[Tensor | None],
    gamma: Tensor,
    name: str,
    training: bool,
    update: bool,
    pairs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute one call; return the loss, the gradients of both features and those of two temperatures.

    A temperature that is missing among the arguments has a gradient of length 0, because the number of results of an
    operator that changes tensors is fixed.

    Parameters
    ----------
    state : sequence of tensor
        Both estimates, (n,) each, which the call changes; or one number of their dtype, which stands for the state of
        an estimator object, so that the compiler neither removes a call nor changes the order of two calls.
    images, texts, sample_index : tensor
        The batch.
    constants, temperatures : sequence of tensor or None
        The mask, both references and both weights; two temperatures. The order is that of
        `drrho_torch.step_function.Step`.
    gamma : tensor, shape ()
        Weight of the batch's own estimate, on the host; in ``eval()`` it is not used.
    name : str
        The name under which the loss is registered.
    training, update, pairs : bool, bool, sequence of bool
        As in `drrho_torch.step_function.StepSettings`.
    """
    make_settings = _MAKERS[name]()
    if make_settings is None:
        raise RuntimeError("a loss must exist as long as a compiled step of it runs, got one that was deleted")
    settings = make_settings(training, update, float(gamma), tuple(pairs))
    buffers = (None, None) if settings.table is not None else state
    if settings.table is not None and update:
        state[0].add_(1)
    arguments = images, texts, sample_index, *buffers, *constants, *temperatures
    loss, image, text, *learned = evaluate(settings, *arguments)
    first, second = (*learned, *[loss.new_empty(0)] * (2 - len(learned)))
    # The results of an operator may not share memory.
    return loss, image, text, first, second.clone()


@step.register_fake
def _(
    state: Sequence[Tensor],
    images: Tensor,
    texts: Tensor,
    sample_index: Tensor,
    constants: Sequence[Tensor | None],
    temperatures: Sequence[Tensor | None],
    *settings: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return tensors of the right shapes and dtypes without values, for the compiler."""
    del sample_index
    pairs = settings[-1]
    references = (constants[1], constants[2]) if pairs[0] else None
    work = work_dtype(images, references, _XP)
    # The loss depends on the estimates, which may be wider than the features.
    wide = torch.promote_types(work, state[0].dtype)
    loss = images.new_empty((), dtype=wide)
    first, second = (loss.new_empty((0,) if x is None else x.shape) for x in temperatures)
    image, text = (x.new_empty(x.shape, dtype=work) for x in (images, texts))
    return loss, image, text, first, second
