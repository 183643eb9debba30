"""The conformance kit's problems: small, seeded, asymmetric; and what an error in each answer is measured against.

A problem is a function of a random generator that returns positional arguments and options in float64; its name is the
case's name and its docstring says what the case is about. ``conformance.py`` rounds them to a dtype, asks the oracle,
asks the implementation and compares. What the oracle's linear domain cannot hold is in ``_extremes.json``, inputs and
answers; ``reference_impl/recipes/extremes.py`` has worked them out with mpmath. ``_large_logits.py`` adds problems that
have a bound of their own.
"""
# ruff: noqa: D401 - a problem's docstring is the case's sentence in the report

from __future__ import annotations

import inspect
import json
import math
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import drrho_reference.ambiguity as sets
from drrho_reference._checks import FloatArray, anchor_weights
from drrho_reference.contrastive import (
    contrastive_step,
    negative_pairs,
    pair_exponents,
    pair_similarities,
    pair_weights,
)
from drrho_reference.losses import hinge_margin_loss, info_nce
from drrho_reference.unimodal import view_positions

NEVER = -np.inf
# Few shapes, and calls that answer many questions: libraries that compile do so per shape and per call.
BATCH, WIDTH, OTHER_WIDTH = 5, 4, 3
SAMPLES, SLICES = 6, 7


@dataclass(frozen=True)
class SetOf:
    """An ambiguity set by name: the oracle and an implementation have classes of their own."""

    name: str
    parameters: Mapping[str, float]

    def build(self, namespace: Any) -> Any:
        """Build it from a namespace that has the class."""
        return getattr(namespace, self.name)(**self.parameters)


@dataclass(frozen=True)
class Arguments:
    """What a function is called with; ``how`` says how something is computed, never what, so the oracle lacks it."""

    positional: tuple[Any, ...]
    options: Mapping[str, Any]
    how: Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Stored:
    """An answer from ``_extremes.json``: fields, and what they are measured against where that is stored, too."""

    expected: Mapping[str, Any]
    scales: Mapping[str, Any] | None


class Answer(NamedTuple):
    """An answer that neither the oracle nor the file has: fields, what they are measured against, and their bounds.

    Fields in ``limits`` may be smaller than expected, but not larger.
    """

    expected: Mapping[str, Any]
    scales: Mapping[str, Any]
    bounds: Mapping[str, float]
    limits: frozenset[str] = frozenset()


@dataclass(frozen=True, eq=False)
class Problem:
    """A named problem of one function. Where it asks for many slices at once, ``rows`` names them one by one.

    ``answer`` takes the arguments, rounded to a dtype, and the dtype; without it the oracle answers, unless the answer
    is ``stored``. ``story`` takes the function and the arguments if the problem needs more than one call.
    """

    function: str
    name: str
    sentence: str
    draw: Callable[[np.random.Generator], tuple[Any, ...]]
    rows: tuple[str, ...] = ()
    stored: Stored | None = None
    answer: Callable[[Arguments, str], Answer] | None = None
    story: Callable[..., Any] | None = None

    def row_name(self, row: str) -> str:
        """Name one row among all cases."""
        return f"{self.name}{', ' if ': ' in self.name else ': '}{row}"

    def arguments(self) -> Arguments:
        """Draw the arguments; the seed is the name's."""
        drawn = self.draw(np.random.default_rng(zlib.crc32(f"{self.function} {self.name}".encode())))
        positional, options, how = (*drawn, {}, {})[:3]
        return Arguments(positional, options, how)


PROBLEMS: list[Problem] = []
Draw = Callable[[Any], tuple[Any, ...]]  # np.random.Generator would load numpy.random with the package


def _problem(*functions: str) -> Callable[[Draw], Draw]:
    """Enter a problem, once for each function of the same signature."""

    def enter(draw: Draw) -> Draw:
        sentence = (draw.__doc__ or "").strip()
        for function in functions:
            PROBLEMS.append(Problem(function, draw.__name__.strip("_"), sentence, draw))
        return draw

    return enter


# ---------------------------------------------------------------------------------------------------------------------
# Risks
# ---------------------------------------------------------------------------------------------------------------------

_SETS = (
    SetOf("CVaR", {"alpha": 0.375}),
    SetOf("KLPenalty", {"temperature": 0.75}),
    SetOf("KLBall", {"radius": 0.25}),
    SetOf("ChiSquarePenalty", {"strength": 0.75}),
    SetOf("ChiSquareBall", {"radius": 0.375}),
    SetOf("CressieReadBall", {"order": 3.0, "radius": 0.25}),
    SetOf("CappedKLPenalty", {"temperature": 0.75, "alpha": 0.375}),
)


def _losses(rng: np.random.Generator) -> FloatArray:
    """One slice of losses for each row, positive and skewed."""
    return rng.gamma(2.0, size=(SLICES, SAMPLES))


_KINDS = ("positive", "signed", "negative", "ties", "all equal", "small", "large")
_MASKS = {
    "four": (1, 0, 1, 1, 0, 1),
    "one": (0, 0, 0, 1, 0, 0),
    "all": (1, 1, 1, 1, 1, 1),
    "five": (1, 1, 1, 0, 1, 1),
    "first two": (1, 1, 0, 0, 0, 0),
    "last": (0, 0, 0, 0, 0, 1),
    "three": (0, 1, 0, 1, 1, 0),
}


def _masks() -> Any:
    """Return the masks as an array (SLICES, SAMPLES) of bool."""
    return np.array([*_MASKS.values()], dtype=bool)


def _kinds(rng: np.random.Generator) -> FloatArray:
    """Return one row of losses for each of _KINDS."""
    rows = [rng.gamma(2.0, size=SAMPLES), rng.normal(size=SAMPLES), -1.0 - rng.gamma(2.0, size=SAMPLES)]
    rows += [np.array([0.5, 1.0, 1.0, 0.0, 1.0, 0.5]), np.full(SAMPLES, rng.normal())]
    return np.stack([*rows, *(scale * rng.normal(size=SAMPLES) for scale in (1e-30, 1e30))])


