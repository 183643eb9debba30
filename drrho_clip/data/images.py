"""Image files: the check before training, and the decoding to RGB bytes."""

from __future__ import annotations

import io
import logging
import os
import re
import stat
import struct
import warnings
import zlib
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from io import BufferedReader
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Final, NamedTuple

import numpy as np

from drrho_clip.data.content import bytes_digest, file_digest
from drrho_clip.data.protocol import UInt8
from drrho_clip.errors import MissingExtra

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

__all__ = [
    "FORMATS",
    "MAX_PIXELS",
    "Changed",
    "Inspection",
    "decode_bytes",
    "decode_image",
    "inspect_bytes",
    "inspect_images",
    "one_line",
]

FORMATS: Final = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
"""Formats that are opened, by Pillow's names; for some of the other formats Pillow starts another program."""

MAX_PIXELS: Final = 100_000_000
"""Largest number of pixels of an image; a small file can claim many more pixels than the memory holds."""

_END_OF_JPEG: Final = b"\xff\xd9"
_PILLOW_MODULES: Final = re.compile(r"PIL\.")
# To look the logger up takes a lock and some microseconds, which every image would pay.
_PILLOW_LOGGER: Final = logging.getLogger("PIL")


class Changed(ValueError):
    """An image is no longer the image of the fingerprint; another image must not take its place silently."""


class Inspection(NamedTuple):
    """The digest of an image file, and the reason why the file cannot be used, or None if the file is an image."""

    digest: bytes
    flaw: str | None


def inspect_images(files: Iterable[Path]) -> Mapping[Path, Inspection]:
    """Check image files in threads, and compute their digests; each file is read once.

    Raises
    ------
    MissingExtra
        Pillow is not installed.
    """
    _prepare_pillow()
    different = list(dict.fromkeys(files))
    # Few threads, because each of them may hold a decoded image of the largest size.
    pool = ThreadPoolExecutor(min(4, os.cpu_count() or 1), thread_name_prefix="drrho-inspect")
    try:
        return dict(zip(different, pool.map(_inspect, different), strict=True))
    finally:
        # After Ctrl-C the files that no thread has opened yet are left out.
        pool.shutdown(wait=True, cancel_futures=True)


def decode_image(file: Path, digest: bytes) -> UInt8:
    """Return an image file as RGB, shape (H, W, 3), rotated by the EXIF orientation; transparent parts become white.

    The file must have this digest, so that a run never uses other pictures than those of its fingerprint.

    Raises
    ------
    Exception
        Pillow raises exceptions of almost any class for a damaged file, and `ValueError` is raised for a file that
        has changed or holds no image by the rules of this module.
    MissingExtra
        Pillow is not installed.
    """
    _prepare_pillow()
    with _regular_file(file) as content:
        if file_digest(content) != digest:
            raise Changed("the file has changed since the table was read")
        return _to_rgb(_open(content))


def decode_bytes(content: bytes, digest: bytes) -> UInt8:
    """Return the image of a file whose content is in memory; rules and errors are those of `decode_image`."""
    _prepare_pillow()
    if bytes_digest(content) != digest:
        raise Changed("the image has changed since the data were read")
    return _to_rgb(_open(io.BytesIO(content)))


def inspect_bytes(content: bytes) -> Inspection:
    """Return digest and flaw of an image whose file content is in memory.

    A complete PNG or JPEG is recognised by marks and checksums in a few microseconds, without Pillow. So a JPEG that is
    damaged in the middle is found only when the image is decoded.
    """
    digest = bytes_digest(content)
    if _is_complete_png(content) or (content[:3] == b"\xff\xd8\xff" and content[-2:] == _END_OF_JPEG):
        return Inspection(digest, None)
    _prepare_pillow()
    return Inspection(digest, _flaw(io.BytesIO(content)))


def one_line(error: Exception) -> str:
    """Return the message of an error on one line, or the name of its class if it has no message."""
    return " ".join(str(error).split()) or type(error).__name__


def _prepare_pillow() -> None:
    """Raise MissingExtra if Pillow is missing, and keep Pillow's warnings about files from the terminal."""
    try:
        import PIL.Image  # noqa: F401
    except ImportError:
        raise MissingExtra("reading images", "Pillow") from None
    # Photographs with damaged EXIF blocks are common and harmless. The filter stays, because the images are decoded in
    # threads, and a filter that is set for a while in one thread is set in all threads.
    if not any(entry[0] == "ignore" and entry[3] == _PILLOW_MODULES for entry in warnings.filters):
        warnings.filterwarnings("ignore", category=Warning, module=_PILLOW_MODULES.pattern)
    if not _PILLOW_LOGGER.handlers:
        _PILLOW_LOGGER.addHandler(logging.NullHandler())


def _inspect(file: Path) -> Inspection:
    try:
        with _regular_file(file) as content:
            return Inspection(file_digest(content), _flaw(content))
    except (OSError, ValueError) as error:
        return Inspection(b"", one_line(error))


