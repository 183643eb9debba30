"""The tasks of the experiments, by name, and the row of a finished experiment."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from drrho_clip.errors import Diverged
from drrho_clip.reproduce.estimator.errors import measure_errors
from drrho_clip.reproduce.estimator.training import measure_heads
from drrho_clip.reproduce.experiment import Experiment
from drrho_clip.reproduce.generic.measuring import measure_generic
from drrho_clip.reproduce.grid import TRIED
from drrho_clip.reproduce.measuring.guided import measure_guided
from drrho_clip.reproduce.measuring.steering import (
    measure_steering,
    measure_steering_by_halves,
    measure_steering_by_last_state,
)
from drrho_clip.reproduce.measuring.training import FIGURES, Measured, measure_reference, measure_training
from drrho_clip.reproduce.measuring.variances import measure_variances
from drrho_clip.reproduce.origin import commit_of, machine, versions
from drrho_clip.reproduce.results import Metrics, Row
from drrho_core.backend import get_backend

__all__ = ["OWN_REFERENCES", "TASKS", "run"]

TASKS: Final[Mapping[str, Callable[[Experiment, Path], Measured]]] = {
    "training": measure_training,
    "guided": measure_guided,
    "reference": measure_reference,
    "variances": measure_variances,
    "generic": measure_generic,
    "estimator": measure_errors,
    "linear-heads": measure_heads,
    "steering": measure_steering,
    "steering-by-halves": measure_steering_by_halves,
    "steering-by-last-state": measure_steering_by_last_state,
}
"""``task(experiment, folder)`` measures; the folder keeps the runs, such as those of reference models."""

OWN_REFERENCES: Final = frozenset({"steering-by-halves"})
"""The tasks that train reference models of their own with the recipe of the experiment, which no other task needs."""


def run(experiment: Experiment, folder: Path) -> Row:
    """Run an experiment and return the row of the result.

    A training whose loss or whose figures do not stay finite has a row with the figure ``diverged`` and with zeros for
    `FIGURES`. If only some trials of a grid have figures that are not finite, null stands in their place.

    Parameters
    ----------
    experiment : Experiment
    folder : Path
        The folder of the runs.

    Raises
    ------
    BadInput
        If a setting or a file cannot be used.
    """
    commit, backend = _commit(), get_backend(experiment.backend)
    began = time.monotonic()
    try:
        # The tasks know nothing about rows, hashes and files of results.
        measured = TASKS[experiment.task](experiment, folder)
        measured = measured._replace(metrics=_finite(measured.metrics))
    except Diverged:
        # Without a row the command would stop at this learning rate each time.
        measured = Measured(dict.fromkeys(FIGURES, 0.0) | {"diverged": 1.0}, time.monotonic() - began)
    return Row(
        **asdict(experiment),
        config_hash=experiment.config_hash(),
        metrics=measured.metrics,
        seconds=round(measured.seconds, 2),
        machine=machine(backend.device if backend.has_gpu else ""),
        versions=versions(experiment.backend),
        commit=commit,
    )


def _finite(metrics: Metrics) -> Metrics:
    """Return the figures with None for each trial of a grid whose figure is not finite.

    Raises
    ------
    Diverged
        If another figure is not finite, or if no trial has a finite figure.
    """
    checked: dict[str, Any] = {}
    for name, figure in metrics.items():
        values = figure if isinstance(figure, list) else [figure]
        finite = [math.isfinite(value) for value in values]
        # A grid is still good for a choice if one trial diverged.
        if not (any(finite) if name == TRIED else all(finite)):
            raise Diverged(f"{name} must be finite, got {figure}")
        checked[name] = [value if math.isfinite(value) else None for value in values] if name == TRIED else figure
    return checked


@functools.cache
def _commit() -> str:
    """Return the commit at the start of this process: a later commit is not the code that the process has loaded."""
    return commit_of(Path(__file__).parent)
