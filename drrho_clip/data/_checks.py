"""Checks that the modules of this folder share. A message names argument, rule and received value."""

from __future__ import annotations

import operator

from drrho_clip.errors import BadInput


def whole_number(value: object, argument: str, *, at_least: int) -> int:
    """Return `value` as an int; raise TypeError for another type and BadInput if it is too small."""
    # bool is a subclass of int, but a bool as a size or a seed is a mistake.
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{argument} must be a whole number, got {value!r}")
    number = operator.index(value)
    if number < at_least:
        raise BadInput(f"{argument} must be at least {at_least}, got {number}")
    return number


def share(value: object, argument: str) -> float:
    """Return `value` as a float in [0, 1]; raise TypeError for another type and BadInput outside the range."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{argument} must be a number in [0, 1], got {value!r}")
    # nan fails both comparisons, so this condition also refuses nan.
    if not 0.0 <= value <= 1.0:
        raise BadInput(f"{argument} must lie in [0, 1], got {value!r}")
    return float(value)


def row_index(index: object, size: int) -> int:
    """Return `index` as an int in 0 .. size - 1; raise TypeError for another type and IndexError outside the range."""
    if isinstance(index, bool) or not hasattr(index, "__index__"):
        raise TypeError(f"index must be a whole number, got {index!r}")
    number = operator.index(index)
    if not 0 <= number < size:
        raise IndexError(f"index must lie in 0 .. {size - 1}, got {number}")
    return number
