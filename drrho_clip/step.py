"""One training step, the same for every backend and method: features, loss and gradient, pullback, update.

The objective returns the gradient with respect to the features in closed form. A backend runs the encoders forward and
returns their *pullback*, which turns the gradient with respect to the features into the gradient with respect to the
parameters. So this file needs no automatic differentiation. An *inner estimate* is a running average that the methods
sogclr and drrho keep for each sample and direction (from image to text, from text to image).

If several processes train together, each holds b of the B pairs of the batch: it encodes these pairs, exchanges
features inside of the loss, adds its gradient to those of the others, and makes the same update. `BY_ROWS` says which
fields belong to the own pairs; all other fields hold the same numbers on all processes. The step reads no values of
arrays except the overflow of a loss scale, so a compiler can trace it.

Shapes: own pairs b, whole batch B (B = b for one process), image side s, C channels, vocabulary V, L tokens per text,
r features per image or text of the reference model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from drrho_clip.config import TrainConfig
from drrho_clip.methods import LOG_SCALE, METHODS, ObjectiveInputs, ObjectiveResult
from drrho_clip.processes.one import OneProcess
from drrho_clip.processes.protocol import Processes
from drrho_clip.processes.shared_rows import rows_of_all
from drrho_clip.selection import part_of
from drrho_clip.update import StepState, build_update
from drrho_core import Ranks
from drrho_core.backend import Backend, Model, Optimizer, Parameters
from drrho_core.checks import Array, Namespace


class StepBatch(NamedTuple):
    """One batch on the device, and the numbers that this step uses."""

    images: Array  # (b, s, s, C)
    texts: Array  # (b, V) or (b, L)
    log_inner_image: Array  # (b,)
    log_inner_text: Array  # (b,)
    reference_features: tuple[Array, Array] | None  # (b, r) each
    learning_rate: float | Array
    gamma: float | Array
    temperature: Array | tuple[Array, Array] | None  # () or (b,) each; None: the fixed temperature of the settings
    anchor_weight: Array | None = None  # (b,): factor of each pair in the loss; None: all factors are 1
    pair_mask: Array | None = None  # (b, B) bool, False: image i and text j show the same image, so no negative
    bias: Array | None = None  # (): the learned bias, which the step itself puts here
    gumbel: Array | None = None  # (chunks, B): the noise with which JEST chooses pairs


BY_ROWS = frozenset(
    {
        "images",
        "texts",
        "log_inner_image",
        "log_inner_text",
        "reference_features",
        "anchor_weight",
        "pair_mask",
    }
)
"""The fields of a `StepBatch` with a row for each own pair; `log_inner_image` and `log_inner_text` of a result, too.

