"""Tables and folders as people have them: quotation marks, usual names of columns, JSON Lines, Parquet, text files."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from drrho_clip.data.pairs import read_pairs
from drrho_clip.errors import BadInput, MissingExtra

NAMES = ("a", "b", "c", "d")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four images with different pixels."""
    for number, name in enumerate(NAMES):
        Image.new("RGB", (2, 2), (number, 0, 0)).save(tmp_path / f"{name}.png")
    return tmp_path


def _write(folder: Path, name: str, text: str | bytes) -> Path:
    (folder / name).write_bytes(text.encode() if isinstance(text, str) else text)
    return folder / name


def _rows(captions: Sequence[str], separator: str) -> str:
    rows = [f"{name}.png{separator}{caption}" for name, caption in zip(NAMES, captions, strict=False)]
    return "\n".join([f"image{separator}caption", *rows]) + "\n"


@pytest.mark.parametrize("separator", ["\t", ",", ";"])
@pytest.mark.parametrize(
    ("written", "read"),
    [
        # Plain tables: the marks are characters of the captions, and no row is lost.
        (('"best in show', 'a flat screen of 55"', "a cup"), None),
        (("a cup", '"sold out" sign on a door', "a dog"), None),
        (('12" pizza', '"', 'say "cheese"', '""""'), None),
        (('"one', "two", 'three"', "four"), None),
        (('"one" and "two"', '"three"', "four"), None),
        # Quoted tables: the marks enclose the fields.
        (('"one"', '"two"', "three"), ("one", "two", "three")),
        (('"a 55"" screen"', '"b"'), ('a 55" screen', "b")),
        (('"two\nlines"', "b"), ("two\nlines", "b")),
        (('"three\n\nlines"', '"x\ty, z; w"'), ("three\n\nlines", "x\ty, z; w")),
    ],
)
def test_one_reading_of_quotation_marks_gives_every_row(
    folder: Path, separator: str, written: Sequence[str], read: Sequence[str] | None
) -> None:
    expected = tuple(written if read is None else read)
    data = read_pairs(_write(folder, "pairs.tsv", _rows(written, separator)))
    assert data.captions == expected
    assert data.paths == tuple(f"{name}.png" for name in NAMES[: len(expected)])


def test_quoted_lines_that_name_images_are_rows_even_if_the_images_are_missing(folder: Path) -> None:
    text = _rows(('"best', 'show"', "x"), "\t").replace("b.png", "missing.png")
    with pytest.raises(BadInput, match=r"row 3: there is no image file .*missing.png"):
        read_pairs(_write(folder, "pairs.tsv", text))


def test_table_in_which_lines_could_be_rows_or_parts_of_a_field_is_refused(folder: Path) -> None:
    text = 'image,caption\na.png,"one\nb.png,two"\nc.png,"three\nand, four"\n'
    with pytest.raises(BadInput, match=r"pairs.csv, line 3: a quotation mark before this line can begin a field"):
        read_pairs(_write(folder, "pairs.csv", text))


def test_quoted_names_of_columns_show_that_the_table_is_quoted(folder: Path) -> None:
    data = read_pairs(_write(folder, "pairs.csv", '"image","caption"\n"a.png","one ""x"" two"\n"b.png","y"\n'))
    assert data.captions == ('one "x" two', "y")


def test_characters_that_end_lines_elsewhere_do_not_end_a_row(folder: Path) -> None:
    captions = ("one\u2028two", "three\x0bfour", "five\x85six", "seven\x1ceight")
    for name, text in (
        ("pairs.csv", _rows(captions, ",")),
        ("quoted.csv", _rows([f'"{caption}"' for caption in captions], ",")),
        (
            "pairs.jsonl",
            "".join(
                json.dumps({"image": f"{n}.png", "caption": c}, ensure_ascii=False) + "\n"
                for n, c in zip(NAMES, captions, strict=True)
            ),
        ),
    ):
        assert read_pairs(_write(folder, name, text)).captions == captions, name


