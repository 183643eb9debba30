"""The data sets of the example: three packages of drawings, and photographs of clothes."""

from __future__ import annotations

import gzip
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
from PIL import Image

from drrho_clip.files.disk import write_atomic
from drrho_clip.reproduce.packaged.concepts import Pair
from drrho_clip.reproduce.packaged.packages import (
    FASHION_MNIST,
    OPENCLIPART_PNG,
    OPENCLIPART_SVG,
    OPENMOJI,
    STAMPS,
    Package,
)
from drrho_clip.reproduce.packaged.readers import openclipart, openmoji, stamps

_CLOTHES: Final = (
    *("a T-shirt", "a pair of trousers", "a pullover", "a dress", "a coat"),
    *("a sandal", "a shirt", "a sneaker", "a bag", "an ankle boot"),
)
CLASSES: Final = tuple(f"a photo of {name}" for name in _CLOTHES)
"""The captions of the classes of Fashion-MNIST."""
# The first images of the training and of the test part of Fashion-MNIST are used.
FASHION_TRAIN, FASHION_TEST = 6_000, 2_000


def fashion_mnist(roots: Sequence[Path], made: Path) -> list[Pair]:
    """Return photographs of clothes; the caption names the class, and every image is a concept of its own.

    The names of the files of test images begin with "t10k"; these images come last.
    """
    folder = FASHION_MNIST.folder(roots)
    made.mkdir(parents=True, exist_ok=True)
    pairs: list[Pair] = []
    for part, size in (("train", FASHION_TRAIN), ("t10k", FASHION_TEST)):
        with gzip.open(folder / f"{part}-labels-idx1-ubyte.gz") as file:
            labels = np.frombuffer(file.read()[8:], dtype=np.uint8)[:size]
        with gzip.open(folder / f"{part}-images-idx3-ubyte.gz") as file:
            idx = file.read(16 + size * 784)
        pixels = np.frombuffer(idx, dtype=np.uint8, offset=16).reshape(-1, 28, 28)
        for row, (image, label) in enumerate(zip(pixels, labels, strict=True)):
            path = made / f"{part}-{row:05d}.png"
            if not path.exists():
                content = io.BytesIO()
                Image.fromarray(image).save(content, format="PNG")
                write_atomic(path, content.getvalue())
            pairs.append(Pair(path, CLASSES[label], len(pairs)))
    return pairs


class Source(NamedTuple):
    """A data set: title, reader, packages, and the share of training captions that the example swaps."""

    title: str
    pairs: Callable[[Sequence[Path], Path], list[Pair]]
    packages: Sequence[Package]
    swapped: float


SOURCES: Final[Mapping[str, Source]] = {
    "openclipart": Source("OpenClipart, titles as they are", openclipart, (OPENCLIPART_PNG, OPENCLIPART_SVG), 0.0),
    "openmoji": Source("OpenMoji, annotations", openmoji, (OPENMOJI,), 0.0),
    "stamps": Source("Tux Paint's stamps, captions", stamps, (STAMPS,), 0.0),
    "fashion-mnist": Source("Fashion-MNIST, captions of classes, 30 % swapped", fashion_mnist, (FASHION_MNIST,), 0.3),
}
