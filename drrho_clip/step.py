"""One training step, the same for every backend and method: features, loss and gradient, pullback, update.

The objective returns the gradient with respect to the features in closed form. A backend runs the encoders forward and
returns their *pullback*, which turns the gradient with respect to the features into the gradient with respect to the
parameters. So this file needs no automatic differentiation. An *inner estimate* is a running average that the methods
sogclr and drrho keep for each sample and direction (from image to text, from text to image). Shapes: batch b, image
side s, C channels, vocabulary V, L tokens per text, r features per image or text of the reference model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from drrho_clip.config import TrainConfig
from drrho_clip.methods import LOG_SCALE, METHODS, ObjectiveResult
from drrho_clip.selection import part_of
from drrho_clip.update import StepState, build_update
from drrho_core.backend import Backend, Model, Optimizer
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
    pair_mask: Array | None = None  # (b, b) bool, False: image i and text j show the same image, so no negative
    bias: Array | None = None  # (): the learned bias, which the step itself puts here
    gumbel: Array | None = None  # (chunks, b): the noise with which JEST chooses pairs


class StepResult(NamedTuple):
    """The new state, the new inner estimates of the batch, and the numbers to log.

    `loss` estimates the objective. `surrogate` is the scalar whose gradient the step uses.
    """

    state: StepState
    log_inner_image: Array
    log_inner_text: Array
    loss: Array
    surrogate: Array
    temperature_gradient: Array | tuple[Array, Array] | None  # None if the temperature is fixed


Step = Callable[[StepState, StepBatch], StepResult]


def build_step(backend: Backend, model: Model, optimizer: Optimizer, config: TrainConfig) -> Step:
    """Return the step of a method, compiled if the backend can compile.

    Parameters
    ----------
    backend, model, optimizer
        The library, the encoders and the optimiser.
    config : TrainConfig
        The step reads the settings of the method, of the temperature and of the update.

    Returns
    -------
    callable
        ``step(state, batch) -> StepResult``, a pure function of arrays.
    """
    method, xp = METHODS[config.method], backend.xp
    update = build_update(backend, optimizer, config)

    def step(state: StepState, batch: StepBatch) -> StepResult:
        temperature = _temperature(state, batch, config, xp)
        whole = batch._replace(bias=state.scalars.get("bias"))
        # 1. A method that selects gets a super-batch and keeps the pairs that are worth learning.
        batch = whole
        if method.select is not None:
            learner, reference = _logits(model, state, whole, temperature, config)
            batch = part_of(whole, method.select(learner, reference, whole, config, xp), xp)
        # 2. Forward: unit-norm features of both encoders, and the pullback.
        image_features, text_features, pullback = model.encode(state.parameters, batch.images, batch.texts)
        # 3. Loss of the batch, and its gradient with respect to the features.
        result = method.objective(image_features, text_features, batch, temperature, config, xp)
        # 4. Backward: from the features to the parameters.
        scale = state.loss_scale.get("scale", 1.0)
        gradients = pullback(scale * result.image_gradient, scale * result.text_gradient)
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

    return backend.compile(step)


def _temperature(state: StepState, batch: StepBatch, config: TrainConfig, xp: Namespace) -> Any:
    """Return the temperature of a step: learned by the optimiser, learned in another way, or fixed."""
    if LOG_SCALE in state.scalars:
        return xp.asarray(xp.exp(-state.scalars[LOG_SCALE]))
    return config.temperature if batch.temperature is None else batch.temperature


def _logits(
    model: Model, state: StepState, batch: StepBatch, temperature: Any, config: TrainConfig
) -> tuple[Array, Array]:
    """Return the logits of the learner and of the reference model on a super-batch; nothing keeps a gradient."""
    image_features = model.encode_images(state.parameters, batch.images)
    text_features = model.encode_texts(state.parameters, batch.texts)
    assert batch.reference_features is not None
    reference_image, reference_text = batch.reference_features
    learner = image_features @ text_features.T / temperature
    return learner, reference_image @ reference_text.T / config.reference_temperature


def _scalar_gradient(name: str, result: ObjectiveResult, temperature: Any) -> Array:
    """Return the gradient of the surrogate with respect to a scalar of the loss."""
    if name == LOG_SCALE:
        # temperature = exp(-log_scale), so d(temperature) / d(log_scale) = -temperature.
        return -temperature * result.temperature_gradient
    assert result.bias_gradient is not None
    return result.bias_gradient
