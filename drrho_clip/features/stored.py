"""The inputs of heads: features of a cache, which another model has computed, in place of pixels and tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from drrho_clip.data.protocol import Dataset, UInt8
from drrho_clip.data.row_source import RowSource
from drrho_clip.errors import BadInput
from drrho_clip.features.reading import ReferenceFeatures

__all__ = ["StoredInputs"]


class StoredInputs:
    """The features that heads read, as an `ImageReading` and as the source of the texts.

    Parameters
    ----------
    features : ReferenceFeatures
        The cache.
    model : mapping
        The identity of the model with whose features the heads are trained.

    Raises
    ------
    BadInput
        If the cache holds the features of another model.
    """

    def __init__(self, features: ReferenceFeatures, model: Mapping[str, Any]) -> None:
        # The data may differ, because every pair is looked up by its content.
        manifest = features.manifest
        difference = manifest.difference(manifest.like(model, manifest.data))
        if difference is not None:
            raise BadInput(f"model must be the cache of the features that the heads read, got {difference}")
        self._features = features

    def source(self, dataset: Dataset, *, order: str = "full") -> RowSource:
        """Return the batches of a data set; raise BadInput if the cache lacks a pair."""
        return RowSource(dataset, self._features, order=order)

    def texts(self, captions: Sequence[str]) -> npt.NDArray[np.float32]:
        """Return the stored features of captions; raise BadInput if the cache lacks a caption."""
        # The module of the encoders imports this package.
        from drrho_clip.encoders.cached import CachedEncoder

        return CachedEncoder(self._features).texts(captions)

    def square(self, image: UInt8, /) -> NoReturn:
        """Raise BadInput, because heads read no pixels."""
        raise BadInput(f"{self._features.folder} must hold the features of every image, got a new image {image.shape}")

    def normalise(self, images: UInt8, /) -> npt.NDArray[np.float32]:
        """Return stored features as they are."""
        return np.asarray(images, dtype=np.float32)
