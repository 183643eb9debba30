"""One training step, the same for every backend and method: features, loss and gradient, pullback, update.

The objective returns the gradient with respect to the features in closed form. A backend runs the encoders forward and
returns their *pullback*, which turns the gradient with respect to the features into the gradient with respect to the
parameters. So this file needs no automatic differentiation. An *inner estimate* is a running average that the methods
sogclr and drrho keep for each sample and direction (from image to text, from text to image). Shapes: batch b, image
side s, C channels, vocabulary V, L tokens per text, r features per image or text of the reference model.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from drrho_clip.config import TrainConfig
from drrho_clip.methods import LOG_SCALE, METHODS, ObjectiveResult
from drrho_core.backend import Backend, Model, Optimizer, Parameters
from drrho_core.checks import Array


class StepState(NamedTuple):
    """The arrays that every step replaces: the parameters, the state of the optimiser and the scalars of the loss.

    The *scalars* are the parameters of the loss that the optimiser learns together with the parameters: `log_scale`,
    the logarithm of 1 / temperature, and `bias`, the bias of the sigmoid loss. Most methods have none.
    """

    parameters: Parameters
    optimizer: Parameters
    scalars: Parameters


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

SCALARS = "scalars/"
"""The prefix of a scalar of the loss in the optimiser's mapping of parameters."""


def build_step(backend: Backend, model: Model, optimizer: Optimizer, config: TrainConfig) -> Step:
    """Return the step of a method, compiled if the backend can compile.

    Parameters
    ----------
    backend, model, optimizer
        The library, the encoders and the optimiser.
    config : TrainConfig
        The step reads the settings of the method and of the temperature.

    Returns
    -------
    callable
        ``step(state, batch) -> StepResult``, a pure function of arrays.
    """
    objective = METHODS[config.method].objective

    def updated(
        state: StepState, gradients: dict[str, Array], result: ObjectiveResult, temperature: Any, rate: float | Array
    ) -> StepState:
        """Return the state after one update of parameters and scalars by the same optimiser."""
        for name in state.scalars:
            gradients[SCALARS + name] = backend.xp.asarray(_scalar_gradient(name, result, temperature))
        everything = with_scalars(state.parameters, state.scalars)
        new, optimizer_state = optimizer.update(everything, gradients, state.optimizer, rate)
        scalars = {name: new[SCALARS + name] for name in state.scalars}
        if LOG_SCALE in scalars:
            # As in CLIP, the bounds of the temperature hold after every update.
            low, high = -math.log(config.temperature_max), -math.log(config.temperature_min)
            scalars[LOG_SCALE] = backend.xp.asarray(backend.xp.clip(scalars[LOG_SCALE], low, high))
        return StepState({name: new[name] for name in state.parameters}, optimizer_state, scalars)

    def step(state: StepState, batch: StepBatch) -> StepResult:
        # 1. Forward: unit-norm features of both encoders, and the pullback.
        image_features, text_features, pullback = model.encode(state.parameters, batch.images, batch.texts)
        # 2. Loss of the batch, and its gradient with respect to the features.
        temperature = _temperature(state, batch, config, backend.xp)
        batch = batch._replace(bias=state.scalars.get("bias"))
        result = objective(image_features, text_features, batch, temperature, config, backend.xp)
        # 3. Backward: from the features to the parameters.
        gradients = dict(pullback(result.image_gradient, result.text_gradient))
        # 4. Update of the parameters.
        new_state = updated(state, gradients, result, temperature, batch.learning_rate)
        return StepResult(
            state=new_state,
            log_inner_image=result.log_inner_image,
            log_inner_text=result.log_inner_text,
            loss=result.loss,
            surrogate=result.surrogate,
            temperature_gradient=None if batch.temperature is None else result.temperature_gradient,
        )

    return backend.compile(step)


def initial_scalars(config: TrainConfig) -> dict[str, float]:
    """Return the scalars of the loss that the optimiser of a run learns, with their values before the first step.

    Examples
    --------
    >>> initial_scalars(TrainConfig(data="digits", method="clip", backend="numpy"))
    {}
    >>> list(initial_scalars(TrainConfig(data="digits", method="siglip", backend="numpy")))
    ['log_scale', 'bias']
    """
    scalars = {LOG_SCALE: -math.log(config.temperature)} if config.temperature_scheme == LOG_SCALE else {}
    return scalars | ({"bias": config.bias} if METHODS[config.method].has_bias else {})


def with_scalars(parameters: Parameters, scalars: Parameters) -> dict[str, Array]:
    """Return all that the optimiser updates: the parameters of the encoders and the scalars of the loss, by name."""
    return {**parameters, **{SCALARS + name: scalar for name, scalar in scalars.items()}}


def _temperature(state: StepState, batch: StepBatch, config: TrainConfig, xp: Any) -> Any:
    """Return the temperature of a step: learned by the optimiser, learned in another way, or fixed."""
    if LOG_SCALE in state.scalars:
        return xp.asarray(xp.exp(-state.scalars[LOG_SCALE]))
    return config.temperature if batch.temperature is None else batch.temperature


def _scalar_gradient(name: str, result: ObjectiveResult, temperature: Any) -> Array:
    """Return the gradient of the surrogate with respect to a scalar of the loss."""
    if name == LOG_SCALE:
        # temperature = exp(-log_scale), so d(temperature) / d(log_scale) = -temperature.
        return -temperature * result.temperature_gradient
    assert result.bias_gradient is not None
    return result.bias_gradient
