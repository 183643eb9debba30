"""Batches have every sample at most once an epoch and do not depend on how images are decoded."""

from __future__ import annotations

import threading
import tracemalloc
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from drrho_clip.data.arrays import ArrayDataset
from drrho_clip.data.loader import BatchSource, HostBatch, batches
from drrho_clip.data.order import rows_at
from drrho_clip.data.preprocess import resize
from drrho_clip.data.protocol import Sample, ZeroShot
from drrho_clip.data.tokenizer import WordTokenizer
from drrho_clip.errors import BadInput

_TOKENIZER = WordTokenizer.fit([str(number) for number in range(50)])


class _Decoded:
    """A data set whose images have odd sizes and are not in memory, as in files; decoded images are counted."""

    name = "decoded"

    def __init__(self, size: int, broken: int | None = None) -> None:
        self._size, self._broken = size, broken
        self._lock = threading.Lock()
        self.decoded: list[int] = []

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int, /) -> Sample:
        with self._lock:
            self.decoded.append(index)
        if index == self._broken:
            raise BadInput(f"row {index} is broken")
        image = np.random.default_rng(index).integers(0, 256, (9 + index % 3, 9 + index % 5, 3), dtype=np.uint8)
        return Sample(index, image, str(index))

    @property
    def captions(self) -> tuple[str, ...]:
        return tuple(str(index) for index in range(self._size))

    def fingerprint(self) -> str:
        return "00"

    def image_digests(self) -> np.ndarray:
        return np.arange(self._size, dtype=np.uint8)[:, None].repeat(16, axis=1)

    @property
    def image_ids(self) -> np.ndarray:
        return np.arange(self._size, dtype=np.int64)

    def zero_shot(self, *, image_size: int | None = None, resize_mode: str = "crop") -> ZeroShot | None:
        return None


def _same(left: list[HostBatch], right: list[HostBatch]) -> None:
    assert len(left) == len(right)
    for one, other in zip(left, right, strict=True):
        for field_one, field_other in zip(one, other, strict=True):
            assert (field_one is None) == (field_other is None)
            if field_one is not None:
                np.testing.assert_array_equal(field_one, field_other)


def test_order_of_an_epoch_stays_the_same() -> None:
    # Written down once from `rows_at`: resumed runs depend on it.
    found = [index.tolist() for index in batches(10, 4, seed=3, epoch=2)]
    assert found == [[3, 7, 9, 6], [5, 0, 1, 8]]


def test_batches_of_a_huge_table_are_parts_of_one_order() -> None:
    # The rows of several batches are computed at a time, so the batches before and after a border are compared.
    stream = batches(10**9, 100, seed=3, epoch=2, first_batch=70)
    for number in range(70, 170):
        expected = rows_at(100 * number, 100 * (number + 1), 10**9, seed=3, epoch=2)
        np.testing.assert_array_equal(next(stream), expected)
    assert list(batches(10, 4, seed=0, epoch=0, first_batch=2)) == []


@given(st.data())
def test_batches_are_full_and_share_no_sample(data: st.DataObject) -> None:
    size = data.draw(st.integers(2, 60))
    batch_size = data.draw(st.integers(2, size))
    epoch = data.draw(st.integers(0, 1000))
    found = list(batches(size, batch_size, seed=1, epoch=epoch))
    assert len(found) == size // batch_size
    assert all(index.shape == (batch_size,) and index.dtype == np.int64 for index in found)
    rows = np.concatenate(found)
    assert np.unique(rows).size == rows.size
    assert rows.min() >= 0
    assert rows.max() < size
    again = list(batches(size, batch_size, seed=1, epoch=epoch))
    np.testing.assert_array_equal(np.stack(found), np.stack(again))


