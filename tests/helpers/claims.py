"""Invented rows of experiments."""

from __future__ import annotations

from dataclasses import asdict

from drrho_clip.reproduce.experiment import Experiment
from drrho_clip.reproduce.results import Metrics, Row


def row_with(experiment: Experiment, metrics: Metrics) -> Row:
    """Return a row of an experiment with these metrics."""
    return Row(
        **asdict(experiment),
        config_hash=experiment.config_hash(),
        metrics=metrics,
        seconds=60.0,
        machine="invented",
        versions={"numpy": "2"},
        commit="c0ffee",
    )


def row_of(experiment: Experiment, value: float = 0.5, **more: float) -> Row:
    """Return a row of an experiment with this validation R@1, and with more figures."""
    return row_with(experiment, {"validation_r1": value, **more})
