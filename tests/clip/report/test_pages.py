"""The pages of search results and of suspects without a browser: hostile texts, pictures of all sizes, bounded size."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from drrho_clip.errors import BadInput
from drrho_clip.report import write_suspects_page
from drrho_clip.report.cards import LONGEST_TEXT, MOST_PICTURES, shortened
from drrho_clip.report.pictures import thumbnail
from drrho_clip.report.scores import score_histogram
from drrho_clip.report.style import clean
from helpers.pages import HOSTILE, PAGES, Pair, Pictures, Reader, squares


def page_of(kind: str, *arguments: Any) -> str:
    """Return the text of a page of this kind."""
    return PAGES[kind](*arguments).read_text(encoding="utf-8")


@pytest.mark.parametrize("kind", PAGES)
def test_hostile_texts_change_no_tag_and_no_attribute(kind: str, tmp_path: Path) -> None:
    # With harmless texts the page has the same tags and attributes in the same order; only the texts differ.
    harmless = Reader(page_of(kind, tmp_path, [f"text {number}" for number in range(len(HOSTILE))]))
    for shift in range(0, len(HOSTILE), 3):
        texts = HOSTILE[shift:] + HOSTILE[:shift]
        page = Reader(page_of(kind, tmp_path, texts))
        assert page.skeleton == harmless.skeleton


@pytest.mark.parametrize("kind", PAGES)
def test_hostile_texts_are_shown_as_they_are_except_for_what_breaks_pages(kind: str, tmp_path: Path) -> None:
    page = Reader(page_of(kind, tmp_path, HOSTILE))
    # HTML reads every line break as a single line feed.
    expected = [re.sub("\r\n?", "\n", clean(shortened(text))) for text in HOSTILE]
    texts = [re.sub("\r\n?", "\n", text) for text in page.texts]
    assert [text for text in expected if text not in texts] == []
    values = [re.sub("\r\n?", "\n", value) for value in page.values]
    assert [text for text in expected if text not in values] == []  # in the attribute title, and inside alt


@pytest.mark.parametrize("kind", PAGES)
def test_no_control_character_and_no_direction_override_reaches_a_page(kind: str, tmp_path: Path) -> None:
    characters = "".join(map(chr, [*range(32), *range(127, 160), *range(0x202A, 0x202F), *range(0x2066, 0x206A)]))
    page = page_of(kind, tmp_path, [f"a{characters}b", "plain", characters])
    assert set(page) & set(characters) <= set("\t\n\r")


@pytest.mark.parametrize("kind", PAGES)
def test_number_of_pictures_is_bounded_and_told(kind: str, tmp_path: Path) -> None:
    page = page_of(kind, tmp_path, [f"text {number}" for number in range(1000)])
    pictures = page.count("<img ")
    assert pictures == MOST_PICTURES
    told = {"search": "The first 150 of 1000 images are shown", "suspects": "The worst 300 of 1,000 pairs are shown"}
    assert told[kind] in page


@pytest.mark.parametrize("kind", PAGES)
def test_a_picture_that_cannot_be_read_leaves_one_line(kind: str, tmp_path: Path) -> None:
    pictures = squares(3)
    pictures[1] = None
    page = page_of(kind, tmp_path, ["a", "b", "c"], pictures)
    flaws = re.findall('<p class="flaw">(.*?)</p>', page)
    assert set(flaws) == {"The picture cannot be shown: row 1: cannot decode image &lt;b&gt;.png: it is gone"}
    assert page.count("<img ") == page.count('<li class="card') - len(flaws)


def opened(uri: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((1, 1), (1, 1)),
        ((64, 64), (64, 64)),
        ((400, 250), (192, 120)),  # 0.1 megapixels
        ((250, 400), (120, 192)),
        ((2000, 1000), (192, 96)),
        ((10_000, 5_000), (192, 96)),  # 50 megapixels
        ((20_000, 3), (192, 1)),
        ((65, 1), (65, 1)),
    ],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_pictures_of_all_sizes_become_thumbnails(
    size: tuple[int, int], expected: tuple[int, int], channels: int
) -> None:
    width, height = size
    picture = np.full((height, width, channels), (200, 30, 90)[:channels], dtype=np.uint8)
    made = thumbnail(picture)
    assert (made.width, made.height) == expected
    shown = opened(made.uri)
    assert shown.size == expected
    assert made.kind == ("drawn" if max(size) <= 64 else "photo")
    middle = np.atleast_1d(np.asarray(shown)[expected[1] // 2, expected[0] // 2]).astype(int)
    np.testing.assert_allclose(middle, (200, 30, 90)[:channels], atol=4)
    assert len(made.uri) < 40_000


def test_noise_makes_the_largest_thumbnail_and_a_page_of_them_stays_small() -> None:
    # Noise is what JPEG compresses worst. A larger picture would lose noise when it is reduced.
    picture = np.random.default_rng(0).integers(0, 256, (192, 192, 3), dtype=np.uint8)
    assert MOST_PICTURES * len(thumbnail(picture).uri) < 12e6


@pytest.mark.parametrize(
    ("scores", "wrong"),
    [
        ([2.0, 0.5, 0.0, -1.0], 3),
        ([-0.5, -1.0], 0),
        ([2.0, 1.0], 2),
        ([0.0], 1),
        ([3.0, 3.0, 3.0], 2),
        ([3.0, 3.0, 3.0], None),
        ([1e9, 0.3, 0.2, 0.1, -1e9], 2),
        ([2e-12, 1e-12], 2),
    ],
)
def test_histogram_counts_every_score_on_the_right_side(scores: list[float], wrong: int | None) -> None:
    doubtful = None if wrong is None else np.arange(len(scores)) < wrong
    chart = score_histogram(np.array(scores), doubtful=doubtful, key="k", title="t", x_name="x")
    words = [mark.text for mark in chart.marks if mark.tag == "text"]
    if wrong is None:
        assert f"all captions: {len(scores)}" in words
    else:
        assert f"probably wrong: {wrong}" in words
        assert f"all others: {len(scores) - wrong}" in words
        assert (f"{wrong} have at least" in chart.description) is (wrong > 0)
    kinds = {kind for mark in chart.marks for kind in mark.get("class", "").split()}
    assert ("second" in kinds) is ("threshold" in kinds) is bool(wrong)


def test_page_of_suspects_names_how_many_are_probably_wrong_and_marks_them(tmp_path: Path) -> None:
    page = page_of("suspects", tmp_path, [f"caption {number}" for number in range(10)])
    assert '<strong class="drrho">4</strong> of 10 captions are probably wrong' in page
    assert page.count('<li class="card doubtful">') == 4
    assert "All 10 pairs are shown" in page


@pytest.mark.parametrize("scores", [[], [1.0, float("nan")], [float("inf")]])
def test_suspects_without_finite_scores_are_refused_and_no_file_is_written(scores: list[float], tmp_path: Path) -> None:
    ranked = [Pair(0, "a.png", "a", value, "") for value in scores]
    data = Pictures(squares(1), ["a"])
    with pytest.raises(BadInput, match=r"must be finite|at least one pair"):
        write_suspects_page(
            tmp_path / "p.html", ranked, data, num_wrong=None, data_name="d", run_name="r", table_name="t"
        )
    assert list(tmp_path.iterdir()) == []


def test_long_texts_are_cut_off() -> None:
    assert shortened("x" * LONGEST_TEXT) == "x" * LONGEST_TEXT
    assert shortened("x" * (LONGEST_TEXT + 1)) == "x" * (LONGEST_TEXT - 1) + "…"
