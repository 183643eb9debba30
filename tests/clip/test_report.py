"""The report without a browser: pictures, ticks and marks by hand, the words of the page, and that it loads nothing."""

from __future__ import annotations

import base64
import io
import math
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from drrho_clip.errors import BadInput
from drrho_clip.report import (
    Chart,
    GalleryRow,
    ReportData,
    RetrievedImage,
    bar_chart_svg,
    charts,
    render_report,
    write_report,
)
from drrho_clip.report.pictures import data_uri, encode_png
from drrho_clip.report.style import PALETTE, clean, css_class, figures, label, number, ordered, percent

DASH = "\N{EN DASH}"


class TestPng:
    @pytest.mark.parametrize(
        ("shape", "mode"),
        [((5, 7), "L"), ((5, 7, 1), "L"), ((5, 7, 3), "RGB"), ((5, 7, 4), "RGBA"), ((1, 1, 3), "RGB"), ((300, 2), "L")],
    )
    def test_file_holds_the_pixels_and_no_date(self, shape: tuple[int, ...], mode: str) -> None:
        image = np.random.default_rng(0).integers(0, 256, size=shape, dtype=np.uint8)
        data = encode_png(image)
        read = Image.open(io.BytesIO(data))
        assert (read.format, read.mode) == ("PNG", mode)
        np.testing.assert_array_equal(np.asarray(read), image.reshape(shape[:2] if mode == "L" else shape))
        assert set(re.findall(rb"IHDR|PLTE|IDAT|IEND|tIME|tEXt|iTXt|zTXt", data)) == {b"IHDR", b"IDAT", b"IEND"}

    def test_view_is_encoded_like_its_copy(self) -> None:
        image = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
        assert encode_png(image[:, ::-1]) == encode_png(image[:, ::-1].copy()) != encode_png(image)

    def test_data_uri_holds_the_file(self) -> None:
        image = np.zeros((2, 2), dtype=np.uint8)
        head, body = data_uri(image).split(",")
        assert head == "data:image/png;base64"
        assert base64.b64decode(body) == encode_png(image)

    @pytest.mark.parametrize(
        "image",
        [np.zeros((2, 2)), np.zeros(4, np.uint8), np.zeros((2, 2, 2), np.uint8), np.zeros((0, 2, 3), np.uint8)],
    )
    def test_other_arrays_are_refused(self, image: Any) -> None:
        with pytest.raises(BadInput, match=r"image must be a uint8 array .*, got "):
            encode_png(image)


class TestNumbersAndWords:
    def test_shares_are_written_in_per_cent(self) -> None:
        assert percent(0.5196) == "52.0\N{NO-BREAK SPACE}%"
        assert percent(math.nan) == DASH

    @pytest.mark.parametrize(
        ("value", "short", "full"),
        [
            (0.0, "0", "0.00"),
            (1.0, "1", "1.00"),
            (0.2281, "0.228", "0.228"),
            (-12.3456, "\N{MINUS SIGN}12.3", "\N{MINUS SIGN}12.3"),
            (123.4, "123", "123"),
            (12345.6, "12,346", "12,346"),
            (3.2e9, "3.2e9", "3.2e9"),
            (4e-7, "4e\N{MINUS SIGN}7", "4e\N{MINUS SIGN}7"),
            (math.inf, DASH, DASH),
        ],
    )
    def test_numbers_have_three_digits(self, value: float, short: str, full: str) -> None:
        assert (number(value), figures(value)) == (short, full)

    def test_characters_that_xml_cannot_hold_are_replaced(self) -> None:
        assert clean("a\x00b\x1bc\ud800d\ufffee\nf<&") == "a\ufffdb\ufffdc\ufffdd\ufffde\nf<&"

    def test_no_two_names_have_one_colour(self) -> None:
        # The charts are drawn with these colours, and each is then replaced by its name.
        assert len(set(PALETTE.values())) == len(PALETTE)

    def test_methods_have_a_fixed_order_and_colour(self) -> None:
        assert ordered(["siglip", "drrho", "clip", "siglip", "reference"]) == ["reference", "clip", "drrho", "siglip"]
        assert css_class("drrho") == "drrho"
        assert css_class("siglip") == css_class("siglip") != css_class("drrho")
        assert re.fullmatch("other-[0-3]", css_class('" onload="x'))


