"""Try a few learning rates in short runs, and take the rate with the best R@1 on the held-out (validation) pairs.

A trial is a short run: the schedule of the trial has a fifteenth of the epochs of the run (at least one epoch), and the
trial ends after a fifteenth of the steps of the run. So the three trials take about a fifth of the time of the run. The
same settings always give the same trials, so the choice can be repeated.
"""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple, cast

import numpy as np

from drrho_clip.data import DataSplits
from drrho_clip.errors import BadInput
from drrho_clip.evaluate import evaluate
from drrho_clip.files.disk import write_atomic
from drrho_clip.files.temporary import removed_at_end
from drrho_clip.processes.encoding import shared_encoder
from drrho_clip.processes.one import OneProcess
from drrho_clip.processes.protocol import Processes
from drrho_clip.processes.together import agreed_figures, of_first, together
from drrho_clip.reference.guidance import open_guidance
from drrho_clip.run import Run
from drrho_clip.terminal.printing import say
from drrho_clip.trainer import Trainer
from drrho_core.backend import Backend

__all__ = ["LEARNING_RATES", "Trial", "best_trial", "print_trials", "save_trials", "try_learning_rates"]

LEARNING_RATES: Final = (3e-4, 1e-3, 3e-3)
_PART: Final = 15


class Trial(NamedTuple):
    """A learning rate, and R@1 and R@10 on the held-out pairs after a short run; 0 if the loss did not stay finite."""

    learning_rate: float
    validation_r1: float
    validation_r10: float


def try_learning_rates(
    run: Run,
    backend: Backend,
    splits: DataSplits,
    *,
    start: Mapping[str, np.ndarray] | None = None,
    rates: Sequence[float] = LEARNING_RATES,
    processes: Processes | None = None,
) -> list[Trial]:
    """Try learning rates, the lowest first; the trials run in a temporary folder.

    Parameters
    ----------
    run : Run
        The run that needs a learning rate; its setting `learning_rate` is ignored.
    backend : Backend
        The library that runs the training.
    splits : DataSplits
        The data.
    start : mapping, optional
        The parameters from which the run starts; see `Trainer`.
    rates : sequence of float
        The learning rates, each > 0.
    processes : Processes, optional
        The processes that train together; see `Trainer`.

    Returns
    -------
    list of Trial

    Raises
    ------
    BadInput
        If a trial fails and no other trial has an R@10 above 0; the message is that of the last failure.
    """
    trials: list[Trial] = []
    failure: BadInput | None = None
    with contextlib.ExitStack() as stack:
        processes = OneProcess(backend) if processes is None else processes
        group = cast(Processes, _ProcessesOfTrials(processes))
        # All processes use the folder of the first one; on another machine it is another folder of the same name.
        folder = of_first(group, lambda: tempfile.mkdtemp(prefix="drrho-trials-"))
        stack.enter_context(removed_at_end(Path(folder)))
        writes = group.is_first or run.config.estimator == "file"
        guidance = None
        for number, rate in enumerate(sorted(rates)):
            settings = replace(run.config, learning_rate=rate, epochs=max(1, run.config.epochs // _PART), patience=0)
            # After the few steps of a trial, a moving average would still be close to the start.
            settings = replace(settings, as_reference=False, ema=0.0)
            trial = replace(run, folder=Path(folder) / str(number), config=settings)
            make = partial(trial.folder.mkdir, parents=True, exist_ok=True)
            together(group, make if writes else lambda: None)
            # Every trial uses the same pairs, so the reference model is asked only once.
            guidance = open_guidance(trial, backend, splits, group) if guidance is None else guidance
            trainer = Trainer(trial, backend, splits, start=start, guidance=guidance, processes=group)
            with contextlib.closing(trainer):
                steps = max(1, trainer.steps_per_epoch * run.config.epochs // _PART)
                try:
                    trainer.fit(quiet=True, stop_after=steps)
                except BadInput as error:
                    # The loss of a rate that is too high does not stay finite.
                    failure = error
                    trials.append(Trial(rate, 0.0, 0.0))
                    continue
                shared = shared_encoder(trainer.encoder, group)
                figures = agreed_figures(evaluate(shared, splits.validation, zero_shot=False), group)
            trials.append(Trial(rate, figures["retrieval_r1"], figures["retrieval_r10"]))
        # The folder stays until no process reads it any more.
        group.barrier()
    if failure is not None and all(trial.validation_r10 == 0.0 for trial in trials):
        raise failure
    return trials


class _ProcessesOfTrials:
    """The processes of a run, without its watch being told of checkpoints: no run goes on from those of a trial."""

    def __init__(self, processes: Processes) -> None:
        self._processes = processes

    def __getattr__(self, name: str) -> Any:
        return getattr(self._processes, name)

    def saved(self, step: int, /) -> None:
        """Say nothing, because `--resume` could not use the checkpoint."""


def best_trial(trials: Sequence[Trial]) -> Trial:
    """Return the trial with the best R@1; R@10 and then the lower rate decide between equal trials.

    Examples
    --------
    >>> best_trial([Trial(0.001, 0.25, 0.5), Trial(0.003, 0.25, 0.75), Trial(0.01, 0.0, 0.0)]).learning_rate
    0.003
    """
    return max(trials, key=lambda trial: (trial.validation_r1, trial.validation_r10, -trial.learning_rate))


def print_trials(trials: Sequence[Trial]) -> None:
    """Print the table of the trials on standard error."""
    chosen = best_trial(trials)
    for trial in trials:
        mark = ", chosen" if trial == chosen else ""
        say(
            f"learning rate {trial.learning_rate:g}: validation R@1 {trial.validation_r1:.3f}, "
            f"R@10 {trial.validation_r10:.3f}{mark}",
            stream=sys.stderr,
        )


def save_trials(run: Run, trials: Sequence[Trial]) -> None:
    """Write learning_rates.json into the folder of the run that uses the best rate."""
    rows = [trial._asdict() for trial in trials]
    write_atomic(run.trials, (json.dumps(rows, indent=1) + "\n").encode())
