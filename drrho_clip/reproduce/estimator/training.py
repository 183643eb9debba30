"""Train two linear heads on drawn pairs with CLIP, SogCLR or DRRho-CLIP, and measure R@1."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from drrho_clip.measure.retrieval import retrieval
from drrho_clip.optimizer import AdamW
from drrho_clip.reproduce.estimator.heads import Heads, embed, pull_back, start_heads
from drrho_clip.reproduce.estimator.pairs import Floats, Pairs, PairSets, draw_pairs
from drrho_clip.reproduce.estimator.rules import RULES, Moment
from drrho_clip.reproduce.experiment import Experiment, Settings
from drrho_clip.reproduce.measuring.training import Measured
from drrho_core import ContrastiveStep, InnerEstimator, contrastive_step, info_nce

__all__ = ["CLIP", "Problem", "Training", "measure_heads", "open_problem"]

CLIP: Final = "clip"
"""The method whose loss is that of the mini-batch alone."""

# Streams of random numbers that do not depend on each other.
_DATA, _TARGET, _REFERENCE = range(3)

Rows = npt.NDArray[np.int64]


class Problem(NamedTuple):
    """The pairs of an experiment, and the features of the reference model for the training pairs, or None."""

    sets: PairSets
    reference: tuple[Floats, Floats] | None


class Training:
    """Two heads, their optimiser and the inner estimates, which one batch after the other changes.

    Parameters
    ----------
    problem : Problem
    model : mapping
        ``width`` of the features, ``temperature``, ``batch``, ``epochs`` and the learning ``rate``.
    rule : str
        A key of `RULES`, or `CLIP` for the loss of the mini-batch alone.
    seed : pair of int
        Seed and stream of the initial heads and of the order of the pairs.
    """

    def __init__(self, problem: Problem, model: Settings, rule: str, *, seed: tuple[int, int]) -> None:
        self.problem, self.model, self.rule = problem, model, rule
        self._rng = np.random.default_rng(seed)
        self.heads: dict[str, Floats] = start_heads(model["width"], self._rng)
        self._optimizer = AdamW(np, weight_decay=0.0, beta2=0.99)
        self._state = self._optimizer.init(self.heads)
        num = len(problem.sets.train.images)
        self.estimator = InnerEstimator(num, like=np.zeros(1), dtype=np.float64)

    def batches(self) -> Iterator[tuple[Moment, Rows]]:
        """Yield moment and rows of each batch, epoch after epoch; pairs that fill no batch are left out."""
        num, batch = len(self.problem.sets.train.images), self.model["batch"]
        steps = num // batch
        for epoch in range(self.model["epochs"]):
            order = self._rng.permutation(num)
            for step in range(steps):
                yield Moment(epoch + step / steps, self.model["epochs"]), order[step * batch : (step + 1) * batch]

    def advance(self, moment: Moment, rows: Rows) -> None:
        """Take a step of the optimiser with a batch."""
        pairs = some(self.problem.sets.train, rows)
        if self.rule == CLIP:
            step = info_nce(*embed(self.heads, pairs), temperature=self.model["temperature"])
            gradients = step.image_gradient, step.text_gradient
        else:
            result = self.estimate(self.rule, self.estimator, moment, rows)
            self.estimator = self.estimator.scatter(rows, result.log_inner_image, result.log_inner_text)
            gradients = result.image_gradient, result.text_gradient
        slopes = pull_back(self.heads, pairs, gradients)
        new, self._state = self._optimizer.update(self.heads, slopes, self._state, self.model["rate"])
        self.heads = dict(new)

    def estimate(self, rule: str, estimator: InnerEstimator, moment: Moment, rows: Rows) -> ContrastiveStep:
        """Return the step of a batch with a rule and the inner estimates of an estimator, which is not changed."""
        log_inner = estimator.gather(rows)
        reference = self.problem.reference
        return contrastive_step(
            *embed(self.heads, some(self.problem.sets.train, rows)),
            *log_inner,
            temperature=self.model["temperature"],
            gamma=RULES[rule](moment, log_inner),
            reference_features=None if reference is None else (reference[0][rows], reference[1][rows]),
        )


def some(pairs: Pairs, rows: Rows) -> Pairs:
    """Return some of the pairs."""
    return Pairs(pairs.images[rows], pairs.texts[rows])


def open_problem(experiment: Experiment) -> Problem:
    """Draw the pairs of an experiment, and train the reference model if there is one."""
    settings = experiment.settings
    # Experiments with other methods and batches have the same problem, and lists cannot be keys of the cache.
    return _open(experiment.seed, json.dumps({name: settings[name] for name in ("data", "steering")}))


@lru_cache(maxsize=16)
def _open(seed: int, settings: str) -> Problem:
    data, model = json.loads(settings).values()
    rng = np.random.default_rng((seed, _DATA))
    sets = draw_pairs(data["num"], num_reference=data["num_reference"], swapped=data["swapped"], rng=rng)
    if model is None:
        return Problem(sets, None)
    other = Problem(sets._replace(train=sets.reference), None)
    heads = _trained(Training(other, model, CLIP, seed=(seed, _REFERENCE)))
    return Problem(sets, embed(heads, sets.train))


def measure_heads(experiment: Experiment, folder: Path) -> Measured:
    """Train heads with each learning rate of the trials.

    The settings have ``data`` (see `draw_pairs`), ``model`` and the learning rates ``trials`` of the target (see
    `Training`), the ``rule``, and the model of the reference in ``steering``, or None.

    With one trial the figure is ``retrieval_r1`` on test pairs; with several it is ``validation``, R@1 on validation
    pairs, one number per trial.
    """
    del folder
    begin = time.perf_counter()
    problem, settings = open_problem(experiment), experiment.settings
    trained = [
        _trained(
            Training(problem, {**settings["model"], "rate": rate}, settings["rule"], seed=(experiment.seed, _TARGET))
        )
        for rate in settings["trials"]
    ]
    metrics: dict[str, Any]
    if len(trained) == 1:
        metrics = {"retrieval_r1": recall_of(trained[0], problem.sets.test)}
    else:
        metrics = {"validation": [recall_of(heads, problem.sets.validation) for heads in trained]}
    return Measured(metrics, time.perf_counter() - begin)


def recall_of(heads: Heads, pairs: Pairs) -> float:
    """Return R@1, the mean over both directions, in galleries of 200 pairs."""
    captions = [str(row) for row in range(len(pairs.images))]
    return float(retrieval(*embed(heads, pairs), captions).retrieval_r1)


def _trained(training: Training) -> Heads:
    for moment, rows in training.batches():
        training.advance(moment, rows)
    return training.heads
