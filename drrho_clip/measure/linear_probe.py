"""Linear probe: a linear classifier on frozen features says how well the features separate classes."""

from __future__ import annotations

import importlib.util
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from drrho_clip.errors import BadInput, MissingExtra
from drrho_clip.measure.similarity import checked_features

__all__ = ["LinearProbe", "check_classes", "check_installed", "linear_probe"]

STRENGTHS = (0.01, 0.1, 1.0, 10.0, 100.0)
"""Values of C, the inverse strength of the L2 regularisation, from which a validation part chooses."""


class LinearProbe(NamedTuple):
    """Accuracy in [0, 1] on the test features, and the chosen value of C."""

    accuracy: float
    strength: float


def check_installed() -> None:
    """Raise MissingExtra if scikit-learn is not installed."""
    if importlib.util.find_spec("sklearn") is None:
        raise MissingExtra("the linear probe", "scikit-learn")


def check_classes(labels: ArrayLike) -> None:
    """Raise BadInput unless labels (n,) have at least two classes, and each class has at least 5 of them.

    Examples
    --------
    >>> check_classes([0, 0, 0, 0, 0, 1])
    Traceback (most recent call last):
        ...
    drrho_clip.errors.BadInput: labels must have at least 2 classes of at least 5 features, got counts [5, 1]
    """
    _, counts = np.unique(np.asarray(labels), return_counts=True)
    if len(counts) < 2 or counts.min() < 5:
        raise BadInput(f"labels must have at least 2 classes of at least 5 features, got counts {counts.tolist()[:10]}")


def linear_probe(
    features: ArrayLike, labels: ArrayLike, test_features: ArrayLike, test_labels: ArrayLike, *, seed: int = 0
) -> LinearProbe:
    """Fit a multinomial logistic regression with L2 regularisation on features, and measure it on other features.

    Parameters
    ----------
    features, test_features : array_like (n, d) and (m, d)
        Features of a frozen encoder; all numbers are finite.
    labels, test_labels : array_like (n,) and (m,)
        The classes. Each class of the n features has at least 5 of them.
    seed : int
        Seed of the validation part: a fifth of the n features, on which C is chosen. The classifier is then fitted to
        all n features.

    Raises
    ------
    BadInput
        If an argument breaks these rules.
    MissingExtra
        If scikit-learn is not installed.

    Notes
    -----
    Source: Radford et al., "Learning transferable visual models from natural language supervision" (2021), section 3.2.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> labels = np.arange(40) % 2
    >>> features = rng.normal(size=(40, 3)) + 4 * labels[:, None]
    >>> linear_probe(features[:30], labels[:30], features[30:], labels[30:]).accuracy
    1.0
    """
    try:
        from sklearn.linear_model import LogisticRegression
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise MissingExtra("the linear probe", "scikit-learn") from error
    x, test = (checked_features("features", array, minimum=1) for array in (features, test_features))
    y, answers = np.asarray(labels), np.asarray(test_labels)
    if y.shape != (len(x),) or answers.shape != (len(test),):
        raise BadInput(f"labels must have one entry per feature, got {y.shape} and {answers.shape}")
    check_classes(y)
    fit_x, held_x, fit_y, held_y = train_test_split(x, y, test_size=0.2, random_state=seed, stratify=y)

    def fitted(strength: float, rows: np.ndarray, classes: np.ndarray) -> LogisticRegression:
        return LogisticRegression(C=strength, max_iter=2000).fit(rows, classes)

    # If several values are equally good, `argmax` takes the first: the strongest regularisation.
    scores = [float(fitted(strength, fit_x, fit_y).score(held_x, held_y)) for strength in STRENGTHS]
    strength = STRENGTHS[int(np.argmax(scores))]
    return LinearProbe(float(fitted(strength, x, y).score(test, answers)), strength)
