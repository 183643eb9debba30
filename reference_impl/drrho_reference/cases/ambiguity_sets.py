"""Problems of the risks: every ambiguity set on losses of every kind, and the moving average of the KL risk."""
# ruff: noqa: D401 - the docstring of a problem is the description of its case in the report

from __future__ import annotations

from typing import Any

import numpy as np

from drrho_reference._checks import FloatArray
from drrho_reference.cases.draws import MASKS, NEVER, SAMPLES, SETS, SLICES, draw_losses, mask_table
from drrho_reference.cases.problem import Draw, Problem, SetOf, entering

PROBLEMS: list[Problem] = []
problem = entering(PROBLEMS)

# One slice of losses for each kind. Ties share the last weights of CVaR. If all losses are equal, all weights give the
# same risk. The scales 1e-30 and 1e30 reveal constants that are not multiplied by the scale of the losses.
_KINDS = ("positive", "signed", "negative", "ties", "all equal", "small", "large")


def _kinds(rng: np.random.Generator) -> FloatArray:
    """Draw one row of losses for each of _KINDS."""
    rows = [rng.gamma(2.0, size=SAMPLES), rng.normal(size=SAMPLES), -1.0 - rng.gamma(2.0, size=SAMPLES)]
    rows += [np.array([0.5, 1.0, 1.0, 0.0, 1.0, 0.5]), np.full(SAMPLES, rng.normal())]
    return np.stack([*rows, *(scale * rng.normal(size=SAMPLES) for scale in (1e-30, 1e30))])


def _kinds_of(ambiguity_set: SetOf) -> Draw:
    return lambda rng: ((_kinds(rng), ambiguity_set),)


def _hidden(losses: FloatArray) -> FloatArray:
    """Replace the entries that the masks exclude by nan: an implementation that reads such an entry returns nan."""
    return np.where(mask_table(), losses, np.nan)


def _enter_risks(ambiguity_set: SetOf) -> None:
    """Add the problems that exist for every ambiguity set."""

    def enter(function: str, name: str, sentence: str, rows: tuple[str, ...], draw: Draw) -> None:
        PROBLEMS.append(Problem(function, f"{ambiguity_set.name}{name}", sentence, draw, rows))

    def masked(rng: np.random.Generator) -> tuple[Any, ...]:
        losses = _hidden(rng.normal(size=(SLICES, SAMPLES)))
        return (losses.T, ambiguity_set), {"axis": 0, "where": mask_table().T}

    def steered(rng: np.random.Generator) -> tuple[Any, ...]:
        losses = (_hidden(draw_losses(rng)) for _ in range(2))
        return (*losses, ambiguity_set), {"reference_weight": 1.5, "where": mask_table()}

    def weighted(rng: np.random.Generator) -> tuple[Any, ...]:
        losses = (_hidden(draw_losses(rng)) for _ in range(2))
        return (*losses, ambiguity_set, rng.normal(size=SLICES)), {"reference_weight": 1.5, "where": mask_table()}

    # Losses of all signs, ties and scales, without a mask.
    enter("worst_case", "", "Losses of every kind.", _KINDS, _kinds_of(ambiguity_set))
    # Problems with masks for worst_case, drrho_risk and drrho_risk_vjp.
    masks = tuple(MASKS)
    sentence = "Slices along the first axis; entries that the mask excludes are nan and do not count in n."
    enter("worst_case", ": mask", sentence, masks, masked)
    sentence = "Excess losses with a reference weight above 1; entries that the mask excludes are nan."
    enter("drrho_risk", ": mask", sentence, masks, steered)
    sentence = "An upstream gradient that differs from slice to slice, as with a weight per token."
    enter("drrho_risk_vjp", ": mask", sentence, masks, weighted)
    # At radius 0 the risk of a ball is the mean of the losses, at a large radius their maximum.
    if "radius" in ambiguity_set.parameters:
        for radius, name, sentence in (
            (0.0, ": radius 0", "The smallest ball gives the mean of the losses."),
            (64.0, ": saturation", "A large ball gives the largest loss; equal largest losses share the weight."),
        ):
            ball = SetOf(ambiguity_set.name, {**ambiguity_set.parameters, "radius": radius})
            enter("worst_case", name, sentence, _KINDS, _kinds_of(ball))


for _set in SETS:
    _enter_risks(_set)

_KL_PENALTY = SETS[1]


@problem("drrho_risk")
def no_options(rng: np.random.Generator) -> tuple[Any, ...]:
    """The worst case of the loss minus the reference model's loss."""
    return (draw_losses(rng), draw_losses(rng), _KL_PENALTY), {}


@problem("drrho_risk_vjp")
def weights_per_token(rng: np.random.Generator) -> tuple[Any, ...]:
    """Risks of slices along the first axis, each with its own weight; one weight is 0."""
    upstream = np.where(np.arange(SAMPLES) == 2, 0.0, rng.gamma(2.0, size=SAMPLES))
    return (draw_losses(rng), draw_losses(rng), _KL_PENALTY, upstream), {"axis": 0}


@problem("excess_loss")
def weighted_difference(rng: np.random.Generator) -> tuple[Any, ...]:
    """The loss minus lambda times the reference model's loss."""
    return (draw_losses(rng), draw_losses(rng)), {"reference_weight": 0.75}


@problem("moving_average_kl")
def first_visit(rng: np.random.Generator) -> tuple[Any, ...]:
    """On the first batch the moving average is the mean of the batch, whatever gamma is."""
    return (draw_losses(rng)[0], draw_losses(rng)[0], np.array(NEVER)), {"temperature": 0.75, "gamma": 0.25}


@problem("moving_average_kl")
def memory(rng: np.random.Generator) -> tuple[Any, ...]:
    """A moving average with an old estimate, a mask and a reference weight."""
    mask = mask_table()[0]
    options = {"temperature": 1.5, "gamma": 0.3, "reference_weight": 0.5, "where": mask}
    losses = (np.where(mask, draw_losses(rng)[0], np.nan) for _ in range(2))
    return (*losses, np.array(0.4)), options


@problem("moving_average_kl")
def no_memory(rng: np.random.Generator) -> tuple[Any, ...]:
    """With gamma = 1 the old estimate has no influence: the result is the KL penalty's risk and weights."""
    return (draw_losses(rng)[0], draw_losses(rng)[0], np.array(-3.0)), {"temperature": 0.75}
