"""The rules for gamma, the weight of a batch's own estimate in the moving average of the inner estimates."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final, NamedTuple, TypeAlias

import numpy as np

from drrho_clip.reproduce.estimator.pairs import Floats
from drrho_core import cosine_gamma, recommended_gamma_min, scent_gamma

__all__ = ["COSINE", "HALF", "NO_MEMORY", "RELEASED", "RULES", "SCENT", "Moment"]


class Moment(NamedTuple):
    """A moment of a training: the epochs that are over, as a fraction, and the epochs of the whole training."""

    epoch: float
    epochs: int


Gamma: TypeAlias = "float | tuple[Floats, Floats]"

# FastCLIP's last value of gamma, the share of the epochs in which its code lets gamma fall, and SCENT's step size for
# CLIP.
_LAST: Final = 0.2
_SHARE: Final = 0.5
_LOG_ALPHA: Final = 10.0


def _constant(gamma: float) -> Callable[[Moment, tuple[Floats, Floats]], Gamma]:
    return lambda _, __: gamma


def _by_epoch(moment: Moment, _: tuple[Floats, Floats]) -> Gamma:
    return cosine_gamma(np.floor(moment.epoch).item(), num_epochs=moment.epochs, gamma_min=_LAST)


def _by_step(moment: Moment, _: tuple[Floats, Floats]) -> Gamma:
    return cosine_gamma(moment.epoch, num_epochs=moment.epochs, gamma_min=_LAST)


def _over_half(moment: Moment, _: tuple[Floats, Floats]) -> Gamma:
    # After the last epoch of the share gamma keeps its last value.
    return cosine_gamma(np.floor(moment.epoch).item(), num_epochs=_SHARE * moment.epochs, gamma_min=_LAST)


def _released(moment: Moment, _: tuple[Floats, Floats]) -> Gamma:
    last = recommended_gamma_min(moment.epochs)
    return cosine_gamma(np.floor(moment.epoch).item(), num_epochs=moment.epochs, gamma_min=last)


def _scent(_: Moment, log_inner: tuple[Floats, Floats]) -> Gamma:
    image, text = (np.asarray(scent_gamma(rows, log_alpha=_LOG_ALPHA)) for rows in log_inner)
    return image, text


NO_MEMORY: Final = "1"
"""The rule without a moving average: gamma = 1."""

COSINE: Final = "cosine by epoch"
"""FastCLIP's cosine over all epochs, to 0.2."""

HALF: Final = "cosine over half"
"""FastCLIP's cosine over half of the epochs, as in its code; gamma is 0.2 from then on."""

RELEASED: Final = "DRRho's code"
"""The cosine over all epochs to `recommended_gamma_min`, as in the code released with DRRho-CLIP."""

SCENT: Final = "SCENT"
"""SCENT's rule, with a gamma per anchor."""

RULES: Final[Mapping[str, Callable[[Moment, tuple[Floats, Floats]], Gamma]]] = {
    NO_MEMORY: _constant(1.0),
    "0.8": _constant(0.8),
    "0.5": _constant(0.5),
    "0.2": _constant(0.2),
    COSINE: _by_epoch,
    "cosine by step": _by_step,
    HALF: _over_half,
    RELEASED: _released,
    SCENT: _scent,
}
"""``rule(moment, log_inner)`` returns gamma for a batch with these inner estimates (b,), image and text."""
