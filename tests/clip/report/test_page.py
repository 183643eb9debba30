"""The page of the report without a browser: the words, the table, the file, and that the page loads nothing."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from drrho_clip.errors import BadInput
from drrho_clip.report import GalleryRow, ReportData, RetrievedImage, bar_chart_svg, render_report, write_report

DASH = "\N{EN DASH}"


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
