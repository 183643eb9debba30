"""Scikit-learn's digits with captions measured from the images."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from sklearn.datasets import load_digits

from drrho_clip.data.digits import DIGITS, PARTS, digit_splits, digits
from drrho_clip.errors import BadInput, MissingExtra

_BUNCH = load_digits()


def _rows(images: np.ndarray) -> list[int]:
    """Find images in scikit-learn's own array; all 1,797 differ."""
    place = {image.astype(np.uint8).tobytes(): row for row, image in enumerate(_BUNCH.images)}
    assert len(place) == 1797
    return [place[np.rint(image[..., 0] * (16 / 255)).astype(np.uint8).tobytes()] for image in images]


def _digit_of(caption: str) -> int:
    found = [number for number, name in enumerate(DIGITS) if name in caption.replace(",", "").split()]
    assert len(found) == 1, caption
    return found[0]


def test_pairs_of_a_seed_stay_the_same() -> None:
    # Written down once; a change here changes every result.
    assert digits("train", seed=7).fingerprint() == "7935e14e6c88b9dd938a36a6d67a91091756dc6e64611607cf98a16856a78c13"
    assert digits("test", seed=7).fingerprint() == "7f8b8817a73b229f65924ebe50e370190ea004d07da1708c87cfb6f37a419ccd"


def test_parts_hold_every_image_once_and_are_stratified() -> None:
    parts = {part: digits(part, seed=3) for part in PARTS}
    rows = [row for data in parts.values() for row in _rows(data.images)]
    assert sorted(rows) == list(range(1797))
    for part in ("validation", "test"):
        labels = _BUNCH.target[_rows(parts[part].images)]
        np.testing.assert_array_equal(np.bincount(labels), np.full(10, 20))
    assert (len(parts["train"]), len(parts["reference"])) == (699, 698)
    counts = np.bincount(_BUNCH.target[_rows(parts["train"].images)])
    assert counts.min() >= 66
    assert counts.max() <= 72


def test_reference_share_moves_images_between_reference_and_training() -> None:
    assert len(digits("train", reference_share=0.0)) == 1397
    assert len(digits("reference", reference_share=1.0)) == 1397
    with pytest.raises(BadInput, match=r"reference_share must leave images for reference, got 0\.0"):
        digits("reference", reference_share=0.0)


@pytest.mark.parametrize("part", PARTS)
def test_captions_name_the_digit(part: str) -> None:
    data = digits(part, swapped_fraction=0.0)
    assert [_digit_of(caption) for caption in data.captions] == _BUNCH.target[_rows(data.images)].tolist()


def test_captions_follow_from_the_measures() -> None:
    """Thin digits have less ink than medium ones, and so on; the measures are recomputed in floating point."""
    data = digits("test")
    ink = _BUNCH.images[_rows(data.images)]
    y, x = np.mgrid[0:8, 0:8]
    total = ink.sum(axis=(1, 2))
    mean_x, mean_y = ((ink * axis).sum(axis=(1, 2)) / total for axis in (x, y))
    dx, dy = (axis[None] - mean[:, None, None] for axis, mean in ((x, mean_x), (y, mean_y)))
    lean = -(ink * dx * dy).sum(axis=(1, 2)) / (ink * dy**2).sum(axis=(1, 2))
    spread = (ink * dx**2).sum(axis=(1, 2)) / total
    for words, measure in (
        (("thin", "medium", "bold"), total),
        (("narrow", "regular", "wide"), spread),
        (("leaning left", "upright", "leaning right"), lean),
        (("heavy at the top", "balanced", "heavy at the bottom"), mean_y),
    ):
        groups = [measure[[word in caption for caption in data.captions]] for word in words]
        assert sum(map(len, groups)) == 200
        assert min(map(len, groups)) > 40
        assert groups[0].max() < groups[1].min() <= groups[1].max() < groups[2].min()


def test_held_out_captions_have_one_template_and_carry_more_than_the_class() -> None:
    for part in ("validation", "test"):
        data = digits(part)
        assert all(caption.startswith("a ") and " handwritten " in caption for caption in data.captions)
        assert len(set(data.captions)) > 100


def test_training_captions_vary_and_can_be_swapped() -> None:
    splits = digit_splits(swapped_fraction=0.5)
    assert splits.train.is_swapped.sum() == round(0.5 * 699)
    kept = np.array([new == own for new, own in zip(splits.train.captions, splits.train.own_captions, strict=True)])
    np.testing.assert_array_equal(kept, ~splits.train.is_swapped)
    starts = {caption.split()[0] + " " + caption.split()[1] for caption in splits.train.own_captions}
    assert {"a photo", "the digit"} < starts
    told = digits("train", omit_probability=0.0, swapped_fraction=0.0).captions
    assert sum(", " in caption for caption in told) > sum(", " in caption for caption in splits.train.own_captions)


def test_article_of_eight_is_an() -> None:
    captions = [c for part in PARTS for c in digits(part, swapped_fraction=0.0, omit_probability=0.6).captions]
    assert any("an eight" in caption for caption in captions)
    assert not any("a eight" in caption for caption in captions)


def test_zero_shot_classes_are_the_digits() -> None:
    task = digits("test").zero_shot()
    assert task is not None
    assert task.class_names == DIGITS
    assert task.prompts[7] == "a photo of the digit seven"
    np.testing.assert_array_equal(task.labels, _BUNCH.target[_rows(task.images)])
    sized = digits("test").zero_shot(image_size=12)
    assert sized is not None
    assert sized.images.shape == (200, 12, 12, 1)


@pytest.mark.parametrize(
    ("part", "options", "message"),
    [
        ("dev", {}, "part must be one of train, validation, test, reference, got 'dev'"),
        ("test", {"swapped_fraction": 0.1}, "swapped_fraction must be 0 for test"),
        ("train", {"swapped_fraction": -0.1}, r"swapped_fraction must lie in \[0, 1\], got -0.1"),
        ("train", {"reference_share": 2}, r"reference_share must lie in \[0, 1\], got 2"),
        ("train", {"seed": -3}, "seed must be at least 0, got -3"),
    ],
)
def test_message_names_the_bad_argument(part: str, options: dict[str, float], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        digits(part, **options)  # type: ignore[arg-type]


def test_missing_scikit_learn_is_named_with_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    sys.modules["drrho_clip.data.digits"]._load.cache_clear()
    with pytest.raises(MissingExtra, match=r"needs scikit-learn: pip install 'drrho-core\[train\]'"):
        digits("train")
