"""Sentences about worlds that the pages of several claims need."""

from __future__ import annotations

from typing import Final

__all__ = ["POOL_OF_HEADS", "POOL_OF_PICTURES", "RIGHT_VALIDATION", "RIGHT_VALIDATION_OF_HEADS", "RULE_OF_REFERENCES"]

_CHOICE: Final = "Learning rates, and the best state of a training, are chosen by R@1 on validation pairs"
_CAVEAT: Final = "A user whose table has wrong captions can choose in this way only with a checked file of pairs."

RIGHT_VALIDATION: Final = f"{_CHOICE} with right captions. {_CAVEAT}"
"""The choice in worlds of pictures."""

RIGHT_VALIDATION_OF_HEADS: Final = (
    f"{_CHOICE} with right captions; the titles of OpenClipart are taken as they are. {_CAVEAT}"
)
"""The choice in worlds of heads."""

RULE_OF_REFERENCES: Final = (
    "The rule behind as_reference compares training pairs with validation pairs that are as noisy. Here the validation "
    "captions are right, so nothing shows that the reference models have not learnt wrong captions by heart."
)
"""The weakness of reference models in worlds whose validation captions are right."""

POOL_OF_PICTURES: Final = (
    "Each seed draws other scenes. Of Fashion-MNIST each seed divides the same photographs anew, so a validation "
    "photograph of seed 100, with which learning rates are chosen, may be a test photograph of another seed; there all "
    "test captions are one of ten texts, and every photograph of the class counts as right."
)
"""The meaning of a seed, and of R@1, in worlds of pictures."""

POOL_OF_HEADS: Final = (
    "The seeds of a world of heads divide one pool of pairs anew. They share the two towers and the draw of the wrong "
    "captions, and a validation pair of seed 100, with which learning rates are chosen, may be a training or test pair "
    "of another seed. So the intervals do not cover other towers or other pools."
)
"""The meaning of a seed in worlds of heads."""
