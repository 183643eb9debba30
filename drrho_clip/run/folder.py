"""The folder of a run: the files in it, and how they are written and read.

config.json                       settings, encoders, tokenizer, fingerprint of the data
checkpoint.safetensors            the last state: parameters, optimiser state, inner estimates and progress
checkpoint-NAME.safetensors       the parameters of a state that was kept, such as the best state
reference_features.safetensors    features of the reference model for every training pair (method drrho only)
reference_cache.json              the cache of features that stands for that file, if the reference model is a cache
pair_choice.safetensors           training pairs that are used, and their weights, if a reference model has chosen them
learning_rates.json               the trials of learning rates, if the setting `learning_rate` was "auto"
estimator.bin                     inner estimates, if the setting `estimator` is "file"
estimator-RANK.bin                the same of another process, if several processes train together
training_images.safetensors       digests of the training and validation images
metrics.jsonl                     the log: one JSON object per line
results.json                      the results, written when the training is finished

Checkpoints are replaced atomically. Inner estimates are running averages, two per sample, that the methods sogclr and
drrho need. A resumed run overwrites estimator.bin with the inner estimates of the checkpoint.
"""

from __future__ import annotations

import fnmatch
import functools
import itertools
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

import numpy as np

from drrho_clip.config import TrainConfig
from drrho_clip.data import (
    DEFAULT_PROMPT,
    LONGEST_CONTEXT,
    Dataset,
    Tokenizer,
    WordTokenizer,
    captions_of,
    channels_of,
)
from drrho_clip.data.hf_preprocessing import HuggingFaceTokenizer, ImageProcessor
from drrho_clip.data.protocol import ImageReading
from drrho_clip.errors import BadInput
from drrho_clip.features.reading import ReferenceFeatures
from drrho_clip.features.stored import StoredInputs
from drrho_clip.files.checkpoint import load_arrays, load_state, save_arrays
from drrho_clip.files.disk import naming, write_atomic
from drrho_clip.files.json_files import read_json
from drrho_clip.files.outputs import check_folder, write_json
from drrho_clip.models import ModelSpec, parameter_shapes
from drrho_clip.run.checkpoint_state import check_state
from drrho_clip.terminal.safe_text import brief

FORMAT = "drrho-run"
VERSION = 1
# The names of all files of a run, as patterns of `Path.glob`.
FILES = (
    "config.json",
    "checkpoint.safetensors",
    "checkpoint-*.safetensors",
    "reference_features.safetensors",
    "reference_cache.json",
    "pair_choice.safetensors",
    "learning_rates.json",
    "estimator.bin",
    "estimator-*.bin",
    "training_images.safetensors",
    "metrics.jsonl",
    "results.json",
)


# If a run has not kept the state on the left, the state on the right stands for that state.
_FALLBACK = {"reference": "best", "best": "last"}


class RunProgress(NamedTuple):
    """How far a run is.

    Attributes
    ----------
    done : int
        Number of steps that the last checkpoint holds.
    total : int or None
        Number of steps of the whole run; None for a run that a version before 0.2.0 has started.
    finished : bool
        The training is over, after the last step or by an early stop, and results.json has been written.
    """

    done: int
    total: int | None
    finished: bool


