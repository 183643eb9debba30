"""Two linear heads on frozen features: unit features, and the gradient of the heads from that of the features."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

import numpy as np

from drrho_clip.reproduce.estimator.pairs import WIDTH, Floats, Pairs

__all__ = ["Heads", "embed", "pull_back", "start_heads"]

Heads: TypeAlias = "Mapping[str, Floats]"
"""The matrices ``image`` and ``text``, (d, k) each."""


def start_heads(width: int, rng: np.random.Generator) -> dict[str, Floats]:
    """Return initial heads with features of this width."""
    return {name: rng.normal(size=(WIDTH, width)) / np.sqrt(WIDTH) for name in ("image", "text")}


def embed(heads: Heads, pairs: Pairs) -> tuple[Floats, Floats]:
    """Return the features (n, k) of images and captions, each of norm 1."""
    images, texts = (_unit(frozen @ heads[name]) for name, frozen in (("image", pairs.images), ("text", pairs.texts)))
    return images, texts


def pull_back(heads: Heads, pairs: Pairs, gradients: tuple[Floats, Floats]) -> dict[str, Floats]:
    """Return the gradient of the heads from the gradients (n, k) of image and text features."""
    slopes = {}
    for name, frozen, gradient in zip(("image", "text"), pairs, gradients, strict=True):
        raw = frozen @ heads[name]
        norm = np.linalg.norm(raw, axis=1, keepdims=True)
        unit = raw / norm
        # The length of a feature is always 1, so only the part of the gradient across the feature counts.
        across = gradient - (gradient * unit).sum(axis=1, keepdims=True) * unit
        slopes[name] = frozen.T @ (across / norm)
    return slopes


def _unit(raw: Floats) -> Floats:
    unit: Floats = raw / np.linalg.norm(raw, axis=1, keepdims=True)
    return unit
