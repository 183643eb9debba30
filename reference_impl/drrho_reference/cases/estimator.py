"""Problems for the inner estimates u: the rules for gamma, and the table with one row per sample."""
# ruff: noqa: D401 - the docstring of a problem is the description of its case in the report

from __future__ import annotations

from typing import Any

import numpy as np

from drrho_reference.cases.draws import NEVER, SAMPLES
from drrho_reference.cases.problem import Problem, entering

PROBLEMS: list[Problem] = []
problem = entering(PROBLEMS)


# The rules for gamma, at their bounds and away from them.
@problem("scent_gamma")
def floor(rng: np.random.Generator) -> tuple[Any, ...]:
    """Some gammas are at the floor, some are above it, and one sample was never visited."""
    return (np.array([NEVER, -9.0, -1.0, *rng.normal(size=2)]),), {"log_alpha": 0.5, "gamma_floor": 0.125}


@problem("cosine_gamma")
def half_way(rng: np.random.Generator) -> tuple[Any, ...]:
    """An epoch in the middle of the cosine schedule."""
    return (float(rng.integers(2, 5)),), {"num_epochs": 8.0, "gamma_min": 0.25}


@problem("cosine_gamma")
def past_the_end(rng: np.random.Generator) -> tuple[Any, ...]:
    """After the last epoch of the cosine schedule gamma stays at its smallest value."""
    return (float(rng.integers(12, 20)),), {"num_epochs": 8.0, "gamma_min": 0.25}


@problem("recommended_gamma_min")
def many_epochs(rng: np.random.Generator) -> tuple[Any, ...]:
    """A number of epochs for which the smallest gamma is below the cap of 1."""
    return (float(rng.integers(20, 40)),), {}


@problem("recommended_gamma_min")
def few_epochs(rng: np.random.Generator) -> tuple[Any, ...]:
    """A number of epochs for which the smallest gamma is the cap of 1."""
    return (float(rng.integers(1, 5)),), {}


# The life of one estimator: first visits, growth, and a copy of the state.
@problem("InnerEstimator")
def a_data_set_that_grows(rng: np.random.Generator) -> tuple[Any, ...]:
    """The calls are gather, scatter, gather, grow, scatter, save and load; log u is -inf before the first visit."""
    values = rng.normal(size=(4, 3))
    values[1, 1] = values[2, 0] = NEVER
    first, later = np.array([4, 0, 2]), np.array([7, 2, 5])
    return (SAMPLES, first, values[0], values[1], SAMPLES + 2, later, values[2], values[3]), {}