def _enter_risks(ambiguity_set: SetOf) -> None:
    """Enter what every set is asked."""

    def enter(function: str, name: str, sentence: str, rows: tuple[str, ...], draw: Draw) -> None:
        PROBLEMS.append(Problem(function, f"{ambiguity_set.name}{name}", sentence, draw, rows))

    def masked(rng: np.random.Generator) -> tuple[Any, ...]:
        losses = np.where(_masks(), rng.normal(size=(SLICES, SAMPLES)), np.nan)
        return (losses.T, ambiguity_set), {"axis": 0, "where": _masks().T}

    def steered(rng: np.random.Generator) -> tuple[Any, ...]:
        losses = (np.where(_masks(), _losses(rng), np.nan) for _ in range(2))
        return (*losses, ambiguity_set), {"reference_weight": 1.5, "where": _masks()}

    def weighted(rng: np.random.Generator) -> tuple[Any, ...]:
        losses = (np.where(_masks(), _losses(rng), np.nan) for _ in range(2))
        return (*losses, ambiguity_set, rng.normal(size=SLICES)), {"reference_weight": 1.5, "where": _masks()}

    def kinds_of(one: SetOf) -> Draw:
        return lambda rng: ((_kinds(rng), one),)

    enter("worst_case", "", "Losses of every kind.", _KINDS, kinds_of(ambiguity_set))
    masks = tuple(_MASKS)
    sentence = "The first axis; entries that hold nan and count for nothing, not even in n."
    enter("worst_case", ": mask", sentence, masks, masked)
    sentence = "Excess losses, with a reference weight above 1; entries that hold nan and count for nothing."
    enter("drrho_risk", ": mask", sentence, masks, steered)
    sentence = "An upstream gradient that differs from slice to slice, as weights per token give."
    enter("drrho_risk_vjp", ": mask", sentence, masks, weighted)
    if "radius" in ambiguity_set.parameters:
        for radius, name, sentence in (
            (0.0, ": radius 0", "The smallest ball is the mean."),
            (64.0, ": saturation", "A large ball is the maximum, shared by its ties."),
        ):
            other = SetOf(ambiguity_set.name, {**ambiguity_set.parameters, "radius": radius})
            enter("worst_case", name, sentence, _KINDS, kinds_of(other))


for _one in _SETS:
    _enter_risks(_one)


@_problem("drrho_risk")
def no_options(rng: np.random.Generator) -> tuple[Any, ...]:
    """The worst case of the loss minus the reference model's."""
    return (_losses(rng), _losses(rng), _SETS[1]), {}


@_problem("drrho_risk_vjp")
def weights_per_token(rng: np.random.Generator) -> tuple[Any, ...]:
    """Risks along the first axis, each with a weight of its own; one weight is 0."""
    upstream = np.where(np.arange(SAMPLES) == 2, 0.0, rng.gamma(2.0, size=SAMPLES))
    return (_losses(rng), _losses(rng), _SETS[1], upstream), {"axis": 0}


@_problem("excess_loss")
def weighted_difference(rng: np.random.Generator) -> tuple[Any, ...]:
    """The loss minus lambda times the reference model's loss."""
    return (_losses(rng), _losses(rng)), {"reference_weight": 0.75}


@_problem("moving_average_kl")
def first_visit(rng: np.random.Generator) -> tuple[Any, ...]:
    """A fresh average takes the batch's own mean, whatever gamma is."""
    return (_losses(rng)[0], _losses(rng)[0], np.array(NEVER)), {"temperature": 0.75, "gamma": 0.25}


@_problem("moving_average_kl")
def memory(rng: np.random.Generator) -> tuple[Any, ...]:
    """An average with a memory, a mask and a reference weight."""
    mask = _masks()[0]
    options = {"temperature": 1.5, "gamma": 0.3, "reference_weight": 0.5, "where": mask}
    losses = (np.where(mask, _losses(rng)[0], np.nan) for _ in range(2))
    return (*losses, np.array(0.4)), options


@_problem("moving_average_kl")
def no_memory(rng: np.random.Generator) -> tuple[Any, ...]:
    """With gamma = 1 the state says nothing: the KL penalty's risk and weights."""
    return (_losses(rng)[0], _losses(rng)[0], np.array(-3.0)), {"temperature": 0.75}


# ---------------------------------------------------------------------------------------------------------------------
# Contrastive steps
# ---------------------------------------------------------------------------------------------------------------------


def _unit_rows(rng: np.random.Generator, width: int) -> FloatArray:
    features = rng.normal(size=(BATCH, width))
    return np.asarray(features / np.linalg.norm(features, axis=1, keepdims=True), dtype=np.float64)


def _batch(rng: np.random.Generator, *, visited: bool = False) -> tuple[FloatArray, ...]:
    """Two sides of features and their log estimates: fresh, or some visited and some not."""
    states = np.full((2, BATCH), NEVER)
    if visited:
        states = np.where(rng.permuted([[0, 0, 1, 1, 1], [0, 1, 1, 1, 1]], axis=1), rng.normal(size=(2, BATCH)), NEVER)
    return _unit_rows(rng, WIDTH), _unit_rows(rng, WIDTH), *states


def _reference(rng: np.random.Generator, width: int) -> tuple[FloatArray, FloatArray]:
    return _unit_rows(rng, width), _unit_rows(rng, width)


_STEPS = ("contrastive_step", "unimodal_contrastive_step")


def _uneven(rng: np.random.Generator) -> FloatArray:
    """Draw one weight per anchor, one of them 0."""
    return np.where(np.arange(BATCH) == 3, 0.0, rng.gamma(2.0, size=BATCH))


@_problem(*_STEPS)
def plain(rng: np.random.Generator) -> tuple[Any, ...]:
    """No memory and no reference model: the mini-batch loss."""
    return _batch(rng), {"temperature": 0.25}


@_problem(*_STEPS)
def cold(rng: np.random.Generator) -> tuple[Any, ...]:
    """Temperature 0.05, as trained models have it."""
    return _batch(rng), {"temperature": 0.05}


@_problem(*_STEPS)
def reference(rng: np.random.Generator) -> tuple[Any, ...]:
    """A reference model's features of the same width."""
    return _batch(rng), {"temperature": 0.3, "reference_features": _reference(rng, WIDTH)}


@_problem(*_STEPS)
def reference_of_another_width(rng: np.random.Generator) -> tuple[Any, ...]:
    """A reference model's features are narrower than the learner's."""
    return _batch(rng), {"temperature": 0.3, "reference_features": _reference(rng, OTHER_WIDTH)}


