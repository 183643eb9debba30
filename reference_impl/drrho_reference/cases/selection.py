"""Problems for the selection of samples: one by one, by excess loss, and chunk by chunk (JEST)."""
# ruff: noqa: D401 - the docstring of a problem is the description of its case in the report

from __future__ import annotations

from typing import Any

import numpy as np

from drrho_reference._checks import FloatArray
from drrho_reference.cases.draws import SAMPLES, draw_losses
from drrho_reference.cases.problem import Problem, entering

PROBLEMS: list[Problem] = []
problem = entering(PROBLEMS)


@problem("select_top_excess")
def top_three(rng: np.random.Generator) -> tuple[Any, ...]:
    """The three samples of largest excess loss."""
    return (draw_losses(rng)[0], draw_losses(rng)[0]), {"k": 3}


@problem("select_top_excess")
def ties_and_a_weight(rng: np.random.Generator) -> tuple[Any, ...]:
    """The reference weight is 2, and some excess losses are equal; of these the lower index comes first."""
    loss = rng.integers(0, 3, size=SAMPLES).astype(np.float64)
    return (loss, rng.integers(0, 2, size=SAMPLES).astype(np.float64)), {"k": 4, "reference_weight": 2.0}


def _logits(rng: np.random.Generator, scale: float = 1.0) -> tuple[FloatArray, FloatArray]:
    return scale * rng.normal(size=(SAMPLES, SAMPLES)), scale * rng.normal(size=(SAMPLES, SAMPLES))


# Selection chunk by chunk: without noise, with noise and large logits, and with noise.
@problem("select_jest")
def top_k(rng: np.random.Generator) -> tuple[Any, ...]:
    """Selection without noise, in chunks of unequal size."""
    return _logits(rng), {"k": 5, "num_chunks": 2, "top_k": True}


@problem("select_jest")
def scale_100(rng: np.random.Generator) -> tuple[Any, ...]:
    """The logits are as large as those of a trained model, so the noise is small compared with the logits."""
    return _logits(rng, 100.0), {"k": 4, "num_chunks": 2, "gumbel": rng.gumbel(size=(2, SAMPLES))}


@problem("select_jest")
def with_noise(rng: np.random.Generator) -> tuple[Any, ...]:
    """Selection with given Gumbel noise."""
    return _logits(rng), {"k": 4, "num_chunks": 2, "gumbel": rng.gumbel(size=(2, SAMPLES))}
