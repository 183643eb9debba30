"""Readers of the packages of pictures: each returns pairs of a picture file and a caption, with their concepts.

A reader takes the roots of the installed files ("/" after apt-get install) and a folder for the PNG files that it has
to make, because some packages hold drawings in SVG.
"""

from __future__ import annotations

import csv
import importlib
import re
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final
from xml.etree import ElementTree

from drrho_clip.files.disk import write_atomic
from drrho_clip.reproduce.packaged.concepts import Pair, grouped, picture_key, title_key
from drrho_clip.reproduce.packaged.packages import (
    OPENCLIPART_PNG,
    OPENCLIPART_SVG,
    OPENMOJI,
    RESVG,
    STAMPS,
    module_folder,
)

SIDE: Final = 224
# OpenClipart's drawings with more pixels are left out.
MOST_PIXELS: Final = 4_000_000
_WORK: Final = "{http://web.resource.org/cc/}Work"
_DC: Final = "{http://purl.org/dc/elements/1.1/}"


def openclipart(roots: Sequence[Path], made: Path) -> list[Pair]:  # noqa: ARG001 (the same signature for all readers)
    """Return OpenClipart's drawings with their titles as they are; untitled and huge drawings are left out."""
    pictures, drawings = OPENCLIPART_PNG.folder(roots), OPENCLIPART_SVG.folder(roots)
    rows: list[tuple[Path, str]] = []
    keys: list[list[str]] = []
    for picture in sorted(pictures.rglob("*.png")):
        drawing = drawings / picture.relative_to(pictures).with_suffix(".svg")
        # Links lead to drawings that the folders also hold under another name.
        if picture.is_symlink() or not drawing.is_file() or _num_pixels(picture) > MOST_PIXELS:
            continue
        title, keywords = _about(drawing)
        if title_key(title):
            rows.append((picture, title))
            keys.append([f"title {title_key(title)}", f"picture {picture_key(picture)}", *_of_keywords(keywords)])
    return _pairs(rows, keys)


def _num_pixels(picture: Path) -> int:
    """Return the number of pixels by the header of a PNG file; the largest drawings would take gigabytes."""
    with picture.open("rb") as file:
        width, height = struct.unpack(">II", file.read(24)[16:])
    return int(width * height)


def _about(drawing: Path) -> tuple[str, list[str]]:
    """Return title and keywords of an SVG file; an unreadable file has neither."""
    try:
        work = next(ElementTree.parse(drawing).getroot().iter(_WORK), None)
    except ElementTree.ParseError:
        return "", []
    if work is None:
        return "", []
    # The author and the publisher have titles too; the title of the work is a direct child.
    title = " ".join((work.findtext(f"{_DC}title") or "").split())
    subject = work.find(f"{_DC}subject")
    items = [] if subject is None else [item for item in subject.iter() if item.tag.endswith("}li")]
    return title, [" ".join((item.text or "").split()) for item in items]


def _of_keywords(keywords: Sequence[str]) -> list[str]:
    """Return a key of a set of keywords; short lists, such as "unsorted" alone, say too little about a picture."""
    words = sorted({word.lower() for word in keywords} - {"", "unsorted"})
    return [f"keywords {'|'.join(words)}"] if len(words) > 2 else []


def openmoji(roots: Sequence[Path], made: Path) -> list[Pair]:
    """Return the emoji of OpenMoji with their annotations; variants of a skin colour are left out."""
    folder = OPENMOJI.folder(roots)
    with (folder / "data" / "openmoji.csv").open(encoding="utf-8", newline="") as file:
        table = [row for row in csv.DictReader(file) if not row["skintone"]]
    rows: list[tuple[Path, str]] = []
    keys: list[list[str]] = []
    for row in table:
        drawing = folder / "color" / "svg" / f"{row['hexcode']}.svg"
        if not drawing.is_file() or not title_key(row["annotation"]):
            continue
        # A man, a woman and a person who do the same are one concept.
        neutral = re.sub(r"\b(?:wo)?m[ae]n\b|\bperson\b|\bpeople\b", "", title_key(row["annotation"]))
        tags = [tag.strip() for tag in f"{row['tags']},{row['openmoji_tags']}".split(",") if tag.strip()]
        picture = as_png(drawing, made)
        if picture is None:
            continue
        rows.append((picture, row["annotation"]))
        keys.append([f"title {' '.join(neutral.split()) or row['annotation']}", *_of_keywords(tags)])
    return _pairs(rows, keys)


def stamps(roots: Sequence[Path], made: Path) -> list[Pair]:
    """Return the stamps of Tux Paint with their English captions, the first lines of the text files."""
    folder = STAMPS.folder(roots)
    rows: list[tuple[Path, str]] = []
    keys: list[list[str]] = []
    for text in sorted(folder.rglob("*.txt")):
        lines = text.read_text(encoding="utf-8", errors="replace").splitlines()
        caption = lines[0].strip() if lines else ""
        picture: Path | None = text.with_suffix(".png")
        drawing = text.with_suffix(".svg")
        if picture is not None and not picture.is_file():
            picture = as_png(drawing, made) if drawing.is_file() else None
        if picture is not None and title_key(caption):
            rows.append((picture, caption))
            keys.append([f"title {title_key(caption)}", f"picture {picture_key(picture)}"])
    return _pairs(rows, keys)


def as_png(drawing: Path, made: Path) -> Path | None:
    """Draw an SVG file on white, and return the PNG file, or None for a damaged file; a finished file stays."""
    module_folder(RESVG)
    made.mkdir(parents=True, exist_ok=True)
    # Drawings of two folders may share a name, so the PNG file is named by the content of the drawing.
    path = made / f"{picture_key(drawing)[:32]}.png"
    if not path.exists():
        draw: Callable[..., bytes] = importlib.import_module("resvg_py").svg_to_bytes
        # Fonts differ between computers, so no font is used.
        try:
            content = draw(svg_path=str(drawing), width=SIDE, background="white", skip_system_fonts=True)
        except ValueError:
            return None
        # A run that is stopped here must not leave half of a picture, because a finished file stays.
        write_atomic(path, bytes(content))
    return path


def _pairs(rows: Sequence[tuple[Path, str]], keys: Sequence[Sequence[str]]) -> list[Pair]:
    """Join rows and concepts; of equal pictures with equal captions the first stays."""
    pairs = {
        (picture_key(path), caption): Pair(path, caption, concept)
        for (path, caption), concept in reversed([*zip(rows, grouped(keys), strict=True)])
    }
    return list(reversed(pairs.values()))
