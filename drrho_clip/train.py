"""The training loop, one for every backend and method, resumable at any step."""

from __future__ import annotations

import itertools
import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from drrho_clip.architecture import ModelSpec, initial_parameters
from drrho_clip.checkpoint import load_arrays, save_arrays, write_atomic
from drrho_clip.config import BUILT_IN_DATA, TrainConfig
from drrho_clip.data import (
    BatchSource,
    Dataset,
    DataSplits,
    HostBatch,
    WordTokenizer,
    batches,
    captions_of,
    digit_splits,
    digits,
    pair_splits,
    scene_splits,
    scenes,
)
from drrho_clip.errors import BadInput
from drrho_clip.evaluate import retrieval, zero_shot_accuracy
from drrho_clip.progress import Reporter
from drrho_clip.run import (
    Encoder,
    Run,
    build_model,
    load_reference_features,
    model_inputs,
    open_run,
    part,
    refuse_existing,
    remove_torn_files,
    save_reference_features,
)
from drrho_clip.step import StepBatch, StepState, build_step
from drrho_core import GlobalTemperature, InnerEstimator, PerSampleTemperature, cosine_gamma
from drrho_core._array_api import Array
from drrho_core.backend import Backend, get_backend


def open_splits(config: TrainConfig) -> DataSplits:
    """Open the data that a run names: built-in ones by name, else a CSV or TSV file.

    Raises
    ------
    BadInput
        If the file or one of its images cannot be used.
    MissingExtra
        If a library that the data need is not installed.
    """
    if config.data not in BUILT_IN_DATA:
        return pair_splits(config.data, seed=config.data_seed)
    family, _, stream = config.data.partition(":")
    made: dict[str, Any] = {"seed": config.data_seed, "swapped_fraction": config.swapped_fraction}
    if family == "scenes":
        splits = scene_splits(config.train_size, **made)
        return splits._replace(train=scenes(config.train_size, stream=stream, **made)) if stream else splits
    splits = digit_splits(**made)
    return splits._replace(train=digits(stream, **made)) if stream else splits


def evaluate(encoder: Encoder, dataset: Dataset, *, zero_shot: bool = True) -> dict[str, float]:
    """Measure retrieval in galleries of 200 and, where the data have classes, zero-shot accuracy.

    Returns
    -------
    dict
        retrieval_r1, retrieval_r5, retrieval_r10 and, where it exists, zero_shot_accuracy, in [0, 1].
    """
    image_features, text_features = encoder.pairs(dataset)
    found = retrieval(image_features, text_features, captions_of(dataset))
    metrics = {name: float(getattr(found, name)) for name in ("retrieval_r1", "retrieval_r5", "retrieval_r10")}
    task = dataset.zero_shot(image_size=encoder.image_size) if zero_shot else None
    if task is not None:
        prompts = encoder.texts(task.prompts)
        metrics["zero_shot_accuracy"] = zero_shot_accuracy(encoder.images(task.images), prompts, task.labels)
    return metrics


class Outcome(NamedTuple):
    """What a finished run leaves in memory.

    Attributes
    ----------
    run : Run
        Its folder and description.
    encoder : Encoder
        The trained model.
    row : dict
        Its row of results.json.
    """

    run: Run
    encoder: Encoder
    row: dict[str, Any]


