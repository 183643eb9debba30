"""Pictures of a page: PNG files with the pixels alone, in the address of the picture."""

from __future__ import annotations

import base64
import io
import re
from typing import Any

import numpy as np
import pytest
from PIL import Image

from drrho_clip.errors import BadInput
from drrho_clip.report.pictures import data_uri, encode_png


class TestPng:
    @pytest.mark.parametrize(
        ("shape", "mode"),
        [((5, 7), "L"), ((5, 7, 1), "L"), ((5, 7, 3), "RGB"), ((5, 7, 4), "RGBA"), ((1, 1, 3), "RGB"), ((300, 2), "L")],
    )
    def test_file_holds_the_pixels_and_no_date(self, shape: tuple[int, ...], mode: str) -> None:
        image = np.random.default_rng(0).integers(0, 256, size=shape, dtype=np.uint8)
        data = encode_png(image)
        read = Image.open(io.BytesIO(data))
        assert (read.format, read.mode) == ("PNG", mode)
        np.testing.assert_array_equal(np.asarray(read), image.reshape(shape[:2] if mode == "L" else shape))
        assert set(re.findall(rb"IHDR|PLTE|IDAT|IEND|tIME|tEXt|iTXt|zTXt", data)) == {b"IHDR", b"IDAT", b"IEND"}

    def test_view_is_encoded_like_its_copy(self) -> None:
        image = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
        assert encode_png(image[:, ::-1]) == encode_png(image[:, ::-1].copy()) != encode_png(image)

    def test_data_uri_holds_the_file(self) -> None:
        image = np.zeros((2, 2), dtype=np.uint8)
        head, body = data_uri(image).split(",")
        assert head == "data:image/png;base64"
        assert base64.b64decode(body) == encode_png(image)

    @pytest.mark.parametrize(
        "image",
        [np.zeros((2, 2)), np.zeros(4, np.uint8), np.zeros((2, 2, 2), np.uint8), np.zeros((0, 2, 3), np.uint8)],
    )
    def test_other_arrays_are_refused(self, image: Any) -> None:
        with pytest.raises(BadInput, match=r"image must be a uint8 array .*, got "):
            encode_png(image)
