"""Divide the images of a source into training, validation and test by the content of the images."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from typing import Final

import numpy as np

from drrho_clip.data._checks import share, whole_number
from drrho_clip.data.columns import ColumnNames
from drrho_clip.data.content import image_numbers
from drrho_clip.data.labels import class_names_of
from drrho_clip.data.pair_source import MAX_UNREADABLE, ImageStore, PairSource, require_readable
from drrho_clip.data.pairs import PairsDataset
from drrho_clip.data.protocol import DataSplits, Int64
from drrho_clip.data.sources import read_source
from drrho_clip.errors import BadInput
from drrho_clip.terminal.safe_text import shown

__all__ = ["pair_splits"]

# Least number of images in each split. In a gallery of one image every answer would be right.
_LEAST_IMAGES: Final = 2


def pair_splits(
    path: str | os.PathLike[str],
    *,
    validation: str | os.PathLike[str] | None = None,
    test: str | os.PathLike[str] | None = None,
    validation_share: float = 0.1,
    test_share: float = 0.1,
    seed: int = 0,
    image_column: str | None = None,
    caption_column: str | None = None,
    label_column: str | None = None,
    max_unreadable: float = MAX_UNREADABLE,
) -> DataSplits:
    """Read data of any kind and hold out a part of its images for validation and test.

    A hash of the seed and of the image's content decides the split of an image. So the split does not change when rows
    are appended or files are renamed, and all captions of one image are in one split, also if the table names the image
    by several paths or has several copies of the file. A held-out split that would get fewer than two images also takes
    the images with the next hashes. Data that come with a validation or a test part keep that part.

    Parameters
    ----------
    path : path
        The data, as `open_data` takes them.
    validation, test : path, optional
        Separate data for these splits; tables have the same columns. No images of `path` are held out for such a split.
    validation_share, test_share : float
        Expected share of the images that are held out, in [0, 1]. The sum of the two shares must be below 1.
    seed : int
        At least 0; another seed holds out other images.
    image_column, caption_column, label_column
        As in `open_data`.
    max_unreadable : float
        The largest share of the images, in [0, 1], that may be unreadable; these images are left out.

    Returns
    -------
    DataSplits
        No image is in two splits.

    Raises
    ------
    BadInput
        For the reasons of `open_data`, or because there are too few images or two sources share an image.
    MissingExtra
        A library that the data need is not installed.
    """
    whole_number(seed, "seed", at_least=0)
    shares = (
        0.0 if validation is not None else share(validation_share, "validation_share"),
        0.0 if test is not None else share(test_share, "test_share"),
    )
    if sum(shares) >= 1.0:
        raise BadInput(f"validation_share + test_share must stay below 1, got {sum(shares):g}")
    names = ColumnNames(image_column, caption_column, label_column)

    def read(given: str | os.PathLike[str]) -> PairSource:
        source = read_source(given, names)
        require_readable(source, max_unreadable)
        return source

    # All sources are read before anything is divided, so that every flaw is reported first.
    source = read(path)
    others = [None if given is None else read(given) for given in (validation, test)]
    chosen = _divide(source, seed, shares, [other is not None for other in others])
    parts = [(source, chosen[0])]
    for other, rows in zip(others, chosen[1:], strict=True):
        parts.append((source, rows) if other is None else (other, np.arange(len(other), dtype=np.int64)))
    _check_disjoint(parts)
    # The splits of one source share the classes, also if a split lacks a class.
    different = {id(part): part for part, _ in parts}.values()
    class_names = class_names_of(part.class_names for part in different)
    titles = (source.name, f"{source.name}-validation", f"{source.name}-test")
    return DataSplits(
        *(
            PairsDataset(part, name=title, rows=rows, class_names=class_names, max_unreadable=max_unreadable)
            for title, (part, rows) in zip(titles, parts, strict=True)
        )
    )


def _divide(source: PairSource, seed: int, shares: Sequence[float], separate: Sequence[bool]) -> list[Int64]:
    """Return the rows of training, validation and test; a part with a separate source gets no rows."""
    digests = source.digests[source.record_of]
    numbers = image_numbers(digests)
    first = np.unique(numbers, return_index=True)[1]
    num_images = len(first)
    # The part of each image, if the source has parts of its own. An image that is in several parts is held out.
    part_of = np.zeros(num_images, dtype=np.int64)
    own = (
        np.zeros(len(source), dtype=np.int64)
        if source.parts is None
        else source.parts[source.record_of].astype(np.int64)
    )
    np.maximum.at(part_of, numbers, own)
    # So a training pair is left out if its image is held out too.
    is_used = own == part_of[numbers]
    # The images are sorted by their hashes: the first share is validation, the next is test, the rest is training.
    keys = [digest.tobytes().hex() for digest in digests[first]]
    places = np.array([_place(seed, key) for key in keys])
    # Only images without a part of their own are divided.
    undivided = np.flatnonzero(part_of == 0)
    order = undivided[np.lexsort((np.array(keys)[undivided], places[undivided]))]
    start, limit = 0, 0.0
    for number, (is_separate, part) in enumerate(zip(separate, shares, strict=True), start=1):
        # A part that the source has itself is used as it is.
        if is_separate or np.any(part_of == number):
            continue
        limit += part
        count = int(np.sum(places[order] < limit)) - start
        stop = start + max(count, _LEAST_IMAGES)
        part_of[order[start:stop]] = number
        start = stop
    if len(order) - start < _LEAST_IMAGES:
        raise BadInput(
            f"{source.path} must have images for every split, got {num_images} different ones, "
            f"of which {num_images - len(order) + start} would be held out: lower the shares, or name tables for "
            "validation and test"
        )
    return [np.flatnonzero(is_used & (part_of[numbers] == number)).astype(np.int64) for number in range(3)]


def _place(seed: int, key: str) -> float:
    """Return an image's place in [0, 1): a hash, divided by the number of possible hashes; equal on every machine."""
    digest = hashlib.blake2b(f"{seed}\0{key}".encode(), digest_size=8).digest()
    # 53 bits of the hash are used, because a float64 holds 53 bits exactly.
    return (int.from_bytes(digest, "little") >> 11) / 2.0**53


def _check_disjoint(parts: Sequence[tuple[PairSource, Int64]]) -> None:
    """Raise BadInput if two parts share an image, which is possible only if they come from different sources."""
    if all(source is parts[0][0] for source, _ in parts):
        return
    digests = np.concatenate([source.digests[source.record_of[rows]] for source, rows in parts])
    numbers = image_numbers(digests)
    split = np.repeat(np.arange(len(parts)), [len(rows) for _, rows in parts])
    # The first row of each image, and then the rows of the image that are in another split.
    first = np.unique(numbers, return_index=True)[1][numbers]
    shared = np.flatnonzero(split != split[first])
    if not shared.size:
        return
    # A position in `digests` belongs to one part and to one row of the part.
    starts = np.cumsum([0, *(len(rows) for _, rows in parts)])

    def store_and_record(position: int) -> tuple[ImageStore, int]:
        source, rows = parts[split[position]]
        return source.store, int(source.record_of[rows[position - starts[split[position]]]])

    (store, record), (other, earlier) = store_and_record(int(shared[0])), store_and_record(int(first[shared[0]]))
    where = f"{store.place(record)}: image {store.image(record)} is in another split too ({other.place(earlier)})"
    raise BadInput(
        f"{shown(where)}; training, validation and test must not share images, got "
        f"{len(np.unique(numbers[shared]))} shared images"
    )
