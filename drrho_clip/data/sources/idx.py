"""Labelled images in IDX files, the format of MNIST and Fashion-MNIST; captions are made from the names of the classes.

A folder holds `train-images-idx3-ubyte` and `train-labels-idx1-ubyte`, and the same with `t10k` for the test part; each
file may be compressed by gzip (.gz). The Debian package dataset-fashion-mnist installs such a folder. A file
`classes.txt` with a name per line names the classes. Without this file the labels of Fashion-MNIST, which are
recognised by their content, get the names of that data set. Other labels, such as those of MNIST, are named by their
numbers.
"""

from __future__ import annotations

import gzip
import hashlib
import sys
import zlib
from collections.abc import Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from drrho_clip.data.content import bytes_digest, digests_of_pixels
from drrho_clip.data.images import Changed
from drrho_clip.data.pair_source import PairSource, SourceBuilder
from drrho_clip.data.protocol import Int64, UInt8
from drrho_clip.errors import BadInput
from drrho_clip.terminal.printing import say
from drrho_clip.terminal.safe_text import shown

__all__ = ["FASHION_CLASSES", "FASHION_LABELS", "TEMPLATES", "IdxStore", "is_idx_folder", "read_idx"]

FASHION_CLASSES: Final = (
    *("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"),
)
"""The classes of Fashion-MNIST in the order of their numbers."""

FASHION_LABELS: Final = (
    "657fbd221bfc9f4198cc14b5619cc33ec57c58dd0e47af4d99d6650759e869a7",
    "3d0e6c6ea990b53b6f8f500a41cac93881d981b315f84578b7d915342ade01e9",
)
"""SHA-256, in hex, of the labels of Fashion-MNIST behind the header of the file: training part and test part."""

TEMPLATES: Final = ("a photo of a {}", "a picture of a {}", "a small grey {}", "one {} on a dark ground")
"""The templates of the captions; the content of an image chooses the template."""

_PARTS: Final = (("train", 0), ("t10k", 2))
_CLASSES: Final = "classes.txt"
_DIGITS: Final = tuple("0123456789")
_LARGEST: Final = 4 * 2**30


class IdxStore:
    """Images in IDX files, by part and row; the files are read at the first use.

    Parameters
    ----------
    folder : Path
    places : ndarray of int64, shape (m, 2)
        For each record the number of the part and the row in the part.
    """

    kind = "idx"

    def __init__(self, folder: Path, places: Int64) -> None:
        self._folder, self._places = folder, places

    @cached_property
    def _images(self) -> list[UInt8]:
        return [_read_images(file) for file in self.files()]

    def load(self, record: int, digest: bytes) -> UInt8:
        """Return an image, shape (H, W, 1)."""
        part, row = self._places[record].tolist()
        image: UInt8 = self._images[part][row]
        if bytes_digest(image.tobytes()) != digest:
            raise Changed("the image has changed since the data were read")
        return image

    def place(self, record: int) -> str:
        """Return file and row of a record, counted from 0."""
        part, row = self._places[record].tolist()
        return f"{self.files()[part]}, row {row}"

    def image(self, record: int) -> str:
        """Return part and row of an image."""
        part, row = self._places[record].tolist()
        return f"{_PARTS[part][0]}/{row}"

    def files(self) -> Sequence[Path]:
        """Return the files of images."""
        return tuple(_file(self._folder, f"{part}-images-idx3-ubyte") for part, _ in _present(self._folder))

    def describe(self) -> tuple[dict[str, Any], dict[str, npt.NDArray[Any]]]:
        """Return the places of the images."""
        return {}, {"places": self._places}


def is_idx_folder(folder: Path) -> bool:
    """Return whether a folder holds images in IDX files."""
    return any((folder / f"train-images-idx3-ubyte{suffix}").is_file() for suffix in ("", ".gz"))


