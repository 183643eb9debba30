"""Problems of the two contrastive steps: each option alone, then all options at once.

Most problems are entered for ``contrastive_step`` and for ``unimodal_contrastive_step``, which have one signature. Only
``pair_mask`` belongs to ``contrastive_step`` alone.
"""
# ruff: noqa: D401 - a problem's docstring is the sentence of the case in the report

from __future__ import annotations

from typing import Any

import numpy as np

from drrho_reference.cases.draws import (
    BATCH,
    OTHER_WIDTH,
    STEPS,
    WIDTH,
    draw_batch,
    draw_pair_mask,
    draw_reference,
    draw_uneven_weights,
)
from drrho_reference.cases.problem import Problem, entering

PROBLEMS: list[Problem] = []
problem = entering(PROBLEMS)


# Temperatures and the reference model, without a memory: the states are fresh and gamma is 1.


@problem(*STEPS)
def plain(rng: np.random.Generator) -> tuple[Any, ...]:
    """No memory and no reference model: the mini-batch loss."""
    return draw_batch(rng), {"temperature": 0.25}


@problem(*STEPS)
def cold(rng: np.random.Generator) -> tuple[Any, ...]:
    """Temperature 0.05, as trained models have it."""
    return draw_batch(rng), {"temperature": 0.05}


@problem(*STEPS)
def reference(rng: np.random.Generator) -> tuple[Any, ...]:
    """A reference model's features of the same width."""
    return draw_batch(rng), {"temperature": 0.3, "reference_features": draw_reference(rng, WIDTH)}


@problem(*STEPS)
def reference_of_another_width(rng: np.random.Generator) -> tuple[Any, ...]:
    """A reference model's features are narrower than the learner's."""
    return draw_batch(rng), {"temperature": 0.3, "reference_features": draw_reference(rng, OTHER_WIDTH)}


@problem(*STEPS)
def reference_weight(rng: np.random.Generator) -> tuple[Any, ...]:
    """A reference weight above 1."""
    options = {"temperature": 0.4, "reference_features": draw_reference(rng, OTHER_WIDTH), "reference_weight": 1.5}
    return draw_batch(rng), options


# The moving average log u: its floor eps, its weight gamma, first visits, and the radius beside log(eps + u).


@problem(*STEPS)
def eps(rng: np.random.Generator) -> tuple[Any, ...]:
    """An eps large enough to be seen wherever it is put; the state is stored without it."""
    return draw_batch(rng, visited=True), {"temperature": 0.3, "gamma": 0.6, "eps": 0.25}


@problem(*STEPS)
def gamma(rng: np.random.Generator) -> tuple[Any, ...]:
    """One gamma below 1, with first visits among the anchors."""
    return draw_batch(rng, visited=True), {"temperature": 0.5, "gamma": 0.2}


@problem(*STEPS)
def gamma_per_anchor(rng: np.random.Generator) -> tuple[Any, ...]:
    """A gamma per anchor, with first visits among the anchors."""
    return draw_batch(rng, visited=True), {"temperature": 0.5, "gamma": tuple(rng.uniform(0.1, 1.0, size=(2, BATCH)))}


@problem(*STEPS)
def radius(rng: np.random.Generator) -> tuple[Any, ...]:
    """A radius, as learned temperatures need it."""
    return draw_batch(rng, visited=True), {"temperature": 0.5, "gamma": 0.7, "radius": 0.75}


@problem(*STEPS)
def temperature_per_anchor(rng: np.random.Generator) -> tuple[Any, ...]:
    """A temperature per anchor and a gradient for each."""
    temperature = tuple(rng.uniform(0.15, 1.0, size=(2, BATCH)))
    return draw_batch(rng, visited=True), {"temperature": temperature, "gamma": 0.7, "radius": 0.5}


# Geometry: positives at the largest and the smallest similarity, and features that are all equal.


@problem(*STEPS)
def aligned(rng: np.random.Generator) -> tuple[Any, ...]:
    """Both sides are equal, as in a model that has learned everything."""
    image, _, *states = draw_batch(rng)
    return (image, image.copy(), *states), {"temperature": 0.05}


@problem(*STEPS)
def opposite(rng: np.random.Generator) -> tuple[Any, ...]:
    """Every positive is opposite to its anchor."""
    image, _, *states = draw_batch(rng)
    return (image, -image, *states), {"temperature": 0.05}


