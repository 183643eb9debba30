"""Pages of search results and of suspects, made from any texts and pictures, and texts that try to break a page."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from drrho_clip.data import Sample, ZeroShot
from drrho_clip.errors import BadInput
from drrho_clip.report import write_search_page, write_suspects_page
from drrho_clip.search import Answer, Match

HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "' onmouseover='alert(1)",
    "</section></main></body></html>",
    "<!-- a comment that does not end",
    "<style>body{display:none}</style>",
    "]]></svg><svg onload=alert(1)>",
    "{{ 7 * 7 }}{% raw %}",
    "&lt;b&gt; &amp;amp; &#60;i&#62;",
    "\u202eright to left override",
    "\u2069\u2066\u202astray isolates\u202c",
    "bell \x07, escape \x1b[31m, nul \x00, c1 \x9b31m",
    "surrogate \ud83d and noncharacter \uffff",
    "עברית mixed with English",
    "line\nbreaks\r\nand\ttabs",
    "z" + "\u0335\u0321\u034a" * 60 + "algo",
    "x" * 5000,
    "🐱‍👤 emoji",
    "${jndi:ldap://a} `rm -rf`",
    "javascript:alert(1)",
]


class Pictures:
    """A data set in memory: pictures of one size, or an error for a row whose picture is None."""

    name = "pictures"

    def __init__(self, pictures: Sequence[np.ndarray | None], captions: Sequence[str]) -> None:
        self._pictures, self.captions = pictures, captions
        self.image_ids = np.arange(len(captions), dtype=np.int64)

    def __len__(self) -> int:
        return len(self.captions)

    def __getitem__(self, index: int, /) -> Sample:
        picture = self._pictures[index]
        if picture is None:
            raise BadInput(f"row {index}: cannot decode image <b>.png: it is gone")
        return Sample(index, picture, self.captions[index])

    def fingerprint(self) -> str:
        return "none"

    def image_digests(self) -> np.ndarray:
        return np.zeros((len(self), 16), dtype=np.uint8)

    def zero_shot(self, *, image_size: int | None = None, resize_mode: str = "crop") -> ZeroShot | None:
        return None


class Pair(NamedTuple):
    row: int
    image: str
    caption: str
    score: float
    better_caption: str


def squares(count: int) -> list[np.ndarray | None]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (6, 8, 3), dtype=np.uint8) for _ in range(count)]


def search_page(folder: Path, texts: Sequence[str], pictures: Sequence[np.ndarray | None] | None = None) -> Path:
    """Write the page of a search; the texts are captions and paths, the first two also queries and unknown words."""
    data = Pictures(squares(len(texts)) if pictures is None else pictures, texts)
    answers = [
        Answer(text, (text,), tuple(Match(row, other, other, 0.5) for row, other in enumerate(texts)))
        for text in texts[:2]
    ]
    return write_search_page(folder / "p.html", answers, data, data_name=texts[0], run_name=texts[1])


def suspects_page(folder: Path, texts: Sequence[str], pictures: Sequence[np.ndarray | None] | None = None) -> Path:
    """Write the page of suspects; the texts are captions, paths and captions that fit better."""
    data = Pictures(squares(len(texts)) if pictures is None else pictures, texts)
    ranked = [Pair(row, text, text, 3.0 - row, text) for row, text in enumerate(texts)]
    names = {"data_name": texts[0], "run_name": texts[1], "table_name": texts[2]}
    return write_suspects_page(folder / "p.html", ranked, data, num_wrong=min(4, len(texts)), caveat=texts[0], **names)


PAGES: dict[str, Callable[..., Path]] = {"search": search_page, "suspects": suspects_page}


COLOURS = {"red": 0, "green": 1, "blue": 2}


def write_table(folder: Path, count: int) -> Path:
    """Write pictures of one colour each, with captions that name the colour, and return the table."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    with (folder / "pairs.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "caption"])
        for row in range(count):
            name = list(COLOURS)[row % 3]
            pixels = rng.integers(0, 60, (12, 10, 3), dtype=np.uint8)
            pixels[..., COLOURS[name]] += 180
            Image.fromarray(pixels).save(folder / f"{row}.png")
            writer.writerow([f"{row}.png", f"a {('nice', 'plain', 'odd', 'old')[row % 4]} {name} thing"])
    return folder / "pairs.csv"


class Reader(HTMLParser):
    """Reads a page as a browser does: the tags with the names of their attributes, and all texts."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.skeleton: list[tuple[str, tuple[str, ...]]] = []
        self.texts: list[str] = []
        self.values: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.skeleton.append((tag, tuple(name for name, _ in attrs)))
        self.values += [value or "" for _, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        self.skeleton.append((f"/{tag}", ()))

    def handle_comment(self, data: str) -> None:
        self.skeleton.append(("comment", ()))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)
