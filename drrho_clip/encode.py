"""A trained pair of encoders, which turns images and captions into features as NumPy arrays."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from drrho_clip.data import BatchSource, Dataset, HostBatch, Tokenizer, WordTokenizer, normalise, to_channels
from drrho_clip.data.hf_preprocessing import ImageProcessor
from drrho_clip.data.protocol import ImageReading
from drrho_clip.data.row_source import RowSource
from drrho_clip.encoders.protocol import EncoderInBatches, identity_of, joined
from drrho_clip.errors import BadInput
from drrho_clip.exchange.hf_directory import open_hf_directory, read_constant, read_weights
from drrho_clip.features.stored import StoredInputs
from drrho_clip.files.checkpoint import digest
from drrho_clip.models import ModelSpec
from drrho_clip.run import Run
from drrho_clip.run.temperature_figures import temperature_of
from drrho_core.backend import Backend, Model, Parameters


def build_model(backend: Backend, spec: ModelSpec) -> Model:
    """Build the encoders of a run.

    Raises
    ------
    BadInput
        If the backend does not have the architecture of `spec`.
    """
    try:
        return backend.model(spec)
    except ValueError as error:
        raise BadInput(str(error)) from error


def model_inputs(
    batch: HostBatch, spec: ModelSpec, tokenizer: Tokenizer, reading: ImageReading | str = "crop"
) -> tuple[np.ndarray, np.ndarray]:
    """Return the inputs of the encoders: images as numbers, and tokens or bags of words."""
    return image_numbers(batch.images, reading), _text_inputs(batch.tokens, spec, tokenizer)


def image_numbers(images: np.ndarray, reading: ImageReading | str) -> np.ndarray:
    """Return bytes as the numbers that an encoder reads: in [-1, 1], or as the model's own settings say."""
    return normalise(images) if isinstance(reading, str) else reading.normalise(images)


def _text_inputs(tokens: np.ndarray, spec: ModelSpec, tokenizer: Tokenizer) -> np.ndarray:
    # The perceptrons of a run always have the tokenizer of whole words.
    if spec.text_input == "bag_of_words" and isinstance(tokenizer, WordTokenizer):
        return tokenizer.bag_of_words(tokens)
    return tokens