def drawn(chart: Chart, kind: str) -> list[ElementTree.Element]:
    """The marks of a chart that have the class `kind`, in drawing order."""
    return [mark for mark in chart.marks if kind in mark.get("class", "").split()]


def corners(mark: ElementTree.Element) -> np.ndarray:
    """The points of a path, in units of the chart."""
    moved = re.findall(r"-?[0-9.]+", mark.get("transform", "translate(0 0)"))
    points = np.array(re.findall(r"-?[0-9.]+", mark.get("d", "")), dtype=float).reshape(-1, 2)
    return np.asarray(points + np.array(moved, dtype=float))


def words(chart: Chart) -> dict[str, ElementTree.Element]:
    return {mark.text or "": mark for mark in chart.marks if mark.tag == "text"}


class TestCharts:
    @pytest.mark.parametrize("value", [0.0, 1e-9, 0.5, 1.0])
    def test_an_axis_of_shares_stays_between_0_and_1(self, value: float) -> None:
        line = charts.Line("clip", [1.0, 2.0], [value, value])
        chart = charts.lines([line], key="k", title="t", x_name="x", y_name="y", share=True)
        shares = [float(text.removesuffix(" %")) for text in words(chart) if text.endswith(" %")]
        assert shares
        assert all(0 <= share <= 100 for share in shares)

    @given(
        low=st.floats(-1e6, 1e6),
        width=st.floats(1e-6, 1e6),
        most=st.integers(2, 9),
    )
    def test_ticks_are_round_inside_and_few(self, low: float, width: float, most: int) -> None:
        high = low + width
        ticks = charts.round_ticks(low, high, most)
        assert len(ticks) <= most
        slack = 1e-8 * max(abs(low), abs(high), width)
        assert all(low - slack <= tick <= high + slack for tick in ticks)
        steps = np.diff(ticks)
        if len(steps):
            # A step of 1e-7 at 1e6 has a rounding error of 1e-3: the digit in front must not fall from 1 to 9.99 by it.
            leading = steps[0] / 10.0 ** math.floor(math.log10(steps[0] * (1 + 1e-3)))
            assert min(abs(leading - round_step) for round_step in (1, 2, 5)) < 1e-3 * leading
            np.testing.assert_allclose(steps, steps[0], rtol=1e-3)

    def test_ticks_by_hand(self) -> None:
        assert charts.round_ticks(0, 0.3, 5) == [0.0, 0.1, 0.2, 0.3]
        assert charts.round_ticks(-4, 11, 5) == [0.0, 5.0, 10.0]
        assert charts.round_ticks(2, 2) == [2]

    @pytest.mark.parametrize(
        ("ticks", "names"),
        [
            ([0.0, 0.1, 0.2], ["0", "0.1", "0.2"]),
            ([-0.5, 0.0, 0.5], ["\N{MINUS SIGN}0.5", "0", "0.5"]),
            ([4.88, 4.885, 4.89], ["4.880", "4.885", "4.890"]),
            ([0.0, 5.0, 10.0], ["0", "5", "10"]),
            ([500.0, 1000.0], ["0.5 k", "1.0 k"]),
            ([0.0, 1e6, 2e6], ["0", "1 M", "2 M"]),
            ([0.0, 2e-7], ["0", "2e\N{MINUS SIGN}7"]),
            ([3.0], ["3"]),
            ([0.0], ["0"]),
        ],
    )
    def test_tick_names_by_hand(self, ticks: list[float], names: list[str]) -> None:
        assert charts.tick_names(ticks) == names

    @given(low=st.floats(-1e5, 1e5), width=st.floats(1e-3, 1e5))
    def test_tick_names_differ(self, low: float, width: float) -> None:
        names = charts.tick_names(charts.round_ticks(low, low + width))
        assert len(set(names)) == len(names)

    def test_bars_are_as_long_as_their_means(self) -> None:
        chart = charts.bars([charts.Bar("clip", [0.2, 0.3]), charts.Bar("drrho", [0.5])], key="k", title="t")
        found = {mark.get("class"): corners(mark)[:, 0] for mark in drawn(chart, "bar")}
        # 392 - 130 units stand for 0.5, the largest value.
        assert {kind: (x.min(), x.max()) for kind, x in found.items()} == {
            "bar clip": (130, 261),
            "bar drrho": (130, 392),
        }
        seeds = [mark.get("transform", "") for mark in drawn(chart, "seed")]
        assert [seed.split()[0] for seed in seeds] == ["translate(234.8", "translate(287.2"]
        assert "25.0\N{NO-BREAK SPACE}%" in words(chart)
        means = "CLIP 25.0\N{NO-BREAK SPACE}%; DRRho-CLIP 50.0\N{NO-BREAK SPACE}%."
        assert chart.description == f"{means} Means of 2 seeds; the dots are the seeds."

    def test_method_without_a_value_has_no_bar(self) -> None:
        chart = charts.bars([charts.Bar("clip", []), charts.Bar("drrho", [0.5])], key="k", title="t")
        assert [mark.get("class") for mark in drawn(chart, "bar")] == ["bar drrho"]

    def test_line_runs_through_its_points(self) -> None:
        curve = charts.Line("drrho", [50, 100], [0.0, 1.0])
        chart = charts.lines([curve], key="k", title="t", x_name="x", y_name="y", share=True)
        # x runs from 0 at 55 (room for "100 %") to 100 at 338, y from 0 at 254 to 1 at 30.
        (mark,) = drawn(chart, "line")
        assert mark.get("class") == "line drrho"
        np.testing.assert_array_equal(corners(mark), [[196.5, 254], [338, 30]])

    def test_noise_does_not_fill_the_picture(self) -> None:
        # A range of a thousandth of the level, an axis of a hundredth: the curve keeps to a tenth of the height, 100.
        curve = charts.Line("clip", [0, 1], [10.0, 10.01])
        (mark,) = drawn(charts.panels([curve], key="k", title="t", x_name="x"), "line")
        start, end = corners(mark)[:, 1]
        assert start - end == pytest.approx(10, abs=0.11)

    def test_long_line_is_drawn_as_means_of_neighbours(self) -> None:
        curve = charts.Line("clip", list(range(480)), [float(i % 2) for i in range(480)])
        chart = charts.panels([curve, charts.Line("drrho", [0, 1], [0, 1])], key="k", title="t", x_name="x")
        points = corners(drawn(chart, "clip")[0])
        assert len(points) == charts.MOST_POINTS
        assert len(set(points[:, 1])) == 1  # every four neighbours have the mean 1/2

    @pytest.mark.parametrize(
        ("ends", "places"),
        [
            # The axis runs from 0 at 254 to 1 at 30. Names stand 5 below the end of their curve, 20 apart.
            ([1.0, 0.5], [35, 147]),
            ([1.0, 0.99, 0.5], [35, 55, 147]),
            ([1.0, 0.01, 0.005, 0.0], [35, 219, 239, 259]),
        ],
    )
    def test_names_of_curves_are_apart_and_inside(self, ends: list[float], places: list[float]) -> None:
        methods = ["reference", "clip", "sogclr", "drrho"]
        curves = [charts.Line(method, [0, 1], [0.0, end]) for method, end in zip(methods, ends, strict=False)]
        chart = charts.lines(curves, key="k", title="t", x_name="x", y_name="y", share=True)
        found = [float(words(chart)[label(curve.method)].get("y", "nan")) for curve in curves]
        np.testing.assert_allclose(found, places, atol=0.02)

    def test_bins_are_logarithmic_if_weights_span_decades(self) -> None:
        wide = charts.Bins.shared([np.geomspace(0.01, 1, 100), np.array([0.0])], count=4)
        assert wide.logarithmic
        np.testing.assert_allclose(np.diff(np.log(wide.edges)), np.log(wide.edges[1] / wide.edges[0]))
        narrow = charts.Bins.shared([np.linspace(0.5, 1, 100)], count=4)
        assert not narrow.logarithmic
        np.testing.assert_allclose(
            narrow.edges, np.array([0, 0.255, 0.51, 0.765, 1.02]) * np.quantile(np.linspace(0.5, 1, 100), 0.998)
        )
        assert not charts.Bins.shared([np.zeros(3)]).logarithmic

    def test_shares_count_everything_once(self) -> None:
        bins = charts.Bins(np.array([1.0, 2.0, 4.0]), True)
        np.testing.assert_allclose(bins.shares(np.array([0.0, 1.5, 3.0, 99.0])), [0.5, 0.5])

    def test_histogram_by_hand(self) -> None:
        # Two bins of equal width on 56..466; all of "clean" in the first, a quarter of "swapped" in the second.
        bins = charts.Bins(np.array([0.0, 1.0, 2.0]), False)
        groups = {"clean": np.array([0.5]), "swapped": np.array([0.5, 0.5, 0.5, 1.5])}
        chart = charts.histogram("drrho", groups, bins=bins, highest=1.0, key="k", title="t", x_name="x")
        (first,), (second,) = drawn(chart, "first"), drawn(chart, "second")
        # y runs from 0 at 254 to 1 at 62.
        steps = [[56, 254], [56, 62], [261, 62], [261, 254], [466, 254]]
        np.testing.assert_array_equal(corners(first)[:5], steps)
        assert second.get("class") == "second drrho"
        np.testing.assert_array_equal(corners(second)[1:5], [[56, 110], [261, 110], [261, 206], [466, 206]])
        assert "swapped: 4, median 0.500, mean 0.750" in chart.description
        assert "swapped: median 0.500" in words(chart)

    def test_colours_are_the_variables_of_the_page(self) -> None:
        chart = charts.bars([charts.Bar("clip", [0.2, 0.3])], key="k", title="t")
        styles = " ".join(mark.get("style", "") for mark in chart.marks)
        assert {"clip", "card", "ink", "soft", "rule"} <= set(re.findall(r"var\(--([\w-]+)\)", styles))
        assert "#" not in styles

    def test_letters_outside_of_matplotlibs_font_are_drawn_without_a_warning(self) -> None:
        chart = charts.bars([charts.Bar("\u6a21\u578b $x$", [0.5])], key="k", title="t")
        assert "\u6a21\u578b $x$" in words(chart)

    def test_settings_of_the_user_change_nothing_and_come_back(self) -> None:
        def chart() -> str:
            curve = charts.Line("drrho", [50, 100], [0.0, 1.0])
            return charts.lines([curve], key="k", title="t", x_name="x", y_name="y").inline()

        plain = chart()
        with matplotlib.rc_context({"font.size": 40, "lines.linewidth": 9, "axes.grid": True, "svg.hashsalt": None}):
            assert chart() == plain
            assert matplotlib.rcParams["font.size"] == 40


