"""A cache of features as a model: it knows the features of the pairs that were encoded, and no others."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from drrho_clip.data import Dataset, WordTokenizer
from drrho_clip.data.content import DIGEST_SIZE
from drrho_clip.data.pair_ids import find_ids, text_ids
from drrho_clip.data.unreadable import UnreadableRows
from drrho_clip.encoders.protocol import EncoderInBatches, Floats
from drrho_clip.errors import BadInput
from drrho_clip.features.reading import ReferenceFeatures
from drrho_clip.features.rows import CacheRows
from drrho_clip.terminal.safe_text import brief

__all__ = ["CachedEncoder"]


class CachedEncoder(EncoderInBatches):
    """The features of a cache; images and captions are found by their content.

    Parameters
    ----------
    features : ReferenceFeatures
        The cache.
    """

    # The sizes hold for pictures that the cache cannot encode anyway.
    image_size = 224
    resize_mode = "crop"
    reads_new_pairs = False

    def __init__(self, features: ReferenceFeatures) -> None:
        self._features = features

    @property
    def name(self) -> str:
        """The folder of the cache."""
        return f"features:{self._features.folder}"

    @property
    def feature_dims(self) -> tuple[int, int]:
        """Sizes of the features of an image and of a caption."""
        return self._features.manifest.feature_dims

    @property
    def temperature(self) -> float:
        """Temperature of the encoded model."""
        return self._features.temperature

    @property
    def tokenizer(self) -> WordTokenizer:
        """A tokenizer that divides captions into words, because the cache does not have the model's own."""
        return WordTokenizer([], 1)

    def identity(self) -> dict[str, Any]:
        """Return the identity of the encoded model."""
        return dict(self._features.manifest.model)

    def rows_of(self, dataset: Dataset) -> CacheRows:
        """Return the features of all pairs, which stay on the disk until they are read."""
        self._note_unreadable(dataset)
        return CacheRows(self._features, self._features.rows_of(dataset))

    def _note_unreadable(self, dataset: Dataset) -> None:
        """Note the rows of unreadable images in a data set, which no figure counts; raise if there are too many."""
        flaws = UnreadableRows(dataset)
        for row, reason in self._features.unreadable_rows(dataset).items():
            flaws.note(row, reason)

    def batches_of(
        self, dataset: Dataset, *, first_row: int = 0, batch_size: int = 256, rows: np.ndarray | None = None
    ) -> Iterator[tuple[Floats, Floats]]:
        """Yield image features and text features of the pairs from `first_row` on, or of `rows` in their order."""
        self._note_unreadable(dataset)
        places = self._features.rows_of(dataset)
        places = places[first_row:] if rows is None else places[rows]
        for start in range(0, len(places), batch_size):
            yield self._features[places[start : start + batch_size]]

    def images_of(
        self,
        dataset: Dataset,
        rows: np.ndarray,
        *,
        batch_size: int = 256,
        after_batch: Callable[[], None] | None = None,
    ) -> Floats:
        """Return image features of some rows; raise BadInput if the cache lacks an image."""
        self._note_unreadable(dataset)
        # The captions do not matter here, so the first row with the same image serves.
        places = find_ids(dataset.image_digests()[rows], self._features.ids[:, :DIGEST_SIZE])
        if (places < 0).any():
            raise BadInput(
                f"{self._features.folder} must hold the features of {dataset.name}, got a cache without "
                f"{int((places < 0).sum()):,} of {len(places):,} images"
            )
        parts = []
        for start in range(0, len(places), batch_size):
            parts.append(self._features.rows_of_side("image", places[start : start + batch_size]))
            if after_batch is not None:
                after_batch()
        return np.concatenate(parts)

    def images(self, images: np.ndarray, *, batch_size: int = 256) -> Floats:  # noqa: ARG002 (contract)
        """Raise BadInput, because the cache cannot encode new images."""
        raise BadInput(f"{self.name} must be asked for encoded images only, got {len(images)} new images")

    def texts(self, captions: Sequence[str], *, batch_size: int = 256) -> Floats:  # noqa: ARG002 (contract)
        """Return text features of captions; raise BadInput if the cache lacks a caption."""
        # Equal captions have equal features, whatever their images are.
        places = find_ids(text_ids(captions), self._features.ids[:, DIGEST_SIZE:])
        missing = np.flatnonzero(places < 0)
        if len(missing):
            raise BadInput(
                f"{self._features.folder} must hold the features of every text, got a cache without "
                f"{brief(captions[int(missing[0])])}; a cache cannot encode new texts, so name the model itself "
                f"({self._features.manifest.model.get('name')})"
            )
        return self._features.rows_of_side("text", places)
