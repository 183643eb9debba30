"""A user's own table of images and captions: what is read, what is refused, what is held out."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from drrho_clip.data.division import pair_splits
from drrho_clip.data.loader import BatchSource
from drrho_clip.data.pairs import PairsDataset, read_pairs
from drrho_clip.data.protocol import captions_of
from drrho_clip.data.tokenizer import WordTokenizer
from drrho_clip.errors import BadInput, MissingExtra


def _image(path: Path, colour: tuple[int, int, int] = (10, 20, 30), size: tuple[int, int] = (6, 4)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


def _table(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two images, one of them in a folder below."""
    _image(tmp_path / "a.png")
    _image(tmp_path / "sub" / "b.png", (200, 0, 0), (3, 8))
    return tmp_path


def _many(folder: Path, count: int, *, first: int = 0, labels: Sequence[str] = ("",), suffix: str = "png") -> str:
    numbers = range(first, first + count)
    for number in numbers:
        _image(folder / f"{number}.{suffix}", (number % 256, 0, 0), (2, 2))
    return "".join(f"{number}.{suffix},caption {number},{labels[number % len(labels)]}\n" for number in numbers)


def test_rows_become_pairs_with_paths_relative_to_the_table(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = _table(folder / "pairs.csv", 'image,caption\na.png,  one \nsub/b.png,"two, ""quoted""\nlines"\n')
    monkeypatch.chdir(folder / "sub")  # not the table's folder
    data = read_pairs(table)
    assert len(data) == 2
    assert data.name == "pairs"
    assert data.captions == ("one", 'two, "quoted"\nlines')
    assert captions_of(data) == data.captions
    assert [sample.sample_index for sample in data] == [0, 1]
    assert [sample.image.shape for sample in data] == [(4, 6, 3), (8, 3, 3)]
    assert (data[1].image == [200, 0, 0]).all()
    assert data[0].image.dtype == np.uint8
    for index in (-1, 2):
        with pytest.raises(IndexError):
            data[index]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("pairs.csv", "image,caption\na.png,one\nsub/b.png,two\n"),
        ("pairs.csv", "\ufeffimage,caption\na.png,one\nsub/b.png,two"),
        ("pairs.csv", "image,caption\r\na.png,one\r\n\r\nsub/b.png,two\r\n"),
        ("pairs.csv", "\n\ncaption, image \none, a.png\ntwo, sub/b.png\n"),
        ("pairs.csv", "image;caption\na.png;one\nsub/b.png;two\n"),
        ("pairs.csv", "image\tcaption\na.png\tone\nsub/b.png\ttwo\n"),
        ("pairs.txt", "image\tx,y,z,w\tcaption\na.png\t,\tone\nsub/b.png\t,\ttwo\n"),
        ("pairs.csv", 'image, caption, note\na.png, one, "a, b"\nsub/b.png, two, "c"\n'),
        ("pairs.tsv", "image\tcaption\na.png\tone\nsub/b.png\ttwo\n"),
        ("pairs.csv", "\ufeffsep=;\r\nimage;caption\r\na.png;one\r\nsub/b.png;two\r\n"),
        ("pairs.csv", "image,caption\ra.png,one\rsub/b.png,two\r"),
        ("PAIRS.TSV", "extra\timage\tcaption\n1,2\ta.png\tone\n\tsub/b.png\ttwo\n"),
    ],
)
def test_tables_may_differ_in_delimiter_quotes_and_line_ends(folder: Path, name: str, text: str) -> None:
    data = read_pairs(_table(folder / name, text))
    assert data.captions == ("one", "two")
    assert [file.name for file in data.files] == ["a.png", "b.png"]


def test_columns_can_have_other_names_and_paths_may_be_absolute(folder: Path) -> None:
    table = _table(folder / "pairs.csv", f"file,text,kind\n{folder / 'a.png'},one,x\n")
    data = read_pairs(table, image_column="file", caption_column="text", label_column="kind")
    assert data.captions == ("one",)
    assert data.labels == ("x",)


