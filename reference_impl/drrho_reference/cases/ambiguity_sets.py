"""Problems of the risks: every ambiguity set on losses of every kind, and the moving average of the KL risk."""
# ruff: noqa: D401 - a problem's docstring is the sentence of the case in the report

from __future__ import annotations

from typing import Any

import numpy as np

from drrho_reference._checks import FloatArray
from drrho_reference.cases.draws import MASKS, NEVER, SAMPLES, SETS, SLICES, draw_losses, mask_table
from drrho_reference.cases.problem import Draw, Problem, SetOf, entering

PROBLEMS: list[Problem] = []
problem = entering(PROBLEMS)

# One slice of losses for each kind: ties move CVaR's quantile, equal losses make every ball flat, and the scales 1e-30
# and 1e30 show constants that are added without a unit.
_KINDS = ("positive", "signed", "negative", "ties", "all equal", "small", "large")


def _kinds(rng: np.random.Generator) -> FloatArray:
    """Draw one row of losses for each of _KINDS."""
    rows = [rng.gamma(2.0, size=SAMPLES), rng.normal(size=SAMPLES), -1.0 - rng.gamma(2.0, size=SAMPLES)]
    rows += [np.array([0.5, 1.0, 1.0, 0.0, 1.0, 0.5]), np.full(SAMPLES, rng.normal())]
    return np.stack([*rows, *(scale * rng.normal(size=SAMPLES) for scale in (1e-30, 1e30))])


def _kinds_of(ambiguity_set: SetOf) -> Draw:
    return lambda rng: ((_kinds(rng), ambiguity_set),)


def _hidden(losses: FloatArray) -> FloatArray:
    """Put nan where the masks count nothing: an implementation that reads such an entry returns nan."""
    return np.where(mask_table(), losses, np.nan)


def _enter_risks(ambiguity_set: SetOf) -> None:
    """Enter the problems that every set is asked."""

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

    # Losses without a mask: signs, ties and scales.
    enter("worst_case", "", "Losses of every kind.", _KINDS, _kinds_of(ambiguity_set))
    # Masks, for the set itself, for excess losses and for their gradient.
    masks = tuple(MASKS)
    sentence = "The first axis; entries that hold nan and count for nothing, not even in n."
    enter("worst_case", ": mask", sentence, masks, masked)
    sentence = "Excess losses, with a reference weight above 1; entries that hold nan and count for nothing."
    enter("drrho_risk", ": mask", sentence, masks, steered)
    sentence = "An upstream gradient that differs from slice to slice, as weights per token give."
    enter("drrho_risk_vjp", ": mask", sentence, masks, weighted)
    # Balls have two ends: at radius 0 the risk is the mean, at a large radius the maximum.
    if "radius" in ambiguity_set.parameters:
        for radius, name, sentence in (
            (0.0, ": radius 0", "The smallest ball is the mean."),
            (64.0, ": saturation", "A large ball is the maximum, shared by its ties."),
        ):
            ball = SetOf(ambiguity_set.name, {**ambiguity_set.parameters, "radius": radius})
            enter("worst_case", name, sentence, _KINDS, _kinds_of(ball))


for _set in SETS:
    _enter_risks(_set)

_KL_PENALTY = SETS[1]


@problem("drrho_risk")
def no_options(rng: np.random.Generator) -> tuple[Any, ...]:
    """The worst case of the loss minus the reference model's."""
    return (draw_losses(rng), draw_losses(rng), _KL_PENALTY), {}


@problem("drrho_risk_vjp")
def weights_per_token(rng: np.random.Generator) -> tuple[Any, ...]:
    """Risks along the first axis, each with a weight of its own; one weight is 0."""
    upstream = np.where(np.arange(SAMPLES) == 2, 0.0, rng.gamma(2.0, size=SAMPLES))
    return (draw_losses(rng), draw_losses(rng), _KL_PENALTY, upstream), {"axis": 0}


@problem("excess_loss")
def weighted_difference(rng: np.random.Generator) -> tuple[Any, ...]:
    """The loss minus lambda times the reference model's loss."""
    return (draw_losses(rng), draw_losses(rng)), {"reference_weight": 0.75}


@problem("moving_average_kl")
def first_visit(rng: np.random.Generator) -> tuple[Any, ...]:
    """A fresh average takes the batch's own mean, whatever gamma is."""
    return (draw_losses(rng)[0], draw_losses(rng)[0], np.array(NEVER)), {"temperature": 0.75, "gamma": 0.25}


@problem("moving_average_kl")
def memory(rng: np.random.Generator) -> tuple[Any, ...]:
    """An average with a memory, a mask and a reference weight."""
    mask = mask_table()[0]
    options = {"temperature": 1.5, "gamma": 0.3, "reference_weight": 0.5, "where": mask}
    losses = (np.where(mask, draw_losses(rng)[0], np.nan) for _ in range(2))
    return (*losses, np.array(0.4)), options


@problem("moving_average_kl")
def no_memory(rng: np.random.Generator) -> tuple[Any, ...]:
    """With gamma = 1 the state says nothing: the KL penalty's risk and weights."""
    return (draw_losses(rng)[0], draw_losses(rng)[0], np.array(-3.0)), {"temperature": 0.75}
