"""The choice of a setting from a grid, in one or two experiments on the seed of the choices.

Claims whose trainings take less than a second need no row per trial: an experiment tries the whole grid, and the row
has the list ``validation``, one figure per trial, larger = better. A trial that diverged has null in place of a figure.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Final

import numpy as np

from drrho_clip.reproduce.experiment import CHOICE_SEED, Experiment
from drrho_clip.reproduce.plan import Plan
from drrho_clip.reproduce.results import Row

__all__ = ["TRIED", "add_seeds", "best_place", "chosen_rate", "chosen_trial", "tried"]

TRIED: Final = "validation"
"""The figure of a choice that has one number per trial."""


def chosen_trial(plan: Plan, experiment: Experiment, trials: Sequence[Any]) -> Any | None:
    """Add the experiment that tries a grid; return the best trial as soon as the experiment has a row.

    Parameters
    ----------
    plan : Plan
    experiment : Experiment
        Seed and ``trials`` are replaced.
    trials : sequence
        At least two trials, as JSON can hold them.
    """
    row = _row_of_choice(plan, experiment, trials)
    return None if row is None else trials[best_place(row)]


def chosen_rate(
    plan: Plan, experiment: Experiment, rates: Sequence[float], lower: Sequence[float], higher: Sequence[float]
) -> float | None:
    """Add the experiment that tries learning rates; return the best rate as soon as it is known.

    If the best rate is the lowest or the highest, a second experiment tries the rates beyond it.

    Parameters
    ----------
    plan : Plan
    experiment : Experiment
        As in `chosen_trial`.
    rates : sequence of float
        At least two rates, in ascending order.
    lower, higher : sequence of float
        At least two rates below and above `rates`; or none, and there is no second experiment.
    """
    row = _row_of_choice(plan, experiment, rates)
    if row is None:
        return None
    place = best_place(row)
    further = lower if place == 0 else higher if place == len(rates) - 1 else ()
    if not further:
        return rates[place]
    second = _row_of_choice(plan, experiment, further)
    if second is None:
        return None
    # If the best rates of both experiments are equally good, that of the first experiment is taken.
    return further[best_place(second)] if max(tried(second)) > max(tried(row)) else rates[place]


def _row_of_choice(plan: Plan, experiment: Experiment, trials: Sequence[Any]) -> Row | None:
    """Add the experiment that tries a grid; return its row, or None if there is none yet."""
    choice = replace(experiment, seed=CHOICE_SEED, settings={**experiment.settings, "trials": list(trials)})
    plan.add(choice)
    return plan.rows.get(choice.config_hash())


def add_seeds(plan: Plan, experiment: Experiment, trial: Any) -> None:
    """Add an experiment with a single trial for every seed of the plan."""
    for seed in plan.seeds:
        plan.add(replace(experiment, seed=seed, settings={**experiment.settings, "trials": [trial]}))


def best_place(row: Row) -> int:
    """Return the place of the best trial of a choice; of equal trials the first counts.

    A trial that diverged is taken only if all trials diverged.
    """
    return int(np.argmax(tried(row)))


def tried(row: Row) -> list[float]:
    """Return the figures of the trials of a choice; a trial that diverged has minus infinity."""
    # If every trial diverged, the row has no list.
    if row.diverged:
        return [-math.inf] * len(row.settings["trials"])
    # The file has null for a number that is not finite, because JSON has no such numbers.
    figures: list[float | None] = [*row.curve(TRIED)]
    return [-math.inf if figure is None or math.isnan(figure) else figure for figure in figures]
