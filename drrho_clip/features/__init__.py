"""Features of all pairs of a data set on disk: a *cache*, which `drrho encode` writes and a training run reads."""

from __future__ import annotations

from drrho_clip.features.reading import ReferenceFeatures
from drrho_clip.features.writing import encode_pairs

__all__ = ["ReferenceFeatures", "encode_pairs"]
