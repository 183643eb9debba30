"""The pairs of the worlds of heads: drawn scenes, Fashion-MNIST, and the drawings of three packages."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

from drrho_clip.data import DEFAULT_PROMPT, open_data, read_pairs, scenes
from drrho_clip.files.disk import write_atomic
from drrho_clip.reproduce.packaged.concepts import Pair
from drrho_clip.reproduce.packaged.packages import FASHION_MNIST
from drrho_clip.reproduce.packaged.pool import Source
from drrho_clip.reproduce.packaged.readers import openclipart, openmoji, stamps

__all__ = ["SOURCES"]


def _scenes(roots: Sequence[Path], folder: Path, num_pairs: int) -> Source:  # noqa: ARG001 (the same signature for all sources)
    """Return drawn scenes; every scene is a concept of its own."""
    pairs = scenes(num_pairs, seed=0, swapped_fraction=0.0)
    return Source(pairs, range(len(pairs)), [-1] * len(pairs))


def _fashion(roots: Sequence[Path], folder: Path, num_pairs: int) -> Source:  # noqa: ARG001 (the same signature for all sources)
    """Return the first photographs of Fashion-MNIST; the content of an image chooses the template of the caption."""
    pairs = open_data(str(FASHION_MNIST.folder(roots))).subset(range(num_pairs))
    names = list(pairs.class_names)
    prompts = [DEFAULT_PROMPT.replace("{}", name) for name in names]
    return Source(pairs, range(len(pairs)), [names.index(label) for label in pairs.labels], prompts)


def _openclipart(roots: Sequence[Path], folder: Path, num_pairs: int) -> Source:
    """Return OpenClipart's drawings; all emoji and all stamps are further test sets."""
    parts = {
        "openclipart": openclipart(roots, folder / "pictures")[:num_pairs],
        "openmoji": openmoji(roots, folder / "pictures"),
        "stamps": stamps(roots, folder / "pictures"),
    }
    pairs: list[Pair] = []
    tests: dict[str, list[int]] = {}
    for name, part in parts.items():
        first = pairs[-1].concept + 1 if pairs else 0
        tests[name] = list(range(len(pairs), len(pairs) + len(part)))
        pairs += [pair._replace(concept=first + pair.concept) for pair in part]
    del tests["openclipart"]
    return _of_files(pairs, folder, tests)


def _of_files(pairs: Sequence[Pair], folder: Path, tests: dict[str, list[int]] | None = None) -> Source:
    """Return the pairs of picture files, whose table is written into the folder."""
    table = io.StringIO(newline="")
    writer = csv.writer(table)
    writer.writerow(("image", "caption"))
    writer.writerows((pair.path.absolute(), pair.caption) for pair in pairs)
    path = folder / "pairs.csv"
    write_atomic(path, table.getvalue().encode())
    return Source(read_pairs(path), [pair.concept for pair in pairs], [-1] * len(pairs), tests=tests)


SOURCES: Final[Mapping[str, Callable[[Sequence[Path], Path, int], Source]]] = {
    "scenes": _scenes,
    "fashion": _fashion,
    "openclipart": _openclipart,
}
"""``source(roots, folder, num_pairs)`` returns pairs of installed packages; files that it makes stay in the folder."""