class Page(HTMLParser):
    """The content of a page: its elements, its words, and whether every opened element is closed."""

    VOID = frozenset({"meta", "link", "img", "br", "wbr"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert not self._open, f"never closed: {self._open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(dict(attrs)) == len(attrs), f"an attribute twice in {tag}: {attrs}"
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open, f"{tag} was never opened"
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] != "style":
            self.words.append(data)

    def all(self, tag: str) -> Iterator[dict[str, str | None]]:
        return (attributes for name, attributes in self.elements if name == tag)

    @property
    def text(self) -> str:
        return "\n".join(word.strip() for word in self.words if word.strip()).replace("\N{NO-BREAK SPACE}", " ")


@pytest.fixture(scope="module")
def page_text(sample_report: ReportData) -> str:
    return render_report(sample_report)


def row(method: str, r1: float | None, seed: object = 0, **changes: Any) -> dict[str, Any]:
    metrics = {"retrieval_r1": r1, "retrieval_r5": 0.5, "retrieval_r10": 0.75, "zero_shot_accuracy": 0.4}
    return {
        "method": method,
        "dataset": "digits",
        "seed": seed,
        "metrics": metrics,
        "samples_seen": 1000,
        "seconds": 20,
    } | changes


def table_rows(text: str) -> list[list[str]]:
    """The body of the first table. The words of a cell are joined, and bold words stand between stars."""
    body = text.split("<tbody>", 1)[1].split("</tbody>", 1)[0]
    cells = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", line) for line in body.split("<tr>")[1:]]
    return [[re.sub("<[^>]*>", " ", re.sub("</?strong>", "*", cell)).strip() for cell in line] for line in cells]


class TestPage:
    def test_page_loads_no_file_and_runs_no_script(self, page_text: str) -> None:
        assert "http://" not in page_text
        assert "https://" not in page_text
        assert "url(" not in page_text
        assert "@import" not in page_text
        page = Page(page_text)
        assert not [tag for tag, _ in page.elements if tag in {"script", "iframe", "object", "embed", "base", "form"}]
        for tag, attributes in page.elements:
            assert not [name for name in attributes if name.startswith("on")], (tag, attributes)
            for name in ("src", "href", "srcset", "action", "data", "xlink:href"):
                assert (attributes.get(name) or "data:").startswith("data:"), (tag, attributes)
        (policy,) = (meta["content"] for meta in page.all("meta") if meta.get("http-equiv"))
        assert policy == "default-src 'none'; style-src 'unsafe-inline'; img-src data:"

    def test_every_picture_and_table_has_words_for_screen_readers(self, page_text: str) -> None:
        page = Page(page_text)
        names = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
        assert len(set(names)) == len(names)
        for _, attributes in page.elements:
            assert set((attributes.get("aria-labelledby") or "").split()) <= set(names)
        charts = list(page.all("svg"))
        assert len(charts) == 6
        assert all(chart["role"] == "img" and chart["aria-labelledby"] for chart in charts)
        images = list(page.all("img"))
        assert len(images) == 2 * (1 + 4 * 5)
        assert all(image["alt"] and (image["width"], image["height"]) == ("16", "12") for image in images)
        assert all(head.get("scope") in {"row", "col"} for head in page.all("th"))
        assert next(page.all("html"))["lang"] == "en"

    def test_charts_are_well_formed_xml_with_title_and_description(self, page_text: str) -> None:
        for chart in re.findall(r"<svg.*?</svg>", page_text, flags=re.DOTALL):
            root = ElementTree.fromstring(chart)
            assert root.findtext("title")
            assert root.findtext("desc")
            assert "nan" not in chart

    def test_sections_have_a_fixed_order(self, page_text: str) -> None:
        assert [s["id"] for s in Page(page_text).all("section")] == [
            "results",
            "training",
            "gallery",
            "weights",
            "fairness",
        ]

    def test_empty_parts_are_left_out(self) -> None:
        text = render_report(ReportData(title="A first run", results=[row("clip", 0.25)]))
        page = Page(text)
        assert [section["id"] for section in page.all("section")] == ["results"]
        assert len(list(page.all("svg"))) == 1
        empty = ReportData(
            title="A first run",
            results=[row("clip", 0.25)],
            curves={"clip": [], "drrho": [{"samples_seen": 1, "loss": None, "surrogate": float("nan")}]},
            weights={"drrho": {"clean": np.array([]), "swapped": np.array([])}},
        )
        assert render_report(empty) == text

    def test_weights_of_one_group_are_drawn_alone(self) -> None:
        data = ReportData(title="t", results=[row("drrho", 0.5)], weights={"drrho": {"clean": np.array([1.0, 3.0])}})
        text = Page(render_report(data)).text
        assert "clean: median 2.00" in text
        assert "swapped" not in text

    def test_table_of_one_seed_has_no_ranges(self) -> None:
        results = [row("drrho", 0.52), row("clip", 0.262), row("reference", None, samples_seen=123456.0)]
        assert table_rows(render_report(ReportData(title="t", results=results))) == [
            ["Reference model", DASH, "*50.0*", "*75.0*", "*40.0*", "123,456", "20"],
            ["CLIP", "26.2", "*50.0*", "*75.0*", "*40.0*", "1,000", "20"],
            ["DRRho-CLIP", "*52.0*", "*50.0*", "*75.0*", "*40.0*", "1,000", "20"],
        ]

    def test_times_below_ten_seconds_have_a_decimal(self) -> None:
        results = [row("clip", 0.5, seconds=3.25), row("drrho", 0.5, seconds=12)]
        assert [cells[-1] for cells in table_rows(render_report(ReportData(title="t", results=results)))] == [
            "3.2",
            "12.0",
        ]

    def test_table_of_several_seeds_has_means_and_ranges(self) -> None:
        results = [row("drrho", 0.5, seed=3), row("clip", 0.2, seed=3), row("drrho", 0.6), row("clip", 0.3)]
        text = render_report(ReportData(title="t", results=results))
        clip, drrho = table_rows(text)
        assert clip[1] == f"25.0 20.0{DASH}30.0"
        assert drrho[1] == f"*55.0* 50.0{DASH}60.0"
        assert "Figures are means of 2 seeds" in text
        assert "seeds 3, 0" in text

    @pytest.mark.parametrize(
        ("values", "sentence"),
        [
            (
                {"clip": 0.262, "reference": 0.454, "drrho": 0.52},
                "DRRho-CLIP puts the right partner first in 52.0 % of the searches, ahead of the reference model "
                "(45.4 %) and CLIP (26.2 %).",
            ),
            (
                {"drrho": 0.4, "reference": 0.454},
                "The reference model puts the right partner first in 45.4 % of the searches, ahead of DRRho-CLIP "
                "(40.0 %).",
            ),
            (
                {"drrho": 0.50001, "sogclr": 0.49999, "clip": 0.1},
                "SogCLR and DRRho-CLIP put the right partner first in 50.0 % of the searches, ahead of CLIP (10.0 %).",
            ),
            ({"clip": 0.25}, "CLIP puts the right partner first in 25.0 % of the searches."),
            ({"clip": None}, "No retrieval was measured."),
        ],
    )
    def test_headline_follows_from_the_figures(self, values: dict[str, float], sentence: str) -> None:
        text = render_report(ReportData(title="t", results=[row(method, r1) for method, r1 in values.items()]))
        (headline,) = re.findall(r'<p class="headline">(.*?)</p>', text)
        assert re.sub("<[^>]*>", "", headline).replace("\N{NO-BREAK SPACE}", " ") == sentence

    def test_points_without_a_value_are_left_out_of_a_curve(self) -> None:
        points: list[dict[str, float | None]] = [
            {"samples_seen": 50, "loss": 4.0, "validation_r1": None},
            {"samples_seen": 100, "loss": float("nan"), "validation_r1": 0.25},
            {"samples_seen": 200, "loss": 2.0, "surrogate": None},
        ]
        text = Page(render_report(ReportData(title="t", results=[row("clip", 0.2)], curves={"clip": points}))).text
        assert "CLIP from 4 to 2." in text
        assert "CLIP from 25.0 % to 25.0 %." in text
        assert "Surrogate" not in text

    def test_objective_and_surrogate_are_two_explained_figures(self, page_text: str) -> None:
        text = Page(page_text).text
        assert "Objective estimate against samples seen" in text
        assert "it estimates the objective that the method minimises" in text
        assert "Surrogate against samples seen" in text
        assert "Do not monitor its value" in text

    def test_table_of_weights_has_number_mean_and_median(self) -> None:
        weights = {"drrho": {"clean": np.array([[1.0, 2.0], [3.0, 10.0]]), "swapped": np.array([0.5, 1.5])}}
        text = render_report(ReportData(title="t", results=[row("drrho", 0.5)], weights=weights))
        assert "the mean weight of a swapped caption is 0.250 times that of a clean one" in text
        assert "The weights DRRho gives to swapped and to clean captions" in text
        assert "<td>4</td><td>4.00</td><td>2.50</td>" in text
        assert "<td>2</td><td>1.00</td><td>1.00</td>" in text

    def test_heading_of_other_groups_names_no_swapped_captions(self) -> None:
        weights = {"drrho": {"short": np.zeros(2), "long": np.array([1.0])}}
        text = render_report(ReportData(title="t", results=[row("drrho", 0.5)], weights=weights))
        assert "The weights that the captions get" in text
        assert "times that of" not in text

    def test_chosen_learning_rates_are_bold(self) -> None:
        rates: dict[str, dict[float, float]] = {"drrho": {1e-3: 0.4, 4e-3: 0.5}, "clip": {1e-3: 0.2, 2e-3: 0.1}}
        data = ReportData(
            title="t", results=[row("drrho", 0.5)], learning_rates=rates, chosen_learning_rates={"clip": 2e-3}
        )
        text = render_report(data).split("Learning rates", 1)[1]
        assert re.findall(r'<th scope="col">([^<]*)', text) == ["Method", "0.001", "0.002", "0.004"]
        assert table_rows(text) == [
            ["CLIP", "20.0", "*10.0* chosen", DASH],
            ["DRRho-CLIP", "40.0", DASH, "*50.0* chosen"],
        ]

    def test_gallery_frames_correct_images(self) -> None:
        image = np.zeros((4, 4, 3), dtype=np.uint8)
        found = [RetrievedImage(image, "a cube", False), RetrievedImage(image, "a ball", True)]
        data = ReportData(title="t", results=[row("drrho", 0.5)], gallery=[GalleryRow("a ball", {"drrho": found})])
        text = render_report(data)
        assert re.findall(r'<li class="(\w+)"><img [^>]*alt="([^"]*)"', text) == [
            ("miss", "1: “a cube”, wrong"),
            ("hit", "2: “a ball”, correct"),
        ]

    def test_every_text_is_escaped(self, sample_report: ReportData) -> None:
        nasty = "</style></title><script>alert(\"1\")</script><img src=x onerror='y'>&amp;\x00"
        image = np.zeros((4, 4, 3), dtype=np.uint8)
        data = ReportData(
            title=nasty,
            results=[row(nasty, 0.5, dataset=nasty, seed=nasty)],
            introduction=nasty,
            curves={nasty: [{"samples_seen": 1, "loss": 1.0, "surrogate": 1.0, "validation_r1": 0.5}]},
            gallery=[GalleryRow(nasty, {nasty: [RetrievedImage(image, nasty, True)]}, image)],
            weights={nasty: {nasty: np.array([1.0]), "b" + nasty: np.array([2.0])}},
            weights_note=nasty,
            learning_rates={nasty: {1e-3: 0.5}},
            facts=[(nasty, nasty)],
            command=nasty,
        )
        text = render_report(data)
        page = Page(text)
        assert "script" not in {tag for tag, _ in page.elements}
        assert len(list(page.all("img"))) == 2
        assert not [attributes for _, attributes in page.elements if "onerror" in attributes]
        assert "\x00" not in text
        assert page.text.count('<script>alert("1")</script>') > 15
        ElementTree.fromstring(bar_chart_svg(data.results))


class TestFiles:
    def test_written_file_is_the_page_and_no_partial_file_stays(
        self, sample_report: ReportData, tmp_path: Path
    ) -> None:
        path = write_report(str(tmp_path / "report.html"), sample_report)
        assert path == tmp_path / "report.html"
        assert path.read_text(encoding="utf-8") == render_report(sample_report)
        assert list(tmp_path.iterdir()) == [path]

    def test_same_data_give_same_bytes(self, sample_report: ReportData) -> None:
        assert render_report(sample_report) == render_report(sample_report)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"results": []}, "results must hold at least one row, got none"),
            ({"results": [{"metrics": {}}]}, "results must be mappings with a str under 'method', got {'metrics': {}}"),
            ({"results": [3]}, "results must be mappings .*, got 3"),
            ({"results": [{"method": "clip"}]}, "results must have a mapping under 'metrics', got None"),
            (
                {"results": [row("clip", 0.1), row("clip", 0.1, dataset="scenes")]},
                "results must be of one dataset, got digits, scenes",
            ),
            ({"weights": {"drrho": {"clean": np.array([-1.0])}}}, "weights must be .*, got -1.0 for drrho, clean"),
            ({"weights": {"drrho": {"swapped": np.array([np.nan])}}}, "weights must be .*, got nan for drrho, swapped"),
            ({"gallery": [GalleryRow("q", {}, np.zeros((2, 2, 2), np.uint8))]}, "image must be a uint8 array"),
            ({"gallery": [GalleryRow("q", {}, np.zeros(2, np.uint8))]}, "image must be a uint8 array"),
        ],
    )
    def test_bad_input_writes_nothing(
        self, changes: dict[str, Any], message: str, sample_report: ReportData, tmp_path: Path
    ) -> None:
        path = tmp_path / "report.html"
        path.write_text("what was there", encoding="utf-8")
        with pytest.raises(BadInput, match=message):
            write_report(path, replace(sample_report, **changes))
        assert path.read_text(encoding="utf-8") == "what was there"
        assert list(tmp_path.iterdir()) == [path]

    def test_picture_for_the_readme_needs_no_other_file(self, sample_report: ReportData) -> None:
        text = bar_chart_svg(sample_report.results, gallery_size=100)
        root = ElementTree.fromstring(text)
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        assert text.count("http") == 1  # the name of the format
        assert "scenes, galleries of 100 held-out pairs, mean and each of 2 seeds" in text
        assert "prefers-color-scheme:dark" in text
        assert len(re.findall(r'<path class="bar', text)) == 4
        assert "seed 7" in bar_chart_svg([row("clip", 0.5, seed=7)])


@pytest.mark.parametrize("library", ["matplotlib", "jinja2"])
def test_demo_names_the_missing_extra_before_training_begins(library: str, tmp_path: Path) -> None:
    out = tmp_path / "demo"
    code = f"import sys; sys.modules[{library!r}] = None; from drrho_clip.cli import main; "
    code += f"sys.exit(main(['demo', '--backend', 'numpy', '--quick', '--out', {str(out)!r}]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert done.stderr == f"drrho: the report needs {library}: pip install 'drrho-core[train]'\n"
    assert not out.exists()
