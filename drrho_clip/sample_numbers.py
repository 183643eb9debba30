"""The numbers that a run keeps for each sample: the inner estimates, and the temperatures of the scheme per_sample.

An *inner estimate* is a running average of the methods sogclr and drrho, two per sample. If several processes train
together, each stores the numbers of all n samples, or, with ``--estimator split``, those of about n / W samples: the
ids of the samples are divided among the W processes. Then a step sends the numbers of the batch from the processes that
store them to the processes that train on the pairs, and back.

A checkpoint holds the numbers of all samples in either case, so any number of processes can continue the run.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import numpy as np

from drrho_clip.config import TrainConfig
from drrho_clip.data import HostBatch
from drrho_clip.errors import AgreedError, BadInput
from drrho_clip.methods import LOG_SCALE, METHODS
from drrho_clip.processes.protocol import Processes
from drrho_clip.run import Run, part
from drrho_clip.step import StepResult
from drrho_core.backend import Backend
from drrho_core.checks import Array
from drrho_core.state import PerSampleTemperature, RunEstimator, Temperature, make_estimator, make_temperature

__all__ = ["SampleNumbers", "check_home", "rows_of_all_processes"]

SPLIT = "split"
"""The value of the setting `estimator` with which the processes divide the numbers among themselves."""

_ROWS_AT_ONCE = 1 << 20


def check_home(config: TrainConfig, backend: Backend, processes: Processes) -> None:
    """Raise AgreedError if the processes are to divide the numbers, but cannot exchange these between the steps."""
    if config.estimator == SPLIT and processes.size > 1 and not processes.exchanges_between_steps:
        raise AgreedError(
            f"estimator must be device, host or file for several processes with the {backend.name} backend, which "
            f"exchanges arrays only inside of the compiled step, got {config.estimator!r}"
        )


class SampleNumbers:
    """The inner estimates and the temperature of a run.

    Parameters
    ----------
    run : Run
        The run. The file of the estimates, if any, is made in the folder of the run at the first use.
    backend : Backend
        The library of the arrays.
    num_samples : int
        Number n of samples.
    processes : Processes
        The processes that train together; all of them call the same methods at the same time.

    Attributes
    ----------
    is_split : bool
        The processes divide the numbers among themselves.
    temperature : Temperature
        The temperature, fixed or learned.
    """

    def __init__(self, run: Run, backend: Backend, num_samples: int, processes: Processes) -> None:
        config = run.config
        self.is_split = config.estimator == SPLIT and processes.size > 1
        self._ranks = processes.ranks if self.is_split else None
        self._run, self._backend, self._num_samples, self._processes = run, backend, num_samples, processes
        # A temperature that the optimiser learns is a scalar of the loss, and this object is not used.
        self.temperature: Temperature = make_temperature(
            "fixed" if config.temperature_scheme == LOG_SCALE else config.temperature_scheme,
            config.temperature,
            num_samples=num_samples,
            like=backend.asarray(np.zeros(1)),
            minimum=config.temperature_min,
            maximum=config.temperature_max,
            slow_below=config.temperature_slow_below,
            ranks=self._ranks,
        )

    @functools.cached_property
    def estimator(self) -> RunEstimator:
        """The inner estimates; they are made at the first use, because their file needs the folder of the run."""
        place = self._run.config.estimator
        # After a crash the file may be some steps ahead of the checkpoint; `load` replaces all estimates in the file.
        path = self._run.estimator_file_of(self._processes.rank) if place == "file" else None
        return make_estimator(place, self._num_samples, backend=self._backend, path=path, ranks=self._ranks)

    def close(self) -> None:
        """Close the file of the inner estimates, if any."""
        if "estimator" in vars(self):
            self.estimator.close()

    # Steps -----------------------------------------------------------------------------------------------------------

    def of_batch(self, batch: HostBatch) -> tuple[Array, Array, Any]:
        """Return the inner estimates of the own pairs, image and text, and the temperature; None if it is fixed."""
        rows = batch.sample_index
        if self.is_split and not METHODS[self._run.config.method].keeps_estimates:
            # No sample has an estimate, so the processes need not ask each other.
            image, text = (self._backend.asarray(np.full(len(rows), -np.inf)) for _ in range(2))
            return image, text, self._temperature_of(rows)
        with self._exchanging():
            image, text = self.estimator.gather(rows)
            return image, text, self._temperature_of(rows)

    def _temperature_of(self, rows: np.ndarray) -> Any:
        """Return the temperature of the own pairs, or None if it is fixed."""
        return self.temperature.for_batch(self._backend.asarray(rows)) if self.temperature.learned else None

    def after_step(self, batch: HostBatch, result: StepResult) -> Any:
        """Store the numbers after a step, and return the gradient of the temperature.

        If the temperatures per sample are divided, the gradient has the own rows, else those of all processes.
        """
        config, gradient = self._run.config, result.temperature_gradient
        rows, estimates = batch.rows, (result.log_inner_image, result.log_inner_text)
        if self.is_split:
            # Every process sends the rows that it has trained on to the processes that store them.
            rows = batch.sample_index
        elif METHODS[config.method].keeps_estimates:
            # Every process stores the estimates and the temperatures of all rows.
            of_samples = gradient if isinstance(gradient, tuple) else ()
            gathered = self._processes.all_rows((*estimates, *of_samples))
            estimates = gathered[0], gathered[1]
            gradient = gathered[2:] or gradient
        with self._exchanging():
            if METHODS[config.method].keeps_estimates:
                self.estimator.scatter(rows, *estimates)
            if self.temperature.learned:
                self.temperature = self.temperature.after_batch(
                    self._backend.asarray(rows), gradient, learning_rate=config.temperature_learning_rate
                )
        return gradient

    def _exchanging(self) -> AbstractContextManager[None]:
        """Return the context of an exchange of numbers, which the watch counts; nothing is exchanged if not divided."""
        return self._processes.exchanging() if self.is_split else contextlib.nullcontext()

    # Checkpoints -----------------------------------------------------------------------------------------------------

    def own_temperature(self) -> dict[str, np.ndarray]:
        """Return a copy of the state of the temperature that this process stores, in the memory of the host."""
        return {name: self._backend.to_numpy(array) for name, array in self.temperature.state_dict().items()}

    def gathered(self, own_temperature: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return the divided numbers of all samples on the first process, by their names in a checkpoint.

        All processes call this with the result of `own_temperature`. The other processes get no numbers, and nothing is
        returned if nothing is divided.
        """
        if not self.is_split:
            return {}
        start, _ = self.estimator.own_range
        own = {f"estimator/{name}": array for name, array in self.estimator.state_dict().items()}
        if isinstance(self.temperature, PerSampleTemperature):
            columns = {column.name for column in self.temperature.table.columns}
            own |= {f"temperature/{name}": x for name, x in own_temperature.items() if name in columns}
        return {
            name: rows
            for name, array in own.items()
            if (rows := rows_of_all_processes(array, self._num_samples, start, self._processes)) is not None
        }

    def whole(self, own_temperature: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return all arrays that this process need not gather, by their names in a checkpoint; see `gathered`."""
        # The estimator returns NumPy arrays, also if the estimates are on the device or in a file.
        estimates = {} if self.is_split else self.estimator.state_dict()
        if self.is_split and isinstance(self.temperature, PerSampleTemperature):
            own_temperature = {"version": own_temperature["version"]}
        return {f"estimator/{name}": x for name, x in estimates.items()} | {
            f"temperature/{name}": x for name, x in own_temperature.items()
        }

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every array in a checkpoint, by name."""
        shapes: dict[str, tuple[int, ...]] = {
            f"estimator/{name}": (self._num_samples,) for name in self.estimator.names
        }
        for name, array in self.temperature.state_dict().items():
            if isinstance(self.temperature, PerSampleTemperature) and array.ndim:
                if name != "rows":
                    shapes[f"temperature/{name}"] = (self._num_samples,)
            else:
                shapes[f"temperature/{name}"] = tuple(array.shape)
        return shapes

    def load(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Take the numbers of a checkpoint whose shapes are right; of divided numbers the own part.

        Raises
        ------
        BadInput
            If the temperature is not that of this version; then nothing has changed.
        """
        saved: Mapping[str, Any] = part(arrays, "temperature")
        if isinstance(self.temperature, PerSampleTemperature):
            saved = self.temperature.table.own_rows_of(saved)
        # Only the temperature can still be refused. It is loaded first, so that nothing has changed if that happens.
        try:
            self.temperature.load_state_dict({name: self._backend.asarray(array) for name, array in saved.items()})
        except (TypeError, ValueError) as error:
            raise BadInput(f"{self._run.checkpoint} must hold this version's temperature: {error}") from error
        self.estimator.load_state_dict(part(arrays, "estimator"))


def rows_of_all_processes(
    own: np.ndarray, num_samples: int, start: int, processes: Processes, *, at_once: int = _ROWS_AT_ONCE
) -> np.ndarray | None:
    """Return the rows of all samples on the first process; the other processes return None.

    Parameters
    ----------
    own : ndarray, shape (k,)
        The own rows.
    num_samples : int
        Number n of samples, the sum of k over all processes.
    start : int
        The id of the first own row.
    processes : Processes
        The processes, all of which call this function.
    at_once : int
        Number of rows of a process that are sent at a time, so that only the first process needs memory for n rows.

    Examples
    --------
    >>> from drrho_clip.processes.one import OneProcess
    >>> from drrho_core.backend import get_backend
    >>> rows_of_all_processes(np.asarray([0.5, 2.0]), 2, 0, OneProcess(get_backend("numpy")))
    array([0.5, 2. ])
    """
    starts_and_lengths = processes.gather([start, len(own)])
    whole = np.empty(num_samples, dtype=own.dtype) if processes.is_first else None
    for offset in range(0, max(length for _, length in starts_and_lengths), at_once):
        blocks = processes.gather_arrays(own[offset : offset + at_once])
        if whole is not None:
            for (first, _), block in zip(starts_and_lengths, blocks, strict=True):
                whole[first + offset : first + offset + len(block)] = block
    return whole
