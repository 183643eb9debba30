"""A model of another program: images and captions pass the preprocessing and the tokenizer of that model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from drrho_clip.data import Dataset, Tokenizer, UnreadableImage, captions_of
from drrho_clip.data.protocol import UInt8
from drrho_clip.data.unreadable import UnreadableRows
from drrho_clip.encoders.protocol import EncoderInBatches, Floats, identity_of

__all__ = ["ForeignEncoder"]

_THREADS = 2


@dataclass(frozen=True)
class ForeignEncoder(EncoderInBatches):
    """A model of another program on a backend.

    Parameters
    ----------
    name : str
        The model as the user names it, such as "open_clip:NAME".
    encode_images : callable
        Maps the stacked results of `read_image`, (b, ...), to features (b, d); norms are free.
    encode_texts : callable
        Maps tokens (b, L) to features (b, e); norms are free.
    read_image : callable
        Maps a decoded image, uint8 of shape (H, W, C), to the array that the model reads. It is called in threads.
    tokenizer : Tokenizer
        The tokenizer.
    image_size : int
        Side of the images that the model reads, in pixels.
    feature_dims : tuple of int
        Sizes d and e of the features.
    temperature : float
        Temperature of the model.
    weights : str
        SHA-256 of the parameters, in hex.
    preprocessing : mapping
        Description of `read_image` and of the tokenizer ("image" and "text"), which JSON can hold.
    configuration : object
        Description of the parts of the model that are no parameters, such as activations, which JSON can hold.
    """

    name: str
    encode_images: Callable[[np.ndarray], np.ndarray]
    encode_texts: Callable[[np.ndarray], np.ndarray]
    read_image: Callable[[UInt8], np.ndarray]
    tokenizer: Tokenizer
    image_size: int
    feature_dims: tuple[int, int]
    temperature: float
    weights: str
    preprocessing: Mapping[str, Any]
    configuration: object = None

    reads_new_pairs = True
    resize_mode = "crop"

    def identity(self) -> dict[str, Any]:
        """Return the identity of the model."""
        return identity_of(
            name=self.name,
            temperature=self.temperature,
            weights=self.weights,
            configuration=self.configuration,
            preprocessing=self.preprocessing["image"],
            tokenizer=self.preprocessing["text"],
        )

    def batches_of(
        self, dataset: Dataset, *, first_row: int = 0, batch_size: int = 256, rows: np.ndarray | None = None
    ) -> Iterator[tuple[Floats, Floats]]:
        """Yield image features and text features of the pairs from `first_row` on, or of `rows` in their order."""
        # Captions are encoded batch by batch, because a data set on disk need not hold all of them in memory.
        captions = captions_of(dataset)
        every = range(first_row, len(dataset)) if rows is None else rows.tolist()
        parts = (every[start : start + batch_size] for start in range(0, len(every), batch_size))
        for part, images in zip(parts, self._image_batches(dataset, every, batch_size), strict=True):
            yield images, self.texts([captions[row] for row in part], batch_size=batch_size)

    def images_of(
        self,
        dataset: Dataset,
        rows: np.ndarray,
        *,
        batch_size: int = 256,
        after_batch: Callable[[], None] | None = None,
    ) -> Floats:
        """Return image features (m, d) of m rows of a data set."""
        parts = []
        for part in self._image_batches(dataset, rows.tolist(), batch_size):
            parts.append(part)
            if after_batch is not None:
                after_batch()
        return np.concatenate(parts)

    def images(self, images: np.ndarray, *, batch_size: int = 256) -> Floats:
        """Return features (n, d) of uint8 images (n, s, s, C)."""
        parts = [images[start : start + batch_size] for start in range(0, len(images), batch_size)]
        return np.concatenate([_unit(self.encode_images(np.stack([*map(self.read_image, part)]))) for part in parts])

    def texts(self, captions: Sequence[str], *, batch_size: int = 256) -> Floats:
        """Return features (n, e) of captions."""
        parts = [captions[start : start + batch_size] for start in range(0, len(captions), batch_size)]
        return np.concatenate([_unit(self.encode_texts(self.tokenizer.encode(part))) for part in parts])

    def _image_batches(self, dataset: Dataset, rows: Sequence[int], batch_size: int) -> Iterator[Floats]:
        """Yield image features batch by batch, while threads read the images of the next batch."""
        flaws = UnreadableRows(dataset)
        black = np.zeros((self.image_size, self.image_size, 3), dtype=np.uint8)

        def read(row: int) -> np.ndarray:
            try:
                image = dataset[row].image
            except UnreadableImage as error:
                # The row is noted, so that its feature counts in no figure.
                flaws.note(row, str(error))
                image = black
            return self.read_image(image)

        starts = [*range(0, len(rows), batch_size), len(rows)]
        groups: Iterable[Sequence[int]] = [rows[start:stop] for start, stop in pairwise(starts)]
        # The pool reads a batch while the model encodes the batch before.
        pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="drrho-read")
        try:
            waiting: list[Iterator[np.ndarray]] = []
            for group in groups:
                waiting.append(pool.map(read, group))
                if len(waiting) == 2:
                    yield _unit(self.encode_images(np.stack([*waiting.pop(0)])))
            for images in waiting:
                yield _unit(self.encode_images(np.stack([*images])))
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _unit(features: np.ndarray) -> Floats:
    """Divide each row by its norm; a row of zeros stays."""
    norms = np.linalg.norm(features, axis=1, keepdims=True)
    result: Floats = features / np.where(norms > 0, norms, 1.0).astype(features.dtype)
    return result
