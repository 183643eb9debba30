"""Tar shards for tests, as programs for webdataset write them."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

COLOURS = {"red": (220, 20, 20), "green": (20, 200, 20), "blue": (20, 20, 220), "grey": (120, 120, 120)}


def image_bytes(colour: Sequence[int], size: tuple[int, int] = (8, 6), kind: str = "PNG") -> bytes:
    """Return the content of an image file in one colour."""
    stream = io.BytesIO()
    Image.new("RGB", size, tuple(colour)).save(stream, kind)
    return stream.getvalue()


def write_shard(path: Path, files: Iterable[tuple[str, bytes]], *, format: int = tarfile.PAX_FORMAT) -> Path:
    """Write a tar archive of the given names and contents."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as archive:
        for name, content in files:
            member = tarfile.TarInfo(name)
            # webdataset writes the time to a fraction of a second, which needs an extended header.
            member.size, member.mtime = len(content), 1.5
            archive.addfile(member, io.BytesIO(content))
    return path


def sample(key: str, colour: Sequence[int], caption: str = "a thing", kind: str = "PNG") -> list[tuple[str, bytes]]:
    """Return the two files of a sample."""
    return [(f"{key}.{kind.lower()}", image_bytes(colour, kind=kind)), (f"{key}.txt", caption.encode())]


def write_shards(folder: Path, num_pairs: int, num_shards: int = 4, *, kind: str = "PNG") -> str:
    """Write pairs of different images into shards, and return the range that names the shards."""
    names = list(COLOURS)
    rng = np.random.default_rng(0)
    for number, rows in enumerate(np.array_split(np.arange(num_pairs), num_shards)):
        files: list[tuple[str, bytes]] = []
        for row in rows.tolist():
            name = names[row % len(names)]
            colour = [int(value) for value in np.clip(np.array(COLOURS[name]) + rng.integers(-20, 20, 3), 0, 255)]
            files += sample(f"{row:06d}", [*colour[:2], row % 256], f"a {name} picture, number {row}", kind)
        write_shard(folder / f"shards-{number:03d}.tar", files)
    return str(folder / f"shards-{{000..{num_shards - 1:03d}}}.tar")


def _damaged(colour: tuple[int, int, int]) -> bytes:
    """Return a JPEG with both marks that a quick look checks, and nothing that can be decoded between them."""
    content = image_bytes(colour, kind="JPEG")
    return content[:4] + bytes(colour) + b"\xff" * 40 + content[-2:]


def numbered_shard(path: Path, num_pairs: int, damaged: set[int]) -> Path:
    """Write a shard of small JPEG images with the captions "thing 0", "thing 1", ...; some images are damaged."""
    files: list[tuple[str, bytes]] = []
    for row in range(num_pairs):
        image, text = sample(f"{row:04d}", (row % 256, row // 256, 60), f"thing {row}", "JPEG")
        files += [(image[0], _damaged((row % 256, row // 256, 60)) if row in damaged else image[1]), text]
    return write_shard(path, files)
