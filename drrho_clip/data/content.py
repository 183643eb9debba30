"""The identity of images and pairs by their content, so that names, folders and dates of files play no part.

A *digest* is the first 16 bytes of a SHA-256: of the bytes of an image file, or of the pixels of an image in memory.
Two images are the same image if their digests are equal.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from io import BufferedReader
from typing import Final

import numpy as np

from drrho_clip.data.protocol import Int64, UInt8

__all__ = ["DIGEST_SIZE", "bytes_digest", "digests_of_pixels", "file_digest", "fingerprint_of", "image_numbers"]

DIGEST_SIZE: Final = 16
"""Number of bytes of a digest. With 16 bytes two images of a billion collide with a probability below 1e-20."""


def file_digest(file: BufferedReader) -> bytes:
    """Return the digest of an open file, from the current position to the end; the file is read in small parts."""
    return hashlib.file_digest(file, "sha256").digest()[:DIGEST_SIZE]


def bytes_digest(content: bytes) -> bytes:
    """Return the digest of a file whose content is in memory."""
    return hashlib.sha256(content).digest()[:DIGEST_SIZE]


def digests_of_pixels(images: UInt8) -> UInt8:
    """Return the digest of every image of an array.

    Parameters
    ----------
    images : ndarray of uint8, shape (n, H, W, C)

    Returns
    -------
    ndarray of uint8, shape (n, 16)

    Examples
    --------
    >>> import numpy as np
    >>> digests_of_pixels(np.zeros((2, 8, 8, 1), np.uint8)).shape
    (2, 16)
    """
    joined = b"".join(hashlib.sha256(np.ascontiguousarray(image).data).digest()[:DIGEST_SIZE] for image in images)
    return np.frombuffer(joined, dtype=np.uint8).reshape(len(images), DIGEST_SIZE)


def image_numbers(digests: UInt8) -> Int64:
    """Return a number for each image, in the order in which the different images appear first.

    Parameters
    ----------
    digests : ndarray of uint8, shape (n, 16)

    Returns
    -------
    ndarray of int64, shape (n,)
        Rows with equal digests have equal numbers. The numbers are 0 .. k - 1 for k different images.

    Examples
    --------
    >>> import numpy as np
    >>> image_numbers(np.array([[7] * 16, [5] * 16, [7] * 16], np.uint8)).tolist()
    [0, 1, 0]
    """
    # Two numbers of 64 bits per digest are sorted much faster than 16 bytes, and need less memory than a dictionary.
    halves = np.ascontiguousarray(digests).view(np.uint64).reshape(len(digests), 2)
    order = np.lexsort((halves[:, 1], halves[:, 0]))
    is_new = np.ones(len(digests), dtype=np.bool_)
    is_new[1:] = np.any(halves[order[1:]] != halves[order[:-1]], axis=1)
    group = np.empty(len(digests), dtype=np.int64)
    group[order] = np.cumsum(is_new) - 1
    # `lexsort` is stable, so the first row of each group in `order` is the row in which the image appears first.
    number = np.empty(int(is_new.sum()), dtype=np.int64)
    number[np.argsort(order[is_new])] = np.arange(len(number))
    return number[group]


def fingerprint_of(head: Iterable[bytes | memoryview], parts: Iterable[str | bytes]) -> str:
    """Return the SHA-256, in hex, of `head` and then `parts`; the length of each part is hashed before the part.

    Examples
    --------
    >>> fingerprint_of([b"start"], ["ab", "c"]) == fingerprint_of([b"start"], ["a", "bc"])
    False
    """
    digest = hashlib.sha256()
    for piece in head:
        digest.update(piece)
    for part in parts:
        # A caption from JSON may hold half of a surrogate pair, which strict UTF-8 cannot encode.
        encoded = part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part
        digest.update(len(encoded).to_bytes(8, "little"))
        digest.update(encoded)
    return digest.hexdigest()
