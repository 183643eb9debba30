"""Problems with large logits: temperatures down to 1e-10, features that are not normalised, large reference weights.

``softmax.py`` computes the exact answers and the bounds of the errors.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from drrho_reference._checks import FloatArray
from drrho_reference.cases.draws import STEPS, equal_states, exact_rows, near_tie
from drrho_reference.cases.problem import Answer, Arguments, Draw, Problem
from drrho_reference.cases.softmax import loss_answer, pair_loss_answer, step_answer

SIZE, FEATURES, REFERENCE_FEATURES = 24, 8, 6
COLDNESS = ("1e0", "1e2", "1e4", "1e5", "1e6", "1e8", "1e10")
Generator = Any  # an np.random.Generator; naming the class here would import numpy.random

PROBLEMS: list[Problem] = []


def _pairs(rng: Generator, distance: float, *, norm: float = 1.0) -> tuple[FloatArray, FloatArray]:
    return exact_rows(rng, SIZE, FEATURES, distance, norm), exact_rows(rng, SIZE, FEATURES, distance, norm)


_ANSWERS: Mapping[str, Callable[[str, Arguments, str], Answer]] = types.MappingProxyType(
    {
        "contrastive_step": step_answer,
        "unimodal_contrastive_step": step_answer,
        "info_nce": loss_answer,
        "distillation_loss": loss_answer,
        "pair_loss": pair_loss_answer,
    }
)


def _enter(function: str, name: str, sentence: str, draw: Draw) -> None:
    answer = functools.partial(_ANSWERS[function], function)
    PROBLEMS.append(Problem(function, name, sentence, draw, answer=answer))


def _cold(function: str, coldness: str, how: Mapping[str, Any] | None = None) -> Draw:
    """Return a draw of a problem at one temperature; if the function takes states, no sample was visited before."""

    def draw(rng: Generator) -> tuple[Any, ...]:
        # The distance of neighbouring rows is about one temperature, so that their logits differ by about 1.
        t = 1.0 / float(coldness)
        features, options = _pairs(rng, near_tie(t)), {"temperature": t}
        if function == "distillation_loss":
            teacher = (exact_rows(rng, SIZE, REFERENCE_FEATURES, near_tie(t)) for _ in range(2))
            return (*features, *teacher), {**options, "reference_temperature": 2.0 * t}
        return (*features, *(equal_states(SIZE) if function in STEPS else ())), options, dict(how or {})

    return draw


def _unnormalised(function: str) -> Draw:
    def draw(rng: Generator) -> tuple[Any, ...]:
        features = _pairs(rng, 1e-5, norm=32.0)
        return (*features, *(equal_states(SIZE) if function in STEPS else ())), {"temperature": 2.0**-7}

    return draw


def _steered(rng: Generator) -> tuple[Any, ...]:
    """Draw a problem whose reference weight is 64."""
    reference = tuple(np.round(exact_rows(rng, SIZE, REFERENCE_FEATURES, 1e-4) * 2.0**20) / 2.0**20 for _ in range(2))
    options = {"temperature": 2.0**-7, "reference_features": reference, "reference_weight": 64.0}
    return (*_pairs(rng, 0.01), *equal_states(SIZE)), options


def _unequal(rng: Generator) -> tuple[Any, ...]:
    """Draw temperatures from 1e-6 to 1, one per anchor."""
    temperature = tuple(10.0 ** rng.uniform(-6.0, 0.0, size=(2, SIZE)))
    return (*_pairs(rng, 1e-4), *equal_states(SIZE)), {"temperature": temperature}


def _weighted(function: str) -> Draw:
    def draw(rng: Generator) -> tuple[Any, ...]:
        weight = tuple(np.where(rng.random(size=(2, SIZE)) < 0.2, 0.0, rng.gamma(2.0, size=(2, SIZE))))
        states = equal_states(SIZE) if function in STEPS else ()
        return (*_pairs(rng, 1e-5), *states), {"temperature": 1e-5, "anchor_weight": weight}

    return draw


# Every function at every temperature.
for _function in _ANSWERS:
    for _coldness in COLDNESS:
        _sentence = (
            f"An inverse temperature of {_coldness}; the error of a softmax in the same dtype bounds that of gradients."
        )
        _enter(_function, f"inverse temperature {_coldness}", _sentence, _cold(_function, _coldness))
# Large logits for other reasons than a low temperature, and weights per anchor.
for _function in (*STEPS, "info_nce"):
    _enter(
        _function, "unnormalised", "Features of norm 32 and an inverse temperature of 128.", _unnormalised(_function)
    )
    _sentence = "An inverse temperature of 1e5, and weights per anchor, some of them 0."
    _enter(_function, "inverse temperature 1e5 and anchor_weight", _sentence, _weighted(_function))
# Options that only the steps have.
for _function in STEPS:
    _enter(_function, "reference_weight 64", "A reference weight of 64 and an inverse temperature of 128.", _steered)
    _enter(_function, "temperatures from 1e-6", "Temperatures from 1e-6 to 1, one per anchor.", _unequal)
    _sentence = "An inverse temperature of 1e5, computed in tiles of seven rows."
    _enter(_function, "inverse temperature 1e5 in tiles", _sentence, _cold(_function, "1e5", {"tile_size": 7}))
