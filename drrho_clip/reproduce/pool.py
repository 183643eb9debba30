"""Experiments in several processes at a time, each with one thread, so that two cores work on two experiments.

The parent process writes a row as soon as an experiment is over. A killed command loses the experiments that were
running, and the same command goes on with these.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Final, TypeVar

from drrho_clip.reproduce.experiment import Experiment
from drrho_clip.reproduce.results import Row
from drrho_clip.reproduce.tasks import run
from drrho_clip.reproduce.training import reference_run
from drrho_clip.terminal.progress import Reporter

__all__ = ["measure"]

_Result = TypeVar("_Result")

# Libraries read these variables when they are imported.
_THREADS: Final = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


def measure(
    experiments: Sequence[Experiment],
    folder: Path,
    *,
    jobs: int,
    keep: Callable[[Row], None],
    quiet: bool = False,
) -> None:
    """Run experiments; reference models that they need are trained first.

    Parameters
    ----------
    experiments : sequence of Experiment
    folder : Path
        The folder of the runs.
    jobs : int
        Number of processes; with 1 the experiments run in this process.
    keep : callable
        Called with each row as soon as it is there.
    quiet : bool
        Show no progress.
    """
    # Two experiments that need the same reference model must not train it at the same time.
    needed = {key: each for each in experiments if (key := each.reference_hash()) is not None}
    with _workers(jobs) as workers, Reporter("experiments", len(needed) + len(experiments), quiet=quiet) as reporter:

        def report(_: object) -> None:
            reporter.advance()

        def keep_and_report(row: Row) -> None:
            keep(row)
            reporter.advance(f"{row.claim}: {row.method} on {row.dataset}, seed {row.seed}")

        _each(workers, reference_run, list(needed.values()), folder, report)
        _each(workers, run, experiments, folder, keep_and_report)


def _each(
    workers: ProcessPoolExecutor | None,
    task: Callable[[Experiment, Path], _Result],
    experiments: Sequence[Experiment],
    folder: Path,
    keep: Callable[[_Result], None],
) -> None:
    if workers is None:
        for experiment in experiments:
            keep(task(experiment, folder))
        return
    waiting = {workers.submit(task, experiment, folder) for experiment in experiments}
    try:
        while waiting:
            over, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            for future in over:
                keep(future.result())
    finally:
        # After an error, experiments that have not begun are not begun.
        for future in waiting:
            future.cancel()


@contextlib.contextmanager
def _workers(jobs: int) -> Iterator[ProcessPoolExecutor | None]:
    """Open the pool, or yield None if this process alone does the work."""
    if jobs == 1:
        yield None
        return
    with _one_thread(), ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as workers:
        yield workers


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Let processes that are started inside the block use one thread each."""
    before = {name: os.environ.get(name) for name in _THREADS}
    os.environ.update(dict.fromkeys(_THREADS, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
