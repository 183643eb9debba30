"""The objectives: each turns the losses of a batch into weights of the samples, with functions of drrho_core.

Shapes: m models, b samples in the batch. By Danskin's theorem the gradient of a risk is the sum of the losses'
gradients with the weights of the worst case, so the weights are all that the training needs.

Each objective has an option with three values: the size of the ambiguity set, the share of the samples that RHO-LOSS
keeps, or for the mean (ERM) the weight decay.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final, NamedTuple

import numpy as np

from drrho_clip.reproduce.generic.network import Floats
from drrho_core import (
    AmbiguitySet,
    CappedKLPenalty,
    ChiSquareBall,
    CVaR,
    KLPenalty,
    drrho_risk,
    select_top_excess,
)

__all__ = ["ERM", "OBJECTIVES", "RHO", "SETS", "Objective"]

ERM: Final = "erm"
RHO: Final = "rho"


class Objective(NamedTuple):
    """An objective.

    Attributes
    ----------
    options : tuple of float
        The values of the option that are tried.
    weights : callable
        ``weights(losses, reference_losses, option)`` returns the weights (m, b) of losses (m, b).
    steered : bool
        The objective reads the losses of a reference model.
    """

    options: tuple[float, ...]
    weights: Callable[[Floats, Floats, float], Floats]
    steered: bool


# The capped set bounds each weight by twice the mean weight, so a single wrong label cannot take all weight.
_CAP: Final = 0.5
# Each set from nearly equal weights to weights on few samples; losses are in nats.
_SETS: Final[Mapping[str, tuple[Callable[[float], AmbiguitySet], tuple[float, ...]]]] = {
    "cvar": (CVaR, (0.9, 0.6, 0.3)),
    "kl": (KLPenalty, (4.0, 2.0, 1.0)),
    "chi-square": (ChiSquareBall, (0.03, 0.2, 1.0)),
    "capped-kl": (lambda temperature: CappedKLPenalty(temperature, _CAP), (4.0, 2.0, 1.0)),
}
SETS: Final = tuple(_SETS)
"""The names of the ambiguity sets."""


def _mean(losses: Floats, _: Floats, __: float) -> Floats:
    return np.full_like(losses, 1 / losses.shape[1])


def _selection(losses: Floats, reference_losses: Floats, share: float) -> Floats:
    weights = np.zeros_like(losses)
    kept = max(1, round(share * losses.shape[1]))
    for row, loss, reference_loss in zip(weights, losses, reference_losses, strict=True):
        row[select_top_excess(loss, reference_loss, k=kept)] = 1 / kept
    return weights


def _worst_case(name: str, *, steered: bool) -> Objective:
    make, options = _SETS[name]

    def weights(losses: Floats, reference_losses: Floats, option: float) -> Floats:
        risk = drrho_risk(losses, reference_losses, make(option), reference_weight=float(steered))
        return np.asarray(risk.weights)

    return Objective(options, weights, steered)


OBJECTIVES: Final[Mapping[str, Objective]] = {
    ERM: Objective((0.0, 0.5, 4.0), _mean, steered=False),
    **{f"dro-{name}": _worst_case(name, steered=False) for name in SETS},
    RHO: Objective((0.9, 0.6, 0.3), _selection, steered=True),
    **{f"drrho-{name}": _worst_case(name, steered=True) for name in SETS},
}
"""The objectives by the name of the method."""
