"""Tar shards: what is read in place, what is refused, and that shards, table and index give the same pairs."""

from __future__ import annotations

import gzip
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from drrho_clip.cli import main
from drrho_clip.data import open_data, pair_splits, read_pairs
from drrho_clip.data.columns import ColumnNames
from drrho_clip.data.sources import exists, read_together
from drrho_clip.data.sources.tar_members import members
from drrho_clip.errors import BadInput
from helpers.shards import image_bytes, sample, write_shard, write_shards


def _unpacked(folder: Path, out: Path) -> Path:
    """Write the samples of shards as files with a table, in the order of the shards."""
    out.mkdir()
    lines = ["image,caption"]
    for shard in sorted(folder.glob("*.tar")):
        with tarfile.open(shard) as archive:
            # `extractall` warns without an argument that Python has only since 3.11.4.
            for member in archive:
                content = archive.extractfile(member)
                assert content is not None
                (out / member.name).write_bytes(content.read())
            keys = [name.removesuffix(".png") for name in archive.getnames() if name.endswith(".png")]
        lines += [f'{key}.png,"{(out / key).with_suffix(".txt").read_text()}"' for key in keys]
    (out / "pairs.csv").write_text("\n".join(lines) + "\n")
    return out / "pairs.csv"


def test_shards_a_table_and_an_index_give_the_same_pairs_and_the_same_splits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = write_shards(tmp_path / "shards", 60)
    table = read_pairs(_unpacked(tmp_path / "shards", tmp_path / "files"))
    assert main(["index", shards, "--out", str(tmp_path / "index")]) == 0
    for data in (open_data(shards), open_data(tmp_path / "shards"), open_data(tmp_path / "index")):
        assert len(data) == 60
        assert list(data.captions) == list(table.captions)
        assert data.fingerprint() == table.fingerprint()
        assert np.array_equal(data.image_ids, table.image_ids)
        for row in (0, 17, 59):
            assert data[row].sample_index == row
            assert data[row].caption == table.captions[row]
            assert np.array_equal(data[row].image, table[row].image)
    expected = [part.fingerprint() for part in pair_splits(tmp_path / "files" / "pairs.csv")]
    assert [part.fingerprint() for part in pair_splits(shards)] == expected
    assert [part.fingerprint() for part in pair_splits(tmp_path / "index")] == expected
    assert "pairs               60" in capsys.readouterr().out


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_are_those_of_tarfile_in_every_format_and_for_every_kind_of_name(tmp_path: Path, format: int) -> None:
    names = ["a.png", "./b.png", "folder/c.png", "x" * 90 + "/" + "y" * 95 + ".png"]
    if format != tarfile.USTAR_FORMAT:
        names += ["z" * 300 + ".png", "café/ü.png"]
    path = write_shard(tmp_path / "s.tar", [(name, name.encode() * 7) for name in names], format=format)
    with tarfile.open(path, "a", format=format) as archive:
        archive.addfile(folder := tarfile.TarInfo("only-a-folder"))
        folder.type = tarfile.DIRTYPE
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "a.png"
        archive.addfile(link)
    with tarfile.open(path) as archive:
        expected = [(info.name, info.offset_data, info.size) for info in archive if info.isreg()]
    listed = list(members(path))
    assert [(member.name, member.offset, len(member.content)) for member in listed] == expected
    assert [member.content for member in listed[: len(names)]] == [name.encode() * 7 for name in names]