@_problem(*_STEPS)
def reference_weight(rng: np.random.Generator) -> tuple[Any, ...]:
    """A reference weight above 1."""
    options = {"temperature": 0.4, "reference_features": _reference(rng, OTHER_WIDTH), "reference_weight": 1.5}
    return _batch(rng), options


@_problem(*_STEPS)
def eps(rng: np.random.Generator) -> tuple[Any, ...]:
    """An eps large enough to be seen wherever it is put; the state is stored without it."""
    return _batch(rng, visited=True), {"temperature": 0.3, "gamma": 0.6, "eps": 0.25}


@_problem(*_STEPS)
def gamma(rng: np.random.Generator) -> tuple[Any, ...]:
    """One gamma below 1, with first visits among the anchors."""
    return _batch(rng, visited=True), {"temperature": 0.5, "gamma": 0.2}


@_problem(*_STEPS)
def gamma_per_anchor(rng: np.random.Generator) -> tuple[Any, ...]:
    """A gamma per anchor, with first visits among the anchors."""
    return _batch(rng, visited=True), {"temperature": 0.5, "gamma": tuple(rng.uniform(0.1, 1.0, size=(2, BATCH)))}


@_problem(*_STEPS)
def radius(rng: np.random.Generator) -> tuple[Any, ...]:
    """A radius, as learned temperatures need it."""
    return _batch(rng, visited=True), {"temperature": 0.5, "gamma": 0.7, "radius": 0.75}


@_problem(*_STEPS)
def temperature_per_anchor(rng: np.random.Generator) -> tuple[Any, ...]:
    """A temperature per anchor and a gradient for each."""
    temperature = tuple(rng.uniform(0.15, 1.0, size=(2, BATCH)))
    return _batch(rng, visited=True), {"temperature": temperature, "gamma": 0.7, "radius": 0.5}


@_problem(*_STEPS)
def aligned(rng: np.random.Generator) -> tuple[Any, ...]:
    """Both sides are equal, as in a model that has learned everything."""
    image, _, *states = _batch(rng)
    return (image, image.copy(), *states), {"temperature": 0.05}


@_problem(*_STEPS)
def opposite(rng: np.random.Generator) -> tuple[Any, ...]:
    """Every positive is opposite to its anchor."""
    image, _, *states = _batch(rng)
    return (image, -image, *states), {"temperature": 0.05}


@_problem(*_STEPS)
def collapsed(rng: np.random.Generator) -> tuple[Any, ...]:
    """All features are equal: every exponent is 0."""
    image, _, *states = _batch(rng, visited=True)
    same = np.tile(image[:1], (BATCH, 1))
    return (same, same.copy(), *states), {"temperature": 0.05, "gamma": 0.5}


@_problem("contrastive_step")
def pair_mask(rng: np.random.Generator) -> tuple[Any, ...]:
    """Pairs that are no negatives; image 1 and text 3 have none left and keep their state."""
    mask = rng.uniform(size=(BATCH, BATCH)) < 0.7
    mask[:, 3] = mask[1, :] = False
    mask[0, 1] = mask[2, 0] = mask[3, 2] = mask[4, 0] = True
    return _batch(rng, visited=True), {"temperature": 0.3, "gamma": 0.5, "radius": 0.25, "pair_mask": mask}


@_problem(*_STEPS)
def all_options(rng: np.random.Generator) -> tuple[Any, ...]:
    """All options that both steps have, at once."""
    options = {
        "temperature": tuple(rng.uniform(0.2, 0.8, size=(2, BATCH))),
        "gamma": tuple(rng.uniform(0.1, 1.0, size=(2, BATCH))),
        "reference_features": _reference(rng, OTHER_WIDTH),
        "reference_weight": 0.5,
        "radius": 0.25,
        "eps": 0.125,
    }
    return _batch(rng, visited=True), options


@_problem("contrastive_step")
def everything(rng: np.random.Generator) -> tuple[Any, ...]:
    """All options at once, a mask too."""
    options = {
        "temperature": tuple(rng.uniform(0.2, 0.8, size=(2, BATCH))),
        "gamma": tuple(rng.uniform(0.1, 1.0, size=(2, BATCH))),
        "reference_features": _reference(rng, OTHER_WIDTH),
        "reference_weight": 0.5,
        "radius": 0.25,
        "eps": 0.125,
        "pair_mask": np.arange(BATCH * BATCH).reshape(BATCH, BATCH) % 7 != 3,
    }
    return _batch(rng, visited=True), options


@_problem(*_STEPS)
def anchor_weight(rng: np.random.Generator) -> tuple[Any, ...]:
    """One weight per pair of anchors; one weight is 0."""
    options = {"temperature": 0.3, "gamma": 0.5, "radius": 0.25, "anchor_weight": _uneven(rng)}
    return _batch(rng, visited=True), options


@_problem(*_STEPS)
def anchor_weight_of_each_side(rng: np.random.Generator) -> tuple[Any, ...]:
    """A weight per anchor and side, beside a temperature per anchor."""
    temperature = tuple(rng.uniform(0.2, 0.8, size=(2, BATCH)))
    weight = tuple(rng.gamma(2.0, size=(2, BATCH)))
    return _batch(rng, visited=True), {"temperature": temperature, "gamma": 0.5, "anchor_weight": weight}


@_problem(*_STEPS)
def one_anchor(rng: np.random.Generator) -> tuple[Any, ...]:
    """Anchor 1 of the first side counts alone; the states of all others are updated all the same."""
    options = {"temperature": 0.5, "gamma": 0.5, "anchor_weight": (np.eye(BATCH)[1], np.zeros(BATCH))}
    return _batch(rng, visited=True), options


@_problem("contrastive_step")
def anchor_weight_and_pair_mask(rng: np.random.Generator) -> tuple[Any, ...]:
    """A weight per anchor beside a mask, a reference model and a floor, in tiles of two rows."""
    options = {
        "temperature": 0.3,
        "gamma": 0.5,
        "eps": 0.125,
        "reference_features": _reference(rng, OTHER_WIDTH),
        "pair_mask": _pair_mask(rng),
        "anchor_weight": tuple(rng.gamma(2.0, size=(2, BATCH))),
    }
    return _batch(rng, visited=True), options, {"tile_size": 2}


