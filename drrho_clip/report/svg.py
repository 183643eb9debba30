"""Small charts as SVG text: axes with round ticks, bars, lines, histograms. Every one names itself to screen readers.

All charts are 480 units wide, so that their letters have one size beside each other and stay readable on a phone.
Their colours and type come from the style sheet (`style.colours` and chart.css).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from drrho_clip.report.style import colours, css_class, escape, figures, label, number, percent, style_sheet

WIDTH = 480
MOST_POINTS = 120
"""A longer curve is drawn as means of neighbouring points: more a line of this width cannot show."""


@dataclass(frozen=True)
class Chart:
    """A drawn chart: its elements, its height, its name and what it shows in words."""

    key: str
    title: str
    told: str
    height: float
    body: Sequence[str]

    def inline(self) -> str:
        """Return the chart as an element of a page that has the style sheet; `key` must be unique there."""
        return f"<svg {self._opening(f'0 0 {WIDTH} {self.height:g}')}{''.join(self.body)}</svg>"

    def as_file(self, *, heading: str, note: str) -> str:
        """Return the chart as a file of its own: with its style, a heading, a note and a card behind it."""
        pad, head = 24, 72
        width, height = WIDTH + 2 * pad, self.height + head + pad
        opening = self._opening(f"0 0 {width} {height:g}")
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{1.25 * width:g}" {opening}'
            f"<style>{colours()}\n{style_sheet('chart')}</style>"
            f'<rect class="card" x="0.5" y="0.5" width="{width - 1}" height="{height - 1:g}" rx="10"/>'
            f'<g transform="translate({pad} 0)">{_text(0, 34, heading, "strong")}{_text(0, 54, note, "soft")}</g>'
            f'<g transform="translate({pad} {head})">{"".join(self.body)}</g></svg>\n'
        )

    def _opening(self, box: str) -> str:
        key = escape(self.key)
        return (
            f'class="chart" viewBox="{box}" role="img" aria-labelledby="{key}-title {key}-desc">'
            f'<title id="{key}-title">{escape(self.title)}</title><desc id="{key}-desc">{escape(self.told)}</desc>'
        )


@dataclass(frozen=True)
class Bar:
    """One method's bar: its value is the mean of its seeds' values."""

    method: str
    values: Sequence[float]

    @property
    def mean(self) -> float:
        """The bar's length."""
        return math.fsum(self.values) / len(self.values)


@dataclass(frozen=True)
class Line:
    """One method's curve, x rising."""

    method: str
    x: Sequence[float]
    y: Sequence[float]


