"""Pictures inside the page, as ``data:`` URIs: small pictures as they are, large ones as thumbnails."""

from __future__ import annotations

import base64
import io
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from drrho_clip.errors import BadInput, MissingExtra

try:
    from PIL import Image
except ImportError as error:
    raise MissingExtra("the report", "Pillow") from error

__all__ = ["LARGEST_DRAWN", "Thumbnail", "data_uri", "encode_png", "thumbnail"]

LARGEST_DRAWN = 64
"""Longest side, in pixels, of a picture that the page enlarges without smoothing, as a drawing made of squares."""


class Thumbnail(NamedTuple):
    """A picture that is small enough for a page of hundreds.

    Attributes
    ----------
    uri : str
        The ``data:`` URI of the picture.
    width, height : int
        The size in pixels.
    kind : str
        The CSS class: "photo", or "drawn" if neither side is longer than `LARGEST_DRAWN`.
    """

    uri: str
    width: int
    height: int
    kind: str


def thumbnail(image: NDArray[np.uint8], /, *, side: int = 192) -> Thumbnail:
    """Return a picture as a thumbnail with the same proportions, whose sides are at most `side` pixels.

    Parameters
    ----------
    image : uint8 array (height, width) or (height, width, channels)
        Grey, RGB or RGBA, of any size.
    side : int, default 192
        Longest side in pixels, at least `LARGEST_DRAWN`. A smaller picture keeps its pixels, as a PNG; a larger one
        becomes a JPEG of some kilobytes.

    Raises
    ------
    BadInput
        If `image` has another dtype or shape, or no pixel.

    Examples
    --------
    >>> import numpy as np
    >>> made = thumbnail(np.zeros((400, 800, 3), dtype=np.uint8))
    >>> made.width, made.height, made.kind, made.uri[:15]
    (192, 96, 'photo', 'data:image/jpeg')
    """
    picture = _picture(image)
    width, height = picture.size
    if max(width, height) <= LARGEST_DRAWN:
        return Thumbnail(data_uri(image), width, height, "drawn")
    # The first step of the reduction averages blocks of pixels, which is fast for pictures of many megapixels.
    picture = picture.convert("L" if picture.mode == "L" else "RGB")
    picture.thumbnail((side, side), Image.Resampling.BICUBIC, reducing_gap=3.0)
    file = io.BytesIO()
    picture.save(file, format="JPEG", quality=82)
    return Thumbnail(_uri("jpeg", file.getvalue()), *picture.size, "photo")


def encode_png(image: NDArray[np.uint8], /) -> bytes:
    r"""Encode a picture as a PNG file.

    Parameters
    ----------
    image : uint8 array (height, width) or (height, width, channels)
        Grey (no channel axis or one channel), RGB (three channels) or RGBA (four channels).

    Returns
    -------
    bytes
        The content of the file; the compression is lossless.

    Raises
    ------
    BadInput
        If `image` has another dtype or shape, or no pixel.

    Examples
    --------
    >>> import numpy as np
    >>> encode_png(np.zeros((2, 3), dtype=np.uint8))[:8]
    b'\x89PNG\r\n\x1a\n'
    """
    file = io.BytesIO()
    # The same pixels give the same bytes, because Pillow writes neither a date nor a program's name into a PNG file.
    _picture(image).save(file, format="PNG", optimize=True)
    return file.getvalue()


def data_uri(image: NDArray[np.uint8], /) -> str:
    """Return a picture as a ``data:`` URI, so that a page needs no second file; see `encode_png`."""
    return _uri("png", encode_png(image))


def _uri(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}"


def _picture(image: NDArray[np.uint8]) -> Image.Image:
    """Check an array of pixels and return the array as Pillow's picture."""
    pixels = np.asarray(image)
    # Pillow has no images with a channel axis of length 1.
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[:, :, 0]
    channels = pixels.shape[2:] or (1,)
    if pixels.dtype != np.uint8 or pixels.ndim not in (2, 3) or channels[0] not in (1, 3, 4) or pixels.size == 0:
        raise BadInput(
            "image must be a uint8 array (height, width) or (height, width, 1, 3 or 4) with at least one pixel, "
            f"got {np.asarray(image).dtype} of shape {np.shape(image)}"
        )
    return Image.fromarray(np.ascontiguousarray(pixels))
