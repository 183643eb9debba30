"""The conformance kit's problems with large logits: 1/t up to 1e10, features without a norm, large reference weights.

The oracle's linear domain ends where exp leaves float64, and a fixed bound would be too strict here: a similarity is
rounded before it is divided by t, so a float32 gradient at 1/t = 1e6 is off by some percent in any implementation.
Therefore errors are compared with the error that a softmax in log-sum-exp form makes on the same inputs in the same
dtype (:func:`_gradients` with ``exact=False``). Twice that error is allowed, plus 1e-6 of the largest entry in float32
and 1e-12 in float64. The error of one softmax depends on the order in which products are summed, so it is the largest
of 32 orders. In float64 the products of these inputs are exact, which they are in no other batch, so epsilon times the
largest logit is allowed as well. An implementation that rounds a threshold of the size 1/t exceeds the bound.

The exact answers need no long arithmetic. Feature entries are multiples of a power of two, so that a product of two
features is exact in float64, and a softmax of (z - max z) / t then has an error of some ulp for any t.

The second half of the module reads the sum of an anchor's weights. A weight of 1 for one anchor and 0 for all others
leaves the weights w_ij of this anchor alone in the gradient: for an image anchor i,

    sum over j != i of text_gradient_j = (sum_j w_ij) image_i / 2b        surrogate - loss = t_i (sum_j w_ij) / 2b

and likewise for text anchors. No such sum may exceed 1/gamma.
"""

from __future__ import annotations

import functools
import math
import types
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from drrho_reference._cases import BATCH, NEVER, PROBLEMS, WIDTH, Answer, Arguments, Problem, to_numpy
from drrho_reference._checks import FloatArray
from drrho_reference.unimodal import view_positions

Generator = Any  # np.random.Generator would load numpy.random with the package
Draw = Callable[[Generator], tuple[Any, ...]]
Table = npt.NDArray[Any]

SIZE, FEATURES, REFERENCE_FEATURES = 24, 8, 6
UNIT = {"float64": 1e-12, "float32": 5e-6}
SURPLUS = {"float64": 1e-12, "float32": 1e-6}
SUM_UNIT = {"float64": 1e-10, "float32": 1e-5}
ORDERS = 32
COLDNESS = ("1e0", "1e2", "1e4", "1e5", "1e6", "1e8", "1e10")
STEPS = ("contrastive_step", "unimodal_contrastive_step")
SIDES = {"contrastive_step": ("image", "text"), "unimodal_contrastive_step": ("view1", "view2")}


# ---------------------------------------------------------------------------------------------------------------------
# Inputs
# ---------------------------------------------------------------------------------------------------------------------


def _rows(rng: Generator, size: int, width: int, distance: float, norm: float = 1.0) -> FloatArray:
    """Draw rows of a norm, multiples of 2^-22 of it; three neighbours at a time are about ``distance`` apart."""
    rows = rng.normal(size=(size, width))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    if distance > 0.0:
        rows = rows[[i - i % 3 for i in range(size)]] + distance * rng.normal(size=(size, width))
    return np.asarray(norm * np.round(rows * 2.0**22) / 2.0**22, dtype=np.float64)


def _distance(temperature: float) -> float:
    """Return how far neighbours are apart: where t reaches the rounding of float32, a near tie is nobody's fault.

    Above that, neighbours whose logits differ by about 1 share an anchor's weight, and rounding moves it between them.
    """
    return temperature if 1e-6 <= temperature <= 1e-2 else 0.0


def _pairs(rng: Generator, distance: float, *, norm: float = 1.0) -> tuple[FloatArray, FloatArray]:
    return _rows(rng, SIZE, FEATURES, distance, norm), _rows(rng, SIZE, FEATURES, distance, norm)


def _states(size: int, value: float = NEVER) -> tuple[FloatArray, FloatArray]:
    return np.full(size, value), np.full(size, value)


# ---------------------------------------------------------------------------------------------------------------------
# Exact answers, and the softmax to compare with
# ---------------------------------------------------------------------------------------------------------------------