@dataclass(frozen=True)
class Run:
    """A run's folder and description.

    Attributes
    ----------
    folder : Path
        The folder.
    config : TrainConfig
        The settings.
    spec : ModelSpec
        The sizes of the encoders.
    tokenizer : Tokenizer
        The words of the training captions, or the tokenizer of the model from which the run has started.
    fingerprint : str
        Digest of the content of the training data.
    held_out : mapping
        Digests of the content of the parts "validation" and "test"; empty for a run of version 0.1.
    places : mapping
        For each setting that names a file or folder: "path", which is absolute, and "from_run", which is relative to
        the run's folder, both at the start of the run; see `drrho_clip.run.data`.
    earlier_ends : tuple of int
        If a finished run was continued with more epochs: the numbers of epochs after which it was finished before.
    """

    folder: Path
    config: TrainConfig
    spec: ModelSpec
    tokenizer: Tokenizer
    fingerprint: str
    held_out: Mapping[str, str] = field(default_factory=dict)
    places: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    earlier_ends: tuple[int, ...] = ()

    @property
    def checkpoint(self) -> Path:
        """File of parameters, optimiser state, inner estimates and progress."""
        return self.folder / "checkpoint.safetensors"

    def state_file(self, state: str) -> Path:
        """File of the parameters of a state: "last", or a name that `Trainer.keep_state` was called with."""
        return self.checkpoint if state == "last" else self.folder / f"checkpoint-{state}.safetensors"

    @functools.cached_property
    def image_reading(self) -> ImageReading | str:
        """The way in which the encoders read images: that of their own settings, or a mode of `resize`."""
        stored = self.spec.stored_features
        if stored is not None:
            # The module of the places imports this module.
            from drrho_clip.run.data import place_of

            cache = place_of(self, "model").partition(":")[2]
            return StoredInputs(ReferenceFeatures(cache, verify=False), stored["model"])
        settings = self.spec.image_processor
        return self.config.resize if settings is None else ImageProcessor.from_json(settings)

    @property
    def reference_features(self) -> Path:
        """File of the reference model's features for every training pair."""
        return self.folder / "reference_features.safetensors"

    @property
    def reference_cache(self) -> Path:
        """File that says which cache of features the run uses, if its reference model is a cache."""
        return self.folder / "reference_cache.json"

    @property
    def pair_choice(self) -> Path:
        """File of the training pairs that are used, and of their weights, if a reference model has chosen them."""
        return self.folder / "pair_choice.safetensors"

    @property
    def estimator_file(self) -> Path:
        """File of the inner estimates, if the setting `estimator` is "file"."""
        return self.estimator_file_of(0)

    def estimator_file_of(self, rank: int) -> Path:
        """File of the inner estimates of one of several processes that train together."""
        return self.folder / (f"estimator-{rank}.bin" if rank else "estimator.bin")

    @property
    def training_images(self) -> Path:
        """File of the digests of the training and validation images of the run; see `drrho_clip.measure.held_out`."""
        return self.folder / "training_images.safetensors"

    @property
    def trials(self) -> Path:
        """File of the trials that chose the learning rate, if the setting `learning_rate` was "auto"."""
        return self.folder / "learning_rates.json"

    @property
    def metrics(self) -> Path:
        """File of the log, one JSON object per line."""
        return self.folder / "metrics.jsonl"

    @property
    def results(self) -> Path:
        """File of the results of the finished run."""
        return self.folder / "results.json"

    def write(self) -> None:
        """Write config.json."""
        self.folder.mkdir(parents=True, exist_ok=True)
        # This file alone is enough to build the model and to find the data.
        document = {
            "format": FORMAT,
            "version": VERSION,
            "config": self.config.to_json(),
            "model": self.spec.to_json(),
            "tokenizer": self.tokenizer.to_json(),
            "data_fingerprint": self.fingerprint,
            "held_out_fingerprints": dict(self.held_out),
            "places": {name: dict(place) for name, place in self.places.items()},
            "earlier_ends": list(self.earlier_ends),
        }
        write_json(self.folder / "config.json", document)

    def progress(self) -> RunProgress:
        """Return how far the run is, from the last checkpoint.

        Raises
        ------
        BadInput
            If the checkpoint is missing or damaged.
        """
        state = load_state(self.checkpoint, "checkpoint")
        check_state(state, self.checkpoint)
        # Before version 0.2.0 a checkpoint did not say whether the training was over.
        over = state.get("finished", True) and state.get("epochs", self.config.epochs) == self.config.epochs
        return RunProgress(int(state["step"]), state.get("total"), over and self.results.is_file())

    def chosen_state(self, state: str = "best") -> str:
        """Return the state that stands for `state` in this run: `state` itself if the run has kept that state.

        For "reference" the best state can stand, and for "best" the last state.
        """
        while state in _FALLBACK and not self.state_file(state).exists():
            state = _FALLBACK[state]
        return state

    def load_parameters(self, state: str = "best") -> dict[str, np.ndarray]:
        """Return the parameters of a state of the run.

        Parameters
        ----------
        state : {"best", "last", "reference"}
            The state with the best validation R@1, the last state, or the state that serves as a reference. If the run
            has not kept that state, `chosen_state` says which state is read instead.

        Raises
        ------
        BadInput
            If the file is missing or damaged, or if the parameters do not have the shapes of `spec`.
        """
        # The file also holds the optimiser state and the inner estimates, but evaluation needs only the parameters.
        file = self.state_file(self.chosen_state(state))
        arrays, _ = load_arrays(file, "checkpoint")
        parameters = part(arrays, "parameters")
        shapes = {name: array.shape for name, array in parameters.items()}
        if shapes != parameter_shapes(self.spec):
            raise BadInput(f"{file} must hold the parameters of its config.json, got other parameters")
        return parameters

    def sync_log(self) -> None:
        """Wait until metrics.jsonl is on the disk, so that no checkpoint is there before the lines of its steps."""
        if self.metrics.exists():
            with naming(self.metrics), self.metrics.open("rb") as file:
                os.fsync(file.fileno())

    def log(self, record: Mapping[str, Any]) -> None:
        """Append a line to metrics.jsonl."""
        with naming(self.metrics), self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def drop_log_after(self, step: int) -> None:
        """Remove the metrics of all steps after `step`, because a resumed run takes these steps again."""
        # Without this, metrics.jsonl would hold the lines of these steps twice.
        kept = [record for record in read_metrics(self.metrics) if record["step"] <= step]
        write_atomic(self.metrics, "".join(json.dumps(record) + "\n" for record in kept).encode())