_ABSENT = object()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (_ABSENT, "cannot read .*pairs.csv: No such file"),
        (b"", "pairs.csv must have a header and rows, got an empty file"),
        (b"\xef\xbb\xbf \n\n", "pairs.csv must have a header and rows, got an empty file"),
        (b"image,caption\n", "pairs.csv must have at least one row below its header, got none"),
        (b"image,caption\na.png,caf\xe9\n", "pairs.csv must be UTF-8, got byte 0xe9 on line 2"),
        ("image,caption\na.png,x\n".encode("utf-16"), "pairs.csv must be UTF-8, got UTF-16: save it as UTF-8"),
        (b"image,words\na.png,x\n", "pairs.csv must have one column named 'caption' .*: got the columns image, words$"),
        (b"image\twords\na.png\tx\n", "csv must have one column named 'caption' .*: got the columns image, words$"),
        (b"a.png,one\nsub/b.png,two\n", "must have one column named 'image' .*: got the columns a.png, one$"),
        (
            b"image,caption,caption\na.png,x,y\n",
            "must have one column named 'caption', or .* --caption-column: got the columns image, caption, caption$",
        ),
        (b"image,caption\na.png,x\nnone.png,y\n", "pairs.csv, row 3: there is no image file .*none.png"),
        (b"image,caption\nsub,x\n", "pairs.csv, row 2: there is no image file .*sub"),
        (b"image,caption\n,x\n", "pairs.csv, row 2: image must be a path, got an empty field"),
        (b"image,caption\na.png, \n", "pairs.csv, row 2: caption must not be empty"),
        (b"image,caption\n\na.png,x,y\n", "pairs.csv, row 3: must have 2 fields as the header has, got 3"),
        (b"image,caption\na.png\n", "pairs.csv, row 2: must have 2 fields as the header has, got 1"),
        (
            b"image,caption\npairs.csv,x\n",
            "row 2: .*pairs.csv is not a readable image: no image in one of the formats PNG, ",
        ),
        (b'image,caption\na.png,"x" y\na.png,"a, b"\n', "row 2: a field that begins with a quotation mark must end"),
        (b'image,caption\na.png,one\na.png,"x, y\n', "row 3: a field that begins with .* all lines must have 2 fields"),
        (b'"image,caption\na.png,x\n', "must have one column named 'image' .*: got the columns \"image, caption$"),
        (b"image,caption\nx.png,x\ny.png,y\na.png,\n", r"row 2: there is no .*x.png \(and 2 more such rows\)$"),
    ],
)
def test_each_flaw_of_a_table_has_a_message(folder: Path, content: object, message: str) -> None:
    if isinstance(content, bytes):
        (folder / "pairs.csv").write_bytes(content)
    with pytest.raises(BadInput, match=message) as caught:
        read_pairs(folder / "pairs.csv")
    assert "\n" not in str(caught.value)


def test_missing_label_column_is_refused(folder: Path) -> None:
    table = _table(folder / "pairs.csv", "image,caption,label\na.png,one,x\n")
    with pytest.raises(BadInput, match="must have one column named 'class'"):
        read_pairs(table, label_column="class")


def test_damaged_png_is_found_while_reading_the_table(folder: Path) -> None:
    content = bytearray((folder / "a.png").read_bytes())
    content[45] ^= 0xFF  # inside the pixels: the checksum no longer fits
    (folder / "a.png").write_bytes(content)
    table = _table(folder / "pairs.csv", "image,caption\na.png,one\n")
    with pytest.raises(BadInput, match=r"pairs.csv, row 2: .*a.png is not a readable image"):
        read_pairs(table)


def test_image_that_changes_after_the_table_was_read_is_named_while_decoding(folder: Path) -> None:
    data = read_pairs(_table(folder / "pairs.csv", "image,caption\na.png,one\nsub/b.png,two\n"))
    _image(folder / "sub" / "b.png", (9, 9, 9))
    assert data[0].caption == "one"
    message = r"pairs.csv, row 3: cannot decode image .*b.png: the file has changed since the table was read"
    with pytest.raises(BadInput, match=message):
        data[1]
    source = BatchSource(data, WordTokenizer(["one"], 1), image_size=4)
    with pytest.raises(BadInput, match=message):
        list(source.in_order(2))


def test_deleted_image_is_named(folder: Path) -> None:
    data = read_pairs(_table(folder / "pairs.csv", "image,caption\na.png,one\n"))
    (folder / "a.png").unlink()
    with pytest.raises(BadInput, match=r"row 2: cannot decode image .*a.png"):
        data[0]