class _Batch:
    """A table of similarities whose rows are anchors, with the positive and the candidates of each anchor.

    ``contrastive_step`` and the other losses of pairs have two tables, Z and its transpose; two views have one table of
    2 b rows. ``candidates`` marks what the log-sum-exp of an anchor runs over.
    """

    def __init__(self, function: str, arguments: Arguments, dtype: Any) -> None:
        options = arguments.options
        first, second = (np.asarray(side, dtype=dtype) for side in arguments.positional[:2])
        self.b = b = len(first)
        self.views = function == "unimodal_contrastive_step"
        self.left, self.right = (np.concatenate([first, second]),) * 2 if self.views else (first, second)
        table = self.left @ self.right.T
        self.size = float(np.max(np.linalg.norm(self.left, axis=1)) * np.max(np.linalg.norm(self.right, axis=1)))
        if "reference_features" in options:
            r1, r2 = (np.asarray(side, dtype=dtype) for side in options["reference_features"])
            weight = dtype(options.get("reference_weight", 1.0))
            if self.views:
                r1 = r2 = np.concatenate([r1, r2])
            table = table - weight * (r1 @ r2.T)
            self.size += float(weight * np.max(np.linalg.norm(r1, axis=1)) * np.max(np.linalg.norm(r2, axis=1)))
        self.tables = [table] if self.views else [table, table.T]
        self.positive = [view_positions(a, b)[0] for a in range(2 * b)] if self.views else list(range(b))
        n = len(table)
        self.candidates = np.ones((n, n), dtype=bool)
        if function in STEPS:
            self.candidates[np.arange(n), np.arange(n)] = False
            self.candidates[np.arange(n), self.positive] = False
        sides = [
            _two_sides(options["temperature"], b),
            _two_sides(1.0 if options.get("anchor_weight") is None else options["anchor_weight"], b),
        ]
        self.temperatures, self.factors = (
            [np.concatenate(pair).astype(dtype)] if self.views else [side.astype(dtype) for side in pair]
            for pair in sides
        )


def _two_sides(value: Any, b: int) -> tuple[FloatArray, FloatArray]:
    """Return one entry per anchor of both sides."""
    first, second = value if isinstance(value, tuple) else (value, value)
    return np.broadcast_to(first, b).astype(np.float64), np.broadcast_to(second, b).astype(np.float64)


def _softmax(table: Table, candidates: Any, temperature: Table, *, exact: bool) -> Table:
    """Return the softmax of each row over its candidates.

    ``exact`` subtracts before it divides. Otherwise logits are made first, as usual, and are rounded at their size.
    """
    scores = np.where(candidates, table, -np.inf)
    if exact:
        shifted = (scores - np.max(scores, axis=1, keepdims=True)) / temperature[:, None]
    else:
        logits = scores / temperature[:, None]
        shifted = logits - np.max(logits, axis=1, keepdims=True)
    exponentials = np.exp(shifted)
    return np.asarray(exponentials / np.sum(exponentials, axis=1, keepdims=True))


def _gradients(function: str, arguments: Arguments, dtype: Any, *, exact: bool) -> tuple[Table, Table]:
    """Return the feature gradients, all sums in one dtype: M E2 / 2b and M^T E1 / 2b with M the slopes of the pairs.

    An anchor's row of M holds the weights of its candidates, and at its positive minus their sum.
    """
    batch = _Batch(function, arguments, dtype)
    b, slopes = batch.b, np.zeros(batch.tables[0].shape, dtype=dtype)
    targets = [np.zeros_like(slopes)] * 2
    if function == "distillation_loss":
        options = {"temperature": arguments.options["reference_temperature"]}
        teacher = _Batch(function, Arguments(arguments.positional[2:], options, {}), dtype)
        targets = [
            _softmax(table, teacher.candidates, t, exact=exact)
            for table, t in zip(teacher.tables, teacher.temperatures, strict=True)
        ]
    for side, (table, temperature, factor) in enumerate(
        zip(batch.tables, batch.temperatures, batch.factors, strict=True)
    ):
        rows = _softmax(table, batch.candidates, temperature, exact=exact)
        if function == "distillation_loss":
            rows = rows - targets[side]
        else:
            rows[np.arange(len(rows)), batch.positive] -= np.sum(rows, axis=1)
        if function not in STEPS:
            rows = rows / temperature[:, None]
        rows = factor[:, None] * rows
        slopes += rows if side == 0 else rows.T
    if batch.views:
        gradient = (slopes + slopes.T) @ batch.left / dtype(2 * b)
        return gradient[:b], gradient[b:]
    return slopes @ batch.right / dtype(2 * b), slopes.T @ batch.left / dtype(2 * b)