def test_shards_of_webdataset_itself_are_read(tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    with webdataset.TarWriter(str(tmp_path / "w.tar")) as writer:
        for row in range(5):
            pixels = np.full((4, 4, 3), row * 40, dtype=np.uint8)
            writer.write(
                {"__key__": f"{row:04d}", "png": pixels, "json": {"caption": f"caption {row}"}, "cls": row % 2}
            )
    data = open_data(tmp_path / "w.tar")
    assert data.captions == tuple(f"caption {row}" for row in range(5))
    assert data.labels == ("0", "1", "0", "1", "0")
    assert [int(data[row].image[0, 0, 0]) for row in range(5)] == [0, 40, 80, 120, 160]


def test_captions_come_from_lines_of_txt_or_from_the_named_field_of_json(tmp_path: Path) -> None:
    about = json.dumps({"caption": ["from json", "and another"], "title": "a title", "label": "tree"}).encode()
    files = [("a.b/1.jpg", image_bytes((9, 9, 9), kind="JPEG")), ("a.b/1.json", about)]
    shard = write_shard(tmp_path / "s.tar", [*files, ("a.b/1.txt", b"one\r\ntwo\n\n"), ("._1.png", b"x")])
    assert open_data(shard).captions == ("one", "two")
    assert np.array_equal(open_data(shard).image_ids, [0, 0])
    assert open_data(shard).labels == ("tree", "tree")
    assert open_data(shard, caption_column="title").captions == ("a title",)
    assert open_data(shard, caption_column="caption").captions == ("from json", "and another")
    assert open_data(shard).paths == ("s.tar/a.b/1.jpg",) * 2


_PAIR = sample("1", (1, 2, 3))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([_PAIR[1]], r"s.tar, sample 1: must have one image \(.jpg, .*\), got the files .txt$"),
        ([_PAIR[0]], r"sample 1: must have a caption in a file .txt or .json, got the files .png$"),
        ([*_PAIR, ("1.jpg", b"x")], r"sample 1: must have one image .*, got the files .png, .txt, .jpg$"),
        ([_PAIR[0], ("1.txt", b" \n")], r"sample 1: .txt must hold a caption, got an empty list$"),
        ([_PAIR[0], ("1.txt", b"caf\xe9")], r"sample 1: 1.txt must be UTF-8, got byte 0xe9$"),
        ([_PAIR[0], ("1.json", b"{")], r"sample 1: 1.json must be JSON: .*$"),
        ([_PAIR[0], ("1.json", b"[1]")], r"sample 1: 1.json must be a JSON object, got a value of type list$"),
        ([_PAIR[0], ("1.json", b'{"words": "x"}')], r"must have one column named 'caption' .*: got the columns words$"),
        ([*_PAIR, *sample("2", (4, 5, 6)), *_PAIR], r"s.tar must have different keys, got the sample 1 twice$"),
        ([*_PAIR, _PAIR[0]], r"s.tar must have different keys, got the file 1.png twice$"),
        ([("1.png", b"no image"), _PAIR[1]], r"s.tar, sample 1: 1.png is not a readable image: no image in one .*$"),
        ([_PAIR[1], *sample("2", (4, 5, 6))[:1]], r"sample 1: .* \(and 1 more such samples\)$"),
        ([], r"s.tar must hold samples of an image and a caption, got no file in the shards$"),
    ],
)
def test_each_flaw_of_a_sample_has_a_message(
    tmp_path: Path, files: list[tuple[str, bytes]], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shard = write_shard(tmp_path / "s.tar", files)
    with pytest.raises(BadInput, match=message):
        open_data(shard)
    for words in (["index", str(shard), "--out", "index"], ["train", "--data", str(shard), "--out", "run"]):
        assert main([*words[:-1], str(tmp_path / words[-1])]) == 2
        assert capsys.readouterr().err.count("\n") == 1
        assert not (tmp_path / words[-1]).exists()


def _cut(size: int) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(path.read_bytes()[:size])


def _flipped(position: int) -> Callable[[Path], object]:
    def flip(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[position] ^= 1
        path.write_bytes(content)

    return flip


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (_cut(0), r"s.tar must be a whole tar archive, got no block of zeros in an empty file: the file is cut short$"),
        (_cut(100), "got no block of zeros in an empty file: the file is cut short$"),
        (_cut(1600), r"got 64 of the \d+ bytes of 1.png: the file is cut short$"),
        (_cut(2048), r"got no block of zeros at the end: the file is cut short$"),
        (_cut(2400), r"got no block of zeros at the end: the file is cut short$"),
        (_flipped(3), "s.tar must be a tar archive, got a file of another kind$"),
        (_flipped(2050), "got a damaged header at byte 2,048$"),
        (
            lambda path: path.write_bytes(gzip.compress(path.read_bytes())),
            "must be an uncompressed tar archive, got one that gzip has compressed$",
        ),
        (lambda path: path.unlink(), "No such file"),
        (lambda path: (path.unlink(), path.mkdir()), "got no regular file|must hold images"),
    ],
)
def test_each_flaw_of_a_shard_has_a_message(tmp_path: Path, harm: Callable[[Path], object], message: str) -> None:
    shard = write_shard(tmp_path / "s.tar", _PAIR)
    harm(shard)
    with pytest.raises(BadInput, match=message):
        open_data(shard)


