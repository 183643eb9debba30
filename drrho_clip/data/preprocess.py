"""Bring images to the size, the channels and the range of numbers that an image encoder reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from drrho_clip.constants import RESIZE_MODES
from drrho_clip.data._checks import whole_number
from drrho_clip.data.protocol import ImageReading, UInt8
from drrho_clip.errors import BadInput, MissingExtra

__all__ = ["check_resize_mode", "normalise", "resample", "resize", "to_channels"]

# The grey of the borders. `normalise` maps this value to 0.004, nearly the middle of the range of the encoders.
_GREY: Final = 128


def resize(images: UInt8 | Sequence[UInt8], image_size: int, mode: ImageReading | str = "crop") -> UInt8:
    """Make images square and bring them to one size.

    Pillow resamples with its bicubic filter. The filter is wider when an image shrinks, so there is no aliasing.

    Parameters
    ----------
    images : ndarray of uint8, shape (b, H, W, C), or a sequence of b arrays of shape (H, W, C)
        C is 1 or 3, the same for all; H and W may differ in a sequence.
    image_size : int
        Height and width s of the result, at least 1.
    mode : {"crop", "fit"} or ImageReading
        "crop" keeps the central square of an image, whose side is the shorter side of the image; what lies outside is
        lost. "fit" keeps the whole image: its longer side becomes s, its shorter side keeps the ratio (but is at least
        1), and borders of equal width in grey (128) fill the square.

    Returns
    -------
    ndarray of uint8, shape (b, s, s, C)
        The input itself if it is an array of that size already; then Pillow is not needed.

    Raises
    ------
    BadInput
        An image is not uint8 of the shape above, there is no image, or the mode is unknown.
    MissingExtra
        Pillow is needed and not installed.

    Examples
    --------
    >>> import numpy as np
    >>> resize(np.zeros((2, 8, 12, 3), np.uint8), 4).shape
    (2, 4, 4, 3)
    >>> resize(np.full((1, 2, 4, 1), 9, np.uint8), 4, mode="fit")[0, :, 0, 0].tolist()
    [128, 9, 9, 128]
    """
    size = whole_number(image_size, "image_size", at_least=1)
    check_resize_mode(mode)
    if isinstance(images, np.ndarray):
        if images.ndim != 4:
            raise BadInput(f"images must have shape (b, H, W, C), got {images.shape}")
        _check_image(images)
        if isinstance(mode, str) and images.shape[1:3] == (size, size):
            return images
    if len(images) == 0:
        raise BadInput("images must hold at least one image, got none")
    return np.stack([_resize_one(image, size, mode) for image in images])


def normalise(images: UInt8) -> npt.NDArray[np.float32]:
    """Map bytes to float32 in [-1, 1]: value / 127.5 - 1.

    Raises
    ------
    BadInput
        The images are not uint8: numbers that were scaled already would be scaled twice.

    Examples
    --------
    >>> import numpy as np
    >>> normalise(np.array([0, 255], np.uint8)).tolist()
    [-1.0, 1.0]
    """
    if images.dtype != np.uint8:
        raise BadInput(f"images must be uint8, got {images.dtype}")
    return images.astype(np.float32) / np.float32(127.5) - np.float32(1.0)


def to_channels(images: UInt8, channels: int) -> UInt8:
    """Turn grey images into RGB or RGB into grey.

    Parameters
    ----------
    images : ndarray of uint8, shape (..., C)
        C is 1 or 3.
    channels : int
        1 or 3. Grey is 0.299 R + 0.587 G + 0.114 B (ITU-R BT.601), rounded.

    Returns
    -------
    ndarray of uint8, shape (..., channels)
        The input itself if it has that number of channels already.

    Raises
    ------
    BadInput
        C or `channels` is neither 1 nor 3, or the images are not uint8.

    Examples
    --------
    >>> import numpy as np
    >>> to_channels(np.array([[200, 100, 50]], np.uint8), 1).tolist()
    [[124]]
    """
    _check_image(images)
    if channels not in (1, 3):
        raise BadInput(f"channels must be 1 or 3, got {channels!r}")
    if images.shape[-1] == channels:
        return images
    if channels == 3:
        return np.repeat(images, 3, axis=-1)
    # Integer arithmetic; adding 500 before the division rounds to the nearest number.
    wide = images.astype(np.uint32)
    grey = (299 * wide[..., 0] + 587 * wide[..., 1] + 114 * wide[..., 2] + 500) // 1000
    return grey.astype(np.uint8)[..., None]


def check_resize_mode(mode: ImageReading | str) -> None:
    """Raise BadInput if there is no such mode of `resize`."""
    if isinstance(mode, str) and mode not in RESIZE_MODES:
        raise BadInput(f"mode must be {' or '.join(map(repr, RESIZE_MODES))}, got {mode!r}")


def _resize_one(image: UInt8, size: int, mode: ImageReading | str) -> UInt8:
    if image.ndim != 3:
        raise BadInput(f"an image must have shape (H, W, C), got {image.shape}")
    _check_image(image)
    height, width, channels = image.shape
    if not isinstance(mode, str):
        square = mode.square(image)
        if square.shape[:2] != (size, size):
            raise BadInput(f"mode must give squares of the size {size}, got {square.shape[:2]}")
        return square
    if mode == "crop":
        # Cutting out the central square is slicing and needs no Pillow.
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        return resample(image[top : top + side, left : left + side], size, size)
    # A panorama can be so flat that its shorter side would vanish.
    longer = max(height, width)
    rows, columns = (max(1, round(side * size / longer)) for side in (height, width))
    top, left = (size - rows) // 2, (size - columns) // 2
    filled = np.full((size, size, channels), _GREY, dtype=np.uint8)
    filled[top : top + rows, left : left + columns] = resample(image, rows, columns)
    return filled


def resample(image: UInt8, rows: int, columns: int) -> UInt8:
    """Return an image with another number of rows and columns; the image itself if it has them already."""
    channels = image.shape[2]
    if image.shape[:2] == (rows, columns):
        return image
    try:
        from PIL import Image
    except ImportError:
        raise MissingExtra("resizing images", "Pillow") from None
    # Pillow has no images with a channel axis of length 1.
    picture = Image.fromarray(np.ascontiguousarray(image[..., 0] if channels == 1 else image))
    resized = np.asarray(picture.resize((columns, rows), Image.Resampling.BICUBIC), dtype=np.uint8)
    return resized.reshape(rows, columns, channels)


def _check_image(images: UInt8) -> None:
    if images.dtype != np.uint8 or images.ndim < 1 or images.shape[-1] not in (1, 3) or 0 in images.shape[-3:]:
        raise BadInput(f"images must be uint8 with 1 or 3 channels last, got {images.dtype} {images.shape}")
