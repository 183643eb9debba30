"""Random pairs on which every loop of this folder trains: an image shows eight hidden numbers, a caption names them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

HIDDEN, LEVELS, SIDE = 8, 16, 8
VOCABULARY = HIDDEN * LEVELS


def write_pairs(path: Path | str, num_pairs: int = 512, seed: int = 0) -> None:
    """Write pairs, and beside them the features of a reference model that sees the hidden numbers through noise.

    The pairs go to `path`, ``.npz``: ``images`` (n, 3, SIDE, SIDE), float32, and ``captions`` (n, HIDDEN), token ids.
    The reference features go to ``<path>.npy``: (2, n, HIDDEN), float32, first the images, then the captions.
    """
    rng = np.random.default_rng(seed)
    hidden = rng.uniform(-0.5, 0.5, size=(num_pairs, HIDDEN))
    # A random matrix draws the hidden numbers; the caption has one token per number, rounded to one of the levels.
    pixels = hidden @ rng.normal(size=(HIDDEN, 3 * SIDE * SIDE))
    captions = ((hidden + 0.5) * LEVELS).astype(np.int64) + LEVELS * np.arange(HIDDEN)
    images = pixels.reshape(-1, 3, SIDE, SIDE).astype(np.float32)
    np.savez(path, images=images, captions=captions)
    features = hidden + 0.2 * rng.normal(size=(2, num_pairs, HIDDEN))
    features /= np.linalg.norm(features, axis=-1, keepdims=True)
    np.save(f"{path}.npy", features.astype(np.float32))
