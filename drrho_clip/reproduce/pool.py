"""Experiments in several processes at a time, each with one thread, so that two cores work on two experiments.

The parent process writes a row as soon as an experiment is over. A killed command loses the experiments that were
running, and the same command goes on with these. An experiment that fails does not keep the others from running.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Final, NamedTuple, TypeVar

from drrho_clip.errors import BadInput, Diverged
from drrho_clip.reproduce.experiment import Experiment
from drrho_clip.reproduce.measuring.training import reference_run
from drrho_clip.reproduce.packaged.packages import Missing
from drrho_clip.reproduce.results import Row
from drrho_clip.reproduce.tasks import OWN_REFERENCES, run
from drrho_clip.reproduce.worlds import WORLDS
from drrho_clip.terminal.guard import ending
from drrho_clip.terminal.progress import Reporter

__all__ = ["Failure", "described", "measure", "prepare"]

_Result = TypeVar("_Result")

_KILLED: Final = "a worker process must run to the end, got one that was killed (no memory?); the same command goes on"

# Libraries read these variables when they are imported.
_THREADS: Final = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


class Failure(NamedTuple):
    """An experiment that failed.

    Attributes
    ----------
    experiment : Experiment
    message : str or None
        The line about the error; None for a mistake of our code.
    trace : str
        The traceback.
    diverged : bool
        The loss of a reference model did not stay finite.
    """

    experiment: Experiment
    message: str | None
    trace: str
    diverged: bool


def measure(
    experiments: Sequence[Experiment],
    folder: Path,
    *,
    jobs: int,
    keep: Callable[[Row], None],
    quiet: bool = False,
) -> list[Failure]:
    """Run experiments; reference models that they need are trained first.

    Parameters
    ----------
    experiments : sequence of Experiment
    folder : Path
        The folder of the runs.
    jobs : int
        Number of processes; with 0 the experiments run in this process.
    keep : callable
        Called with each row as soon as it is there.
    quiet : bool
        Show no progress.

    Returns
    -------
    list of Failure
        The experiments without a row, because they failed.

    Raises
    ------
    BadInput
        If a process was ended from outside.
    """
    # Two experiments that need the same reference model must not train it at the same time.
    sharing = [each for each in experiments if each.task not in OWN_REFERENCES]
    needed = {key: each for each in sharing if (key := each.reference_hash()) is not None}
    failures: list[Failure] = []
    total = len(needed) + len(experiments)
    # Without a terminal each experiment has a line.
    reporter = Reporter("experiments", total, quiet=quiet, seconds_between_lines=0.0)
    with _workers(jobs) as workers, reporter:
        for experiment, trained in _each(workers, reference_run, list(needed.values()), folder):
            # An error does not count yet: the experiments that need the model meet the error again.
            words = f"reference model {experiment.reference} of {experiment.dataset}, seed {experiment.seed}"
            reporter.advance(words + _end(trained))
        for experiment, row in _each(workers, run, experiments, folder):
            if isinstance(row, Row):
                keep(row)
            else:
                failures.append(row)
            reporter.advance(described(experiment) + _end(row))
    return failures


def prepare(name: str, runs: Path, roots: Sequence[Path], *, jobs: int, quiet: bool) -> str | None:
    """Prepare a world, see `World.prepare`; return the line that says how to install what is missing, or None.

    Towers are trained and pairs are encoded in a process with one thread, as the experiments are, because the number of
    threads determines how sums are rounded.
    """
    # A new process takes seconds, so it is only started if there is work to do.
    with _workers(min(jobs, 1) if not WORLDS[name].is_prepared(runs) else 0) as worker:
        if worker is None:
            return _prepared(name, runs, roots, quiet=quiet)
        try:
            return worker.submit(_prepared, name, runs, roots, quiet=quiet).result()
        except BrokenProcessPool:
            raise BadInput(_KILLED) from None


def _prepared(name: str, runs: Path, roots: Sequence[Path], *, quiet: bool) -> str | None:
    try:
        WORLDS[name].prepare(runs, roots, quiet=quiet)
    except Missing as line:
        return str(line)
    except Exception as error:
        message, _ = ending(error)
        if message is None:
            raise
        # Not every exception can be sent to another process, but this one can.
        raise BadInput(message) from None
    return None


def _end(result: Path | Row | Failure) -> str:
    """Return how an experiment ended, for the line about it; nothing if it ended well."""
    if not isinstance(result, Path) and result.diverged:
        return ": diverged"
    return ": failed" if isinstance(result, Failure) else ""


def described(experiment: Experiment) -> str:
    """Return an experiment in a few words.

    Examples
    --------
    >>> described(Experiment("variance", "variances", "scenes-30", "drrho", "weak", 0, {}, False, "epochs 4"))
    'variance: drrho with the reference model weak, epochs 4, on scenes-30, seed 0'
    """
    reference = "" if experiment.reference is None else f" with the reference model {experiment.reference}"
    label = f", {experiment.label}," if experiment.label else ""
    return f"{experiment.claim}: {experiment.method}{reference}{label} on {experiment.dataset}, seed {experiment.seed}"


def _each(
    workers: ProcessPoolExecutor | None,
    task: Callable[[Experiment, Path], _Result],
    experiments: Sequence[Experiment],
    folder: Path,
) -> Iterator[tuple[Experiment, _Result | Failure]]:
    """Yield each experiment with the result of the task, or with the failure, in the order in which they end."""
    if workers is None:
        for experiment in experiments:
            yield experiment, _tried(task, experiment, folder)
        return
    waiting: dict[Future[_Result | Failure], Experiment] = {}
    for experiment in experiments:
        waiting[workers.submit(_tried, task, experiment, folder)] = experiment
    while waiting:
        # No finished experiment waits for a slow one.
        for future in wait(waiting, return_when=FIRST_COMPLETED).done:
            try:
                yield waiting.pop(future), future.result()
            except BrokenProcessPool:
                raise BadInput(_KILLED) from None


def _tried(task: Callable[[Experiment, Path], _Result], experiment: Experiment, folder: Path) -> _Result | Failure:
    try:
        return task(experiment, folder)
    # Not every exception can be sent to another process, but texts can.
    except Exception as error:
        message, _ = ending(error)
        trace = "".join(traceback.format_exception(error))
        return Failure(experiment, message, trace, isinstance(error, Diverged))


@contextlib.contextmanager
def _workers(jobs: int) -> Iterator[ProcessPoolExecutor | None]:
    """Open the pool, or yield None if this process alone does the work."""
    if jobs == 0:
        yield None
        return
    context = multiprocessing.get_context("spawn")
    # The workers end when our end of the pipe is closed, which the system does if this process is killed.
    ours, theirs = context.Pipe()
    with _one_thread(), ours, theirs, ProcessPoolExecutor(jobs, context, _end_with_parent, (theirs,)) as workers:
        try:
            yield workers
        except BaseException:
            # Nobody waits for the experiments that are running.
            workers.shutdown(wait=False, cancel_futures=True)
            ours.close()
            raise


def _end_with_parent(pipe: Connection) -> None:
    """Let this worker end as soon as the other end of a pipe is closed."""
    # Ctrl-C in a terminal reaches the workers too, and the parent process reports it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_wait_for_end, args=(pipe,), daemon=True).start()


def _wait_for_end(pipe: Connection) -> None:
    with contextlib.suppress(EOFError, OSError):
        pipe.recv_bytes()
    # An exception in this thread would not end the process.
    os._exit(1)


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