def nice_ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Return round numbers that lie in [low, high]: steps of 1, 2 or 5 times a power of ten, at most `most` of them.

    Examples
    --------
    >>> nice_ticks(0, 0.52)
    [0.0, 0.1, 0.2, 0.3, 0.4, 0.5]
    >>> nice_ticks(0, 163840, most=4)
    [0.0, 50000.0, 100000.0, 150000.0]
    """
    if not high > low:
        return [low]
    power = math.floor(math.log10((high - low) / most))
    for factor in (1, 2, 5, 10, 20):
        step = factor * 10.0**power
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        if last - first < most:
            break
    # Divide where the step is below one: 3 / 10 prints as 0.3 and 3 * 0.1 does not.
    return [i * step if step >= 1 else i * factor / 10.0**-power for i in range(first, last + 1)]


def bars(bars: Sequence[Bar], /, *, key: str, title: str) -> Chart:
    """Draw one horizontal bar per method, its value beside it and a dot per seed where there are several."""
    known = [bar for bar in bars if bar.values]
    top = 4
    left, right, step, thickness = 130, 392, 58, 30
    bottom = top + step * len(known)
    high = max([value for bar in known for value in bar.values], default=1.0) or 1.0
    x = _scale(0, high, left, right)
    body = []
    for tick in nice_ticks(0, high, most=5):
        body.append(_line(x(tick), top, x(tick), bottom, "grid"))
        body.append(_text(x(tick), bottom + 20, f"{100 * tick:g} %", "soft", "middle"))
    for i, bar in enumerate(known):
        middle = top + step * (i + 0.5)
        strong = " strong" if bar.method == "drrho" else ""
        body.append(_text(0, middle + 5, _name(bar.method), strong))
        body.append(
            f'<rect class="bar {css_class(bar.method)}" x="{left}" y="{middle - thickness / 2:.1f}" '
            f'width="{max(x(bar.mean) - left, 0.5):.1f}" height="{thickness}" rx="3"/>'
        )
        if len(bar.values) > 1:
            body.extend(f'<circle class="seed" cx="{x(value):.1f}" cy="{middle:.1f}" r="4"/>' for value in bar.values)
        edge = max(x(bar.mean), *(x(value) + 4 for value in bar.values)) if len(bar.values) > 1 else x(bar.mean)
        body.append(_text(edge + 8, middle + 5, percent(bar.mean), "strong"))
    body.append(_line(left, top, left, bottom, "axis"))
    seeds = max((len(bar.values) for bar in known), default=1)
    told = "; ".join(f"{label(bar.method)} {percent(bar.mean)}" for bar in known)
    note = f" Means of {seeds} seeds; the dots are the seeds." if seeds > 1 else ""
    return Chart(key, title, f"{told}.{note}", bottom + 30, body)


def lines(
    lines: Sequence[Line],
    /,
    *,
    key: str,
    title: str,
    x_name: str,
    y_name: str,
    share: bool = False,
    x_from: float = 0.0,
) -> Chart:
    """Draw the curves of several methods on one pair of axes, each named at its end."""
    drawn = [_thinned(line) for line in lines]
    top, bottom, right, height = 30, 254, 338, 300
    heights = _Heights.of(drawn, share=share)
    x, y, body = _axes(drawn, heights, heights.room, right, top, bottom, x_from=x_from)
    body.append(_text(0, 14, y_name, "soft"))
    body.append(_text(right, bottom + 40, x_name, "soft", "end"))
    body.extend(_path(line, x, y) for line in drawn)
    # Names at the ends of the curves, pushed apart where they would overlap.
    ends = sorted(drawn, key=lambda line: y(line.y[-1]))
    places = _apart([y(line.y[-1]) for line in ends], 20, top, bottom)
    for line, place in zip(ends, places, strict=True):
        end_x, end_y, kind = x(line.x[-1]), y(line.y[-1]), css_class(line.method)
        strong = "strong" if line.method == "drrho" else ""
        body.append(_line(end_x, end_y, right + 12, place, f"leader {kind}"))
        body.append(f'<circle class="dot {kind}" cx="{end_x:.1f}" cy="{end_y:.1f}" r="4.5"/>')
        body.append(_text(right + 15, place + 5, _name(line.method), strong))
    form = percent if share else number
    told = "; ".join(f"{label(line.method)} from {form(line.y[0])} to {form(line.y[-1])}" for line in drawn)
    return Chart(key, title, f"{told}.", height, body)


def panels(lines: Sequence[Line], /, *, key: str, title: str, x_name: str) -> Chart:
    """Draw every method's curve on axes of its own, two beside each other: heights of different losses say nothing."""
    drawn = [_thinned(line) for line in lines]
    body = []
    cell_height = 168
    all_heights = [_Heights.of([line], most=3) for line in drawn]
    room = max(heights.room for heights in all_heights)
    for i, (line, heights) in enumerate(zip(drawn, all_heights, strict=True)):
        left, top = (i % 2) * 248, (i // 2) * cell_height
        x, y, axes = _axes([line], heights, left + room, left + 214, top + 30, top + 130, most=3)
        body.extend(axes)
        strong = "strong" if line.method == "drrho" else ""
        body.append(f'<circle class="dot {css_class(line.method)}" cx="{left + 6}" cy="{top + 11}" r="5"/>')
        body.append(_text(left + 16, top + 16, _name(line.method), strong))
        body.append(_path(line, x, y))
    height = cell_height * ((len(drawn) + 1) // 2) + 14
    body.append(_text(WIDTH, height - 4, x_name, "soft", "end"))
    told = "; ".join(f"{label(line.method)} from {number(line.y[0])} to {number(line.y[-1])}" for line in drawn)
    return Chart(key, title, f"{told}.", height, body)


@dataclass(frozen=True)
class Bins:
    """Bin edges that several histograms share, on a logarithmic axis where the weights span decades."""

    edges: NDArray[np.float64]
    logarithmic: bool

    @classmethod
    def shared(cls, arrays: Sequence[NDArray[np.float64]], count: int = 36) -> Bins:
        """Choose bins that hold every positive value of all arrays; what is 0 goes into the lowest bin."""
        values = np.concatenate(arrays)
        positive = values[values > 0]
        if positive.size == 0:
            return cls(np.linspace(0.0, 1.0, count + 1), False)
        # A few extreme weights must not squeeze all others into a corner: they go into the outer bins.
        low, high = np.quantile(positive, [0.002, 0.998])
        if high > 20 * low:
            return cls(np.geomspace(low / 1.02, high * 1.02, count + 1), True)
        return cls(np.linspace(0.0, float(high) * 1.02, count + 1), False)

    def shares(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the share of the values in each bin; what lies outside counts in the outer bins."""
        inside = np.clip(values, self.edges[0], self.edges[-1])
        return np.asarray(np.histogram(inside, self.edges)[0] / max(values.size, 1), dtype=np.float64)


def histogram(
    method: str,
    groups: Mapping[str, NDArray[np.float64]],
    /,
    *,
    bins: Bins,
    highest: float,
    key: str,
    title: str,
    x_name: str,
) -> Chart:
    """Draw two groups' histograms over each other, the second in the method's colour, with their medians."""
    top, bottom, left, right, height = 62, 254, 56, 466, 300
    edges = bins.edges
    forward: Callable[[float], float] = math.log if bins.logarithmic else float
    along = _scale(forward(edges[0]), forward(edges[-1]), left, right)

    def x(value: float) -> float:
        return along(forward(min(max(value, edges[0]), edges[-1])))

    y = _scale(0, highest, bottom, top)
    body = [_text(0, 14, "share of the captions", "soft"), _text(right, bottom + 40, x_name, "soft", "end")]
    for tick in nice_ticks(0, highest, most=5):
        body.append(_line(left, y(tick), right, y(tick), "grid"))
        body.append(_text(left - 8, y(tick) + 5, f"{100 * tick:g} %", "soft", "end"))
    for tick in _log_ticks(edges[0], edges[-1]) if bins.logarithmic else nice_ticks(edges[0], edges[-1]):
        body.append(_line(x(tick), bottom, x(tick), bottom + 5, "axis"))
        body.append(_text(x(tick), bottom + 20, number(tick), "soft", "middle"))
    kinds = ("first", f"second {css_class(method)}")
    for values, kind in zip(groups.values(), kinds, strict=False):
        corners = [(x(edges[0]), bottom + 0.0)]
        for share, low, high in zip(bins.shares(values), edges[:-1], edges[1:], strict=True):
            corners += [(x(low), y(share)), (x(high), y(share))]
        corners.append((x(edges[-1]), bottom + 0.0))
        body.append(f'<path class="{kind}" d="{_polyline(corners)}"/>')
    body.append(_line(left, bottom, right, bottom, "axis"))
    # A key in one row above the picture: words at the medians themselves would meet wherever these are close.
    medians = {name: float(np.median(values)) for name, values in groups.items()}
    for i, ((name, median), kind) in enumerate(zip(medians.items(), kinds, strict=False)):
        start = left + 212 * i
        mark = "median" if i == 0 else f"median second-median {css_class(method)}"
        body.append(_line(x(median), top - 10, x(median), bottom, mark))
        body.append(f'<rect class="{kind}" x="{start + 1}" y="27" width="12" height="12"/>')
        body.append(_text(start + 20, 38, f"{name}: median {figures(median)}", "strong" if i else ""))
    told = "; ".join(
        f"{name}: {values.size}, median {figures(medians[name])}, mean {figures(float(values.mean()))}"
        for name, values in groups.items()
    )
    return Chart(key, title, f"{told}.", height, body)


@dataclass(frozen=True)
class _Heights:
    """The vertical axis of some curves: its range, its ticks and their names."""

    low: float
    high: float
    ticks: list[float]
    names: list[str]

    @classmethod
    def of(cls, lines: Sequence[Line], *, share: bool = False, most: int = 5) -> _Heights:
        values = [value for line in lines for value in line.y]
        low, high = min(values), max(values)
        if share and low < high / 2:  # rates that grow from little grow from the axis
            low = 0.0
        # A curve that is flat to one per cent runs through the middle: enlarged, its noise would look like news.
        least = max(abs(low), abs(high)) / 100 or 1.0
        if high - low < least:
            low, high = (low + high - least) / 2, (low + high + least) / 2
        ticks = nice_ticks(low, high, most=most)
        return cls(low, high, ticks, [f"{100 * tick:.3g} %" for tick in ticks] if share else tick_names(ticks))

    @property
    def room(self) -> float:
        """How much room the names need beside the axis."""
        return 10 + 9 * max((len(name) for name in self.names), default=0)


def _axes(
    lines: Sequence[Line],
    heights: _Heights,
    left: float,
    right: float,
    top: float,
    bottom: float,
    *,
    most: int = 5,
    x_from: float = 0.0,
) -> tuple[Callable[[float], float], Callable[[float], float], list[str]]:
    """Return the two scales and the drawn grid for curves inside a box."""
    longest = max(value for line in lines for value in line.x) or 1.0
    x, y = _scale(x_from, longest, left, right), _scale(heights.low, heights.high, bottom, top)
    body = []
    for tick, name in zip(heights.ticks, heights.names, strict=True):
        body.append(_line(left, y(tick), right, y(tick), "grid"))
        body.append(_text(left - 8, y(tick) + 5, name, "soft", "end"))
    ticks = nice_ticks(x_from, longest, most=most)
    for tick, name in zip(ticks, tick_names(ticks), strict=True):
        body.append(_line(x(tick), bottom, x(tick), bottom + 5, "axis"))
        body.append(_text(x(tick), bottom + 20, name, "soft", "middle"))
    body.append(_line(left, bottom, right, bottom, "axis"))
    return x, y, body


def _thinned(line: Line) -> Line:
    """Return at most `MOST_POINTS` points of a curve, each the mean of its neighbours."""
    if len(line.x) <= MOST_POINTS:
        return line
    parts = list(
        zip(*(np.array_split(np.asarray(v, dtype=np.float64), MOST_POINTS) for v in (line.x, line.y)), strict=True)
    )
    return Line(line.method, [float(part.mean()) for part, _ in parts], [float(part.mean()) for _, part in parts])


def _apart(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Move rising positions to be `gap` apart, inside [low, high] where they fit, close to where they were."""
    places = list(wanted)
    for i in range(1, len(places)):
        places[i] = max(places[i], places[i - 1] + gap)
    ceiling = high
    for i in reversed(range(len(places))):
        places[i] = max(min(places[i], ceiling), low + gap * i if low + gap * i <= ceiling else ceiling)
        ceiling = places[i] - gap
    return places


def _scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    return lambda value: start + (end - start) * (value - low) / (high - low)


def _log_ticks(low: float, high: float) -> list[float]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1.0,) if len(decades) > 4 else (1.0, 3.0)
    ticks = [factor * 10.0**decade for decade in decades for factor in factors]
    inside = [tick for tick in ticks if low <= tick <= high]
    return inside[:: max(1, math.ceil(len(inside) / 7))]


def tick_names(ticks: Sequence[float]) -> list[str]:
    """Write ticks with as many digits as tell them apart, in the least room.

    Examples
    --------
    >>> tick_names([4.88, 4.8805, 4.881])
    ['4.8800', '4.8805', '4.8810']
    >>> tick_names([0, 50_000, 100_000])
    ['0', '50 k', '100 k']
    """
    largest = max(abs(tick) for tick in ticks)
    step = min((high - low for low, high in pairwise(ticks)), default=largest)
    if 0 < step < 1e-4:
        return [number(tick) if largest < 1e-3 else f"{tick:.6g}" for tick in ticks]
    size, unit = (1e6, " M") if largest >= 1e6 else (1e3, " k") if largest >= 1e3 else (1.0, "")
    decimals = max(0, -math.floor(math.log10(step / size) + 1e-6)) if step else 0
    written = [f"{tick / size:.{decimals}f}{unit}" if tick else "0" for tick in ticks]
    return [text.replace("-", "\N{MINUS SIGN}") for text in written]


def _name(method: str) -> str:
    """Return a method's name as long as a chart has room for; the description has it whole."""
    name = label(method)
    return name if len(name) <= 15 else f"{name[:13]}…"


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _text(x: float, y: float, text: str, kind: str = "", anchor: str = "start") -> str:
    return f'<text class="{kind.strip()}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _polyline(points: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)


def _path(line: Line, x: Callable[[float], float], y: Callable[[float], float]) -> str:
    points = [(x(a), y(b)) for a, b in zip(line.x, line.y, strict=True)]
    kind = f"line {css_class(line.method)}"
    if len(points) == 1:  # a path of one point draws nothing
        return f'<circle class="{kind}" cx="{points[0][0]:.1f}" cy="{points[0][1]:.1f}" r="2.5"/>'
    return f'<path class="{kind}" d="{_polyline(points)}"/>'
