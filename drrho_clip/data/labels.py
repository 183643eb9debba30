"""Labels of images as classes: two spellings of a label are one class."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable

__all__ = ["class_names_of", "label_key"]


def class_names_of(columns: Iterable[Iterable[str]]) -> tuple[str, ...]:
    """Return the first spelling of each class in columns of labels, sorted without regard to capitals."""
    spellings: dict[str, str] = {}
    for labels in columns:
        for label in dict.fromkeys(labels):
            spellings.setdefault(label_key(label), label)
    return tuple(spellings[key] for key in sorted(spellings) if key)


def label_key(label: str) -> str:
    """Return the text by which labels are compared: without capitals, and with single spaces between words.

    Examples
    --------
    >>> label_key(" Red  Car") == label_key("red car")
    True
    """
    # One letter with an accent can be written as one character or as two, and the texts look the same.
    return " ".join(unicodedata.normalize("NFC", label).split()).casefold()
