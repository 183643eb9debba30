"""The tasks of the experiments, by name, and the row of a finished experiment."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final

from drrho_clip.reproduce.experiment import Experiment
from drrho_clip.reproduce.generic.measuring import measure_generic
from drrho_clip.reproduce.results import Row
from drrho_clip.reproduce.training import Measured, measure_reference, measure_training
from drrho_clip.reproduce.variances import measure_variances
from drrho_core.backend import default_backend

__all__ = ["TASKS", "run"]

TASKS: Final[Mapping[str, Callable[[Experiment, Path], Measured]]] = {
    "training": measure_training,
    "reference": measure_reference,
    "variances": measure_variances,
    "generic": measure_generic,
}
"""``task(experiment, folder)`` measures; the folder keeps the runs, such as those of reference models."""


def run(experiment: Experiment, folder: Path) -> Row:
    """Run an experiment and return the row of the result.

    Parameters
    ----------
    experiment : Experiment
    folder : Path
        The folder of the runs.

    Raises
    ------
    BadInput
        If a setting or a file cannot be used, or if the training diverges.
    """
    measured = TASKS[experiment.task](experiment, folder)
    return Row(
        **asdict(experiment),
        config_hash=experiment.config_hash(),
        metrics=measured.metrics,
        seconds=round(measured.seconds, 2),
        machine=f"{platform.machine()}, {platform.system()}, {os.cpu_count()} cores",
        versions=_versions(),
        commit=_commit(),
    )


def _versions() -> dict[str, str]:
    backend = default_backend()
    versions = {"python": platform.python_version()}
    for package in ("drrho-core", "numpy", backend):
        try:
            versions[package] = version(package)
        # The distribution of a backend's library need not have the name of the backend.
        except PackageNotFoundError:
            versions[package] = "unknown"
    return versions


def _commit() -> str:
    """Return the commit of the clone that holds this file, with "+" if files of the clone have changed."""
    top = Path(__file__).parent

    def git(*words: str) -> str:
        command = ["git", "-C", str(top), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
