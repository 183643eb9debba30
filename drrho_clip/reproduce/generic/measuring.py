"""Train classifiers with an objective, several draws of samples and settings at a time, and measure them."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from drrho_clip.optimizer import AdamW
from drrho_clip.reproduce.experiment import Experiment
from drrho_clip.reproduce.generic.network import Floats, Integers, Network, gradients, losses, predictions, start
from drrho_clip.reproduce.generic.objectives import ERM, OBJECTIVES
from drrho_clip.reproduce.generic.problems import PROBLEMS, Parts, Samples, draw
from drrho_clip.reproduce.measuring.training import Measured

__all__ = ["ALL", "REFERENCE", "measure_generic"]

REFERENCE: Final = "reference"
"""The method of a reference model: ERM on samples of its own."""

ALL: Final = "erm-all"
"""The control: ERM on the samples of the target and of the weak reference model together."""

# Streams of random numbers that do not depend on each other.
_DATA, _TARGET, _REFERENCE = 61, 62, 63


def measure_generic(experiment: Experiment, folder: Path) -> Measured:
    """Train with one trial, or with many trials to choose from; a trial is a pair of learning rate and option.

    The settings have ``data`` (see `problems.draw`), ``repeats``, the number of draws whose figures are averaged,
    ``model`` (see `train_networks`) and ``trials`` of the method, and the same of the reference model in ``steering``,
    which is None if the method has none. The world of the experiment is PROBLEM-CONDITION.

    With one trial the figures are ``accuracy`` and ``loss`` (nats) on test samples. With several trials there is one
    figure per trial, ``validation``: the accuracy or the negative loss on validation samples.
    """
    del folder
    begin = time.perf_counter()
    settings, seed, method = experiment.settings, experiment.seed, experiment.method
    name = experiment.dataset.split("-")[0]
    draws = [draw(name, settings["data"], _rng(seed, repeat, _DATA)) for repeat in range(settings["repeats"])]
    reference_losses = None
    if settings["steering"] is not None:
        model, trials = settings["steering"]["model"], settings["steering"]["trials"]
        reference = train_networks(ERM, trials, samples_of(REFERENCE, draws, model), model, seed=(seed, _REFERENCE))
        reference_losses = losses(reference, *stacked([parts.target for parts in draws]))
    model, trials = settings["model"], [tuple(trial) for trial in settings["trials"]]
    stream = _REFERENCE if method == REFERENCE else _TARGET
    samples = samples_of(method, draws, model)
    scores: dict[tuple[float, float], float] = {}
    figures: dict[str, float] = {}
    # The option of an objective is the same for all models that are trained together.
    for option in dict.fromkeys(option for _, option in trials):
        group = [trial for trial in trials if trial[1] == option]
        objective = ERM if method in (REFERENCE, ALL) else method
        network = train_networks(objective, group, samples, model, seed=(seed, stream), references=reference_losses)
        held_out = _figures(network, [parts.validation for parts in draws])
        counted = held_out["accuracy"] if PROBLEMS[name].figure == "accuracy" else -held_out["loss"]
        scores |= dict(zip(group, counted.tolist(), strict=True))
        figures = {figure: float(values[0]) for figure, values in _figures(network, [d.test for d in draws]).items()}
    seconds = time.perf_counter() - begin
    return Measured(figures if len(trials) == 1 else {"validation": [scores[trial] for trial in trials]}, seconds)


def train_networks(
    method: str,
    trials: Sequence[Sequence[float]],
    samples: Sequence[Samples],
    model: Mapping[str, Any],
    *,
    seed: tuple[int, int],
    references: Floats | None = None,
) -> Network:
    """Train one network per trial and draw; the draws of the first trial come first.

    Parameters
    ----------
    method : str
        A key of `OBJECTIVES`.
    trials : sequence of pairs
        Learning rate and option; the option is the same in all trials.
    samples : sequence of Samples
        The training samples of each draw, n in every draw.
    model : mapping
        ``hidden`` units, ``classes``, ``steps``, the ``batch``, which is cut to half the samples, and the weight
        ``decay``, which ERM does not read because it is the option of ERM.
    seed : pair of int
        Seed and stream of the initial parameters and of the order of the samples, the same for all trials.
    references : array (number of draws, n), optional
        The losses of the reference models on the samples.
    """
    inputs, labels = stacked(samples)
    draws, num = labels.shape
    batch = min(model["batch"], num // 2)
    rngs = [_rng(*seed, repeat) for repeat in range(draws)]
    first = start(rngs, inputs=inputs.shape[2], hidden=model["hidden"], classes=model["classes"])
    parameters = {name: np.tile(values, (len(trials), 1, 1)) for name, values in first._asdict().items()}
    orders = np.stack([_order(rng, num, batch, model["steps"]) for rng in rngs])
    rates = np.repeat([rate for rate, _ in trials], draws)[:, None, None].astype(np.float32)
    option = trials[0][1]
    decay = option if method == ERM else model["decay"]
    optimizer = AdamW(np, weight_decay=decay, beta2=0.99)
    state = optimizer.init(parameters)
    # Model k is trained on draw k % draws.
    places = np.tile(np.arange(draws), len(trials))[:, None]
    zeros = np.zeros((len(places), batch), dtype=np.float32)
    for step in range(model["steps"]):
        rows = orders[places, np.arange(step * batch, (step + 1) * batch)]
        network = Network(**parameters)
        batch_losses = losses(network, inputs[places, rows], labels[places, rows])
        reference_losses = zeros if references is None else references[places, rows]
        weights = OBJECTIVES[method].weights(batch_losses, reference_losses, option)
        slopes = gradients(network, inputs[places, rows], labels[places, rows], weights)
        parameters, state = optimizer.update(parameters, slopes._asdict(), state, rates)
    return Network(**parameters)


def samples_of(method: str, draws: Sequence[Parts], model: Mapping[str, Any]) -> list[Samples]:
    """Return the training samples of a method in each draw.

    A reference model has the first ``num_samples`` samples of the part for reference models; the control has these and
    the samples of the target.
    """
    if method == REFERENCE:
        return [_first(parts.reference, model["num_samples"]) for parts in draws]
    targets = [parts.target for parts in draws]
    if method != ALL:
        return targets
    more = [_first(parts.reference, model["num_samples"]) for parts in draws]
    return [
        Samples(np.concatenate([a.inputs, b.inputs]), np.concatenate([a.labels, b.labels]))
        for a, b in zip(targets, more, strict=True)
    ]


def stacked(samples: Sequence[Samples]) -> tuple[Floats, Integers]:
    """Return the inputs (draws, n, d) and the labels (draws, n) of all draws."""
    return np.stack([each.inputs for each in samples]), np.stack([each.labels for each in samples])


def _first(samples: Samples, num: int) -> Samples:
    return Samples(samples.inputs[:num], samples.labels[:num])


def _order(rng: np.random.Generator, num: int, batch: int, steps: int) -> Integers:
    """Return the samples of all steps: in every epoch each sample once, except those that fill no batch."""
    used = num // batch * batch
    epochs = -(-steps * batch // used)
    return np.concatenate([rng.permutation(num)[:used] for _ in range(epochs)])[: steps * batch]


def _figures(network: Network, samples: Sequence[Samples]) -> dict[str, Floats]:
    """Return accuracy and loss of each trial, averaged over the draws."""
    inputs, labels = stacked(samples)
    trials = len(network.first) // len(samples)
    figures: dict[str, Floats] = {"accuracy": np.zeros(trials), "loss": np.zeros(trials)}
    for trial in range(trials):
        # The test samples of all trials at a time would take much memory.
        part = Network(*(values[trial * len(samples) : (trial + 1) * len(samples)] for values in network))
        figures["accuracy"][trial] = np.mean(predictions(part, inputs) == labels)
        figures["loss"][trial] = np.mean(losses(part, inputs, labels))
    return figures


def _rng(*seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)
