"""Size, channels and range of images."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from drrho_clip.data.preprocess import normalise, resize, to_channels
from drrho_clip.errors import BadInput, MissingExtra


def test_image_of_the_right_size_needs_no_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    images = np.zeros((2, 8, 8, 3), np.uint8)
    assert resize(images, 8) is images
    # Cutting out the central square needs no Pillow either.
    wide = np.arange(2 * 4 * 8, dtype=np.uint8).reshape(2, 4, 8, 1)
    np.testing.assert_array_equal(resize(wide, 4), wide[:, :, 2:6])
    with pytest.raises(MissingExtra, match=r"resizing images needs Pillow: pip install 'drrho-core\[train\]'"):
        resize(images, 4)


def test_resize_keeps_the_central_square() -> None:
    image = np.zeros((10, 30, 3), np.uint8)
    image[:, 10:20] = 200  # exactly the central square
    assert (resize(image[None], 5) == 200).all()
    assert (resize(image.transpose(1, 0, 2)[None], 20) == 200).all()


def test_fit_keeps_the_whole_image_between_grey_borders() -> None:
    image = np.zeros((20, 40, 3), np.uint8)
    image[:, :20] = 200
    wide = resize(image[None], 10, mode="fit")[0]
    assert (wide[:2] == 128).all()
    assert (wide[7:] == 128).all()  # an odd number of border rows: the larger part is at the end
    assert (wide[2:7, :3] == 200).all()
    assert (wide[2:7, 7:] == 0).all()
    np.testing.assert_array_equal(resize(image.transpose(1, 0, 2)[None], 10, mode="fit")[0], wide.transpose(1, 0, 2))
    # A square image has no borders, and then both modes are the same.
    square = np.random.default_rng(0).integers(0, 256, (2, 9, 9, 1), dtype=np.uint8)
    np.testing.assert_array_equal(resize(square, 5, mode="fit"), resize(square, 5))


def test_fit_without_a_change_of_scale_needs_no_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    wide = np.arange(4 * 8, dtype=np.uint8).reshape(1, 4, 8, 1)
    np.testing.assert_array_equal(resize(wide, 8, mode="fit")[:, 2:6], wide)


@pytest.mark.parametrize("mode", ["crop", "fit"])
@pytest.mark.parametrize("shape", [(1, 1), (1, 500), (500, 1), (3, 2000), (2, 3), (7, 64)])
def test_images_of_any_shape_become_squares_in_their_own_colour(shape: tuple[int, int], mode: str) -> None:
    for channels in (1, 3):
        image = np.full((*shape, channels), 200, np.uint8)
        square = resize([image], 32, mode=mode)
        assert square.shape == (1, 32, 32, channels)
        present = set(np.unique(square).tolist())
        assert present == ({200} if mode == "crop" or shape[0] == shape[1] else {128, 200})


def test_unknown_mode_is_refused() -> None:
    with pytest.raises(BadInput, match="mode must be 'crop' or 'fit', got 'stretch'"):
        resize(np.zeros((1, 4, 4, 3), np.uint8), 4, mode="stretch")


def test_shrinking_averages_pixels() -> None:
    board = (np.indices((64, 64)).sum(axis=0) % 2 * 255).astype(np.uint8)[None, ..., None]
    small = resize(board, 16)
    assert small.shape == (1, 16, 16, 1)
    assert np.abs(small[0, 2:-2, 2:-2].astype(int) - 127).max() <= 3  # taking each fourth pixel would give 0 or 255


def test_sequence_may_mix_sizes() -> None:
    images = [np.full((9, 12, 3), 10, np.uint8), np.full((30, 20, 3), 70, np.uint8)]
    resized = resize(images, 6)
    assert resized.shape == (2, 6, 6, 3)
    assert (resized[0] == 10).all()
    assert (resized[1] == 70).all()


@pytest.mark.parametrize(
    "images",
    [
        np.zeros((4, 4, 3), np.uint8),
        np.zeros((1, 4, 4, 2), np.uint8),
        np.zeros((1, 4, 4, 3)),
        np.zeros((1, 0, 4, 3), np.uint8),
        [np.zeros((4, 4), np.uint8)],
        [],
    ],
)
def test_other_arrays_are_refused(images: np.ndarray) -> None:
    with pytest.raises(BadInput, match=r"(images|image) must"):
        resize(images, 2)


def test_image_size_is_a_positive_whole_number() -> None:
    with pytest.raises(BadInput, match="image_size must be at least 1, got 0"):
        resize(np.zeros((1, 4, 4, 3), np.uint8), 0)
    with pytest.raises(TypeError, match="image_size must be a whole number"):
        resize(np.zeros((1, 4, 4, 3), np.uint8), 2.0)  # type: ignore[arg-type]


def test_normalise_maps_bytes_to_minus_one_to_one() -> None:
    values = normalise(np.arange(256, dtype=np.uint8))
    assert values.dtype == np.float32
    np.testing.assert_allclose(values, np.linspace(-1.0, 1.0, 256), atol=1e-6)
    with pytest.raises(BadInput, match="images must be uint8, got float32"):
        normalise(values)  # type: ignore[arg-type]


def test_channels_convert_in_both_directions() -> None:
    grey = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    colour = to_channels(grey, 3)
    assert colour.shape == (1, 16, 16, 3)
    np.testing.assert_array_equal(to_channels(colour, 1), grey)
    assert to_channels(grey, 1) is grey
    primaries = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255]], np.uint8)
    assert to_channels(primaries, 1).ravel().tolist() == [76, 150, 29]  # 255 times 0.299, 0.587, 0.114
    with pytest.raises(BadInput, match="channels must be 1 or 3, got 4"):
        to_channels(grey, 4)
