"""Rendered scenes with captions: two objects, their attributes, and their relation to each other.

Every number comes from NumPy's Generator and from +, -, *, / and square roots, which IEEE 754 rounds in one way only,
so a seed gives the same bytes on every machine. The share of a pixel that a shape covers is approximated by the clipped
signed distance to the shape's edge, so antialiasing needs one evaluation of the distance per pixel.

Pillow does not draw the scenes, because its shapes have no antialiasing. The pixels must not change, because the
published results depend on them.

The random streams are children of one `numpy.random.SeedSequence(seed)` with the spawn key (stream, part, chunk). Here
stream is the position in `STREAMS`, part is 0 for scenes, 1 for captions, 2 for the swaps, 3 for zero-shot images, and
chunk counts blocks of 1024 scenes. So two streams of one seed share no random numbers, and `scenes(n, ...)` begins with
the scenes and the captions (before swaps) of every call with a smaller n and otherwise equal arguments.
"""

from __future__ import annotations

from functools import partial
from typing import Final

import numpy as np

from drrho_clip.data._checks import share, whole_number
from drrho_clip.data.arrays import ArrayDataset, swap_captions
from drrho_clip.data.protocol import DataSplits, Int64, UInt8, ZeroShot
from drrho_clip.data.scene_captions import COLOURS, RELATIONS, SHAPES, SIZES, Objects, describe_scenes, phrase
from drrho_clip.data.shapes import DISTANCES, Float32
from drrho_clip.errors import BadInput

__all__ = ["COLOURS", "RELATIONS", "SHAPES", "SIZES", "STREAMS", "scene_splits", "scenes"]

STREAMS: Final = ("train", "validation", "test", "reference")

# The colours in the order of `COLOURS`.
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
# Radii of small and large objects, in pixels of a 32 x 32 image.
_RADIUS: Final = np.array([4.3, 7.0], dtype=np.float32)
# Largest distance of a shape's points from its centre, in radii.
_REACH: Final = np.float32(1.05)
# Number of scenes in a chunk; see the docstring of this module.
_CHUNK: Final = 1024
_ZERO_SHOT_PER_CLASS: Final = 8


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

    An object has one of 8 shapes, 8 colours and 2 sizes; the first is left of, right of, above or below the second.
    Position, rotation, exact size and colour vary a little, and the background is noisy. A caption may name the objects
    in either order and follows one of several templates.

    Parameters
    ----------
    size : int
        Number of pairs, at least 1.
    seed : int
        At least 0.
    stream : str
        One of `STREAMS`; different streams of one seed hold different scenes. The stream "reference" is for training a
        reference model, which must not see the scenes of the model that it steers.
    swapped_fraction : float
        Share in [0, 1] of the captions that are exchanged among their samples: exactly `round(swapped_fraction * size)`
        captions.
    omit_probability : float
        Probability in [0, 1] with which a caption leaves out each of five attributes (two sizes, two colours, the
        relation). The shapes are always named.
    image_size : int
        Height and width in pixels, at least 16.

    Returns
    -------
    ArrayDataset
        `images` is uint8 (size, image_size, image_size, 3); `is_swapped` marks the exchanged captions and
        `own_captions` are the captions before the exchange. The zero-shot task shows single objects of 64 classes
        (colour, shape).

    Raises
    ------
    BadInput, TypeError
        An argument is outside its domain or has the wrong type.

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
        # A whole chunk is drawn even if fewer scenes are kept, so that a long data set begins like a short one.
        stop = min(start + _CHUNK, size)
        rng = _generator(seed, number, 0, chunk)
        first, second, relation = _two_objects(_CHUNK, image_size, rng)
        images[start:stop] = _render((first, second), stop - start, image_size, rng)
        captioner = _generator(seed, number, 1, chunk)
        own_captions += describe_scenes(first, second, relation, omit_probability, captioner)[: stop - start]
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
        `omit_probability` of held-out captions; by default the same as for the training captions.

    Returns
    -------
    DataSplits
        None of the three data sets shares a scene with `scenes(n, seed=seed, stream="reference")`, the scenes for a
        reference model.

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


