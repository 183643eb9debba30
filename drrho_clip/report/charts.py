"""The charts of the report: bars, curves, curves in panels, histograms. Each chart also has a description in words."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch, Patch
from matplotlib.ticker import FixedLocator, LogLocator, MaxNLocator, NullLocator
from numpy.typing import NDArray

from drrho_clip.report.canvas import WIDTH, Canvas, Chart, css
from drrho_clip.report.style import PALETTE, clean, css_class, figures, label, number, percent

__all__ = ["MOST_POINTS", "Bar", "Bins", "Line", "bars", "histogram", "lines", "panels", "round_ticks", "tick_names"]

MOST_POINTS = 120
"""A curve with more points is drawn as means of neighbouring points, because a chart of this width shows no more."""

_SURFACE, _INK, _SOFT = PALETTE["card"], PALETTE["ink"], PALETTE["soft"]

# The thin line from the end of a curve to its name.
_LEADER = {"arrowstyle": "-", "alpha": 0.6, "linewidth": 1, "shrinkA": 0, "shrinkB": 0}


@dataclass(frozen=True)
class _Named:
    """The name and the colour of a bar or a curve: those of the method, unless `name` and `kind` say otherwise.

    `kind` is a CSS class of `css_class`, which stands for a colour.
    """

    method: str
    name: str = field(default="", kw_only=True)
    kind: str = field(default="", kw_only=True)

    @property
    def label(self) -> str:
        """The whole name."""
        return self.name or label(self.method)

    @property
    def css(self) -> str:
        """The CSS class of the colour."""
        return self.kind or css_class(self.method)

    @property
    def colour(self) -> str:
        """The colour on a light page."""
        return PALETTE[self.css]


@dataclass(frozen=True)
class Bar(_Named):
    """One method's or one run's bar, whose length is the mean of `values`, one value per seed."""

    values: Sequence[float]

    @property
    def mean(self) -> float:
        """The bar's length."""
        return math.fsum(self.values) / len(self.values)


@dataclass(frozen=True)
class Line(_Named):
    """One method's or one run's curve: the points (x, y), in the order of rising x."""

    x: Sequence[float]
    y: Sequence[float]


def bars(bars: Sequence[Bar], /, *, key: str, title: str) -> Chart:
    """Draw one horizontal bar per method or run, with the mean beside it and, for several seeds, a dot per seed."""
    known = [bar for bar in bars if bar.values]
    top, left, right, step, thickness = 4, 130, 392, 58, 30
    bottom = top + step * max(len(known), 1)
    high = max([value for bar in known for value in bar.values], default=1.0) or 1.0
    with Canvas(bottom + 30) as canvas:
        axes = canvas.axes(left, right, top, bottom, grid="x", axis="left")
        axes.set(xlim=(0, high), ylim=(max(len(known), 1), 0), yticks=[])
        _set_share_ticks(axes, "x", round_ticks(0, high, most=5))
        # This factor turns lengths in units of the chart into lengths in data.
        per_unit = high / (right - left)
        # Bar i lies between i and i + 1 on the vertical axis, which points down.
        for row, bar in enumerate(known):
            middle, colour = row + 0.5, bar.colour
            length = max(bar.mean, per_unit / 2)
            shape = f"round,pad=0,rounding_size={min(3 * per_unit, length / 2)}"
            corner = (0, middle - thickness / step / 2)
            axes.add_patch(
                FancyBboxPatch(
                    corner, length, thickness / step, boxstyle=shape, mutation_aspect=1 / step / per_unit,
                    facecolor=colour, linewidth=0, gid=css("bar", bar.css),
                )
            )  # fmt: skip
            end = left + bar.mean / per_unit
            if len(bar.values) > 1:
                axes.scatter(
                    bar.values, [middle] * len(bar.values), s=64, color=_SURFACE, edgecolor=_INK, linewidth=1.5,
                    zorder=3, gid=css("seed"),
                )  # fmt: skip
                end = max(end, left + max(bar.values) / per_unit + 4)
            baseline = top + step * middle + 5
            canvas.text(0, baseline, short_name(bar.label), strong=bar.method == "drrho")
            canvas.text(end + 8, baseline, percent(bar.mean), strong=True)
        seeds = max((len(bar.values) for bar in known), default=1)
        description = "; ".join(f"{bar.label} {percent(bar.mean)}" for bar in known)
        note = f" Means of {seeds} seeds; the dots are the seeds." if seeds > 1 else ""
        return canvas.chart(key, title, f"{description}.{note}")


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
    """Draw the curves of several methods or runs in one chart, with a name at the end of each curve."""
    drawn = [_thinned(line) for line in lines]
    # The chart is higher if the names at the ends of the curves need more room.
    top, right = 30, 338
    bottom = max(254, top + 20 * len(drawn))
    height = bottom + 46
    heights = _Heights.of(drawn, share=share)
    with Canvas(height) as canvas:
        axes = canvas.axes(heights.room, right, top, bottom, grid="y")
        _frame(axes, drawn, heights, x_from=x_from)
        canvas.text(0, 14, y_name, color=_SOFT)
        canvas.text(right, bottom + 40, x_name, color=_SOFT, ha="right")
        for line in drawn:
            _draw(axes, line)
        # The name of a method stands at the end of the curve. Names that would overlap are moved up or down.
        to_units = axes.transData.transform
        ends = sorted(drawn, key=lambda line: -line.y[-1])
        heights_of_ends = [height - to_units((line.x[-1], line.y[-1]))[1] for line in ends]
        for line, place in zip(ends, _apart(heights_of_ends, 20, top, bottom), strict=True):
            colour, end = line.colour, (line.x[-1], line.y[-1])
            axes.annotate(
                "", xy=end, xytext=(right + 12, height - place), textcoords="figure pixels", annotation_clip=False,
                arrowprops={**_LEADER, "color": colour},
            )  # fmt: skip
            axes.scatter(*end, s=81, color=colour, edgecolor=_SURFACE, linewidth=1.5, zorder=4, gid=css("dot"))
            canvas.text(right + 15, place + 5, short_name(line.label), strong=line.method == "drrho")
        form = percent if share else number
        description = "; ".join(f"{line.label} from {form(line.y[0])} to {form(line.y[-1])}" for line in drawn)
        return canvas.chart(key, title, f"{description}.")


