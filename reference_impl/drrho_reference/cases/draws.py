"""Inputs that several subjects share: small, seeded, asymmetric.

Inputs are always asymmetric, because on a symmetric matrix a formula with rows and columns exchanged gives the same
number.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from drrho_reference._checks import FloatArray
from drrho_reference.cases.problem import SetOf

# Few shapes are used, and one call solves many problems, because some libraries compile for every shape.
BATCH, WIDTH, OTHER_WIDTH = 5, 4, 3
SAMPLES, SLICES = 6, 7

# log u of a sample that was never visited: u = 0.
NEVER = -np.inf

# The two contrastive steps, which share all problems except those with pair_mask, and the names of their two sides.
STEPS = ("contrastive_step", "unimodal_contrastive_step")
SIDES = {"contrastive_step": ("image", "text"), "unimodal_contrastive_step": ("view1", "view2")}

SETS = (
    SetOf("CVaR", {"alpha": 0.375}),
    SetOf("KLPenalty", {"temperature": 0.75}),
    SetOf("KLBall", {"radius": 0.25}),
    SetOf("ChiSquarePenalty", {"strength": 0.75}),
    SetOf("ChiSquareBall", {"radius": 0.375}),
    SetOf("CressieReadBall", {"order": 3.0, "radius": 0.25}),
    SetOf("CappedKLPenalty", {"temperature": 0.75, "alpha": 0.375}),
)

SET_NAMES = tuple(ambiguity_set.name for ambiguity_set in SETS)

# One mask per slice of losses; the masks leave different numbers of losses.
MASKS = {
    "four": (1, 0, 1, 1, 0, 1),
    "one": (0, 0, 0, 1, 0, 0),
    "all": (1, 1, 1, 1, 1, 1),
    "five": (1, 1, 1, 0, 1, 1),
    "first two": (1, 1, 0, 0, 0, 0),
    "last": (0, 0, 0, 0, 0, 1),
    "three": (0, 1, 0, 1, 1, 0),
}


def mask_table() -> Any:
    """Return the masks as an array (SLICES, SAMPLES) of bool."""
    return np.array([*MASKS.values()], dtype=bool)


def draw_losses(rng: np.random.Generator) -> FloatArray:
    """Draw losses (SLICES, SAMPLES), positive and skewed."""
    return rng.gamma(2.0, size=(SLICES, SAMPLES))


def unit_rows(rng: np.random.Generator, width: int) -> FloatArray:
    """Draw features (BATCH, width) whose rows have norm 1."""
    features = rng.normal(size=(BATCH, width))
    return np.asarray(features / np.linalg.norm(features, axis=1, keepdims=True), dtype=np.float64)


def draw_batch(rng: np.random.Generator, *, visited: bool = False) -> tuple[FloatArray, ...]:
    """Draw two sides of features and the log estimates of both sides.

    If ``visited`` is true, two image anchors and one text anchor were never visited (-inf), and all others were.
    """
    states = np.full((2, BATCH), NEVER)
    if visited:
        states = np.where(rng.permuted([[0, 0, 1, 1, 1], [0, 1, 1, 1, 1]], axis=1), rng.normal(size=(2, BATCH)), NEVER)
    return unit_rows(rng, WIDTH), unit_rows(rng, WIDTH), *states


def draw_reference(rng: np.random.Generator, width: int) -> tuple[FloatArray, FloatArray]:
    """Draw both sides of a reference model's features."""
    return unit_rows(rng, width), unit_rows(rng, width)


def draw_uneven_weights(rng: np.random.Generator) -> FloatArray:
    """Draw one weight per anchor; the weight of anchor 3 is 0."""
    return np.where(np.arange(BATCH) == 3, 0.0, rng.gamma(2.0, size=BATCH))


def draw_pair_mask(rng: np.random.Generator) -> Any:
    """Draw an asymmetric mask (BATCH, BATCH) of negatives; image 1 and text 3 have no negatives."""
    mask = rng.uniform(size=(BATCH, BATCH)) < 0.6
    mask[:, 3] = mask[1, :] = False
    mask[0, 1] = mask[0, 2] = mask[2, 0] = mask[3, 2] = mask[4, 0] = True
    return mask


# ---------------------------------------------------------------------------------------------------------------------
# Large logits: features whose products are exact in float64
# ---------------------------------------------------------------------------------------------------------------------


def exact_rows(rng: Any, size: int, width: int, distance: float, norm: float = 1.0) -> FloatArray:
    """Draw rows of about the norm ``norm``; if ``distance`` is above 0, groups of three rows are neighbours.

    Neighbours are about ``distance`` times the norm apart. Entries are multiples of 2^-22 times the norm. A product of
    two such entries has at most 44 bits, so similarities are exact in float64.
    """
    rows = rng.normal(size=(size, width))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    if distance > 0.0:
        rows = rows[[i - i % 3 for i in range(size)]] + distance * rng.normal(size=(size, width))
    return np.asarray(norm * np.round(rows * 2.0**22) / 2.0**22, dtype=np.float64)


def near_tie(temperature: float) -> float:
    """Return the distance of neighbours: about one temperature, if float32 can represent such a difference.

    The logits of such neighbours differ by about 1, so that the neighbours share an anchor's weight, and rounding moves
    weight between them. Below t = 1e-6 no implementation can resolve near ties. Below this limit and above t = 1e-2
    the distance is 0, so that ``exact_rows`` draws no neighbours.
    """
    return temperature if 1e-6 <= temperature <= 1e-2 else 0.0


def equal_states(size: int, value: float = NEVER) -> tuple[FloatArray, FloatArray]:
    """Return equal log estimates for both sides; the default is -inf, the state of samples that were never visited."""
    return np.full(size, value), np.full(size, value)
