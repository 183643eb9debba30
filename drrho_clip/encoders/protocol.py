"""The interface of a model that can serve as a reference, can be measured, and can search."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from drrho_clip.data import Dataset, Tokenizer
from drrho_clip.data.protocol import ImageReading

__all__ = ["EncoderInBatches", "PairEncoder", "identity_of", "joined"]

Floats = npt.NDArray[np.floating[Any]]


class PairEncoder(Protocol):
    """A model with an encoder of images and an encoder of captions. Features are NumPy arrays with rows of norm 1."""

    @property
    def name(self) -> str:
        """The model as the user names it, for messages and tables."""
        ...

    @property
    def image_size(self) -> int:
        """Side of the square images that the model reads, in pixels."""
        ...

    @property
    def resize_mode(self) -> ImageReading | str:
        """The way in which images become square, and perhaps numbers; see `drrho_clip.data.resize`."""
        ...

    @property
    def feature_dims(self) -> tuple[int, int]:
        """Sizes of the features of an image and of a caption."""
        ...

    @property
    def temperature(self) -> float:
        """Temperature > 0 with which the model was trained."""
        ...

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer, which decides which captions the model can distinguish."""
        ...

    @property
    def reads_new_pairs(self) -> bool:
        """True if the model can encode any image and text; False if it has the features of certain pairs only."""
        ...

    def identity(self) -> dict[str, Any]:
        """Return the identity of the model, as `identity_of` makes it."""
        ...

    def batches_of(
        self, dataset: Dataset, *, first_row: int = 0, batch_size: int = 256, rows: np.ndarray | None = None
    ) -> Iterator[tuple[Floats, Floats]]:
        """Yield image features and text features of the pairs from `first_row` on, or of `rows` in their order."""
        ...

    def pairs(
        self, dataset: Dataset, *, batch_size: int = 256, after_batch: Callable[[], None] | None = None
    ) -> tuple[Floats, Floats]:
        """Return the features of all pairs, (n, d) and (n, e); `after_batch` is called after each batch."""
        ...

    def images_of(
        self,
        dataset: Dataset,
        rows: np.ndarray,
        *,
        batch_size: int = 256,
        after_batch: Callable[[], None] | None = None,
    ) -> Floats:
        """Return image features (m, d) of m rows of a data set."""
        ...

    def images(self, images: np.ndarray, *, batch_size: int = 256) -> Floats:
        """Return features (n, d) of uint8 images (n, s, s, C) of side `image_size`."""
        ...

    def texts(self, captions: Sequence[str], *, batch_size: int = 256) -> Floats:
        """Return features (n, e) of captions."""
        ...


class EncoderInBatches(ABC):
    """A base class of encoders: the features of all pairs are those of the batches."""

    @abstractmethod
    def batches_of(
        self, dataset: Dataset, *, first_row: int = 0, batch_size: int = 256, rows: np.ndarray | None = None
    ) -> Iterator[tuple[Floats, Floats]]:
        """Yield the features of the pairs batch by batch; see `PairEncoder.batches_of`."""

    def pairs(
        self, dataset: Dataset, *, batch_size: int = 256, after_batch: Callable[[], None] | None = None
    ) -> tuple[Floats, Floats]:
        """Return the features of all pairs, (n, d) and (n, e), in row order; see `PairEncoder.pairs`."""
        return joined(self.batches_of(dataset, batch_size=batch_size), after_batch=after_batch)


def identity_of(
    *, name: str, temperature: float, weights: str, configuration: object, preprocessing: object, tokenizer: object
) -> dict[str, Any]:
    """Return the identity of a model, which the manifest of a cache records.

    Parameters
    ----------
    name : str
        The model as the user names it, for the reader; a folder may move, so the name does not count.
    temperature : float
        Temperature of the model.
    weights : str
        SHA-256 of the parameters, in hex.
    configuration, preprocessing, tokenizer : object
        Descriptions that JSON can hold; their SHA-256 becomes a part of the identity.

    Examples
    --------
    >>> made = identity_of(name="a", temperature=0.1, weights="0", configuration={}, preprocessing=[8], tokenizer={})
    >>> sorted(made)
    ['configuration', 'name', 'preprocessing', 'temperature', 'tokenizer', 'weights']
    """
    hashes = {
        part: hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
        for part, value in (
            ("configuration", configuration),
            ("preprocessing", preprocessing),
            ("tokenizer", tokenizer),
        )
    }
    return {"name": name, "temperature": float(temperature), "weights": weights, **hashes}


def joined(
    batches: Iterator[tuple[Floats, Floats]], *, after_batch: Callable[[], None] | None = None
) -> tuple[Floats, Floats]:
    """Return the features of all batches in two arrays."""
    image_features, text_features = [], []
    for image, text in batches:
        image_features.append(image)
        text_features.append(text)
        if after_batch is not None:
            after_batch()
    return np.concatenate(image_features), np.concatenate(text_features)
