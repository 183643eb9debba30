"""Images that turn out to be unreadable while a run reads them, and the processes that read images."""

from __future__ import annotations

import itertools
import json
import multiprocessing
from pathlib import Path

import numpy as np
import pytest

from drrho_clip.cli import main
from drrho_clip.commands.common import say_unreadable
from drrho_clip.data import (
    BatchSource,
    DataSplits,
    HostBatch,
    UnreadableImage,
    WordTokenizer,
    open_data,
    pair_splits,
    read_pairs,
    readable_rows,
)
from drrho_clip.data.order import rows_at
from drrho_clip.encoders import ForeignEncoder
from drrho_clip.errors import BadInput
from drrho_clip.evaluate import evaluate
from drrho_clip.files.checkpoint import load_arrays
from drrho_clip.measure.held_out import check_held_out
from helpers.shards import numbered_shard
from helpers.small_pairs import write_two_colours

_TOKENIZER = WordTokenizer(["thing"], 2)


def _source(shard: Path, share: float = 0.2, **options: int) -> BatchSource:
    return BatchSource(open_data(shard, max_unreadable=share), _TOKENIZER, image_size=4, **options)


def _rows(batches: list[HostBatch]) -> list[list[int]]:
    return [batch.sample_index.tolist() for batch in batches]


def test_an_unreadable_pair_is_replaced_by_the_pair_that_follows_the_batch_in_the_order(tmp_path: Path) -> None:
    order = rows_at(0, 20, 20, seed=3, epoch=1).tolist()
    # The first pair after batch 0 is unreadable too, and so is a pair of the last batch.
    damaged = {order[1], order[5], order[17]}
    source = _source(numbered_shard(tmp_path / "s.tar", 20, damaged))
    batches = list(source.epoch(5, seed=3, epoch=1))
    first, second, third, last = _rows(batches)
    assert first == [order[0], order[6], *order[2:5]]
    assert second == [order[10], *order[6:10]]
    assert third == order[10:15]
    assert last == [*order[15:17], order[0], *order[18:20]]
    assert set(source.unreadable) == damaged
    for batch in batches:
        for row, image, tokens in zip(batch.sample_index, batch.images, batch.tokens, strict=True):
            alone = source.gather([int(row)])
            assert np.array_equal(alone.images[0], image)
            assert np.array_equal(alone.tokens[0], tokens)
            assert image[0, 0, 2] > 40
    # A resumed run starts in the middle and knows no unreadable image yet.
    again = _source(numbered_shard(tmp_path / "s.tar", 20, damaged), cache_bytes=0)
    assert _rows(list(again.epoch(5, seed=3, epoch=1, first_batch=2))) == [third, last]


@pytest.mark.parametrize(("num_workers", "cache_bytes"), [(2, 0), (3, 2**20)])
def test_any_number_of_worker_processes_gives_the_same_batches(
    tmp_path: Path, num_workers: int, cache_bytes: int
) -> None:
    order = rows_at(0, 23, 23, seed=0, epoch=2).tolist()
    shard = numbered_shard(tmp_path / "s.tar", 23, {order[2], order[14]})
    expected = list(_source(shard, num_threads=0).epoch(4, seed=0, epoch=2, first_batch=1))
    assert len(expected) == 4
    source = _source(shard, num_workers=num_workers, cache_bytes=cache_bytes)
    stream = source.epoch(4, seed=0, epoch=2, first_batch=1)
    # The second case stops early: then the processes end too.
    for other in expected[: 4 if num_workers == 2 else 3]:
        batch = next(stream)
        for mine, theirs in zip(batch[:3], other[:3], strict=True):
            assert np.array_equal(mine, theirs)  # type: ignore[arg-type]
    assert set(source.unreadable) == {order[14]}
    stream.close()  # type: ignore[attr-defined]
    for process in multiprocessing.active_children():
        process.join(60)
        assert not process.is_alive()


def test_too_many_unreadable_images_stop_the_epoch_by_name(tmp_path: Path) -> None:
    shard = numbered_shard(tmp_path / "s.tar", 20, {3, 7, 11})
    source = _source(shard, 0.1, num_threads=0)
    with pytest.raises(UnreadableImage, match=r"sample 00\d\d: cannot decode .*2 more such .*at most 10.00% of 20"):
        list(source.epoch(4, seed=0, epoch=0))
    with pytest.raises(UnreadableImage, match=r"sample 0003: cannot decode image .*s.tar/0003.jpeg: [^(]*$"):
        _source(shard, 0.0).gather([1, 3])


