"""Problems for the two contrastive steps: each option alone, then all options at once.

Most problems are added for both ``contrastive_step`` and ``unimodal_contrastive_step``, which take the same arguments
except for ``pair_mask``, an option of ``contrastive_step`` only.
"""
# ruff: noqa: D401 - the docstring of a problem is the description of its case in the report

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


# Temperatures and the reference model. Gamma is 1, and no sample was visited before.


@problem(*STEPS)
def plain(rng: np.random.Generator) -> tuple[Any, ...]:
    """No old estimates and no reference model: the mini-batch loss."""
    return draw_batch(rng), {"temperature": 0.25}


@problem(*STEPS)
def cold(rng: np.random.Generator) -> tuple[Any, ...]:
    """Temperature 0.05, about the temperature of trained models."""
    return draw_batch(rng), {"temperature": 0.05}


@problem(*STEPS)
def reference(rng: np.random.Generator) -> tuple[Any, ...]:
    """A reference model whose features are as wide as those of the model that is trained."""
    return draw_batch(rng), {"temperature": 0.3, "reference_features": draw_reference(rng, WIDTH)}


@problem(*STEPS)
def reference_of_another_width(rng: np.random.Generator) -> tuple[Any, ...]:
    """A reference model whose features are narrower than those of the model that is trained."""
    return draw_batch(rng), {"temperature": 0.3, "reference_features": draw_reference(rng, OTHER_WIDTH)}


@problem(*STEPS)
def reference_weight(rng: np.random.Generator) -> tuple[Any, ...]:
    """A reference weight above 1."""
    options = {"temperature": 0.4, "reference_features": draw_reference(rng, OTHER_WIDTH), "reference_weight": 1.5}
    return draw_batch(rng), options


# The moving average u: the floor eps, the weight gamma, first visits, and the radius that is added to log(eps + u).


@problem(*STEPS)
def eps(rng: np.random.Generator) -> tuple[Any, ...]:
    """The eps is so large that a wrong use of eps shows in the results; the state log u does not contain eps."""
    return draw_batch(rng, visited=True), {"temperature": 0.3, "gamma": 0.6, "eps": 0.25}


@problem(*STEPS)
def gamma(rng: np.random.Generator) -> tuple[Any, ...]:
    """One gamma below 1 for all anchors; some anchors are visited for the first time."""
    return draw_batch(rng, visited=True), {"temperature": 0.5, "gamma": 0.2}


@problem(*STEPS)
def gamma_per_anchor(rng: np.random.Generator) -> tuple[Any, ...]:
    """A gamma per anchor; some anchors are visited for the first time."""
    return draw_batch(rng, visited=True), {"temperature": 0.5, "gamma": tuple(rng.uniform(0.1, 1.0, size=(2, BATCH)))}


@problem(*STEPS)
def radius(rng: np.random.Generator) -> tuple[Any, ...]:
    """A radius, as it is used with learned temperatures."""
    return draw_batch(rng, visited=True), {"temperature": 0.5, "gamma": 0.7, "radius": 0.75}


@problem(*STEPS)
def temperature_per_anchor(rng: np.random.Generator) -> tuple[Any, ...]:
    """A temperature per anchor, and a gradient for each temperature."""
    temperature = tuple(rng.uniform(0.15, 1.0, size=(2, BATCH)))
    return draw_batch(rng, visited=True), {"temperature": temperature, "gamma": 0.7, "radius": 0.5}


# Special features: positives of the largest and of the smallest similarity, and features that are all equal.


@problem(*STEPS)
def aligned(rng: np.random.Generator) -> tuple[Any, ...]:
    """The features of both sides are equal, as in a perfectly trained model."""
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
    """A mask of pairs that are no negatives; image 1 and text 3 have no negatives and keep their states."""
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
    """All options at once, with a mask."""
    options = {
        "temperature": tuple(rng.uniform(0.2, 0.8, size=(2, BATCH))),
        "gamma": tuple(rng.uniform(0.1, 1.0, size=(2, BATCH))),
        "reference_features": draw_reference(rng, OTHER_WIDTH),
        "reference_weight": 0.5,
        "radius": 0.25,
        "eps": 0.125,
        # The pattern is asymmetric: no row equals the column of the same number.
        "pair_mask": np.arange(BATCH * BATCH).reshape(BATCH, BATCH) % 7 != 3,
    }
    return draw_batch(rng, visited=True), options


# Weights of anchors: with a weight of 0 an anchor leaves the objective, but it remains a negative of other anchors.


@problem(*STEPS)
def anchor_weight(rng: np.random.Generator) -> tuple[Any, ...]:
    """One weight for both anchors of each pair; one weight is 0."""
    options = {"temperature": 0.3, "gamma": 0.5, "radius": 0.25, "anchor_weight": draw_uneven_weights(rng)}
    return draw_batch(rng, visited=True), options


@problem(*STEPS)
def anchor_weight_of_each_side(rng: np.random.Generator) -> tuple[Any, ...]:
    """A weight per anchor of each side, and a temperature per anchor."""
    temperature = tuple(rng.uniform(0.2, 0.8, size=(2, BATCH)))
    weight = tuple(rng.gamma(2.0, size=(2, BATCH)))
    return draw_batch(rng, visited=True), {"temperature": temperature, "gamma": 0.5, "anchor_weight": weight}


@problem(*STEPS)
def one_anchor(rng: np.random.Generator) -> tuple[Any, ...]:
    """Only anchor 1 of the first side has a weight above 0; the states of all anchors are updated nevertheless."""
    options = {"temperature": 0.5, "gamma": 0.5, "anchor_weight": (np.eye(BATCH)[1], np.zeros(BATCH))}
    return draw_batch(rng, visited=True), options


@problem("contrastive_step")
def anchor_weight_and_pair_mask(rng: np.random.Generator) -> tuple[Any, ...]:
    """A weight per anchor, a mask, a reference model and eps, computed in tiles of two rows."""
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
    """The step is computed in tiles of two rows, and the numbers must be the same as without tiles."""
    options = {"temperature": 0.3, "gamma": 0.5, "reference_features": draw_reference(rng, OTHER_WIDTH)}
    return draw_batch(rng, visited=True), options, {"tile_size": 2}
