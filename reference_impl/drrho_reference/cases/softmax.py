"""Exact answers at any temperature, and bounds of the gradients' errors from the error of an ordinary softmax.

The oracle cannot answer the problems of ``large_logits.py``, because exponentials leave the range of float64. A fixed
bound of the errors would be too strict for large logits: a similarity is rounded before it is divided by the
temperature t, so a float32 gradient at 1/t = 1e6 has an error of some percent in any implementation. Therefore the
bound is computed from the error of an ordinary softmax, in log-sum-exp form, on the same inputs in the same dtype
(:func:`gradients` with ``exact=False``). The bound is twice this error plus 1e-6 (float32) or 1e-12 (float64) of the
largest entry. The error of a softmax depends on the order in which products are summed, so the largest error of 32
orders is used. In float64 the products of these inputs are exact, so the softmax lacks an error that it has on other
inputs, the rounding of products. Therefore epsilon times the largest logit, an allowance for this error, is added to
the bound in float64. An implementation exceeds the bound if another step of its computation loses digits in proportion
to 1/t.

The exact answers are computed in float64. Entries of features are multiples of a power of two, so that the similarities
z are exact in float64. Then a softmax of (z - max z) / t has an error of some ulp for any t.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from drrho_reference._checks import FloatArray
from drrho_reference.cases.draws import SIDES, STEPS, equal_states
from drrho_reference.cases.problem import Answer, Arguments
from drrho_reference.unimodal import view_positions

Table = npt.NDArray[Any]

# UNIT: the bound of all fields except feature gradients. SURPLUS: the constant part of a feature gradient's bound.
UNIT = {"float64": 1e-12, "float32": 5e-6}
SURPLUS = {"float64": 1e-12, "float32": 1e-6}
# The number of orders of summation; the largest error among these orders sets the bound.
ORDERS = 32


class SimilarityTables:
    """Tables of similarities whose rows are anchors, with the positive and the candidates of each anchor.

    ``contrastive_step`` and the other losses of pairs have two tables, Z and its transpose; two views have one table of
    2 b rows. ``candidates`` marks the entries of a row that are summed in the log-sum-exp. ``size`` is an upper bound
    of the absolute similarities.
    """

    def __init__(self, function: str, arguments: Arguments, dtype: Any) -> None:
        options = arguments.options
        first, second = (np.asarray(side, dtype=dtype) for side in arguments.positional[:2])
        self.b = b = len(first)
        self.views = function == "unimodal_contrastive_step"
        self.left, self.right = (np.concatenate([first, second]),) * 2 if self.views else (first, second)
        table = self.left @ self.right.T
        self.size = float(np.max(np.linalg.norm(self.left, axis=1)) * np.max(np.linalg.norm(self.right, axis=1)))
        # z_ij = s_ij - lambda s^ref_ij: the reference model's similarities are subtracted before the division by t.
        if "reference_features" in options:
            r1, r2 = (np.asarray(side, dtype=dtype) for side in options["reference_features"])
            weight = dtype(options.get("reference_weight", 1.0))
            if self.views:
                r1 = r2 = np.concatenate([r1, r2])
            table = table - weight * (r1 @ r2.T)
            self.size += float(weight * np.max(np.linalg.norm(r1, axis=1)) * np.max(np.linalg.norm(r2, axis=1)))
        self.tables = [table] if self.views else [table, table.T]
        self.positive = [view_positions(a, b)[0] for a in range(2 * b)] if self.views else list(range(b))
        # The log-sum-exp of a step is over the negatives only; in InfoNCE and distillation it includes the positive.
        n = len(table)
        self.candidates = np.ones((n, n), dtype=bool)
        if function in STEPS:
            self.candidates[np.arange(n), np.arange(n)] = False
            self.candidates[np.arange(n), self.positive] = False
        sides = [
            two_sides(options["temperature"], b),
            two_sides(1.0 if options.get("anchor_weight") is None else options["anchor_weight"], b),
        ]
        self.temperatures, self.factors = (
            [np.concatenate(pair).astype(dtype)] if self.views else [side.astype(dtype) for side in pair]
            for pair in sides
        )


def two_sides(value: Any, b: int) -> tuple[FloatArray, FloatArray]:
    """Return two arrays with one entry per anchor, one array per side."""
    first, second = value if isinstance(value, tuple) else (value, value)
    return np.broadcast_to(first, b).astype(np.float64), np.broadcast_to(second, b).astype(np.float64)


def softmax(table: Table, candidates: Any, temperature: Table, *, exact: bool) -> Table:
    """Return the softmax of each row over its candidates.

    If ``exact`` is true, the largest score is subtracted before the division by the temperature. Otherwise the logits
    are computed first, as usual, and their rounding errors grow with their size.
    """
    scores = np.where(candidates, table, -np.inf)
    if exact:
        shifted = (scores - np.max(scores, axis=1, keepdims=True)) / temperature[:, None]
    else:
        logits = scores / temperature[:, None]
        shifted = logits - np.max(logits, axis=1, keepdims=True)
    exponentials = np.exp(shifted)
    return np.asarray(exponentials / np.sum(exponentials, axis=1, keepdims=True))


def gradients(function: str, arguments: Arguments, dtype: Any, *, exact: bool) -> tuple[Table, Table]:
    """Return the feature gradients M E2 / 2b and M^T E1 / 2b, computed in one dtype.

    E1 and E2 are the features. M_ij is 2b times the derivative of the loss in the similarity of image i and text j. M
    is the sum of two tables, one per direction. In the table of a direction, a row or a column belongs to an anchor and
    holds the weights of its candidates; the entry of the positive makes the sum of the row or column 0.
    """
    # The target of distillation is the softmax of the reference model; the target of other losses is the positive.
    batch = SimilarityTables(function, arguments, dtype)
    b, slopes = batch.b, np.zeros(batch.tables[0].shape, dtype=dtype)
    targets = [np.zeros_like(slopes)] * 2
    if function == "distillation_loss":
        options = {"temperature": arguments.options["reference_temperature"]}
        teacher = SimilarityTables(function, Arguments(arguments.positional[2:], options, {}), dtype)
        targets = [
            softmax(table, teacher.candidates, t, exact=exact)
            for table, t in zip(teacher.tables, teacher.temperatures, strict=True)
        ]
    for side, (table, temperature, factor) in enumerate(
        zip(batch.tables, batch.temperatures, batch.factors, strict=True)
    ):
        # The slopes of one direction are the softmax minus the target, so the sum of every row is 0.
        rows = softmax(table, batch.candidates, temperature, exact=exact)
        if function == "distillation_loss":
            rows = rows - targets[side]
        else:
            rows[np.arange(len(rows)), batch.positive] -= np.sum(rows, axis=1)
        # Steps multiply the loss by t, so only the other losses have the factor 1/t in their slopes.
        if function not in STEPS:
            rows = rows / temperature[:, None]
        rows = factor[:, None] * rows
        slopes += rows if side == 0 else rows.T
    # The rows and the columns of the table of two views are the same features, so the slopes and their transpose add
    # up.
    if batch.views:
        gradient = (slopes + slopes.T) @ batch.left / dtype(2 * b)
        return gradient[:b], gradient[b:]
    return slopes @ batch.right / dtype(2 * b), slopes.T @ batch.left / dtype(2 * b)


def step_answer(function: str, arguments: Arguments, dtype: str) -> Answer:
    """Compute the right answer of a step, from log g and the weights w = softmax(D) of every anchor.

    The step has no old estimates and eps = 0. The temperature gradient is log g - sum_j w_j D_j. With d = D - max D it
    is log mean exp(d) - sum_j w_j d_j, in which large terms no longer cancel.
    """
    batch, names = SimilarityTables(function, arguments, np.float64), SIDES[function]
    b, states, losses, slopes, terms = batch.b, [], [], [], []
    for table, t, factor in zip(batch.tables, batch.temperatures, batch.factors, strict=True):
        # log g = (max z - z_ii) / t + log mean exp(d), and the weights w_j = exp(d_j) / sum exp(d).
        w = softmax(table, batch.candidates, t, exact=True)
        peak = np.max(np.where(batch.candidates, table, -np.inf), axis=1)
        d = np.where(batch.candidates, (table - peak[:, None]) / t[:, None], 0.0)
        means = np.sum(np.where(batch.candidates, np.exp(d), 0.0), axis=1) / np.sum(batch.candidates, axis=1)
        log_g = (peak - table[np.arange(len(table)), batch.positive]) / t + np.log(means)
        states.append(log_g)
        losses.append(factor * t * log_g)
        slopes.append(factor * (np.log(means) - np.sum(w * d, axis=1)))
        terms.append(factor * (1.0 + batch.size / t))
    if batch.views:
        states, slopes, terms = ([*np.split(values[0], 2)] for values in (states, slopes, terms))
    # The loss is the sum of t log g over the anchors of both sides, divided by 2b. Its error is compared with the
    # largest similarity.
    loss = math.fsum(np.concatenate(losses)) / (2 * b)
    warmest = max(float(np.max(f * t)) for f, t in zip(batch.factors, batch.temperatures, strict=True))
    two_sided = isinstance(arguments.options["temperature"], tuple)
    size = max(abs(loss), warmest, batch.size * float(np.max(batch.factors)))
    total = math.fsum(np.concatenate([t * f for t, f in zip(batch.temperatures, batch.factors, strict=True)]))
    # With no old estimates and eps = 0 the weights of an anchor sum to 1, so surrogate - loss = sum of t / 2b.
    expected = {
        "loss": np.asarray(loss),
        "surrogate": np.asarray(loss + total / (2 * b)),
        "temperature_gradient": (
            tuple(slope / (2 * b) for slope in slopes)
            if two_sided
            else np.asarray(math.fsum(np.concatenate(slopes)) / (2 * b))
        ),
        **{f"log_inner_{name}": state for name, state in zip(names, states, strict=True)},
    }
    scales = {
        "loss": size,
        "surrogate": size,
        "temperature_gradient": (
            tuple(np.full(b, np.max(term)) / (2 * b) for term in terms) if two_sided else float(np.max(terms))
        ),
        **{
            f"log_inner_{name}": 1.0 + batch.size / t
            for name, t in zip(names, two_sides(arguments.options["temperature"], b), strict=True)
        },
    }
    return _with_gradients(function, arguments, dtype, expected, scales, names)


def loss_answer(function: str, arguments: Arguments, dtype: str) -> Answer:
    """Compute InfoNCE or distillation exactly: the cross-entropy of the rows and columns of S / t with the targets."""
    batch = SimilarityTables(function, arguments, np.float64)
    t, b, losses, slopes = float(arguments.options["temperature"]), batch.b, [], []
    teacher = None
    if function == "distillation_loss":
        options = {"temperature": arguments.options["reference_temperature"]}
        teacher = SimilarityTables(function, Arguments(arguments.positional[2:], options, {}), np.float64)
    for side, (table, factor) in enumerate(zip(batch.tables, batch.factors, strict=True)):
        # The cross-entropy of a row is log sum exp(z / t) - sum target z / t, with the row's largest logit subtracted.
        target = np.eye(b)
        if teacher is not None:
            target = softmax(teacher.tables[side], teacher.candidates, teacher.temperatures[side], exact=True)
        q = softmax(table, batch.candidates, batch.temperatures[side], exact=True)
        below = (np.max(table, axis=1, keepdims=True) - table) / t
        losses.append(factor * (np.log(np.sum(np.exp(-below), axis=1)) + np.sum(target * below, axis=1)))
        # The temperature gradient of a row is the sum of -(q - target) (z - max z) / t^2.
        slopes.append(factor * np.sum((q - target) * below, axis=1) / t)
    expected = {
        "loss": np.asarray(math.fsum(np.concatenate(losses)) / (2 * b)),
        "temperature_gradient": np.asarray(math.fsum(np.concatenate(slopes)) / (2 * b)),
    }
    largest = float(np.max(batch.factors))
    scales = {"loss": largest * (1.0 + batch.size / t), "temperature_gradient": 2.0 * largest * batch.size / t**2}
    return _with_gradients(function, arguments, dtype, expected, scales, ("image", "text"))


def pair_loss_answer(function: str, arguments: Arguments, dtype: str) -> Answer:
    """Compute a pair loss exactly: the mean of log g over both anchors of a pair."""
    del function
    options = {"temperature": arguments.options["temperature"]}
    given = Arguments((*arguments.positional, *equal_states(len(arguments.positional[0]))), options, {})
    step = step_answer("contrastive_step", given, dtype)
    value = (step.expected["log_inner_image"] + step.expected["log_inner_text"]) / 2.0
    return Answer({"value": value}, {"value": step.scales["log_inner_image"]}, {"value": UNIT[dtype]})


def _with_gradients(
    function: str,
    arguments: Arguments,
    dtype: str,
    expected: dict[str, Any],
    scales: dict[str, Any],
    names: tuple[str, str],
) -> Answer:
    """Add the feature gradients to the answer; their bound is twice an ordinary softmax's error plus a constant."""
    # The error of an ordinary softmax is the largest error among ORDERS orders of summation.
    exact = gradients(function, arguments, np.float64, exact=True)
    errors = np.zeros((ORDERS, 2))
    for seed in range(ORDERS):
        order = np.random.default_rng(seed).permutation(arguments.positional[0].shape[1])
        compared = gradients(function, _reordered(arguments, order, seed), np.dtype(dtype).type, exact=False)
        for side in range(2):
            errors[seed, side] = np.max(np.abs(compared[side].astype(np.float64) - exact[side][:, order]))
    bounds, surplus = dict.fromkeys(expected, UNIT[dtype]), SURPLUS[dtype]
    # In float64 the products of these inputs are exact, so an allowance for the rounding of products is added, as the
    # docstring of this module explains.
    if dtype == "float64":
        batch = SimilarityTables(function, arguments, np.float64)
        surplus += float(np.finfo(dtype).eps) * batch.size / min(float(np.min(t)) for t in batch.temperatures)
    for name, right, error in zip(names, exact, np.max(errors, axis=0), strict=True):
        field, largest = f"{name}_gradient", float(np.max(np.abs(right)))
        expected[field], scales[field] = right, largest
        bounds[field] = 2.0 * float(error) / largest + surplus
    return Answer(expected, scales, bounds)


def _reordered(arguments: Arguments, order: Any, seed: int) -> Arguments:
    """Permute the columns of both models' features, so that the products are summed in another order."""
    first, second, *others = arguments.positional
    options = dict(arguments.options)
    if "reference_features" in options:
        left, right = options["reference_features"]
        own = np.random.default_rng([seed, 1]).permutation(left.shape[1])
        options["reference_features"] = (left[:, own], right[:, own])
    return Arguments((first[:, order], second[:, order], *others), options, {})
