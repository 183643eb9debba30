"""The loop over batches: `Trainer` holds a run in memory, takes its steps and writes its checkpoints.

`Trainer.fit` is the loop over batches, `Trainer.take_step` updates the parameters from one batch, and
`Trainer.end_of_epoch` validates and chooses the states to keep. The arithmetic of a step is in `drrho_clip.step`.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Iterator, Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from drrho_clip.data import BatchSource, Dataset, DataSplits, HostBatch
from drrho_clip.data.row_source import RowSource
from drrho_clip.encode import Encoder, build_model
from drrho_clip.epoch_end import EpochEnd
from drrho_clip.epoch_length import pairs_per_step, steps_per_epoch
from drrho_clip.errors import BadInput, Diverged
from drrho_clip.failure import failure_arrays, failure_file, good_result, save_failure
from drrho_clip.features.stored import StoredInputs
from drrho_clip.files.checkpoint import load_arrays, save_arrays
from drrho_clip.methods import METHODS
from drrho_clip.micro_batches import model_of_step
from drrho_clip.models import initial_parameters
from drrho_clip.processes.one import OneProcess
from drrho_clip.processes.opening import check_batch_size
from drrho_clip.processes.protocol import Processes
from drrho_clip.processes.together import of_first, together, written_by_first
from drrho_clip.reference.guidance import Guidance, open_guidance
from drrho_clip.run import Run, part
from drrho_clip.run.checkpoint_state import check_state
from drrho_clip.run.divergence import Watch, all_finite
from drrho_clip.run.kept_states import KeptStates
from drrho_clip.run.last_checkpoints import keep_last
from drrho_clip.run.temperature_figures import mean_temperature, scalar_figures, temperature_figures
from drrho_clip.run.watchers import Watcher, open_watchers, require_watchers
from drrho_clip.sample_numbers import SampleNumbers, check_home
from drrho_clip.step import StepBatch, StepResult, build_step
from drrho_clip.step_inputs import StepInputs, augmentation_of, schedules_at
from drrho_clip.terminal.printing import say
from drrho_clip.terminal.progress import Reporter
from drrho_clip.update import StepState, check_overflows, initial_state
from drrho_core.backend import Backend
from drrho_core.checks import Array
from drrho_core.state import RunEstimator, Temperature


class Trainer:
    """A run in memory: model, optimiser, estimator, data and progress. Building a trainer writes no file.

    The estimator holds the inner estimates: running averages, two per sample, that the methods sogclr and drrho need.

    Parameters
    ----------
    run : Run
        The run to train.
    backend : Backend
        The library that runs the training.
    splits : DataSplits
        The data.
    start : mapping, optional
        The parameters before the first step; by default random numbers, which the setting `seed` determines.
    guidance : Guidance, optional
        The results of a reference model that the run uses; by default the result of `open_guidance`.
    processes : Processes, optional
        The processes that train together: each makes a trainer, and all call the same methods at the same time. By
        default this process is alone.

    Attributes
    ----------
    done, total_steps, steps_per_epoch : int
        Number of steps that are done, of all steps of the run, and of the steps in an epoch.
    seconds : float
        Time spent in steps since the start of the run, the steps before an interruption included.
    source : BatchSource
        The batches of the training data.
    state : StepState
        Parameters and optimiser state.
    """

    def __init__(
        self,
        run: Run,
        backend: Backend,
        splits: DataSplits,
        *,
        start: Mapping[str, np.ndarray] | None = None,
        guidance: Guidance | None = None,
        processes: Processes | None = None,
    ) -> None:
        config = run.config
        self.processes: Processes = OneProcess(backend) if processes is None else processes
        check_batch_size(config.batch_size, self.processes)
        check_home(config, backend, self.processes)
        if METHODS[config.method].needs_reference_temperature and config.reference_temperature is None:
            raise BadInput(f"reference_temperature must be given for method {config.method}, got none")
        self.run, self.backend, self.splits = run, backend, splits
        # Only the first process writes the figures, so the other machines need no library for that.
        of_first(self.processes, partial(require_watchers, run))
        self.source, held_out = together(self.processes, self._sources)
        self.guidance = open_guidance(run, backend, splits, self.processes) if guidance is None else guidance
        # Rows of the data set that are used; the estimator has a place for every row, used or not.
        choice = self.guidance.choice
        self._rows = np.arange(len(self.source), dtype=np.int64) if choice is None else choice.rows
        self.done, self.seconds, self.stopped = 0, 0.0, False
        self._num_unreadable = 0  # unreadable images that are in the log
        self._saved = 0  # the step of the last checkpoint
        self._lines: list[dict[str, Any]] = []  # lines of metrics.jsonl that are not written yet
        self._losses = Watch(backend.xp)
        self._kept = KeptStates(run, writes=self.processes.is_first)
        self._notes = {"loss": "", "hopeless": "", "validation": ""}  # the text at the end of the progress bar
        # The memory of one machine may be too small.
        together(self.processes, partial(self._build, start, held_out))

    def _sources(self) -> tuple[BatchSource | RowSource, BatchSource | RowSource]:
        """Open the batches of the training pairs and of the validation pairs."""
        run, config = self.run, self.run.config
        reading: dict[str, Any] = {
            "image_size": run.spec.image_size,
            "resize_mode": run.image_reading,
            "channels": run.spec.channels,
            "order": config.order,
        }

        def source(dataset: Dataset, **of_training: Any) -> BatchSource | RowSource:
            inputs = run.image_reading
            if isinstance(inputs, StoredInputs):
                return inputs.source(dataset, order=config.order)
            return BatchSource(dataset, run.tokenizer, **reading, **of_training)

        train = source(self.splits.train, num_workers=config.workers, augmentation=augmentation_of(config))
        return train, source(self.splits.validation)

    def _build(self, start: Mapping[str, np.ndarray] | None, held_out: BatchSource | RowSource) -> None:
        """Build model, optimiser, step and the numbers of the samples; nothing is exchanged."""
        run, backend, config = self.run, self.backend, self.run.config
        self._step_inputs = StepInputs(run, backend, self.guidance)
        self.steps_per_epoch = steps_per_epoch(config, len(self._rows))
        self.total_steps = self.steps_per_epoch * config.epochs
        # Every backend starts from the same parameters, which NumPy draws.
        model = model_of_step(backend, build_model(backend, run.spec), config)
        start = initial_parameters(run.spec, seed=config.seed) if start is None else start
        optimizer = backend.adamw(weight_decay=config.weight_decay)
        self.state = initial_state(backend, optimizer, config, start)
        self._step = build_step(backend, model, optimizer, config, self.processes)
        self._encoder = Encoder(
            backend, model, self.state.evaluated, run.spec, run.tokenizer, resize_mode=run.image_reading
        )
        self._epoch_end = EpochEnd(run, self.splits, self.source, held_out, self._rows, self.processes)
        self._numbers = SampleNumbers(run, backend, len(self.source), self.processes)

    @property
    def estimator(self) -> RunEstimator:
        """The inner estimates."""
        return self._numbers.estimator

    @property
    def temperature(self) -> Temperature:
        """The temperature, fixed or learned."""
        return self._numbers.temperature

    @cached_property
    def _watchers(self) -> list[Watcher]:
        # They write files, so they are opened at the first line, when the folder of the run is there.
        return open_watchers(self.run, step=self.done)

    def close(self) -> None:
        """Close the file of the inner estimates and the watchers, if any; the trainer can take no step after that."""
        self._numbers.close()
        for watcher in self._watchers if "_watchers" in vars(self) else ():
            watcher.close()

    @property
    def num_pairs(self) -> int:
        """Number of training pairs that the run uses."""
        return len(self._rows)

    @property
    def encoder(self) -> Encoder:
        """The model with the current parameters."""
        self._encoder.use(self.state.evaluated)
        return self._encoder

    @property
    def finished(self) -> bool:
        """The training is over."""
        return self.stopped or self.done == self.total_steps

    @property
    def first_epoch(self) -> int:
        """Number of epochs after which the run was last finished, if it has got more epochs since; else 0."""
        return self.run.earlier_ends[-1] if self.run.earlier_ends else 0

    @property
    def kept(self) -> dict[str, dict[str, Any]]:
        """For each kept state except the last state, by name: the figures given to `keep_state`, and the step."""
        return self._kept.figures

    def encoder_of(self, state: str) -> Encoder:
        """Return the model with the parameters of a state: "last", the current parameters, or a kept state."""
        if state == "last":
            return self.encoder
        parameters = self.run.load_parameters(state)
        self._encoder.use({name: self.backend.asarray(array) for name, array in parameters.items()})
        return self._encoder

    def fit(self, *, quiet: bool = False, stop_after: int | None = None) -> None:
        """Train to the end, or until `stop_after` steps of the run are done; log, validate and save on the way."""
        config = self.run.config
        stop = self.total_steps if stop_after is None else min(stop_after, self.total_steps)
        # The estimates may need a file on each machine.
        together(self.processes, lambda: self.estimator)
        # A run uses a GPU even if the user has named no device, so the bar names the GPU.
        title = f"{config.method} on {config.data}" + (f", {self.backend.device}" if self.backend.has_gpu else "")
        with Reporter(title, self.total_steps, done=self.done, quiet=quiet or not self.processes.is_first) as reporter:
            for epoch, batch in itertools.islice(self._remaining_batches(), max(0, stop - self.done)):
                self._notes["loss"] = self.take_step(batch, epoch=epoch) or self._notes["loss"]
                epoch_ends = self.done % self.steps_per_epoch == 0
                if epoch_ends or self.done % config.checkpoint_every == 0 or self.done == stop:
                    # A state from which no step can be taken never replaces a good state.
                    self._require_good_state(batch)
                    if epoch_ends:
                        self.end_of_epoch(epoch)
                    self.save()
                reporter.advance(", ".join(filter(None, self._notes.values())))
                if self.stopped:
                    break

    def end_of_epoch(self, epoch: int) -> None:
        """Validate the current state, log the figures, and keep the state if R@1 is the best so far.

        All that happens once per epoch happens here. Of equally good epochs the earliest is kept.
        """
        learned = mean_temperature(self.temperature, self.state.scalars, self.backend, self.processes)
        temperature = self.run.config.temperature if learned is None else learned
        end = self._epoch_end.judge(epoch, self.encoder, temperature, self.kept, first_epoch=self.first_epoch)
        for line in end.lines:
            self._log(epoch, line)
        for name, figures in end.states.items():
            self.keep_state(name, figures)
        self.stopped = end.stops
        self._notes |= end.notes

    def _remaining_batches(self) -> Iterator[tuple[int, HostBatch]]:
        """Yield epoch and batch of every step that is not done yet; the order depends on seed and epoch only."""
        config = self.run.config
        first_epoch, first_batch = divmod(self.done, self.steps_per_epoch)
        for epoch in range(first_epoch, 0 if self.stopped else config.epochs):
            drawn = pairs_per_step(config)
            stream = self.source.epoch(
                drawn, seed=config.seed, epoch=epoch, first_batch=first_batch, rows=self._rows, processes=self.processes
            )
            for batch in stream:
                self._log_unreadable(epoch)
                yield epoch, batch
            first_batch = 0

    def _log_unreadable(self, epoch: int) -> None:
        """Write each unreadable image that was met since the last call to the log and to standard error."""
        # Threads may add entries meanwhile, so the number is read once.
        met = list(self.source.unreadable.values())
        for reason in met[self._num_unreadable :]:
            # Another process may not know this image yet, so this process writes the line on its own or later.
            self._remember_line(epoch, {"unreadable": reason})
            say(f"warning: {reason}; another pair takes the place", stream=sys.stderr)
        self._num_unreadable = len(met)
        if self.processes.size == 1:
            self._write_lines()

    def take_step(self, batch: HostBatch, *, epoch: int) -> str | None:
        """Train on one batch; return a note for the progress bar if the step wrote a line of metrics, else None.

        Raises
        ------
        BadInput
            If the run has diverged.
        """
        config, backend = self.run.config, self.backend
        began = time.monotonic()
        # 1. The schedules, and the batch with the inner estimates of its samples, on the device.
        inputs = self._inputs(batch)
        # 2. Features, loss, gradient and update of the parameters; the new state replaces the old state.
        result = self._stepped(batch, inputs)
        self._losses.add(result.loss)
        if (warning := check_overflows(self.state.loss_scale, backend)) is not None:
            say(f"warning: {warning}", stream=sys.stderr)
        # 3. A line of metrics. Reading the loss waits for the device, so the loss is not read at every step.
        note = None
        if self.done % config.log_every == 0 or self.done == self.total_steps:
            loss, surrogate = float(result.loss), float(result.surrogate)
            if not self._losses.all_finite():
                raise self._diverged(self.done)
            figures = {"loss": loss, "surrogate": surrogate, "learning_rate": inputs.learning_rate}
            figures |= {"gamma": inputs.gamma}
            figures |= temperature_figures(self.temperature, result.temperature_gradient, backend, self.processes)
            if self.state.loss_scale:
                figures["loss_scale"] = float(self.state.loss_scale["scale"])
            self._log(epoch, figures | scalar_figures(self.state.scalars, backend))
            note = f"loss {loss:.4f}"
        self.seconds += time.monotonic() - began
        return note

    def _inputs(self, batch: HostBatch) -> StepBatch:
        """Return all that the next step reads besides the state, on the device."""
        # Two processes with one sample would train without an error, but not on this batch.
        batch.check_rows(self.processes.rank, self.processes.size)
        schedules = schedules_at(
            self.run.config, self.done, steps_per_epoch=self.steps_per_epoch, first_epoch=self.first_epoch
        )
        return self._step_inputs.of(batch, schedules, step=self.done, numbers=self._numbers)

    def _accept(self, batch: HostBatch, result: StepResult) -> StepResult:
        """Replace the state by that after a step, and return the result with the gradient to log."""
        self.state = result.state
        gradient = self._numbers.after_step(batch, result)
        self.done += 1
        return result._replace(temperature_gradient=gradient)

    def _stepped(self, batch: HostBatch, inputs: StepBatch) -> StepResult:
        """Return the result of the step, or raise BadInput if the run has diverged."""
        try:
            # A diverging run ends with one message, so the warnings of NumPy would only be noise.
            with np.errstate(all="ignore"):
                result = self._step(self.state, inputs)
            return self._accept(batch, result)
        # The core refuses features that are not finite; after a compiled step it refuses the new estimates.
        except ValueError:
            if self._features_are_finite(batch):
                raise
            raise self._diverged(self.done + 1) from None

    def _features_are_finite(self, batch: HostBatch) -> bool:
        # No more pairs than a step keeps activations of, so that the check needs no more memory than the step.
        size = self.run.config.micro_batch or self.run.config.batch_size
        # A moving average stays finite for many steps after the parameters, with which the next step is taken, have
        # grown too large.
        self._encoder.use(self.state.parameters)
        with np.errstate(all="ignore"):
            return all(self.processes.gather(all_finite(self._encoder.batches(batch.parts(size)))))

    def _require_good_state(self, batch: HostBatch) -> None:
        """Raise BadInput unless losses and features of a batch are finite."""
        if not (self._losses.all_finite() and self._features_are_finite(batch)):
            raise self._diverged(self.done)

    def _diverged(self, step: int) -> Diverged:
        saved = self._saved
        file = self._record_failure(step)
        dump = "" if file is None else f"; {file} has what the first bad step read: drrho replay {self.run.folder}"
        return Diverged(
            f"the loss must stay finite, got a number that is not, at step {step} or shortly before: lower the "
            f"learning_rate; {self.run.checkpoint} has the last good state, that of step {saved}{dump}"
        )

    def _record_failure(self, last: int) -> Path | None:
        """Take the steps since the last checkpoint again, and write what the first bad step reads; see `failure`."""
        if not of_first(self.processes, self.run.checkpoint.is_file):
            return None
        self._restore()
        for epoch, batch in itertools.islice(self._remaining_batches(), last + 1 - self.done):
            inputs = self._inputs(batch)
            arrays = failure_arrays(self.backend, self.state, inputs, self.processes)
            result = good_result(self._step, self.state, inputs)
            if result is None:
                write = partial(save_failure, self.run, arrays, inputs, batch.rows, step=self.done + 1, epoch=epoch)
                written_by_first(self.processes, write)
                return failure_file(self.run)
            self._accept(batch, result)
        return None

    def _log(self, epoch: int, figures: Mapping[str, float | str]) -> None:
        """Write a line to the log; all processes call this at the same time."""
        self._remember_line(epoch, figures)
        written_by_first(self.processes, self._write_lines)

    def _remember_line(self, epoch: int, figures: Mapping[str, float | str]) -> None:
        """Remember a line, which the next call of `_log` writes as well."""
        samples_seen = self.done * self.run.config.batch_size
        record = {"step": self.done, "epoch": epoch, "samples_seen": samples_seen, **figures}
        self._lines += [record] if self.processes.is_first else []

    def _write_lines(self) -> None:
        for record in self._lines:
            self.run.log(record)
            for watcher in self._watchers:
                watcher.log(record)
        self._lines.clear()

    # Checkpoints -----------------------------------------------------------------------------------------------------

    def keep_state(self, name: str, figures: Mapping[str, Any]) -> None:
        """Keep the current parameters in checkpoint-NAME.safetensors, in place of an earlier state of that name.

        The next `save` writes the file, so call `keep_state` at a step after which `save` follows: in `end_of_epoch`.

        Parameters
        ----------
        name : str
            Name of the state, such as "best" or "reference".
        figures : mapping
            Values that JSON can hold, which explain the choice. `kept` and the file hold them, the step, and a learned
            temperature.
        """
        self._kept.add(name, {**figures, **self._learned()}, self.done)

    def save(self) -> None:
        """Write the checkpoint, then the states to keep."""
        arrays = {
            f"{group}/{name}": self.backend.to_numpy(array)
            for group, members in self._groups().items()
            for name, array in members.items()
        }
        # There may be a temperature per sample, so it is copied from the device only once.
        own_temperature = self._numbers.own_temperature()
        if not all(self.processes.gather(all_finite([*arrays.values(), *own_temperature.values()]))):
            raise self._diverged(self.done)
        gathered, learned = self._numbers.gathered(own_temperature), self._learned()
        write = partial(self._write_checkpoint, arrays | gathered, own_temperature, learned)
        written_by_first(self.processes, write, "writing a checkpoint")
        self._saved = self.done
        self.processes.saved(self.done)
        # If the process dies here, the checkpoint has the parameters of the states that are not written yet.
        together(self.processes, partial(self._kept.write, part(arrays, "parameters")))

    def _write_checkpoint(
        self, arrays: Mapping[str, np.ndarray], own_temperature: Mapping[str, np.ndarray], learned: Mapping[str, float]
    ) -> None:
        progress = {
            "step": self.done,
            "seconds": self.seconds,
            "total": self.total_steps,
            "epochs": self.run.config.epochs,
            "finished": self.finished,
            "stopped": self.stopped,
            "kept": self.kept,
            **learned,
        }
        self._write_lines()
        self.run.sync_log()
        save_arrays(self.run.checkpoint, "checkpoint", {**arrays, **self._numbers.whole(own_temperature)}, progress)
        keep_last(self.run, self.done)

    def _learned(self) -> dict[str, float]:
        """Return the learned temperature and the learned bias, if any; `temperature_of` reads the temperature."""
        temperature = mean_temperature(self.temperature, self.state.scalars, self.backend, self.processes)
        learned = {} if temperature is None else {"temperature": temperature}
        return scalar_figures(self.state.scalars, self.backend) | learned

    def _groups(self) -> dict[str, Mapping[str, Array]]:
        """Return the arrays on the device that the next step needs, by group and name, but no numbers of samples."""
        return {
            "parameters": self.state.evaluated,
            "optimizer": self.state.optimizer,
            "scalars": self.state.scalars,
            "loss_scale": self.state.loss_scale,
            # Every reader of a run takes `parameters`. With a moving average these are the average, and the parameters
            # that the optimiser updates have a group of their own.
            "trained": self.state.parameters if self.state.average else {},
        }

    def load(self) -> None:
        """Restore the state that the checkpoint holds, and drop the lines of metrics after it.

        Raises
        ------
        BadInput
            If the checkpoint is damaged or belongs to another model or data set; then the trainer does not change.
        """
        self._restore()
        written_by_first(self.processes, lambda: self.run.drop_log_after(self.done))
        self.processes.saved(self.done)

    def _restore(self) -> None:
        """Take the state of the checkpoint on all processes, or raise BadInput on all of them."""
        arrays, progress = together(self.processes, self._read_checkpoint)
        # If the numbers of the samples are divided, the processes check them together and fail together.
        together(self.processes, partial(self._take, arrays, progress))

    def _read_checkpoint(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Return arrays and progress of the checkpoint, which fit this run."""
        arrays, progress = load_arrays(self.run.checkpoint, "checkpoint")
        check_state(progress, self.run.checkpoint)
        expected = {
            f"{group}/{name}": tuple(array.shape)
            for group, members in self._groups().items()
            for name, array in members.items()
        }
        if {name: array.shape for name, array in arrays.items()} != expected | self._numbers.shapes():
            raise BadInput(f"{self.run.checkpoint} must hold the arrays of this run's model and data, got other arrays")
        return arrays, progress

    def _take(self, arrays: Mapping[str, np.ndarray], progress: Mapping[str, Any]) -> None:
        """Replace the state by that of a checkpoint."""
        loaded = {
            group: {name: self.backend.asarray(array) for name, array in part(arrays, group).items()}
            for group in self._groups()
        }
        # After the check of the shapes only the numbers of the samples can still be refused, so they come first.
        self._numbers.load(arrays)
        average = loaded["parameters"] if loaded["trained"] else {}
        parameters = loaded["trained"] or loaded["parameters"]
        self.state = StepState(parameters, loaded["optimizer"], loaded["scalars"], average, loaded["loss_scale"])
        self.done, self.seconds = int(progress["step"]), float(progress["seconds"])
        self._saved = self.done
        # A run that was stopped goes on if it has got more epochs since.
        same_end = progress.get("epochs", self.run.config.epochs) == self.run.config.epochs
        self.stopped = same_end and bool(progress.get("stopped", False))
        self._kept.restore(progress.get("kept", {}), part(arrays, "parameters"), self.done)