@_problem(*_STEPS)
def tiles(rng: np.random.Generator) -> tuple[Any, ...]:
    """Computed in tiles of two rows: the same numbers."""
    options = {"temperature": 0.3, "gamma": 0.5, "reference_features": _reference(rng, OTHER_WIDTH)}
    return _batch(rng, visited=True), options, {"tile_size": 2}


@_problem("scent_gamma")
def floor(rng: np.random.Generator) -> tuple[Any, ...]:
    """Some gammas at their floor, some above it, one sample never visited."""
    return (np.array([NEVER, -9.0, -1.0, *rng.normal(size=2)]),), {"log_alpha": 0.5, "gamma_floor": 0.125}


@_problem("cosine_gamma")
def half_way(rng: np.random.Generator) -> tuple[Any, ...]:
    """Somewhere on the cosine."""
    return (float(rng.integers(2, 5)),), {"num_epochs": 8.0, "gamma_min": 0.25}


@_problem("cosine_gamma")
def past_the_end(rng: np.random.Generator) -> tuple[Any, ...]:
    """After the last epoch gamma stays where it is."""
    return (float(rng.integers(12, 20)),), {"num_epochs": 8.0, "gamma_min": 0.25}


@_problem("recommended_gamma_min")
def many_epochs(rng: np.random.Generator) -> tuple[Any, ...]:
    """The rule below its cap of 1."""
    return (float(rng.integers(20, 40)),), {}


@_problem("recommended_gamma_min")
def few_epochs(rng: np.random.Generator) -> tuple[Any, ...]:
    """The rule at its cap of 1."""
    return (float(rng.integers(1, 5)),), {}


# ---------------------------------------------------------------------------------------------------------------------
# Other losses, selection
# ---------------------------------------------------------------------------------------------------------------------


@_problem("InnerEstimator")
def a_data_set_that_grows(rng: np.random.Generator) -> tuple[Any, ...]:
    """Gather before and after a scatter, grow, scatter again, copy the state; what was never visited is -inf."""
    values = rng.normal(size=(4, 3))
    values[1, 1] = values[2, 0] = NEVER
    first, later = np.array([4, 0, 2]), np.array([7, 2, 5])
    return (SAMPLES, first, values[0], values[1], SAMPLES + 2, later, values[2], values[3]), {}


@_problem("info_nce")
def warm(rng: np.random.Generator) -> tuple[Any, ...]:
    """Temperature 0.5."""
    return _batch(rng)[:2], {"temperature": 0.5}


@_problem("info_nce")
def _cold(rng: np.random.Generator) -> tuple[Any, ...]:
    """Temperature 0.05."""
    return _batch(rng)[:2], {"temperature": 0.05}


@_problem("info_nce")
def temperature_1e_4(rng: np.random.Generator) -> tuple[Any, ...]:
    """Logits that differ by ten thousands."""
    return _batch(rng)[:2], {"temperature": 1e-4}


@_problem("info_nce")
def _anchor_weight(rng: np.random.Generator) -> tuple[Any, ...]:
    """One weight for the row and the column of each pair; one weight is 0."""
    return _batch(rng)[:2], {"temperature": 0.3, "anchor_weight": _uneven(rng)}


@_problem("info_nce")
def _anchor_weight_of_each_side(rng: np.random.Generator) -> tuple[Any, ...]:
    """A weight for each row and another one for each column."""
    return _batch(rng)[:2], {"temperature": 0.3, "anchor_weight": tuple(rng.gamma(2.0, size=(2, BATCH)))}


@_problem("pair_loss")
def ordinary_pairs(rng: np.random.Generator) -> tuple[Any, ...]:
    """Temperature 0.25."""
    return _batch(rng)[:2], {"temperature": 0.25}


@_problem("pair_loss")
def cold_pairs(rng: np.random.Generator) -> tuple[Any, ...]:
    """Temperature 0.05."""
    return _batch(rng)[:2], {"temperature": 0.05}


@_problem("reference_anchor_weight")
def default_sigmoid(rng: np.random.Generator) -> tuple[Any, ...]:
    """Pair losses around the threshold; the mean of the weights is 1."""
    return (3.0 * rng.normal(size=SAMPLES) - 1.0,), {}


@_problem("reference_anchor_weight")
def steep_sigmoid(rng: np.random.Generator) -> tuple[Any, ...]:
    """A threshold above 0 and a steep step."""
    return (rng.normal(size=SAMPLES),), {"temperature": 0.125, "threshold": 0.25}


@_problem("reference_anchor_weight")
def hopeless_pairs(rng: np.random.Generator) -> tuple[Any, ...]:
    """Losses of some thousands: each sigmoid underflows, their ratios do not."""
    return (4096.0 + rng.normal(size=SAMPLES),), {}


@_problem("sigmoid_loss")
def scale_and_bias(rng: np.random.Generator) -> tuple[Any, ...]:
    """A scale of 6 and a bias of -2."""
    return _batch(rng)[:2], {"scale": 6.0, "bias": -2.0}


@_problem("sigmoid_loss")
def scale_1000(rng: np.random.Generator) -> tuple[Any, ...]:
    """Logits whose exponentials overflow."""
    return _batch(rng)[:2], {"scale": 1000.0, "bias": -10.0}


@_problem("sigmoid_loss")
def masked(rng: np.random.Generator) -> tuple[Any, ...]:
    """Pairs that a mask leaves out; the diagonal stays whatever it says."""
    return _batch(rng)[:2], {"scale": 6.0, "bias": -2.0, "pair_mask": _pair_mask(rng)}


def _pair_mask(rng: np.random.Generator) -> Any:
    """Mark negatives (BATCH, BATCH), asymmetric; image 1 and text 3 have none."""
    mask = rng.uniform(size=(BATCH, BATCH)) < 0.6
    mask[:, 3] = mask[1, :] = False
    mask[0, 1] = mask[0, 2] = mask[2, 0] = mask[3, 2] = mask[4, 0] = True
    return mask


@_problem("distillation_loss")
def two_temperatures(rng: np.random.Generator) -> tuple[Any, ...]:
    """The reference model is narrower and has a temperature of its own."""
    options = {"temperature": 0.5, "reference_temperature": 0.25}
    return (*_batch(rng)[:2], *_reference(rng, OTHER_WIDTH)), options


