"""The captions of the rendered scenes."""

from __future__ import annotations

from typing import Final, NamedTuple

import numpy as np

from drrho_clip.data.protocol import Int64
from drrho_clip.data.shapes import DISTANCES, Float32

__all__ = ["COLOURS", "RELATIONS", "SHAPES", "SIZES", "Objects", "describe_scenes", "phrase"]

SHAPES: Final = tuple(DISTANCES)
COLOURS: Final = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "white")
SIZES: Final = ("small", "large")
RELATIONS: Final = ("left of", "right of", "above", "below")


class Objects(NamedTuple):
    """One object per scene; every array has shape (n,). Shape, colour and size are positions in the tuples above."""

    shape: Int64
    colour: Int64
    size: Int64
    radius: Float32
    x: Float32
    y: Float32


# Templates of captions: the first five name the relation between the objects, the last five do not.
_RELATED: Final = (
    "{first} to the {relation} {second}",
    "{first} is {relation} {second}",
    "{first} {relation} {second}",
    "a picture of {first} {relation} {second}",
    "there is {first} {relation} {second}",
)
_UNRELATED: Final = (
    "{first} and {second}",
    "{first} with {second}",
    "{first} next to {second}",
    "a picture of {first} and {second}",
    "there is {first} and {second}",
)
# For each relation, the position of the reverse relation in `RELATIONS`.
_INVERSE: Final = (1, 0, 3, 2)


def describe_scenes(
    first: Objects, second: Objects, relation: Int64, omit_probability: float, rng: np.random.Generator
) -> list[str]:
    """Return one caption per scene.

    Parameters
    ----------
    first, second : Objects
        The two objects of every scene.
    relation : ndarray of int64, shape (n,)
        Positions in `RELATIONS`: the relation of the first object to the second.
    omit_probability : float
        Probability with which each of the five attributes (two sizes, two colours, the relation) is left out.
    rng : numpy.random.Generator
        The generator that draws the random numbers.
    """
    count = len(relation)
    # The random numbers of all captions are drawn at once, including numbers that a caption does not use.
    draws: list[list[float]] = rng.random((count, 5)).tolist()
    template: list[int] = rng.integers(0, len(_RELATED), count).tolist()
    inverted: list[bool] = (rng.random(count) < 0.5).tolist()
    columns = [array.tolist() for thing in (first, second) for array in (thing.size, thing.colour, thing.shape)]
    captions = []
    for row, (size_1, colour_1, shape_1, size_2, colour_2, shape_2, related) in enumerate(
        zip(*columns, relation.tolist(), strict=True)
    ):
        is_named = [draw >= omit_probability for draw in draws[row]]
        phrases = [
            phrase(size_1 if is_named[0] else None, colour_1 if is_named[1] else None, shape_1),
            phrase(size_2 if is_named[2] else None, colour_2 if is_named[3] else None, shape_2),
        ]
        # If the second object is named first, the relation is reversed.
        if inverted[row]:
            phrases.reverse()
            related = _INVERSE[related]
        if not is_named[4]:
            text = _UNRELATED[template[row]].format(first=phrases[0], second=phrases[1])
        else:
            # The first template needs "left of" or "right of", because "to the above" is not English.
            sideways = RELATIONS[related].endswith(" of")
            pattern = _RELATED[template[row]] if sideways or template[row] != 0 else _RELATED[2]
            text = pattern.format(first=phrases[0], relation=RELATIONS[related], second=phrases[1])
        captions.append(text)
    return captions


def phrase(size: int | None, colour: int | None, shape: int) -> str:
    """Return an object's description, such as "a small red circle"; None leaves an attribute out."""
    words = [SHAPES[shape]]
    if colour is not None:
        words.insert(0, COLOURS[colour])
    if size is not None:
        words.insert(0, SIZES[size])
    return f"{'an' if words[0][0] in 'aeiou' else 'a'} {' '.join(words)}"
