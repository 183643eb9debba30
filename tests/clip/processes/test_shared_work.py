"""Parts of a run that processes share: the rows of each batch, encoding, and work that may fail on one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from drrho_clip.data import BatchSource, Dataset, HostBatch, WordTokenizer, open_data, readable_rows
from drrho_clip.data.order import rows_at
from drrho_clip.encode import Encoder
from drrho_clip.encoders import ForeignEncoder
from drrho_clip.errors import AgreedError, BadInput
from drrho_clip.evaluate import evaluate
from drrho_clip.models import MLPModel, ModelSpec, initial_parameters
from drrho_clip.processes.encoding import SharedEncoder, features_of_rows
from drrho_clip.processes.opening import check_batch_size
from drrho_clip.processes.together import of_first, together, together_with_values, written_by_first
from drrho_core.backend import get_backend
from helpers.shards import numbered_shard
from helpers.thread_processes import ThreadProcesses

_TOKENIZER = WordTokenizer(["thing"], 2)


def _source(shard: Path, share: float = 0.2, **options: Any) -> BatchSource:
    return BatchSource(open_data(shard, max_unreadable=share), _TOKENIZER, image_size=4, **options)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("num_threads", [0, 2])
def test_the_parts_of_all_processes_are_the_batches_of_one_process(tmp_path: Path, size: int, num_threads: int) -> None:
    order = rows_at(0, 60, 60, seed=3, epoch=1).tolist()
    # Two pairs of batch 0, the pair that follows the batch, and a pair of the last batch.
    damaged = {order[1], order[10], order[12], order[59]}
    shard = numbered_shard(tmp_path / "s.tar", 60, damaged)
    expected = list(_source(shard).epoch(12, seed=3, epoch=1))

    def own(processes: ThreadProcesses) -> tuple[list[HostBatch], dict[int, str]]:
        # Every process has a data set of its own.
        source = _source(shard, num_threads=num_threads)
        return list(source.epoch(12, seed=3, epoch=1, processes=processes)), dict(source.unreadable)

    parts = ThreadProcesses.run(size, own)
    for number, whole in enumerate(expected):
        batch = [batches[number] for batches, _ in parts]
        assert len(set(whole.sample_index.tolist())) == 12
        assert not damaged & set(whole.sample_index.tolist())
        np.testing.assert_array_equal(np.concatenate([part.sample_index for part in batch]), whole.sample_index)
        np.testing.assert_array_equal(np.concatenate([part.images for part in batch]), whole.images)
        for part in batch:
            np.testing.assert_array_equal(part.rows, whole.sample_index)
    for _, unreadable in parts:
        assert set(unreadable) == damaged


def test_too_many_unreadable_images_are_one_error_on_all_processes(tmp_path: Path) -> None:
    order = rows_at(0, 24, 24, seed=0, epoch=0).tolist()
    # One damaged pair per process is within the limit; both together are too many.
    shard = numbered_shard(tmp_path / "s.tar", 24, {order[0], order[6]})

    def message(processes: ThreadProcesses) -> str:
        source = _source(shard, share=0.05, num_threads=0)
        with pytest.raises(BadInput) as caught:
            list(source.epoch(12, seed=0, epoch=0, processes=processes))
        return str(caught.value)

    messages = ThreadProcesses.run(2, message)
    assert messages[0] == messages[1]
    assert "at most 5.00% of 24 pairs may have unreadable images" in messages[0]


def test_an_unreadable_image_without_permission_is_an_error_that_names_the_process(tmp_path: Path) -> None:
    order = rows_at(0, 24, 24, seed=0, epoch=0).tolist()
    shard = numbered_shard(tmp_path / "s.tar", 24, {order[6]})

    def message(processes: ThreadProcesses) -> str:
        with pytest.raises(AgreedError) as caught:
            list(_source(shard, share=0.0).epoch(12, seed=0, epoch=0, processes=processes))
        return str(caught.value)

    messages = ThreadProcesses.run(2, message)
    assert messages[0] == messages[1]
    assert messages[0].startswith("process 1: ")


class _Counted(ForeignEncoder):
    """An encoder of another program that remembers which captions it has encoded."""

    name, image_size, feature_dims, temperature = "counted", 4, (48, 2), 0.1
    weights, preprocessing, tokenizer = "0", {"image": "none", "text": "none"}, _TOKENIZER  # type: ignore[assignment]

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def read_image(self, image: np.ndarray) -> np.ndarray:
        """Return the pixels of a small square."""
        return np.resize(image, (4, 4, 3)).astype(np.float64)

    def encode_images(self, images: np.ndarray) -> np.ndarray:
        """Return the pixels as features."""
        self.sizes.append(len(images))
        return images.reshape(len(images), -1) + 1.0

    def encode_texts(self, tokens: np.ndarray) -> np.ndarray:
        """Return the tokens as features."""
        return tokens[:, :2] + 1.0


def _encoder() -> Encoder:
    backend = get_backend("numpy", dtype="float64")
    spec = ModelSpec("mlp", image_size=4, channels=3, vocabulary_size=3, context_length=2, feature_dim=6, width=4)
    parameters = initial_parameters(spec, seed=0)
    return Encoder(backend, MLPModel(spec, backend.xp), parameters, spec, _TOKENIZER)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("damaged", [(), (3, 17)])
def test_shared_encoding_gives_the_features_and_figures_of_one_process(
    tmp_path: Path, size: int, damaged: tuple[int, ...]
) -> None:
    shard = numbered_shard(tmp_path / "s.tar", 23, set(damaged))

    def data() -> Dataset:
        return open_data(shard, max_unreadable=0.2)

    alone, rows = _encoder(), np.asarray([4, 9, 0, 22, 11, 6, 2])
    whole = data()
    expected = alone.pairs(whole, batch_size=5)
    figures = evaluate(alone, whole, gallery_size=8)

    def work(processes: ThreadProcesses) -> tuple[Any, ...]:
        own = data()
        encoder = SharedEncoder(_encoder(), processes)
        source = BatchSource(own, _TOKENIZER, image_size=4, channels=3)
        return (
            *encoder.pairs(own, batch_size=5),
            encoder.images_of(own, rows, batch_size=2),
            encoder.texts(["thing"] * 3, batch_size=1),
            *features_of_rows(_encoder(), source, rows, processes, batch_size=2),
            evaluate(encoder, own, gallery_size=8),
            sorted(own.unreadable),  # type: ignore[attr-defined]
        )

    for image, text, of_rows, texts, row_images, row_texts, measured, unreadable in ThreadProcesses.run(size, work):
        np.testing.assert_array_equal(image, expected[0])
        np.testing.assert_array_equal(text, expected[1])
        np.testing.assert_array_equal(of_rows, alone.images_of(whole, rows, batch_size=2))
        np.testing.assert_array_equal(texts, alone.texts(["thing"] * 3, batch_size=1))
        np.testing.assert_array_equal(row_images, of_rows)
        assert row_texts.shape == (7, 6)
        assert measured == figures
        assert unreadable == sorted(damaged)


@pytest.mark.parametrize("batch_size", [3, 5, 23])
def test_all_processes_know_the_unreadable_images_that_one_process_has_met(tmp_path: Path, batch_size: int) -> None:
    shard = numbered_shard(tmp_path / "s.tar", 23, {3, 17})

    def rows(processes: ThreadProcesses) -> tuple[list[int], list[int]]:
        own = open_data(shard, max_unreadable=0.2)
        SharedEncoder(_encoder(), processes).images_of(own, np.arange(23), batch_size=batch_size)
        return readable_rows(own).tolist(), sorted(own.unreadable)  # type: ignore[attr-defined]

    expected = [row for row in range(23) if row not in (3, 17)]
    assert ThreadProcesses.run(2, rows) == [(expected, [3, 17])] * 2


def test_too_many_unreadable_images_of_all_processes_stop_the_encoding_of_all(tmp_path: Path) -> None:
    # Each process meets one damaged image, and only both together are more than 5 % of 23 images.
    shard = numbered_shard(tmp_path / "s.tar", 23, {3, 17})

    def message(processes: ThreadProcesses) -> str:
        own, encoder = open_data(shard, max_unreadable=0.05), SharedEncoder(_encoder(), processes)
        with pytest.raises(BadInput) as caught:
            encoder.images_of(own, np.arange(23), batch_size=5)
        return str(caught.value)

    messages = ThreadProcesses.run(2, message)
    assert messages[0] == messages[1]
    assert "at most 5.00% of 23 pairs may have unreadable images" in messages[0]


def test_each_batch_is_encoded_by_one_process_only(tmp_path: Path) -> None:
    shard = numbered_shard(tmp_path / "s.tar", 23, set())

    def work(processes: ThreadProcesses) -> tuple[int, int]:
        encoder = _Counted()
        features = SharedEncoder(encoder, processes).pairs(open_data(shard), batch_size=5)
        return sum(encoder.sizes), len(features[0])

    # Batches 0, 2 and 4 have 5, 5 and 3 pairs; batches 1 and 3 have 5 pairs each.
    assert ThreadProcesses.run(2, work) == [(13, 23), (10, 23)]


def test_each_process_gives_a_sign_after_each_of_its_own_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = numbered_shard(tmp_path / "s.tar", 23, set())

    def work(processes: ThreadProcesses) -> list[int]:
        own, signs, counts = open_data(shard), list[int](), list[int]()
        monkeypatch.setattr(processes, "alive", lambda: signs.append(1))
        encoder = SharedEncoder(_encoder(), processes)
        source = BatchSource(own, _TOKENIZER, image_size=4, channels=3)
        for encode in (
            lambda: encoder.images_of(own, np.arange(23), batch_size=5),
            lambda: features_of_rows(_encoder(), source, np.arange(23), processes, batch_size=5),
            lambda: encoder.texts(["thing"] * 300, batch_size=1),
            lambda: encoder.images(np.zeros((3, 4, 4, 3), np.uint8), batch_size=1),
        ):
            signs.clear()
            encode()
            counts.append(len(signs))
        return counts

    # Of 300 batches of texts each process has 150, and gives a sign after 64 of them.
    assert ThreadProcesses.run(2, work) == [[3, 3, 3, 1], [2, 2, 3, 1]]


def test_an_error_of_one_process_is_raised_by_all_with_the_message_of_the_lowest_process() -> None:
    def fail(processes: ThreadProcesses) -> str:
        def work() -> int:
            if processes.rank in (1, 2):
                raise BadInput(f"epochs must be at least 1, got {-processes.rank}")
            return 1

        with pytest.raises(AgreedError) as caught:
            together(processes, work)
        return str(caught.value)

    assert ThreadProcesses.run(3, fail) == ["process 1: epochs must be at least 1, got -1"] * 3


def test_a_full_disk_of_the_first_process_is_the_same_error_on_all(tmp_path: Path) -> None:
    def fail(processes: ThreadProcesses) -> str:
        def write() -> None:
            raise OSError(28, "No space left on device", str(tmp_path / "x"))

        with pytest.raises(AgreedError) as caught:
            written_by_first(processes, write)
        return str(caught.value)

    assert ThreadProcesses.run(2, fail) == [f"cannot use {tmp_path / 'x'}: No space left on device"] * 2


def test_values_are_exchanged_with_the_check_and_the_first_process_decides() -> None:
    def work(processes: ThreadProcesses) -> tuple[Any, ...]:
        own, every = together_with_values(processes, lambda: (processes.rank, f"value {processes.rank}"))
        return own, every, of_first(processes, lambda: f"chosen by {processes.rank}")

    assert ThreadProcesses.run(2, work) == [(rank, ["value 0", "value 1"], "chosen by 0") for rank in range(2)]


def test_a_batch_that_cannot_be_divided_is_refused() -> None:
    def refuse(processes: ThreadProcesses) -> None:
        rule = r"batch_size must be a multiple of the number of processes \(3\), got 16"
        with pytest.raises(AgreedError, match=rule):
            check_batch_size(16, processes)

    ThreadProcesses.run(3, refuse)