@pytest.mark.parametrize(
    "image", ["image", "image_path", "filepath", "file_path", "file_name", "filename", "path", "Image"]
)
@pytest.mark.parametrize("caption", ["caption", "captions", "title", "text", "description", "TEXT"])
def test_usual_names_of_columns_are_recognised(folder: Path, image: str, caption: str) -> None:
    data = read_pairs(_write(folder, "pairs.csv", f"id,{caption},{image}\n7,one,a.png\n"))
    assert (data.captions, data.paths) == (("one",), ("a.png",))


@pytest.mark.parametrize(
    ("header", "options", "message"),
    [
        (
            "path,filename,caption",
            {},
            "one column named 'image', or name a column with --image-column: got ",
        ),
        (
            "image,text,title",
            {},
            "one column named 'caption', or .* --caption-column: got .* image, text, title$",
        ),
        (
            "url,caption",
            {},
            "must have a column of image files, got the web addresses 'url': download the",
        ),
        ("id,caption", {}, "must have one column named 'image' .or image_path, .*: got the columns id, caption$"),
        (
            "image,caption",
            {"image_column": "file"},
            "must have one column named 'file', got the columns image, ",
        ),
        (
            "image,caption",
            {"caption_column": "words"},
            "have one column named 'words', got the columns image, ",
        ),
        (
            "image,caption,x,x",
            {"label_column": "x"},
            "must have one column named 'x', got the .*, x, x$",
        ),
    ],
)
def test_columns_that_cannot_be_chosen_are_listed(
    folder: Path, header: str, options: Mapping[str, Any], message: str
) -> None:
    table = _write(folder, "pairs.csv", header + "\n" + ",".join(["a.png"] * len(header.split(","))) + "\n")
    with pytest.raises(BadInput, match=message):
        read_pairs(table, **options)


def test_first_usual_name_and_given_names_have_priority(folder: Path) -> None:
    table = _write(folder, "pairs.csv", "path,image,title,caption,Label\nb.png,a.png,two,one,x\n")
    data = read_pairs(table)
    assert (data.paths, data.captions, data.labels) == (("a.png",), ("one",), ("x",))
    given = read_pairs(table, image_column="path", caption_column="title", label_column="image")
    assert (given.paths, given.captions, given.labels) == (("b.png",), ("two",), ("a.png",))


def test_web_addresses_in_the_column_of_images_are_refused(folder: Path) -> None:
    with pytest.raises(BadInput, match=r"row 2: image must be a path, got the web address https://example.org/a.png"):
        read_pairs(_write(folder, "pairs.csv", "image,caption\nhttps://example.org/a.png,one\n"))


def test_backslashes_of_windows_separate_folders(folder: Path) -> None:
    (folder / "sub").mkdir()
    (folder / "a.png").rename(folder / "sub" / "a.png")
    data = read_pairs(_write(folder, "pairs.csv", "image,caption\nsub\\a.png,one\n"))
    assert data.files == (folder / "sub" / "a.png",)
    assert data.paths == ("sub\\a.png",)


_OBJECTS: Sequence[Mapping[str, Any]] = (
    {"id": 7, "file_name": "a.png", "captions": ["one", " two "], "label": 3},
    {"id": 8, "file_name": "b.png", "captions": "three", "extra": {"deep": [1]}},
    {"id": 9, "file_name": "c.png", "captions": ["four"], "label": None},
)


