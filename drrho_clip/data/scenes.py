"""Rendered scenes with captions: two objects, their attributes, and how they stand to each other.

Every number comes from NumPy's Generator and from +, -, *, / and square roots, which IEEE 754 rounds in one way only,
so a seed gives the same bytes on every machine. The share of a pixel that a shape covers is approximated by the clipped
signed distance to the shape's edge: this antialiasing costs one evaluation per pixel.

Pillow does not draw the scenes: its shapes have no antialiasing, and other pixels would give other figures than the
published ones.

The random streams are children of one `numpy.random.SeedSequence(seed)`: spawn key (stream, part, chunk), where stream
is the position in `STREAMS`, part is 0 for scenes, 1 for captions, 2 for the swaps, 3 for zero-shot images, and a chunk
is 1024 scenes. So the streams of one seed never meet, and `scenes(n, ...)` begins with the scenes and own captions of
every shorter call with the same arguments.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Final, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from drrho_clip.data._checks import share, whole_number
from drrho_clip.data.arrays import ArrayDataset, swap_captions
from drrho_clip.data.protocol import DataSplits, Int64, UInt8, ZeroShot
from drrho_clip.errors import BadInput

__all__ = ["COLOURS", "RELATIONS", "SHAPES", "SIZES", "STREAMS", "scene_splits", "scenes"]

Float32: TypeAlias = npt.NDArray[np.float32]

SHAPES: Final = ("circle", "square", "triangle", "diamond", "cross", "ring", "star", "heart")
COLOURS: Final = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "white")
SIZES: Final = ("small", "large")
RELATIONS: Final = ("left of", "right of", "above", "below")
STREAMS: Final = ("train", "validation", "test", "reference")

RGB: Final = np.array(
    [
        (215, 35, 35),
        (240, 135, 25),
        (240, 225, 50),
        (35, 165, 55),
        (70, 215, 225),
        (40, 70, 230),
        (155, 60, 200),
        (240, 240, 240),
    ],
    dtype=np.float32,
)
_RADIUS: Final = np.array([4.3, 7.0], dtype=np.float32)  # in pixels of a 32 x 32 image
_REACH: Final = np.float32(1.05)  # how far a shape goes from its centre, in radii
_CHUNK: Final = 1024
_ZERO_SHOT_PER_CLASS: Final = 8


class _Objects(NamedTuple):
    """One object per scene; every array has shape (n,)."""

    shape: Int64
    colour: Int64
    size: Int64
    radius: Float32
    x: Float32
    y: Float32


def scenes(
    size: int,
    *,
    seed: int,
    stream: str = "train",
    swapped_fraction: float = 0.3,
    omit_probability: float = 0.3,
    image_size: int = 32,
) -> ArrayDataset:
    """Render scenes of two objects and describe them.

    An object has one of 8 shapes, 8 colours and 2 sizes; the first stands left of, right of, above or below the second.
    Position, turn, exact size and colour vary a little, and the background is noisy. A caption may name the objects in
    either order and comes in several templates.

    Parameters
    ----------
    size : int
        Number of pairs, at least 1.
    seed : int
        At least 0.
    stream : str
        One of `STREAMS`; different streams of one seed hold different scenes. Use "reference" for a reference
        model that is to see other scenes than the learner.
    swapped_fraction : float
        Share in [0, 1] of the captions that are exchanged among their samples (exactly `round(share * size)`).
    omit_probability : float
        In [0, 1]. Each of five attributes (two sizes, two colours, the relation) is left out of a caption with this
        probability. The shapes are always named.
    image_size : int
        Height and width in pixels, at least 16.

    Returns
    -------
    ArrayDataset
        `images` is uint8 (size, image_size, image_size, 3); `is_swapped` marks the exchanged captions and
        `own_captions` are those before. Its zero-shot task is single objects, 64 classes (colour, shape).

    Raises
    ------
    BadInput, TypeError
        An argument is outside its domain, or of another type.

    Examples
    --------
    >>> data = scenes(2, seed=0, swapped_fraction=0.0, omit_probability=0.0)
    >>> data.images.shape
    (2, 32, 32, 3)
    >>> data.captions == scenes(2, seed=0, swapped_fraction=0.0, omit_probability=0.0).captions
    True
    """
    size = whole_number(size, "size", at_least=1)
    seed = whole_number(seed, "seed", at_least=0)
    image_size = whole_number(image_size, "image_size", at_least=16)
    swapped_fraction = share(swapped_fraction, "swapped_fraction")
    omit_probability = share(omit_probability, "omit_probability")
    if stream not in STREAMS:
        raise BadInput(f"stream must be one of {', '.join(STREAMS)}, got {stream!r}")
    number = STREAMS.index(stream)

    images = np.empty((size, image_size, image_size, 3), dtype=np.uint8)
    own_captions: list[str] = []
    for chunk, start in enumerate(range(0, size, _CHUNK)):
        # A whole chunk is drawn even where fewer are kept: the last scenes of a short set are then those of a long one.
        stop = min(start + _CHUNK, size)
        rng = _generator(seed, number, 0, chunk)
        first, second, relation = _two_objects(_CHUNK, image_size, rng)
        images[start:stop] = _render((first, second), stop - start, image_size, rng)
        captioner = _generator(seed, number, 1, chunk)
        own_captions += _captions(first, second, relation, omit_probability, captioner)[: stop - start]
    captions, is_swapped = swap_captions(own_captions, swapped_fraction, _generator(seed, number, 2, 0))
    return ArrayDataset(
        f"scenes-{stream}",
        images,
        captions,
        own_captions=own_captions,
        is_swapped=is_swapped,
        zero_shot=partial(_zero_shot, seed, number, image_size),
    )


def scene_splits(
    train_size: int = 20_000,
    *,
    seed: int = 0,
    swapped_fraction: float = 0.3,
    omit_probability: float = 0.3,
    heldout_size: int = 1000,
    heldout_omit_probability: float | None = None,
    image_size: int = 32,
) -> DataSplits:
    """Return training, validation and test scenes of one seed.

    Parameters
    ----------
    train_size : int
        Number of training pairs.
    seed, swapped_fraction, omit_probability, image_size
        As in `scenes`; captions are swapped in the training split only.
    heldout_size : int
        Number of pairs in each of validation and test; 1,000 are five galleries of 200.
    heldout_omit_probability : float, optional
        How often held-out captions leave an attribute out; as often as training captions when left out.

    Returns
    -------
    DataSplits
        The scenes for a reference model are `scenes(n, seed=seed, stream="reference")`, disjoint from all three.

    Raises
    ------
    BadInput, TypeError
        As in `scenes`.

    Examples
    --------
    >>> splits = scene_splits(10, heldout_size=4)
    >>> [len(split) for split in splits], int(splits.train.is_swapped.sum())
    ([10, 4, 4], 3)
    """
    heldout_omit = omit_probability if heldout_omit_probability is None else heldout_omit_probability
    make = partial(scenes, seed=seed, image_size=image_size)
    heldout = partial(make, heldout_size, swapped_fraction=0.0, omit_probability=heldout_omit)
    return DataSplits(
        train=make(train_size, swapped_fraction=swapped_fraction, omit_probability=omit_probability),
        validation=heldout(stream="validation"),
        test=heldout(stream="test"),
    )


def _generator(seed: int, stream: int, part: int, chunk: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed, spawn_key=(stream, part, chunk))))


def _uniform(rng: np.random.Generator, low: float, high: float, count: int) -> Float32:
    return (low + (high - low) * rng.random(count)).astype(np.float32)


def _two_objects(count: int, image_size: int, rng: np.random.Generator) -> tuple[_Objects, _Objects, Int64]:
    """Draw two objects that do not touch; the first stands in `relation` to the second."""
    scale = image_size / 32.0
    kind = rng.integers(0, len(SHAPES) * len(COLOURS), count)
    # One of the 63 others: two objects of one shape and colour would leave "left of" without a meaning.
    other = (kind + rng.integers(1, len(SHAPES) * len(COLOURS), count)) % (len(SHAPES) * len(COLOURS))
    sizes = rng.integers(0, len(SIZES), (2, count))
    relation = rng.integers(0, len(RELATIONS), count)
    radii = [_RADIUS[chosen] * _uniform(rng, 0.92, 1.04, count) * np.float32(scale) for chosen in sizes]

    # Along the relation's axis, the room that two discs leave is dealt to both margins and to the gap between them.
    low_is_first = (relation == 0) | (relation == 2)
    reaches = [radius * _REACH for radius in radii]
    low_reach = np.where(low_is_first, reaches[0], reaches[1])
    high_reach = np.where(low_is_first, reaches[1], reaches[0])
    gap_floor = np.float32(1.0 * scale)
    room = image_size - 2.0 * (low_reach + high_reach) - gap_floor
    cuts = np.sort(rng.random((2, count)), axis=0).astype(np.float32)
    low = low_reach + cuts[0] * room
    high = low + low_reach + high_reach + gap_floor + (cuts[1] - cuts[0]) * room
    # Across it, both may wander, but by less than they are apart along it: the relation stays plain to see.
    across_low = low_reach + _uniform(rng, 0.0, 1.0, count) * (image_size - 2.0 * low_reach)
    wander = _uniform(rng, -0.5, 0.5, count) * (high - low)
    across_high = np.minimum(np.maximum(across_low + wander, high_reach), image_size - high_reach)

    along_first, along_second = np.where(low_is_first, low, high), np.where(low_is_first, high, low)
    across_first = np.where(low_is_first, across_low, across_high)
    across_second = np.where(low_is_first, across_high, across_low)
    horizontal = relation < 2

    def place(chosen: Int64, size: Int64, radius: Float32, along: Float32, across: Float32) -> _Objects:
        x, y = np.where(horizontal, along, across), np.where(horizontal, across, along)
        return _Objects(chosen % len(SHAPES), chosen // len(SHAPES), size, radius, x, y)

    return (
        place(kind, sizes[0], radii[0], along_first, across_first),
        place(other, sizes[1], radii[1], along_second, across_second),
        relation,
    )


def _render(objects: tuple[_Objects, ...], keep: int, image_size: int, rng: np.random.Generator) -> UInt8:
    """Paint the objects over a noisy background; all scenes are drawn from `rng`, the first `keep` are painted."""
    count = objects[0].x.shape[0]
    grey = _uniform(rng, 25.0, 105.0, count)
    tint = _uniform(rng, -10.0, 10.0, count * 3).reshape(count, 3)
    jitters = [_uniform(rng, -18.0, 18.0, count * 3).reshape(count, 3) for _ in objects]
    turns = [_uniform(rng, -0.07, 0.07, count) for _ in objects]  # tangent of half the angle: up to 8 degrees
    canvas = np.empty((keep, image_size, image_size, 3), dtype=np.float32)
    canvas[...] = (grey[:keep, None] + tint[:keep])[:, None, None, :]
    centres = np.arange(image_size, dtype=np.float32) + np.float32(0.5)
    for thing, jitter, turn in zip(objects, jitters, turns, strict=True):
        colour = RGB[thing.colour] + jitter
        # A turn by rational cosine and sine: no library's sine, whose last bit may differ between machines.
        cosine, sine = (1.0 - turn * turn) / (1.0 + turn * turn), 2.0 * turn / (1.0 + turn * turn)
        for shape, distance in enumerate(_DISTANCES):
            rows = np.flatnonzero(thing.shape[:keep] == shape)
            if rows.size == 0:
                continue
            radius = thing.radius[rows, None, None]
            dx = (centres[None, None, :] - thing.x[rows, None, None]) / radius
            dy = (centres[None, :, None] - thing.y[rows, None, None]) / radius
            c, s = cosine[rows, None, None], sine[rows, None, None]
            coverage = np.float32(0.5) - distance(c * dx + s * dy, c * dy - s * dx) * radius
            coverage = np.minimum(np.maximum(coverage, np.float32(0.0)), np.float32(1.0))[..., None]
            under = canvas[rows]
            canvas[rows] = under + coverage * (colour[rows, None, None, :] - under)
    # One random byte is two throws of 0 .. 15: their sum, centred, is triangular noise of -15 .. 15.
    noise = np.frombuffer(rng.bytes(canvas.size), dtype=np.uint8).reshape(canvas.shape)
    canvas += (noise & 15).astype(np.float32) + (noise >> 4).astype(np.float32) - np.float32(15.0)
    return np.minimum(np.maximum(np.rint(canvas), 0.0), 255.0).astype(np.uint8)


# Signed distances from (x, y), y downwards, to the edge of a shape about as wide as the unit disc; negative inside.
# Some are exact only near the edge, and only there are they looked at.


def _circle(x: Float32, y: Float32) -> Float32:
    distance: Float32 = np.sqrt(x * x + y * y) - np.float32(0.95)
    return distance


def _square(x: Float32, y: Float32) -> Float32:
    distance: Float32 = np.maximum(np.abs(x), np.abs(y)) - np.float32(0.84)
    return distance


def _triangle(x: Float32, y: Float32) -> Float32:
    # Apex (0, -0.98), base from (-1, 0.8) to (1, 0.8).
    side: Float32 = (np.float32(1.78) * np.abs(x) - (y + np.float32(0.98))) * np.float32(1.0 / 2.0417)
    inside: Float32 = np.maximum(side, y - np.float32(0.8))
    return inside


def _diamond(x: Float32, y: Float32) -> Float32:
    # Taller than wide, so that a turned square cannot be taken for it.
    across, up = np.float32(1.05 / 1.2732) * np.abs(x), np.float32(0.72 / 1.2732) * np.abs(y)
    distance: Float32 = across + up - np.float32(0.756 / 1.2732)
    return distance


def _cross(x: Float32, y: Float32) -> Float32:
    across, up, half_width = np.abs(x), np.abs(y), np.float32(0.3)
    upright = np.maximum(across - half_width, up - np.float32(1.0))
    lying = np.maximum(up - half_width, across - np.float32(1.0))
    return np.minimum(upright, lying)


def _ring(x: Float32, y: Float32) -> Float32:
    return np.abs(np.sqrt(x * x + y * y) - np.float32(0.74)) - np.float32(0.22)


# Outward normals of the five lines through a pentagram, one tip up: (sin, cos) of multiples of 72 degrees.
_STAR_NORMALS: Final = (
    (0.0, 1.0),
    (0.9510565, 0.3090170),
    (0.5877853, -0.8090170),
    (-0.5877853, -0.8090170),
    (-0.9510565, 0.3090170),
)


def _star(x: Float32, y: Float32) -> Float32:
    # Inside a pentagram at most one of its five lines is crossed: so the second largest distance decides.
    largest = np.full_like(x, -np.inf)
    second = np.full_like(x, -np.inf)
    for normal_x, normal_y in _STAR_NORMALS:
        distance = np.float32(normal_x) * x + np.float32(normal_y) * y
        second = np.maximum(second, np.minimum(largest, distance))
        largest = np.maximum(largest, distance)
    edge: Float32 = second - np.float32(0.33)
    return edge


def _heart(x: Float32, y: Float32) -> Float32:
    # Two discs of radius 0.5 around (+-0.48, -0.35), and the kite between them and the tip (0, 0.95), tangent to both.
    across = np.abs(x) - np.float32(0.48)
    down = y + np.float32(0.35)
    disc = np.sqrt(across * across + down * down) - np.float32(0.5)
    tangent = np.float32(0.75) * np.abs(x) + np.float32(0.6614) * y - np.float32(0.6284)
    spoke = np.float32(0.6614) * across - np.float32(0.75) * down
    joined: Float32 = np.minimum(disc, np.maximum(np.maximum(tangent, spoke), -down))
    return joined


_DISTANCES: Final[tuple[Callable[[Float32, Float32], Float32], ...]] = (
    _circle,
    _square,
    _triangle,
    _diamond,
    _cross,
    _ring,
    _star,
    _heart,
)

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
_INVERSE: Final = (1, 0, 3, 2)


def _captions(
    first: _Objects, second: _Objects, relation: Int64, omit_probability: float, rng: np.random.Generator
) -> list[str]:
    count = len(relation)
    thrown: list[list[float]] = rng.random((count, 5)).tolist()
    template: list[int] = rng.integers(0, len(_RELATED), count).tolist()
    inverted: list[bool] = (rng.random(count) < 0.5).tolist()
    columns = [array.tolist() for thing in (first, second) for array in (thing.size, thing.colour, thing.shape)]
    captions = []
    for row, (size_1, colour_1, shape_1, size_2, colour_2, shape_2, related) in enumerate(
        zip(*columns, relation.tolist(), strict=True)
    ):
        tell = [throw >= omit_probability for throw in thrown[row]]
        phrases = [
            _phrase(size_1 if tell[0] else None, colour_1 if tell[1] else None, shape_1),
            _phrase(size_2 if tell[2] else None, colour_2 if tell[3] else None, shape_2),
        ]
        if inverted[row]:
            phrases.reverse()
            related = _INVERSE[related]
        if not tell[4]:
            text = _UNRELATED[template[row]].format(first=phrases[0], second=phrases[1])
        else:
            sideways = RELATIONS[related].endswith(" of")  # "to the above" is no English
            pattern = _RELATED[template[row]] if sideways or template[row] != 0 else _RELATED[2]
            text = pattern.format(first=phrases[0], relation=RELATIONS[related], second=phrases[1])
        captions.append(text)
    return captions


def _phrase(size: int | None, colour: int | None, shape: int) -> str:
    words = [SHAPES[shape]]
    if colour is not None:
        words.insert(0, COLOURS[colour])
    if size is not None:
        words.insert(0, SIZES[size])
    return f"{'an' if words[0][0] in 'aeiou' else 'a'} {' '.join(words)}"


def _zero_shot(seed: int, stream: int, default_size: int, image_size: int | None) -> ZeroShot:
    size = default_size if image_size is None else whole_number(image_size, "image_size", at_least=16)
    rng = _generator(seed, stream, 3, 0)
    classes = len(COLOURS) * len(SHAPES)
    labels = np.repeat(np.arange(classes, dtype=np.int64), _ZERO_SHOT_PER_CLASS)
    count = labels.shape[0]
    sizes = rng.integers(0, len(SIZES), count)
    radius = _RADIUS[sizes] * _uniform(rng, 0.92, 1.04, count) * np.float32(size / 32.0)
    reach = radius * _REACH
    x, y = (reach + _uniform(rng, 0.0, 1.0, count) * (size - 2.0 * reach) for _ in range(2))
    alone = _Objects(labels % len(SHAPES), labels // len(SHAPES), sizes, radius, x, y)
    names = tuple(f"{colour} {shape}" for colour in COLOURS for shape in SHAPES)
    prompts = tuple(_phrase(None, colour, shape) for colour in range(len(COLOURS)) for shape in range(len(SHAPES)))
    return ZeroShot(names, prompts, _render((alone,), count, size, rng), labels)
