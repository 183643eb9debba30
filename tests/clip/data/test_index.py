"""The index: columns on the disk, opened without reading them, tied to the content of the data."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from drrho_clip.cli import main
from drrho_clip.data import open_data, open_index, pair_splits
from drrho_clip.errors import BadInput
from helpers.shards import image_bytes, sample, write_shard, write_shards


def _indexed(data: Path | str, folder: Path) -> Path:
    assert main(["index", str(data), "--out", str(folder)]) == 0
    return folder


def test_an_index_counts_what_is_in_the_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    red, blue = image_bytes((255, 0, 0)), image_bytes((0, 0, 255))
    files = [
        ("1.png", red),
        ("1.txt", b"one\ntwo"),
        ("2.png", blue),
        ("2.txt", b"x"),
        ("3.png", red),
        ("3.txt", b"one"),
    ]
    shard = write_shard(tmp_path / "s.tar", files)
    assert main(["index", str(shard), "--out", str(tmp_path / "i"), "--json", str(tmp_path / "counts.json")]) == 0
    assert capsys.readouterr().out.splitlines()[:5] == [
        "pairs               4",
        "images              2",
        "captions per image  1 to 3 (1 image has 1, 1 has 3)",
        "duplicates          1 image, 1 pair",
        "unreadable          0 images",
    ]
    counts = json.loads((tmp_path / "counts.json").read_text())
    assert counts["captions_per_image"] == {"1": 1, "3": 1}
    assert counts["fingerprint"] == open_data(shard).fingerprint() == open_index(tmp_path / "i").fingerprint()


def test_the_columns_of_an_index_stay_on_the_disk(tmp_path: Path) -> None:
    data = open_index(_indexed(write_shards(tmp_path, 600), tmp_path / "index"))
    source = data.source
    assert all(isinstance(array, np.memmap) for array in (source.record_of, source.digests, data.image_ids))
    assert isinstance(data.captions.content, np.memmap)  # type: ignore[attr-defined]
    half = data.subset(np.arange(0, 600, 2))
    assert not isinstance(half.captions, tuple)
    assert half.captions[3] == data.captions[6] == "a blue picture, number 6"
    assert list(half.captions) == [data.captions[row] for row in range(0, 600, 2)] == half.captions[:]


def test_an_index_of_a_table_and_of_a_folder_opens_their_files(tmp_path: Path) -> None:
    for row in range(4):
        (tmp_path / "set").mkdir(exist_ok=True)
        (tmp_path / "set" / f"{row}.png").write_bytes(image_bytes((row, 0, 0)))
        (tmp_path / "set" / f"{row}.txt").write_text(f"caption {row}\n")
    (tmp_path / "pairs.csv").write_text("image,caption,label\nset/1.png,one,X\nset/2.png,two,y\n")
    for data in (tmp_path / "set", tmp_path / "pairs.csv"):
        index = open_index(_indexed(data, tmp_path / f"{data.name}.index"))
        direct = open_data(data)
        assert index.fingerprint() == direct.fingerprint()
        assert index.class_names == direct.class_names
        assert list(index.paths) == list(direct.paths)
        assert index.labels == direct.labels
        assert [index.place(row) for row in range(len(index))][-1].split(", ")[1] == direct.place(-1).split(", ")[1]
        assert all(np.array_equal(index[row].image, direct[row].image) for row in range(len(direct)))


def test_an_index_moves_together_with_its_data(tmp_path: Path) -> None:
    _indexed(write_shards(tmp_path / "old" / "shards", 12), tmp_path / "old" / "index")
    (tmp_path / "old").rename(tmp_path / "new")
    assert open_index(tmp_path / "new" / "index")[5].caption == "a green picture, number 5"


def test_a_shard_that_has_changed_under_an_index_is_named(tmp_path: Path) -> None:
    shards = write_shards(tmp_path, 12)
    index = _indexed(shards, tmp_path / "index")
    shard = tmp_path / "shards-002.tar"
    before = shard.read_bytes()
    # Another image of the same length: only reading the image shows it.
    place = before.index(b"IDAT")
    shard.write_bytes(before[:place] + b"xxxx" + before[place + 4 :])
    with pytest.raises(BadInput, match=r"shards-002.tar, sample 000006: cannot decode .*: the image has changed since"):
        open_index(index)[6]
    write_shard(shard, sample("1", (1, 1, 1)))
    with pytest.raises(BadInput, match=r"index must describe the data as they are, got .* in .*shards-002.tar: in"):
        open_index(index)
    shard.unlink()
    with pytest.raises(BadInput, match=r"index must have its data where they were, got no .*shards-002.tar$"):
        open_index(index)


def test_an_index_notices_captions_that_were_edited(tmp_path: Path) -> None:
    for row in range(4):
        (tmp_path / f"{row}.png").write_bytes(image_bytes((row, 0, 0)))
    table, index = tmp_path / "pairs.csv", tmp_path / "index"
    table.write_text("image,caption\n" + "".join(f"{row}.png,caption {row}\n" for row in range(4)))
    _indexed(table, index)
    before = table.read_text()
    for edited in (before.replace("caption 2", "caption 7"), before.replace("caption 2", "a caption")):
        table.write_text(edited)
        with pytest.raises(
            BadInput, match=r"index must describe the data as they are, got .* in .*pairs.csv: index the"
        ):
            open_index(index)
    table.write_text(before)
    assert open_index(index)[2].caption == "caption 2"
    # The index holds the captions, so the table itself is not needed; an earlier version has not recorded the table.
    table.unlink()
    assert open_index(index)[2].caption == "caption 2"
    table.write_text(edited)
    described = json.loads((index / "index.json").read_text())
    del described["text_files"]
    (index / "index.json").write_text(json.dumps(described))
    assert len(open_index(index)) == 4


def test_an_index_with_more_unreadable_images_than_usual_is_opened_without_a_limit(tmp_path: Path) -> None:
    files = [file for row in range(8) for file in sample(f"{row}", (row, 0, 0), f"caption {row}")]
    files[2] = (files[2][0], b"no image")
    shard, index = write_shard(tmp_path / "s.tar", files), tmp_path / "index"
    assert main(["index", str(shard), "--out", str(index)]) == 2
    assert main(["index", str(shard), "--out", str(index), "--max-unreadable", "0.2"]) == 0
    # The unreadable image is left out of the index already, so no command needs the limit again.
    assert list(open_data(index).captions) == [f"caption {row}" for row in range(8) if row != 1]
    assert sum(map(len, pair_splits(index, seed=0))) == 7


def test_a_damaged_index_is_refused_in_one_line(tmp_path: Path) -> None:
    good = _indexed(write_shards(tmp_path, 600), tmp_path / "index")
    described = json.loads((good / "index.json").read_text())
    for number, (file, content, message) in enumerate(
        [
            ("index.json", b"{", "must be JSON"),
            ("index.json", b"[]", "must be an index of schema 1, got "),
            ("index.json", json.dumps(described | {"schema": 2}).encode(), "must be an index of schema 1, got 2"),
            ("index.json", json.dumps(described | {"kind": "x"}).encode(), "'x' must be a kind of data that this vers"),
            ("index.json", json.dumps({"schema": 1}).encode(), r"got a damaged one \(KeyError"),
            ("captions_ends.npy", b"", "must be a whole index, got no column captions_ends.npy"),
            ("digests.npy", (good / "digests.npy").read_bytes()[:4000], "must be a whole index, got no column digests"),
            ("record_of.npy", (good / "captions_bytes.npy").read_bytes(), "got a column record_of.npy of another size"),
        ]
    ):
        copy = tmp_path / f"copy{number}"
        shutil.copytree(good, copy)
        (copy / file).write_bytes(content)
        with pytest.raises(BadInput, match=message):
            open_data(copy)


def test_an_index_replaces_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shards = write_shards(tmp_path, 8)
    index = _indexed(shards, tmp_path / "index")
    before = {path.name: path.read_bytes() for path in index.iterdir()}
    assert main(["index", shards, "--out", str(index)]) == 2
    assert "must be a new or an empty folder" in capsys.readouterr().err
    assert main(["index", shards, "--out", str(tmp_path / "x" / "i"), "--json", str(tmp_path / "shards-000.tar")]) in (
        0,
        2,
    )
    assert {path.name: path.read_bytes() for path in index.iterdir()} == before
    assert main(["index", shards, "--out", "/dev/null/index"]) == 2