@pytest.mark.parametrize("kind", ["jsonl", "ndjson", "parquet", "parquet under another name", "csv", "folder"])
def test_readers_yield_equal_pairs_and_a_list_of_captions_is_several_captions_of_one_image(
    folder: Path, kind: str
) -> None:
    labels: tuple[str, ...] = ("3", "3", "", "")
    if kind.endswith("json") or kind in ("jsonl", "ndjson"):
        table = _write(folder, f"pairs.{kind}", "\ufeff\n" + "\r\n".join(map(json.dumps, _OBJECTS)))
    elif kind.startswith("parquet"):
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        table = folder / ("pairs.parquet" if kind == "parquet" else "pairs.csv")
        columns = {
            "file_name": [record["file_name"] for record in _OBJECTS],
            "captions": [[text] if isinstance(text, str) else text for text in (r["captions"] for r in _OBJECTS)],
            "label": [record.get("label") for record in _OBJECTS],
        }
        parquet.write_table(pyarrow.table(columns), table)
    elif kind == "csv":
        table = _write(
            folder,
            "pairs.csv",
            'captions,file_name,label\n"[""one"", "" two ""]",a.png,3\nthree,b.png,\n[four],c.png,\n',
        )
    else:
        for record in _OBJECTS:
            captions = record["captions"]
            lines = [captions] if isinstance(captions, str) else captions
            _write(folder, record["file_name"].replace("png", "txt"), "\r\n".join([*lines, "", ""]))
        (folder / "d.png").unlink()
        table, labels = folder, ("",) * 4
    data = read_pairs(table)
    assert data.captions == ("one", "two", "three", "[four]" if kind == "csv" else "four")
    assert data.paths == ("a.png", "a.png", "b.png", "c.png")
    assert data.image_ids.tolist() == [0, 0, 1, 2]
    assert data.labels == labels
    assert [sample.sample_index for sample in data] == [0, 1, 2, 3]
    assert data.name == (folder.name if kind == "folder" else "pairs")


_GOOD = '{"image": "a.png", "caption": "one"}\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (_GOOD + '{"image": "b.png"', "pairs.jsonl, line 2: must be a JSON object on one line: Expecting"),
        (_GOOD + "\n[1, 2]\n", "pairs.jsonl, line 3: must be a JSON object on one line: got a value of type list"),
        (_GOOD + "[" * 100_000, "pairs.jsonl, line 2: must be a JSON object on one line: nested too deeply"),
        ("[\n" + _GOOD + "]", "pairs.jsonl must hold one JSON object on each line, got a list: write each object"),
        ("1\n", "pairs.jsonl, line 1: must be a JSON object on one line: got a value of type int"),
        (_GOOD + '{"image": "b.png"}', "line 2: must have the field 'caption', got the fields image$"),
        (_GOOD + '{"image": "b.png", "caption": null}', "line 2: caption must be a text .*, got nothing$"),
        (
            _GOOD + '{"image": "b.png", "caption": ["x", 5]}',
            "line 2: caption must be a text .*, got a value of type int",
        ),
        (_GOOD + '{"image": "b.png", "caption": []}', "line 2: caption must hold a caption, got an empty list$"),
        (_GOOD + '{"image": "b.png", "caption": ["x", ""]}', "line 2: caption must not be empty$"),
        (_GOOD + '{"image": ["b.png"], "caption": "x"}', "line 2: image must be a path, got a value of type list$"),
        (
            _GOOD + '{"image": "b.png", "image": "c.png", "caption": "x"}',
            "line 2: .*: a field is there twice$",
        ),
        (_GOOD + '{"image": "b.png", "caption": "x\\ud800"}', r"line 2: caption must be valid Unicode, .*U\+D800"),
        (_GOOD + '{"image": "\\udcff.png", "caption": "x"}', r"line 2: image must be valid Unicode, .*U\+DCFF"),
        (_GOOD + '{"image": "b\\u0000.png", "caption": "x"}', r"line 2: there is no image file .*b\\x00.png$"),
        (
            _GOOD + '{"image": "b.png", "caption": "x", "label": [1]}',
            "line 2: label must be a text or a number, got",
        ),
        (_GOOD + '{"image": "b.png", "caption": ' + "9" * 5000 + "}", "line 2: must be a JSON object on one line"),
    ],
)
def test_each_flaw_of_json_lines_has_a_message(folder: Path, text: str, message: str) -> None:
    with pytest.raises(BadInput, match=message) as caught:
        read_pairs(_write(folder, "pairs.jsonl", text))
    assert str(caught.value).isprintable()


