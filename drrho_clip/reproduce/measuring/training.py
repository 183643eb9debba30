"""Training in an experiment: the settings of the run, the reference model, and the figures of the trained model."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Final, NamedTuple

from drrho_clip.config import TrainConfig
from drrho_clip.data import DataSplits
from drrho_clip.evaluate import evaluate
from drrho_clip.files.outputs import has_checkpoint
from drrho_clip.reproduce.experiment import Experiment, Settings
from drrho_clip.reproduce.results import Metrics
from drrho_clip.reproduce.worlds import WORLDS
from drrho_clip.run.outcome import Outcome
from drrho_clip.table_defaults import preferred_architecture
from drrho_clip.train import train
from drrho_core.backend import Backend, get_backend

__all__ = [
    "FIGURES",
    "REFUSED",
    "TEST_FIGURES",
    "Measured",
    "clean_folder",
    "config_of",
    "figures_of",
    "measure_reference",
    "measure_target",
    "measure_training",
    "reference_run",
    "steered_config",
    "target_config",
]

TEST_FIGURES: Final = ("retrieval_r1", "retrieval_r5", "retrieval_r10", "zero_shot_accuracy")
"""The figures of test pairs that a row has, if the data have them."""

FIGURES: Final = (*TEST_FIGURES, "validation_r1", "validation_r10")
"""All figures of a trained model."""

REFUSED: Final = "refused"
"""The figure of a row whose reference model `drrho train` refuses; the target was not trained."""


class Measured(NamedTuple):
    """The figures of an experiment, and the seconds that they took."""

    metrics: Metrics
    seconds: float


def measure_training(experiment: Experiment, folder: Path) -> Measured:
    """Train a target and measure the best state."""
    return measure_target(experiment, *target_config(experiment, folder), folder)


def measure_target(experiment: Experiment, config: TrainConfig, backend: Backend, folder: Path) -> Measured:
    """Train a target with these settings and measure the best state."""
    world = WORLDS[experiment.dataset]
    splits = world.open(config, folder)
    run = clean_folder(experiment, folder)
    outcome = train(config, run, backend=backend, splits=splits, quiet=True)
    figures = {**figures_of(outcome, splits), **world.more_figures(outcome.encoder, splits, folder)}
    # The time of the reference model is not part of the row, because several targets share that model.
    measured = Measured(figures, outcome.row["seconds"])
    # Many runs of checkpoints would fill the disk, and nobody reads them again.
    shutil.rmtree(run, ignore_errors=True)
    return measured


def measure_reference(experiment: Experiment, folder: Path) -> Measured:
    """Measure a reference model on the test pairs of the world; it is trained if it is not there."""
    outcome, _ = _reference_outcome(experiment, folder)
    backend = get_backend(experiment.backend)
    # The reference model has training pairs of its own, and the same held-out pairs as the target.
    world = WORLDS[experiment.dataset]
    splits = world.open(config_of(experiment, folder, experiment.settings["data"], "clip", backend), folder)
    figures = {**figures_of(outcome, splits), **world.more_figures(outcome.encoder, splits, folder)}
    return Measured(figures, outcome.row["seconds"])


def figures_of(outcome: Outcome, splits: DataSplits) -> Metrics:
    """Return the test figures of a trained model, and R@1 and R@10 on the validation pairs."""
    test = outcome.row["metrics"]
    validation = evaluate(outcome.encoder, splits.validation, zero_shot=False)
    figures = {name: float(test[name]) for name in TEST_FIGURES if name in test}
    figures |= {f"validation_r{k}": float(validation[f"retrieval_r{k}"]) for k in (1, 10)}
    return figures | {
        "parameters": float(count_parameters(outcome)),
        "samples_seen": float(outcome.row["samples_seen"]),
    }


def count_parameters(outcome: Outcome) -> int:
    """Return the number of trained parameters of a model."""
    return sum(array.size for array in outcome.run.load_parameters("best").values())


def target_config(experiment: Experiment, folder: Path) -> tuple[TrainConfig, Backend]:
    """Return the settings of the target's run and the backend; the reference model is trained if it is not there."""
    reference = None if experiment.settings["reference"] is None else str(reference_run(experiment, folder))
    return steered_config(experiment, folder, reference)


def steered_config(experiment: Experiment, folder: Path, reference: str | None) -> tuple[TrainConfig, Backend]:
    """Return the settings of the target's run, with this reference model, and the backend."""
    settings = {**experiment.settings["data"], **experiment.settings["target"]}
    backend = get_backend(experiment.backend)
    return config_of(experiment, folder, settings, experiment.method, backend, reference), backend


def reference_run(experiment: Experiment, folder: Path) -> Path:
    """Return the folder of the reference model's run, which is trained first if it is not there."""
    return _reference_outcome(experiment, folder)[1]


def clean_folder(experiment: Experiment, folder: Path, part: str = "") -> Path:
    """Return the folder of the target's run, or a folder beside it; files of a killed process there are removed."""
    path = folder / "targets" / f"{experiment.config_hash()[:16]}{part}"
    shutil.rmtree(path, ignore_errors=True)
    return path


def _reference_outcome(experiment: Experiment, folder: Path) -> tuple[Outcome, Path]:
    key = experiment.reference_hash()
    assert key is not None
    path = folder / "references" / key[:16]
    backend = get_backend(experiment.backend)
    config = config_of(experiment, folder, experiment.settings["reference"], "clip", backend)
    splits = WORLDS[experiment.dataset].open(config, folder)
    # A run that was killed is continued, and a finished run is only read.
    return train(config, path, resume=has_checkpoint(path), backend=backend, splits=splits, quiet=True), path


def config_of(
    experiment: Experiment,
    folder: Path,
    settings: Settings,
    method: str,
    backend: Backend,
    reference: str | None = None,
) -> TrainConfig:
    """Return the settings of a run with the seed and the world of an experiment."""
    values = {
        "method": method,
        "reference": reference,
        **settings,
        "seed": experiment.seed,
        "data_seed": experiment.seed,
        "backend": backend.name,
        **WORLDS[experiment.dataset].places(folder),
    }
    config = TrainConfig(**values)
    return replace(config, architecture=preferred_architecture(config.architecture, backend))
