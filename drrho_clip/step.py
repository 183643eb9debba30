"""One training step, the same for every backend: features forward, objective, pullback, optimiser.

The objective gives the gradient of the features in closed form, so a backend only runs its encoders forward and pulls
that gradient back; nothing here asks for autograd.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from drrho_clip.config import TrainConfig
from drrho_core import contrastive_step, info_nce
from drrho_core._array_api import Array
from drrho_core.backend import Backend, Model, Optimizer, Parameters


class StepState(NamedTuple):
    """Everything that a step changes, but for the estimator of the whole data set and a learned temperature."""

    parameters: Parameters
    optimizer: Parameters


class StepBatch(NamedTuple):
    """One batch on the device, and the numbers of this step."""

    images: Array  # (b, s, s, C)
    texts: Array  # (b, V) or (b, L)
    log_inner_image: Array  # (b,)
    log_inner_text: Array  # (b,)
    reference_features: tuple[Array, Array] | None  # (b, r) each
    learning_rate: float | Array
    gamma: float | Array
    temperature: Array | tuple[Array, Array] | None  # (), or (b,) each; None: the fixed one of the settings


class StepResult(NamedTuple):
    """The new state, the batch's new estimates, and what to log."""

    state: StepState
    log_inner_image: Array
    log_inner_text: Array
    loss: Array
    surrogate: Array
    temperature_gradient: Array | tuple[Array, Array] | None  # of the temperature in the batch, where there is one


Step = Callable[[StepState, StepBatch], StepResult]


def build_step(backend: Backend, model: Model, optimizer: Optimizer, config: TrainConfig) -> Step:
    """Return the step of a method, compiled where the backend can.

    Parameters
    ----------
    backend, model, optimizer
        What runs it.
    config : TrainConfig
        Method, a fixed temperature, radius, reference_weight and eps are used.

    Returns
    -------
    callable
        ``step(state, batch) -> StepResult``, a pure function of arrays.
    """

    def step(state: StepState, batch: StepBatch) -> StepResult:
        image_features, text_features, pullback = model.encode(state.parameters, batch.images, batch.texts)
        log_inner_image, log_inner_text = batch.log_inner_image, batch.log_inner_text
        temperature = config.temperature if batch.temperature is None else batch.temperature
        slope: Array | tuple[Array, Array]
        if config.method == "clip":
            plain = info_nce(image_features, text_features, temperature=temperature, xp=backend.xp)
            loss, surrogate, slope = plain.loss, plain.loss, plain.temperature_gradient
            gradients = pullback(plain.image_gradient, plain.text_gradient)
        else:
            result = contrastive_step(
                image_features,
                text_features,
                log_inner_image,
                log_inner_text,
                temperature=temperature,
                gamma=batch.gamma,
                reference_features=batch.reference_features,
                reference_weight=config.reference_weight,
                radius=config.radius,
                eps=config.eps,
                xp=backend.xp,
            )
            loss, surrogate, slope = result.loss, result.surrogate, result.temperature_gradient
            log_inner_image, log_inner_text = result.log_inner_image, result.log_inner_text
            gradients = pullback(result.image_gradient, result.text_gradient)
        new = optimizer.update(state.parameters, gradients, state.optimizer, batch.learning_rate)
        learned = None if batch.temperature is None else slope
        return StepResult(StepState(*new), log_inner_image, log_inner_text, loss, surrogate, learned)

    return backend.compile(step)
