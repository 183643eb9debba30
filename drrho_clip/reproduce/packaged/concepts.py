"""Pairs of a data set, their concepts, and a division of the pairs in which no concept is in two parts.

A *concept* is a group of pairs that show nearly the same: the titles are equal, or the keywords, or the pictures. If
such pairs were in the training part and in the test part, the test would measure memory.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

VALIDATION_SHARE, TEST_SHARE = 0.15, 0.25
# A larger concept than this share of the pairs is always used for training: it would fill a part on its own.
LARGEST_HELD_OUT = 0.02


class Pair(NamedTuple):
    """A picture file, a caption, and the number of the concept."""

    path: Path
    caption: str
    concept: int


class Parts(NamedTuple):
    """Rows of the training, validation and test pairs."""

    train: npt.NDArray[np.int64]
    validation: npt.NDArray[np.int64]
    test: npt.NDArray[np.int64]


def title_key(title: str) -> str:
    """Return the letters of a title as lower-case words, so that "Tree 2" and "tree" are equal.

    Examples
    --------
    >>> title_key("Apple-Tree 02")
    'apple tree'
    """
    return " ".join(re.findall(r"[^\W\d_]+", title.lower()))


def picture_key(path: Path) -> str:
    """Return a key that is equal for files with equal content."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def grouped(keys: Sequence[Sequence[Hashable]]) -> list[int]:
    """Return a number for every row; rows that share a key, directly or through other rows, get the same number.

    Examples
    --------
    >>> grouped([["a"], ["b"], ["a", "c"], ["c"]])
    [0, 1, 0, 0]
    """
    parent = list(range(len(keys)))

    def root(row: int) -> int:
        while parent[row] != row:
            parent[row] = parent[parent[row]]
            row = parent[row]
        return row

    first: dict[Hashable, int] = {}
    for row, of_row in enumerate(keys):
        for key in of_row:
            # The smaller number becomes the root, so the numbers do not depend on the order of the keys.
            low, high = sorted((root(row), root(first.setdefault(key, row))))
            parent[high] = low
    numbers: dict[int, int] = {}
    return [numbers.setdefault(root(row), len(numbers)) for row in range(len(keys))]


def divide(concepts: Sequence[int], seed: int) -> Parts:
    """Divide rows at random into training, validation and test rows; rows of a concept stay together."""
    of_row = np.asarray(concepts)
    numbers, sizes = np.unique(of_row, return_counts=True)
    part = np.zeros(int(numbers.max()) + 1, dtype=np.int64)
    room = {1: VALIDATION_SHARE * len(of_row), 2: TEST_SHARE * len(of_row)}
    order = np.random.default_rng([seed, 9]).permutation(len(numbers))
    for concept, size in zip(numbers[order].tolist(), sizes[order].tolist(), strict=True):
        # A concept goes to the first part that has room for it, the test part before the validation part.
        for target in (2, 1):
            if size <= max(1.0, LARGEST_HELD_OUT * len(of_row)) and size <= room[target]:
                room[target] -= size
                part[concept] = target
                break
    return Parts(*(np.flatnonzero(part[of_row] == number) for number in (0, 1, 2)))