def _step_answer(function: str, arguments: Arguments, dtype: str) -> Answer:
    """Answer a step without memory and floor: log g, the weights softmax(D), and what follows from both.

    With d = D - max D the temperature gradient L - sum_j w_j D_j is log mean exp(d) - sum_j w_j d_j: nothing cancels.
    """
    batch, names = _Batch(function, arguments, np.float64), SIDES[function]
    b, states, losses, slopes, terms = batch.b, [], [], [], []
    for table, t, factor in zip(batch.tables, batch.temperatures, batch.factors, strict=True):
        w = _softmax(table, batch.candidates, t, exact=True)
        peak = np.max(np.where(batch.candidates, table, -np.inf), axis=1)
        d = np.where(batch.candidates, (table - peak[:, None]) / t[:, None], 0.0)
        means = np.sum(np.where(batch.candidates, np.exp(d), 0.0), axis=1) / np.sum(batch.candidates, axis=1)
        log_g = (peak - table[np.arange(len(table)), batch.positive]) / t + np.log(means)
        states.append(log_g)
        losses.append(factor * t * log_g)
        slopes.append(factor * (np.log(means) - np.sum(w * d, axis=1)))
        terms.append(factor * (1.0 + batch.size / t))
    if batch.views:
        states, slopes, terms = ([*np.split(one[0], 2)] for one in (states, slopes, terms))
    loss = math.fsum(np.concatenate(losses)) / (2 * b)
    warmest = max(float(np.max(f * t)) for f, t in zip(batch.factors, batch.temperatures, strict=True))
    two_sided = isinstance(arguments.options["temperature"], tuple)
    size = max(abs(loss), warmest, batch.size * float(np.max(batch.factors)))
    total = math.fsum(np.concatenate([t * f for t, f in zip(batch.temperatures, batch.factors, strict=True)]))
    expected = {
        "loss": np.asarray(loss),
        "surrogate": np.asarray(loss + total / (2 * b)),
        "temperature_gradient": (
            tuple(one / (2 * b) for one in slopes)
            if two_sided
            else np.asarray(math.fsum(np.concatenate(slopes)) / (2 * b))
        ),
        **{f"log_inner_{name}": state for name, state in zip(names, states, strict=True)},
    }
    scales = {
        "loss": size,
        "surrogate": size,
        "temperature_gradient": (
            tuple(np.full(b, np.max(one)) / (2 * b) for one in terms) if two_sided else float(np.max(terms))
        ),
        **{
            f"log_inner_{name}": 1.0 + batch.size / t
            for name, t in zip(names, _two_sides(arguments.options["temperature"], b), strict=True)
        },
    }
    return _with_gradients(function, arguments, dtype, expected, scales, names)


def _loss_answer(function: str, arguments: Arguments, dtype: str) -> Answer:
    """Answer a cross-entropy of the rows and columns of S / t: InfoNCE, or distillation from a teacher's softmax."""
    batch = _Batch(function, arguments, np.float64)
    t, b, losses, slopes = float(arguments.options["temperature"]), batch.b, [], []
    teacher = None
    if function == "distillation_loss":
        options = {"temperature": arguments.options["reference_temperature"]}
        teacher = _Batch(function, Arguments(arguments.positional[2:], options, {}), np.float64)
    for side, (table, factor) in enumerate(zip(batch.tables, batch.factors, strict=True)):
        target = np.eye(b)
        if teacher is not None:
            target = _softmax(teacher.tables[side], teacher.candidates, teacher.temperatures[side], exact=True)
        q = _softmax(table, batch.candidates, batch.temperatures[side], exact=True)
        below = (np.max(table, axis=1, keepdims=True) - table) / t
        losses.append(factor * (np.log(np.sum(np.exp(-below), axis=1)) + np.sum(target * below, axis=1)))
        slopes.append(factor * np.sum((q - target) * below, axis=1) / t)  # -(q - target) z / t^2, shifted by the peak
    expected = {
        "loss": np.asarray(math.fsum(np.concatenate(losses)) / (2 * b)),
        "temperature_gradient": np.asarray(math.fsum(np.concatenate(slopes)) / (2 * b)),
    }
    largest = float(np.max(batch.factors))
    scales = {"loss": largest * (1.0 + batch.size / t), "temperature_gradient": 2.0 * largest * batch.size / t**2}
    return _with_gradients(function, arguments, dtype, expected, scales, ("image", "text"))


