"""Reproduce claims: round after round, run the experiments that have no row, until none is missing."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from drrho_clip.errors import BadInput
from drrho_clip.files.lock import only_process
from drrho_clip.files.outputs import check_folder
from drrho_clip.reproduce.claim import Claim
from drrho_clip.reproduce.plan import Plan
from drrho_clip.reproduce.pool import Failure, described, measure, prepare
from drrho_clip.reproduce.results import Results
from drrho_clip.reproduce.worlds import WORLDS, World, scaled_worlds
from drrho_clip.terminal.printing import say

__all__ = ["reproduce"]


def _absent(names: Iterable[str], runs: Path, roots: Sequence[Path], *, jobs: int, quiet: bool) -> set[str]:
    """Prepare worlds, and return the names of those whose packages are not installed, after a line for each."""
    absent = set()
    for name in sorted(names):
        missing = prepare(name, runs, roots, jobs=jobs, quiet=quiet)
        if missing is not None:
            say(f"{name} is left out: {missing}")
            absent.add(name)
    return absent


def reproduce(
    claims: Sequence[Claim],
    out: Path,
    runs: Path,
    *,
    seeds: Sequence[int],
    jobs: int,
    worlds: Sequence[World] | None = None,
    roots: Sequence[Path] = (Path("/"),),
    quick: bool = False,
    scale: int = 1,
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
        Number of processes at a time, each with one thread; with 0 this process does all the work.
    worlds : sequence of World, optional
        By default all worlds; a world whose packages are not installed is left out, and a line says so.
    roots : sequence of Path
        Folders below which packages of pictures are installed.
    quick : bool
        Run the small forms of the experiments.
    scale : int
        Use models and batches that are this many times as large; see `World.scaled`. A world whose data are too few is
        left out, and a line says so.
    quiet : bool
        Show no progress.

    Returns
    -------
    Results
        All rows of the folder.

    Raises
    ------
    BadInput
        If a folder cannot be written, holds other results or is used by another command, or if an experiment failed
        after all others were run.
    """
    check_folder(out, "out")
    check_folder(runs, "runs")
    worlds = list(WORLDS.values() if worlds is None else worlds)
    say(
        *(
            f"{world.name} is left out: --scale must be at most {world.largest_scale} there, because there is one pool "
            f"of pairs, got {scale}"
            for world in worlds
            if world.largest_scale is not None and scale > world.largest_scale
        )
    )
    worlds = scaled_worlds(worlds, scale)
    failures: dict[str, Failure] = {}
    with _only_command(out, runs):
        results = Results(out, quick=quick, scale=scale)
        while True:
            # The choice of a learning rate makes new experiments known.
            plan = Plan(results.rows, worlds, seeds=seeds, quick=quick)
            for claim in claims:
                claim.experiments(plan)
            missing = [experiment for experiment in plan.missing() if experiment.config_hash() not in failures]
            if not missing:
                break
            # Claims with data of their own need no world.
            needed = WORLDS.keys() & {experiment.dataset for experiment in missing}
            absent = _absent(needed, runs, roots, jobs=jobs, quiet=quiet)
            if absent:
                worlds = [world for world in worlds if world.name not in absent]
                continue
            # Rows are written one by one, so an interruption loses running experiments only.
            failed = measure(missing, runs, jobs=jobs, keep=results.append, quiet=quiet)
            failures |= {failure.experiment.config_hash(): failure for failure in failed}
    if failures:
        raise BadInput(_report(list(failures.values()), runs))
    return results


@contextlib.contextmanager
def _only_command(out: Path, runs: Path) -> Iterator[None]:
    """Keep other commands out of the two folders, which may be the same folder."""
    with contextlib.ExitStack() as stack:
        for folder, name in {runs.resolve(): (runs, "runs"), out.resolve(): (out, "out")}.values():
            # The lock is a file in the folder.
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(only_process(folder, name))
        yield


def _report(failures: Sequence[Failure], runs: Path) -> str:
    """Return a line about the first failure; the traceback of a mistake of our code goes to a file."""
    # One line is enough for the user: failures after the first often have the same cause.
    experiment, message, trace, _ = failures[0]
    if message is None:
        file = runs / "traceback.txt"
        file.write_text(trace, encoding="utf-8")
        # The last line of a traceback names the error.
        message = f"{trace.splitlines()[-1]}, see {file}"
    count = f" ({len(failures)} experiments failed)" if len(failures) > 1 else ""
    return f"every experiment must succeed, got an error in {described(experiment)}: {message}{count}"