def test_every_shortening_of_a_shard_is_noticed(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "s.tar", [*_PAIR, *sample("2", (4, 5, 6))])
    content = shard.read_bytes()
    # Behind the last member there are only blocks of zeros, one of which is enough.
    end = len(content.rstrip(b"\0")) // 512 * 512 + 512
    for size in [*range(0, end, 256), end]:
        shard.write_bytes(content[:size])
        with pytest.raises(BadInput, match="cut short"):
            open_data(shard)
    shard.write_bytes(content[: end + 512])
    assert len(open_data(shard)) == 2


def test_a_missing_shard_of_a_range_is_named(tmp_path: Path) -> None:
    shards = write_shards(tmp_path, 8, 4)
    (tmp_path / "shards-002.tar").unlink()
    assert exists(shards)
    with pytest.raises(BadInput, match=r"must have all shards of the range, got no .*shards-002.tar$"):
        open_data(shards)
    with pytest.raises(BadInput, match=r"got no .*shards-000.tar \(and 3 more are missing\)$"):
        open_data(str(tmp_path / "none" / "shards-{000..003}.tar"))
    with pytest.raises(BadInput, match=r"rising ranges, got \{003..000\}"):
        open_data(str(tmp_path / "shards-{003..000}.tar"))
    with pytest.raises(BadInput, match=r"must be tar shards if several paths are given, got no such file: .*x.tar"):
        read_together([str(tmp_path / "shards-000.tar"), str(tmp_path / "x.tar")], ColumnNames())


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ("b.PNG", r"must hold tar shards or images, got both: shards-000.tar and b.PNG$"),
        ("cats/b.jpg", r"must hold tar shards or images, got both: shards-000.tar and cats/b.jpg$"),
        ("b.tar.gz", r"must hold uncompressed tar shards only, got shards-000.tar and b.tar.gz$"),
        ("b.tgz", r"must hold uncompressed tar shards only, got shards-000.tar and b.tgz$"),
    ],
)
def test_a_folder_of_shards_has_no_other_pairs_beside_them(tmp_path: Path, other: str, message: str) -> None:
    write_shards(tmp_path, 8, 2)
    # Notes and lists of sizes are no pairs.
    for name in ("README.md", "sizes.json", ".hidden.png"):
        (tmp_path / name).touch()
    assert len(open_data(tmp_path)) == 8
    (tmp_path / "cats").mkdir()
    (tmp_path / other).write_bytes(image_bytes((1, 2, 3)))
    with pytest.raises(BadInput, match=message):
        open_data(tmp_path)


def test_one_unreadable_image_of_a_thousand_is_left_out_and_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [file for row in range(1000) for file in sample(f"{row}", (row % 256, row // 256, 7), f"caption {row}")]
    files[2 * 700] = ("700.png", files[2 * 700][1][:-9])
    shard = write_shard(tmp_path / "s.tar", files)
    data = open_data(shard)
    assert len(data) == 999
    assert "caption 700" not in data.captions
    assert data[700].caption == "caption 701"
    assert (data[700].image == [701 % 256, 701 // 256, 7]).all()
    assert main(["index", str(shard), "--out", str(tmp_path / "index")]) == 0
    out = capsys.readouterr().out
    assert "unreadable          1 image\n" in out
    assert "left out: " in out
    assert "s.tar, sample 700: 700.png is not a readable image" in out
    files[0] = ("0.png", b"")
    with pytest.raises(BadInput, match=r"sample 0: 0.png is not .* \(and 1 more such images\); at most 0.10% of 1,000"):
        open_data(write_shard(shard, files))
    with pytest.raises(BadInput, match=r"sample 0: 0.png is not a readable image"):
        open_data(shard, max_unreadable=0)
    assert len(open_data(shard, max_unreadable=0.01)) == 998