@_problem("distillation_loss")
def two_cold_temperatures(rng: np.random.Generator) -> tuple[Any, ...]:
    """Temperatures of 1e-3: logits that differ by thousands."""
    options = {"temperature": 1e-3, "reference_temperature": 2e-3}
    return (*_batch(rng)[:2], *_reference(rng, OTHER_WIDTH)), options


@_problem("hinge_margin_loss")
def margin(rng: np.random.Generator) -> tuple[Any, ...]:
    """Some pairs inside the margin, some beyond it."""
    return _batch(rng)[:2], {"margin": 0.25}


@_problem("hinge_margin_loss")
def _masked(rng: np.random.Generator) -> tuple[Any, ...]:
    """Means over the negatives that a mask leaves; image 1 and text 3 have none and add nothing."""
    return _batch(rng)[:2], {"margin": 0.75, "pair_mask": _pair_mask(rng)}


@_problem("weighted_sum")
def three_terms(rng: np.random.Generator) -> tuple[Any, ...]:
    """A step with a temperature per anchor, InfoNCE and the hinge; parameters stay apart."""
    image, text, *states = _batch(rng)
    step = contrastive_step(image, text, *states, temperature=tuple(rng.uniform(0.2, 0.8, size=(2, BATCH))))
    clip, hinge = info_nce(image, text, temperature=0.5), hinge_margin_loss(image, text, margin=0.25)
    return tuple((weight, _arrays(term)) for weight, term in ((0.75, step), (-0.5, clip), (2.0, hinge))), {}


def _arrays(result: Any) -> Any:
    """Turn the fields of a result into arrays."""
    if isinstance(result, tuple):
        parts = [_arrays(part) for part in result]
        return type(result)(*parts) if hasattr(result, "_fields") else tuple(parts)
    return np.asarray(result, dtype=np.float64)


@_problem("select_top_excess")
def top_three(rng: np.random.Generator) -> tuple[Any, ...]:
    """The three samples of largest excess loss."""
    return (_losses(rng)[0], _losses(rng)[0]), {"k": 3}


@_problem("select_top_excess")
def ties_and_a_weight(rng: np.random.Generator) -> tuple[Any, ...]:
    """A reference weight of 2; among equals the lower index comes first."""
    loss = rng.integers(0, 3, size=SAMPLES).astype(np.float64)
    return (loss, rng.integers(0, 2, size=SAMPLES).astype(np.float64)), {"k": 4, "reference_weight": 2.0}


def _logits(rng: np.random.Generator, scale: float = 1.0) -> tuple[FloatArray, FloatArray]:
    return scale * rng.normal(size=(SAMPLES, SAMPLES)), scale * rng.normal(size=(SAMPLES, SAMPLES))


@_problem("select_jest")
def top_k(rng: np.random.Generator) -> tuple[Any, ...]:
    """Without noise, in chunks of unequal size."""
    return _logits(rng), {"k": 5, "num_chunks": 2, "top_k": True}


@_problem("select_jest")
def scale_100(rng: np.random.Generator) -> tuple[Any, ...]:
    """Logits of a trained model; a noise that matters little."""
    return _logits(rng, 100.0), {"k": 4, "num_chunks": 2, "gumbel": rng.gumbel(size=(2, SAMPLES))}


@_problem("select_jest")
def with_noise(rng: np.random.Generator) -> tuple[Any, ...]:
    """With given Gumbel noise."""
    return _logits(rng), {"k": 4, "num_chunks": 2, "gumbel": rng.gumbel(size=(2, SAMPLES))}


# ---------------------------------------------------------------------------------------------------------------------
# Theory
# ---------------------------------------------------------------------------------------------------------------------


@_problem("excess_variance")
def over_pairs_and_anchors(rng: np.random.Generator) -> tuple[Any, ...]:
    """Anchors with unequally many pairs, one of them with a single one."""
    losses = (np.where(_masks(), rng.normal(size=(SLICES, SAMPLES)), np.nan) for _ in range(2))
    return tuple(losses), {"reference_weight": 0.5, "where": _masks()}


@_problem("effective_sample_size")
def between_one_and_n(rng: np.random.Generator) -> tuple[Any, ...]:
    """Uneven, uniform and one-hot weights."""
    weights = rng.dirichlet(np.ones(SAMPLES), size=SLICES)
    weights[1], weights[2] = 1.0 / SAMPLES, np.arange(SAMPLES) == 3
    return (weights,), {}


@_problem("log_mean_exp_bias")
def batches_of_two(rng: np.random.Generator) -> tuple[Any, ...]:
    """Batches along the first axis, which leave one sample over."""
    return (rng.normal(size=(SLICES, SAMPLES)),), {"batch_size": 2, "temperature": 0.5, "axis": 0}


@_problem("generalization_bound")
def the_best_of_some(rng: np.random.Generator) -> tuple[Any, ...]:
    """A minimum over models that is neither the smallest risk nor the smallest variance."""
    risk = np.array([1.0, 0.75, 0.5, 0.25, 0.125, 0.0]) + 0.01 * rng.normal(size=SAMPLES)
    variance = np.array([0.0, 0.01, 0.25, 4.0, 9.0, 25.0])
    return (risk, variance), {"radius": 0.125, "num_samples": 50, "c1": 1.5, "c2": 2.0}


@_problem("generalization_bound")
def the_form_alone(rng: np.random.Generator) -> tuple[Any, ...]:
    """Without constants."""
    return (rng.gamma(2.0, size=SAMPLES), rng.gamma(2.0, size=SAMPLES)), {"radius": 0.125, "num_samples": 50}


def _scaling(rng: np.random.Generator, floor: float, noise: float) -> tuple[FloatArray, FloatArray]:
    """Compute and error of nine runs; numbers beside the law where they do not count."""
    compute = np.logspace(0.0, 4.0, 9)
    return compute, (floor + 0.5 * compute**-0.25) * np.exp(noise * rng.normal(size=9))


