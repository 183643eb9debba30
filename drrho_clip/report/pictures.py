"""Pictures inside the page: PNG files as ``data:`` URIs."""

from __future__ import annotations

import base64
import io

import numpy as np
from numpy.typing import NDArray

from drrho_clip.errors import BadInput, MissingExtra

try:
    from PIL import Image
except ImportError as error:
    raise MissingExtra("the report", "Pillow") from error

__all__ = ["data_uri", "encode_png"]


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
    file = io.BytesIO()
    # The same pixels give the same bytes, because Pillow writes neither a date nor a program's name into a PNG file.
    Image.fromarray(np.ascontiguousarray(pixels)).save(file, format="PNG", optimize=True)
    return file.getvalue()


def data_uri(image: NDArray[np.uint8], /) -> str:
    """Return a picture as a ``data:`` URI, so that a page needs no second file; see `encode_png`."""
    return "data:image/png;base64," + base64.b64encode(encode_png(image)).decode("ascii")
