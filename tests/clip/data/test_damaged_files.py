"""Hundreds of damaged and odd files: each gives right rows and images, or BadInput in one line.

The inputs are made from small good files by seeded changes. No other exception, no warning, no line of a library on
standard error and no lost row is accepted.
"""

from __future__ import annotations

import io
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features

from drrho_clip.data.images import MAX_PIXELS
from drrho_clip.data.pairs import read_pairs
from drrho_clip.errors import BadInput

_NOISE = np.random.default_rng(7).integers(0, 256, (24, 20, 4), dtype=np.uint8)
_RGB = Image.fromarray(_NOISE[..., :3].copy())
_GREY = Image.fromarray(_NOISE[..., 0].copy())


def _bytes_of(picture: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def _pictures() -> dict[str, bytes]:
    """One good file for each format and mode that people have."""
    rgba, indexed = Image.fromarray(_NOISE), _RGB.convert("P", palette=Image.Palette.ADAPTIVE)
    grey = _NOISE[..., 0]
    deep, wide = Image.fromarray(grey.astype(np.uint16) * 257), Image.fromarray(grey.astype(np.int32))
    real = Image.fromarray(grey.astype(np.float32) / 255)
    turned = _RGB.transpose(Image.Transpose.ROTATE_180)
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010E] = "a description"
    pictures = {
        "png rgb": _bytes_of(_RGB, "PNG"),
        "png rgba": _bytes_of(rgba, "PNG"),
        "png grey": _bytes_of(_GREY, "PNG", exif=exif),
        "png palette": _bytes_of(indexed, "PNG", transparency=bytes(range(256))),
        "png 16 bits": _bytes_of(deep, "PNG"),
        "png 1 bit": _bytes_of(_GREY.convert("1"), "PNG"),
        "png animation": _bytes_of(_RGB, "PNG", save_all=True, append_images=[turned]),
        "jpeg rgb": _bytes_of(_RGB, "JPEG", exif=exif),
        "jpeg grey": _bytes_of(_GREY, "JPEG"),
        "jpeg cmyk": _bytes_of(_RGB.convert("CMYK"), "JPEG"),
        "jpeg progressive": _bytes_of(_RGB, "JPEG", progressive=True),
        "mpo": _bytes_of(_RGB, "MPO", save_all=True, append_images=[_RGB]),
        "gif": _bytes_of(indexed, "GIF", transparency=3),
        "gif animation": _bytes_of(indexed, "GIF", save_all=True, append_images=[_GREY.convert("P")]),
        "webp": _bytes_of(_RGB, "WEBP"),
        "webp lossless": _bytes_of(rgba, "WEBP", lossless=True, exif=exif),
        "bmp rgb": _bytes_of(_RGB, "BMP"),
        "bmp palette": _bytes_of(indexed, "BMP"),
        "tiff rgb": _bytes_of(_RGB, "TIFF", exif=exif),
        "tiff deflate": _bytes_of(_RGB, "TIFF", compression="tiff_adobe_deflate"),
        "tiff lzw cmyk": _bytes_of(_RGB.convert("CMYK"), "TIFF", compression="tiff_lzw"),
        "tiff jpeg": _bytes_of(_RGB, "TIFF", compression="jpeg"),
        "tiff lab": _bytes_of(_RGB.convert("LAB") if features.check("littlecms2") else _RGB, "TIFF"),
        "tiff 16 bits": _bytes_of(deep, "TIFF"),
        "tiff 32 bits": _bytes_of(wide, "TIFF"),
        "tiff float": _bytes_of(real, "TIFF"),
        "ppm": _bytes_of(_RGB, "PPM"),
        "pgm": _bytes_of(_GREY, "PPM"),
        "pfm": _bytes_of(real, "PPM"),
        "jpeg 2000": _bytes_of(_RGB, "JPEG2000"),
    }
    return pictures | ({"avif": _bytes_of(_RGB, "AVIF")} if features.check("avif") else {})


_PICTURES = _pictures()
_TRUNCATED, _FLIPPED = 8, 14


def _changes(content: bytes, seed: int, *, truncated: int, flipped: int) -> Iterator[bytes]:
    """Yield beginnings of a file, and copies with changed bits: half of them in the header, half of them anywhere."""
    rng = np.random.default_rng(seed)
    for stop in np.linspace(1, len(content) - 1, truncated).astype(int):
        yield content[:stop]
    for number in range(flipped):
        changed = bytearray(content)
        reach = min(len(content), 64) if number % 2 else len(content)
        for place in rng.integers(0, reach, 1 + number % 3):
            changed[place] ^= 1 << int(rng.integers(0, 8))
        yield bytes(changed)