def train(
    config: TrainConfig,
    out: str | Path,
    *,
    resume: bool = False,
    backend: Backend | None = None,
    device: str | None = None,
    splits: DataSplits | None = None,
    quiet: bool = False,
    stop_after: int | None = None,
) -> Outcome:
    """Train one model and evaluate it.

    Parameters
    ----------
    config : TrainConfig
        What to train.
    out : path
        Folder of the run; one that holds a run already is refused unless `resume`.
    resume : bool
        Go on from the last checkpoint of `out`, whose settings must be `config`.
    backend : Backend, optional
        What runs it; built from ``config.backend``, ``config.dtype`` and `device` when left out.
    device : str, optional
        In the library's own words.
    splits : DataSplits, optional
        Data that are open already; opened from the settings when left out.
    quiet : bool
        Show no progress.
    stop_after : int, optional
        Stop once that many steps are done in all, with a checkpoint: a run in several sittings.

    Returns
    -------
    Outcome
        The run, its model and its row of results.json.

    Raises
    ------
    BadInput
        If something given cannot be used; nothing has been overwritten then.
    MissingExtra
        If a library that the data need is not installed.
    """
    folder = Path(out)
    if resume:
        old = open_run(folder)
        require_same(old.config, config)
    else:
        refuse_existing(folder)
    if backend is None:
        backend = get_backend(config.backend, device=device, dtype=config.dtype)
    splits = open_splits(config) if splits is None else splits
    if resume:
        run = old
        if run.fingerprint != splits.train.fingerprint():
            raise BadInput(f"data must be what {folder} was trained on, got other content under {config.data!r}")
    else:
        run = describe_run(folder, config, splits.train)
    trainer = Trainer(run, backend, splits)
    remove_torn_files(folder)
    if resume and run.checkpoint.exists():
        trainer.load()
    else:
        if not resume:
            run.write()
        trainer.save()
    trainer.keep_reference_features()
    trainer.fit(quiet=quiet, stop_after=stop_after)
    row = {
        "method": config.method,
        "dataset": config.data,
        "seed": config.seed,
        "metrics": evaluate(trainer.encoder, splits.test),
        "samples_seen": trainer.done * config.batch_size,
        "seconds": round(trainer.seconds, 3),
    }
    if trainer.done == trainer.total_steps:
        write_atomic(run.results, (json.dumps([row], indent=1) + "\n").encode())
    return Outcome(run, trainer.encoder, row)


