"""One training step, the same for every backend and method: features, loss and gradient, pullback, update.

The objective returns the gradient with respect to the features in closed form. A backend runs the encoders forward and
returns their *pullback*, which turns the gradient with respect to the features into the gradient with respect to the
parameters. So this file needs no automatic differentiation. An *inner estimate* is a running average that the methods
sogclr and drrho keep for each sample and direction (from image to text, from text to image). Shapes: batch b, image
side s, C channels, vocabulary V, L tokens per text, r features per image or text of the reference model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from drrho_clip.config import TrainConfig
from drrho_clip.methods import METHODS
from drrho_core.backend import Backend, Model, Optimizer, Parameters
from drrho_core.checks import Array


class StepState(NamedTuple):
    """The arrays that every step replaces: the parameters and the state of the optimiser."""

    parameters: Parameters
    optimizer: Parameters


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
        The step reads the settings method, temperature (if fixed), radius, reference_weight and eps.

    Returns
    -------
    callable
        ``step(state, batch) -> StepResult``, a pure function of arrays.
    """
    objective = METHODS[config.method].objective

    def step(state: StepState, batch: StepBatch) -> StepResult:
        # 1. Forward: unit-norm features of both encoders, and the pullback.
        image_features, text_features, pullback = model.encode(state.parameters, batch.images, batch.texts)
        # 2. Loss of the batch, and its gradient with respect to the features.
        temperature = config.temperature if batch.temperature is None else batch.temperature
        result = objective(image_features, text_features, batch, temperature, config, backend.xp)
        # 3. Backward: from the features to the parameters.
        gradients = pullback(result.image_gradient, result.text_gradient)
        # 4. Update of the parameters.
        new_state = StepState(*optimizer.update(state.parameters, gradients, state.optimizer, batch.learning_rate))
        return StepResult(
            state=new_state,
            log_inner_image=result.log_inner_image,
            log_inner_text=result.log_inner_text,
            loss=result.loss,
            surrogate=result.surrogate,
            temperature_gradient=None if batch.temperature is None else result.temperature_gradient,
        )

    return backend.compile(step)
