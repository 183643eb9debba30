"""Problems that compute the sum of an anchor's weights w_ij from a step in which no other anchor counts.

The weight of negative j of anchor i is ``w_ij = exp(D_ij) / (eps + u_i) / (number of negatives)``.

``anchor_weight`` is 1 for this anchor and 0 for all others, so the gradient contains the weights w_ij of this anchor
only. For an image anchor i,

    sum over j != i of text_gradient_j = (sum_j w_ij) image_i / 2b        surrogate - loss = t_i (sum_j w_ij) / 2b

and likewise for text anchors. The sum of an anchor's weights must not exceed 1/gamma.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np

from drrho_reference.cases.calls import to_numpy
from drrho_reference.cases.draws import BATCH, NEVER, SIDES, STEPS, WIDTH, equal_states, exact_rows, near_tie
from drrho_reference.cases.problem import Answer, Arguments, Draw, Problem
from drrho_reference.cases.softmax import SimilarityTables, two_sides

Generator = Any  # an np.random.Generator; naming the class here would import numpy.random
SUM_UNIT = {"float64": 1e-10, "float32": 1e-5}

PROBLEMS: list[Problem] = []


def _sums(function: str, step: Any, first: Any, second: Any, *states: Any, **options: Any) -> Any:
    """Call a step once per anchor, with weight 1 for this anchor and 0 for all other anchors; return sums of weights.

    The option ``anchor_weight`` is the unit matrix, one row per call. Each sum is computed from the gradients of the
    anchor's negatives, and also from surrogate - loss if the answer has a surrogate.
    """
    units = options.pop("anchor_weight")
    rows = [to_numpy(first), to_numpy(second)]
    b, views = len(rows[0]), function == "unimodal_contrastive_step"
    temperatures = [np.broadcast_to(side, b) for side in map(to_numpy, _twice(options["temperature"]))]
    names = SIDES.get(function, ("image", "text"))
    sums: dict[str, list[float]] = {}
    for side, name in enumerate(names):
        for i in range(b):
            unit, zeros = units[i, :], units[i, :] * 0
            answer = step(first, second, *states, **options, anchor_weight=(zeros, unit) if side else (unit, zeros))

            def field(name: str, answer: Any = answer) -> Any:
                value = answer.get(name) if isinstance(answer, Mapping) else getattr(answer, name, None)
                return None if value is None else to_numpy(value)

            # (sum of the negatives' gradients) . own / |own|^2 = (sum of weights) / 2b, own: the anchor's features.
            own, t = rows[side][i], float(temperatures[side][i])
            # Negatives are rows of the other side or, with two views, rows of both sides.
            gradients = [field(f"{names[k]}_gradient") for k in ((0, 1) if views else (1 - side,))]
            if all(gradient is not None for gradient in gradients):
                pull = sum(np.sum(np.delete(gradient, i, axis=0), axis=0) for gradient in gradients)
                total = 2 * b * float(pull @ own) / float(own @ own)
                sums.setdefault(f"weight_sum_{name}", []).append(total if function in STEPS else total * t)
            loss, surrogate = field("loss"), field("surrogate")
            if loss is not None and surrogate is not None and function in STEPS:
                sums.setdefault(f"surrogate_sum_{name}", []).append(2 * b * float(surrogate - loss) / t)
    return {name: np.array(values) for name, values in sums.items()}


def _twice(value: Any) -> tuple[Any, Any]:
    return value if isinstance(value, tuple) else (value, value)


def _limits(function: str, arguments: Arguments, dtype: str) -> Answer:
    """Return 1/gamma as the largest sum that is allowed, with a term for the rounding of surrogate and loss."""
    # The sum of the weights is g / (eps + u), with g, the mean of exp(D) over the anchor's negatives in the batch,
    # and the new inner estimate u. Since u is at least gamma g, the sum is at most 1 / gamma.
    options = {name: value for name, value in arguments.options.items() if name != "anchor_weight"}
    given = Arguments(arguments.positional, options, {})
    size, b = SimilarityTables(function, given, np.float64).size, len(arguments.positional[0])
    epsilon = float(np.finfo(dtype).eps)
    expected = {}
    for name, t, gamma in zip(
        SIDES.get(function, ("image", "text")),
        two_sides(options["temperature"], b),
        two_sides(options.get("gamma", 1.0), b),
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
    """Return a draw of a small batch with near ties.

    If gamma is below 1, the old estimate u is almost 0, so that the sums of weights reach their limit 1/gamma.
    """

    def draw(rng: Generator) -> tuple[Any, ...]:
        # Similarities of near ties differ by about the temperature; features of norm c have similarities of size c^2.
        t = temperature(rng) if callable(temperature) else temperature
        distance = near_tie(t / norm**2) if isinstance(t, float) else 1e-4
        features = [exact_rows(rng, BATCH, WIDTH, distance, norm) for _ in range(2)]
        options: dict[str, Any] = {"temperature": t, "anchor_weight": np.eye(BATCH)}
        if function not in STEPS:
            return tuple(features), options
        if gamma < 1.0:
            options["gamma"] = gamma
        if reference:
            options["reference_features"] = tuple(exact_rows(rng, BATCH, WIDTH, distance / reference) for _ in range(2))
            options["reference_weight"] = reference
        return (*features, *equal_states(BATCH, -1e12 if gamma < 1.0 else NEVER)), options

    return draw


def _ordinary(rng: Generator) -> tuple[Any, ...]:
    """Draw a batch whose sums of weights the oracle can compute."""
    features = [exact_rows(rng, BATCH, WIDTH, 0.0) for _ in range(2)]
    options = {"temperature": 0.5, "gamma": 0.5, "eps": 0.125, "anchor_weight": np.eye(BATCH)}
    options["reference_features"] = tuple(exact_rows(rng, BATCH, WIDTH, 0.0) for _ in range(2))
    return (*features, *rng.normal(size=(2, BATCH))), options


# At an ordinary temperature the sum is compared with the oracle's; with large logits only the limit 1/gamma is checked.
for _function in STEPS:
    _sentence = "One anchor at a time: the sum of the anchor's weights is g / (eps + u)."
    _enter_sums(_function, "a memory and a floor", _sentence, _ordinary, limited=False)
    for _coldness, _gamma in (("1e2", 0.25), ("1e4", 0.25), ("1e6", 1.0), ("1e6", 0.25), ("1e10", 0.25)):
        _limit = f"no sum of weights exceeds 1 / gamma = {1 / _gamma}"
        _sentence = f"One anchor at a time, inverse temperature {_coldness}: {_limit}."
        _name = f"inverse temperature {_coldness}, gamma {_gamma}"
        _enter_sums(_function, _name, _sentence, _few(_function, 1.0 / float(_coldness), _gamma))
    _sentence = "One anchor at a time, temperatures from 1e-6 to 1: no sum of weights exceeds 1 / gamma = 4."
    _draw = _few(_function, lambda rng: tuple(10.0 ** rng.uniform(-6.0, 0.0, size=(2, BATCH))), 0.25)
    _enter_sums(_function, "temperatures from 1e-6", _sentence, _draw)
    _sentence = "One anchor at a time, features of norm 32: no sum of weights exceeds 1 / gamma = 4."
    _enter_sums(_function, "unnormalised", _sentence, _few(_function, 2.0**-7, 0.25, norm=32.0))
    _sentence = "One anchor at a time, a reference weight of 64: no sum of weights exceeds 1 / gamma = 4."
    _enter_sums(_function, "reference_weight 64", _sentence, _few(_function, 2.0**-7, 0.25, reference=64.0))
for _coldness in ("1e2", "1e6"):
    _sentence = (
        f"One anchor at a time, inverse temperature {_coldness}: the sum of the negatives' softmax is at most 1."
    )
    _enter_sums(
        "info_nce", f"inverse temperature {_coldness}", _sentence, _few("info_nce", 1.0 / float(_coldness), 1.0)
    )
