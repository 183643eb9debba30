"""Problems for the quantities of the theory: variances, sample sizes, biases, the bound and the scaling law."""
# ruff: noqa: D401 - the docstring of a problem is the description of its case in the report

from __future__ import annotations

from typing import Any

import numpy as np

from drrho_reference._checks import FloatArray
from drrho_reference.cases.draws import SAMPLES, SLICES, mask_table
from drrho_reference.cases.problem import Problem, entering

PROBLEMS: list[Problem] = []
problem = entering(PROBLEMS)


@problem("excess_variance")
def over_pairs_and_anchors(rng: np.random.Generator) -> tuple[Any, ...]:
    """Anchors with different numbers of pairs; some anchors have a single pair."""
    losses = (np.where(mask_table(), rng.normal(size=(SLICES, SAMPLES)), np.nan) for _ in range(2))
    return tuple(losses), {"reference_weight": 0.5, "where": mask_table()}


@problem("effective_sample_size")
def between_one_and_n(rng: np.random.Generator) -> tuple[Any, ...]:
    """Uneven, uniform and one-hot weights."""
    weights = rng.dirichlet(np.ones(SAMPLES), size=SLICES)
    weights[1], weights[2] = 1.0 / SAMPLES, np.arange(SAMPLES) == 3
    return (weights,), {}


@problem("log_mean_exp_bias")
def batches_of_two(rng: np.random.Generator) -> tuple[Any, ...]:
    """Batches along the first axis; one sample is left over."""
    return (rng.normal(size=(SLICES, SAMPLES)),), {"batch_size": 2, "temperature": 0.5, "axis": 0}


@problem("generalization_bound")
def the_best_of_some(rng: np.random.Generator) -> tuple[Any, ...]:
    """The best model has neither the smallest risk nor the smallest variance."""
    risk = np.array([1.0, 0.75, 0.5, 0.25, 0.125, 0.0]) + 0.01 * rng.normal(size=SAMPLES)
    variance = np.array([0.0, 0.01, 0.25, 4.0, 9.0, 25.0])
    return (risk, variance), {"radius": 0.125, "num_samples": 50, "c1": 1.5, "c2": 2.0}


@problem("generalization_bound")
def the_form_alone(rng: np.random.Generator) -> tuple[Any, ...]:
    """The bound with the default constants."""
    return (rng.gamma(2.0, size=SAMPLES), rng.gamma(2.0, size=SAMPLES)), {"radius": 0.125, "num_samples": 50}


def _scaling(rng: np.random.Generator, floor: float, noise: float) -> tuple[FloatArray, FloatArray]:
    """Return compute and error of nine runs that follow a scaling law, with noise."""
    compute = np.logspace(0.0, 4.0, 9)
    return compute, (floor + 0.5 * compute**-0.25) * np.exp(noise * rng.normal(size=9))


# The scaling law without and with a floor; its bootstrap intervals are random.
@problem("fit_scaling_law")
def a_line(rng: np.random.Generator) -> tuple[Any, ...]:
    """A power law without a floor; two points are not fitted, and the random intervals are not compared."""
    compute, error = _scaling(rng, 0.0, 0.05)
    where = np.arange(9) % 5 != 2
    return (compute, np.where(where, error, np.nan)), {"where": where, "num_resamples": 2}


@problem("fit_scaling_law")
def a_floor(rng: np.random.Generator) -> tuple[Any, ...]:
    """A power law above a floor, without noise; the random intervals are not compared."""
    return _scaling(rng, 0.125, 0.0), {"with_floor": True, "num_resamples": 2}
