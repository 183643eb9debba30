"""Temperatures that the tests of several files share."""

from __future__ import annotations

from typing import Any

import numpy as np

from drrho_core import (
    PerSampleTemperature,
)

ROWS = ("temperature_image", "temperature_text", "momentum_image", "momentum_text")


def made(space: Any, n: int = 7, **options: Any) -> PerSampleTemperature:
    """Return temperatures whose rows all differ, after a batch of three samples."""
    learned = PerSampleTemperature(n, 0.07, like=space.asarray(np.zeros(1)), **options)
    gradient = space.asarray(np.array([0.1, -0.2, 0.3])), space.asarray(np.array([-0.4, 0.5, -0.6]))
    return learned.update(space.asarray(np.array([5, 0, 2])), gradient, learning_rate=0.01)


def tables(space: Any, learned: PerSampleTemperature) -> dict[str, list[float]]:
    return {name: space.to_numpy(getattr(learned, name)).tolist() for name in ROWS}
