"""Augmentation: a random part of each original image, resized to the square of the model, and perhaps mirrored.

The part is cut out of the image as its file holds it, before any resizing: the area and the shape of a part count in
the original image, as in open_clip. The random numbers of an image depend on the seed, the epoch and the row of the
data set only. So the bits are the same whichever process or thread decodes the image, and a resumed run repeats them.
"""

from __future__ import annotations

import math
import threading
from typing import Any, Final, NamedTuple

import numpy as np

from drrho_clip.data.preprocess import resample, to_channels
from drrho_clip.data.protocol import Readable, Sample, UInt8

__all__ = ["Augmentation", "KeptImages"]

# Distinguishes the numbers of the augmentation from other random numbers of the same seed.
_STREAM: Final = 0x41554753
# Smallest and largest ratio of width to height of a part, the usual ones of a random resized crop.
_RATIOS: Final = (3 / 4, 4 / 3)
_TRIES: Final = 10


class Augmentation(NamedTuple):
    """The way in which training images change from epoch to epoch.

    Attributes
    ----------
    seed : int
        At least 0; together with epoch and row it determines the random numbers.
    smallest_area : float
        Smallest share, in (0, 1], of the original image that a part may have; the largest share is 1.
    flip : bool
        Mirror each part with probability 1/2. Captions that say left and right are then wrong.
    """

    seed: int
    smallest_area: float
    flip: bool = False

    def square(self, image: UInt8, size: int, channels: int, *, row: int, epoch: int) -> UInt8:
        """Return a random part of an image as a square.

        Parameters
        ----------
        image : ndarray of uint8, shape (H, W, C)
            The original image with 1 or 3 channels.
        size, channels : int
            Side s of the square, and the number of channels of the square, 1 or 3.
        row, epoch : int
            Row of the image in the data set, and the epoch, both at least 0.

        Returns
        -------
        ndarray of uint8, shape (s, s, channels)
            The part with both sides resized to s by the bicubic filter, so the shape of the part is not kept.

        Raises
        ------
        MissingExtra
            If Pillow is needed and not installed.

        Examples
        --------
        >>> image = np.arange(6 * 9, dtype=np.uint8).reshape(6, 9, 1)
        >>> Augmentation(seed=0, smallest_area=0.3).square(image, 4, 3, row=5, epoch=2).shape
        (4, 4, 3)
        """
        rng = np.random.default_rng([self.seed, _STREAM, epoch, row])
        height, width = image.shape[:2]
        left, top, columns, rows = _box(width, height, rng, self.smallest_area)
        part = to_channels(image[top : top + rows, left : left + columns], channels)
        square = resample(part, size, size)
        return square[:, ::-1] if self.flip and rng.random() < 0.5 else square


def _box(width: int, height: int, rng: np.random.Generator, smallest_area: float) -> tuple[int, int, int, int]:
    """Return left, top, width and height of a part of an image."""
    low, high = (math.log(ratio) for ratio in _RATIOS)
    for _ in range(_TRIES):
        area = width * height * rng.uniform(smallest_area, 1.0)
        ratio = math.exp(rng.uniform(low, high))
        columns, rows = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < columns <= width and 0 < rows <= height:
            left, top = rng.integers(0, width - columns + 1), rng.integers(0, height - rows + 1)
            return int(left), int(top), columns, rows
    # No part of that area fits, as in a panorama: then the part is the largest central one with an allowed ratio.
    columns = min(width, max(1, round(height * _RATIOS[1])))
    rows = min(height, max(1, round(width / _RATIOS[0])))
    return (width - columns) // 2, (height - rows) // 2, columns, rows


class KeptImages:
    """The pairs of a data set, of whose decoded images as many stay in memory as fit; the others are decoded again.

    Which images are in memory depends on the threads, but an image has the same bytes either way.

    Parameters
    ----------
    samples : Readable
        The data set, or the part of the data set that reads images.
    most_bytes : int
        Memory limit for the original images, at least 0.

    Examples
    --------
    >>> from drrho_clip.data import scenes
    >>> kept = KeptImages(scenes(3, seed=0), 2**20)
    >>> kept[2].image is kept[2].image
    True
    """

    def __init__(self, samples: Readable, most_bytes: int) -> None:
        self._samples, self._most_bytes = samples, most_bytes
        self._kept: dict[int, Sample] = {}
        self._lock = threading.Lock()

    def __getitem__(self, index: int) -> Sample:
        """Return the pair with this row id."""
        sample = self._kept.get(index)
        if sample is None:
            sample = self._samples[index]
            with self._lock:
                if index not in self._kept and sample.image.nbytes <= self._most_bytes:
                    self._kept[index] = sample
                    self._most_bytes -= sample.image.nbytes
        return sample

    def __reduce__(self) -> tuple[Any, ...]:
        """Return what another process gets: the pairs alone, because each process would need memory of its own."""
        return KeptImages, (self._samples, 0)