class Trainer:
    """A run in memory: model, optimiser, estimator, data, and how far it is.

    Parameters
    ----------
    run : Run
        What to train; nothing is written by building a trainer.
    backend : Backend
        What runs it.
    splits : DataSplits
        Its data.

    Attributes
    ----------
    done, total_steps, steps_per_epoch : int
        Steps taken, and those of the whole run and of one epoch.
    seconds : float
        Time spent in steps, all sittings together.
    state : StepState
        Parameters and optimiser state.
    estimator : InnerEstimator
        One inner estimate per training pair and direction.
    temperature : GlobalTemperature, PerSampleTemperature or None
        What is learned, with its optimiser's state; None: the fixed one of the settings.
    encoder : Encoder
        The model as it stands.
    """

    def __init__(self, run: Run, backend: Backend, splits: DataSplits) -> None:
        config = run.config
        self.run, self.backend, self.splits = run, backend, splits
        self.source = BatchSource(
            splits.train, run.tokenizer, image_size=run.spec.image_size, channels=run.spec.channels
        )
        self.steps_per_epoch = sum(1 for _ in batches(len(self.source), config.batch_size, seed=config.seed, epoch=0))
        self.total_steps = self.steps_per_epoch * config.epochs
        self.done, self.seconds = 0, 0.0
        model = build_model(backend, run.spec)
        optimizer = backend.adamw(weight_decay=config.weight_decay)
        self._step = build_step(backend, model, optimizer, config)
        start = initial_parameters(run.spec, seed=config.seed)
        parameters = {name: backend.asarray(array) for name, array in start.items()}
        self.state = StepState(parameters, optimizer.init(parameters))
        like = backend.asarray(np.zeros(1))
        self.estimator = InnerEstimator(len(self.source), like=like)
        self.temperature = _start_temperature(config, len(self.source), like)
        self.encoder = Encoder(backend, model, parameters, run.spec, run.tokenizer)
        self._reference = self._reference_features()

    def _reference_features(self) -> tuple[np.ndarray, np.ndarray] | None:
        """Return the reference model's features of all training pairs: kept ones, or encode them now."""
        config = self.run.config
        if config.reference is None:
            return None
        if self.run.reference_features.exists():
            return load_reference_features(self.run.reference_features, {"data": self.run.fingerprint})
        reference = open_run(config.reference)
        backend = self.backend
        return Encoder.load(reference, backend).pairs(self.splits.train)

    def keep_reference_features(self) -> None:
        """Write the reference features into the run's folder, so that resuming needs no reference model."""
        if self._reference is not None and not self.run.reference_features.exists():
            save_reference_features(self.run.reference_features, *self._reference, {"data": self.run.fingerprint})

    def save(self) -> None:
        """Write the checkpoint."""
        arrays = {
            f"{group}/{name}": self.backend.to_numpy(array)
            for group, members in self._groups().items()
            for name, array in members.items()
        }
        save_arrays(self.run.checkpoint, "checkpoint", arrays, {"step": self.done, "seconds": self.seconds})

    def _groups(self) -> dict[str, Mapping[str, Array]]:
        """Return all that a checkpoint holds; a fixed temperature has no state."""
        groups: dict[str, Mapping[str, Array]] = {
            "parameters": self.state.parameters,
            "optimizer": self.state.optimizer,
            "estimator": self.estimator.state_dict(),
        }
        return groups if self.temperature is None else groups | {"temperature": self.temperature.state_dict()}

    def load(self) -> None:
        """Take over the checkpoint.

        Raises
        ------
        BadInput
            If it is damaged, or of another model or data set; nothing has been changed then.
        """
        arrays, state = load_arrays(self.run.checkpoint, "checkpoint")
        groups = self._groups()
        expected = {
            f"{group}/{name}": tuple(a.shape) for group, members in groups.items() for name, a in members.items()
        }
        if {name: array.shape for name, array in arrays.items()} != expected:
            raise BadInput(f"{self.run.checkpoint} must hold the arrays of this run's model and data, got others")
        loaded = {
            group: {name: self.backend.asarray(array) for name, array in part(arrays, group).items()}
            for group in groups
        }
        if self.temperature is not None:
            try:
                self.temperature.load_state_dict(loaded["temperature"])
            except (TypeError, ValueError) as error:
                raise BadInput(f"{self.run.checkpoint} must hold this version's temperature: {error}") from error
        self.estimator.load_state_dict(loaded["estimator"])
        self.state = StepState(loaded["parameters"], loaded["optimizer"])
        self.encoder.use(self.state.parameters)
        self.done, self.seconds = int(state["step"]), float(state["seconds"])
        _forget_after(self.run.metrics, self.done)

    def fit(self, *, quiet: bool = False, stop_after: int | None = None) -> None:
        """Take the steps that are left (up to `stop_after` in all), logging, validating and saving on the way."""
        config = self.run.config
        stop = self.total_steps if stop_after is None else min(stop_after, self.total_steps)
        title = f"{config.method} on {config.data}"
        with Reporter(title, self.total_steps, done=self.done, quiet=quiet) as reporter:
            while self.done < stop:
                epoch, first = divmod(self.done, self.steps_per_epoch)
                stream = self.source.epoch(config.batch_size, seed=config.seed, epoch=epoch, first_batch=first)
                for batch in itertools.islice(stream, stop - self.done):
                    reporter.advance(self.take_step(batch, epoch=epoch))
                    end_of_epoch = self.done % self.steps_per_epoch == 0
                    if end_of_epoch:
                        self._validate(epoch)
                    if end_of_epoch or self.done % config.checkpoint_every == 0 or self.done == stop:
                        self.save()

    def take_step(self, batch: HostBatch, *, epoch: int) -> str | None:
        """Take one step and, every `log_every` steps, write a line of metrics; return a note for the bar."""
        config, backend = self.run.config, self.backend
        began = time.monotonic()
        learning_rate = config.learning_rate_at(self.done, self.total_steps)
        gamma = cosine_gamma(epoch, num_epochs=config.epochs, gamma_min=config.gamma_min)
        index = backend.asarray(batch.sample_index)
        log_inner_image, log_inner_text = self.estimator.gather(index)
        temperature: Array | tuple[Array, Array] | None = None
        if isinstance(self.temperature, GlobalTemperature):
            temperature = self.temperature.temperature
        elif self.temperature is not None:
            temperature = self.temperature.gather(index)
        images, texts = model_inputs(batch, self.run.spec, self.run.tokenizer)
        reference = None
        if self._reference is not None:
            rows = [backend.asarray(features[batch.sample_index]) for features in self._reference]
            reference = (rows[0], rows[1])
        result = self._step(
            self.state,
            StepBatch(
                images=backend.asarray(images),
                texts=backend.asarray(texts),
                log_inner_image=log_inner_image,
                log_inner_text=log_inner_text,
                reference_features=reference,
                learning_rate=learning_rate,
                gamma=gamma,
                temperature=temperature,
            ),
        )
        self.state = result.state
        self.estimator = self.estimator.scatter(index, result.log_inner_image, result.log_inner_text)
        self._learn_temperature(index, result.temperature_gradient)
        self.encoder.use(self.state.parameters)
        self.done += 1
        note = None
        if self.done % config.log_every == 0 or self.done == self.total_steps:
            loss, surrogate = float(result.loss), float(result.surrogate)
            if not math.isfinite(loss):
                raise BadInput(f"the loss must stay finite, got {loss} at step {self.done}: lower the learning_rate")
            figures = {"loss": loss, "surrogate": surrogate, "learning_rate": learning_rate, "gamma": gamma}
            figures |= self._temperature_figures(result.temperature_gradient)
            self._log(epoch, figures)
            note = f"loss {loss:.4f}"
        self.seconds += time.monotonic() - began
        return note

    def _learn_temperature(self, index: Array, gradient: Any) -> None:
        rate = self.run.config.temperature_learning_rate
        if isinstance(self.temperature, GlobalTemperature):
            self.temperature = self.temperature.update(gradient, learning_rate=rate)
        elif self.temperature is not None:
            self.temperature = self.temperature.update(index, gradient, learning_rate=rate)

    def _temperature_figures(self, gradient: Any) -> dict[str, float]:
        """Return what to log of a learned temperature: where it stands after the step, and the gradient that moved it.

        That of one temperature per sample is the sum over the batch's anchors, which a global one would have got.
        """
        if self.temperature is None:
            return {}
        if isinstance(self.temperature, GlobalTemperature):
            return {"temperature": float(self.temperature.temperature), "temperature_gradient": float(gradient)}
        both = [self.backend.to_numpy(self.temperature.state_dict()[f"temperature_{s}"]) for s in ("image", "text")]
        return {
            "temperature": float(np.mean(both)),
            "smallest_temperature": float(np.min(both)),
            "largest_temperature": float(np.max(both)),
            "temperature_gradient": float(sum(np.sum(self.backend.to_numpy(side)) for side in gradient)),
        }

    def _validate(self, epoch: int) -> None:
        metrics = evaluate(self.encoder, self.splits.validation, zero_shot=False)
        self._log(epoch, {f"validation_{name}": value for name, value in metrics.items()})

    def _log(self, epoch: int, figures: Mapping[str, float]) -> None:
        record = {"step": self.done, "epoch": epoch, "samples_seen": self.done * self.run.config.batch_size, **figures}
        with self.run.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


