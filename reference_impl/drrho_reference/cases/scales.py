"""Sizes that errors are divided by, and bounds of these relative errors.

If a result is a sum, its error is divided by the size of the terms, because the terms may cancel: the difference of two
numbers near 1 may be almost 0, but its error is as large as the errors of the two numbers. In this file, "compare a
field with a size" means that the error of the field is divided by this size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from drrho_reference._checks import FloatArray, anchor_weights
from drrho_reference.anchor import pair_exponents, pair_similarities, pair_weights
from drrho_reference.cases.problem import Arguments, SetOf
from drrho_reference.contrastive import negative_pairs
from drrho_reference.unimodal import view_positions


def slope_scales(arguments: Arguments, expected: Mapping[str, Any]) -> dict[str, Any]:
    """Compare the gradient of a slice with its largest entry, or with 1 if all entries are 0."""
    axis = arguments.options.get("axis", -1)
    largest = np.max(np.abs(expected["value"]), axis=axis, keepdims=True)
    return {"value": np.where(largest == 0.0, 1.0, largest)}


def risk_scales(arguments: Arguments, expected: Mapping[str, Any]) -> dict[str, Any]:
    """Compare a risk with the largest loss that counts in its slice, and weights with the slice's largest weight."""
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
    """Return the value of the dual problem at the pair (nu, s), in float64.

    The pair (nu, s) holds the multipliers of the constraints. By weak duality the value is at least the risk, and equal
    to the risk only if the pair is optimal. Several pairs may be optimal, so the values are compared and not the pairs.
    """
    values, ambiguity_set = arguments.positional[0], arguments.positional[-1]
    if len(arguments.positional) > 2:
        values = values - arguments.options.get("reference_weight", 1.0) * arguments.positional[1]
    axis = arguments.options.get("axis", -1)
    counted = np.broadcast_to(arguments.options.get("where", True), np.shape(values))
    values, counted = np.moveaxis(values, axis, -1), np.moveaxis(counted, axis, -1)
    nus, scales = (np.asarray(part, dtype=np.float64) for part in dual)
    certified = np.empty(values.shape[:-1])
    for row in np.ndindex(certified.shape):
        certified[row] = _certified(values[row][counted[row]], ambiguity_set, float(nus[row]), float(scales[row]))
    return certified


def _certified(x: FloatArray, ambiguity_set: SetOf, nu: float, s: float) -> float:
    """Return the dual value of one slice: nu + s radius + s mean phi*((x - nu) / s), phi* the conjugate of phi."""
    parameters = ambiguity_set.parameters
    # CVaR (Rockafellar and Uryasev): nu + mean(max(x - nu, 0)) / alpha.
    if ambiguity_set.name == "CVaR":
        return nu + float(np.mean(np.maximum(x - nu, 0.0))) / parameters["alpha"]
    # Capped KL: the conjugate is e^y - 1 up to y = -log(alpha) and a line of slope 1/alpha beyond.
    if ambiguity_set.name == "CappedKLPenalty":
        y, log_cap = (x - nu) / s, -np.log(parameters["alpha"])
        below = np.expm1(np.minimum(y, log_cap))
        return nu + s * float(np.mean(below + np.maximum(y - log_cap, 0.0) / parameters["alpha"]))
    if s in (0.0, np.inf):  # s = 0: the ball is saturated; s = inf: the radius is 0
        return nu
    # Cressie-Read of order k: phi*(y) = (max(1 + (k - 1) y, 0)^(k / (k - 1)) - 1) / k; KL is the limit k = 1 and
    # chi-square is k = 2.
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
    """Compare all fields with a size that grows as rounding errors do: 1 + largest |x| / temperature + |log u|.

    x are the excess losses. The risk is compared with this size times the temperature, and weights are compared with
    this size times the largest weight.
    """
    loss, reference_loss, _ = arguments.positional
    options = arguments.options
    excess = np.abs(loss - options.get("reference_weight", 1.0) * reference_loss)[options.get("where", ...)]
    size = 1.0 + float(np.max(excess)) / options["temperature"] + abs(float(expected["log_inner"]))
    return {
        "risk": size * options["temperature"],
        "weights": size
        * max(float(np.max(expected["weights"])), 1.0 / loss.size),  # a huge old u may make all weights 0
        "log_inner": size,
    }


def step_scales(arguments: Arguments, expected: Mapping[str, Any]) -> dict[str, Any]:
    """Compare each result of a step with the size of the terms whose sum the result is."""
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
            # The weights w_ij of the anchor's negatives and the exponents D_ij = (s_ij - s_ii) / t.
            t, u = float(temperatures[side][anchor]), float(np.exp(expected[f"log_inner_{sides[side]}"][anchor]))
            w = np.array(pair_weights(row, positive, negatives, t, u, eps=eps_))[negatives]
            D = np.array(pair_exponents(row, positive, negatives, t))
            # A feature gradient sums w_ij; a temperature gradient sums log(eps + u), the radius and w_ij D_ij.
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
    """Return max(1, |log u|) for each sample; 1 for a sample that was never visited."""
    return np.where(np.isfinite(state), np.maximum(1.0, np.abs(state)), 1.0)


def _twice(options: Mapping[str, Any]) -> tuple[Any, Any]:
    return options["temperature"], options["temperature"]