def panels(lines: Sequence[Line], /, *, key: str, title: str, x_name: str) -> Chart:
    """Draw each method's curve in a panel, two panels in a row: the heights of different losses cannot be compared."""
    drawn = [_thinned(line) for line in lines]
    row_height = 168
    height = row_height * ((len(drawn) + 1) // 2) + 14
    all_heights = [_Heights.of([line], most=3) for line in drawn]
    room = max(heights.room for heights in all_heights)
    with Canvas(height) as canvas:
        for i, (line, heights) in enumerate(zip(drawn, all_heights, strict=True)):
            left, top = (i % 2) * 248, (i // 2) * row_height
            axes = canvas.axes(left + room, left + 214, top + 30, top + 130, grid="y")
            _frame(axes, [line], heights, most=3)
            _draw(axes, line)
            # A dot in the method's colour and the method's name stand above the panel.
            place = (left + 6, height - top - 11)
            colour = line.colour
            # With transform=None, the place is counted from the lower left corner of the chart.
            axes.scatter(*place, s=100, color=colour, edgecolor=_SURFACE, linewidth=1.5, transform=None, gid=css("dot"))
            canvas.text(left + 16, top + 16, short_name(line.label), strong=line.method == "drrho")
        canvas.text(WIDTH, height - 4, x_name, color=_SOFT, ha="right")
        description = "; ".join(f"{line.label} from {number(line.y[0])} to {number(line.y[-1])}" for line in drawn)
        return canvas.chart(key, title, f"{description}.")


@dataclass(frozen=True)
class Bins:
    """Bin edges that several histograms share; the axis is logarithmic if the weights span more than a factor of 20."""

    edges: NDArray[np.float64]
    logarithmic: bool

    @classmethod
    def shared(cls, arrays: Sequence[NDArray[np.float64]], count: int = 36) -> Bins:
        """Choose bins for all positive values of all arrays; zeros are counted in the lowest bin."""
        values = np.concatenate(arrays)
        positive = values[values > 0]
        if positive.size == 0:
            return cls(np.linspace(0.0, 1.0, count + 1), False)
        # A few extreme weights would make all other bars narrow, so 0.2 % of the weights on either side lie outside.
        low, high = np.quantile(positive, [0.002, 0.998])
        if high > 20 * low:
            return cls(np.geomspace(low / 1.02, high * 1.02, count + 1), True)
        return cls(np.linspace(0.0, float(high) * 1.02, count + 1), False)

    def shares(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the share of the values in each bin; values outside all bins count in the outer bins."""
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
    """Draw the histograms and medians of one or two groups in one chart; the second group has the method's colour."""
    top, bottom, left, right, height = 62, 254, 56, 466, 300
    low, high = float(bins.edges[0]), float(bins.edges[-1])
    medians = {name: float(np.median(values)) for name, values in groups.items()}
    with Canvas(height) as canvas:
        axes = canvas.axes(left, right, top, bottom, grid="y")
        axes.set(xscale="log" if bins.logarithmic else "linear", xlim=(low, high), ylim=(0, highest))
        ticks = _log_ticks(low, high) if bins.logarithmic else round_ticks(low, high)
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_locator(FixedLocator(ticks))
        axes.set_xticklabels([number(tick) for tick in ticks])
        _set_share_ticks(axes, "y", round_ticks(0, highest, most=5))
        canvas.text(0, 14, "share of the captions", color=_SOFT)
        canvas.text(right, bottom + 40, x_name, color=_SOFT, ha="right")

        # The second group is drawn over the first one, and both are translucent, so that the overlap can be seen.
        keys = []
        styles = ((_INK, 0.16, 0.75, 1.5, ("first",)), (_colour(method), 0.38, 1.0, 2.0, ("second", css_class(method))))
        for (name, values), (colour, fill, line, width, kind) in zip(groups.items(), styles, strict=False):
            face, edge = (colour, fill), (colour, line)
            axes.stairs(
                bins.shares(values), bins.edges, fill=True, facecolor=face, edgecolor=edge, linewidth=width,
                joinstyle="round", zorder=2, gid=css(*kind),
            )  # fmt: skip
            median = min(max(medians[name], low), high)
            axes.plot(
                [median, median], [0, highest * (1 + 10 / (bottom - top))], color=colour, linewidth=1.5, zorder=3,
                linestyle=(0, (4, 3)), dash_capstyle="butt", gid=css("median"),
            )  # fmt: skip
            text = f"{clean(name)}: median {figures(medians[name])}"
            keys.append(Patch(facecolor=face, edgecolor=edge, linewidth=width, label=text))
        # The key is a row above the picture, because words beside the medians would overlap if the medians were close.
        key_row = canvas.figure.legend(
            handles=keys, ncols=2, loc="upper left", bbox_to_anchor=(left / WIDTH, 1 - 26 / height), frameon=False,
            borderpad=0, borderaxespad=0, handlelength=0.9, handleheight=0.9, handletextpad=0.55, columnspacing=3.5,
            labelcolor=_INK,
        )  # fmt: skip
        for text_of_key, strong in zip(key_row.get_texts(), (False, True), strict=False):
            text_of_key.set(gid=css("strong") if strong else None, weight="bold" if strong else "normal")
        description = "; ".join(
            f"{name}: {values.size}, median {figures(medians[name])}, mean {figures(float(values.mean()))}"
            for name, values in groups.items()
        )
        return canvas.chart(key, title, f"{description}.")


@dataclass(frozen=True)
class _Heights:
    """The vertical axis of one or more curves: the range, the ticks and the names of the ticks."""

    low: float
    high: float
    ticks: list[float]
    names: list[str]

    @classmethod
    def of(cls, lines: Sequence[Line], *, share: bool = False, most: int = 5) -> _Heights:
        values = [value for line in lines for value in line.y]
        low, high = min(values), max(values)
        if share and low < high / 2:  # the axis begins at 0 if the smallest share is below half the largest
            low = 0.0
        # The range is at least one per cent of the values, because noise drawn over the whole height would mislead.
        least = max(abs(low), abs(high)) / 100 or 1.0
        if high - low < least:
            low, high = (low + high - least) / 2, (low + high + least) / 2
        if share:
            low, high = max(low, 0.0), min(high, 1.0)
        ticks = round_ticks(low, high, most=most)
        return cls(low, high, ticks, [f"{100 * tick:.3g} %" for tick in ticks] if share else tick_names(ticks))

    @property
    def room(self) -> float:
        """Width of the space to the left of the axis that the names of the ticks need."""
        return 10 + 9 * max((len(name) for name in self.names), default=0)


def _frame(axes: Axes, lines: Sequence[Line], heights: _Heights, *, most: int = 5, x_from: float = 0.0) -> None:
    """Set the limits and the named ticks of axes for curves."""
    longest = max(value for line in lines for value in line.x) or 1.0
    x_ticks = round_ticks(x_from, longest, most=most)
    axes.set(xlim=(x_from, longest), ylim=(heights.low, heights.high))
    axes.set_xticks(x_ticks, tick_names(x_ticks))
    axes.set_yticks(heights.ticks, heights.names)


def _draw(axes: Axes, line: Line) -> None:
    colour, gid = line.colour, css("line", line.css)
    if len(line.x) == 1:  # a line through one point has no length and would not be seen
        axes.scatter(line.x, line.y, s=25, color=colour, linewidth=0, zorder=3, gid=gid)
    else:
        axes.plot(line.x, line.y, color=colour, linewidth=2.25, solid_capstyle="round", zorder=3, gid=gid)


def _thinned(line: Line) -> Line:
    """Return at most `MOST_POINTS` points of a curve, each the mean of neighbouring points."""
    if len(line.x) <= MOST_POINTS:
        return line
    x, y = (
        [float(part.mean()) for part in np.array_split(np.asarray(values, dtype=np.float64), MOST_POINTS)]
        for values in (line.x, line.y)
    )
    return replace(line, x=x, y=y)


def _apart(places: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Return positions near the given rising ones, at least `gap` apart, and in [low, high] if there is room."""
    moved = list(places)
    for i in range(1, len(moved)):
        moved[i] = max(moved[i], moved[i - 1] + gap)
    # The first loop may have pushed the last positions out: move them back, and the positions before them.
    ceiling = high
    for i in reversed(range(len(moved))):
        floor = low + gap * i
        moved[i] = max(min(moved[i], ceiling), floor) if floor <= ceiling else ceiling
        ceiling = moved[i] - gap
    return moved


def round_ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Return at most `most` round numbers in [low, high]: steps of 1, 2 or 5 times a power of ten.

    Examples
    --------
    >>> round_ticks(0, 0.52)
    [0.0, 0.1, 0.2, 0.3, 0.4, 0.5]
    >>> round_ticks(0, 163840, most=4)
    [0.0, 50000.0, 100000.0, 150000.0]
    """
    if not high > low:
        return [low]
    slack = 1e-9 * (high - low)
    # Rounding to a millionth of the range turns 0.30000000000000004 into 0.3.
    digits = 6 - math.floor(math.log10(high - low))
    inside: list[float] = []
    # Matplotlib's locator widens the range to round numbers and divides that range into at most `nbins` intervals. So
    # even with nbins = `most` + 1, [low, high] may contain at most `most` ticks. The search begins with this finest
    # choice. If even one interval gives too many ticks, the search continues with a wider range.
    choices = [(intervals, 1) for intervals in range(most + 1, 0, -1)] + [(1, 2), (1, 5), (1, 10)]
    for intervals, widening in choices:
        locator = MaxNLocator(nbins=intervals, steps=[1, 2, 5, 10], min_n_ticks=1)
        ticks = locator.tick_values(low, low + widening * (high - low))
        inside = [round(float(tick), digits) for tick in ticks if low - slack <= tick <= high + slack]
        if len(inside) <= most:
            break
    return inside


def tick_names(ticks: Sequence[float]) -> list[str]:
    """Write ticks with just enough digits to distinguish them, thousands as "k" and millions as "M".

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


def _log_ticks(low: float, high: float) -> list[float]:
    """Return at most seven ticks of a logarithmic axis: powers of ten, and 3 times powers of ten if there is room."""
    decades = math.ceil(math.log10(high)) - math.floor(math.log10(low)) + 1
    ticks = LogLocator(subs=(1.0,) if decades > 4 else (1.0, 3.0), numticks=100).tick_values(low, high)
    inside = [float(tick) for tick in ticks if low <= tick <= high]
    return inside[:: max(1, math.ceil(len(inside) / 7))]


def _set_share_ticks(axes: Axes, direction: str, ticks: Sequence[float]) -> None:
    """Put ticks of shares in [0, 1] on an axis, named in per cent."""
    names = [f"{100 * tick:g} %" for tick in ticks]
    if direction == "x":
        axes.set_xticks(ticks, names)
    else:
        axes.set_yticks(ticks, names)


def short_name(name: str) -> str:
    """Return a name, shortened if a chart has no room for it; the description has the whole name."""
    # Names of runs often differ at the end only, so the middle is left out.
    return name if len(name) <= 15 else f"{name[:5]}…{name[-7:]}"


def _colour(method: str) -> str:
    return PALETTE[css_class(method)]