def test_fingerprint_depends_on_images_captions_labels_and_order(folder: Path) -> None:
    def fingerprint(text: str) -> str:
        return read_pairs(_table(folder / "pairs.csv", text)).fingerprint()

    base = "image,caption,label\na.png,one,x\nsub/b.png,two,y\n"
    first = fingerprint(base)
    assert first == fingerprint(base)
    assert first != fingerprint(base.replace("one", "two"))
    assert first != fingerprint(base.replace(",x\n", ",y\n"))
    assert first != fingerprint(base + "sub/b.png,one,x\n")
    assert first != fingerprint("image,caption,label\nsub/b.png,two,y\na.png,one,x\n")
    # A file of equal name and equal size with other bytes is another image.
    _image(folder / "a.bmp", (0, 0, 0))
    _image(folder / "other.bmp", (0, 0, 9))
    pictures = base.replace("a.png", "a.bmp")
    before, size = fingerprint(pictures), (folder / "a.bmp").stat().st_size
    (folder / "other.bmp").replace(folder / "a.bmp")
    assert (folder / "a.bmp").stat().st_size == size
    assert before != fingerprint(pictures)


def test_fingerprint_and_splits_stay_when_a_table_is_moved_and_its_files_are_renamed(tmp_path: Path) -> None:
    old = _table(tmp_path / "pairs.csv", "image,caption,label\n" + _many(tmp_path, 40))
    before = pair_splits(old)
    for number in range(40):
        (tmp_path / f"{number}.png").rename(_image(tmp_path / "moved" / f"photo {number}.png"))
    text = old.read_text().replace("\n", "\nphoto ").removesuffix("photo ")
    old.unlink()
    after = pair_splits(_table(tmp_path / "moved" / "table.csv", text))
    for split, moved in zip(before, after, strict=True):
        assert moved.fingerprint() == split.fingerprint()
        assert moved.captions == split.captions


def test_digests_are_those_of_the_files_and_copies_of_a_file_are_one_image(folder: Path) -> None:
    (folder / "copy.png").write_bytes((folder / "a.png").read_bytes())
    data = read_pairs(_table(folder / "pairs.csv", "image,caption\nsub/b.png,one\na.png,two\ncopy.png,three\n"))
    digests = [
        hashlib.sha256((folder / name).read_bytes()).digest()[:16] for name in ("sub/b.png", "a.png", "copy.png")
    ]
    assert [row.tobytes() for row in data.image_digests()] == digests
    assert data.image_ids.dtype == np.int64
    assert data.image_ids.tolist() == [0, 1, 1]


def test_labels_give_a_zero_shot_task(folder: Path) -> None:
    text = "image,caption,label\na.png,one,dog\nsub/b.png,two,cat\na.png,three,\n"
    task = read_pairs(_table(folder / "pairs.csv", text)).zero_shot(image_size=5)
    assert task is not None
    assert task.class_names == ("cat", "dog")
    assert task.prompts == ("a photo of a cat", "a photo of a dog")
    assert task.labels.tolist() == [1, 0]
    assert task.images.shape == (2, 5, 5, 3)
    assert (task.images[1] == [200, 0, 0]).all()
    usual = read_pairs(folder / "pairs.csv").zero_shot()
    assert usual is not None
    assert usual.images.shape == (2, 224, 224, 3)
    assert read_pairs(_table(folder / "pairs.csv", text.replace("dog", "cat"))).zero_shot() is None
    assert read_pairs(_table(folder / "pairs.csv", text.replace("label", "kind"))).zero_shot() is None


def test_labels_that_differ_in_capitals_and_spaces_are_one_class(folder: Path) -> None:
    labels = ("Sea lion", "sea  Lion ", "cat", "CAT", "caf\u00e9", "cafe\u0301", " ")
    text = "image,caption,label\n" + "".join(f"a.png,one,{label}\n" for label in labels)
    task = read_pairs(_table(folder / "pairs.csv", text)).zero_shot(image_size=2)
    assert task is not None
    assert task.class_names == ("caf\u00e9", "cat", "Sea lion")
    # The picture is the same in all rows, so it counts once with each class.
    assert task.labels.tolist() == [2, 1, 0]


def _files(data: PairsDataset) -> set[str]:
    return {file.name for file in data.files}


