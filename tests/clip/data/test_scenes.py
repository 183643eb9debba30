"""The rendered scenes: the same bytes for a seed, disjoint streams, captions that are true."""

from __future__ import annotations

import hashlib
import re

import numpy as np
import pytest

from drrho_clip.data.protocol import Sample, captions_of
from drrho_clip.data.scenes import COLOURS, RELATIONS, RGB, SHAPES, SIZES, STREAMS, scene_splits, scenes
from drrho_clip.errors import BadInput


def _digests(images: np.ndarray) -> set[bytes]:
    return {hashlib.sha256(image.tobytes()).digest() for image in images}


def test_bytes_of_a_seed_stay_the_same() -> None:
    # Written down once from `scenes(1500, seed=7)`; 1500 is more than one chunk. A change here changes every result.
    data = scenes(1500, seed=7)
    assert data.fingerprint() == "651c56a6a065e99ab899221017e49adb658a4a042d6ed5be75bb301e17214b5a"
    task = data.zero_shot()
    assert task is not None
    digest = hashlib.sha256(task.images.tobytes()).hexdigest()
    assert digest == "1c7473ce1337dc59d0ec2476edb23196ccc76c6871833fe2deb3c724a36c0cb1"


def test_short_set_is_the_beginning_of_a_long_set() -> None:
    long = scenes(1100, seed=1)
    for size in (10, 1024, 1030):
        short = scenes(size, seed=1)
        np.testing.assert_array_equal(short.images, long.images[:size])
        assert short.own_captions == long.own_captions[:size]


def test_streams_and_seeds_share_no_image() -> None:
    sets = [scenes(300, seed=seed, stream=stream).images for seed in (0, 1) for stream in STREAMS]
    assert len(set().union(*map(_digests, sets))) == 300 * len(sets)


def test_splits_are_disjoint_clean_and_hold_five_galleries() -> None:
    splits = scene_splits(500, seed=2)
    assert [len(split) for split in splits] == [500, 1000, 1000]
    assert len(set().union(*(_digests(split.images) for split in splits))) == 2500
    assert splits.train.is_swapped.sum() == 150
    for split in splits[1:]:
        assert not split.is_swapped.any()
        assert split.captions == split.own_captions


def test_held_out_captions_omit_attributes_as_training_does_by_default() -> None:
    def mean_words(captions: tuple[str, ...]) -> float:
        return float(np.mean([sum(word in SIZES + COLOURS for word in caption.split()) for caption in captions]))

    usual = scene_splits(1000, omit_probability=0.5)
    assert mean_words(usual.train.own_captions) == pytest.approx(2.0, abs=0.1)  # of 4, each left out half the time
    assert mean_words(usual.test.captions) == pytest.approx(2.0, abs=0.1)
    full = scene_splits(10, omit_probability=0.5, heldout_omit_probability=0.0)
    assert mean_words(full.test.captions) == 4.0


@pytest.mark.parametrize(("fraction", "count"), [(0.0, 0), (0.3, 60), (0.005, 0), (0.01, 2), (1.0, 200)])
def test_exactly_the_stated_number_of_captions_is_swapped(fraction: float, count: int) -> None:
    data = scenes(200, seed=0, swapped_fraction=fraction)
    assert data.is_swapped.sum() == count
    assert sorted(data.captions) == sorted(data.own_captions)
    kept = [new == own for new, own in zip(data.captions, data.own_captions, strict=True)]
    np.testing.assert_array_equal(kept, ~data.is_swapped)


_OBJECT = rf"an? ({'|'.join(SIZES)}) ({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})"
_FULL_CAPTION = re.compile(rf"{_OBJECT}(?: is)?(?: to the)? ({'|'.join(RELATIONS)}) {_OBJECT}$")


def test_captions_are_true_of_the_image() -> None:
    data = scenes(400, seed=5, swapped_fraction=0.0, omit_probability=0.0)
    rows, columns = np.mgrid[0:32, 0:32]
    checked = 0
    areas: dict[tuple[str, str], list[int]] = {}
    for image, caption in zip(data.images, data.captions, strict=True):
        found = _FULL_CAPTION.search(caption)
        assert found is not None, caption
        size_1, colour_1, shape_1, relation, size_2, colour_2, shape_2 = found.groups()
        if colour_1 == colour_2:
            continue
        # Every pixel to the nearest of background and the two named colours: another route than the renderer's.
        pixels = image.astype(np.float64)
        background = np.median(pixels.reshape(-1, 3), axis=0)
        palette = np.stack([background, RGB[COLOURS.index(colour_1)], RGB[COLOURS.index(colour_2)]])
        owner = np.argmin(((pixels[:, :, None] - palette) ** 2).sum(axis=-1), axis=-1)
        masks = [owner == 1, owner == 2]
        assert min(mask.sum() for mask in masks) >= 8, caption
        (x_1, y_1), (x_2, y_2) = ((np.median(columns[mask]), np.median(rows[mask])) for mask in masks)
        truth = {"left of": x_1 < x_2, "right of": x_1 > x_2, "above": y_1 < y_2, "below": y_1 > y_2}
        assert truth[relation], caption
        for size, shape, mask in ((size_1, shape_1, masks[0]), (size_2, shape_2, masks[1])):
            areas.setdefault((shape, size), []).append(int(mask.sum()))
        checked += 1
    assert checked > 300
    for shape in SHAPES:
        assert np.median(areas[shape, "small"]) < 0.6 * np.median(areas[shape, "large"])


