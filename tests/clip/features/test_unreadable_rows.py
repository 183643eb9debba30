"""A cache remembers which images could not be read, so that the features of a black image steer nothing silently."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from drrho_clip import ReferenceFeatures
from drrho_clip.cli import main
from drrho_clip.data import WordTokenizer, open_data, pair_splits
from drrho_clip.data.order import rows_at
from drrho_clip.data.row_source import RowSource
from drrho_clip.encoders import ForeignEncoder
from drrho_clip.errors import BadInput
from drrho_clip.features import encode_pairs
from helpers.shards import numbered_shard

LIMIT = ("--max-unreadable", "0.1")


class _Killed(BaseException):
    """A process that dies."""


def _model() -> ForeignEncoder:
    return ForeignEncoder(
        name="other",
        encode_images=lambda images: images.reshape(len(images), -1)[:, :3].astype(np.float32) + 1,
        encode_texts=lambda tokens: np.ones((len(tokens), 3), dtype=np.float32),
        read_image=lambda image: image[:4, :4],
        tokenizer=WordTokenizer(["thing"], 2),
        image_size=4,
        feature_dims=(3, 3),
        temperature=0.1,
        weights="",
        preprocessing={"image": {}, "text": {}},
    )


def test_a_continued_encoding_names_the_unreadable_images_of_all_processes(tmp_path: Path) -> None:
    shard, out = numbered_shard(tmp_path / "s.tar", 1300, {3, 1200}), tmp_path / "cache"

    def kill(rows: int) -> None:
        if rows == 1024:
            raise _Killed

    with pytest.raises(_Killed):
        encode_pairs(_model(), open_data(shard, max_unreadable=0.1), out, after_rows=lambda rows: kill(rows - 256))
    assert json.loads((out / "progress.jsonl").read_text())["unreadable"].keys() == {"3"}
    # The second call finds a finished cache.
    for _ in range(2):
        data = open_data(shard, max_unreadable=0.1)
        manifest = encode_pairs(_model(), data, out)
        assert sorted(data.unreadable) == [3, 1200]
        assert manifest.unreadable == {"3": data.unreadable[3], "1200": data.unreadable[1200]}
    assert "sample 0003: cannot decode" in manifest.unreadable["3"]
    assert ReferenceFeatures(out).unreadable_rows(data) == data.unreadable


def test_a_manifest_with_an_unreadable_row_that_is_none_is_refused(tmp_path: Path) -> None:
    shard = numbered_shard(tmp_path / "s.tar", 12, {3})
    encode_pairs(_model(), open_data(shard, max_unreadable=0.1), tmp_path / "cache")
    file = tmp_path / "cache" / "manifest.json"
    written = json.loads(file.read_text())
    for unreadable in ({"12": "cannot decode"}, {"-1": "cannot decode"}, {"2": 5}, [3]):
        file.write_text(json.dumps(written | {"unreadable": unreadable}))
        with pytest.raises(BadInput, match=r"manifest\.json"):
            ReferenceFeatures(tmp_path / "cache")


def test_heads_learn_from_the_pair_that_follows_in_place_of_an_unreadable_one(tmp_path: Path) -> None:
    order = rows_at(0, 20, 20, seed=3, epoch=1).tolist()
    data = open_data(numbered_shard(tmp_path / "s.tar", 20, {order[1], order[5], order[17]}), max_unreadable=0.2)
    encode_pairs(_model(), data, tmp_path / "cache")
    source = RowSource(data, ReferenceFeatures(tmp_path / "cache"))
    batches = [batch.sample_index.tolist() for batch in source.epoch(5, seed=3, epoch=1)]
    expected = [
        [order[0], order[6], *order[2:5]],
        [order[10], *order[6:10]],
        order[10:15],
        [*order[15:17], order[0], *order[18:20]],
    ]
    # The rule is that of pictures; see `tests/clip/data/test_unreadable.py`.
    assert batches == expected
    resumed = source.epoch(5, seed=3, epoch=1, first_batch=2)
    assert [batch.sample_index.tolist() for batch in resumed] == expected[2:]
    every_row = np.arange(20)
    rows = [batch.sample_index.tolist() for batch in source.epoch(5, seed=3, epoch=1, rows=every_row)]
    assert rows == expected


def test_commands_leave_out_the_unreadable_images_of_a_cache(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shard, cache, run = tmp_path / "s.tar", tmp_path / "cache", tmp_path / "run"
    # A damaged image has another digest, so it may be held out; the first that is a training image is taken.
    bad = next(
        row for row in range(40) if f"thing {row}" in pair_splits(numbered_shard(shard, 40, {row})).train.captions
    )
    train = ["train", "--data", str(shard), "--backend", "numpy", "--epochs", "1", "--width", "8", *LIMIT]
    assert main([*train, "--method", "clip", "--out", str(run)]) == 0
    assert main(["encode", "--model", str(run), "--data", str(shard), "--out", str(cache), *LIMIT]) == 0

    figures, table = tmp_path / "figures.json", tmp_path / "suspects.csv"
    for model in (str(cache), f"features:{cache}"):
        for command in (["evaluate", model, "--json", str(figures)], ["suspects", model, "--out", str(table)]):
            capsys.readouterr()
            assert main([*command, "--data", str(shard), "--max-unreadable", "0"]) == 2
            assert f"sample {bad:04d}: cannot decode" in capsys.readouterr().err
            assert main([*command, "--data", str(shard), *LIMIT]) == 0
            assert "the images of 1 of 40 pairs cannot be read; they are left out" in capsys.readouterr().err
    ranked = sorted(int(line.split(",")[0]) for line in table.read_text().splitlines()[1:])
    assert ranked == [row for row in range(40) if row != bad]
    metrics = json.loads(figures.read_text())[0]["metrics"]
    assert (metrics["num_pairs"], metrics["num_unreadable"]) == (39, 1)

    steered = [*train, "--method", "drrho", "--reference", str(cache), "--out", str(tmp_path / "steered")]
    assert main(steered) == 0
    num_pairs = len(pair_splits(shard).train)
    assert f"the images of 1 of {num_pairs} training pairs could not be read for" in capsys.readouterr().err
    heads = [*train, "--method", "clip", "--model", f"features:{cache}", "--out", str(tmp_path / "heads")]
    assert main(heads) == 0
    assert f"sample {bad:04d}: cannot decode" in capsys.readouterr().err
