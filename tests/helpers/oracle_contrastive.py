"""The problem that the tests of the oracle's contrastive step share."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from helpers.features import unit_rows

NEVER = -math.inf


def problem(seed: int = 0, b: int = 5, d: int = 4, r: int = 3) -> dict[str, Any]:
    """Features, reference features of another width, and states, some of them never visited."""
    rng = np.random.default_rng(seed)
    log_inner = rng.normal(size=(2, b))
    log_inner[0, 1] = log_inner[1, 3] = NEVER
    return {
        "image": unit_rows(rng, b, d),
        "text": unit_rows(rng, b, d),
        "reference": (unit_rows(rng, b, r), unit_rows(rng, b, r)),
        "log_inner": log_inner,
        "temperatures": (rng.uniform(0.2, 0.9, size=b), rng.uniform(0.2, 0.9, size=b)),
        "gammas": (rng.uniform(0.1, 0.9, size=b), rng.uniform(0.1, 0.9, size=b)),
    }


# Row 1 and column 4 have no negatives, other rows and columns have different numbers of them.
MASK = np.array(
    [
        [False, True, True, True, False],
        [False, True, False, False, False],
        [True, False, True, True, False],
        [True, True, True, False, False],
        [True, False, True, True, True],
    ]
)
# With the unit vectors as images, Z is the transpose of the text features; here exp(Z) is a table of whole numbers and
# the temperature 1, so exp(D_ij) = TABLE_ij / TABLE_ii for images and TABLE_ij / TABLE_jj for texts.
TABLE = np.array([[1.0, 2.0, 3.0], [4.0, 2.0, 8.0], [5.0, 1.0, 4.0]])
IMAGES, TEXTS = np.eye(3), np.log(TABLE).T
