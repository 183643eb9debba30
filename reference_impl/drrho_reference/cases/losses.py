"""Test problems for InfoNCE, sigmoid, distillation and hinge losses, for sums of losses, and for anchor weights."""
# ruff: noqa: D401 - the docstring of a problem is the description of its case in the report

from __future__ import annotations

from typing import Any

import numpy as np

from drrho_reference.cases.draws import (
    BATCH,
    OTHER_WIDTH,
    SAMPLES,
    draw_batch,
    draw_pair_mask,
    draw_reference,
    draw_uneven_weights,
)
from drrho_reference.cases.problem import Problem, entering
from drrho_reference.contrastive import contrastive_step
from drrho_reference.losses import hinge_margin_loss, info_nce

PROBLEMS: list[Problem] = []
problem = entering(PROBLEMS)


@problem("info_nce")
def warm(rng: np.random.Generator) -> tuple[Any, ...]:
    """Temperature 0.5."""
    return draw_batch(rng)[:2], {"temperature": 0.5}


@problem("info_nce")
def cold(rng: np.random.Generator) -> tuple[Any, ...]:
    """Temperature 0.05."""
    return draw_batch(rng)[:2], {"temperature": 0.05}


@problem("info_nce")
def temperature_1e_4(rng: np.random.Generator) -> tuple[Any, ...]:
    """Logits that differ by tens of thousands."""
    return draw_batch(rng)[:2], {"temperature": 1e-4}


@problem("info_nce")
def anchor_weight(rng: np.random.Generator) -> tuple[Any, ...]:
    """One weight for the row and the column of each pair; one weight is 0."""
    return draw_batch(rng)[:2], {"temperature": 0.3, "anchor_weight": draw_uneven_weights(rng)}


@problem("info_nce")
def anchor_weight_of_each_side(rng: np.random.Generator) -> tuple[Any, ...]:
    """A weight for each row and a different weight for each column."""
    return draw_batch(rng)[:2], {"temperature": 0.3, "anchor_weight": tuple(rng.gamma(2.0, size=(2, BATCH)))}


@problem("info_nce")
def pair_mask(rng: np.random.Generator) -> tuple[Any, ...]:
    """Pairs that a mask leaves out of the denominators; image 1 and text 3 have no negatives and contribute 0."""
    return draw_batch(rng)[:2], {"temperature": 0.3, "pair_mask": draw_pair_mask(rng)}


@problem("info_nce")
def anchor_weight_and_pair_mask(rng: np.random.Generator) -> tuple[Any, ...]:
    """A weight for each row and a different weight for each column, and a mask, at temperature 0.05."""
    weights = tuple(rng.gamma(2.0, size=(2, BATCH)))
    return draw_batch(rng)[:2], {"temperature": 0.05, "anchor_weight": weights, "pair_mask": draw_pair_mask(rng)}


# Pair losses, and the anchor weights that are computed from pair losses.
@problem("pair_loss")
def ordinary_pairs(rng: np.random.Generator) -> tuple[Any, ...]:
    """Temperature 0.25."""
    return draw_batch(rng)[:2], {"temperature": 0.25}


@problem("pair_loss")
def cold_pairs(rng: np.random.Generator) -> tuple[Any, ...]:
    """Temperature 0.05."""
    return draw_batch(rng)[:2], {"temperature": 0.05}


@problem("pair_loss")
def masked_pairs(rng: np.random.Generator) -> tuple[Any, ...]:
    """Pairs that a mask leaves out of the means; image 1 and text 3 have no negatives, so their halves are 0."""
    return draw_batch(rng)[:2], {"temperature": 0.3, "pair_mask": draw_pair_mask(rng)}


@problem("reference_anchor_weight")
def default_sigmoid(rng: np.random.Generator) -> tuple[Any, ...]:
    """Pair losses around the threshold; the mean of the weights is 1."""
    return (3.0 * rng.normal(size=SAMPLES) - 1.0,), {}


@problem("reference_anchor_weight")
def steep_sigmoid(rng: np.random.Generator) -> tuple[Any, ...]:
    """A threshold above 0 and a steep step."""
    return (rng.normal(size=SAMPLES),), {"temperature": 0.125, "threshold": 0.25}