@_problem("fit_scaling_law")
def a_line(rng: np.random.Generator) -> tuple[Any, ...]:
    """A power law without a floor; two points are not fitted. Intervals are random and are not compared."""
    compute, error = _scaling(rng, 0.0, 0.05)
    where = np.arange(9) % 5 != 2
    return (compute, np.where(where, error, np.nan)), {"where": where, "num_resamples": 2}


@_problem("fit_scaling_law")
def a_floor(rng: np.random.Generator) -> tuple[Any, ...]:
    """A power law above a floor, without noise. Intervals are not compared."""
    return _scaling(rng, 0.125, 0.0), {"with_floor": True, "num_resamples": 2}


# ---------------------------------------------------------------------------------------------------------------------
# What errors are measured against
# ---------------------------------------------------------------------------------------------------------------------


def slope_scales(arguments: Arguments, expected: Mapping[str, Any]) -> dict[str, Any]:
    """The gradient of a slice against its largest weight times its upstream gradient; where that is 0, against 1."""
    axis = arguments.options.get("axis", -1)
    largest = np.max(np.abs(expected["value"]), axis=axis, keepdims=True)
    return {"value": np.where(largest == 0.0, 1.0, largest)}


def risk_scales(arguments: Arguments, expected: Mapping[str, Any]) -> dict[str, Any]:
    """Risks against the largest loss that counts, weights against the largest weight, both of the same slice."""
    values = np.abs(arguments.positional[0])
    if len(arguments.positional) > 2:  # loss, reference loss, set
        weight = arguments.options.get("reference_weight", 1.0)
        values = np.abs(arguments.positional[0] - weight * arguments.positional[1])
    axis = arguments.options.get("axis", -1)
    values = np.where(arguments.options.get("where", True), values, 0.0)
    largest = np.max(values, axis=axis)
    return {
        "risk": largest,
        "weights": np.max(expected["weights"], axis=axis, keepdims=True),
        "dual": largest,
    }


def dual_value(arguments: Arguments, dual: Any) -> FloatArray:
    """Return the value that (nu, s) certifies, in float64: by weak duality it cannot lie below the risk."""
    values, ambiguity_set = arguments.positional[0], arguments.positional[-1]
    if len(arguments.positional) > 2:
        values = values - arguments.options.get("reference_weight", 1.0) * arguments.positional[1]
    axis = arguments.options.get("axis", -1)
    counted = np.broadcast_to(arguments.options.get("where", True), np.shape(values))
    values, counted = np.moveaxis(values, axis, -1), np.moveaxis(counted, axis, -1)
    nus, scales = (np.asarray(part, dtype=np.float64) for part in dual)
    found = np.empty(values.shape[:-1])
    for row in np.ndindex(found.shape):
        found[row] = _certified(values[row][counted[row]], ambiguity_set, float(nus[row]), float(scales[row]))
    return found


def _certified(x: FloatArray, ambiguity_set: SetOf, nu: float, s: float) -> float:
    """Return nu + s radius + s mean phi*((x - nu) / s) of one slice."""
    parameters = ambiguity_set.parameters
    if ambiguity_set.name == "CVaR":
        return nu + float(np.mean(np.maximum(x - nu, 0.0))) / parameters["alpha"]
    if ambiguity_set.name == "CappedKLPenalty":
        y, log_cap = (x - nu) / s, -np.log(parameters["alpha"])
        below = np.expm1(np.minimum(y, log_cap))
        return nu + s * float(np.mean(below + np.maximum(y - log_cap, 0.0) / parameters["alpha"]))
    if s in (0.0, np.inf):  # saturated: the maximum; radius 0: the mean
        return nu
    y = (x - nu) / s
    order = {"KLPenalty": 1.0, "KLBall": 1.0, "CressieReadBall": parameters.get("order", 0.0)}.get(
        ambiguity_set.name, 2.0
    )
    with np.errstate(over="ignore"):
        if order == 1.0:
            conjugate = np.expm1(y)
        else:
            conjugate = (np.maximum(1.0 + (order - 1.0) * y, 0.0) ** (order / (order - 1.0)) - 1.0) / order
        return nu + s * (parameters.get("radius", 0.0) + float(np.mean(conjugate)))


def average_scales(arguments: Arguments, expected: Mapping[str, Any]) -> dict[str, Any]:
    """What the exponents are exact to: 1 + largest excess / temperature + |log u|."""
    loss, reference_loss, _ = arguments.positional
    options = arguments.options
    excess = np.abs(loss - options.get("reference_weight", 1.0) * reference_loss)[options.get("where", ...)]
    size = 1.0 + float(np.max(excess)) / options["temperature"] + abs(float(expected["log_inner"]))
    return {
        "risk": size * options["temperature"],
        "weights": size * max(float(np.max(expected["weights"])), 1.0 / loss.size),  # a memory may leave all at 0
        "log_inner": size,
    }


def step_scales(arguments: Arguments, expected: Mapping[str, Any]) -> dict[str, Any]:
    """The size of what a step sums, before it cancels: terms of the closed form, in the oracle's own loops."""
    options = arguments.options
    b = len(arguments.positional[0])
    two_sided = isinstance(options["temperature"], tuple)
    temperatures = [np.broadcast_to(side, b) for side in (options["temperature"] if two_sided else _twice(options))]
    sides = ("image", "text") if "image_gradient" in expected else ("view1", "view2")
    eps_, radius_ = options.get("eps", 0.0), options.get("radius", 0.0)
    factors = anchor_weights(options.get("anchor_weight"), b)
    total, terms = np.zeros((2, b)), np.ones((2, b))
    for side in range(2):
        for anchor in range(b):
            row, positive, negatives = _anchor(arguments, side, anchor, views=sides[0] == "view1")
            if not negatives:
                continue
            t, u = float(temperatures[side][anchor]), float(np.exp(expected[f"log_inner_{sides[side]}"][anchor]))
            w = np.array(pair_weights(row, positive, negatives, t, u, eps=eps_))[negatives]
            D = np.array(pair_exponents(row, positive, negatives, t))
            factor = float(factors[side][anchor])
            total[side, anchor] = factor * float(np.sum(w))
            level = abs(np.log(eps_ + u)) + radius_
            terms[side, anchor] = max(1.0, factor * max(1.0, level, float(np.sum(w * np.abs(D)))))
    warmest = max(float(np.max(side)) for side in temperatures) * max(1.0, *map(np.max, factors))
    gradient = float(np.max(total[0] + total[1])) / (2 * b)
    slope: Any = tuple(np.full(b, np.max(side) / (2 * b)) for side in terms) if two_sided else float(np.max(terms))
    return {
        "loss": max(abs(float(expected["loss"])), warmest),
        "surrogate": max(abs(float(expected["surrogate"])), warmest),
        f"{sides[0]}_gradient": gradient,
        f"{sides[1]}_gradient": gradient,
        "temperature_gradient": slope,
        **{name: _state_scale(expected[name]) for name in (f"log_inner_{side}" for side in sides)},
    }


