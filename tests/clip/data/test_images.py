"""Image files: what every kind of picture becomes, and what is refused before training."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from drrho_clip.data.images import MAX_PIXELS
from drrho_clip.data.pairs import read_pairs
from drrho_clip.errors import BadInput


def _decoded(folder: Path, name: str) -> np.ndarray:
    (folder / "one.csv").write_text(f"image,caption\n{name},x\n")
    return read_pairs(folder / "one.csv")[0].image


def test_images_of_every_mode_become_rgb(tmp_path: Path) -> None:
    grey = np.array([[0, 100, 255]], np.uint8)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    np.testing.assert_array_equal(_decoded(tmp_path, "grey.png"), np.repeat(grey[..., None], 3, axis=2))
    Image.fromarray(np.array([[0, 25_600, 65_535]], np.uint16)).save(tmp_path / "deep.png")
    np.testing.assert_array_equal(_decoded(tmp_path, "deep.png"), np.repeat(grey[..., None], 3, axis=2))
    Image.fromarray(grey).convert("RGB").convert("P").save(tmp_path / "palette.gif")
    assert _decoded(tmp_path, "palette.gif").shape == (1, 3, 3)
    Image.new("CMYK", (2, 2), (0, 0, 0, 0)).save(tmp_path / "print.jpg")
    assert (_decoded(tmp_path, "print.jpg") == 255).all()
    Image.new("1", (2, 2), 1).save(tmp_path / "bits.png")
    assert (_decoded(tmp_path, "bits.png") == 255).all()


def test_transparent_pixels_become_white(tmp_path: Path) -> None:
    pixels = np.array([[[50, 60, 70, 255], [0, 0, 0, 0]]], np.uint8)
    Image.fromarray(pixels).save(tmp_path / "clear.png")
    assert _decoded(tmp_path, "clear.png").tolist() == [[[50, 60, 70], [255, 255, 255]]]


def test_exif_orientation_is_respected(tmp_path: Path) -> None:
    picture = Image.new("RGB", (16, 8), "black")
    picture.paste("white", (0, 0, 8, 8))  # white on the left
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise by a quarter: left becomes top
    picture.save(tmp_path / "turned.png", exif=exif)
    image = _decoded(tmp_path, "turned.png")
    assert image.shape == (16, 8, 3)
    assert (image[:8] == 255).all()
    assert (image[8:] == 0).all()


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tiff"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_every_orientation_gives_the_pixels_of_a_turned_copy(suffix: str, mode: str, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 9, 3), np.uint8)
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        name = f"{orientation}.{suffix}"
        Image.fromarray(pixels).convert(mode).save(tmp_path / name, exif=exif)
        # The function of Pillow that copies the picture, while the library turns the picture in place.
        content = io.BytesIO((tmp_path / name).read_bytes())
        turned = ImageOps.exif_transpose(Image.open(content)).convert("RGB")
        np.testing.assert_array_equal(_decoded(tmp_path, name), np.asarray(turned))


def _grey(folder: Path, name: str) -> list[int]:
    image = _decoded(folder, name)
    assert (image == image[..., :1]).all()
    return image[0, :, 0].tolist()


@pytest.mark.parametrize(
    ("values", "grey"),
    [
        # 16 bits: the range is 0 .. 65535 whatever the values are.
        (np.array([[0, 255, 25_600, 65_535]], np.uint16), [0, 0, 100, 255]),
        (np.array([[0, 255, 255]], np.uint16), [0, 0, 0]),
        # 32 bits: the values decide between 0 .. 255 and 0 .. 65535.
        (np.array([[0, 100, 255]], np.int32), [0, 100, 255]),
        (np.array([[0, 256, 25_600, 65_535]], np.int32), [0, 1, 100, 255]),
        (np.array([[0, 65_536]], np.int32), "32-bit pixels must lie in 0 .. 255 or 0 .. 65535, got 0 to 65536"),
        (np.array([[-1, 7]], np.int32), "32-bit pixels must lie in 0 .. 255 or 0 .. 65535, got -1 to 7"),
        # Floating point: 0 is black and 1 is white.
        (np.array([[0.0, 0.5, 1.0]], np.float32), [0, 128, 255]),
        (np.array([[0.0, 1.001]], np.float32), r"floating-point pixels must lie in \[0, 1\], got 0 to 1.001"),
        (np.array([[-0.1, 1.0]], np.float32), r"floating-point pixels must lie in \[0, 1\], got -0.1 to 1"),
        (np.array([[0.0, np.nan]], np.float32), r"floating-point pixels must lie in \[0, 1\], got nan to nan"),
        (np.array([[0.0, np.inf]], np.float32), r"floating-point pixels must lie in \[0, 1\], got 0 to inf"),
    ],
)
def test_pixels_of_more_than_8_bits_are_scaled_by_their_range_or_refused(
    tmp_path: Path, values: np.ndarray, grey: list[int] | str
) -> None:
    Image.fromarray(values).save(tmp_path / "deep.tiff")
    if isinstance(grey, str):
        with pytest.raises(BadInput, match=f"row 2: .*deep.tiff is not a readable image: its {grey}$"):
            _decoded(tmp_path, "deep.tiff")
    else:
        assert _grey(tmp_path, "deep.tiff") == grey


def test_transparency_of_every_mode_becomes_white(tmp_path: Path) -> None:
    red, blue, white = [255, 0, 0], [0, 0, 255], [255, 255, 255]
    indexed = Image.new("P", (3, 1))
    indexed.putdata([0, 1, 2])
    indexed.putpalette([*red, *blue, 0, 255, 0])
    indexed.save(tmp_path / "one colour.png", transparency=2)
    assert _decoded(tmp_path, "one colour.png").tolist() == [[red, blue, white]]
    indexed.save(tmp_path / "bytes.png", transparency=bytes([255, 255, 0]))
    assert _decoded(tmp_path, "bytes.png").tolist() == [[red, blue, white]]
    indexed.save(tmp_path / "clear.gif", transparency=2)
    assert _decoded(tmp_path, "clear.gif").tolist() == [[red, blue, white]]
    Image.fromarray(np.array([[[9, 0], [9, 255]]], np.uint8)).save(tmp_path / "grey.png")
    assert _decoded(tmp_path, "grey.png").tolist() == [[white, [9, 9, 9]]]
    Image.fromarray(np.array([[0, 25_600]], np.uint16)).save(tmp_path / "deep.png", transparency=25_600)
    assert _decoded(tmp_path, "deep.png").tolist() == [[[0, 0, 0], white]]


@pytest.mark.parametrize("suffix", ["gif", "webp", "png", "tiff"])
def test_first_picture_of_an_animation_is_used(tmp_path: Path, suffix: str) -> None:
    pictures = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue", "lime")]
    options: dict[str, Any] = {"lossless": True} if suffix == "webp" else {}
    pictures[0].save(tmp_path / f"film.{suffix}", save_all=True, append_images=pictures[1:], **options)
    assert (_decoded(tmp_path, f"film.{suffix}") == [255, 0, 0]).all()


@pytest.mark.parametrize("suffix", ["bmp", "gif", "jp2", "jpg", "pgm", "png", "tiff", "webp"])
def test_content_and_not_the_suffix_decides_the_format(tmp_path: Path, suffix: str) -> None:
    Image.new("L", (8, 8), 200).save(tmp_path / f"picture.{suffix}")
    (tmp_path / f"picture.{suffix}").rename(tmp_path / "picture.png")
    assert np.abs(_decoded(tmp_path, "picture.png").astype(int) - 200).max() <= 2


_POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(hello) print\n%%EOF\n"


@pytest.mark.parametrize(
    "content",
    [
        _POSTSCRIPT,
        b"%PDF-1.4\n%%EOF\n",
        b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>',
        b"\xd7\xcd\xc6\x9a" + bytes(60),
        b"plain text",
        b"",
        bytes(100),
    ],
)
def test_formats_outside_the_list_are_not_opened(
    tmp_path: Path, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(*arguments: object, **options: object) -> None:
        raise AssertionError(f"another program was started: {arguments}")

    monkeypatch.setattr("subprocess.Popen", start)
    (tmp_path / "picture.png").write_bytes(content)
    with pytest.raises(BadInput, match=r"row 2: .*picture.png is not a readable image: no image in one of the formats"):
        _decoded(tmp_path, "picture.png")


def _png_header(width: int, height: int) -> bytes:
    """A PNG of 1 bit per pixel that claims a size and holds no pixels."""
    chunks = b""
    for name, data in (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)),
        (b"IDAT", b""),
        (b"IEND", b""),
    ):
        chunks += struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    return b"\x89PNG\r\n\x1a\n" + chunks


@pytest.mark.parametrize(
    ("width", "height", "number"),
    [(20_000, 5_001, "20000 x 5001"), (20_000, 20_000, r"\(400000000 pixels\)"), (2**31 - 1, 2**31 - 1, "pixels")],
)
def test_images_of_too_many_pixels_are_refused_by_their_header(
    tmp_path: Path, width: int, height: int, number: str
) -> None:
    assert width * height > MAX_PIXELS
    (tmp_path / "bomb.png").write_bytes(_png_header(width, height))
    with pytest.raises(BadInput, match=rf"row 2: .*bomb.png is not .*: it must have .*100,000,000 pixels.* {number}"):
        _decoded(tmp_path, "bomb.png")


def test_large_image_within_the_limit_is_read_without_a_warning(tmp_path: Path) -> None:
    Image.new("1", (10_000, 9_000)).save(tmp_path / "large.png")
    (tmp_path / "one.csv").write_text("image,caption\nlarge.png,x\n")
    assert len(read_pairs(tmp_path / "one.csv")) == 1