def test_epochs_and_seeds_differ() -> None:
    orders = {tuple(next(batches(100, 100, seed=s, epoch=e)).tolist()) for s in range(3) for e in range(3)}
    assert len(orders) == 9


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"batch_size": 11}, BadInput, r"batch_size must be at most the number of samples \(10\), got 11"),
        ({"batch_size": 1}, BadInput, "batch_size must be at least 2, got 1"),
        ({"seed": -1}, BadInput, "seed must be at least 0, got -1"),
        ({"epoch": -1}, BadInput, "epoch must be at least 0, got -1"),
        ({"batch_size": 2.0}, TypeError, "batch_size must be a whole number"),
    ],
)
def test_bad_input_is_named_before_the_first_batch(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        batches(**{"num_samples": 10, "batch_size": 4, "seed": 0, "epoch": 0, **options})
    source = BatchSource(_Decoded(10), _TOKENIZER, image_size=4)
    with pytest.raises(error, match=message):
        source.epoch(**{"batch_size": 4, "seed": 0, "epoch": 0, **options})


@pytest.mark.parametrize("cache_bytes", [0, 2**20])
@pytest.mark.parametrize("num_threads", [0, 1, 3])
def test_batches_do_not_depend_on_threads_or_cache(cache_bytes: int, num_threads: int) -> None:
    plain = BatchSource(_Decoded(23), _TOKENIZER, image_size=6, num_threads=0, cache_bytes=0)
    source = BatchSource(_Decoded(23), _TOKENIZER, image_size=6, num_threads=num_threads, cache_bytes=cache_bytes)
    for epoch in range(2):
        _same(list(source.epoch(4, seed=0, epoch=epoch)), list(plain.epoch(4, seed=0, epoch=epoch)))
    _same(list(source.in_order(10)), list(plain.in_order(10)))
    _same([source.gather([5, 2])], [plain.gather([5, 2])])


def test_images_are_decoded_once_if_the_cache_holds_all() -> None:
    for cache_bytes, times in ((12 * 6 * 6 * 3, 1), (12 * 6 * 6 * 3 - 1, 2)):
        data = _Decoded(12)
        source = BatchSource(data, _TOKENIZER, image_size=6, cache_bytes=cache_bytes)
        data.decoded.clear()
        for _ in range(2):
            list(source.in_order(4))
        assert sorted(data.decoded) == sorted(list(range(12)) * times)


@pytest.mark.parametrize("mode", ["crop", "fit"])
def test_images_become_square_as_the_mode_says(mode: str) -> None:
    data = _Decoded(6)
    source = BatchSource(data, _TOKENIZER, image_size=8, resize_mode=mode)
    for batch in (next(source.epoch(6, seed=0, epoch=0)), source.gather([0, 4]), next(source.in_order(3))):
        expected = resize([data[row].image for row in batch.sample_index.tolist()], 8, mode=mode)
        np.testing.assert_array_equal(batch.images, expected)
    with pytest.raises(BadInput, match="mode must be 'crop' or 'fit', got 'whole'"):
        BatchSource(data, _TOKENIZER, image_size=8, resize_mode="whole")


def test_rows_keep_their_own_image_and_caption() -> None:
    data = _Decoded(20)
    source = BatchSource(data, _TOKENIZER, image_size=9, cache_bytes=0)
    for batch in source.epoch(5, seed=4, epoch=1):
        for row, image, tokens in zip(*batch[:3], strict=True):
            alone = source.gather([row])
            np.testing.assert_array_equal(alone.images[0], image)
            np.testing.assert_array_equal(_TOKENIZER.encode([str(row)])[0], tokens)
    everything = list(source.in_order(6))
    assert [len(batch.sample_index) for batch in everything] == [6, 6, 6, 2]
    assert np.concatenate([batch.sample_index for batch in everything]).tolist() == list(range(20))


@pytest.mark.parametrize(("size", "num_bytes"), [(49_408, 2), (65_536, 2), (65_537, 4)])
def test_tokens_take_two_bytes_if_the_vocabulary_is_that_small(size: int, num_bytes: int) -> None:
    class Tokenizer(WordTokenizer):
        @property
        def vocabulary_size(self) -> int:
            return size

        def encode(self, captions: Iterable[str]) -> np.ndarray:
            return np.array([[size - 1 - int(caption)] * 77 for caption in captions], dtype=np.int32)

    data = _Decoded(2000)
    tracemalloc.start()
    source = BatchSource(data, Tokenizer([], 77), image_size=4, cache_bytes=0)
    kept = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    # Some numbers per row are kept besides the tokens.
    assert num_bytes <= kept / (2000 * 77) < 1.5 * num_bytes
    tokens = source.gather([0, 1999]).tokens
    assert tokens.dtype == np.int32
    np.testing.assert_array_equal(tokens[:, 0], [size - 1, size - 2000])


def test_captions_of_one_image_are_no_negatives_of_each_other() -> None:
    images = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 1), dtype=np.uint8)
    shown = np.array([0, 0, 1, 2, 2, 2, 3, 4, 4])
    data = ArrayDataset("several", images[shown], [str(number) for number in range(9)])
    source = BatchSource(data, _TOKENIZER, image_size=8)
    stream = [*source.epoch(4, seed=0, epoch=0), *source.in_order(4), source.gather([8, 0, 7])]
    assert any(np.unique(shown[batch.sample_index]).size < len(batch.sample_index) for batch in stream)
    for batch in stream:
        assert batch.pair_mask is not None
        assert batch.pair_mask.dtype == np.bool_
        for i, row in enumerate(batch.sample_index):
            for j, other in enumerate(batch.sample_index):
                assert batch.pair_mask[i, j] == (shown[row] != shown[other])