def describe_run(
    folder: Path,
    config: TrainConfig,
    data: Dataset,
    *,
    tokenizer: Tokenizer | None = None,
    spec: ModelSpec | None = None,
) -> Run:
    """Return a new run; no file is written.

    By default the run gets a tokenizer for the captions, and encoder sizes for the images.
    """
    tokenizer = _tokenizer_for(data) if tokenizer is None else tokenizer
    spec = spec or ModelSpec(
        config.architecture,
        image_size=config.image_size,
        channels=channels_of(data),
        vocabulary_size=tokenizer.vocabulary_size,
        context_length=tokenizer.context_length,
        feature_dim=config.feature_dim,
        width=config.width,
        depth=config.depth,
    )
    return Run(folder, config, spec, tokenizer, data.fingerprint())


def _tokenizer_for(data: Dataset) -> WordTokenizer:
    """Return a tokenizer with the words of the training captions, which reads all captions and prompts to the end."""
    # The vocabulary comes from the training captions only; validation and test captions may hold unknown words.
    tokenizer = WordTokenizer.fit(captions_of(data))
    # The prompts of the labels may be longer than every caption. Cut off before the label, they would all be equal.
    prompts = (DEFAULT_PROMPT.replace("{}", name) for name in getattr(data, "class_names", ()))
    longest = min(max((len(tokenizer.words(prompt)) for prompt in prompts), default=0), LONGEST_CONTEXT)
    if longest <= tokenizer.context_length:
        return tokenizer
    return WordTokenizer(tokenizer.vocabulary, longest)


def files_of_run(folder: Path) -> list[Path]:
    """Return the files of a run that are in a folder; links are among them, whether they lead to a file or not."""
    entries = sorted(os.listdir(folder)) if folder.is_dir() else []
    return [folder / entry for entry in entries if is_name_in_run(entry)]


