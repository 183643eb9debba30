"""The dump of a step whose loss is not finite: what the step read, in a file from which the step can be taken again.

A run notices a loss that is not finite some steps later, because reading a loss waits for the device. Then the
parameters are lost. So the trainer takes the steps since the last checkpoint again, one by one, and stops at the first
bad step. `save_failure` writes what that step read, and `replay` takes the step from the file.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from drrho_clip.encode import build_model
from drrho_clip.errors import BadInput
from drrho_clip.files.checkpoint import load_arrays, save_arrays
from drrho_clip.micro_batches import model_of_step
from drrho_clip.processes.protocol import Processes
from drrho_clip.run import Run, open_run, part
from drrho_clip.step import Step, StepBatch, StepResult, build_step, is_by_rows
from drrho_clip.update import StepState, initial_state
from drrho_core.backend import Backend

__all__ = ["Replay", "failure_arrays", "failure_file", "good_result", "replay", "save_failure"]

_NUMBERS = ("learning_rate", "gamma")


class Replay(NamedTuple):
    """The result of `replay`.

    Attributes
    ----------
    step : int
        Number of the bad step, counted from 1.
    loss : float
        The loss of the step; nan if it is not finite.
    bad_images, bad_texts : list of int
        Rows of the data set whose features are not finite.
    bad_parameters : list of str
        Parameters that are not finite before the step.
    """

    step: int
    loss: float
    bad_images: list[int]
    bad_texts: list[int]
    bad_parameters: list[str]


def failure_file(run: Run) -> Path:
    """Return the path of the dump in the folder of a run."""
    return run.folder / "failure.safetensors"


def failure_arrays(backend: Backend, state: StepState, batch: StepBatch, processes: Processes) -> dict[str, np.ndarray]:
    """Return copies of all arrays that a step reads; the optimiser's state does not affect the loss.

    The batch is that of all processes, so a single process can take the step again.
    """
    groups: dict[str, Mapping[str, Any]] = {
        "parameters": state.parameters,
        "scalars": state.scalars,
        "loss_scale": state.loss_scale,
    }
    # The step itself may overwrite the parameters, so the copies are made before the step.
    arrays = {
        f"{group}/{name}": backend.to_numpy(x) for group, members in groups.items() for name, x in members.items()
    }
    for name, value in batch._asdict().items():
        sides = value if isinstance(value, tuple) else (value,)
        if value is not None and name not in _NUMBERS:
            copies = [backend.to_numpy(array) for array in sides]
            if is_by_rows(name, value):
                copies = [np.concatenate(processes.gather_arrays(array)) for array in copies]
            arrays |= {f"batch/{name}/{side}": array for side, array in enumerate(copies)}
    return arrays


def good_result(step: Step, state: StepState, batch: StepBatch) -> StepResult | None:
    """Take a step, and return the result, or None if the loss is not finite."""
    try:
        with np.errstate(all="ignore"):
            result = step(state, batch)
    # The core refuses features that are not finite, unless the step is compiled.
    except ValueError:
        return None
    return result if np.isfinite(float(result.loss)) else None


def save_failure(
    run: Run, arrays: Mapping[str, np.ndarray], batch: StepBatch, rows: np.ndarray, *, step: int, epoch: int
) -> Path:
    """Write the dump of a step: the result of `failure_arrays`, and the rows of the data set in the batch."""
    numbers = {name: float(getattr(batch, name)) for name in _NUMBERS}
    file = failure_file(run)
    save_arrays(file, "failure", {**arrays, "rows": rows}, {"step": step, "epoch": epoch, **numbers})
    return file


def replay(folder: str | Path, backend: Backend) -> Replay:
    """Take the step of a dump again.

    Parameters
    ----------
    folder : path
        The folder of the run.
    backend : Backend
        The library that runs the step, in the dtype of the run.

    Raises
    ------
    BadInput
        If the folder holds no run or no dump, or if the dump is damaged.
    """
    run = open_run(folder)
    file = failure_file(run)
    if not file.is_file():
        raise BadInput(f"{folder} must hold {file.name}, which a loss that is not finite leaves, got no such file")
    arrays, numbers = load_arrays(file, "failure")
    config = run.config
    model = model_of_step(backend, build_model(backend, run.spec), config)
    optimizer = backend.adamw(weight_decay=config.weight_decay)
    state = initial_state(backend, optimizer, config, part(arrays, "parameters"))
    state = state._replace(
        scalars={name: backend.asarray(array) for name, array in part(arrays, "scalars").items()},
        loss_scale={name: backend.asarray(array) for name, array in part(arrays, "loss_scale").items()},
    )
    batch = _batch(backend, part(arrays, "batch"), numbers)
    rows = arrays["rows"]
    with np.errstate(all="ignore"):
        features = (
            model.encode_images(state.parameters, batch.images),
            model.encode_texts(state.parameters, batch.texts),
        )
        bad = [rows[~np.isfinite(backend.to_numpy(side)).all(axis=1)].tolist() for side in features]
    result = good_result(build_step(backend, model, optimizer, config), state, batch)
    loss = float("nan") if result is None else float(result.loss)
    names = [name for name, array in part(arrays, "parameters").items() if not np.isfinite(array).all()]
    return Replay(int(numbers["step"]), loss, bad[0], bad[1], names)


def _batch(backend: Backend, arrays: Mapping[str, np.ndarray], numbers: Mapping[str, Any]) -> StepBatch:
    """Return the batch of a dump on the device."""
    sides: dict[str, list[Any]] = {}
    for name, array in sorted(arrays.items()):
        sides.setdefault(name.partition("/")[0], []).append(backend.asarray(array))
    fields = {name: values[0] if len(values) == 1 else tuple(values) for name, values in sides.items()}
    empty = dict.fromkeys(StepBatch._fields)
    return StepBatch(**(empty | fields | {name: numbers[name] for name in _NUMBERS}))
