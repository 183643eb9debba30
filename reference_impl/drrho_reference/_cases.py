"""The conformance kit's problems: small, seeded, asymmetric; and what an error in each answer is measured against.

A problem is a function of a random generator that returns positional arguments and options in float64; its name is the
case's name and its docstring says what the case is about. ``conformance.py`` rounds them to a dtype, asks the oracle,
asks the implementation and compares.
"""
# ruff: noqa: D401 - a problem's docstring is the case's sentence in the report

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

import drrho_reference.ambiguity as sets
from drrho_reference._checks import FloatArray
from drrho_reference.contrastive import negative_pairs, pair_exponents, pair_similarities, pair_weights
from drrho_reference.unimodal import view_positions

NEVER = -np.inf
# Few shapes: libraries that compile do so per shape.
BATCH, WIDTH, OTHER_WIDTH = 5, 4, 3
SAMPLES = 6


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


@dataclass(frozen=True)
class Problem:
    """A named case of one function."""

    function: str
    name: str
    sentence: str
    draw: Callable[[np.random.Generator], tuple[Any, ...]]

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
)


def _losses(rng: np.random.Generator) -> FloatArray:
    """Three rows of losses, positive and skewed."""
    return rng.gamma(2.0, size=(3, SAMPLES))


def _enter_risks(ambiguity_set: SetOf) -> None:
    """Enter what every set is asked."""
    is_ball = "radius" in ambiguity_set.parameters

    def enter(name: str, sentence: str, losses: Callable[[np.random.Generator], Any], **options: Any) -> None:
        def draw(rng: np.random.Generator) -> tuple[Any, ...]:
            return (losses(rng), with_radius(options.get("radius"))), {
                key: value for key, value in options.items() if key != "radius"
            }

        PROBLEMS.append(Problem("worst_case", f"{ambiguity_set.name}: {name}", sentence, draw))

    def with_radius(radius: float | None) -> SetOf:
        if radius is None:
            return ambiguity_set
        return SetOf(ambiguity_set.name, {**ambiguity_set.parameters, "radius": radius})

    # One call solves many slices, so libraries that compile do so once: a row per kind of losses.
    def rows(rng: np.random.Generator) -> FloatArray:
        kinds = [rng.gamma(2.0, size=SAMPLES), rng.normal(size=SAMPLES), -1.0 - rng.gamma(2.0, size=SAMPLES)]
        kinds += [np.array([0.5, 1.0, 1.0, 0.0, 1.0, 0.5]), np.full(SAMPLES, rng.normal())]
        scales = (1e-30, 1e30) if is_ball or ambiguity_set.name == "CVaR" else (0.01, 10.0)
        return np.stack([*kinds, *(scale * rng.normal(size=SAMPLES) for scale in scales)])

    mask = np.array([[1, 0, 1, 1, 0, 1], [0, 0, 0, 1, 0, 0], [1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 1, 0]], dtype=bool).T
    enter("rows", "Positive, signed and negative losses, ties, all equal, small and large ones.", rows)
    enter("mask", "The first axis, and entries that count for nothing, not even in n.", _columns, axis=0, where=mask)
    if is_ball:
        enter("radius 0", "The smallest ball is the mean.", rows, radius=0.0)
        enter("saturation", "A large ball is the maximum, shared by its ties.", rows, radius=64.0)


def _columns(rng: np.random.Generator) -> FloatArray:
    """Return four columns of signed losses."""
    return rng.normal(size=(SAMPLES, 4))


for _one in _SETS:
    _enter_risks(_one)


def _enter_steered_risk(ambiguity_set: SetOf) -> None:
    """Enter a risk of excess losses for one set."""

    def weighted(rng: np.random.Generator) -> tuple[Any, ...]:
        mask = np.array([[1, 1, 1, 0, 1, 1], [0, 1, 0, 1, 1, 0], [1, 1, 1, 1, 1, 1]], dtype=bool)
        return (_losses(rng), _losses(rng), ambiguity_set), {"reference_weight": 1.5, "where": mask}

    sentence = "Excess losses, with a reference weight above 1 and a mask."
    PROBLEMS.append(Problem("drrho_risk", f"{ambiguity_set.name}: reference weight", sentence, weighted))


