"""Sentences about worlds that the pages of several claims need."""

from __future__ import annotations

from typing import Final

__all__ = ["POOL_OF_HEADS", "RIGHT_VALIDATION", "RIGHT_VALIDATION_OF_HEADS"]

_CHOICE: Final = "Learning rates, and the best state of a training, are chosen by R@1 on validation pairs"
_CAVEAT: Final = "A user whose table has wrong captions can choose in this way only with a checked file of pairs."

RIGHT_VALIDATION: Final = f"{_CHOICE} with right captions. {_CAVEAT}"
"""The choice in worlds of pictures."""

RIGHT_VALIDATION_OF_HEADS: Final = (
    f"{_CHOICE} with right captions; the titles of OpenClipart are taken as they are. {_CAVEAT}"
)
"""The choice in worlds of heads."""

POOL_OF_HEADS: Final = (
    "The seeds of a world of heads divide one pool of pairs anew. They share the two towers and the draw of the wrong "
    "captions, and a validation pair of seed 100, with which learning rates are chosen, may be a training or test pair "
    "of another seed. So the intervals do not cover other towers or other pools."
)
"""The meaning of a seed in worlds of heads."""
