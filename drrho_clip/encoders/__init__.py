"""Models that turn images and captions into features: runs, models of other programs, and caches of features."""

from __future__ import annotations

from drrho_clip.encoders.cached import CachedEncoder
from drrho_clip.encoders.fixed import FixedFeatures
from drrho_clip.encoders.foreign import ForeignEncoder
from drrho_clip.encoders.naming import cache_folder, check_model_name, is_run
from drrho_clip.encoders.opening import feature_dim_in_memory, open_model
from drrho_clip.encoders.protocol import PairEncoder

__all__ = [
    "CachedEncoder",
    "FixedFeatures",
    "ForeignEncoder",
    "PairEncoder",
    "cache_folder",
    "check_model_name",
    "feature_dim_in_memory",
    "is_run",
    "open_model",
]
