"""A run's folder: which files it holds, how it is opened, and the trained model inside.

config.json                       settings, encoders, tokenizer, fingerprint of the data
checkpoint.safetensors            parameters, optimiser, estimator and progress, replaced atomically
reference_features.safetensors    features of the reference model for every training pair (drrho only)
metrics.jsonl                     one JSON object per line
results.json                      written at the end
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from drrho_clip.architecture import ModelSpec, parameter_shapes
from drrho_clip.checkpoint import load_arrays, save_arrays, write_atomic
from drrho_clip.config import TrainConfig
from drrho_clip.data import BatchSource, Dataset, HostBatch, WordTokenizer, normalise, to_channels
from drrho_clip.errors import BadInput
from drrho_core.backend import Backend, Model, Parameters

FORMAT = "drrho-run"
VERSION = 1
FILES = ("config.json", "checkpoint.safetensors", "reference_features.safetensors", "metrics.jsonl", "results.json")


@dataclass(frozen=True)
class Run:
    """A run's folder and its description.

    Attributes
    ----------
    folder : Path
        Where it is.
    config : TrainConfig
        Its settings.
    spec : ModelSpec
        Its encoders.
    tokenizer : WordTokenizer
        Its words.
    fingerprint : str
        Names the content of its training data.
    """

    folder: Path
    config: TrainConfig
    spec: ModelSpec
    tokenizer: WordTokenizer
    fingerprint: str

    @property
    def checkpoint(self) -> Path:
        """Where parameters, optimiser and estimator are."""
        return self.folder / "checkpoint.safetensors"

    @property
    def reference_features(self) -> Path:
        """Features of the reference model for every training pair."""
        return self.folder / "reference_features.safetensors"

    @property
    def metrics(self) -> Path:
        """One JSON object per line."""
        return self.folder / "metrics.jsonl"

    @property
    def results(self) -> Path:
        """The figures of the finished run."""
        return self.folder / "results.json"

    def write(self) -> None:
        """Write config.json into a folder that holds no run yet."""
        self.folder.mkdir(parents=True, exist_ok=True)
        document = {
            "format": FORMAT,
            "version": VERSION,
            "config": self.config.to_json(),
            "model": self.spec.to_json(),
            "tokenizer": self.tokenizer.to_json(),
            "data_fingerprint": self.fingerprint,
        }
        write_atomic(self.folder / "config.json", (json.dumps(document, indent=1, ensure_ascii=False) + "\n").encode())

    def load_parameters(self) -> dict[str, np.ndarray]:
        """Return the parameters of the checkpoint.

        Raises
        ------
        BadInput
            If there is no checkpoint, it is damaged, or its parameters are not those of `spec`.
        """
        arrays, _ = load_arrays(self.checkpoint, "checkpoint")
        parameters = part(arrays, "parameters")
        shapes = {name: array.shape for name, array in parameters.items()}
        if shapes != parameter_shapes(self.spec):
            raise BadInput(f"{self.checkpoint} must hold the parameters of its config.json, got others")
        return parameters


def refuse_existing(folder: Path) -> None:
    """Raise BadInput where a folder holds a run (or is a file): nothing is ever overwritten."""
    if folder.exists() and not folder.is_dir():
        raise BadInput(f"out must be a folder, got the file {folder}")
    present = [name for name in FILES if (folder / name).exists()]
    if present:
        raise BadInput(f"out must be a folder without a run (or say --resume), got {folder} with {', '.join(present)}")


def remove_torn_files(folder: Path) -> None:
    """Remove what a kill in the middle of a write left; the file that it was to replace is whole."""
    for name in FILES:
        for torn in folder.glob(f".{name}.*.tmp"):
            torn.unlink()


def open_run(folder: str | Path) -> Run:
    """Read a run's description.

    Raises
    ------
    BadInput
        If the folder holds no run, or one of another program or version.
    """
    folder = Path(folder)
    file = folder / "config.json"
    if not file.is_file():
        raise BadInput(f"{folder} must be the folder of a run, got no config.json there")
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadInput(f"{file} must be JSON, got: {error}") from None
    if not isinstance(document, Mapping) or document.get("format") != FORMAT:
        raise BadInput(f"{file} must describe a drrho run, got another program's file")
    if document.get("version") != VERSION:
        raise BadInput(f"{file} must have version {VERSION}, got {document.get('version')!r}")
    try:
        return Run(
            folder=folder,
            config=TrainConfig.from_json(document["config"]),
            spec=ModelSpec.from_json(document["model"]),
            tokenizer=WordTokenizer.from_json(document["tokenizer"]),
            fingerprint=str(document["data_fingerprint"]),
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise BadInput(f"{file} must describe a drrho run, got a damaged one ({error!r})") from None


def part(arrays: Mapping[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    """Return the arrays under ``prefix/`` by the rest of their name."""
    start = prefix + "/"
    return {name.removeprefix(start): array for name, array in arrays.items() if name.startswith(start)}


def model_inputs(batch: HostBatch, spec: ModelSpec, tokenizer: WordTokenizer) -> tuple[np.ndarray, np.ndarray]:
    """Return what the encoders read: images in [-1, 1], and tokens or a bag of words."""
    texts = tokenizer.bag_of_words(batch.tokens) if spec.text_input == "bag_of_words" else batch.tokens
    return normalise(batch.images), texts


class Encoder:
    """A trained pair of encoders on a backend, for evaluation and for reference features.

    Parameters
    ----------
    backend : Backend
        What runs it.
    model : Model
        The encoders.
    parameters : mapping
        Their parameters, on the backend.
    spec : ModelSpec
    tokenizer : WordTokenizer
    """

    def __init__(
        self, backend: Backend, model: Model, parameters: Parameters, spec: ModelSpec, tokenizer: WordTokenizer
    ) -> None:
        self._backend, self._parameters = backend, parameters
        self._spec, self._tokenizer = spec, tokenizer
        self._encode_images = backend.compile(model.encode_images)
        self._encode_texts = backend.compile(model.encode_texts)

    @classmethod
    def load(cls, run: Run, backend: Backend) -> Encoder:
        """Build the encoder of a run's checkpoint."""
        parameters = {name: backend.asarray(array) for name, array in run.load_parameters().items()}
        return cls(backend, build_model(backend, run.spec), parameters, run.spec, run.tokenizer)

    @property
    def image_size(self) -> int:
        """Side of the images that it reads."""
        return self._spec.image_size

    def use(self, parameters: Parameters) -> None:
        """Take other parameters of the same encoders."""
        self._parameters = parameters

    def pairs(self, dataset: Dataset, *, batch_size: int = 256) -> tuple[np.ndarray, np.ndarray]:
        """Return image and text features (n, d) of a data set, in row order, at this model's own resolution."""
        source = BatchSource(
            dataset, self._tokenizer, image_size=self._spec.image_size, channels=self._spec.channels, cache_bytes=0
        )
        images, texts = [], []
        for batch in source.in_order(batch_size):
            image_input, text_input = model_inputs(batch, self._spec, self._tokenizer)
            images.append(self._run(self._encode_images, image_input))
            texts.append(self._run(self._encode_texts, text_input))
        return np.concatenate(images), np.concatenate(texts)

    def images(self, images: np.ndarray, *, batch_size: int = 256) -> np.ndarray:
        """Return features (n, d) of uint8 images (n, s, s, C) of this model's size."""
        images = to_channels(images, self._spec.channels)
        parts = [normalise(images[start : start + batch_size]) for start in range(0, len(images), batch_size)]
        return np.concatenate([self._run(self._encode_images, one) for one in parts])

    def texts(self, captions: list[str] | tuple[str, ...], *, batch_size: int = 256) -> np.ndarray:
        """Return features (n, d) of captions."""
        tokens = self._tokenizer.encode(captions)
        inputs = self._tokenizer.bag_of_words(tokens) if self._spec.text_input == "bag_of_words" else tokens
        parts = [inputs[start : start + batch_size] for start in range(0, len(inputs), batch_size)]
        return np.concatenate([self._run(self._encode_texts, one) for one in parts])

    def _run(self, encode: Any, inputs: np.ndarray) -> np.ndarray:
        features: np.ndarray = self._backend.to_numpy(encode(self._parameters, self._backend.asarray(inputs)))
        return features


def build_model(backend: Backend, spec: ModelSpec) -> Model:
    """Build the encoders of a run.

    Raises
    ------
    BadInput
        If the backend has no such encoders.
    """
    try:
        return backend.model(spec)
    except ValueError as error:
        raise BadInput(str(error)) from error


def save_reference_features(path: Path, image: np.ndarray, text: np.ndarray, identity: Mapping[str, str]) -> None:
    """Keep the reference model's features of a training set, with what they were made from."""
    save_arrays(path, "reference-features", {"image": image, "text": text}, dict(identity))


def load_reference_features(path: Path, identity: Mapping[str, str]) -> tuple[np.ndarray, np.ndarray]:
    """Return kept reference features.

    Raises
    ------
    BadInput
        If the file is damaged or was made from other data.
    """
    arrays, state = load_arrays(path, "reference-features")
    for name, expected in identity.items():
        if state.get(name) != expected:
            raise BadInput(f"{path} must be made from this run's {name} ({expected}), got {state.get(name)}")
    return arrays["image"], arrays["text"]