def test_splits_share_no_image_and_stay_when_rows_are_appended(tmp_path: Path) -> None:
    text = "image,caption,label\n" + _many(tmp_path, 150, labels=("cat", "dog"), suffix="ppm")
    table = _table(tmp_path / "pairs.csv", text)
    before = pair_splits(table)
    names = [_files(split) for split in before]
    assert set.union(*names) == {f"{number}.ppm" for number in range(150)}
    assert sum(map(len, names)) == 150
    for held in names[1:]:
        assert 6 <= len(held) <= 26  # 15 expected, +- 3 standard deviations
    # Written down once, for files without compression: a changed hash would train a resumed run on held-out images.
    held_out = [18, 19, 21, 28, 35, 42, 59, 80, 117, 128, 129, 144, 146]
    assert names[1] == {f"{number}.ppm" for number in held_out}
    _table(table, text + _many(tmp_path, 50, first=150, labels=("bird",), suffix="ppm"))
    after = pair_splits(table)
    for old, new in zip(before, after, strict=True):
        assert _files(old) < _files(new)
        assert new.captions[: len(old)] == old.captions  # so sample indices stay too
    assert [sample.sample_index for sample in after.validation] == list(range(len(after.validation)))
    assert [_files(split) for split in pair_splits(table, seed=1)] != [_files(split) for split in after]
    task = after.test.zero_shot(image_size=2)
    assert task is not None
    assert task.class_names == ("bird", "cat", "dog")


def test_captions_of_one_image_stay_together_under_all_names_of_the_image(tmp_path: Path) -> None:
    _many(tmp_path, 40)
    for number in range(40):
        (tmp_path / f"copy {number}.png").write_bytes((tmp_path / f"{number}.png").read_bytes())
    starts = ("", "./", f"{tmp_path}/", "copy ")
    rows = [f"{start}{number}.png,caption" for number in range(40) for start in starts]
    table = _table(tmp_path / "pairs.csv", "image,caption\n" + "\n".join(rows))
    splits = pair_splits(table)
    assert sum(map(len, splits)) == 160
    assert sum(len({row.tobytes() for row in split.image_digests()}) for split in splits) == 40


def test_each_split_of_a_small_table_has_two_images(tmp_path: Path) -> None:
    table = _table(tmp_path / "pairs.csv", "image,caption,label\n" + _many(tmp_path, 6))
    splits = pair_splits(table, validation_share=0.01, test_share=0.01)
    assert [len(split) for split in splits] == [2, 2, 2]
    small = _table(tmp_path / "small.csv", "image,caption,label\n" + _many(tmp_path, 5))
    with pytest.raises(BadInput, match=r"small.csv must have images for every split, got 5 different ones"):
        pair_splits(small)


def test_validation_and_test_can_have_separate_tables(tmp_path: Path) -> None:
    train, validation, test = (
        _table(tmp_path / f"{name}.csv", "image,caption,label\n" + _many(tmp_path, 20, first=first))
        for first, name in ((0, "train"), (20, "validation"), (40, "test"))
    )
    splits = pair_splits(train, validation=validation, test=test)
    assert [len(split) for split in splits] == [20, 20, 20]
    assert [split.name for split in splits] == ["train", "train-validation", "train-test"]
    half = pair_splits(train, validation=validation, test_share=0.2)
    assert len(half.validation) == 20
    assert len(half.train) + len(half.test) == 20
    other = pair_splits(train, test=test)
    assert len(other.test) == 20
    assert _files(other.validation) < {f"{number}.png" for number in range(20)}
    shared = _table(tmp_path / "shared.csv", f"image,caption\n20.png,x\n{tmp_path / '7.png'},y\n")
    with pytest.raises(
        BadInput, match=r"shared.csv, row 3: image .*7.png is in another split too \(.*train.csv, row 9\)"
    ):
        pair_splits(train, validation=shared, test=test)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"validation_share": 1.2}, r"validation_share must lie in \[0, 1\], got 1.2"),
        ({"validation_share": 0.5, "test_share": 0.5}, "validation_share . test_share must stay below 1, got 1"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
    ],
)
def test_split_options_are_checked(tmp_path: Path, options: dict[str, float], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        pair_splits(tmp_path / "not even there.csv", **options)  # type: ignore[arg-type]


def test_missing_pillow_is_named_with_the_extra(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = _table(folder / "pairs.csv", "image,caption\na.png,one\n")
    data = read_pairs(table)
    monkeypatch.setitem(sys.modules, "PIL", None)
    for action in (lambda: read_pairs(table), lambda: data[0]):
        with pytest.raises(MissingExtra, match=r"reading images needs Pillow: pip install 'drrho-core\[train\]'"):
            action()


def test_repr_of_pairs_names_size_and_table(folder: Path) -> None:
    data = read_pairs(_table(folder / "pairs.csv", "image,caption\na.png,one\n"))
    assert repr(data) == f"<pairs: 1 pairs of {folder / 'pairs.csv'}>"
