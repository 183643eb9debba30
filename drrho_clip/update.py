"""The update of a step: from the gradient of the loss to new parameters, with clipping, loss scale and moving average.

The *scalars* are parameters of the loss that the optimiser learns together with the parameters of the encoders:
`log_scale`, the logarithm of 1 / temperature, and `bias`, the bias of the sigmoid loss. Most methods have none. The
*average* is an exponential moving average of the parameters of the encoders, which is then evaluated and exported in
their place. The *loss scale* multiplies the gradient of the features before it passes encoders in fp16, so that small
gradients do not become 0. If a gradient overflows, the update is left out and the scale is halved.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from drrho_clip.config import TrainConfig
from drrho_clip.constants import FULL
from drrho_clip.errors import BadInput
from drrho_clip.methods import LOG_SCALE, METHODS
from drrho_core.backend import Backend, Optimizer, Parameters
from drrho_core.checks import Array, Namespace

_FIRST_LOSS_SCALE = 2.0**16
_SMALLEST_LOSS_SCALE = 1.0
# Overflows in a row after which a run stops: by then the loss scale has fallen to the smallest.
_OVERFLOWS = 40
# Overflows in a row after which a run warns: 16 of them halve the first scale to 1.
_WARN_AT = 20
# Number of updates in a row without overflow after which the scale is doubled.
_PATIENCE = 2000
_SCALARS = "scalars/"


class StepState(NamedTuple):
    """The arrays that every step replaces; a mapping is empty if the settings do not ask for it."""

    parameters: Parameters
    optimizer: Parameters
    scalars: Parameters
    average: Parameters
    loss_scale: Parameters

    @property
    def evaluated(self) -> Parameters:
        """The parameters that are evaluated and exported: the moving average if the run keeps an average."""
        return self.average or self.parameters


def initial_state(backend: Backend, optimizer: Optimizer, config: TrainConfig, start: Mapping[str, Any]) -> StepState:
    """Return the state before the first step; `start` holds the parameters of the encoders as NumPy arrays."""
    parameters = {name: backend.asarray(array) for name, array in start.items()}
    scalars = {name: _scalar(backend, value) for name, value in initial_scalars(config).items()}
    scale = {"scale": _scalar(backend, _FIRST_LOSS_SCALE), "updates": _scalar(backend, 0.0)}
    return StepState(
        parameters=parameters,
        optimizer=optimizer.init(_with_scalars(parameters, scalars)),
        scalars=scalars,
        average={name: backend.asarray(array) for name, array in start.items()} if config.ema > 0 else {},
        loss_scale=scale if config.precision == "fp16" else {},
    )


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


def build_update(
    backend: Backend, optimizer: Optimizer, config: TrainConfig
) -> Callable[[StepState, Parameters, Parameters, float | Array], StepState]:
    """Return ``update(state, gradients, scalar_gradients, learning_rate) -> new state``.

    `gradients` are those of the encoders, multiplied by the loss scale if the state has one.
    """
    xp = backend.xp

    def update(
        state: StepState, gradients: Parameters, scalar_gradients: Parameters, learning_rate: float | Array
    ) -> StepState:
        loss_scale: Parameters = {}
        if state.loss_scale:
            gradients = {name: gradient / state.loss_scale["scale"] for name, gradient in gradients.items()}
            overflow = not _all_finite(gradients, xp)
            loss_scale = _next_loss_scale(state.loss_scale, overflow, xp)
            if overflow:
                return state._replace(loss_scale=loss_scale)
        # The optimiser sees the scalars of the loss as further parameters, which do not decay, as they have no axes.
        everything = state.parameters
        if state.scalars:
            gradients = _with_scalars(gradients, scalar_gradients)
            everything = _with_scalars(everything, state.scalars)
        if config.clip_norm > 0:
            gradients = clipped(gradients, config.clip_norm, xp)
        new, optimizer_state = optimizer.update(everything, gradients, state.optimizer, learning_rate)
        parameters = {name: new[name] for name in state.parameters}
        average = _next_average(state.average, parameters, optimizer_state["step"], config.ema, xp)
        scalars = {name: new[_SCALARS + name] for name in state.scalars}
        if scalars:
            scalars = _within_bounds(scalars, config, xp)
        return StepState(parameters, optimizer_state, scalars, average, loss_scale)

    return update


def check_overflows(loss_scale: Parameters, backend: Backend) -> str | None:
    """Return a warning if the update was left out at half as many steps in a row as stop a run, else None.

    Raises
    ------
    BadInput
        If the update was left out at many steps in a row, by which the loss scale has fallen to the smallest.

    Examples
    --------
    >>> from drrho_core.backend import get_backend
    >>> loss_scale = {"scale": np.asarray(2.0), "updates": np.asarray(-15.0)}
    >>> check_overflows(loss_scale, get_backend("numpy"))
    """
    if not loss_scale:
        return None
    scale, updates = (float(backend.to_numpy(loss_scale[name])) for name in ("scale", "updates"))
    skipped = f"the gradient overflowed in fp16 at the last {-updates:.0f} steps, which changed no parameter"
    if updates <= -_OVERFLOWS and scale <= _SMALLEST_LOSS_SCALE:
        raise BadInput(
            f"precision must be bf16 or {FULL} for this run, got 'fp16': {skipped}, even with the smallest loss scale "
            f"{scale:g}; a lower learning_rate or a higher temperature may help as well"
        )
    return f"{skipped}; the run stops after {_OVERFLOWS} such steps in a row" if updates == -_WARN_AT else None


def clipped(gradients: Parameters, largest_norm: float, xp: Namespace) -> dict[str, Array]:
    """Return the gradients, divided by a common factor if the norm of all of them together exceeds `largest_norm`.

    Examples
    --------
    >>> import numpy as np
    >>> clipped({"a": np.asarray([3.0]), "b": np.asarray([4.0])}, 1.0, np)
    {'a': array([0.6]), 'b': array([0.8])}
    """
    norm = xp.sqrt(sum(xp.sum(gradient * gradient) for gradient in gradients.values()))
    factor = largest_norm / xp.clip(norm, min=largest_norm)
    return {name: xp.asarray(factor * gradient) for name, gradient in gradients.items()}


def _next_average(average: Parameters, parameters: Parameters, step: Array, ema: float, xp: Namespace) -> Parameters:
    """Return the moving average of the parameters after an update, the optimiser's update number `step` (from 1).

    The weight of the old value rises to `ema` in a warm-up, because the average would otherwise stay close to the
    random start for about ``1 / (1 - ema)`` updates.
    """
    updated: dict[str, Array] = {}
    for name, old in average.items():
        k = xp.astype(step, old.dtype)
        weight = xp.clip((1 + k) / (10 + k), max=ema)
        updated[name] = xp.asarray(weight * old + (1 - weight) * parameters[name])
    return updated


def _with_scalars(parameters: Parameters, scalars: Parameters) -> dict[str, Array]:
    """Return all that the optimiser updates: the parameters of the encoders and the scalars of the loss, by name."""
    return {**parameters, **{_SCALARS + name: scalar for name, scalar in scalars.items()}}


def _within_bounds(scalars: dict[str, Array], config: TrainConfig, xp: Namespace) -> dict[str, Array]:
    """Return the scalars with a learned temperature within its bounds, as in CLIP."""
    if LOG_SCALE in scalars:
        low, high = -math.log(config.temperature_max), -math.log(config.temperature_min)
        scalars[LOG_SCALE] = xp.asarray(xp.clip(scalars[LOG_SCALE], low, high))
    return scalars


def _next_loss_scale(loss_scale: Parameters, overflow: bool, xp: Namespace) -> dict[str, Array]:
    """Return the loss scale after an update: halved by an overflow, doubled after many updates without overflow.

    `updates` is the number of updates in a row without overflow, or minus the number of overflows in a row.
    """
    scale, updates = loss_scale["scale"], loss_scale["updates"]
    if overflow:
        smaller = xp.clip(scale / 2, min=_SMALLEST_LOSS_SCALE)
        return {"scale": xp.asarray(smaller), "updates": xp.asarray(xp.clip(updates, max=0.0) - 1)}
    updates = xp.clip(updates, min=0.0) + 1
    doubles = updates >= _PATIENCE
    return {"scale": xp.where(doubles, 2 * scale, scale), "updates": xp.where(doubles, updates * 0, updates)}


def _all_finite(gradients: Parameters, xp: Namespace) -> bool:
    """Return whether all gradients are finite; this waits for the device, as every loss scale must."""
    return all(bool(xp.all(xp.isfinite(gradient))) for gradient in gradients.values())


def _scalar(backend: Backend, value: float) -> Array:
    return backend.asarray(np.asarray(value))