def _outline(image: np.ndarray) -> np.ndarray:
    """Cut out the pixels that differ from the background, and resize them to 12 x 12."""
    pixels = image.astype(np.float64)
    difference = np.abs(pixels - np.median(pixels.reshape(-1, 3), axis=0)).sum(axis=-1)
    mask = difference > 0.4 * difference.max()
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    y = np.linspace(rows[0], rows[-1], 12).round().astype(int)
    x = np.linspace(columns[0], columns[-1], 12).round().astype(int)
    return mask[np.ix_(y, x)].astype(np.float64).ravel()


def test_shapes_and_colours_differ_in_the_image() -> None:
    """A nearest neighbour on outlines finds the shape; the nearest colour of the palette is the colour."""
    known, asked = (scenes(1, seed=0, stream=stream).zero_shot() for stream in ("train", "test"))
    assert known is not None
    assert asked is not None
    assert not _digests(known.images) & _digests(asked.images)
    library, queries = (np.stack([_outline(image) for image in task.images]) for task in (known, asked))
    nearest = ((queries[:, None] - library[None]) ** 2).sum(axis=-1).argmin(axis=1)
    assert np.mean(known.labels[nearest] % 8 == asked.labels % 8) > 0.95
    named = []
    for image in asked.images:
        pixels = image.reshape(-1, 3).astype(np.float64)
        away = np.abs(pixels - np.median(pixels, axis=0)).sum(axis=1)
        colour = np.median(pixels[away > 0.8 * away.max()], axis=0)
        named.append(((colour - RGB) ** 2).sum(axis=1).argmin())
    assert np.mean(np.array(named) == asked.labels // 8) > 0.97


def test_zero_shot_has_a_prompt_per_colour_and_shape() -> None:
    task = scenes(1, seed=0).zero_shot()
    assert task is not None
    assert len(task.class_names) == len(task.prompts) == 64
    assert task.prompts[0] == "a red circle"
    assert task.prompts[8] == "an orange circle"
    assert task.class_names[-1] == "white heart"
    np.testing.assert_array_equal(np.bincount(task.labels), np.full(64, 8))
    assert task.images.shape == (512, 32, 32, 3)
    larger = scenes(1, seed=0).zero_shot(image_size=64)
    assert larger is not None
    assert larger.images.shape == (512, 64, 64, 3)


def test_other_image_sizes_show_the_same_kind_of_scene() -> None:
    small, large = (scenes(1, seed=0, image_size=size) for size in (16, 96))
    assert small.images.shape == (1, 16, 16, 3)
    assert large.images.shape == (1, 96, 96, 3)
    assert small.captions == large.captions


def test_rows_are_numbered_from_zero() -> None:
    data = scenes(3, seed=0)
    assert [sample.sample_index for sample in data] == [0, 1, 2]
    assert isinstance(data[np.int64(1)], Sample)
    for index in (-1, 3):
        with pytest.raises(IndexError, match=r"index must lie in 0 \.\. 2, got"):
            data[index]
    with pytest.raises(TypeError, match="whole number"):
        data[1.0]  # type: ignore[call-overload]
    with pytest.raises(ValueError, match="read-only"):
        data[0].image[0] = 0
    assert captions_of(data) == data.captions


def test_subset_is_renumbered_and_keeps_swap_marks() -> None:
    data = scenes(20, seed=0, swapped_fraction=0.5)
    rows = [7, 3, 11]
    part = data.subset(rows)
    assert [sample.sample_index for sample in part] == [0, 1, 2]
    np.testing.assert_array_equal(part.images, data.images[rows])
    np.testing.assert_array_equal(part.is_swapped, data.is_swapped[rows])
    assert part.own_captions == tuple(data.own_captions[row] for row in rows)
    assert part.fingerprint() != data.fingerprint()
    for bad in ([], [1, 1], [20], [-1]):
        with pytest.raises(BadInput, match="rows must"):
            data.subset(bad)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 0}, "size must be at least 1, got 0"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"stream": "dev"}, "stream must be one of train, validation, test, reference, got 'dev'"),
        ({"swapped_fraction": 1.5}, r"swapped_fraction must lie in \[0, 1\], got 1.5"),
        ({"omit_probability": float("nan")}, r"omit_probability must lie in \[0, 1\], got nan"),
        ({"image_size": 8}, "image_size must be at least 16, got 8"),
    ],
)
def test_message_names_the_bad_argument(options: dict[str, object], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        scenes(**{"size": 4, "seed": 0, **options})  # type: ignore[arg-type]


@pytest.mark.parametrize("options", [{"size": 2.0}, {"size": True}, {"seed": "0"}, {"swapped_fraction": "half"}])
def test_wrong_type_is_a_type_error(options: dict[str, object]) -> None:
    with pytest.raises(TypeError, match=next(iter(options))):
        scenes(**{"size": 4, "seed": 0, **options})  # type: ignore[arg-type]
