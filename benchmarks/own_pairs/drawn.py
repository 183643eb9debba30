"""Write drawn pictures with captions as a user has them: PNG files, a table of training pairs and a table of test pairs.

The pictures are the built-in scenes. Every caption names all attributes of the two objects, so that most captions fit
one picture only. A share of the captions of pairs.csv is swapped among the pictures; test.csv has the right captions.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path

from PIL import Image

from drrho_clip.data import ArrayDataset, scenes


def write_drawn_pictures(
    folder: Path,
    *,
    seed: int,
    size: int = 3000,
    test_size: int = 600,
    swapped_fraction: float = 0.3,
    image_size: int = 64,
    omit_probability: float = 0.0,
) -> None:
    """Write ``pairs.csv``, ``test.csv``, ``truth.csv`` and the pictures into a folder.

    Parameters
    ----------
    folder : Path
        A folder that does not hold pairs.csv; it is made if it is missing.
    seed : int
        Seed of the scenes and of the swaps.
    size, test_size : int
        Number of pairs in pairs.csv and in test.csv.
    swapped_fraction : float
        Share in [0, 1] of the captions in pairs.csv that belong to another picture.
    image_size : int
        Height and width of the pictures in pixels.
    omit_probability : float
        Probability in [0, 1] with which a caption leaves out each of five attributes.
    """
    (folder / "images").mkdir(parents=True, exist_ok=True)
    common = {"seed": seed, "image_size": image_size, "omit_probability": omit_probability}
    pairs = scenes(size, swapped_fraction=swapped_fraction, **common)
    test = scenes(test_size, stream="test", swapped_fraction=0.0, **common)
    _write_part(folder, "pairs", pairs)
    _write_part(folder, "test", test)
    # Training never reads this file; it says which captions are wrong, so that a ranking of the pairs can be measured.
    truth = zip(pairs.is_swapped.astype(int).tolist(), pairs.own_captions, strict=True)
    _write_table(folder / "truth.csv", ("row", "is_swapped", "own_caption"), ((row, *t) for row, t in enumerate(truth)))


def _write_part(folder: Path, name: str, data: ArrayDataset) -> None:
    files = [f"images/{name}-{row:05d}.png" for row in range(len(data))]
    for file, image in zip(files, data.images, strict=True):
        Image.fromarray(image).save(folder / file)
    _write_table(folder / f"{name}.csv", ("image", "caption"), zip(files, data.captions, strict=True))


def _write_table(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)
