"""The rules for gamma, the weight of a batch's own estimate in the moving average of the inner estimates."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final, NamedTuple, TypeAlias

import numpy as np

from drrho_clip.reproduce.estimator.pairs import Floats
from drrho_core import cosine_gamma, scent_gamma

__all__ = ["COSINE", "NO_MEMORY", "RULES", "SCENT", "Moment"]


class Moment(NamedTuple):
    """A moment of a training: the epochs that are over, as a fraction, and the epochs of the whole training."""

    epoch: float
    epochs: int


Gamma: TypeAlias = "float | tuple[Floats, Floats]"

# FastCLIP's last value of gamma, and SCENT's step size for CLIP.
_LAST: Final = 0.2
_LOG_ALPHA: Final = 10.0


def _constant(gamma: float) -> Callable[[Moment, tuple[Floats, Floats]], Gamma]:
    return lambda _, __: gamma


def _by_epoch(moment: Moment, _: tuple[Floats, Floats]) -> Gamma:
    return cosine_gamma(np.floor(moment.epoch).item(), num_epochs=moment.epochs, gamma_min=_LAST)


def _by_step(moment: Moment, _: tuple[Floats, Floats]) -> Gamma:
    return cosine_gamma(moment.epoch, num_epochs=moment.epochs, gamma_min=_LAST)


def _scent(_: Moment, log_inner: tuple[Floats, Floats]) -> Gamma:
    image, text = (np.asarray(scent_gamma(rows, log_alpha=_LOG_ALPHA)) for rows in log_inner)
    return image, text


NO_MEMORY: Final = "1"
"""The rule without a moving average: gamma = 1."""

COSINE: Final = "cosine by epoch"
"""FastCLIP's rule."""

SCENT: Final = "SCENT"
"""SCENT's rule, with a gamma per anchor."""

RULES: Final[Mapping[str, Callable[[Moment, tuple[Floats, Floats]], Gamma]]] = {
    NO_MEMORY: _constant(1.0),
    "0.8": _constant(0.8),
    "0.5": _constant(0.5),
    "0.2": _constant(0.2),
    COSINE: _by_epoch,
    "cosine by step": _by_step,
    SCENT: _scent,
}
"""``rule(moment, log_inner)`` returns gamma for a batch with these inner estimates (b,), image and text."""
