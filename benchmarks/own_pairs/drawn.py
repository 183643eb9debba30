"""Write drawn pictures with captions as a user has them: PNG files, a table of pairs for training, and one for testing.

A picture shows a figure on a coloured ground, and the caption names everything that varies: "a small yellow ring at the
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
# Corners of the figures within the unit disc, in order; a ring also has a hole.
_ROUND: Final = tuple((math.cos(2 * math.pi * k / 48), math.sin(2 * math.pi * k / 48)) for k in range(48))
_ARM: Final = 0.3
FIGURES: Final[dict[str, tuple[tuple[float, float], ...]]] = {
    "circle": _ROUND,
    "ring": _ROUND,
    "square": ((-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8)),
    "triangle": ((0.0, -1.0), (0.95, 0.8), (-0.95, 0.8)),
    "bar": ((-1.0, -0.35), (1.0, -0.35), (1.0, 0.35), (-1.0, 0.35)),
    "cross": (
        *((-_ARM, -1.0), (_ARM, -1.0), (_ARM, -_ARM), (1.0, -_ARM), (1.0, _ARM), (_ARM, _ARM)),
        *((_ARM, 1.0), (-_ARM, 1.0), (-_ARM, _ARM), (-1.0, _ARM), (-1.0, -_ARM), (-_ARM, -_ARM)),
    ),
}
PLACES: Final = {
    "at the top left": (0.28, 0.28),
    "at the top right": (0.72, 0.28),
    "in the middle": (0.5, 0.5),
    "at the bottom left": (0.28, 0.72),
    "at the bottom right": (0.72, 0.72),
}
SIZES: Final = {"small": 0.15, "large": 0.27}
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
    colour_of_ground = _varied(COLOURS[ground], rng)
    image = Image.new("RGB", (large, large), colour_of_ground)
    x, y = (large * (part + rng.uniform(-0.03, 0.03)) for part in PLACES[place])
    radius, turn = large * SIZES[size] * rng.uniform(0.94, 1.06), rng.uniform(-0.1, 0.1)
    cosine, sine = radius * math.cos(turn), radius * math.sin(turn)
    corners = [(x + cosine * a - sine * b, y + sine * a + cosine * b) for a, b in FIGURES[figure]]
    pen = ImageDraw.Draw(image)
    pen.polygon(corners, _varied(COLOURS[colour], rng))
    if figure == "ring":
        hole = 0.55 * radius
        pen.ellipse((x - hole, y - hole, x + hole, y + hole), colour_of_ground)
    pixels = np.asarray(image.resize((side, side), Image.Resampling.BOX), dtype=np.float64)
    noisy = np.clip(pixels + rng.normal(0.0, 6.0, pixels.shape), 0, 255).astype(np.uint8)
    return Image.fromarray(noisy), f"a {size} {colour} {figure} {place} on {ground}"


def _varied(colour: tuple[int, int, int], rng: np.random.Generator) -> tuple[int, int, int]:
    red, green, blue = (int(np.clip(value + rng.integers(-15, 16), 0, 255)) for value in colour)
    return red, green, blue


def _write_table(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)