@problem("reference_anchor_weight")
def hopeless_pairs(rng: np.random.Generator) -> tuple[Any, ...]:
    """Losses of some thousands: each sigmoid underflows, but the ratios of the sigmoids do not."""
    return (4096.0 + rng.normal(size=SAMPLES),), {}


def _mixture(rng: np.random.Generator, right: int, wrong: int, spread: float) -> tuple[Any, ...]:
    """Return pair losses of right and wrong pairs, and those of 60 swapped pairs."""
    losses = [rng.normal(-2.0, spread, size=right), rng.normal(1.0, spread, size=wrong)]
    return (np.concatenate(losses), rng.normal(1.0, spread, size=60)), {}


@problem("posterior_anchor_weight")
def third_swapped(rng: np.random.Generator) -> tuple[Any, ...]:
    """24 right pairs and 12 wrong pairs."""
    return _mixture(rng, 24, 12, 1.0)


@problem("posterior_anchor_weight")
def most_swapped(rng: np.random.Generator) -> tuple[Any, ...]:
    """12 right pairs and 24 wrong pairs."""
    return _mixture(rng, 12, 24, 0.75)


# SigLIP: each pair is classified separately.
@problem("sigmoid_loss")
def scale_and_bias(rng: np.random.Generator) -> tuple[Any, ...]:
    """A scale of 6 and a bias of -2."""
    return draw_batch(rng)[:2], {"scale": 6.0, "bias": -2.0}


@problem("sigmoid_loss")
def scale_1000(rng: np.random.Generator) -> tuple[Any, ...]:
    """Logits whose exponentials overflow."""
    return draw_batch(rng)[:2], {"scale": 1000.0, "bias": -10.0}


@problem("sigmoid_loss")
def masked(rng: np.random.Generator) -> tuple[Any, ...]:
    """Pairs that a mask leaves out; pairs on the diagonal count whatever the mask holds there."""
    return draw_batch(rng)[:2], {"scale": 6.0, "bias": -2.0, "pair_mask": draw_pair_mask(rng)}


# Distillation: the reference model's softmax is the target.
@problem("distillation_loss")
def two_temperatures(rng: np.random.Generator) -> tuple[Any, ...]:
    """The reference model has narrower features and its own temperature."""
    options = {"temperature": 0.5, "reference_temperature": 0.25}
    return (*draw_batch(rng)[:2], *draw_reference(rng, OTHER_WIDTH)), options


@problem("distillation_loss")
def two_cold_temperatures(rng: np.random.Generator) -> tuple[Any, ...]:
    """Temperatures of 1e-3: logits that differ by thousands."""
    options = {"temperature": 1e-3, "reference_temperature": 2e-3}
    return (*draw_batch(rng)[:2], *draw_reference(rng, OTHER_WIDTH)), options


# Hinge: pairs inside and outside the margin.
@problem("hinge_margin_loss")
def margin(rng: np.random.Generator) -> tuple[Any, ...]:
    """Some pairs are inside the margin, some are beyond it."""
    return draw_batch(rng)[:2], {"margin": 0.25}


@problem("hinge_margin_loss")
def _masked(rng: np.random.Generator) -> tuple[Any, ...]:
    """Means over the negatives that a mask selects; image 1 and text 3 have no negatives and contribute 0."""
    return draw_batch(rng)[:2], {"margin": 0.75, "pair_mask": draw_pair_mask(rng)}


@problem("weighted_sum")
def three_terms(rng: np.random.Generator) -> tuple[Any, ...]:
    """A step with a temperature per anchor, InfoNCE and hinge; each term keeps its parameter gradients apart."""
    image, text, *states = draw_batch(rng)
    step = contrastive_step(image, text, *states, temperature=tuple(rng.uniform(0.2, 0.8, size=(2, BATCH))))
    clip, hinge = info_nce(image, text, temperature=0.5), hinge_margin_loss(image, text, margin=0.25)
    return tuple((weight, _arrays(term)) for weight, term in ((0.75, step), (-0.5, clip), (2.0, hinge))), {}


def _arrays(result: Any) -> Any:
    """Return a result with all fields as arrays, for use as an argument of ``weighted_sum``."""
    if isinstance(result, tuple):
        parts = [_arrays(part) for part in result]
        return type(result)(*parts) if hasattr(result, "_fields") else tuple(parts)
    return np.asarray(result, dtype=np.float64)
