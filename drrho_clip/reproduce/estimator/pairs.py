"""Drawn pairs of frozen features: two views of one hidden vector, as two frozen towers would give."""

from __future__ import annotations

from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

__all__ = ["WIDTH", "Floats", "PairSets", "Pairs", "draw_pairs"]

Floats = npt.NDArray[np.float64]

WIDTH: Final = 48
"""The width of the frozen features."""

_HIDDEN: Final = 24
# The deviation of the noise of a feature, whose signal lies in (-1, 1).
_NOISE: Final = 0.5
_HELD_OUT: Final = 400


class Pairs(NamedTuple):
    """Frozen features (n, d) of images and captions; row i of both arrays is a pair."""

    images: Floats
    texts: Floats


class PairSets(NamedTuple):
    """Pairs for the target, other pairs for the reference model, and held-out pairs without swapped captions."""

    train: Pairs
    reference: Pairs
    validation: Pairs
    test: Pairs


def draw_pairs(num: int, *, num_reference: int, swapped: float, rng: np.random.Generator) -> PairSets:
    """Draw pairs; this share of the training captions, in [0, 1), belongs to another image.

    Examples
    --------
    >>> sets = draw_pairs(10, num_reference=4, swapped=0.2, rng=np.random.default_rng(0))
    >>> sets.train.images.shape, sets.reference.texts.shape, sets.test.images.shape
    ((10, 48), (4, 48), (400, 48))
    """
    maps = rng.normal(size=(2, _HIDDEN, WIDTH)) / np.sqrt(_HIDDEN)
    sets = []
    for size, share in ((num, swapped), (num_reference, swapped), (_HELD_OUT, 0.0), (_HELD_OUT, 0.0)):
        hidden = rng.normal(size=(size, _HIDDEN))
        images, texts = (np.tanh(2 * hidden @ each) + _NOISE * rng.normal(size=(size, WIDTH)) for each in maps)
        # The chosen captions move on by one place, so each of them belongs to another image.
        chosen = rng.permutation(size)[: round(share * size)]
        texts[chosen] = texts[np.roll(chosen, 1)]
        sets.append(Pairs(images, texts))
    return PairSets(*sets)
