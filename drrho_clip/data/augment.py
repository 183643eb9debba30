"""Augmentation: a random part of each image, resized to the whole square, and perhaps mirrored.

The random numbers of an image depend on the seed, the epoch and the row of the data set only. So the bits are the same
whichever process or thread decodes the image, and a resumed run repeats them.
"""

from __future__ import annotations

import math

import numpy as np

from drrho_clip.data.protocol import Int64, UInt8
from drrho_clip.errors import MissingExtra

__all__ = ["augmented"]

# Distinguishes the numbers of the augmentation from other random numbers of the same seed.
_STREAM = 0x41554753
# Smallest and largest ratio of width to height of a part, the usual ones of a random resized crop.
_RATIOS = (3 / 4, 4 / 3)
_TRIES = 10


def augmented(
    images: UInt8, sample_index: Int64, *, seed: int, epoch: int, smallest_area: float, flip: bool = False
) -> UInt8:
    """Return a random part of each image, resized to the size of the image.

    Parameters
    ----------
    images : ndarray of uint8, shape (b, s, s, C)
        Images with 1 or 3 channels.
    sample_index : ndarray of int64, shape (b,)
        Row of each image in the data set.
    seed, epoch : int
        At least 0; together with the row they determine the random numbers.
    smallest_area : float
        Smallest share, in (0, 1], of the image that a part may have; the largest share is 1.
    flip : bool
        Mirror each part with probability 1/2. Captions that say left and right are then wrong.

    Returns
    -------
    ndarray of uint8, shape (b, s, s, C)

    Examples
    --------
    >>> images = np.arange(3 * 8 * 8, dtype=np.uint8).reshape(3, 8, 8, 1)
    >>> both = augmented(images, np.asarray([4, 5, 6]), seed=0, epoch=2, smallest_area=0.3)
    >>> alone = augmented(images[1:2], np.asarray([5]), seed=0, epoch=2, smallest_area=0.3)
    >>> bool(np.array_equal(both[1:2], alone))
    True
    """
    parts = [
        _part(image, np.random.default_rng([seed, _STREAM, epoch, row]), smallest_area, flip)
        for image, row in zip(images, sample_index.tolist(), strict=True)
    ]
    return np.stack(parts)


def _part(image: UInt8, rng: np.random.Generator, smallest_area: float, flip: bool) -> UInt8:
    """Return a random part of one image (s, s, C), resized to (s, s, C)."""
    try:
        from PIL import Image
    except ImportError:
        raise MissingExtra("augmenting images", "Pillow") from None
    size = image.shape[0]
    left, top, width, height = _box(size, rng, smallest_area)
    # Pillow has no images with an axis of one channel.
    picture = Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image)
    box = (left, top, left + width, top + height)
    resized = np.asarray(picture.resize((size, size), Image.Resampling.BILINEAR, box=box), dtype=np.uint8)
    resized = resized.reshape(image.shape)
    return resized[:, ::-1] if flip and rng.random() < 0.5 else resized


def _box(size: int, rng: np.random.Generator, smallest_area: float) -> tuple[int, int, int, int]:
    """Return left, top, width and height of a part; the whole image if no try fits into the image."""
    low, high = (math.log(ratio) for ratio in _RATIOS)
    for _ in range(_TRIES):
        area = size * size * rng.uniform(smallest_area, 1.0)
        ratio = math.exp(rng.uniform(low, high))
        width, height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < width <= size and 0 < height <= size:
            left, top = rng.integers(0, size - width + 1), rng.integers(0, size - height + 1)
            return int(left), int(top), width, height
    return 0, 0, size, size
