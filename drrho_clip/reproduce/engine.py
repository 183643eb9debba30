"""Reproduce claims: round after round, run the experiments that have no row, until none is missing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from drrho_clip.files.outputs import check_folder
from drrho_clip.reproduce.claim import Claim
from drrho_clip.reproduce.plan import Plan
from drrho_clip.reproduce.pool import measure
from drrho_clip.reproduce.results import Results
from drrho_clip.reproduce.worlds import WORLDS, World

__all__ = ["reproduce"]


def reproduce(
    claims: Sequence[Claim],
    out: Path,
    runs: Path,
    *,
    seeds: Sequence[int],
    jobs: int,
    worlds: Sequence[World] | None = None,
    quick: bool = False,
    quiet: bool = False,
) -> Results:
    """Measure claims; experiments that have a row are not repeated.

    Parameters
    ----------
    claims : sequence of Claim
    out : Path
        The folder of the results.
    runs : Path
        The folder of the runs, which may be deleted afterwards.
    seeds : sequence of int
        The seeds of the claims.
    jobs : int
        Number of processes at a time.
    worlds : sequence of World, optional
        By default all worlds whose data are there.
    quick : bool
        Run the small forms of the experiments.
    quiet : bool
        Show no progress.

    Returns
    -------
    Results
        All rows of the folder.

    Raises
    ------
    BadInput
        If a folder cannot be written or holds other results, or if an experiment fails.
    """
    check_folder(out, "out")
    check_folder(runs, "runs")
    results = Results(out, quick=quick)
    worlds = [world for world in WORLDS.values() if world.missing() is None] if worlds is None else worlds
    while True:
        # The choice of a learning rate makes new experiments known.
        plan = Plan(results.rows, worlds, seeds=seeds, quick=quick)
        for claim in claims:
            claim.experiments(plan)
        missing = plan.missing()
        if not missing:
            return results
        measure(missing, runs, jobs=jobs, keep=results.append, quiet=quiet)
