"""The numbers of a learned temperature that a line of metrics.jsonl has."""

from __future__ import annotations

from typing import Any

import numpy as np

from drrho_core.backend import Backend
from drrho_core.state import Temperature


def temperature_figures(temperature: Temperature, gradient: Any, backend: Backend) -> dict[str, float]:
    """Return the numbers for a line of metrics: a learned temperature, and the gradient that changed its value."""
    if not temperature.learned:
        return {}
    state = temperature.state_dict()
    values = [np.ravel(backend.to_numpy(array)) for name, array in state.items() if name.startswith("temperature")]
    table = np.concatenate(values)
    figures = {"temperature": float(np.mean(table))}
    # Two tables of n temperatures are too long for a line of metrics; the line has their mean, minimum and maximum.
    if table.size > 1:
        figures |= {"smallest_temperature": float(np.min(table)), "largest_temperature": float(np.max(table))}
    # The sum over the samples of the batch is the gradient that a single temperature for all samples would get.
    sides = gradient if isinstance(gradient, tuple) else (gradient,)
    return figures | {"temperature_gradient": float(sum(np.sum(backend.to_numpy(side)) for side in sides))}