def test_no_pair_is_left_to_take_the_place_if_too_few_are_readable(tmp_path: Path) -> None:
    source = _source(numbered_shard(tmp_path / "s.tar", 4, {0}), 1.0)
    with pytest.raises(BadInput, match=r"must have 4 readable pairs, got fewer: .*sample 0000"):
        list(source.epoch(4, seed=0, epoch=0))


def test_evaluation_takes_a_black_image_for_an_unreadable_one(tmp_path: Path) -> None:
    source = _source(numbered_shard(tmp_path / "s.tar", 10, {2}))
    images = np.concatenate([batch.images for batch in source.in_order(4)])
    assert [row for row in range(10) if not images[row].any()] == [2]


def test_held_out_images_are_looked_at_before_the_first_step(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train, held_out = (
        numbered_shard(tmp_path / "t.tar", 30, set()),
        numbered_shard(tmp_path / "v.tar", 12, {4, 9}),
    )

    def splits(share: float) -> DataSplits:
        return pair_splits(train)._replace(validation=open_data(held_out, max_unreadable=share))

    with pytest.raises(BadInput, match=r"v.tar, sample 0004: cannot decode .* \(and 1 more such held-out images\)$"):
        check_held_out(splits(0.1))
    check_held_out(splits(0.5))
    assert capsys.readouterr().err.count("it is left out") == 2


def test_a_run_names_and_replaces_unreadable_training_images(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shard = tmp_path / "s.tar"
    # A damaged image has another digest, so it may be held out; the first that is a training image is taken.
    row = next(
        row for row in range(40) if f"thing {row}" in pair_splits(numbered_shard(shard, 40, {row})).train.captions
    )
    words = ["train", "--data", str(shard), "--backend", "numpy", "--method", "clip", "--epochs", "2", "--width", "8"]
    assert main([*words, "--out", str(tmp_path / "strict")]) == 2
    assert f"sample {row:04d}: cannot decode" in capsys.readouterr().err.splitlines()[-1]
    run = tmp_path / "run"
    assert main([*words, "--max-unreadable", "0.1", "--order", "blocks", "--out", str(run)]) == 0
    assert capsys.readouterr().err.count(f"sample {row:04d}: cannot decode") == 1
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    places = [line["unreadable"].split(": ")[0] for line in lines if "unreadable" in line]
    assert places == [f"{shard}, sample {row:04d}"]
    assert main(["evaluate", str(run)]) == 0
    assert main(["report", str(run), "--out", str(tmp_path / "page.html")]) == 0


def test_a_run_that_unreadable_images_have_stopped_continues_with_a_larger_limit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shard = tmp_path / "s.tar"
    # The first shard whose damaged image is a training image stays.
    assert any(f"thing {row}" in pair_splits(numbered_shard(shard, 40, {row})).train.captions for row in range(40))
    words = ["--data", str(shard), "--backend", "numpy", "--method", "clip", "--epochs", "2", "--width", "8"]
    run, whole = tmp_path / "run", tmp_path / "whole"
    assert main(["train", *words, "--out", str(run)]) == 2
    assert main(["train", *words, "--out", str(whole), "--max-unreadable", "0.1"]) == 0
    resume = ["train", "--resume", "--out", str(run), "--max-unreadable", "0.1", "--workers", "1"]
    # A setting that changes the result is still refused.
    assert main([*resume, "--batch-size", "3"]) == 2
    assert "batch_size must be that of the run" in capsys.readouterr().err.splitlines()[-1]
    assert main(resume) == 0
    recorded = json.loads((run / "config.json").read_text())["config"]
    assert (recorded["max_unreadable"], recorded["workers"]) == (0.1, 1)
    first, second = (load_arrays(out / "checkpoint.safetensors", "checkpoint")[0] for out in (run, whole))
    assert all(np.array_equal(array, second[name]) for name, array in first.items())


def test_order_in_blocks_reads_rows_that_are_stored_side_by_side(tmp_path: Path) -> None:
    orders = [
        rows_at(0, 98, 98, seed=1, epoch=epoch, order="blocks", block_rows=7, window_blocks=3) for epoch in (0, 1)
    ]
    for rows in orders:
        assert sorted(rows.tolist()) == list(range(98))
        # Each window of 21 positions holds three whole blocks, which are mixed.
        starts = [sorted({int(row) // 7 for row in rows[start : start + 21]}) for start in range(0, 63, 21)]
        assert all(len(blocks) == 3 for blocks in starts)
        assert any(rows[:21] != np.sort(rows[:21]))
    assert not np.array_equal(*orders)


def test_any_part_of_the_order_in_blocks_can_be_computed_alone() -> None:
    for size, block, window in itertools.product((1, 12, 23, 64), (1, 5, 8), (1, 2, 20)):
        options = {"seed": 5, "epoch": 0, "order": "blocks", "block_rows": block, "window_blocks": window}
        whole = rows_at(0, size, size, **options)  # type: ignore[arg-type]
        assert sorted(whole.tolist()) == list(range(size))
        for start, stop in itertools.combinations(range(0, size + 1, 3), 2):
            part = rows_at(start, stop, size, **options)  # type: ignore[arg-type]
            assert np.array_equal(part, whole[start:stop])


def test_every_command_names_unreadable_images_and_leaves_them_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_two_colours(tmp_path / "clean", 40, swapped_fraction=0.0)
    run, shard = tmp_path / "run", numbered_shard(tmp_path / "s.tar", 12, {3, 8})
    data = str(tmp_path / "clean/pairs.csv")
    words = ["--data", data, "--backend", "numpy", "--method", "clip", "--epochs", "1", "--width", "8"]
    assert main(["train", *words, "--out", str(run)]) == 0
    figures, table = tmp_path / "figures.json", tmp_path / "suspects.csv"
    commands = {
        "left out": [
            ["evaluate", str(run), "--json", str(figures)],
            ["suspects", str(run), "--out", str(table)],
            ["search", str(run), "red", "--top", "20"],
        ],
        "encoded as black images": [["encode", "--model", str(run), "--out", str(tmp_path / "cache")]],
    }
    for outcome, several in commands.items():
        for command in several:
            capsys.readouterr()
            assert main([*command, "--data", str(shard)]) == 2
            assert "sample 0003: cannot decode" in capsys.readouterr().err
            assert main([*command, "--data", str(shard), "--max-unreadable", "0.2"]) == 0
            output = capsys.readouterr()
            assert f"warning: the images of 2 of 12 pairs cannot be read; they are {outcome}" in output.err
            assert output.err.count(": cannot decode image") == 2
            assert command[0] != "search" or "thing 3\n" not in output.out
    (row,) = json.loads(figures.read_text())
    assert (row["metrics"]["num_pairs"], row["metrics"]["num_unreadable"]) == (10, 2)
    ranked = sorted(int(line.split(",")[0]) for line in table.read_text().splitlines()[1:])
    assert ranked == [row for row in range(12) if row not in (3, 8)]


def test_the_warning_counts_all_pairs_of_an_unreadable_image(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_two_colours(tmp_path, 10, swapped_fraction=0.0)
    lines = (tmp_path / "pairs.csv").read_text().splitlines()
    again = [f"{line} again" for line in lines[1:]]
    (tmp_path / "twice.csv").write_text("\n".join([*lines, *again]))
    dataset = read_pairs(tmp_path / "twice.csv")
    dataset.unreadable[3] = "3.png: cannot decode image"
    say_unreadable(dataset)
    assert "the images of 2 of 20 pairs cannot be read; they are left out" in capsys.readouterr().err


def test_a_model_of_another_program_reads_on_behind_an_unreadable_image(tmp_path: Path) -> None:
    encoder = ForeignEncoder(
        name="other",
        encode_images=lambda images: images.reshape(len(images), -1)[:, :3].astype(np.float32) + 1,
        encode_texts=lambda tokens: np.ones((len(tokens), 3), dtype=np.float32),
        read_image=lambda image: image[:4, :4],
        tokenizer=_TOKENIZER,
        image_size=4,
        feature_dims=(3, 3),
        temperature=0.1,
        weights="",
        preprocessing={"image": {}, "text": {}},
    )
    data = open_data(numbered_shard(tmp_path / "s.tar", 12, {3, 8}), max_unreadable=0.2)
    images, _ = encoder.pairs(data, batch_size=5)
    assert images.shape == (12, 3)
    assert sorted(data.unreadable) == [3, 8]
    assert readable_rows(data).tolist() == [0, 1, 2, 4, 5, 6, 7, 9, 10, 11]
    figures = evaluate(encoder, data)
    assert (figures["num_pairs"], figures["num_unreadable"]) == (10, 2)
    with pytest.raises(UnreadableImage, match=r"cannot decode .*\(and 1 more such images before\); at most 10.00%"):
        encoder.pairs(open_data(tmp_path / "s.tar", max_unreadable=0.1))