def _anchor(arguments: Arguments, side: int, anchor: int, *, views: bool) -> tuple[FloatArray, int, list[int]]:
    """Return an anchor's similarities, and the positions of the positive and of the negatives among them."""
    first, second = arguments.positional[:2]
    options = {
        name: arguments.options[name]
        for name in ("reference_features", "reference_weight")
        if name in arguments.options
    }
    b = len(first)
    # Two views form one table of 2 b rows; an anchor's negatives are all rows except the two views of its own sample.
    if views:
        rows = np.concatenate([first, second])
        if "reference_features" in options:
            options["reference_features"] = (np.concatenate(options["reference_features"]),) * 2
        position = anchor + side * b
        positive, negatives = view_positions(position, b)
        return pair_similarities(rows, rows, **options)[position], positive, negatives
    Z = pair_similarities(first, second, **options)
    allowed = negative_pairs(arguments.options.get("pair_mask"), b)
    if side == 1:
        Z, allowed = Z.T, allowed.T
    return Z[anchor], anchor, [int(j) for j in np.flatnonzero(allowed[anchor])]


def loss_scales(arguments: Arguments, expected: Mapping[str, Any]) -> dict[str, Any]:
    """Compare a loss with max(1, |loss|), and feature gradients with the largest derivative in a pair's similarity.

    The derivative of the loss in a logit is at most 2 / 2b. A logit is a similarity times the scale, or divided by the
    temperature, so the derivative in a similarity is at most 1 / b times the scale, or times 1 / temperature.
    """
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
    """Compare values with max(1, the largest absolute entry of the answer)."""
    del arguments
    return {"value": max(1.0, float(np.max(np.abs(expected["value"]))))}


def posterior_scales(arguments: Arguments, expected: Mapping[str, Any]) -> dict[str, Any]:
    """Compare weights with the largest weight, the share with 1 and the slope with itself."""
    del arguments
    largest = float(np.max(expected["anchor_weight"]))
    return {"anchor_weight": largest, "swapped_share": 1.0, "slope": float(expected["slope"])}


def estimator_scales(arguments: Arguments, expected: Mapping[str, Any]) -> dict[str, Any]:
    """Compare each state log u with max(1, |log u|)."""
    del arguments
    return {name: tuple(map(_state_scale, pair)) for name, pair in expected.items()}


def sum_scales(arguments: Arguments, expected: Mapping[str, Any]) -> dict[str, Any]:
    """Compare a weighted sum with sum_k |weight of term k| times the largest absolute entry of term k."""

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
    """Compare variances with the largest square of an excess loss."""
    loss, reference_loss = arguments.positional
    excess = np.where(arguments.options["where"], loss - arguments.options["reference_weight"] * reference_loss, 0.0)
    return dict.fromkeys(expected, float(np.max(excess**2)))


def bias_scales(arguments: Arguments, expected: Mapping[str, Any]) -> dict[str, Any]:
    """Compare a difference of risks with the temperature plus the largest loss."""
    return dict.fromkeys(expected, arguments.options["temperature"] + float(np.max(np.abs(arguments.positional[0]))))


def fit_scales(arguments: Arguments, expected: Mapping[str, Any]) -> dict[str, Any]:
    """Compare the prefactor with itself times (1 + max |log C|), a floor with the smallest error, the rest with 1.

    C is the compute. The fit is a line in log C, and the prefactor is exp of the line's value at log C = 0. So the
    error of the prefactor grows with the distance of the points from log C = 0.
    """
    compute, error = arguments.positional
    counted = arguments.options.get("where", np.ones(len(compute), dtype=bool))
    prefactor = float(expected["prefactor"]) * (1.0 + float(np.max(np.abs(np.log(compute[counted])))))
    return dict.fromkeys(expected, 1.0) | {"prefactor": prefactor, "floor": float(np.min(error[counted]))}


def index_scales(arguments: Arguments, expected: Mapping[str, Any]) -> dict[str, Any]:
    """Compare indices with 1: the error of a wrong index is at least 1."""
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
    "posterior_anchor_weight": posterior_scales,
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
# Functions that a complete implementation may lack: only wrappers for libraries with autograd need them.
WRAPPERS = ("drrho_risk_vjp",)
# Functions that return one array, and the name that the array has in a report.
SINGLE = {name: "value" for name, scales in SCALES.items() if scales in (value_scales, slope_scales)} | {
    name: "index" for name, scales in SCALES.items() if scales is index_scales
}


def bound(function: str, arguments: Arguments, dtype: str) -> float:
    """Return the largest relative error that passes: 1e-12 in float64 and 5e-6 in float32, or more in two cases.

    The bound is larger if a search computes the result, and if a temperature is below 0.1.
    """
    # Some ambiguity sets are solved by a search for nu and s.
    if function in ("worst_case", "drrho_risk", "drrho_risk_vjp"):
        return {"float64": 1e-10, "float32": 1e-5}[dtype]
    unit = {"float64": 1e-12, "float32": 5e-6}[dtype]
    if function == "fit_scaling_law" and arguments.options.get("with_floor"):
        # A search finds the floor that minimises the misfit of the fit. The misfit is flat near its minimum, so only
        # about half of the floor's digits are right.
        return {"float64": 1e-6, "float32": 1e-3}[dtype]
    # Exponents have the size 1/t, and so have their rounding errors: for t below 0.1 the bound grows with 1/t.
    temperature = arguments.options.get("temperature", 1.0)
    coldest = min(float(np.min(side)) for side in (temperature if isinstance(temperature, tuple) else (temperature,)))
    return max(1.0, 0.1 / coldest) * unit