def test_parquet_that_is_damaged_or_holds_other_values_is_refused(folder: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table = folder / "pairs.parquet"
    for columns, message in (
        ({"image": ["a.png", None], "caption": ["x", "y"]}, "row 2: image must be a path, got nothing"),
        (
            {"image": [{"bytes": b"x", "path": "a.png"}], "caption": ["x"]},
            "image must be a path, got data of another kind: save",
        ),
        ({"image": [b"a.png"], "caption": ["x"]}, "row 1: image must be a path, got data of another kind: save"),
        ({"image": ["a.png"], "words": ["x"]}, "must have one column named 'caption' .*: got the columns image, words"),
    ):
        parquet.write_table(pyarrow.table(columns), table)
        with pytest.raises(BadInput, match=message):
            read_pairs(table)
    table.write_bytes(table.read_bytes()[:-20])
    with pytest.raises(BadInput, match=r"pairs.parquet must be a Parquet file: "):
        read_pairs(table)


def test_missing_pyarrow_is_named_with_the_extra(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingExtra, match=r"reading Parquet files needs pyarrow: pip install 'drrho-core\[train\]'"):
        read_pairs(_write(folder, "pairs.parquet", b"PAR1 and so on"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "image,caption\na.png,x\n".encode("utf-16"),
            "must be UTF-8, got UTF-16: save it as .* .iconv -f UTF-16 -t UTF-8",
        ),
        ("image,caption\na.png,x\n".encode("utf-16-be"), "must be UTF-8, got UTF-16 on line 1: "),
        ("image,caption\na.png,x\n".encode("utf-32-le"), "must be UTF-8, got UTF-32 on line 1: "),
        (b"image,caption\na.png,x\n" + "b.png,y\r\n".encode("utf-16-le"), "must be UTF-8, got UTF-16 on line 3: "),
        ("image,caption\na.png,x\n".encode("utf-32"), "must be UTF-8, got UTF-32: "),
        (b"PK\x03\x04 and so on", "must be a table, got a spreadsheet or a zip archive: export it as CSV"),
        (b"\x1f\x8b\x08 and so on", "must be a table, got a file that gzip has compressed: unpack it"),
    ],
)
def test_other_encodings_and_kinds_of_files_are_named(folder: Path, content: bytes, message: str) -> None:
    with pytest.raises(BadInput, match=r"pairs.csv " + message):
        read_pairs(_write(folder, "pairs.csv", content))


def test_captions_keep_their_characters_and_lose_only_space_and_marks_at_both_ends(folder: Path) -> None:
    captions = ("a\x00b\x1b[31m", "\ufeffx\u200by\ufeff ", "z" * 100_000, "\u202eabc")
    text = "\ufeffimage,caption\n" + "".join(f"\ufeff{n}.png,{c}\n" for n, c in zip(NAMES, captions, strict=True))
    data = read_pairs(_write(folder, "pairs.csv", text))
    assert data.captions == ("a\x00b\x1b[31m", "x\u200by", "z" * 100_000, "\u202eabc")
    assert data.paths == ("a.png", "b.png", "c.png", "d.png")


@pytest.mark.parametrize("caption", ["", " ", "\u00a0", "\ufeff", "\x00", "\u200b\u200d", '""', "\x1b"])
def test_caption_without_a_visible_character_is_empty(folder: Path, caption: str) -> None:
    with pytest.raises(BadInput, match=r"row 2: caption must not be empty"):
        read_pairs(_write(folder, "pairs.csv", f"image,caption,x\na.png,{caption},\n"))


