"""Data sets in memory, and the exchange of captions."""

from __future__ import annotations

import hashlib
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from drrho_clip.data.arrays import ArrayDataset, exchange_captions, swap_captions
from drrho_clip.data.protocol import Dataset, Sample, ZeroShot, captions_of
from drrho_clip.errors import BadInput

_IMAGES = np.arange(3 * 4 * 4, dtype=np.uint8).reshape(3, 4, 4, 1)


@given(
    captions=st.lists(st.sampled_from("abcdefgh"), max_size=30),
    fraction=st.floats(0.0, 1.0),
    seed=st.integers(0, 2**32),
)
def test_swapping_moves_exactly_the_chosen_captions(captions: list[str], fraction: float, seed: int) -> None:
    swapped, mask = swap_captions(captions, fraction, np.random.default_rng(seed))
    count = round(fraction * len(captions))
    assert mask.sum() == (count if count >= 2 else 0)
    assert sorted(swapped) == sorted(captions)
    changed = np.array([new != old for new, old in zip(swapped, captions, strict=True)], dtype=bool)
    assert not changed[~mask].any()
    chosen = [caption for caption, moved in zip(captions, mask, strict=True) if moved]
    if chosen and max(chosen.count(caption) for caption in chosen) <= len(chosen) / 2:
        assert changed[mask].all()
    again, same = swap_captions(captions, fraction, np.random.default_rng(seed))
    assert again == swapped
    np.testing.assert_array_equal(same, mask)


def test_swapping_never_leaves_a_sample_its_own_caption() -> None:
    captions = [str(number) for number in range(500)]
    for seed in range(20):
        swapped, mask = swap_captions(captions, 0.4, np.random.default_rng(seed))
        assert [new != old for new, old in zip(swapped, captions, strict=True)] == mask.tolist()
        assert mask.sum() == 200


def test_swapping_equal_texts_marks_them() -> None:
    swapped, mask = swap_captions(["same"] * 4, 1.0, np.random.default_rng(0))
    assert swapped == ("same",) * 4
    assert mask.all()


def test_fingerprint_depends_on_images_captions_and_order() -> None:
    base = ArrayDataset("base", _IMAGES, ["ab", "c", "d"])
    assert len(base.fingerprint()) == 64
    assert base.fingerprint() == ArrayDataset("other name", _IMAGES.copy(), ["ab", "c", "d"]).fingerprint()
    others = [
        ArrayDataset("base", _IMAGES[::-1], ["ab", "c", "d"]),
        ArrayDataset("base", _IMAGES, ["a", "bc", "d"]),
        ArrayDataset("base", _IMAGES, ["c", "ab", "d"]),
        ArrayDataset("base", _IMAGES.reshape(3, 2, 8, 1), ["ab", "c", "d"]),
    ]
    assert len({base.fingerprint(), *(other.fingerprint() for other in others)}) == 5


@pytest.mark.parametrize(
    ("images", "captions", "message"),
    [
        (_IMAGES.astype(np.float32), ["a", "b", "c"], "images must be uint8"),
        (_IMAGES[..., 0], ["a", "b", "c"], "images must be uint8 of shape"),
        (np.zeros((3, 4, 4, 2), np.uint8), ["a", "b", "c"], r"images must be uint8 of shape \(n, H, W, 1 or 3\)"),
        (_IMAGES, ["a", "b"], r"captions must have one entry per image \(3\), got 2"),
        (_IMAGES, ["a", " ", "c"], "captions must not be empty"),
    ],
)
def test_message_names_the_bad_argument(images: np.ndarray, captions: list[str], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        ArrayDataset("bad", images, captions)


def test_swap_marks_have_one_entry_per_image() -> None:
    with pytest.raises(BadInput, match="is_swapped must have one entry per image"):
        ArrayDataset("bad", _IMAGES, ["a", "b", "c"], is_swapped=np.zeros(2, dtype=bool))
    with pytest.raises(BadInput, match="own_captions must have one entry per image"):
        ArrayDataset("bad", _IMAGES, ["a", "b", "c"], own_captions=["a"])


def test_repr_and_zero_shot_task_of_an_array_data_set() -> None:
    data = ArrayDataset("base", _IMAGES, ["a", "b", "c"])
    assert repr(data) == "<base: 3 pairs (4, 4, 1), 0 captions swapped>"
    assert data.zero_shot() is None


def test_class_of_a_user_can_be_a_data_set() -> None:
    """A data set may have only the methods of the protocol; its captions are then read sample by sample."""

    class Two:
        name = "two"

        def __len__(self) -> int:
            return 2

        def __getitem__(self, index: int, /) -> Sample:
            return Sample(index, _IMAGES[index], f"caption {index}")

        def fingerprint(self) -> str:
            return "00"

        def image_digests(self) -> np.ndarray:
            return np.zeros((2, 16), np.uint8)

        @property
        def image_ids(self) -> np.ndarray:
            return np.zeros(2, np.int64)

        def zero_shot(self, *, image_size: int | None = None, resize_mode: str = "crop") -> ZeroShot | None:
            return None

    own: Dataset = Two()
    assert captions_of(own) == ("caption 0", "caption 1")


def test_images_are_numbered_by_their_pixels() -> None:
    data = ArrayDataset("twice", np.stack([_IMAGES[1], _IMAGES[0], _IMAGES[1]]), ["a", "b", "c"])
    assert data.image_ids.tolist() == [0, 1, 0]
    assert data.image_ids.dtype == np.int64
    assert data.image_digests()[2].tobytes() == hashlib.sha256(_IMAGES[1].tobytes()).digest()[:16]
    assert ArrayDataset("all", _IMAGES, ["a", "b", "c"]).image_ids.tolist() == [0, 1, 2]


def test_exchanged_captions_of_a_class_are_spread_over_all_other_classes() -> None:
    names = [f"class {number}" for number in range(10)]
    captions = [names[row % 10] for row in range(2000)]
    exchanged, is_swapped = exchange_captions(captions, 0.5, np.random.default_rng(0))
    assert is_swapped.sum() == 1000
    assert [old != new for old, new in zip(captions, exchanged, strict=True)] == is_swapped.tolist()
    # The exchange keeps how often each text occurs.
    assert Counter(exchanged) == Counter(captions)
    for name in names:
        wrong = Counter(new for old, new in zip(captions, exchanged, strict=True) if old == name and new != name)
        assert len(wrong) == 9
        assert max(wrong.values()) < 0.3 * sum(wrong.values())


@pytest.mark.parametrize("fraction", [0.0, 1.0])
def test_exchanged_captions_at_the_ends_of_the_share(fraction: float) -> None:
    exchanged, is_swapped = exchange_captions(["a", "b", "a", "b"], fraction, np.random.default_rng(1))
    assert exchanged == (("a", "b", "a", "b") if fraction == 0.0 else ("b", "a", "b", "a"))
    assert is_swapped.all() == bool(fraction)