@problem(*STEPS)
def collapsed(rng: np.random.Generator) -> tuple[Any, ...]:
    """All features are equal: every exponent is 0."""
    image, _, *states = draw_batch(rng, visited=True)
    same = np.tile(image[:1], (BATCH, 1))
    return (same, same.copy(), *states), {"temperature": 0.05, "gamma": 0.5}


# Masks, and all options at once.


@problem("contrastive_step")
def pair_mask(rng: np.random.Generator) -> tuple[Any, ...]:
    """Pairs that are no negatives; image 1 and text 3 have none left and keep their state."""
    mask = rng.uniform(size=(BATCH, BATCH)) < 0.7
    mask[:, 3] = mask[1, :] = False
    mask[0, 1] = mask[2, 0] = mask[3, 2] = mask[4, 0] = True
    return draw_batch(rng, visited=True), {"temperature": 0.3, "gamma": 0.5, "radius": 0.25, "pair_mask": mask}


@problem(*STEPS)
def all_options(rng: np.random.Generator) -> tuple[Any, ...]:
    """All options that both steps have, at once."""
    options = {
        "temperature": tuple(rng.uniform(0.2, 0.8, size=(2, BATCH))),
        "gamma": tuple(rng.uniform(0.1, 1.0, size=(2, BATCH))),
        "reference_features": draw_reference(rng, OTHER_WIDTH),
        "reference_weight": 0.5,
        "radius": 0.25,
        "eps": 0.125,
    }
    return draw_batch(rng, visited=True), options


@problem("contrastive_step")
def everything(rng: np.random.Generator) -> tuple[Any, ...]:
    """All options at once, a mask too."""
    options = {
        "temperature": tuple(rng.uniform(0.2, 0.8, size=(2, BATCH))),
        "gamma": tuple(rng.uniform(0.1, 1.0, size=(2, BATCH))),
        "reference_features": draw_reference(rng, OTHER_WIDTH),
        "reference_weight": 0.5,
        "radius": 0.25,
        "eps": 0.125,
        # An asymmetric pattern: no row equals the column of the same number.
        "pair_mask": np.arange(BATCH * BATCH).reshape(BATCH, BATCH) % 7 != 3,
    }
    return draw_batch(rng, visited=True), options


# Weights of anchors: a weight of 0 removes an anchor from the objective, but not from the negatives of the others.


@problem(*STEPS)
def anchor_weight(rng: np.random.Generator) -> tuple[Any, ...]:
    """One weight per pair of anchors; one weight is 0."""
    options = {"temperature": 0.3, "gamma": 0.5, "radius": 0.25, "anchor_weight": draw_uneven_weights(rng)}
    return draw_batch(rng, visited=True), options


@problem(*STEPS)
def anchor_weight_of_each_side(rng: np.random.Generator) -> tuple[Any, ...]:
    """A weight per anchor and side, beside a temperature per anchor."""
    temperature = tuple(rng.uniform(0.2, 0.8, size=(2, BATCH)))
    weight = tuple(rng.gamma(2.0, size=(2, BATCH)))
    return draw_batch(rng, visited=True), {"temperature": temperature, "gamma": 0.5, "anchor_weight": weight}


@problem(*STEPS)
def one_anchor(rng: np.random.Generator) -> tuple[Any, ...]:
    """Anchor 1 of the first side counts alone; the states of all others are updated all the same."""
    options = {"temperature": 0.5, "gamma": 0.5, "anchor_weight": (np.eye(BATCH)[1], np.zeros(BATCH))}
    return draw_batch(rng, visited=True), options


@problem("contrastive_step")
def anchor_weight_and_pair_mask(rng: np.random.Generator) -> tuple[Any, ...]:
    """A weight per anchor beside a mask, a reference model and a floor, in tiles of two rows."""
    options = {
        "temperature": 0.3,
        "gamma": 0.5,
        "eps": 0.125,
        "reference_features": draw_reference(rng, OTHER_WIDTH),
        "pair_mask": draw_pair_mask(rng),
        "anchor_weight": tuple(rng.gamma(2.0, size=(2, BATCH))),
    }
    return draw_batch(rng, visited=True), options, {"tile_size": 2}


@problem(*STEPS)
def tiles(rng: np.random.Generator) -> tuple[Any, ...]:
    """Computed in tiles of two rows: the same numbers."""
    options = {"temperature": 0.3, "gamma": 0.5, "reference_features": draw_reference(rng, OTHER_WIDTH)}
    return draw_batch(rng, visited=True), options, {"tile_size": 2}
