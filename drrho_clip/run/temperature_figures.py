"""The learned temperature of a run: its numbers for metrics.jsonl, and the temperature of a state's pair losses.

The pair loss of `drrho_clip.reference.memorisation` divides by a temperature, which should be that with which the
model was trained: training spreads the similarities until they suit this temperature, and the numbers of the rule there
were measured in this way. So the temperature is `temperature` of config.json if it is fixed, and the learned value at
the step of the state otherwise. Of temperatures per sample the mean is used. All pairs need the same temperature,
because their losses are compared with each other, and a held-out pair has no temperature of its own.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from drrho_clip.files.checkpoint import load_arrays, load_state
from drrho_clip.methods import LOG_SCALE
from drrho_clip.processes.protocol import Processes
from drrho_clip.run import Run, part
from drrho_clip.run.checkpoint_state import BIAS, TEMPERATURE
from drrho_core.backend import Backend, Parameters
from drrho_core.state import PerSampleTemperature, Temperature

__all__ = ["learned_bias_of", "mean_temperature", "scalar_figures", "temperature_figures", "temperature_of"]


def mean_temperature(
    temperature: Temperature, scalars: Parameters, backend: Backend, processes: Processes
) -> float | None:
    """Return a learned temperature, or the mean of learned temperatures per sample; None if it is fixed.

    `scalars` are the scalars of the loss that the optimiser learns; one may be the logarithm of 1 / temperature. All
    `processes` call this function, because they may have divided the temperatures of the samples among themselves.
    """
    if LOG_SCALE in scalars:
        return scalar_figures(scalars, backend)["temperature"]
    return _spread(temperature, backend, processes).mean if temperature.learned else None


def scalar_figures(scalars: Parameters, backend: Backend) -> dict[str, float]:
    """Return the numbers for a line of metrics: the scalars of the loss, with the temperature in place of its log."""
    figures = {name: float(backend.to_numpy(scalar)) for name, scalar in scalars.items()}
    return {
        "temperature" if name == LOG_SCALE else name: math.exp(-value) if name == LOG_SCALE else value
        for name, value in figures.items()
    }


def temperature_figures(
    temperature: Temperature, gradient: Any, backend: Backend, processes: Processes
) -> dict[str, float]:
    """Return the numbers for a line of metrics: a learned temperature, and the gradient that changed its value.

    All `processes` call this function. `gradient` has the own rows if the processes have divided the temperatures.
    """
    if not temperature.learned:
        return {}
    spread = _spread(temperature, backend, processes)
    figures = {"temperature": spread.mean}
    # Two tables of n temperatures are too long for a line of metrics; the line has their mean, minimum and maximum.
    if spread.number > 1:
        figures |= {"smallest_temperature": spread.smallest, "largest_temperature": spread.largest}
    # The sum over the samples of the batch is the gradient that a single temperature for all samples would get.
    sides = gradient if isinstance(gradient, tuple) else (gradient,)
    total = float(sum(np.sum(backend.to_numpy(side)) for side in sides))
    if _is_divided(temperature):
        total = sum(processes.gather(total))
    return figures | {"temperature_gradient": total}


def temperature_of(run: Run, state: str) -> float:
    """Return the temperature for the pair losses of a state of a run: "best", "last" or "reference".

    Raises
    ------
    BadInput
        If the file of the state is missing or damaged.
    """
    file = run.state_file(run.chosen_state(state))
    # A run of version 0.1 did not write a learned temperature beside the parameters; its start value is used.
    temperature = load_state(file, "checkpoint").get("temperature", run.config.temperature)
    TEMPERATURE.check(f"{file}: temperature", temperature)
    return float(temperature)


def learned_bias_of(run: Run, state: str) -> float | None:
    """Return the bias that the method siglip has learned up to a state of a run; None if the run learns no bias.

    Raises
    ------
    BadInput
        If the file of the state, or the last checkpoint, is missing or damaged.
    """
    file = run.state_file(run.chosen_state(state))
    bias = load_state(file, "checkpoint").get("bias")
    # A run of version 0.2 or earlier did not write the bias beside the parameters of a kept state.
    if bias is None:
        scalar = part(load_arrays(run.checkpoint, "checkpoint")[0], "scalars").get("bias")
        return None if scalar is None else float(scalar)
    BIAS.check(f"{file}: bias", bias)
    return float(bias)


class _Spread(NamedTuple):
    """The mean, the smallest and the largest of the learned temperatures, and their number."""

    mean: float
    smallest: float
    largest: float
    number: int


def _spread(temperature: Temperature, backend: Backend, processes: Processes) -> _Spread:
    """Return mean, minimum and maximum of the learned temperatures of all processes."""
    table = _values(temperature, backend)
    if not _is_divided(temperature):
        return _Spread(float(np.mean(table)), float(np.min(table)), float(np.max(table)), table.size)
    # The last processes may store no sample at all.
    own = float(np.sum(table)), float(np.min(table, initial=math.inf)), float(np.max(table, initial=0.0)), table.size
    sums, smallest, largest, counts = zip(*processes.gather(own), strict=True)
    return _Spread(sum(sums) / sum(counts), min(smallest), max(largest), sum(counts))


def _is_divided(temperature: Temperature) -> bool:
    """Return whether processes have divided the temperatures of the samples among themselves."""
    return isinstance(temperature, PerSampleTemperature) and temperature.table.num_ranks > 1


def _values(temperature: Temperature, backend: Backend) -> np.ndarray:
    """Return the learned temperatures as one array: a single number, or those of all samples and both directions."""
    state = temperature.state_dict()
    return np.concatenate(
        [np.ravel(backend.to_numpy(array)) for name, array in state.items() if name.startswith("temperature")]
    )