def test_list_as_python_writes_it_is_refused_with_the_remedy(folder: Path) -> None:
    with pytest.raises(BadInput, match=r"row 2: captions must hold a list of captions as JSON"):
        read_pairs(_write(folder, "pairs.csv", "image,captions\na.png,\"['a dog', 'a cat']\"\n"))


def test_folder_is_read_with_all_folders_below_and_without_hidden_files(tmp_path: Path) -> None:
    for name in ("b/2.PNG", "a/1.jpg", "a/._1.jpg", ".hidden/3.png", "0.webp"):
        path = tmp_path / "set" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (2, 2), (len(name) * 9, 0, 0)).save(path)
        path.with_suffix(".txt").write_text(f"caption of {name}\n")
    (tmp_path / "set" / "a" / "notes.json").write_text("{}")
    # A link that leads in a circle ends, and a link to another folder is followed.
    (tmp_path / "set" / "a" / "circle").symlink_to(tmp_path / "set")
    (tmp_path / "elsewhere").mkdir()
    Image.new("RGB", (2, 2)).save(tmp_path / "elsewhere" / "4.png")
    (tmp_path / "elsewhere" / "4.TXT").write_text("four")
    (tmp_path / "set" / "c").symlink_to(tmp_path / "elsewhere")
    data = read_pairs(tmp_path / "set")
    assert data.paths == ("0.webp", "a/1.jpg", "b/2.PNG", "c/4.png")
    assert data.captions == ("caption of 0.webp", "caption of a/1.jpg", "caption of b/2.PNG", "four")


def test_folder_in_which_an_image_or_a_text_is_alone_is_refused(folder: Path) -> None:
    for name in NAMES:
        _write(folder, f"{name}.txt", f"caption {name}")
    assert len(read_pairs(folder)) == 4
    _write(folder, "c.txt", " \n\n")
    with pytest.raises(BadInput, match=r"image 3: caption must hold a caption, got an empty list$"):
        read_pairs(folder)
    _write(folder, "c.txt", "caf\u00e9".encode("latin-1"))
    with pytest.raises(BadInput, match=r"image 3: c.png must have captions in c.txt beside it, got: must be UTF-8"):
        read_pairs(folder)
    (folder / "c.txt").unlink()
    (folder / "d.txt").unlink()
    with pytest.raises(BadInput, match=r"image 3: c.png must have captions in c.txt .* no such file .and 1 more such"):
        read_pairs(folder)
    _write(folder, "c.txt", "x")
    (folder / "d.png").rename(folder / "d.heic")
    _write(folder, "d.txt", "x")
    with pytest.raises(BadInput, match=r"beside every text file, got .*d.txt without an image .1 such files"):
        read_pairs(folder)
    for name in ("a", "b", "c"):
        (folder / f"{name}.png").unlink()
    with pytest.raises(BadInput, match=r"must hold images with captions in text files beside them, got no image"):
        read_pairs(folder)


def test_named_pipes_are_refused_without_waiting(folder: Path) -> None:
    os.mkfifo(folder / "pipe.csv")
    with pytest.raises(BadInput, match=r"cannot read .*pipe.csv: it is not a regular file"):
        read_pairs(folder / "pipe.csv")
    with pytest.raises(BadInput, match=r"cannot read /dev/zero: it is not a regular file"):
        read_pairs("/dev/zero")
    os.mkfifo(folder / "pipe.png")
    (folder / "folder.png").mkdir()
    for name in ("pipe.png", "folder.png", "/dev/zero"):
        with pytest.raises(BadInput, match=rf"row 2: there is no image file .*{name}"):
            read_pairs(_write(folder, "pairs.csv", f"image,caption\n{name},x\n"))
    for name in NAMES:
        _write(folder, f"{name}.txt", "x")
    os.mkfifo(folder / "pipe.txt")
    (folder / "folder.png").rmdir()
    with pytest.raises(BadInput, match=r"pipe.png must have captions in pipe.txt beside it, got: it is not a reg"):
        read_pairs(folder)