A temperature per sample and the gradient of such a temperature, which are pairs of arrays, also have a row for each own
pair; `is_by_rows` takes them into account.
"""


def is_by_rows(name: str, value: Any) -> bool:
    """Return whether a field of a `StepBatch` or of a `StepResult` holds a row for each own pair.

    Examples
    --------
    >>> is_by_rows("images", None), is_by_rows("gamma", 0.5), is_by_rows("temperature", (0.1, 0.1))
    (True, False, True)
    """
    return name in BY_ROWS or (name.startswith("temperature") and isinstance(value, tuple))


class StepResult(NamedTuple):
    """The new state, the new inner estimates of the batch, and the numbers to log.

    `loss` estimates the objective. `surrogate` is the scalar whose gradient the step uses. Both belong to the batch of
    all processes.
    """

    state: StepState
    log_inner_image: Array
    log_inner_text: Array
    loss: Array
    surrogate: Array
    temperature_gradient: Array | tuple[Array, Array] | None  # None if the temperature is fixed


Step = Callable[[StepState, StepBatch], StepResult]


def build_step(
    backend: Backend,
    model: Model,
    optimizer: Optimizer,
    config: TrainConfig,
    processes: Processes | None = None,
) -> Step:
    """Return the step of a method, compiled if the backend can compile.

    Parameters
    ----------
    backend, model, optimizer
        The library, the encoders and the optimiser.
    config : TrainConfig
        The step reads the settings of the method, of the temperature and of the update.
    processes : Processes, optional
        The processes that share each batch; by default this process has the whole batch.

    Returns
    -------
    callable
        ``step(state, batch) -> StepResult``, a pure function of arrays.
    """
    method, xp = METHODS[config.method], backend.xp
    processes = OneProcess(backend) if processes is None else processes
    ranks = processes.ranks
    update = build_update(backend, optimizer, config)

    def step(state: StepState, batch: StepBatch) -> StepResult:
        temperature = _temperature(state, batch, config, xp)
        whole = batch._replace(bias=state.scalars.get("bias"))
        # 1. A method that selects gets a super-batch and keeps the pairs that are worth learning.
        batch = whole
        if method.select is not None:
            batch = _selected(model, state, whole, temperature, config, ranks, xp)
        # 2. Forward: unit-norm features of both encoders, and the pullback.
        image_features, text_features, pullback = model.encode(state.parameters, batch.images, batch.texts)
        # 3. Loss of the batch, and its gradient with respect to the features.
        inputs = ObjectiveInputs(image_features, text_features, batch, temperature, config, xp, ranks)
        result = method.objective(inputs)
        # 4. Backward: from the features to the parameters.
        scale = state.loss_scale.get("scale", 1.0)
        gradients = pullback(scale * result.image_gradient, scale * result.text_gradient)
        # The gradient of a parameter is the sum over the processes; gradients of scalars are those of the whole batch.
        if ranks is not None:
            gradients = _summed(gradients, ranks)
        # 5. Update of the parameters.
        scalar_gradients = {name: xp.asarray(_scalar_gradient(name, result, temperature)) for name in state.scalars}
        return StepResult(
            state=update(state, gradients, scalar_gradients, batch.learning_rate),
            # A method that selects keeps no inner estimates.
            log_inner_image=result.log_inner_image if method.select is None else whole.log_inner_image,
            log_inner_text=result.log_inner_text if method.select is None else whole.log_inner_text,
            loss=result.loss,
            surrogate=result.surrogate,
            temperature_gradient=None if batch.temperature is None else result.temperature_gradient,
        )

    return processes.compile(step)


def _summed(gradients: Parameters, ranks: Ranks) -> Parameters:
    """Return the sums of the gradients over all processes, which travel in one message."""
    return dict(zip(gradients, ranks.all_sum(tuple(gradients.values())), strict=True))


def _temperature(state: StepState, batch: StepBatch, config: TrainConfig, xp: Namespace) -> Any:
    """Return the temperature of a step: learned by the optimiser, learned in another way, or fixed."""
    if LOG_SCALE in state.scalars:
        return xp.asarray(xp.exp(-state.scalars[LOG_SCALE]))
    return config.temperature if batch.temperature is None else batch.temperature


def _selected(
    model: Model,
    state: StepState,
    batch: StepBatch,
    temperature: Any,
    config: TrainConfig,
    ranks: Ranks | None,
    xp: Namespace,
) -> StepBatch:
    """Return the own part of the batch that the method selects from the super-batch of all processes.

    Every process gets the features of all pairs of the super-batch, and all of them select the same pairs.
    """
    select = METHODS[config.method].select
    assert select is not None
    assert batch.reference_features is not None
    # The encoders keep nothing for a gradient.
    features = model.encode_images(state.parameters, batch.images), model.encode_texts(state.parameters, batch.texts)
    images, texts, *reference = rows_of_all((*features, *batch.reference_features), ranks, xp)
    learner = images @ texts.T / temperature
    mask = batch.pair_mask if batch.pair_mask is None else rows_of_all((batch.pair_mask,), ranks, xp)[0]
    of_reference = reference[0] @ reference[1].T / config.reference_temperature
    index = select(learner, of_reference, batch._replace(pair_mask=mask), config, xp)
    if ranks is not None:
        # The choice of the first process holds for all, because rounding may differ between machines.
        index = ranks.all_gather((index,))[0][0, ...]
    return part_of(batch, index, xp, ranks)


def _scalar_gradient(name: str, result: ObjectiveResult, temperature: Any) -> Array:
    """Return the gradient of the surrogate with respect to a scalar of the loss."""
    if name == LOG_SCALE:
        # temperature = exp(-log_scale), so d(temperature) / d(log_scale) = -temperature.
        return -temperature * result.temperature_gradient
    assert result.bias_gradient is not None
    return result.bias_gradient
