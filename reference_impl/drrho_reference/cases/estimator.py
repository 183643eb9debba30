"""Problems of the inner estimates u: the rules for gamma, and the table of one row per sample."""
# ruff: noqa: D401 - a problem's docstring is the sentence of the case in the report

from __future__ import annotations

from typing import Any

import numpy as np

from drrho_reference.cases.draws import NEVER, SAMPLES
from drrho_reference.cases.problem import Problem, entering

PROBLEMS: list[Problem] = []
problem = entering(PROBLEMS)


# The rules for gamma, on both sides of each bound.
@problem("scent_gamma")
def floor(rng: np.random.Generator) -> tuple[Any, ...]:
    """Some gammas at their floor, some above it, one sample never visited."""
    return (np.array([NEVER, -9.0, -1.0, *rng.normal(size=2)]),), {"log_alpha": 0.5, "gamma_floor": 0.125}


@problem("cosine_gamma")
def half_way(rng: np.random.Generator) -> tuple[Any, ...]:
    """Somewhere on the cosine."""
    return (float(rng.integers(2, 5)),), {"num_epochs": 8.0, "gamma_min": 0.25}


@problem("cosine_gamma")
def past_the_end(rng: np.random.Generator) -> tuple[Any, ...]:
    """After the last epoch gamma stays where it is."""
    return (float(rng.integers(12, 20)),), {"num_epochs": 8.0, "gamma_min": 0.25}


@problem("recommended_gamma_min")
def many_epochs(rng: np.random.Generator) -> tuple[Any, ...]:
    """The rule below its cap of 1."""
    return (float(rng.integers(20, 40)),), {}


@problem("recommended_gamma_min")
def few_epochs(rng: np.random.Generator) -> tuple[Any, ...]:
    """The rule at its cap of 1."""
    return (float(rng.integers(1, 5)),), {}


# One data set from the first visit to a copy of the grown state.
@problem("InnerEstimator")
def a_data_set_that_grows(rng: np.random.Generator) -> tuple[Any, ...]:
    """Gather before and after a scatter, grow, scatter again, copy the state; what was never visited is -inf."""
    values = rng.normal(size=(4, 3))
    values[1, 1] = values[2, 0] = NEVER
    first, later = np.array([4, 0, 2]), np.array([7, 2, 5])
    return (SAMPLES, first, values[0], values[1], SAMPLES + 2, later, values[2], values[3]), {}
