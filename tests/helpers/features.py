"""Features like those that encoders return: rows of norm 1."""

from __future__ import annotations

import numpy as np


def unit_rows(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Draw an array of this shape whose rows, along the last axis, have norm 1."""
    rows = rng.normal(size=shape)
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)