def _flaw(content: BinaryIO) -> str | None:
    """Return the reason why an open file is no image that can be used, or None if the file is such an image."""
    try:
        picture = _open(content)
        if _is_checked_without_decoding(picture, content):
            picture.verify()
        else:
            _to_rgb(picture)
    # For damaged files Pillow raises exceptions of almost any class.
    except Exception as error:
        return one_line(error)
    return None


def _is_complete_png(content: bytes) -> bool:
    """Return whether all chunks of a PNG have the right checksums, up to the chunk that ends the file."""
    if content[:8] != b"\x89PNG\r\n\x1a\n" or content[12:16] != b"IHDR" or len(content) < 45:
        return False
    width, height, depth, colours = struct.unpack_from(">IIBB", content, 16)
    # The range of the values of a grey PNG of 16 bits is known only when the pixels are read.
    if not 0 < width * height <= MAX_PIXELS or (depth == 16 and colours == 0):
        return False
    position = 8
    while position + 12 <= len(content):
        (size,) = struct.unpack_from(">I", content, position)
        stop = position + 8 + size
        if content[stop : stop + 4] != zlib.crc32(content[position + 4 : stop]).to_bytes(4, "big"):
            return False
        if content[position + 4 : position + 8] == b"IEND":
            return True
        position = stop + 4
    return False


def _is_checked_without_decoding(picture: Picture, content: BinaryIO) -> bool:
    """Return whether header and `verify` show that the file is complete and that the range of its values is known."""
    # The range of the values of these modes is known only when the pixels are read.
    if picture.mode in ("I", "F"):
        return False
    # A PNG has checksums, which `verify` computes, and Pillow opens a WebP file only if all its bytes are there.
    if picture.format in ("PNG", "WEBP"):
        return True
    if picture.format not in ("JPEG", "MPO"):
        return False
    # Most pictures are JPEG files, and decoding all of them would take as long as an epoch. A file that was cut short
    # lacks the mark of the end. A camera may append data to that mark; then the file is decoded too.
    position = content.tell()
    content.seek(-2, os.SEEK_END)
    is_complete = content.read() == _END_OF_JPEG
    content.seek(position)
    return is_complete


def _regular_file(file: Path) -> BufferedReader:
    # Opening a named pipe would wait for a writer, and a device may never end.
    if not stat.S_ISREG(os.stat(file).st_mode):
        raise ValueError("it is not a regular file")
    return file.open("rb")


def _open(content: BinaryIO) -> Picture:
    """Read the header of an image of a listed format; no pixel is decoded."""
    from PIL import Image, UnidentifiedImageError

    Image.init()
    content.seek(0)
    try:
        picture = Image.open(content, formats=[name for name in FORMATS if name in Image.OPEN])
    except UnidentifiedImageError:
        raise ValueError(f"no image in one of the formats {', '.join(FORMATS)}") from None
    except Image.DecompressionBombError as error:
        raise ValueError(f"it must have at most {MAX_PIXELS:,} pixels: {error}") from None
    width, height = picture.size
    if not 0 < width * height <= MAX_PIXELS:
        raise ValueError(f"it must have 1 to {MAX_PIXELS:,} pixels, got {width} x {height}")
    return picture


def _to_rgb(picture: Picture) -> UInt8:
    """Return the pixels of an open image; the image is rotated in place."""
    from PIL import Image, ImageOps

    # A copy of a picture that needs no rotation would take as long as a tenth of the decoding.
    ImageOps.exif_transpose(picture, in_place=True)
    if picture.mode == "F" or picture.mode.startswith("I"):
        values = np.asarray(picture)
        grey = _grey_bytes(values, picture.mode)
        # Pillow's own conversions ignore the value that a PNG of 16 bits declares to be transparent.
        if isinstance(clear := picture.info.get("transparency"), int):
            grey[values == clear] = 255
        return np.repeat(grey[..., None], 3, axis=-1)
    # Pillow's conversion to RGB drops the transparency and shows colours that are invisible in the picture.
    if picture.has_transparency_data:
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture.convert("RGBA"))
    # `convert` copies a picture that has this mode already.
    return np.array(picture if picture.mode == "RGB" else picture.convert("RGB"), dtype=np.uint8)


def _grey_bytes(values: np.ndarray, mode: str) -> UInt8:
    """Return grey values of more than 8 bits as bytes; the range of the values decides about the scale."""
    low, high = values.min(), values.max()
    if mode == "F":
        # nan fails every comparison, so this condition also refuses nan.
        if not (low >= 0.0 and high <= 1.0):
            raise ValueError(f"its floating-point pixels must lie in [0, 1], got {low:g} to {high:g}")
        return np.rint(values * 255.0).astype(np.uint8)
    # The name of a mode with 16 bits per pixel begins with "I;16". Pillow opens all other integer pictures as mode "I",
    # which does not say how many of the 32 bits the values use.
    if mode == "I" and not (low >= 0 and high <= 65_535):
        raise ValueError(f"its 32-bit pixels must lie in 0 .. 255 or 0 .. 65535, got {low} to {high}")
    if mode == "I" and high <= 255:
        return values.astype(np.uint8)
    return (values.astype(np.int64) >> 8).astype(np.uint8)