def test_images_with_one_row_each_need_no_mask() -> None:
    source = BatchSource(_Decoded(20), _TOKENIZER, image_size=6)
    assert {batch.pair_mask for batch in [*source.epoch(4, seed=0, epoch=0), source.gather([1, 2])]} == {None}


def test_epoch_resumes_in_the_middle() -> None:
    source = BatchSource(_Decoded(23), _TOKENIZER, image_size=6)
    whole = list(source.epoch(4, seed=0, epoch=3))
    _same(list(source.epoch(4, seed=0, epoch=3, first_batch=2)), whole[2:])
    assert list(source.epoch(4, seed=0, epoch=3, first_batch=5)) == []


def test_images_in_memory_are_not_copied() -> None:
    images = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 1), dtype=np.uint8)
    data = ArrayDataset("grey", images, [str(number) for number in range(6)])
    source = BatchSource(data, _TOKENIZER, image_size=8, cache_bytes=0)
    np.testing.assert_array_equal(source.gather([4, 1]).images, images[[4, 1]])
    wider = BatchSource(data, _TOKENIZER, image_size=16, channels=3)
    assert wider.gather([0]).images.shape == (1, 16, 16, 3)
    assert len(wider) == 6


@pytest.mark.parametrize("consume", [list, next], ids=["to the end", "one batch"])
def test_broken_image_ends_the_epoch_and_the_threads(consume: Callable[[Any], Any]) -> None:
    before = threading.active_count()
    source = BatchSource(_Decoded(40, broken=7), _TOKENIZER, image_size=6)
    stream = source.in_order(4)
    if consume is next:
        assert next(stream).sample_index.tolist() == [0, 1, 2, 3]
        stream.close()  # type: ignore[attr-defined]
    else:
        with pytest.raises(BadInput, match="row 7 is broken"):
            list(stream)
    assert threading.active_count() == before


def test_batch_source_checks_arguments() -> None:
    with pytest.raises(BadInput, match="dataset must hold at least one pair"):
        BatchSource(_Decoded(0), _TOKENIZER, image_size=6)
    with pytest.raises(BadInput, match="image_size must be at least 1"):
        BatchSource(_Decoded(2), _TOKENIZER, image_size=0)
    with pytest.raises(BadInput, match="channels must be 1 or 3, got 2"):
        BatchSource(_Decoded(2), _TOKENIZER, image_size=6, channels=2)
    source = BatchSource(_Decoded(2), _TOKENIZER, image_size=6)
    for rows in ([2], [-1], [], [[0]]):
        with pytest.raises(BadInput, match=r"sample_index must hold rows in 0 \.\. 1"):
            source.gather(rows)
    with pytest.raises(BadInput, match="first_batch must be at least 0"):
        source.epoch(2, seed=0, epoch=0, first_batch=-1)
    with pytest.raises(BadInput, match="batch_size must be at least 1"):
        source.in_order(0)
