"""Write drawn pictures with captions as a user has them: PNG files, a table of pairs for training, and one for testing.

A picture shows a figure on a coloured ground, and the caption names everything that varies: "a small yellow star at the
bottom right on white". A share of the captions of pairs.csv is swapped among the pictures; test.csv has the right
captions.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

import numpy as np
from PIL import Image, ImageDraw

from drrho_clip.data import swap_captions

COLOURS: Final = {
    "red": (214, 40, 40),
    "orange": (244, 140, 30),
    "yellow": (242, 226, 60),
    "green": (40, 160, 60),
    "blue": (40, 80, 225),
    "purple": (150, 60, 190),
    "white": (245, 245, 245),
    "black": (20, 20, 20),
}
# Number of corners, or of points if the number is negative; a circle is drawn as a polygon with many corners.
FIGURES: Final = {
    "circle": 48,
    "triangle": 3,
    "square": 4,
    "pentagon": 5,
    "star": -5,
    "cross": -4,
}
PLACES: Final = {
    "at the top left": (0.28, 0.28),
    "at the top right": (0.72, 0.28),
    "in the middle": (0.5, 0.5),
    "at the bottom left": (0.28, 0.72),
    "at the bottom right": (0.72, 0.72),
}
SIZES: Final = {"small": 0.13, "large": 0.24}
# The pictures are drawn larger and then reduced, so that edges are smooth.
_OVERSAMPLING: Final = 4


def write_drawn_pictures(
    folder: Path,
    *,
    seed: int,
    size: int = 3000,
    test_size: int = 600,
    swapped_fraction: float = 0.3,
    image_size: int = 64,
) -> None:
    """Write ``pairs.csv``, ``test.csv``, ``truth.csv`` and the pictures into a folder.

    Parameters
    ----------
    folder : Path
        The folder; it is made if it is missing.
    seed : int
        Seed of the pictures and of the swaps.
    size, test_size : int
        Number of pairs in pairs.csv and in test.csv.
    swapped_fraction : float
        Share in [0, 1] of the captions in pairs.csv that belong to another picture.
    image_size : int
        Height and width of the pictures in pixels.
    """
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    own = _draw_part(folder, "pairs", size, image_size, rng)
    test = _draw_part(folder, "test", test_size, image_size, rng)
    captions, is_swapped = swap_captions([caption for _, caption in own], swapped_fraction, rng)
    _write_table(
        folder / "pairs.csv", ("image", "caption"), [(file, new) for (file, _), new in zip(own, captions, strict=True)]
    )
    _write_table(folder / "test.csv", ("image", "caption"), test)
    # Training never reads this file; it says which captions are wrong, so that a ranking of the pairs can be measured.
    truth = [(file, int(swapped), caption) for (file, caption), swapped in zip(own, is_swapped, strict=True)]
    _write_table(folder / "truth.csv", ("image", "is_swapped", "own_caption"), truth)


def _draw_part(folder: Path, name: str, size: int, side: int, rng: np.random.Generator) -> list[tuple[str, str]]:
    """Draw the pictures of one part, and return file and caption of each."""
    pairs = []
    for row in range(size):
        image, caption = _draw(side, rng)
        file = f"images/{name}-{row:05d}.png"
        image.save(folder / file)
        pairs.append((file, caption))
    return pairs


def _draw(side: int, rng: np.random.Generator) -> tuple[Image.Image, str]:
    colours, figures, places, sizes = (list(table) for table in (COLOURS, FIGURES, PLACES, SIZES))
    ground, colour = (colours[number] for number in rng.choice(len(colours), 2, replace=False))
    figure, place, size = (names[rng.integers(len(names))] for names in (figures, places, sizes))
    large = side * _OVERSAMPLING
    image = Image.new("RGB", (large, large), _varied(COLOURS[ground], rng))
    x, y = (large * (part + rng.uniform(-0.04, 0.04)) for part in PLACES[place])
    radius = large * SIZES[size] * rng.uniform(0.92, 1.08)
    corners = _corners(FIGURES[figure], turn=rng.uniform(-0.15, 0.15))
    ImageDraw.Draw(image).polygon([(x + radius * a, y + radius * b) for a, b in corners], _varied(COLOURS[colour], rng))
    pixels = np.asarray(image.resize((side, side), Image.Resampling.BOX), dtype=np.float64)
    noisy = np.clip(pixels + rng.normal(0.0, 8.0, pixels.shape), 0, 255).astype(np.uint8)
    return Image.fromarray(noisy), f"a {size} {colour} {figure} {place} on {ground}"


def _varied(colour: tuple[int, int, int], rng: np.random.Generator) -> tuple[int, int, int]:
    red, green, blue = (int(np.clip(value + rng.integers(-15, 16), 0, 255)) for value in colour)
    return red, green, blue


def _corners(kind: int, turn: float) -> list[tuple[float, float]]:
    """Return the corners of a regular polygon of `kind` corners, or of a star with ``-kind`` points."""
    count = kind if kind > 0 else -2 * kind
    # Every second corner of a star is nearer to the centre.
    radii = [1.0 if kind > 0 or corner % 2 == 0 else 0.4 for corner in range(count)]
    angles = [turn - math.pi / 2 + 2 * math.pi * corner / count for corner in range(count)]
    return [(radius * math.cos(angle), radius * math.sin(angle)) for radius, angle in zip(radii, angles, strict=True)]


def _write_table(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)