@pytest.fixture
def silent(request: pytest.FixtureRequest, capfd: pytest.CaptureFixture[str]) -> Iterator[None]:
    """Check that nothing was written to standard output and standard error, also not by a library in C."""
    yield
    captured = capfd.readouterr()
    assert captured.out == ""
    # libtiff itself writes lines about damaged strips to standard error, and Pillow has no switch for that.
    if "tiff" not in request.node.name:
        assert captured.err == ""


def _outcome(action: Callable[[], object]) -> BadInput | None:
    """Run an action; return a BadInput of one printable line, and let all other exceptions pass."""
    refused = None
    try:
        action()
    except BadInput as error:
        refused = error
    assert str(refused).isprintable()
    return refused


@pytest.mark.usefixtures("silent")
@pytest.mark.parametrize("kind", _PICTURES)
def test_damaged_image_is_decoded_or_refused(tmp_path: Path, kind: str) -> None:
    (tmp_path / "pairs.csv").write_text("image,caption\nx.png,one\n")

    def decode() -> None:
        (sample,) = list(read_pairs(tmp_path / "pairs.csv"))
        height, width, channels = sample.image.shape
        assert sample.image.dtype == np.uint8
        assert channels == 3
        assert 0 < height * width <= MAX_PIXELS

    good = _PICTURES[kind]
    (tmp_path / "x.png").write_bytes(good)
    assert _outcome(decode) is None
    seed = list(_PICTURES).index(kind)
    outcomes = []
    for content in _changes(good, seed, truncated=_TRUNCATED, flipped=_FLIPPED):
        (tmp_path / "x.png").write_bytes(content)
        outcomes.append(_outcome(decode))
    assert len(outcomes) == _TRUNCATED + _FLIPPED
    # A file of one byte holds no picture.
    assert outcomes[0] is not None


@pytest.mark.parametrize("kind", _PICTURES)
def test_file_that_was_cut_short_is_found_before_training(tmp_path: Path, kind: str) -> None:
    """A file that is accepted when the table is read can be decoded later, whatever part of it is missing."""
    (tmp_path / "pairs.csv").write_text("image,caption\nx.png,one\n")
    refused = 0
    for content in _changes(_PICTURES[kind], 0, truncated=20, flipped=0):
        (tmp_path / "x.png").write_bytes(content)
        try:
            data = read_pairs(tmp_path / "pairs.csv")
        except BadInput:
            refused += 1
        else:
            data[0]
    # An animation and the end of a file can lack a part that the first picture does not need.
    assert refused >= 10


