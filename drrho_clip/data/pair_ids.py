"""The ids of pairs, images and captions by their content, which find the features of a pair in any other data set."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np

from drrho_clip.data.content import DIGEST_SIZE
from drrho_clip.data.protocol import Dataset, Int64, UInt8, captions_of
from drrho_clip.errors import BadInput

__all__ = ["find_ids", "pair_ids", "text_ids"]


def pair_ids(dataset: Dataset) -> UInt8:
    """Return the ids of the pairs of a data set.

    Parameters
    ----------
    dataset : Dataset
        n pairs. No image is decoded.

    Returns
    -------
    ndarray of uint8, shape (n, 32)
        The digest of the image, and then the digest of the caption. Equal pairs have equal ids in every data set.

    Examples
    --------
    >>> from drrho_clip.data import scenes
    >>> pair_ids(scenes(3, seed=0)).shape
    (3, 32)
    """
    return np.concatenate([dataset.image_digests(), text_ids(captions_of(dataset))], axis=1)


def text_ids(captions: Iterable[str]) -> UInt8:
    """Return the digests of captions, shape (n, 16)."""
    # A caption from JSON may hold half of a surrogate pair, which strict UTF-8 cannot encode.
    digests = (hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:DIGEST_SIZE] for text in captions)
    return np.frombuffer(b"".join(digests), dtype=np.uint8).reshape(-1, DIGEST_SIZE)


def find_ids(ids: UInt8, known: UInt8) -> Int64:
    """Return, for each of m ids, the first position in `known`, shape (n, w), that has this id; -1 if there is none.

    Examples
    --------
    >>> find_ids(np.array([[7, 7], [1, 2]], np.uint8), np.array([[1, 2], [7, 7], [1, 2]], np.uint8)).tolist()
    [1, 0]
    """
    if ids.shape[1:] != known.shape[1:]:
        raise BadInput(f"ids must have {known.shape[1]} bytes, got {ids.shape[1]}")
    # NumPy sorts and compares the bytes of an id as one value.
    kind = np.dtype((np.void, known.shape[1]))
    table = np.ascontiguousarray(known).view(kind).ravel()
    keys = np.ascontiguousarray(ids).view(kind).ravel()
    # The sort is stable, so the first of equal ids stays the first.
    order = np.argsort(table, kind="stable")
    places = np.minimum(np.searchsorted(table, keys, sorter=order), max(len(table) - 1, 0))
    rows = order[places] if len(table) else np.full(len(keys), -1)
    return np.where(table[rows] == keys, rows, -1).astype(np.int64) if len(table) else rows.astype(np.int64)