def _start_temperature(
    config: TrainConfig, num_samples: int, like: Array
) -> GlobalTemperature | PerSampleTemperature | None:
    """Return the state of a learned temperature, or None for a fixed one."""
    bounds = {"minimum": config.temperature_min, "maximum": config.temperature_max}
    if config.temperature_scheme == "global":
        return GlobalTemperature(config.temperature, like=like, **bounds)
    if config.temperature_scheme == "per_sample":
        return PerSampleTemperature(num_samples, config.temperature, like=like, **bounds)
    return None


def require_same(stored: TrainConfig, given: TrainConfig) -> None:
    """Raise BadInput where a run is to be resumed with other settings than it was started with."""
    ours, theirs = stored.to_json(), given.to_json()
    for name, value in ours.items():
        if theirs[name] != value:
            raise BadInput(f"{name} must be that of the run to resume ({value!r}), got {theirs[name]!r}")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl; a last line that a crash cut short is left out."""
    if not path.exists():
        return []
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    return records


def _forget_after(path: Path, step: int) -> None:
    """Take back the lines that were written after the checkpoint: their steps are taken again."""
    kept = [record for record in read_metrics(path) if record["step"] <= step]
    write_atomic(path, "".join(json.dumps(record) + "\n" for record in kept).encode())


def describe_run(folder: Path, config: TrainConfig, data: Dataset) -> Run:
    """Fit the tokenizer and size the encoders for a data set."""
    tokenizer = WordTokenizer.fit(captions_of(data))
    spec = ModelSpec(
        config.architecture,
        image_size=config.image_size,
        channels=int(data[0].image.shape[2]),
        vocabulary_size=tokenizer.vocabulary_size,
        context_length=tokenizer.context_length,
        feature_dim=config.feature_dim,
        width=config.width,
        depth=config.depth,
    )
    return Run(folder, config, spec, tokenizer, data.fingerprint())