_ROWS = 6
_TABLES = {
    "csv": "image,caption,label\n" + "".join(f"{n}.ppm,caption {n},c{n % 2}\n" for n in range(_ROWS)),
    "csv quoted": '"image","caption"\n' + "".join(f'"{n}.ppm","a ""caption"", {n}\nof lines"\n' for n in range(_ROWS)),
    "csv semicolon": "caption;image\r\n" + "".join(f"caption {n};{n}.ppm\r\n" for n in range(_ROWS)),
    "tsv plain": "image\tcaption\n" + "".join(f'{n}.ppm\t"caption" {n}"\n' for n in range(_ROWS)),
    "tsv quoted": "image\tcaption\n" + "".join(f'{n}.ppm\t"caption, {n}"\n' for n in range(_ROWS)),
    "jsonl": "".join(json.dumps({"image": f"{n}.ppm", "caption": [f"\u00e9 {n}", "b"]}) + "\n" for n in range(_ROWS)),
}
_ODD = ('"', '""', "\n", "\r", "\x00", "\ufeff", "\u2028", "\x1b[31m", ",", "\t", ";", "\\", "{", "[", "\ud800", "'")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one small picture for each row."""
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(_ROWS):
        Image.new("RGB", (1, 1), (number, 0, 0)).save(folder / f"{number}.ppm")
    return folder


def _check_rows(table: Path, content: bytes) -> bool:
    """Read a table; return whether it was accepted. Each image that an accepted table names is the image of a row."""
    table.write_bytes(content)
    paths: list[str] = []
    captions: list[str] = []

    def read() -> None:
        data = read_pairs(table)
        paths.extend(data.paths)
        captions.extend(data.captions)

    if _outcome(read) is not None:
        return False
    named = re.findall(r"\d\.ppm", content.decode("utf-8-sig"))
    # An image with a list of captions is the image of several rows.
    assert list(dict.fromkeys(paths)) == list(dict.fromkeys(named))
    assert not any(".ppm" in caption for caption in captions)
    return True


@pytest.mark.usefixtures("silent")
@pytest.mark.parametrize("kind", _TABLES)
def test_damaged_table_keeps_every_row_or_is_refused(pictures: Path, kind: str) -> None:
    good = _TABLES[kind].encode()
    table = pictures / ("pairs." + kind.split()[0])
    assert _check_rows(table, good)
    rng = np.random.default_rng(len(kind))
    inputs = list(_changes(good, len(kind), truncated=20, flipped=30))
    # Characters that matter to a parser are put at random places, and at the beginning and the end of the file.
    for odd in _ODD:
        for place in (0, len(good), *rng.integers(0, len(good), 2)):
            inputs.append(good[:place] + odd.encode("utf-8", "surrogatepass") + good[place:])
    accepted = sum(_check_rows(table, content) for content in inputs)
    assert len(inputs) == 50 + 4 * len(_ODD)
    assert 0 < accepted < len(inputs)


@pytest.mark.usefixtures("silent")
@pytest.mark.parametrize("kind", _TABLES)
def test_table_in_another_encoding_is_read_right_or_refused(pictures: Path, kind: str) -> None:
    text = _TABLES[kind].replace("\\u00e9", "\u00e9")
    table = pictures / ("pairs." + kind.split()[0])
    for encoding in ("utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le"):
        assert not _check_rows(table, text.encode(encoding)), encoding
    # These encodings write letters without accents as UTF-8 does.
    for encoding in ("latin-1", "cp1252", "gb18030"):
        assert _check_rows(table, text.encode(encoding)) == text.isascii(), encoding


@pytest.mark.usefixtures("silent")
def test_damaged_parquet_is_read_right_or_refused(pictures: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    file = io.BytesIO()
    names = [f"{number}.ppm" for number in range(_ROWS)]
    captions = [f"caption {number}" for number in range(_ROWS)]
    parquet.write_table(pyarrow.table({"image": names, "caption": captions}), file, write_page_checksum=True)
    table = pictures / "pairs.parquet"
    accepted = 0
    inputs = list(_changes(file.getvalue(), 3, truncated=20, flipped=60))
    rows: list[tuple[str, str]] = []

    def read() -> None:
        data = read_pairs(table)
        rows[:] = zip(data.paths, data.captions, strict=True)

    for content in inputs:
        table.write_bytes(content)
        if _outcome(read) is None:
            accepted += 1
            assert rows == list(zip(names, captions, strict=True))
    assert len(inputs) == 80
    assert accepted > 0


@pytest.mark.usefixtures("silent")
@pytest.mark.parametrize("seed", range(60))
def test_damaged_folder_keeps_every_image_or_is_refused(tmp_path: Path, seed: int) -> None:
    """Change a folder of images with captions in one or two random ways."""
    rng = np.random.default_rng(seed)
    for number in range(4):
        Image.new("RGB", (1, 1), (number, 0, 0)).save(tmp_path / f"{number}.ppm")
        (tmp_path / f"{number}.txt").write_text(f"caption {number}\n")
    for _ in range(1 + seed % 2):
        name = str(rng.integers(0, 4))
        text, image = tmp_path / f"{name}.txt", tmp_path / f"{name}.ppm"
        if not (text.is_file() and image.is_file()):
            continue
        match int(rng.integers(0, 10)):
            case 0:
                text.unlink()
            case 1:
                image.unlink()
            case 2:
                text.write_bytes(rng.bytes(20))
            case 3:
                image.rename(image.with_suffix(".heic"))
            case 4:
                text.rename(text.with_suffix(".TXT"))
            case 5:
                image.rename(image.with_suffix(".PNG"))
            case 6:
                text.write_text("one\r\ntwo\r\n\r\n\u2028\n")
            case 7:
                image.unlink()
                image.mkdir()
            case 8:
                shutil.copy(image, tmp_path / f".{name}.ppm")
            case _:
                (tmp_path / "below").mkdir(exist_ok=True)
                image.rename(tmp_path / "below" / image.name)
                text.rename(tmp_path / "below" / text.name)
    paths: list[str] = []
    if _outcome(lambda: paths.extend(read_pairs(tmp_path).paths)) is None:
        assert {Path(path).stem for path in paths} == {"0", "1", "2", "3"}
