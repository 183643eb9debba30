"""The standing of a claim: the rows that count today, what they say, and the experiments that are still missing.

A folder keeps every row that was ever measured. A world may since have other sizes, a grid of learning rates may have
grown, and a command may have been interrupted. So a row counts only if the plan of today has the experiment, and a
world counts only if no experiment of the world is missing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from drrho_clip.reproduce.claim import Claim, Judgement
from drrho_clip.reproduce.experiment import CHOICE_SEED, LEARNING_RATES
from drrho_clip.reproduce.plan import Plan
from drrho_clip.reproduce.results import Results, Row
from drrho_clip.reproduce.statistics import HOLDS, NOT_SHOWN
from drrho_clip.reproduce.worlds import WORLDS, scaled_worlds
from drrho_core.backend import default_backend

__all__ = ["Standing", "standing_of"]

# The seeds of a claim without rows.
_NUM_SEEDS = 5


class Standing(NamedTuple):
    """The standing of a claim.

    Attributes
    ----------
    rows, trials : sequence of Row
        The rows of the claim that count, and the trials of learning rates that belong to them.
    judgement : Judgement or None
        The outcome; None if no world is complete.
    missing : dict of str to int
        The number of missing experiments of each world that is not complete, as far as the rows determine them.
    num_outdated : int
        Number of rows of the claim that are not in the plan of today.
    """

    rows: Sequence[Row]
    trials: Sequence[Row]
    judgement: Judgement | None
    missing: dict[str, int]
    num_outdated: int


def standing_of(claim: Claim, results: Results) -> Standing:
    """Return the standing of a claim in a folder of results.

    The seeds are those of the rows. A claim that promises a difference in every world does not hold before every world
    is complete.
    """
    # Results may be read on a machine with another array library than that on which they were measured. Rows of this
    # machine's library, and of experiments that name their library, have the hash of the plan anyway.
    here = default_backend()
    elsewhere = {replace(row.experiment, backend=here).config_hash(): row for row in results.rows.values()}
    by_hash = elsewhere | dict(results.rows)
    own = results.of(claim.name)
    # Choices have seeds from CHOICE_SEED on.
    seeds = sorted({row.seed for row in own if row.seed < CHOICE_SEED})
    if not seeds:
        # A claim that has only its choices so far has at least as many seeds as its choices.
        seeds = list(range(len({row.seed for row in own}) or _NUM_SEEDS))
    plan = Plan(by_hash, scaled_worlds(WORLDS.values(), results.scale), seeds=seeds, quick=results.is_quick)
    claim.experiments(plan)
    missing = Counter(experiment.dataset for experiment in plan.missing())
    planned = plan.finished()
    complete = [row for row in planned if row.dataset not in missing]
    rows = [row for row in complete if row.claim == claim.name]
    judgement = claim.judge(rows) if rows else None
    if judgement is not None and missing:
        verdict, names = judgement.verdict, ", ".join(missing)
        sentence = f"{judgement.sentence} Not measured yet: {names}."
        if verdict == HOLDS:
            verdict = NOT_SHOWN
            sentence = f"Not measured yet: {names}. In the measured worlds: {judgement.sentence}"
        judgement = judgement._replace(verdict=verdict, sentence=sentence)
    trials = [row for row in complete if row.claim == LEARNING_RATES]
    num_outdated = len(own) - sum(row.claim == claim.name for row in planned)
    return Standing(rows, trials, judgement, dict(missing), num_outdated)
