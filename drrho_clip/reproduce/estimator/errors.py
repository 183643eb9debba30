"""The errors of inner estimates and gradients against the full data, along a training.

One training runs with the cosine rule `COSINE`. On the same batches every rule keeps inner estimates of its own, so all
rules are compared at the same parameters. At the end of some epochs the pairs are divided into batches several times,
and each rule estimates, without a change of its state:

    u_error          root mean square, over anchors of both kinds, of log u_i - log g_i, with g_i from all pairs
    gradient_bias    norm of the expected gradient of a batch - the gradient of all pairs, over the norm of the latter
    gradient_error   root mean square over the batches of the same for the gradient of a single batch

The gradients are those of the heads. The full data are the truth: `contrastive_step` on all pairs with gamma = 1. The
mean gradient of a division is the expected gradient plus noise, and the noise of two divisions is independent, so the
mean product of the errors of two divisions estimates the square of the bias. A negative estimate counts as 0.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Final

import numpy as np

from drrho_clip.reproduce.estimator.heads import pull_back
from drrho_clip.reproduce.estimator.pairs import Floats
from drrho_clip.reproduce.estimator.rules import COSINE, NO_MEMORY, RULES, Moment
from drrho_clip.reproduce.estimator.training import Rows, Training, open_problem, some
from drrho_clip.reproduce.experiment import Experiment
from drrho_clip.reproduce.measuring.training import Measured
from drrho_clip.reproduce.results import Metrics
from drrho_core import ContrastiveStep, InnerEstimator

__all__ = ["ERRORS", "errors_of", "measure_errors"]

ERRORS: Final = ("u_error", "gradient_bias", "gradient_error")
"""The errors; a row has one number per measured epoch for each error and rule, with the name ``ERROR RULE``."""

# Streams of random numbers: that of the target in `training.py`, and that of the divisions.
_TARGET, _MEASURE = 1, 3
_DIVISIONS: Final = 4


def measure_errors(experiment: Experiment, folder: Path) -> Measured:
    """Train heads, and measure the errors of every rule after the epochs ``measured``.

    The other settings are those of `measure_heads`.
    """
    del folder
    begin = time.perf_counter()
    settings = experiment.settings
    (rate,) = settings["trials"]
    training = Training(
        open_problem(experiment), {**settings["model"], "rate": rate}, COSINE, seed=(experiment.seed, _TARGET)
    )
    rng = np.random.default_rng((experiment.seed, _MEASURE))
    estimators = {
        rule: InnerEstimator(training.estimator.num_samples, like=np.zeros(1), dtype=np.float64) for rule in RULES
    }
    curves: dict[str, list[float]] = {}
    measured = settings["measured"]
    for moment, rows in training.batches():
        # A whole number: the epochs before are over. The end of the last epoch follows after the loop.
        if moment.epoch in measured:
            _append(curves, training, estimators, moment, rng)
        for rule, estimator in estimators.items():
            step = training.estimate(rule, estimator, moment, rows)
            estimators[rule] = estimator.scatter(rows, step.log_inner_image, step.log_inner_text)
        training.advance(moment, rows)
    epochs = settings["model"]["epochs"]
    if epochs in measured:
        _append(curves, training, estimators, Moment(epochs, epochs), rng)
    metrics: Metrics = curves
    return Measured(metrics, time.perf_counter() - begin)


def errors_of(training: Training, rule: str, estimator: InnerEstimator, moment: Moment, batches: Rows) -> list[float]:
    """Return the three errors of a rule, in the order of `ERRORS`, at the parameters of a training.

    Parameters
    ----------
    training : Training
    rule : str
    estimator : InnerEstimator
        The inner estimates of the rule; they are not changed.
    moment : Moment
    batches : array of int, shape (number of divisions, number of batches, b)
        The pairs of each batch; a division has each pair once. At least two divisions.
    """
    everything = np.arange(estimator.num_samples)
    unseen = InnerEstimator(estimator.num_samples, like=np.zeros(1), dtype=np.float64)
    truth = training.estimate(NO_MEMORY, unseen, moment, everything)
    exact = _gradient(training, truth, everything)
    exact_logs = np.stack([truth.log_inner_image, truth.log_inner_text])
    squares, gradients = [], []
    for rows in batches.reshape(-1, batches.shape[-1]):
        step = training.estimate(rule, estimator, moment, rows)
        logs = np.stack([step.log_inner_image, step.log_inner_text])
        squares.append(np.mean((logs - exact_logs[:, rows]) ** 2))
        gradients.append(_gradient(training, step, rows) - exact)
    size = float(np.linalg.norm(exact))
    differences = np.stack(gradients).reshape(*batches.shape[:2], -1)
    products = differences.mean(axis=1) @ differences.mean(axis=1).T
    others = ~np.eye(len(products), dtype=np.bool_)
    bias = np.sqrt(max(float(np.mean(products[others])), 0.0)) / size
    error = np.sqrt(np.mean(np.sum(differences**2, axis=2))) / size
    return [float(np.sqrt(np.mean(squares))), float(bias), float(error)]


def _append(
    curves: dict[str, list[float]],
    training: Training,
    estimators: dict[str, InnerEstimator],
    moment: Moment,
    rng: np.random.Generator,
) -> None:
    num, batch = training.estimator.num_samples, training.model["batch"]
    divisions = [rng.permutation(num)[: num // batch * batch].reshape(-1, batch) for _ in range(_DIVISIONS)]
    for rule, estimator in estimators.items():
        for name, error in zip(ERRORS, errors_of(training, rule, estimator, moment, np.stack(divisions)), strict=True):
            # Five digits are enough for a page, and keep the files small.
            curves.setdefault(f"{name} {rule}", []).append(float(f"{error:.5g}"))


def _gradient(training: Training, step: ContrastiveStep, rows: Rows) -> Floats:
    """Return the gradient of both heads as one vector."""
    pairs = some(training.problem.sets.train, rows)
    slopes = pull_back(training.heads, pairs, (step.image_gradient, step.text_gradient))
    return np.concatenate([slope.ravel() for slope in slopes.values()])