def _pair_loss_answer(function: str, arguments: Arguments, dtype: str) -> Answer:
    """Answer a pair loss: the mean of the log g of both anchors of a pair."""
    del function
    options = {"temperature": arguments.options["temperature"]}
    given = Arguments((*arguments.positional, *_states(SIZE)), options, {})
    step = _step_answer("contrastive_step", given, dtype)
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
    """Add the feature gradients, with twice the error of the softmax as the bound."""
    exact = _gradients(function, arguments, np.float64, exact=True)
    errors = np.zeros((ORDERS, 2))
    for seed in range(ORDERS):
        order = np.random.default_rng(seed).permutation(FEATURES)
        compared = _gradients(function, _reordered(arguments, order, seed), np.dtype(dtype).type, exact=False)
        for side in range(2):
            errors[seed, side] = np.max(np.abs(compared[side].astype(np.float64) - exact[side][:, order]))
    bounds, surplus = dict.fromkeys(expected, UNIT[dtype]), SURPLUS[dtype]
    if dtype == "float64":
        batch = _Batch(function, arguments, np.float64)
        surplus += float(np.finfo(dtype).eps) * batch.size / min(float(np.min(t)) for t in batch.temperatures)
    for name, right, error in zip(names, exact, np.max(errors, axis=0), strict=True):
        field, largest = f"{name}_gradient", float(np.max(np.abs(right)))
        expected[field], scales[field] = right, largest
        bounds[field] = 2.0 * float(error) / largest + surplus
    return Answer(expected, scales, bounds)


def _reordered(arguments: Arguments, order: Any, seed: int) -> Arguments:
    """Permute the columns of both models' features: the same products, summed in another order."""
    first, second, *others = arguments.positional
    options = dict(arguments.options)
    if "reference_features" in options:
        one, other = options["reference_features"]
        own = np.random.default_rng([seed, 1]).permutation(one.shape[1])
        options["reference_features"] = (one[:, own], other[:, own])
    return Arguments((first[:, order], second[:, order], *others), options, {})


# ---------------------------------------------------------------------------------------------------------------------
# The problems
# ---------------------------------------------------------------------------------------------------------------------

_ANSWERS: Mapping[str, Callable[[str, Arguments, str], Answer]] = types.MappingProxyType(
    {
        "contrastive_step": _step_answer,
        "unimodal_contrastive_step": _step_answer,
        "info_nce": _loss_answer,
        "distillation_loss": _loss_answer,
        "pair_loss": _pair_loss_answer,
    }
)


def _enter(function: str, name: str, sentence: str, draw: Draw) -> None:
    answer = functools.partial(_ANSWERS[function], function)
    PROBLEMS.append(Problem(function, name, sentence, draw, answer=answer))


def _cold(function: str, coldness: str, how: Mapping[str, Any] | None = None) -> Draw:
    """Return a problem at one temperature, fresh states where the function has any."""

    def draw(rng: Generator) -> tuple[Any, ...]:
        t = 1.0 / float(coldness)
        features, options = _pairs(rng, _distance(t)), {"temperature": t}
        if function == "distillation_loss":
            teacher = (_rows(rng, SIZE, REFERENCE_FEATURES, _distance(t)) for _ in range(2))
            return (*features, *teacher), {**options, "reference_temperature": 2.0 * t}
        return (*features, *(_states(SIZE) if function in STEPS else ())), options, dict(how or {})

    return draw


def _unnormalised(function: str) -> Draw:
    def draw(rng: Generator) -> tuple[Any, ...]:
        features = _pairs(rng, 1e-5, norm=32.0)
        return (*features, *(_states(SIZE) if function in STEPS else ())), {"temperature": 2.0**-7}

    return draw


def _steered(rng: Generator) -> tuple[Any, ...]:
    """Draw a reference whose similarities count 64 times."""
    reference = tuple(np.round(_rows(rng, SIZE, REFERENCE_FEATURES, 1e-4) * 2.0**20) / 2.0**20 for _ in range(2))
    options = {"temperature": 2.0**-7, "reference_features": reference, "reference_weight": 64.0}
    return (*_pairs(rng, 0.01), *_states(SIZE)), options


def _unequal(rng: Generator) -> tuple[Any, ...]:
    """Draw temperatures from 1e-6 to 1, one per anchor."""
    temperature = tuple(10.0 ** rng.uniform(-6.0, 0.0, size=(2, SIZE)))
    return (*_pairs(rng, 1e-4), *_states(SIZE)), {"temperature": temperature}