for _one in _SETS[:2] + _SETS[4:5]:  # the other sets differ in worst_case only
    _enter_steered_risk(_one)


@_problem("drrho_risk")
def no_options(rng: np.random.Generator) -> tuple[Any, ...]:
    """The worst case of the loss minus the reference model's."""
    return (_losses(rng), _losses(rng), _SETS[1]), {}


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
    mask = np.array([1, 0, 1, 1, 1, 0], dtype=bool)
    options = {"temperature": 1.5, "gamma": 0.3, "reference_weight": 0.5, "where": mask}
    return (_losses(rng)[0], _losses(rng)[0], np.array(0.4)), options


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


@_problem("contrastive_step")
def pair_mask(rng: np.random.Generator) -> tuple[Any, ...]:
    """Pairs that are no negatives; image 1 and text 3 have none left and keep their state."""
    mask = rng.uniform(size=(BATCH, BATCH)) < 0.7
    mask[:, 3] = mask[1, :] = False
    mask[0, 1] = mask[2, 0] = mask[3, 2] = mask[4, 0] = True
    return _batch(rng, visited=True), {"temperature": 0.3, "gamma": 0.5, "radius": 0.25, "pair_mask": mask}


@_problem("contrastive_step")
def everything(rng: np.random.Generator) -> tuple[Any, ...]:
    """All options at once."""
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


@_problem("info_nce")
def warm(rng: np.random.Generator) -> tuple[Any, ...]:
    """Temperature 0.5."""
    return _batch(rng)[:2], {"temperature": 0.5}


@_problem("info_nce")
def _cold(rng: np.random.Generator) -> tuple[Any, ...]:
    """Temperature 0.05."""
    return _batch(rng)[:2], {"temperature": 0.05}


@_problem("sigmoid_loss")
def scale_and_bias(rng: np.random.Generator) -> tuple[Any, ...]:
    """A scale of 6 and a bias of -2."""
    return _batch(rng)[:2], {"scale": 6.0, "bias": -2.0}


@_problem("distillation_loss")
def two_temperatures(rng: np.random.Generator) -> tuple[Any, ...]:
    """The teacher is narrower and has a temperature of its own."""
    options = {"temperature": 0.5, "reference_temperature": 0.25}
    return (*_batch(rng)[:2], *_reference(rng, OTHER_WIDTH)), options


@_problem("hinge_margin_loss")
def margin(rng: np.random.Generator) -> tuple[Any, ...]:
    """Some pairs inside the margin, some beyond it."""
    return _batch(rng)[:2], {"margin": 0.25}


@_problem("select_top_excess")
def top_three(rng: np.random.Generator) -> tuple[Any, ...]:
    """The three samples of largest excess loss."""
    return (_losses(rng)[0], _losses(rng)[0]), {"k": 3}


def _logits(rng: np.random.Generator) -> tuple[FloatArray, FloatArray]:
    return rng.normal(size=(SAMPLES, SAMPLES)), rng.normal(size=(SAMPLES, SAMPLES))


@_problem("select_jest")
def top_k(rng: np.random.Generator) -> tuple[Any, ...]:
    """Without noise, in chunks of unequal size."""
    return _logits(rng), {"k": 5, "num_chunks": 2, "top_k": True}


@_problem("select_jest")
def with_noise(rng: np.random.Generator) -> tuple[Any, ...]:
    """With given Gumbel noise."""
    return _logits(rng), {"k": 4, "num_chunks": 2, "gumbel": rng.gumbel(size=(2, SAMPLES))}


