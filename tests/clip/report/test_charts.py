"""The charts of the report without a browser: ticks, marks and words, computed by hand."""

from __future__ import annotations

import math
import re
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from drrho_clip.report import Chart, charts
from drrho_clip.report.style import label


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
