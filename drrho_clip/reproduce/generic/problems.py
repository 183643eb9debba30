"""The problems: handwritten digits, drawn clusters, and a drawn language; with few samples, wrong labels, or both.

Only training samples have wrong labels. Each draw has samples for the target, other samples for the reference models,
and clean samples for validation and test. In the language a sample is a context of two tokens with the token that
follows, and noise replaces tokens of the text, in contexts too.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, Final, NamedTuple

import numpy as np

from drrho_clip.errors import MissingExtra
from drrho_clip.reproduce.generic.network import Floats, Integers

__all__ = ["PROBLEMS", "Parts", "Problem", "Samples", "draw", "missing"]


class Samples(NamedTuple):
    """Inputs (n, d) and labels (n,)."""

    inputs: Floats
    labels: Integers


class Parts(NamedTuple):
    """The samples of a draw: for the target, for the reference models, for validation and for the test."""

    target: Samples
    reference: Samples
    validation: Samples
    test: Samples


class Problem(NamedTuple):
    """A problem.

    Attributes
    ----------
    few, many : int
        Samples of the target with few samples, and without this restriction.
    noise : float
        The share of wrong labels or tokens in training, in [0, 1), in the conditions with noise.
    pool : int
        Samples for the reference models.
    classes : int
    figure : str
        The figure that counts: "accuracy", or "loss" in nats.
    """

    few: int
    many: int
    noise: float
    pool: int
    classes: int
    figure: str

    def conditions(self) -> Mapping[str, Mapping[str, float]]:
        """Return the number of samples and the share of noise, by the name of the condition."""
        return {
            "few": {"num_samples": self.few, "noise": 0.0},
            "noise": {"num_samples": self.many, "noise": self.noise},
            "both": {"num_samples": self.few, "noise": self.noise},
        }


PROBLEMS: Final[Mapping[str, Problem]] = {
    "digits": Problem(100, 500, 0.4, 597, 10, "accuracy"),
    "clusters": Problem(200, 1_000, 0.4, 2_000, 6, "accuracy"),
    "language": Problem(400, 2_000, 0.3, 4_000, 20, "loss"),
}
"""The problems by name."""

_VALIDATION: Final = 200
_TEST: Final = {"digits": 500, "clusters": 1_000, "language": 1_000}
# Drawn classes consist of several clusters, so that a linear classifier does not suffice.
_CLUSTERS_PER_CLASS: Final = 3
_DIMENSIONS: Final = 20
_SPREAD: Final = 1.0
_CONTEXT: Final = 2
_SHARPNESS: Final = 1.5


def missing() -> dict[str, str]:
    """Return the problems whose data are not installed, each with a line that says how to install them."""
    if importlib.util.find_spec("sklearn") is None:
        return {"digits": str(MissingExtra("the problem digits", "scikit-learn"))}
    return {}


def draw(name: str, settings: Mapping[str, Any], rng: np.random.Generator) -> Parts:
    """Draw the samples of a problem.

    Parameters
    ----------
    name : str
        A key of `PROBLEMS`.
    settings : mapping
        ``num_samples`` of the target, ``pool`` for the reference models, and ``noise``, the share of wrong labels.
    rng : Generator

    Examples
    --------
    >>> parts = draw("clusters", {"num_samples": 8, "pool": 4, "noise": 0.5}, np.random.default_rng(0))
    >>> parts.target.inputs.shape, len(parts.reference.labels), len(parts.test.labels)
    ((8, 20), 4, 1000)
    """
    sizes = (settings["num_samples"], settings["pool"], _VALIDATION, _TEST[name])
    noises = (settings["noise"], settings["noise"], 0.0, 0.0)
    if name == "language":
        return _language(sizes, noises, rng)
    inputs, labels = _digits(rng) if name == "digits" else _clusters(sum(sizes), rng)
    parts = []
    for rows, noise in zip(np.split(np.arange(sum(sizes)), np.cumsum(sizes)[:-1]), noises, strict=True):
        wrong = with_noise(labels[rows], noise, PROBLEMS[name].classes, rng)
        parts.append(Samples(inputs[rows].astype(np.float32), wrong))
    return Parts(*parts)


def with_noise(labels: Integers, share: float, classes: int, rng: np.random.Generator) -> Integers:
    """Return labels (n,) of which exactly this share, rounded to a whole number, is another class, drawn uniformly."""
    chosen = rng.permutation(len(labels))[: round(share * len(labels))]
    wrong = labels.copy()
    wrong[chosen] = (labels[chosen] + rng.integers(1, classes, size=len(chosen))) % classes
    return wrong


def _digits(rng: np.random.Generator) -> tuple[Floats, Integers]:
    images, labels = _load_digits()
    order = rng.permutation(len(labels))
    return images[order], labels[order]


@lru_cache(maxsize=1)
def _load_digits() -> tuple[Floats, Integers]:
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    return np.asarray(images, dtype=np.float32) / 16, np.asarray(labels, dtype=np.int64)


def _clusters(num: int, rng: np.random.Generator) -> tuple[Floats, Integers]:
    classes = PROBLEMS["clusters"].classes
    centres = rng.normal(size=(classes * _CLUSTERS_PER_CLASS, _DIMENSIONS))
    cluster = rng.integers(0, len(centres), size=num)
    return centres[cluster] + _SPREAD * rng.normal(size=(num, _DIMENSIONS)), cluster % classes


def _language(sizes: tuple[int, ...], noises: tuple[float, ...], rng: np.random.Generator) -> Parts:
    """Draw four texts of one language: the logits of the next token are a sum over the two tokens before."""
    classes = PROBLEMS["language"].classes
    tables = _SHARPNESS * rng.normal(size=(_CONTEXT, classes, classes))
    parts = []
    for size, noise in zip(sizes, noises, strict=True):
        text = _text(size + _CONTEXT, tables, rng)
        text = with_noise(text, noise, classes, rng)
        contexts = np.stack([text[place : place + size] for place in range(_CONTEXT)], axis=1)
        codes = np.eye(classes, dtype=np.float32)[contexts].reshape(size, -1)
        parts.append(Samples(codes, text[_CONTEXT:]))
    return Parts(*parts)


def _text(length: int, tables: Floats, rng: np.random.Generator) -> Integers:
    # The largest of logits plus Gumbel noise is a draw from their softmax.
    gumbel = rng.gumbel(size=(length, tables.shape[2]))
    text = np.zeros(length, dtype=np.int64)
    text[:_CONTEXT] = rng.integers(0, tables.shape[2], size=_CONTEXT)
    for place in range(_CONTEXT, length):
        logits = sum(tables[k, text[place - _CONTEXT + k]] for k in range(_CONTEXT))
        text[place] = np.argmax(logits + gumbel[place])
    return text
