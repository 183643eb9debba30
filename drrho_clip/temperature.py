"""The temperature of a run: fixed, one learned number, or one learned number per sample and direction.

The training loop treats all three alike. It asks for the temperature of a batch and, after the step, hands in the
gradient with respect to that temperature. `TEMPERATURES` is the table of the schemes. Shapes: batch b.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from drrho_clip.config import TrainConfig
from drrho_core import GlobalTemperature, PerSampleTemperature
from drrho_core._array_api import Array
from drrho_core.backend import Backend


class FixedTemperature:
    """The temperature of the settings, which the step knows. The learned temperatures replace these methods.

    Parameters
    ----------
    config : TrainConfig
        Start, bounds and learning rate.
    _ : int
        Number of training pairs, for the temperatures per sample.
    backend : Backend
        The home of the arrays.
    """

    def __init__(self, config: TrainConfig, _: int, backend: Backend) -> None:
        self._backend = backend
        self._learning_rate = config.temperature_learning_rate

    def of_batch(self, _: Array, /) -> Array | tuple[Array, Array] | None:
        """Return the temperature of the samples of `index`: arrays () or (b,), or None for the fixed one."""
        return None

    def update(self, index: Array, gradient: Any, /) -> None:
        """Learn from the gradient with respect to the result of `of_batch`."""

    def figures(self, _: Any, /) -> dict[str, float]:
        """Return the numbers for a line of metrics.jsonl: the temperature now, and the gradient that moved it last."""
        return {}

    def state_dict(self) -> Mapping[str, Array]:
        """Return the arrays for a checkpoint."""
        return {}

    def load_state_dict(self, state: Mapping[str, Array], /) -> None:
        """Take over the arrays of a checkpoint; TypeError or ValueError if they do not fit."""


class OneLearnedTemperature(FixedTemperature):
    """One temperature for all samples, learned with Adam."""

    def __init__(self, config: TrainConfig, num_samples: int, backend: Backend) -> None:
        super().__init__(config, num_samples, backend)
        # The temperature is clipped to these bounds after each step.
        bounds = {"minimum": config.temperature_min, "maximum": config.temperature_max}
        self._state = GlobalTemperature(config.temperature, like=backend.asarray(np.zeros(1)), **bounds)

    def of_batch(self, _: Array, /) -> Array:
        """Return the temperature, ()."""
        return self._state.temperature

    def update(self, _: Array, gradient: Any, /) -> None:
        """Take a step of Adam."""
        self._state = self._state.update(gradient, learning_rate=self._learning_rate)

    def figures(self, gradient: Any, /) -> dict[str, float]:
        """Return the temperature after the update, and the gradient."""
        return {"temperature": float(self._state.temperature), "temperature_gradient": float(gradient)}

    def state_dict(self) -> Mapping[str, Array]:
        """Return the arrays for a checkpoint."""
        return self._state.state_dict()

    def load_state_dict(self, state: Mapping[str, Array], /) -> None:
        """Take over the arrays of a checkpoint."""
        self._state.load_state_dict(state)


class LearnedTemperaturePerSample(FixedTemperature):
    """One temperature per sample and direction, learned by gradient steps with momentum at each visit."""

    def __init__(self, config: TrainConfig, num_samples: int, backend: Backend) -> None:
        super().__init__(config, num_samples, backend)
        bounds = {"minimum": config.temperature_min, "maximum": config.temperature_max}
        like = backend.asarray(np.zeros(1))
        self._state = PerSampleTemperature(num_samples, config.temperature, like=like, **bounds)

    def of_batch(self, index: Array, /) -> tuple[Array, Array]:
        """Return the temperatures of the batch for images and for texts, (b,) each."""
        return self._state.gather(index)

    def update(self, index: Array, gradient: Any, /) -> None:
        """Move the temperatures of the batch; all others stay."""
        self._state = self._state.update(index, gradient, learning_rate=self._learning_rate)

    def figures(self, gradient: Any, /) -> dict[str, float]:
        """Return mean, minimum and maximum over all samples and directions, and the gradient."""
        # A line of metrics.jsonl has room for three numbers, not for two tables of n samples.
        state, to_numpy = self._state.state_dict(), self._backend.to_numpy
        tables = [to_numpy(state[f"temperature_{side}"]) for side in ("image", "text")]
        return {
            "temperature": float(np.mean(tables)),
            "smallest_temperature": float(np.min(tables)),
            "largest_temperature": float(np.max(tables)),
            # The sum over the anchors of the batch is the gradient that one temperature for all would get.
            "temperature_gradient": float(sum(np.sum(to_numpy(side)) for side in gradient)),
        }

    def state_dict(self) -> Mapping[str, Array]:
        """Return the arrays for a checkpoint."""
        return self._state.state_dict()

    def load_state_dict(self, state: Mapping[str, Array], /) -> None:
        """Take over the arrays of a checkpoint."""
        self._state.load_state_dict(state)


# A new scheme needs a class above, a line here and a word in the rule of `TrainConfig.temperature_scheme`.
TEMPERATURES: dict[str, Callable[[TrainConfig, int, Backend], FixedTemperature]] = {
    "fixed": FixedTemperature,
    "global": OneLearnedTemperature,
    "per_sample": LearnedTemperaturePerSample,
}
"""Builders by the setting ``temperature_scheme``."""