def is_name_in_run(name: str) -> bool:
    """Return whether a file of a run has this name."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in FILES)


def refuse_existing(folder: Path) -> None:
    """Raise BadInput if a folder holds a run, is a file or cannot be written, so that no file is ever overwritten.

    The check makes the folder and removes it again, so only one process may call this function at a time.
    """
    refuse_run(folder)
    check_folder(folder, "out")


def refuse_run(folder: Path) -> None:
    """Raise BadInput if a folder holds a run or is a file."""
    if folder.exists() and not folder.is_dir():
        raise BadInput(f"out must be a folder, got the file {folder}")
    present = [path.name for path in files_of_run(folder)]
    if present:
        raise BadInput(f"out must be a folder without a run (or say --resume), got {folder} with {', '.join(present)}")


def remove_torn_files(folder: Path) -> None:
    """Remove the temporary files of a process that was killed while it wrote; files with final names are complete."""
    # `write_atomic` writes a file NAME as .NAME.PROCESS.tmp before it renames the file.
    for name in FILES:
        for torn in folder.glob(f".{name}.*.tmp"):
            torn.unlink()


def remove_unused_estimates(run: Run, num_processes: int) -> None:
    """Remove the files of inner estimates that the processes of a resumed run do not use.

    The run may have had more processes or another home of its estimates before. The checkpoint holds all estimates.
    """
    used = range(num_processes if run.config.estimator == "file" else 0)
    keep = {run.estimator_file_of(rank) for rank in used}
    for file in (run.estimator_file, *run.folder.glob("estimator-*.bin")):
        if file not in keep:
            file.unlink(missing_ok=True)


def open_run(folder: str | Path) -> Run:
    """Read the description of a run.

    Raises
    ------
    BadInput
        If the folder holds no run, or if config.json is damaged or comes from another program or version.
    """
    folder = Path(folder)
    file = folder / "config.json"
    if not file.is_file():
        raise BadInput(f"{folder} must be the folder of a run, got no config.json there")
    # A pipe or a device in place of another file of the run could be read for ever.
    for path in files_of_run(folder):
        if not path.is_file():
            raise BadInput(f"{path} must be a plain file, got a folder, a pipe, a device or a broken link")
    document = read_json(file, "the description of a run")
    if not isinstance(document, Mapping) or document.get("format") != FORMAT:
        raise BadInput(f"{file} must describe a drrho run, got another program's file")
    if document.get("version") != VERSION:
        raise BadInput(f"{file} must have version {VERSION}, got {document.get('version')!r}")
    # The classes raise BadInput for bad values, and the exceptions below if an entry is missing or has a wrong type.
    try:
        run = Run(
            folder=folder,
            config=TrainConfig.from_json(document["config"]),
            spec=ModelSpec.from_json(document["model"]),
            tokenizer=_tokenizer_of(document["tokenizer"]),
            fingerprint=document["data_fingerprint"],
            # Version 0.1 had no such entries.
            held_out=document.get("held_out_fingerprints", {}),
            places=document.get("places", {}),
            earlier_ends=tuple(document.get("earlier_ends", ())),
        )
    except BadInput as error:
        raise BadInput(f"{file}: {error}") from None
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
        raise BadInput(f"{file} must describe a drrho run, got a damaged description ({error!r})") from None
    _check_parts(run, file)
    return run


def _tokenizer_of(document: object) -> Tokenizer:
    """Return the tokenizer that config.json holds: that of a Hugging Face model, or one of whole words."""
    if HuggingFaceTokenizer.wrote(document):
        return HuggingFaceTokenizer.from_json(document)
    return WordTokenizer.from_json(document)


def _check_parts(run: Run, file: Path) -> None:
    """Raise BadInput unless the parts of config.json fit together; each may be valid but belong to another run."""
    # The encoders repeat sizes of the settings and of the tokenizer.
    sizes = ("architecture", "image_size", "feature_dim", "width", "depth")
    expected: dict[str, Any] = {"context_length": run.tokenizer.context_length}
    # A Hugging Face model has sizes of its own, and its vocabulary may have more tokens than its tokenizer.
    if run.spec.stored_features is not None:
        expected = {name: getattr(run.config, name) for name in ("feature_dim", "width", "depth")}
    elif run.spec.hf_config is None:
        expected |= {name: getattr(run.config, name) for name in sizes}
        expected["vocabulary_size"] = run.tokenizer.vocabulary_size
    for name, value in expected.items():
        if getattr(run.spec, name) != value:
            raise BadInput(f"{file}: {name} of the model must be {brief(value)}, got {brief(getattr(run.spec, name))}")
    if not isinstance(run.fingerprint, str):
        raise BadInput(f"{file}: data_fingerprint must be a text, got {brief(run.fingerprint)}")
    held_out, places = run.held_out, run.places
    if not _are_texts(held_out) or not held_out.keys() <= {"validation", "test"}:
        raise BadInput(f"{file}: held_out_fingerprints must be texts for validation and test, got {brief(held_out)}")
    for name, place in places.items() if isinstance(places, Mapping) else [("data", places)]:
        if not _are_texts(place) or place.keys() != {"path", "from_run"}:
            raise BadInput(f"{file}: the place of {brief(name)} must have path and from_run, got {brief(place)}")
    ends = [0, *run.earlier_ends, run.config.epochs]
    if not all(isinstance(end, int) and not isinstance(end, bool) for end in ends) or any(
        a >= b for a, b in itertools.pairwise(ends)
    ):
        raise BadInput(f"{file}: earlier_ends must be rising numbers below epochs, got {brief(run.earlier_ends)}")


def _are_texts(entry: object) -> TypeGuard[Mapping[str, str]]:
    return isinstance(entry, Mapping) and all(isinstance(value, str) for value in entry.values())


def part(arrays: Mapping[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    """Return the arrays whose names begin with ``prefix/``; the names in the result lack ``prefix/``."""
    start = prefix + "/"
    return {name.removeprefix(start): array for name, array in arrays.items() if name.startswith(start)}


def save_reference_features(path: Path, image: np.ndarray, text: np.ndarray, identity: Mapping[str, str]) -> None:
    """Write the reference model's features of a training set, with `identity`, the fingerprint of that training set."""
    save_arrays(path, "reference-features", {"image": image, "text": text}, dict(identity))


def load_reference_features(path: Path, identity: Mapping[str, str]) -> tuple[np.ndarray, np.ndarray]:
    """Read the file that `save_reference_features` wrote.

    Raises
    ------
    BadInput
        If the file is damaged or belongs to other data.
    """
    arrays, state = load_arrays(path, "reference-features")
    # Training with the features of other pairs would give a wrong model without any error.
    for name, expected in identity.items():
        if state.get(name) != expected:
            raise BadInput(f"{path} must be made from this run's {name} ({expected}), got {state.get(name)}")
    return arrays["image"], arrays["text"]


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the records of metrics.jsonl; if a crash cut the last line short, that line is left out.

    Raises
    ------
    BadInput
        If the file is no plain file, or if another line is damaged.
    """
    if not path.exists():
        return []
    # A pipe could be read for ever.
    if not path.is_file():
        raise BadInput(f"{path} must be a log of JSON lines, got no plain file")
    records: list[dict[str, Any]] = []
    with naming(path):
        # The text is split at line feeds only, because JSON texts may hold other separators of lines.
        lines = path.read_text(encoding="utf-8", errors="replace").rstrip("\n").split("\n")
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            records.append(record)
        elif number < len(lines):
            raise BadInput(
                f"{path} must have a JSON object with a step on each line, got something else on line {number}"
            )
    return records