def _weighted(function: str) -> Draw:
    def draw(rng: Generator) -> tuple[Any, ...]:
        weight = tuple(np.where(rng.random(size=(2, SIZE)) < 0.2, 0.0, rng.gamma(2.0, size=(2, SIZE))))
        states = _states(SIZE) if function in STEPS else ()
        return (*_pairs(rng, 1e-5), *states), {"temperature": 1e-5, "anchor_weight": weight}

    return draw


for _function in _ANSWERS:
    for _coldness in COLDNESS:
        _sentence = f"An inverse temperature of {_coldness}; the gradients of a softmax in the same dtype are the bar."
        _enter(_function, f"inverse temperature {_coldness}", _sentence, _cold(_function, _coldness))
for _function in (*STEPS, "info_nce"):
    _enter(
        _function, "unnormalised", "Features of norm 32 and an inverse temperature of 128.", _unnormalised(_function)
    )
    _sentence = "An inverse temperature of 1e5, and weights per anchor, some of them 0."
    _enter(_function, "inverse temperature 1e5 and anchor_weight", _sentence, _weighted(_function))
for _function in STEPS:
    _enter(_function, "reference_weight 64", "A reference weight of 64 and an inverse temperature of 128.", _steered)
    _enter(_function, "temperatures from 1e-6", "Temperatures from 1e-6 to 1, one per anchor.", _unequal)
    _sentence = "An inverse temperature of 1e5, computed in tiles of seven rows."
    _enter(_function, "inverse temperature 1e5 in tiles", _sentence, _cold(_function, "1e5", {"tile_size": 7}))


# ---------------------------------------------------------------------------------------------------------------------
# The sum of an anchor's weights, read from the gradient that one anchor alone gives
# ---------------------------------------------------------------------------------------------------------------------


def _sums(function: str, step: Any, first: Any, second: Any, *states: Any, **options: Any) -> Any:
    """Call a step once for each anchor, with weight 1 for it and 0 for all others, and read the sum of its weights.

    ``anchor_weight`` holds the rows of the unit matrix. Each sum is read from the gradient of the other rows, and from
    surrogate - loss where there is a surrogate.
    """
    units = options.pop("anchor_weight")
    rows = [to_numpy(first), to_numpy(second)]
    b, views = len(rows[0]), function == "unimodal_contrastive_step"
    temperatures = [np.broadcast_to(side, b) for side in map(to_numpy, _twice(options["temperature"]))]
    names = SIDES.get(function, ("image", "text"))
    found: dict[str, list[float]] = {}
    for side, name in enumerate(names):
        for i in range(b):
            one, none = units[i, :], units[i, :] * 0
            answer = step(first, second, *states, **options, anchor_weight=(none, one) if side else (one, none))

            def field(name: str, answer: Any = answer) -> Any:
                value = answer.get(name) if isinstance(answer, Mapping) else getattr(answer, name, None)
                return None if value is None else to_numpy(value)

            own, t = rows[side][i], float(temperatures[side][i])
            # The gradient of its negatives: rows of the other side; with two views rows of both sides.
            gradients = [field(f"{names[k]}_gradient") for k in ((0, 1) if views else (1 - side,))]
            if all(gradient is not None for gradient in gradients):
                pull = sum(np.sum(np.delete(gradient, i, axis=0), axis=0) for gradient in gradients)
                total = 2 * b * float(pull @ own) / float(own @ own)
                found.setdefault(f"weight_sum_{name}", []).append(total if function in STEPS else total * t)
            loss, surrogate = field("loss"), field("surrogate")
            if loss is not None and surrogate is not None and function in STEPS:
                found.setdefault(f"surrogate_sum_{name}", []).append(2 * b * float(surrogate - loss) / t)
    return {name: np.array(values) for name, values in found.items()}


def _twice(value: Any) -> tuple[Any, Any]:
    return value if isinstance(value, tuple) else (value, value)


