"""Features that another program has computed, as a model: for caches of features from anywhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

import numpy as np

from drrho_clip.data import Dataset, WordTokenizer
from drrho_clip.encoders.protocol import EncoderInBatches, Floats, identity_of
from drrho_clip.errors import BadInput
from drrho_clip.files.checkpoint import digest

__all__ = ["FixedFeatures"]


class FixedFeatures(EncoderInBatches):
    """A model that returns given features, in the order of the rows of one data set.

    `drrho_clip.features.encode_pairs` writes them into a cache, which ``drrho train --reference CACHE`` reads.

    Parameters
    ----------
    name : str
        A name for the manifest of the cache.
    image, text : ndarray, shapes (n, d) and (n, e)
        Features of the n pairs; the rows are divided by their norms.
    temperature : float
        Temperature of the model, > 0.

    Raises
    ------
    BadInput
        If the features are not two matrices with as many rows, or the temperature is not above 0.

    Examples
    --------
    >>> FixedFeatures("example", np.ones((3, 4)), np.ones((3, 4))).feature_dims
    (4, 4)
    """

    image_size = 224
    resize_mode = "crop"
    reads_new_pairs = False

    def __init__(self, name: str, image: Floats, text: Floats, *, temperature: float = 0.07) -> None:
        if image.ndim != 2 or text.ndim != 2 or len(image) != len(text):
            raise BadInput(f"image and text must be matrices with as many rows, got {image.shape} and {text.shape}")
        if not 0 < temperature < float("inf"):
            raise BadInput(f"temperature must be > 0, got {temperature}")
        self.name, self.temperature = name, temperature
        # A row of zeros stays a row of zeros.
        self._image, self._text = (
            side / np.maximum(np.linalg.norm(side, axis=1, keepdims=True), np.finfo(side.dtype).tiny)
            for side in (image, text)
        )

    @property
    def tokenizer(self) -> WordTokenizer:
        """A tokenizer without words, because the features are those of whole captions."""
        return WordTokenizer([], 1)

    @property
    def feature_dims(self) -> tuple[int, int]:
        """Sizes of the features of an image and of a caption."""
        return self._image.shape[1], self._text.shape[1]

    def identity(self) -> dict[str, Any]:
        """Return name, temperature and the SHA-256 of the features."""
        weights = digest({"image": self._image, "text": self._text})
        values: dict[str, Any] = {"weights": weights, "configuration": None, "preprocessing": None, "tokenizer": None}
        return identity_of(name=self.name, temperature=self.temperature, **values)

    def batches_of(
        self, dataset: Dataset, *, first_row: int = 0, batch_size: int = 256, rows: np.ndarray | None = None
    ) -> Iterator[tuple[Floats, Floats]]:
        """Yield the features from `first_row` on or of `rows`; the data set must have a pair per row of features."""
        # Features that are shifted by a row would go unnoticed, so at least the numbers of rows must agree.
        if len(dataset) != len(self._image):
            raise BadInput(f"features must have one row per pair ({len(dataset)}), got {len(self._image)}")
        places = np.arange(first_row, len(dataset)) if rows is None else rows
        for start in range(0, len(places), batch_size):
            part = places[start : start + batch_size]
            yield self._image[part], self._text[part]

    def images_of(
        self,
        dataset: Dataset,
        rows: np.ndarray,
        *,
        batch_size: int = 256,
        after_batch: Callable[[], None] | None = None,
    ) -> Floats:
        """Return the image features of some rows."""
        features, _ = self.pairs(dataset, batch_size=batch_size, after_batch=after_batch)
        chosen: Floats = features[rows]
        return chosen

    def images(self, images: np.ndarray, *, batch_size: int = 256) -> NoReturn:  # noqa: ARG002 (contract)
        """Raise BadInput: only the given pairs have features."""
        raise BadInput(f"{self.name} must encode the pairs of its data only, got {len(images)} other images")

    def texts(self, captions: Sequence[str], *, batch_size: int = 256) -> NoReturn:  # noqa: ARG002 (contract)
        """Raise BadInput: only the given pairs have features."""
        raise BadInput(f"{self.name} must encode the pairs of its data only, got {len(captions)} other texts")