def _state_scale(state: FloatArray) -> FloatArray:
    """max(1, |log u|), and 1 where nothing was visited."""
    return np.where(np.isfinite(state), np.maximum(1.0, np.abs(state)), 1.0)


def _twice(options: Mapping[str, Any]) -> tuple[Any, Any]:
    return options["temperature"], options["temperature"]


def _anchor(arguments: Arguments, side: int, anchor: int, *, views: bool) -> tuple[FloatArray, int, list[int]]:
    """Return an anchor's similarities, and where its positive and its negatives stand among them."""
    first, second = arguments.positional[:2]
    options = {
        name: arguments.options[name]
        for name in ("reference_features", "reference_weight")
        if name in arguments.options
    }
    b = len(first)
    if views:
        both = np.concatenate([first, second])
        if "reference_features" in options:
            options["reference_features"] = (np.concatenate(options["reference_features"]),) * 2
        position = anchor + side * b
        positive, negatives = view_positions(position, b)
        return pair_similarities(both, both, **options)[position], positive, negatives
    Z = pair_similarities(first, second, **options)
    allowed = negative_pairs(arguments.options.get("pair_mask"), b)
    if side == 1:
        Z, allowed = Z.T, allowed.T
    return Z[anchor], anchor, [int(j) for j in np.flatnonzero(allowed[anchor])]


def loss_scales(arguments: Arguments, expected: Mapping[str, Any]) -> dict[str, Any]:
    """A loss is a sum of logarithms; a gradient is a sum over pairs of (slope times features), slopes up to 2 / 2b."""
    b = len(arguments.positional[0])
    options = arguments.options
    steepness = float(options.get("scale", 1.0 / options.get("temperature", 1.0)))
    pull = max(steepness / b, *(float(np.max(np.abs(expected[name]))) for name in ("image_gradient", "text_gradient")))
    scales = {"loss": max(1.0, abs(float(expected["loss"]))), "image_gradient": pull, "text_gradient": pull}
    if "temperature_gradient" in expected:
        largest = max(1.0, *map(np.max, anchor_weights(options.get("anchor_weight"), b)))
        scales["temperature_gradient"] = 2.0 * steepness**2 * float(largest)
    for name in ("scale_gradient", "bias_gradient"):
        if name in expected:
            scales[name] = max(1.0, abs(float(expected[name])))
    return scales


def value_scales(arguments: Arguments, expected: Mapping[str, Any]) -> dict[str, Any]:
    """Values against the largest of the arguments and the answer."""
    del arguments
    return {"value": max(1.0, float(np.max(np.abs(expected["value"]))))}


def estimator_scales(arguments: Arguments, expected: Mapping[str, Any]) -> dict[str, Any]:
    """What is copied, against max(1, its size)."""
    del arguments
    return {name: tuple(map(_state_scale, pair)) for name, pair in expected.items()}


def sum_scales(arguments: Arguments, expected: Mapping[str, Any]) -> dict[str, Any]:
    """A sum against the sum of its terms' largest entries."""

    def size(name: str) -> float:
        return math.fsum(
            abs(weight) * float(np.max(np.abs(getattr(term, name)))) for weight, term in arguments.positional
        )

    scales: dict[str, Any] = {name: size(name) for name in ("loss", "image_gradient", "text_gradient")}
    for name in expected:
        if name not in scales:
            scales[name] = _largest_of(expected[name])
    return scales


def _largest_of(value: Any) -> Any:
    return tuple(map(_largest_of, value)) if isinstance(value, tuple) else float(np.max(np.abs(value)))


def variance_scales(arguments: Arguments, expected: Mapping[str, Any]) -> dict[str, Any]:
    """Variances against the largest square of an excess loss."""
    loss, reference_loss = arguments.positional
    excess = np.where(arguments.options["where"], loss - arguments.options["reference_weight"] * reference_loss, 0.0)
    return dict.fromkeys(expected, float(np.max(excess**2)))


def bias_scales(arguments: Arguments, expected: Mapping[str, Any]) -> dict[str, Any]:
    """A difference of risks against temperature + largest loss."""
    return dict.fromkeys(expected, arguments.options["temperature"] + float(np.max(np.abs(arguments.positional[0]))))


def fit_scales(arguments: Arguments, expected: Mapping[str, Any]) -> dict[str, Any]:
    """The prefactor against itself times the span of log C, a floor against the smallest error, the rest against 1."""
    compute, error = arguments.positional
    counted = arguments.options.get("where", np.ones(len(compute), dtype=bool))
    prefactor = float(expected["prefactor"]) * (1.0 + float(np.max(np.abs(np.log(compute[counted])))))
    return dict.fromkeys(expected, 1.0) | {"prefactor": prefactor, "floor": float(np.min(error[counted]))}


def index_scales(arguments: Arguments, expected: Mapping[str, Any]) -> dict[str, Any]:
    """Indices are right or wrong."""
    del arguments, expected
    return {"index": 1.0}


