"""Which run may be continued, with which settings, and which run may serve another run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np

from drrho_clip.config import AUTO, BUILT_IN_DATA, TrainConfig
from drrho_clip.errors import BadInput
from drrho_clip.models import ModelSpec
from drrho_clip.run.folder import Run, open_run

__all__ = [
    "MAY_DIFFER",
    "continued",
    "in_numbers",
    "is_over",
    "open_finished_run",
    "parameters_to_start_from",
    "require_same",
]

MAY_DIFFER: Final = (
    "max_unreadable", "workers", "tensorboard", "wandb", "keep_last", "rank_timeout", "form", "estimator"
)  # fmt: skip
"""Settings that may differ when a run is resumed: they change neither the batches nor, up to rounding, the results."""


def continued(folder: Path, config: TrainConfig) -> Run:
    """Return the run in a folder as it is to be continued with the given settings; no file is written.

    A finished run may get more epochs. Then the result has the new number of epochs, and `Run.earlier_ends` has one
    more entry. The settings of `MAY_DIFFER` have the given values in the result.

    Raises
    ------
    BadInput
        If the folder holds no run or no checkpoint, or if a setting differs from that of the run.
    """
    run = open_run(folder)
    # A start from step 0 would silently throw away the work whose checkpoint has been lost.
    if not run.checkpoint.is_file():
        raise BadInput(
            f"{folder} must hold {run.checkpoint.name}, from which --resume continues, got no such file; to start "
            "again, remove the folder"
        )
    progress = run.progress()
    may_differ = {"epochs"} if progress.finished and config.epochs > run.config.epochs else set()
    settings = in_numbers(run, config.to_json())
    # A run with pretrained encoders has taken over what the user left out; see the module `exchange.start_values`.
    if run.config.model is not None or run.config.init is not None:
        settings |= {name: getattr(run.config, name) for name in config.left_out & {"temperature", "bias"}}
    require_same(run.config, {name: value for name, value in settings.items() if name not in may_differ})
    run = replace(run, config=replace(run.config, **{name: getattr(config, name) for name in MAY_DIFFER}))
    if not may_differ:
        return run
    # All epochs of a finished run have the same number of steps, also if the run was stopped early.
    total = progress.done if progress.total is None else progress.total
    epochs_done = progress.done * run.config.epochs // total
    return replace(run, config=replace(run.config, epochs=config.epochs), earlier_ends=(*run.earlier_ends, epochs_done))


def in_numbers(run: Run, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings for resuming a run: the learning rate "auto" becomes the rate that the trials have chosen.

    The same command line with ``--resume`` can then continue the run. A run without trials was started with a number,
    so "auto" stays in the result and `require_same` refuses it.
    """
    is_chosen = settings.get("learning_rate") == AUTO and run.trials.is_file()
    return {**settings, "learning_rate": run.config.learning_rate} if is_chosen else dict(settings)


def is_over(folder: Path, config: TrainConfig) -> bool:
    """Return whether the run in a folder is finished and the settings ask for no more epochs."""
    return continued(folder, config).progress().finished


def require_same(stored: TrainConfig, given: Mapping[str, Any]) -> None:
    """Raise BadInput if a run is to be resumed with settings that differ from those of its start.

    The path of a table may differ, because a table may move; `drrho_clip.run.data` compares the content. The settings
    of `MAY_DIFFER` may differ as well.
    """
    for name, value in given.items():
        if name in MAY_DIFFER:
            continue
        expected = getattr(stored, name)
        is_path = name in ("data", "validation") and not {expected, value} & {None, *BUILT_IN_DATA}
        # A run whose user has not given this number holds that of the reference model.
        is_measured = name == "reference_temperature" and value is None
        if value != expected and not (is_path or is_measured):
            raise BadInput(f"{name} must be that of the run to resume ({expected!r}), got {value!r}")


def open_finished_run(folder: str | Path, name: str, *, allow_unfinished: bool = False) -> Run:
    """Open a run whose parameters are to be used.

    Parameters
    ----------
    folder : path
        The folder of the run.
    name : str
        The argument, for the message.
    allow_unfinished : bool
        Accept a run whose training is not over.

    Raises
    ------
    BadInput
        If the folder holds no run, or if the run is unfinished and `allow_unfinished` is False.
    """
    run = open_run(folder)
    progress = run.progress()
    if not (progress.finished or allow_unfinished):
        total = "" if progress.total is None else f" of {progress.total}"
        raise BadInput(
            f"{name} must be a finished run, got {folder}, which is at step {progress.done}{total}: finish it with "
            "--resume, or say --allow-unfinished"
        )
    return run


def parameters_to_start_from(source: Run, spec: ModelSpec) -> dict[str, np.ndarray]:
    """Return the best parameters of another run, for a run with the encoder sizes `spec`.

    Raises
    ------
    BadInput
        If the encoders of the two runs differ, or if the checkpoint of the other run is missing or damaged.
    """
    sizes = source.spec.to_json()
    for name, size in spec.to_json().items():
        if sizes.get(name) != size:
            raise BadInput(
                f"init must be a run with the same encoders, got {source.folder}, whose {name} is {sizes.get(name)!r} "
                f"instead of {size!r}"
            )
    return source.load_parameters("best")