def read_idx(folder: Path) -> PairSource:
    """Read images and labels, and make a caption for each image from the name of the class.

    Raises
    ------
    BadInput
        A file is missing or damaged, or a label has no name.
    """
    names = _class_names(folder)
    builder, places, parts = SourceBuilder(), [], []
    text_files = [path for path in [folder / _CLASSES] if path.exists()]
    for number, (part, place) in enumerate(_present(folder)):
        images = _read_images(_file(folder, f"{part}-images-idx3-ubyte"))
        file = _file(folder, f"{part}-labels-idx1-ubyte")
        labels = _read(file, 1)
        text_files.append(file)
        if len(labels) != len(images):
            raise BadInput(shown(f"{file} must have a label for each of the {len(images)} images, got {len(labels)}"))
        if labels.size and labels.max() >= len(names):
            raise BadInput(
                shown(f"{file} must have labels below {len(names)}, the number of classes, got {labels.max()}")
                + ": name the classes in classes.txt, one per line"
            )
        for row, (label, digest) in enumerate(zip(labels.tolist(), digests_of_pixels(images), strict=True)):
            caption = TEMPLATES[int(digest[0]) % len(TEMPLATES)].format(names[label])
            builder.add(f"{part}/{row}", (caption,), names[label], digest.tobytes())
            places.append((number, row))
            parts.append(place)
    store = IdxStore(folder, np.array(places, dtype=np.int64).reshape(-1, 2))
    own_parts = np.array(parts, dtype=np.uint8) if any(parts) else None
    return builder.build(folder.name, str(folder), store, parts=own_parts, text_files=text_files)


def _present(folder: Path) -> list[tuple[str, int]]:
    """Return the parts that are there; the training part always is."""
    paths = {part: folder / f"{part}-images-idx3-ubyte" for part, _ in _PARTS}
    there = {part for part, path in paths.items() if path.exists() or Path(f"{path}.gz").exists()}
    return [(part, place) for part, place in _PARTS if part == "train" or part in there]


def _file(folder: Path, name: str) -> Path:
    plain = folder / name
    return plain if plain.exists() else folder / f"{name}.gz"


@lru_cache(maxsize=64)
def _announce(sentence: str) -> None:
    """Print a sentence to standard error, once per process."""
    say(sentence, stream=sys.stderr)


def _class_names(folder: Path) -> tuple[str, ...]:
    path = folder / _CLASSES
    if not path.exists():
        labels = (_read(_file(folder, f"{part}-labels-idx1-ubyte"), 1) for part, _ in _present(folder))
        # One part of Fashion-MNIST is enough, because the other part may be the user's own.
        if any(hashlib.sha256(part.tobytes()).hexdigest() in FASHION_LABELS for part in labels):
            _announce(f"{folder}: the labels are those of Fashion-MNIST, so the classes get the names of that data set")
            return FASHION_CLASSES
        _announce(f"{folder}: the classes are named by their numbers, 0 to 9; {_CLASSES} in the folder names them")
        return _DIGITS
    try:
        names = tuple(line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(shown(f"{path} must be UTF-8 with a class per line, got: {error}")) from None
    if len(names) < 2:
        raise BadInput(shown(f"{path} must name two or more classes, one per line, got {len(names)}"))
    return names


def _read_images(file: Path) -> UInt8:
    return _read(file, 3)[..., None]


def _read(file: Path, num_axes: int) -> UInt8:
    """Return the array of bytes in an IDX file, which must have this number of axes."""
    try:
        content = file.read_bytes()
        if file.suffix == ".gz":
            # The limit keeps a small file from filling the memory.
            with gzip.open(file) as stream:
                content = stream.read(_LARGEST)
    except (OSError, EOFError, zlib.error) as error:
        raise BadInput(shown(f"cannot read {file}: {getattr(error, 'strerror', None) or error}")) from None
    start = 4 + 4 * num_axes
    # The first four bytes are 0, 0, the number of the dtype (8: bytes) and the number of axes.
    if content[:4] != bytes((0, 0, 8, num_axes)) or len(content) < start:
        raise BadInput(shown(f"{file} must be an IDX file of bytes with {num_axes} axes, got another file"))
    shape = tuple(int(size) for size in np.frombuffer(content, ">u4", num_axes, 4))
    values = np.frombuffer(content, np.uint8, offset=start)
    if values.size != int(np.prod(shape, dtype=object)):
        raise BadInput(shown(f"{file} must hold {' x '.join(map(str, shape))} bytes, got {values.size:,}"))
    return values.reshape(shape)
