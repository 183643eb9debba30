"""The report as a reader sees it: headless Chromium, desktop and phone, light and dark.

Where there is no chromium these tests skip with a reason; with DRRHO_REQUIRE_CHROMIUM set they fail instead.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from drrho_clip.report import ReportData, bar_chart_svg, render_report, write_report

pytestmark = pytest.mark.slow


def test_full_report_has_no_problem(
    check_report: Callable[[Path], None], sample_report: ReportData, tmp_path: Path
) -> None:
    check_report(write_report(tmp_path / "report.html", sample_report))


def test_report_of_one_method_has_no_problem(
    check_report: Callable[[Path], None], sample_report: ReportData, tmp_path: Path
) -> None:
    data = ReportData(title="A first run", results=sample_report.results[:1])
    check_report(write_report(tmp_path / "report.html", data))


def test_extreme_figures_fit_into_the_charts(
    check_report: Callable[[Path], None], sample_report: ReportData, tmp_path: Path
) -> None:
    # Equal ends, a flat curve, one point, great and tiny numbers, a perfect score, an unknown method, a long caption.
    row = dict(sample_report.results[0])
    metrics = {"retrieval_r1": 1.0, "retrieval_r5": 1.0, "retrieval_r10": 1.0, "zero_shot_accuracy": float("nan")}
    methods = ["reference", "clip", "sogclr", "drrho", "a method that has a long name"]
    curves: dict[str, list[dict[str, float | None]]] = {
        method: [
            {
                "samples_seen": 1e7 * k,
                "loss": -1234.5 * i * k,
                "surrogate": -0.0716 + 1e-4 * k * i if i < 2 else 1.3e-7 * k * i,
                "validation_r1": 0.5,
            }
            for k in range(1, 2 + i)
        ]
        for i, method in enumerate(methods)
    }
    gallery = [replace(sample_report.gallery[0], query="a small red cube that stands left of a large blue ball " * 3)]
    data = replace(
        sample_report,
        results=[{**row, "method": method, "metrics": metrics} for method in methods],
        curves=curves,
        gallery=gallery,
        weights={"drrho": {"clean": np.array([1e-9, 1.0, 0.0, 1e6]), "swapped": np.zeros(2)}},
        facts=[("A word without an end", "x" * 300)],
    )
    check_report(write_report(tmp_path / "report.html", data))


def test_picture_for_the_readme_has_no_problem(
    report_problems: Callable[[Path], list[str]], sample_report: ReportData, tmp_path: Path
) -> None:
    (tmp_path / "demo.svg").write_text(bar_chart_svg(sample_report.results), encoding="utf-8")
    page = tmp_path / "page.html"
    page.write_text(
        "<!doctype html><style>body{background:white}@media(prefers-color-scheme:dark){body{background:black}}"
        "img{image-rendering:pixelated;max-width:100%}</style><section>"
        f"{bar_chart_svg(sample_report.results).replace('width=', 'style=max-width:100% data-width=', 1)}"
        '<img src="demo.svg" alt="R@1">',
        encoding="utf-8",
    )
    expected = [f"asked for {(tmp_path / 'demo.svg').as_uri()}"] * 2  # the picture itself, once per look
    assert report_problems(page) == expected


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        pytest.param(
            r'src="data:image/png;base64,[^"]*"', 'src="data:image/png;base64,AAAA"', "not drawn", id="broken"
        ),
        pytest.param(r'alt="[^"]*"', 'alt=""', "image without words", id="no words"),
        pytest.param("image-rendering: pixelated", "", "smoothed", id="smoothed"),
        pytest.param(r'<path class="line[^>]*>', "", "nothing drawn", id="no line"),
        pytest.param(r"fill:var\(--drrho\)", "fill:var(--unknown)", "without a colour", id="no colour"),
        pytest.param(r'(<text class="strong" x=")[^"]*', r"\g<1>450", "is cut off", id="cut off"),
        pytest.param(r'(<text [^>]*y=")[^"]*', r"\g<1>20", "meets", id="words on words"),
        pytest.param(r'(<path class="bar drrho" d="M[^L]*L)[0-9.]*', r"\g<1>600", "mark outside", id="mark outside"),
        pytest.param(r"\.scroll \{", ".scroll { min-width: 2000px;", "the page is 2", id="too wide"),
        pytest.param("prefers-color-scheme:dark", "prefers-color-scheme:none", "look the same", id="never dark"),
        pytest.param(
            "<main>", "<main><script>nothing()</script>", "log: .*Content Security Policy", id="script refused"
        ),
        pytest.param(
            r"<meta http-equiv[^>]*>(?s:.*?)<main>",
            "<main><script>nothing()</script>",
            "exception: Uncaught",
            id="error",
        ),
        pytest.param(
            r"<meta http-equiv[^>]*>", "<script>console.error('no')</script>", "console: .*no", id="console error"
        ),
        pytest.param(
            r"<meta http-equiv[^>]*>",
            '<img src="http://127.0.0.1:9/a.png">',
            "asked for http://127",
            id="asks a server",
        ),
        pytest.param(r'src="data:[^"]*"', 'src="picture.png"', "log: .*picture.png", id="asks for a file"),
    ],
)
def test_each_kind_of_problem_is_reported(
    old: str,
    new: str,
    problem: str,
    report_problems: Callable[[Path], list[str]],
    sample_report: ReportData,
    tmp_path: Path,
) -> None:
    page, count = re.subn(old, new, render_report(sample_report))
    assert count
    path = tmp_path / "report.html"
    path.write_text(page, encoding="utf-8")
    found = report_problems(path)
    assert any(re.search(problem, told) for told in found), found
