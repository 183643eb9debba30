"""Augmentation: the bits depend on seed, epoch and row only."""

from __future__ import annotations

import numpy as np
import pytest

from drrho_clip.data.augment import augmented

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (20, 16, 16, 3)).astype(np.uint8)
ROWS = np.arange(100, 120)


def _augmented(images: np.ndarray, rows: np.ndarray, seed: int = 3, epoch: int = 1, area: float = 0.3) -> np.ndarray:
    return augmented(images, rows, seed=seed, epoch=epoch, smallest_area=area, flip=True)


def test_an_image_is_the_same_in_every_batch() -> None:
    whole = _augmented(IMAGES, ROWS)
    order = RNG.permutation(20)
    np.testing.assert_array_equal(_augmented(IMAGES[order], ROWS[order]), whole[order])
    np.testing.assert_array_equal(_augmented(IMAGES[7:8], ROWS[7:8]), whole[7:8])


@pytest.mark.parametrize("changed", [{"seed": 4}, {"epoch": 2}])
def test_seed_and_epoch_change_every_part(changed: dict[str, int]) -> None:
    same = (_augmented(IMAGES, ROWS) == _augmented(IMAGES, ROWS, **changed)).all(axis=(1, 2, 3))
    assert same.mean() < 0.3
    assert not np.array_equal(_augmented(IMAGES, ROWS), _augmented(IMAGES, ROWS + 1))


def test_a_part_lies_in_the_image_and_has_the_asked_area() -> None:
    """Each image is a ramp, so the spread of the grey values measures the part."""
    ramp = np.broadcast_to(np.arange(0, 256, 4, dtype=np.uint8)[None, None, :, None], (400, 64, 64, 1))
    parts = augmented(ramp, np.arange(400), seed=0, epoch=0, smallest_area=0.5).astype(int)
    widths = (parts[:, 0, -1, 0] - parts[:, 0, 0, 0]) / 252
    assert widths.min() > 0.55  # the narrowest part has half of the area and three quarters of the height as width
    assert widths.max() > 0.95
    assert 0.75 < widths.mean() < 0.9


def test_half_of_the_parts_are_mirrored() -> None:
    ramp = np.broadcast_to(np.arange(0, 256, 4, dtype=np.uint8)[None, None, :, None], (400, 64, 64, 1))
    mirrored = [
        (np.diff(parts[:, 0, [0, -1], 0].astype(int), axis=1) < 0).mean()
        for parts in (
            augmented(ramp, np.arange(400), seed=0, epoch=0, smallest_area=0.5, flip=flip) for flip in (False, True)
        )
    ]
    assert mirrored[0] == 0
    assert 0.4 < mirrored[1] < 0.6


def test_the_whole_image_stays_as_it_is() -> None:
    """With a smallest area of 1 a part of another shape does not fit, and the whole image is left."""
    parts = augmented(IMAGES, ROWS, seed=0, epoch=0, smallest_area=1.0)
    assert (parts == IMAGES).all(axis=(1, 2, 3)).mean() > 0.9
