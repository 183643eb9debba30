"""A small table of pictures whose captions are easy to learn, some of them swapped."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from drrho_clip.data import swap_captions

COLOURS = {
    "red": (220, 30, 30),
    "green": (30, 180, 60),
    "blue": (40, 60, 230),
    "yellow": (240, 220, 40),
    "black": (10, 10, 10),
    "white": (245, 245, 245),
    "orange": (250, 140, 20),
    "purple": (140, 40, 180),
}


def write_two_colours(folder: Path, size: int, *, swapped_fraction: float, seed: int = 0) -> npt.NDArray[np.bool_]:
    """Write pictures of 8 x 8 pixels with two colours, and pairs.csv; return which captions are swapped."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    names = list(COLOURS)
    captions = []
    for row in range(size):
        left, right = rng.integers(0, len(names), 2)
        pixels = np.empty((8, 8, 3))
        pixels[:, :4], pixels[:, 4:] = COLOURS[names[left]], COLOURS[names[right]]
        noisy = np.clip(pixels + rng.normal(0.0, 20.0, pixels.shape), 0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(folder / f"{row}.png")
        captions.append(f"{names[left]} beside {names[right]}")
    written, is_swapped = swap_captions(captions, swapped_fraction, rng)
    with (folder / "pairs.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("image", "caption"))
        writer.writerows((f"{row}.png", caption) for row, caption in enumerate(written))
    return is_swapped