# ---------------------------------------------------------------------------------------------------------------------
# What errors are measured against
# ---------------------------------------------------------------------------------------------------------------------


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
    excess = np.abs(loss - options.get("reference_weight", 1.0) * reference_loss)
    size = 1.0 + float(np.max(excess)) / options["temperature"] + abs(float(expected["log_inner"]))
    return {
        "risk": size * options["temperature"],
        "weights": size * np.max(expected["weights"]),
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
    total, terms = np.zeros((2, b)), np.ones((2, b))
    for side in range(2):
        for anchor in range(b):
            row, positive, negatives = _anchor(arguments, side, anchor, views=sides[0] == "view1")
            if not negatives:
                continue
            t, u = float(temperatures[side][anchor]), float(np.exp(expected[f"log_inner_{sides[side]}"][anchor]))
            w = np.array(pair_weights(row, positive, negatives, t, u, eps=eps_))[negatives]
            D = np.array(pair_exponents(row, positive, negatives, t))
            total[side, anchor] = float(np.sum(w))
            level = abs(np.log(eps_ + u)) + radius_
            terms[side, anchor] = max(1.0, level, float(np.sum(w * np.abs(D))))
    warmest = max(float(np.max(side)) for side in temperatures)
    gradient = float(np.max(total[0] + total[1])) / (2 * b)
    slope: Any = tuple(np.full(b, np.max(side) / (2 * b)) for side in terms) if two_sided else float(np.max(terms))
    return {
        "loss": max(abs(float(expected["loss"])), warmest),
        "surrogate": max(abs(float(expected["surrogate"])), warmest),
        f"{sides[0]}_gradient": gradient,
        f"{sides[1]}_gradient": gradient,
        "temperature_gradient": slope,
        **{name: np.maximum(1.0, np.abs(expected[name])) for name in (f"log_inner_{side}" for side in sides)},
    }


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
        scales["temperature_gradient"] = 2.0 * steepness**2
    for name in ("scale_gradient", "bias_gradient"):
        if name in expected:
            scales[name] = max(1.0, abs(float(expected[name])))
    return scales


def value_scales(arguments: Arguments, expected: Mapping[str, Any]) -> dict[str, Any]:
    """Values against the largest of the arguments and the answer."""
    del arguments
    return {"value": max(1.0, float(np.max(np.abs(expected["value"]))))}


def index_scales(arguments: Arguments, expected: Mapping[str, Any]) -> dict[str, Any]:
    """Indices are right or wrong."""
    del arguments, expected
    return {"index": 1.0}


SCALES: dict[str, Callable[[Arguments, Mapping[str, Any]], dict[str, Any]]] = {
    "worst_case": risk_scales,
    "drrho_risk": risk_scales,
    "excess_loss": value_scales,
    "moving_average_kl": average_scales,
    "contrastive_step": step_scales,
    "unimodal_contrastive_step": step_scales,
    "scent_gamma": value_scales,
    "cosine_gamma": value_scales,
    "recommended_gamma_min": value_scales,
    "info_nce": loss_scales,
    "sigmoid_loss": loss_scales,
    "distillation_loss": loss_scales,
    "hinge_margin_loss": loss_scales,
    "select_top_excess": index_scales,
    "select_jest": index_scales,
}
FUNCTIONS = tuple(SCALES)
SINGLE = {name: "value" for name, scales in SCALES.items() if scales is value_scales} | {
    name: "index" for name, scales in SCALES.items() if scales is index_scales
}
SET_NAMES = tuple(one.name for one in _SETS)


def oracle_set(ambiguity_set: SetOf) -> Any:
    """Return the oracle's own set."""
    return ambiguity_set.build(sets)


def bound(function: str, arguments: Arguments, dtype: str) -> float:
    """Return how large an error may be."""
    if function in ("worst_case", "drrho_risk"):
        return {"float64": 1e-10, "float32": 1e-5}[dtype]
    unit = {"float64": 1e-12, "float32": 5e-6}[dtype]
    temperature = arguments.options.get("temperature", 1.0)
    coldest = min(float(np.min(side)) for side in (temperature if isinstance(temperature, tuple) else (temperature,)))
    return max(1.0, 0.1 / coldest) * unit
