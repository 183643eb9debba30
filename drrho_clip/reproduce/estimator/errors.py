"""The errors of inner estimates and gradients against the full data, along a training.

One training runs with FastCLIP's cosine rule. On the same batches every rule keeps inner estimates of its own, so all
rules are compared at the same parameters. At the end of each epoch the pairs are divided into batches once more, and
each rule estimates, without a change of its state:

    u_error          root mean square, over anchors of both kinds, of log u_i - log g_i, with g_i from all pairs
    gradient_bias    norm of the mean gradient of the batches - the gradient of all pairs, over the norm of the latter
    gradient_error   root mean square over the batches of the same for the gradient of a single batch

The gradients are those of the heads. The full data are the truth: `contrastive_step` on all pairs with gamma = 1.
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
from drrho_clip.reproduce.results import Metrics
from drrho_clip.reproduce.training import Measured
from drrho_core import ContrastiveStep, InnerEstimator

__all__ = ["ERRORS", "errors_of", "measure_errors"]

ERRORS: Final = ("u_error", "gradient_bias", "gradient_error")
"""The errors; a row has one number per epoch for each error and rule, with the name ``ERROR RULE``."""

_TARGET, _MEASURE = 1, 3


def measure_errors(experiment: Experiment, folder: Path) -> Measured:
    """Train heads, and measure the errors of every rule after each epoch; settings as in `measure_heads`."""
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
    epoch = 0
    for moment, rows in training.batches():
        if moment.epoch >= epoch + 1:
            epoch += 1
            _append(curves, training, estimators, Moment(epoch, moment.epochs), rng)
        for rule, estimator in estimators.items():
            step = training.estimate(rule, estimator, moment, rows)
            estimators[rule] = estimator.scatter(rows, step.log_inner_image, step.log_inner_text)
        training.advance(moment, rows)
    _append(curves, training, estimators, Moment(epoch + 1, settings["model"]["epochs"]), rng)
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
    batches : array of int, shape (number of batches, b)
        The pairs of each batch, without repeats.
    """
    everything = batches.ravel()
    unseen = InnerEstimator(estimator.num_samples, like=np.zeros(1), dtype=np.float64)
    truth = training.estimate(NO_MEMORY, unseen, moment, everything)
    exact = _gradient(training, truth, everything)
    steps = [training.estimate(rule, estimator, moment, rows) for rows in batches]
    logs = [np.concatenate([getattr(step, side) for step in steps]) for side in ("log_inner_image", "log_inner_text")]
    differences = np.concatenate(logs) - np.concatenate([truth.log_inner_image, truth.log_inner_text])
    gradients = np.stack([_gradient(training, step, rows) for step, rows in zip(steps, batches, strict=True)])
    size = float(np.linalg.norm(exact))
    bias = float(np.linalg.norm(gradients.mean(axis=0) - exact)) / size
    error = float(np.sqrt(np.mean(np.sum((gradients - exact) ** 2, axis=1)))) / size
    return [float(np.sqrt(np.mean(differences**2))), bias, error]


def _append(
    curves: dict[str, list[float]],
    training: Training,
    estimators: dict[str, InnerEstimator],
    moment: Moment,
    rng: np.random.Generator,
) -> None:
    num, batch = training.estimator.num_samples, training.model["batch"]
    batches = rng.permutation(num)[: num // batch * batch].reshape(-1, batch)
    for rule, estimator in estimators.items():
        for name, error in zip(ERRORS, errors_of(training, rule, estimator, moment, batches), strict=True):
            # Five digits are enough for a page, and keep the files small.
            curves.setdefault(f"{name} {rule}", []).append(float(f"{error:.5g}"))


def _gradient(training: Training, step: ContrastiveStep, rows: Rows) -> Floats:
    """Return the gradient of both heads as one vector."""
    pairs = some(training.problem.sets.train, rows)
    slopes = pull_back(training.heads, pairs, (step.image_gradient, step.text_gradient))
    return np.concatenate([slope.ravel() for slope in slopes.values()])