def _limits(function: str, arguments: Arguments, dtype: str) -> Answer:
    """Return 1/gamma as the largest sum; surrogate and loss are rounded at the size of their similarities."""
    options = {name: value for name, value in arguments.options.items() if name != "anchor_weight"}
    given = Arguments(arguments.positional, options, {})
    size, b = _Batch(function, given, np.float64).size, len(arguments.positional[0])
    epsilon = float(np.finfo(dtype).eps)
    expected = {}
    for name, t, gamma in zip(
        SIDES.get(function, ("image", "text")),
        _two_sides(options["temperature"], b),
        _two_sides(options.get("gamma", 1.0), b),
        strict=True,
    ):
        expected[f"weight_sum_{name}"] = 1.0 / gamma
        if function in STEPS:
            expected[f"surrogate_sum_{name}"] = (1.0 + 4.0 * epsilon * size / t) / gamma
    return Answer(expected, dict(expected), dict.fromkeys(expected, SUM_UNIT[dtype]), frozenset(expected))


def _enter_sums(function: str, name: str, sentence: str, draw: Draw, *, limited: bool = True) -> None:
    answer = functools.partial(_limits, function) if limited else None
    story = functools.partial(_sums, function)
    PROBLEMS.append(Problem(function, f"sums of weights: {name}", sentence, draw, answer=answer, story=story))


def _few(function: str, temperature: Any, gamma: float, *, norm: float = 1.0, reference: float = 0.0) -> Draw:
    """Return a small batch with near ties; a memory of nearly nothing makes the weights as large as they may be."""

    def draw(rng: Generator) -> tuple[Any, ...]:
        t = temperature(rng) if callable(temperature) else temperature
        distance = _distance(t / norm**2) if isinstance(t, float) else 1e-4
        features = [_rows(rng, BATCH, WIDTH, distance, norm) for _ in range(2)]
        options: dict[str, Any] = {"temperature": t, "anchor_weight": np.eye(BATCH)}
        if function not in STEPS:
            return tuple(features), options
        if gamma < 1.0:
            options["gamma"] = gamma
        if reference:
            options["reference_features"] = tuple(_rows(rng, BATCH, WIDTH, distance / reference) for _ in range(2))
            options["reference_weight"] = reference
        return (*features, *_states(BATCH, -1e12 if gamma < 1.0 else NEVER)), options

    return draw


def _ordinary(rng: Generator) -> tuple[Any, ...]:
    features = [_rows(rng, BATCH, WIDTH, 0.0) for _ in range(2)]
    options = {"temperature": 0.5, "gamma": 0.5, "eps": 0.125, "anchor_weight": np.eye(BATCH)}
    options["reference_features"] = tuple(_rows(rng, BATCH, WIDTH, 0.0) for _ in range(2))
    return (*features, *rng.normal(size=(2, BATCH))), options


for _function in STEPS:
    _sentence = "One anchor at a time: the sum of its weights is g / (eps + u)."
    _enter_sums(_function, "a memory and a floor", _sentence, _ordinary, limited=False)
    for _coldness, _gamma in (("1e2", 0.25), ("1e4", 0.25), ("1e6", 1.0), ("1e6", 0.25), ("1e10", 0.25)):
        _sentence = f"One anchor at a time, inverse temperature {_coldness}: no sum exceeds 1 / gamma = {1 / _gamma}."
        _name = f"inverse temperature {_coldness}, gamma {_gamma}"
        _enter_sums(_function, _name, _sentence, _few(_function, 1.0 / float(_coldness), _gamma))
    _sentence = "One anchor at a time, temperatures from 1e-6 to 1: no sum exceeds 1 / gamma = 4."
    _draw = _few(_function, lambda rng: tuple(10.0 ** rng.uniform(-6.0, 0.0, size=(2, BATCH))), 0.25)
    _enter_sums(_function, "temperatures from 1e-6", _sentence, _draw)
    _sentence = "One anchor at a time, features of norm 32: no sum exceeds 1 / gamma = 4."
    _enter_sums(_function, "unnormalised", _sentence, _few(_function, 2.0**-7, 0.25, norm=32.0))
    _sentence = "One anchor at a time, a reference weight of 64: no sum exceeds 1 / gamma = 4."
    _enter_sums(_function, "reference_weight 64", _sentence, _few(_function, 2.0**-7, 0.25, reference=64.0))
for _coldness in ("1e2", "1e6"):
    _sentence = (
        f"One anchor at a time, inverse temperature {_coldness}: the negatives' share of a softmax is at most 1."
    )
    _enter_sums(
        "info_nce", f"inverse temperature {_coldness}", _sentence, _few("info_nce", 1.0 / float(_coldness), 1.0)
    )
