"""Sentences of a made-up language, clean and with typing errors, for the loops that train language models."""

from __future__ import annotations

from pathlib import Path

import numpy as np

WORDS, LENGTH = 32, 16


def write_sentences(path: Path | str, num_sentences: int, noise: float, seed: int) -> None:
    """Write token ids (n, LENGTH), ``.npy``: a word depends on the word before; `noise` is the share of wrong words."""
    # The language is the same for every seed; the seed chooses the sentences.
    logits = 3.0 * np.random.default_rng(0).normal(size=(WORDS, WORDS))
    cumulative = np.cumsum(np.exp(logits), axis=1)
    rng = np.random.default_rng(seed)
    words = rng.integers(WORDS, size=(num_sentences, LENGTH))
    for place in range(1, LENGTH):
        row = cumulative[words[:, place - 1]]
        words[:, place] = np.sum(row < rng.uniform(size=(num_sentences, 1)) * row[:, -1:], axis=1)
    wrong = rng.uniform(size=words.shape) < noise
    np.save(path, np.where(wrong, rng.integers(WORDS, size=words.shape), words))


if __name__ == "__main__":
    write_sentences("clean.npy", 512, 0.0, seed=1)
    write_sentences("noisy.npy", 1024, 0.4, seed=2)
    write_sentences("test.npy", 256, 0.0, seed=3)
