"""Checkpoints of state that ranks share: any number of ranks continues what any other number has saved."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from drrho_core import InnerEstimator, PerSampleTemperature, ThreadRanks, load_shards, save_shards
from drrho_core.contrastive import agreement
from helpers.spaces import build

NUM_SAMPLES = 103
SPACES = [("numpy", "float32"), ("torch", "float32"), ("jax", "float32"), ("numpy", "float64")]


def states(space: Any, ranks: Any) -> tuple[InnerEstimator, PerSampleTemperature]:
    like = space.asarray(np.zeros(1))
    return (
        InnerEstimator(NUM_SAMPLES, like=like, ranks=ranks),
        PerSampleTemperature(NUM_SAMPLES, 0.5, like=like, ranks=ranks),
    )


def numbers(space: Any) -> list[dict[str, np.ndarray]]:
    """Return all rows of both states; every seventh sample was never visited."""
    rng = np.random.default_rng(4)
    columns = rng.uniform(0.1, 0.9, size=(6, NUM_SAMPLES)).astype(space.dtype_name)
    columns[:2, ::7] = -np.inf
    names = ("temperature_image", "temperature_text", "momentum_image", "momentum_text")
    return [
        dict(zip(("log_inner_image", "log_inner_text"), columns[:2], strict=True)),
        dict(zip(names, columns[2:], strict=True)),
    ]


def rows(space: Any, state: Any) -> dict[str, np.ndarray]:
    return {name: space.to_numpy(array) for name, array in state.table.arrays().items()}


def saved(folder: Path, num_ranks: int, step: int = 3, scale: float = 1.0) -> list[Path]:
    """Save inner estimates of 7 samples, row i is i + 0.5 times a scale, and return the files."""

    def save(ranks: Any) -> Path | None:
        made = InnerEstimator(7, like=np.zeros(1), ranks=ranks)
        made.load_state_dict({name: scale * (np.arange(7) + 0.5) for name in ("log_inner_image", "log_inner_text")})
        return save_shards(made, folder, step=step)

    return [path for path in ThreadRanks.run(num_ranks, save) if path is not None]


def refusals(folder: Path, num_ranks: int = 3, num_samples: int = 7, dtype: str = "float64") -> list[str]:
    """Return the message that each rank raises when it reads a checkpoint; the rows must stay as they are."""

    def load(ranks: Any) -> str:
        made = InnerEstimator(num_samples, like=np.zeros(1, dtype), ranks=ranks)
        with pytest.raises((TypeError, ValueError)) as caught:
            load_shards(made, folder)
        assert np.all(made.log_inner_image == -np.inf)
        return str(caught.value)

    return ThreadRanks.run(num_ranks, load)


@pytest.mark.parametrize(("name", "dtype"), SPACES)
def test_4_2_1_3_and_4_ranks_continue_one_after_the_other_bit_for_bit(name: str, dtype: str, tmp_path: Path) -> None:
    space = build(name, dtype)
    right = numbers(space)

    def first(ranks: Any) -> None:
        for state, whole in zip(states(space, ranks), right, strict=True):
            state.load_state_dict(
                {column: space.asarray(array) for column, array in whole.items()}
                | ({"version": space.asarray(np.asarray(1, dtype=np.int32))} if "momentum_text" in whole else {})
            )
            save_shards(state, tmp_path / "0", step=7)

    ThreadRanks.run(4, first)
    for number, num_ranks in enumerate((2, 1, 3, 4), start=1):

        def go_on(ranks: Any, number: int = number) -> list[dict[str, np.ndarray]]:
            got = []
            for state in states(space, ranks):
                assert load_shards(state, tmp_path / str(number - 1)) == 7
                save_shards(state, tmp_path / str(number), step=7)
                got.append(rows(space, state))
            return got

        every = ThreadRanks.run(num_ranks, go_on)
        for place, whole in enumerate(right):
            for column, expected in whole.items():
                got = np.concatenate([rank[place][column] for rank in every])
                assert got.dtype == expected.dtype
                assert got.tobytes() == expected.tobytes()
        assert len(list((tmp_path / str(number)).iterdir())) == 2 * num_ranks


def test_a_table_without_ranks_reads_what_ranks_wrote_and_the_reverse(tmp_path: Path) -> None:
    saved(tmp_path, 3)
    alone = InnerEstimator(7, like=np.zeros(1))
    assert load_shards(alone, tmp_path) == 3
    assert alone.log_inner_image.tolist() == [i + 0.5 for i in range(7)]
    alone.scatter(np.asarray([2]), np.asarray([9.0]), np.asarray([9.0]))
    path = save_shards(alone, tmp_path / "alone", step=4)
    assert path == tmp_path / "alone" / "inner-000000000000-000000000007.safetensors"

    def load(ranks: Any) -> np.ndarray:
        made = InnerEstimator(7, like=np.zeros(1), ranks=ranks)
        load_shards(made, tmp_path / "alone")
        return np.asarray(made.log_inner_text)

    assert np.concatenate(ThreadRanks.run(2, load)).tolist() == [0.5, 1.5, 9.0, 3.5, 4.5, 5.5, 6.5]


def test_the_metadata_of_a_file_name_its_rows(tmp_path: Path) -> None:
    paths = saved(tmp_path, 4)
    assert [path.name[6:-12] for path in paths] == [f"{a:012d}-{b:012d}" for a, b in ((0, 2), (2, 4), (4, 6), (6, 7))]
    with safe_open(paths[3], framework="numpy") as file:
        metadata = file.metadata()
    assert (metadata["start"], metadata["stop"], metadata["num_samples"], metadata["step"]) == ("6", "7", "7", "3")
    # More ranks than parts: the last rank has no rows and writes no file.
    assert len(saved(tmp_path / "more", 5)) == 4


def test_a_later_checkpoint_in_the_same_folder_replaces_the_earlier_one(tmp_path: Path) -> None:
    saved(tmp_path, 4, step=3)
    later = saved(tmp_path, 3, step=8, scale=2.0)
    assert sorted(tmp_path.iterdir()) == sorted(later)
    alone = InnerEstimator(7, like=np.zeros(1))
    assert load_shards(alone, tmp_path) == 8
    assert alone.log_inner_image.tolist() == [2 * i + 1.0 for i in range(7)]


def test_a_missing_row_is_refused_on_all_ranks(tmp_path: Path) -> None:
    saved(tmp_path, 4)[1].unlink()
    for message in refusals(tmp_path):
        assert "must hold every row from 0 to 2, got no file with row 2" in message
    assert all("got none" in message for message in refusals(tmp_path / "nothing"))


def test_files_that_disagree_are_refused(tmp_path: Path) -> None:
    saved(tmp_path, 2)
    for other, words in (
        ({"scale": 2.0}, "must agree, got two values of log_inner_image in row 0"),
        ({"step": 4}, "all files must have the same step, got"),
    ):
        extra = saved(tmp_path / "other", 3, **other)[0]
        copy = tmp_path / extra.name
        copy.write_bytes(extra.read_bytes())
        for message in refusals(tmp_path):
            assert words in message
        copy.unlink()
    # Files that overlap and agree are read.
    agreeing = saved(tmp_path / "agreeing", 3)[0]
    (tmp_path / agreeing.name).write_bytes(agreeing.read_bytes())
    assert load_shards(InnerEstimator(7, like=np.zeros(1)), tmp_path) == 3


def test_files_that_do_not_fit_the_state_are_refused(tmp_path: Path) -> None:
    path = saved(tmp_path, 1)[0]
    assert all("must hold rows of 8 samples, got 7" in text for text in refusals(tmp_path, num_samples=8))
    assert all("must have dtype float32, got float64" in text for text in refusals(tmp_path, dtype="float32"))
    with safe_open(path, framework="numpy") as file:
        metadata = file.metadata()
    columns = load_file(path)
    for changed, words in (
        (columns | {"log_inner_text": np.full(7, np.nan)}, "log_inner_text"),
        ({"log_inner_image": columns["log_inner_image"]}, "must hold log_inner_image, log_inner_text, got"),
        ({name: array[:6] for name, array in columns.items()}, "must hold 7 rows, got [6]"),
    ):
        save_file(changed, path, metadata)
        assert all(words in text for text in refusals(tmp_path))
    save_file(columns, path, metadata | {"version": "2"})
    assert all("in version 1, got format" in text for text in refusals(tmp_path))
    path.write_bytes(path.read_bytes()[:40])
    assert all("must be a file of `save_shards`" in text for text in refusals(tmp_path))


def test_a_rank_that_cannot_write_leaves_the_old_files_and_stops_all_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path: path.read_bytes() for path in saved(tmp_path, 2)}
    replace = os.replace

    def full(source: Path, target: Path) -> None:
        if "000000000003-" in str(target):
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)

    def save(ranks: Any) -> str:
        with pytest.raises(ValueError, match=r"cannot be written: .*No space left") as caught:
            save_shards(InnerEstimator(7, like=np.zeros(1), ranks=ranks), tmp_path, step=4)
        return str(caught.value)

    assert len(set(ThreadRanks.run(3, save))) == 1
    for path, content in before.items():
        assert path.read_bytes() == content
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("step", [3, 4])
def test_the_old_checkpoint_of_as_many_ranks_stays_whole_if_a_rank_cannot_write(
    step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path: path.read_bytes() for path in saved(tmp_path, 3)}
    sync, number = os.fsync, iter(range(3))

    def full(file: int) -> None:
        if next(number) == 2:
            raise OSError(28, "No space left on device")
        sync(file)

    monkeypatch.setattr(os, "fsync", full)

    def save(ranks: Any) -> str:
        with pytest.raises(ValueError, match=r"cannot be written: .*No space left") as caught:
            save_shards(InnerEstimator(7, like=np.zeros(1), ranks=ranks), tmp_path, step=step)
        return str(caught.value)

    assert len(set(ThreadRanks.run(3, save))) == 1
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    alone = InnerEstimator(7, like=np.zeros(1))
    assert load_shards(alone, tmp_path) == 3
    assert alone.log_inner_image.tolist() == [i + 0.5 for i in range(7)]


def test_ranks_agree_about_a_checkpoint_on_a_device_that_the_host_has_to_wait_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As on a GPU, reading a number is not free here.
    monkeypatch.setattr(agreement, "values_visible", lambda *_: False)

    def save(ranks: Any) -> str:
        estimator = InnerEstimator(7, like=np.zeros(1), ranks=ranks)
        with pytest.raises(ValueError) as caught:
            save_shards(estimator, tmp_path, step=ranks.rank)
        with pytest.raises(ValueError, match="on rank 0 and"):
            estimator.grow(8 + ranks.rank)
        with pytest.raises(ValueError, match="must hold log_inner_image and log_inner_text and nothing else"):
            estimator.load_state_dict({} if ranks.rank else estimator.state_dict())
        return str(caught.value)

    assert ThreadRanks.run(2, save) == ["step must be the same on all ranks, got 0 on rank 0 and 1 on rank 1"] * 2


def test_ranks_that_save_different_steps_are_refused(tmp_path: Path) -> None:
    def save(ranks: Any) -> str:
        with pytest.raises(ValueError) as caught:
            save_shards(InnerEstimator(7, like=np.zeros(1), ranks=ranks), tmp_path, step=ranks.rank)
        return str(caught.value)

    assert ThreadRanks.run(2, save) == ["step must be the same on all ranks, got 0 on rank 0 and 1 on rank 1"] * 2
    assert not list(tmp_path.iterdir())


def test_processes_that_each_keep_all_rows_may_save_at_the_same_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Both have written their temporary file before either renames it.
    replace, written = os.replace, threading.Barrier(2, timeout=20.0)

    def late(source: Path, target: Path) -> None:
        written.wait()
        replace(source, target)

    monkeypatch.setattr(os, "replace", late)

    # The state is not shared, so nothing is sent between the ranks.
    first, second = ThreadRanks.run(2, lambda _: save_shards(InnerEstimator(7, like=np.zeros(1)), tmp_path, step=2))
    assert first == second
    assert list(tmp_path.iterdir()) == [first]
    assert load_shards(InnerEstimator(7, like=np.zeros(1)), tmp_path) == 2