SCALES: dict[str, Callable[[Arguments, Mapping[str, Any]], dict[str, Any]]] = {
    "worst_case": risk_scales,
    "drrho_risk": risk_scales,
    "drrho_risk_vjp": slope_scales,
    "excess_loss": value_scales,
    "moving_average_kl": average_scales,
    "contrastive_step": step_scales,
    "unimodal_contrastive_step": step_scales,
    "InnerEstimator": estimator_scales,
    "pair_loss": value_scales,
    "reference_anchor_weight": value_scales,
    "scent_gamma": value_scales,
    "cosine_gamma": value_scales,
    "recommended_gamma_min": value_scales,
    "info_nce": loss_scales,
    "sigmoid_loss": loss_scales,
    "distillation_loss": loss_scales,
    "hinge_margin_loss": loss_scales,
    "weighted_sum": sum_scales,
    "select_top_excess": index_scales,
    "select_jest": index_scales,
    "excess_variance": variance_scales,
    "effective_sample_size": value_scales,
    "log_mean_exp_bias": bias_scales,
    "generalization_bound": value_scales,
    "fit_scaling_law": fit_scales,
}
FUNCTIONS = tuple(SCALES)
WRAPPERS = ("drrho_risk_vjp",)
"""Functions that an implementation may lack and be complete: those of wrappers that know an upstream gradient."""
SINGLE = {name: "value" for name, scales in SCALES.items() if scales in (value_scales, slope_scales)} | {
    name: "index" for name, scales in SCALES.items() if scales is index_scales
}
SET_NAMES = tuple(one.name for one in _SETS)


def oracle_set(ambiguity_set: SetOf) -> Any:
    """Return the oracle's own set."""
    return ambiguity_set.build(sets)


def bound(function: str, arguments: Arguments, dtype: str) -> float:
    """Return how large an error may be."""
    if function in ("worst_case", "drrho_risk", "drrho_risk_vjp"):
        return {"float64": 1e-10, "float32": 1e-5}[dtype]
    unit = {"float64": 1e-12, "float32": 5e-6}[dtype]
    if function == "fit_scaling_law" and arguments.options.get("with_floor"):
        # A search: the misfit is flat to the square root of the dtype's epsilon around its minimum.
        return {"float64": 1e-6, "float32": 1e-3}[dtype]
    temperature = arguments.options.get("temperature", 1.0)
    coldest = min(float(np.min(side)) for side in (temperature if isinstance(temperature, tuple) else (temperature,)))
    return max(1.0, 0.1 / coldest) * unit


# ---------------------------------------------------------------------------------------------------------------------
# What is more than one call, or gives more than is compared
# ---------------------------------------------------------------------------------------------------------------------


def to_numpy(value: Any) -> Any:
    """Copy to NumPy in float64; pairs stay pairs."""
    if isinstance(value, (tuple, list)):
        return tuple(map(to_numpy, value))
    for method in ("detach", "cpu", "get"):  # torch, torch on a device, CuPy
        if hasattr(value, method):
            value = getattr(value, method)()
    return np.asarray(value).astype(np.float64)


def _tell_the_story(
    estimator_class: Any,
    num_samples: int,
    index: Any,
    log_inner_image: Any,
    log_inner_text: Any,
    num_samples_grown: int,
    later_index: Any,
    later_image: Any,
    later_text: Any,
    /,
) -> dict[str, Any]:
    """Use an estimator as a training run does."""

    def method(owner: Any, name: str) -> Any:
        if not hasattr(owner, name):
            raise NotImplementedError(f"no method {name}")
        return getattr(owner, name)

    estimator = estimator_class(num_samples, like=log_inner_image)
    fresh = method(estimator, "gather")(index)
    estimator = method(estimator, "scatter")(index, log_inner_image, log_inner_text)
    visited = method(estimator, "gather")(index)
    estimator = method(estimator, "grow")(num_samples_grown)
    estimator = estimator.scatter(later_index, later_image, later_text)
    state = method(estimator, "state_dict")()
    copied = estimator_class(num_samples_grown, like=log_inner_image)
    method(copied, "load_state_dict")(state)
    return {
        "fresh": tuple(fresh),
        "visited": tuple(visited),
        "state": (state["log_inner_image"], state["log_inner_text"]),
        "copied": tuple(copied.gather(later_index)),
    }


def _add_up(weighted_sum: Any, *terms: Any) -> dict[str, Any]:
    """Give every parameter gradient a name of its own."""
    answer = weighted_sum(*terms)
    found = {
        name: answer[name] if isinstance(answer, Mapping) else getattr(answer, name, None)
        for name in ("loss", "image_gradient", "text_gradient", "parameter_gradients")
    }
    for position, gradients in enumerate(found.pop("parameter_gradients") or ()):
        for name, value in gradients.items():
            found[f"parameter_gradients[{position}].{name}"] = value
    return {name: value for name, value in found.items() if value is not None}


STORIES: dict[str, Callable[..., Any]] = {"InnerEstimator": _tell_the_story, "weighted_sum": _add_up}
COMPARED = {"fit_scaling_law": ("prefactor", "exponent", "floor", "residual", "fitted")}


def names_of_arguments(problem: Problem, oracle: Callable[..., Any], count: int) -> list[str]:
    """Return the names of the positional arguments."""
    function = STORIES.get(problem.function, oracle)
    parameters = [*inspect.signature(function).parameters.values()][1 if problem.function in STORIES else 0 :]
    if parameters and parameters[0].kind is inspect.Parameter.VAR_POSITIONAL:
        return [f"{parameters[0].name}[{position}]" for position in range(count)]
    return [parameter.name for parameter in parameters[:count]]


# ---------------------------------------------------------------------------------------------------------------------
# Stored numbers
# ---------------------------------------------------------------------------------------------------------------------


def _enter_extremes() -> None:
    """Enter the problems of ``_extremes.json``."""

    def number(value: Any) -> Any:
        return [number(one) for one in value] if isinstance(value, list) else float(value)

    def argument(value: Any) -> Any:
        if isinstance(value, dict):
            return SetOf(value["set"], value["parameters"]) if "set" in value else np.array(number(value["array"]))
        return value

    def always(arguments: tuple[Any, ...]) -> Draw:
        return lambda _: arguments

    def field(name: str, value: Any) -> Any:
        if name == "dual":
            return tuple(map(np.array, value))
        return np.array(value, dtype=np.int64 if name == "index" else np.float64)

    for entry in json.loads(Path(__file__).with_name("_extremes.json").read_text(encoding="utf-8")):
        arguments = tuple(map(argument, entry["positional"])), entry["options"]
        stored = Stored(
            {name: field(name, value) for name, value in entry["expected"].items()},
            {name: field(name, value) for name, value in entry["scales"].items()} if "scales" in entry else None,
        )
        rows = tuple(entry["rows"])
        name, sentence = entry["name"], entry["sentence"]
        PROBLEMS.append(Problem(entry["function"], name, sentence, always(arguments), rows, stored))


_enter_extremes()