class Encoder(EncoderInBatches):
    """A trained pair of encoders on a backend, for evaluation and for reference features.

    Parameters
    ----------
    backend : Backend
        The library that runs the encoders.
    model : Model
        The encoders.
    parameters : mapping
        The parameters, on the backend.
    spec : ModelSpec
        The sizes of the encoders.
    tokenizer : Tokenizer
        The tokenizer with the vocabulary of the text encoder.
    resize_mode : {"crop", "fit"} or ImageReading
        How the images of data sets become square, and perhaps numbers; see `resize`.
    name : str
        Name of the model, for messages: the folder of the run.
    temperature : float
        Temperature with which the encoders were trained.
    """

    def __init__(
        self,
        backend: Backend,
        model: Model,
        parameters: Parameters,
        spec: ModelSpec,
        tokenizer: Tokenizer,
        *,
        resize_mode: ImageReading | str = "crop",
        name: str = "model",
        temperature: float = 0.07,
    ) -> None:
        self._backend, self._parameters = backend, parameters
        self._spec, self._tokenizer = spec, tokenizer
        self.name, self.temperature = name, temperature
        self.resize_mode = resize_mode
        # Heads over stored features cannot encode a pair that is not in the cache.
        self.reads_new_pairs = not isinstance(resize_mode, StoredInputs)
        # The compiled functions take the parameters as an argument, so `use` needs no new compilation.
        self._encode_images = backend.compile(model.encode_images)
        self._encode_texts = backend.compile(model.encode_texts)

    @classmethod
    def load(cls, run: Run, backend: Backend, *, state: str = "best") -> Encoder:
        """Build the encoder from a state of a run: "best", "last" or "reference"; see `Run.load_parameters`."""
        parameters = {name: backend.asarray(array) for name, array in run.load_parameters(state).items()}
        model = build_model(backend, run.spec)
        return cls(
            backend,
            model,
            parameters,
            run.spec,
            run.tokenizer,
            resize_mode=run.image_reading,
            name=str(run.folder),
            temperature=temperature_of(run, state),
        )

    @classmethod
    def load_hf(cls, folder: str | Path, backend: Backend) -> Encoder:
        """Build the encoder from a CLIP or SigLIP directory of Hugging Face; it has the rows of `transformers`.

        Raises
        ------
        BadInput
            If the directory cannot be used, or the backend does not have this architecture.
        """
        directory = open_hf_directory(folder)
        spec, tokenizer = directory.spec, directory.tokenizer
        model = build_model(backend, spec)
        parameters = {name: backend.asarray(array) for name, array in read_weights(folder, spec).items()}
        # The model multiplies cosines by exp(logit_scale), which is one divided by the temperature.
        logit_scale = read_constant(folder, "logit_scale")
        if logit_scale is None:
            raise BadInput(f"{folder} must hold the weight logit_scale, which gives the temperature, got none")
        # The directory says how the model reads images, so the setting `resize` of a run plays no part.
        reading = ImageProcessor.read(folder)
        return cls(
            backend,
            model,
            parameters,
            spec,
            tokenizer,
            resize_mode=reading,
            name=f"hf:{folder}",
            temperature=math.exp(-logit_scale),
        )

    @property
    def image_size(self) -> int:
        """Side of the images that the encoder reads."""
        return self._spec.image_size

    @property
    def feature_dims(self) -> tuple[int, int]:
        """Sizes of the features of an image and of a caption."""
        return self._spec.feature_dim, self._spec.feature_dim

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer, which decides which captions the text encoder can distinguish."""
        return self._tokenizer

    def use(self, parameters: Parameters) -> None:
        """Replace the parameters by other parameters of the same encoders."""
        self._parameters = parameters

    def identity(self) -> dict[str, Any]:
        """Return the identity of the model; see `drrho_clip.encoders.protocol.identity_of`."""
        # A model without settings of its own reads images in [-1, 1]; heads read the features of another model.
        preprocessing = (
            self._spec.image_processor
            or self._spec.stored_features
            or {
                "resize": str(self.resize_mode),
                "size": self.image_size,
                "channels": self._spec.channels,
            }
        )
        return identity_of(
            name=self.name,
            temperature=self.temperature,
            weights=digest({name: self._backend.to_numpy(array) for name, array in self._parameters.items()}),
            configuration=self._configuration(),
            preprocessing=preprocessing,
            tokenizer=self._tokenizer.to_json(),
        )

    def _configuration(self) -> dict[str, Any]:
        """Return what the shapes of the parameters do not tell, such as activations and attention heads."""
        about: dict[str, Any] = {"architecture": self._spec.architecture, "heads": self._spec.heads}
        if self._spec.hf_config is not None:
            sizes = self._spec.hf_sizes
            # Initial values play no part in a trained model.
            about["sizes"] = {
                **sizes._replace(factor=1.0)._asdict(),
                "image": sizes.image._replace(spread=1.0)._asdict(),
                "text": sizes.text._replace(spread=1.0)._asdict(),
            }
        return about

    def batches_of(
        self, dataset: Dataset, *, first_row: int = 0, batch_size: int = 256, rows: np.ndarray | None = None
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield image features and text features of the pairs from `first_row` on, or of `rows` in their order."""
        rows = np.arange(first_row, len(dataset), dtype=np.int64) if rows is None else rows
        yield from map(self._features, self._source(dataset).in_order(batch_size, rows=rows))

    def batches(
        self, stream: Iterable[HostBatch], *, after_batch: Callable[[], None] | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the features of the pairs of some batches, which must have this model's image size and tokens."""
        return joined(map(self._features, stream), after_batch=after_batch)

    def _features(self, batch: HostBatch) -> tuple[np.ndarray, np.ndarray]:
        images, texts = model_inputs(batch, self._spec, self._tokenizer, self.resize_mode)
        return self._run(self._encode_images, images), self._run(self._encode_texts, texts)

    def images_of(
        self,
        dataset: Dataset,
        rows: np.ndarray,
        *,
        batch_size: int = 256,
        after_batch: Callable[[], None] | None = None,
    ) -> np.ndarray:
        """Return image features (m, d) of m rows of a data set; `after_batch` is called after each batch."""
        source = self._source(dataset)
        features = []
        for batch in source.in_order(batch_size, rows=rows):
            features.append(self._run(self._encode_images, image_numbers(batch.images, self.resize_mode)))
            if after_batch is not None:
                after_batch()
        return np.concatenate(features)

    def _source(self, dataset: Dataset) -> BatchSource | RowSource:
        """Return the pairs of a data set as this model reads them: with its image size and its vocabulary."""
        if isinstance(self.resize_mode, StoredInputs):
            return self.resize_mode.source(dataset)
        return BatchSource(
            dataset,
            self._tokenizer,
            image_size=self._spec.image_size,
            resize_mode=self.resize_mode,
            channels=self._spec.channels,
            cache_bytes=0,  # every pair is read once, so no decoded image is kept
        )

    def images(self, images: np.ndarray, *, batch_size: int = 256) -> np.ndarray:
        """Return features (n, d) of uint8 images (n, s, s, C); s must be `image_size`."""
        if isinstance(self.resize_mode, StoredInputs):
            self.resize_mode.square(images)
        images = to_channels(images, self._spec.channels)
        parts = [images[start : start + batch_size] for start in range(0, len(images), batch_size)]
        numbers = (image_numbers(part, self.resize_mode) for part in parts)
        return np.concatenate([self._run(self._encode_images, part) for part in numbers])

    def texts(self, captions: Sequence[str], *, batch_size: int = 256) -> np.ndarray:
        """Return features (n, d) of captions."""
        places = [slice(start, start + batch_size) for start in range(0, len(captions), batch_size)]
        if isinstance(self.resize_mode, StoredInputs):
            # A search sorts the whole cache, so all captions are looked up together.
            stored = self.resize_mode.texts(captions)
            return np.concatenate([self._run(self._encode_texts, stored[place]) for place in places])
        return np.concatenate([self._run(self._encode_texts, self._inputs_of(captions[place])) for place in places])

    def _inputs_of(self, captions: Sequence[str]) -> np.ndarray:
        """Return what the text encoder reads; of many captions this takes much memory, so it is made for a batch."""
        return _text_inputs(self._tokenizer.encode(captions), self._spec, self._tokenizer)

    def _run(self, encode: Any, inputs: np.ndarray) -> np.ndarray:
        features: np.ndarray = self._backend.to_numpy(encode(self._parameters, self._backend.asarray(inputs)))
        return features