def _two_objects(count: int, image_size: int, rng: np.random.Generator) -> tuple[Objects, Objects, Int64]:
    """Draw two objects per scene that do not touch, and the relation of the first object to the second."""
    scale = image_size / 32.0
    kind = rng.integers(0, len(SHAPES) * len(COLOURS), count)
    # The second object is one of the 63 other kinds: between two equal objects, "left of" would have no meaning.
    other = (kind + rng.integers(1, len(SHAPES) * len(COLOURS), count)) % (len(SHAPES) * len(COLOURS))
    sizes = rng.integers(0, len(SIZES), (2, count))
    relation = rng.integers(0, len(RELATIONS), count)
    radii = [_RADIUS[chosen] * _uniform(rng, 0.92, 1.04, count) * np.float32(scale) for chosen in sizes]

    # A disc around each object bounds the object. Along the axis of the relation, the room that the two discs leave is
    # divided at random among both margins and the gap between the discs.
    low_is_first = (relation == 0) | (relation == 2)
    reaches = [radius * _REACH for radius in radii]
    low_reach = np.where(low_is_first, reaches[0], reaches[1])
    high_reach = np.where(low_is_first, reaches[1], reaches[0])
    gap_floor = np.float32(1.0 * scale)
    room = image_size - 2.0 * (low_reach + high_reach) - gap_floor
    cuts = np.sort(rng.random((2, count)), axis=0).astype(np.float32)
    low = low_reach + cuts[0] * room
    high = low + low_reach + high_reach + gap_floor + (cuts[1] - cuts[0]) * room
    # Across that axis the objects may differ in position, but by less than along the axis, so the relation stays clear.
    across_low = low_reach + _uniform(rng, 0.0, 1.0, count) * (image_size - 2.0 * low_reach)
    wander = _uniform(rng, -0.5, 0.5, count) * (high - low)
    across_high = np.minimum(np.maximum(across_low + wander, high_reach), image_size - high_reach)

    # The positions (low, high) on the axis become positions of (first, second), then x and y.
    along_first, along_second = np.where(low_is_first, low, high), np.where(low_is_first, high, low)
    across_first = np.where(low_is_first, across_low, across_high)
    across_second = np.where(low_is_first, across_high, across_low)
    horizontal = relation < 2

    def place(chosen: Int64, size: Int64, radius: Float32, along: Float32, across: Float32) -> Objects:
        x, y = np.where(horizontal, along, across), np.where(horizontal, across, along)
        return Objects(chosen % len(SHAPES), chosen // len(SHAPES), size, radius, x, y)

    return (
        place(kind, sizes[0], radii[0], along_first, across_first),
        place(other, sizes[1], radii[1], along_second, across_second),
        relation,
    )


def _render(objects: tuple[Objects, ...], keep: int, image_size: int, rng: np.random.Generator) -> UInt8:
    """Paint the objects of the first `keep` scenes and add noise; random numbers are drawn for all scenes."""
    count = objects[0].x.shape[0]
    grey = _uniform(rng, 25.0, 105.0, count)
    tint = _uniform(rng, -10.0, 10.0, count * 3).reshape(count, 3)
    jitters = [_uniform(rng, -18.0, 18.0, count * 3).reshape(count, 3) for _ in objects]
    # Each turn is the tangent of half the rotation angle; the angle is at most 8 degrees.
    turns = [_uniform(rng, -0.07, 0.07, count) for _ in objects]
    canvas = np.empty((keep, image_size, image_size, 3), dtype=np.float32)
    canvas[...] = (grey[:keep, None] + tint[:keep])[:, None, None, :]
    centres = np.arange(image_size, dtype=np.float32) + np.float32(0.5)
    for thing, jitter, turn in zip(objects, jitters, turns, strict=True):
        colour = RGB[thing.colour] + jitter
        # Cosine and sine are computed from the tangent of half the angle, because the last bit of `numpy.sin` may
        # differ between machines.
        cosine, sine = (1.0 - turn * turn) / (1.0 + turn * turn), 2.0 * turn / (1.0 + turn * turn)
        for shape, distance in enumerate(DISTANCES.values()):
            rows = np.flatnonzero(thing.shape[:keep] == shape)
            if rows.size == 0:
                continue
            # (dx, dy) are pixel centres relative to the object, in units of its radius; they are rotated below.
            radius = thing.radius[rows, None, None]
            dx = (centres[None, None, :] - thing.x[rows, None, None]) / radius
            dy = (centres[None, :, None] - thing.y[rows, None, None]) / radius
            c, s = cosine[rows, None, None], sine[rows, None, None]
            coverage = np.float32(0.5) - distance(c * dx + s * dy, c * dy - s * dx) * radius
            # The coverage of a pixel is 1/2 on the edge, grows by 1 per pixel inwards, and is limited to [0, 1].
            coverage = np.minimum(np.maximum(coverage, np.float32(0.0)), np.float32(1.0))[..., None]
            under = canvas[rows]
            canvas[rows] = under + coverage * (colour[rows, None, None, :] - under)
    # One random byte gives two numbers in 0 .. 15. Their sum minus 15 is triangular noise in -15 .. 15.
    noise = np.frombuffer(rng.bytes(canvas.size), dtype=np.uint8).reshape(canvas.shape)
    canvas += (noise & 15).astype(np.float32) + (noise >> 4).astype(np.float32) - np.float32(15.0)
    return np.minimum(np.maximum(np.rint(canvas), 0.0), 255.0).astype(np.uint8)


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
    alone = Objects(labels % len(SHAPES), labels // len(SHAPES), sizes, radius, x, y)
    names = tuple(f"{colour} {shape}" for colour in COLOURS for shape in SHAPES)
    prompts = tuple(phrase(None, colour, shape) for colour in range(len(COLOURS)) for shape in range(len(SHAPES)))
    return ZeroShot(names, prompts, _render((alone,), count, size, rng), labels)
