"""Augmentation: parts of the original image, whose bits depend on seed, epoch and row only."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from drrho_clip.data import BatchSource, Dataset, PairsDataset, WordTokenizer, open_data, scenes
from drrho_clip.data.augment import Augmentation, KeptImages

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (20, 16, 24, 3)).astype(np.uint8)
ROWS = np.arange(100, 120)
_TOKENIZER = WordTokenizer(["thing"], 2)


def _augmented(images: np.ndarray, rows: np.ndarray, seed: int = 3, epoch: int = 1, area: float = 0.3) -> np.ndarray:
    augmentation = Augmentation(seed, area, flip=True)
    pairs = zip(images, rows.tolist(), strict=True)
    return np.stack([augmentation.square(image, 16, 3, row=row, epoch=epoch) for image, row in pairs])


def _parts_of_ramps(width: int, height: int, area: float, *, flip: bool = False) -> np.ndarray:
    """Return (400, s, s, 3) parts of an image that is 4 x + 4 y i: red measures the columns, green the rows."""
    ramp = np.zeros((height, width, 3), dtype=np.uint8)
    ramp[..., 0] = np.linspace(0, 255, width)
    ramp[..., 1] = np.linspace(0, 255, height)[:, None]
    augmentation = Augmentation(0, area, flip=flip)
    return np.stack([augmentation.square(ramp, 32, 3, row=row, epoch=0) for row in range(400)]).astype(int)


def test_seed_epoch_and_row_change_every_part() -> None:
    first = _augmented(IMAGES, ROWS)
    np.testing.assert_array_equal(_augmented(IMAGES, ROWS), first)
    for other in (_augmented(IMAGES, ROWS, seed=4), _augmented(IMAGES, ROWS, epoch=2), _augmented(IMAGES, ROWS + 1)):
        assert (other == first).all(axis=(1, 2, 3)).mean() < 0.3


@pytest.mark.parametrize(("width", "height"), [(64, 64), (200, 100), (90, 160)])
def test_area_and_shape_of_a_part_count_in_the_original_image(width: int, height: int) -> None:
    parts = _parts_of_ramps(width, height, 0.25)
    columns = (parts[:, 0, -1, 0] - parts[:, 0, 0, 0]) / 255 * width
    rows = (parts[:, -1, 0, 1] - parts[:, 0, 0, 1]) / 255 * height
    areas, ratios = columns * rows / (width * height), columns / rows
    # Resampling loses half a pixel of the square at each border, so the measures are a little too small.
    assert 0.18 < areas.min() < 0.35
    assert areas.max() < 1
    assert 0.7 < ratios.min() < 0.85
    assert 1.2 < ratios.max() < 1.45
    # Parts reach both ends of the longer side, which the central square of the image would not.
    longer = parts[..., 0] if width >= height else parts[..., 1]
    assert longer.min() < 10
    assert longer.max() > 245


def test_a_panorama_gives_a_central_part_if_no_part_of_the_area_fits() -> None:
    parts = _parts_of_ramps(300, 50, 0.95)
    assert (parts == parts[0]).all()
    # The part has 67 of the 300 columns, which is 4/3 of the height, around the middle.
    assert abs(parts[0, 0, 0, 0] + parts[0, 0, -1, 0] - 255) <= 2
    assert 45 < parts[0, 0, -1, 0] - parts[0, 0, 0, 0] < 60


def test_half_of_the_parts_are_mirrored() -> None:
    mirrored = [
        (np.diff(_parts_of_ramps(64, 64, 0.5, flip=flip)[:, 0, [0, -1], 0], axis=1) < 0).mean()
        for flip in (False, True)
    ]
    assert mirrored[0] == 0
    assert 0.4 < mirrored[1] < 0.6


def test_the_whole_square_image_stays_as_it_is() -> None:
    """With a smallest area of 1 a part of another shape does not fit, and the whole image is left."""
    squares = np.ascontiguousarray(IMAGES[:, :, :16])
    augmentation = Augmentation(0, 1.0)
    parts = [augmentation.square(image, 16, 3, row=row, epoch=0) for row, image in enumerate(squares)]
    assert (np.stack(parts) == squares).all(axis=(1, 2, 3)).mean() > 0.9


def _pictures(folder: Path) -> PairsDataset:
    """Return pairs of 23 wide pictures of different sizes."""
    folder.mkdir()
    for number in range(23):
        pixels = RNG.integers(0, 256, (20 + number, 50, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    rows = [f"{number}.png,thing {number}\n" for number in range(23)]
    (folder / "pairs.csv").write_text("image,caption\n" + "".join(rows))
    return open_data(folder / "pairs.csv")


def _source(dataset: Dataset, **options: int) -> BatchSource:
    augmentation = Augmentation(seed=3, smallest_area=0.3, flip=True)
    return BatchSource(dataset, _TOKENIZER, image_size=8, augmentation=augmentation, **options)


def _images(source: BatchSource, epoch: int, first_batch: int = 0) -> list[np.ndarray]:
    return [batch.images for batch in source.epoch(5, seed=3, epoch=epoch, first_batch=first_batch)]


@pytest.mark.parametrize(
    "options",
    [
        {"num_threads": 0},
        {"num_threads": 3, "cache_bytes": 0},
        {"num_threads": 2, "cache_bytes": 30_000},  # a few of the originals fit
        {"num_threads": 1, "num_workers": 2},
    ],
)
def test_parts_are_those_of_the_original_pictures_whoever_reads_them(tmp_path: Path, options: dict[str, int]) -> None:
    data = _pictures(tmp_path / "pictures")
    augmentation = Augmentation(seed=3, smallest_area=0.3, flip=True)
    source = _source(data, **options)
    for epoch in (0, 1, 0):
        for batch in source.epoch(5, seed=3, epoch=epoch):
            for row, image in zip(batch.sample_index.tolist(), batch.images, strict=True):
                expected = augmentation.square(data[row].image, 8, 3, row=row, epoch=epoch)
                np.testing.assert_array_equal(image, expected)
    # A resumed run begins in the middle of an epoch, with nothing in memory.
    for image, expected in zip(_images(_source(data, **options), 1, 2), _images(source, 1)[2:], strict=True):
        np.testing.assert_array_equal(image, expected)
    # Whole images serve evaluation.
    plain = BatchSource(data, _TOKENIZER, image_size=8)
    np.testing.assert_array_equal(source.gather([4, 2]).images, plain.gather([4, 2]).images)


def test_images_in_memory_give_parts_as_well() -> None:
    data = scenes(12, seed=0)
    batch = next(_source(data).epoch(12, seed=3, epoch=1))
    augmentation = Augmentation(seed=3, smallest_area=0.3, flip=True)
    for row, image in zip(batch.sample_index.tolist(), batch.images, strict=True):
        np.testing.assert_array_equal(image, augmentation.square(data[row].image, 8, 3, row=row, epoch=1))


def test_originals_stay_in_memory_as_far_as_the_limit_allows(tmp_path: Path) -> None:
    data = _pictures(tmp_path / "pictures")
    kept = KeptImages(data, data[0].image.nbytes + data[1].image.nbytes)
    images = [kept[row].image for row in (0, 1, 2)]
    assert [kept[row].image is image for row, image in enumerate(images)] == [True, True, False]
    np.testing.assert_array_equal(kept[2].image, images[2])
