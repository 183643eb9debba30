"""Pictures of the claims as SVG. The same rows give the same bytes with the same version of Matplotlib."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import matplotlib as mpl
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Page
from matplotlib.ticker import MaxNLocator, NullFormatter

from drrho_clip.reproduce.claim import Figure

__all__ = [
    "Curve",
    "Points",
    "draw_bands",
    "draw_curves",
    "draw_interval_panels",
    "draw_intervals",
    "draw_points",
]

_Panel = TypeVar("_Panel")
_Content = TypeVar("_Content")

_STYLE: dict[Any, Any] = {"svg.hashsalt": "claims", "svg.fonttype": "none", "font.size": 9.0}
_COLOURS = (
    *("#d4580a", "#0b4f8a", "#2f8f5b", "#8a5fbf", "#b8860b", "#5b626b", "#c2185b"),
    *("#17a2b8", "#7a4419", "#9acd32", "#000000"),
)


class Curve(NamedTuple):
    """Points of a curve, and the ends of the interval of each point."""

    x: Sequence[float]
    mean: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]


class Points(NamedTuple):
    """Points of a series, and the corners of a line through them, if there is a line."""

    x: Sequence[float]
    y: Sequence[float]
    line_x: Sequence[float] = ()
    line_y: Sequence[float] = ()


def draw_intervals(figures: Sequence[Figure], *, axis: str) -> bytes:
    """Draw one line per figure: the mean, the bootstrap interval (thick) and Student's interval (thin).

    Parameters
    ----------
    figures : sequence of Figure
    axis : str
        The words below the horizontal axis, with the unit.

    Returns
    -------
    bytes
        The SVG.
    """
    with _page(7.2, 0.8 + 0.32 * len(figures)) as (page, content):
        axes = page.subplots()
        for place, (_, interval) in enumerate(figures):
            axes.plot([interval.mean - interval.half, interval.mean + interval.half], [place] * 2, color=_COLOURS[1])
            axes.plot([interval.low, interval.high], [place] * 2, color=_COLOURS[1], linewidth=4, alpha=0.5)
            axes.plot([interval.mean], [place], "o", color=_COLOURS[0])
        axes.axvline(0.0, color="#5b626b", linewidth=0.8)
        axes.set_yticks(range(len(figures)), [figure.label for figure in figures])
        axes.set_ylim(len(figures) - 0.5, -0.5)
        # Long labels leave little width, in which more numbers would overlap.
        axes.xaxis.set_major_locator(MaxNLocator(nbins=5))
        axes.set_xlabel(axis)
        _clean(axes)
    return content.getvalue()


def draw_interval_panels(panels: Mapping[str, Sequence[Figure]], *, axis: str) -> bytes:
    """Draw panels side by side, each with one line per figure: the mean and the bootstrap interval.

    The figures of all panels have the same labels, which stand at the left.
    """
    labels = list(dict.fromkeys(figure.label for panel in panels.values() for figure in panel))
    rows, columns = _grid(len(panels))
    with _page(2.2 + 2.7 * columns, 0.9 + (0.3 + 0.22 * len(labels)) * rows) as (page, content):
        for axes, (title, panel) in _placed(page, panels, sharey=True):
            for label, interval in panel:
                # A line whose interval contains zero is grey.
                colour = {1: _COLOURS[2], -1: _COLOURS[0], 0: "#8a9099"}[interval.side]
                place = labels.index(label)
                axes.plot([interval.low, interval.high], [place] * 2, color=colour, linewidth=3, alpha=0.5)
                axes.plot([interval.mean], [place], "o", color=colour, markersize=4)
            axes.axvline(0.0, color="#5b626b", linewidth=0.8)
            axes.set_yticks(range(len(labels)), labels)
            axes.set(title=title, ylim=(len(labels) - 0.5, -0.5))
            _clean(axes)
        page.supxlabel(axis, fontsize=9.0)
    return content.getvalue()


def draw_curves(panels: Mapping[str, Mapping[str, Sequence[float]]], *, x_name: str, y_name: str) -> bytes:
    """Draw panels side by side, each with curves by name over 1, 2, 3 and so on; the vertical axis is logarithmic."""
    rows, columns = _grid(len(panels))
    with _page(3.2 * columns, 3.0 * rows) as (page, content):
        for axes, (title, curves) in _placed(page, panels):
            for colour, name, values in _coloured(curves):
                axes.plot(range(1, len(values) + 1), values, "o-", color=colour, label=name, markersize=3)
            axes.set_yscale("log")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.set(title=title, xlabel=x_name, ylabel=y_name)
            axes.legend(frameon=False)
            _clean(axes)
    return content.getvalue()


def draw_bands(panels: Mapping[str, Mapping[str, Curve]], *, x_name: str, y_name: str, log_x: bool = False) -> bytes:
    """Draw panels side by side, each with curves by name and with a band for the intervals of each curve.

    With `log_x` the horizontal axis is logarithmic, with the points as ticks.
    """
    # Many curves with the same names have one legend below the panels.
    shared = len(panels) > 1 and all(len(curves) > 4 for curves in panels.values())
    # A panel is as wide as a long name with the line beside it, so the legend has a column per panel.
    rows = -(-max(map(len, panels.values())) // len(panels)) if shared else 0
    with _page(3.2 * len(panels), 3.0 + 0.25 * rows) as (page, content):
        for axes, (title, curves) in zip(page.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
            for place, (colour, name, curve) in enumerate(_coloured(curves)):
                # Later curves are thinner, so that equal curves are seen.
                width = 1.5 if not shared else 3.2 * 0.88**place
                axes.plot(curve.x, curve.mean, "o-", color=colour, label=name, markersize=3, linewidth=width)
                axes.fill_between(curve.x, curve.low, curve.high, color=colour, alpha=0.2, linewidth=0)
            if log_x:
                points = sorted({x for curve in curves.values() for x in curve.x})
                axes.set_xscale("log")
                axes.set_xticks(points, [f"{x:g}" for x in points])
                axes.minorticks_off()
            axes.set(title=title, xlabel=x_name, ylabel=y_name)
            if not shared:
                axes.legend(frameon=False)
            _clean(axes)
        if shared:
            handles, names = page.axes[0].get_legend_handles_labels()
            page.legend(handles, names, loc="outside lower center", ncols=len(panels), frameon=False)
    return content.getvalue()


def draw_points(
    panels: Mapping[str, Mapping[str, Points]], *, x_name: str, y_name: str, logarithmic: bool = False
) -> bytes:
    """Draw panels side by side, each with series of points by name; both axes may be logarithmic."""
    colours = mpl.color_sequences["tab10"]
    names = list(dict.fromkeys(name for series in panels.values() for name in series))
    rows, columns = _grid(len(panels))
    with _page(3.4 * columns, 3.0 * rows + 0.2 * len(names) / columns) as (page, content):
        handles: dict[str, Artist] = {}
        for axes, (title, series) in _placed(page, panels):
            for name, points in series.items():
                colour = colours[names.index(name) % len(colours)]
                (handles[name],) = axes.plot(points.x, points.y, "o", color=colour, markersize=4, label=name)
                axes.plot(points.line_x, points.line_y, color=colour, linewidth=1.2)
            if logarithmic:
                axes.set(xscale="log", yscale="log")
                axes.xaxis.set_minor_formatter(NullFormatter())
                axes.yaxis.set_major_formatter("{x:g}")
                low, high = axes.get_ylim()
                # The numbers of a short axis lie between powers of ten; on a long axis they would overlap.
                axes.yaxis.set_minor_formatter("{x:g}" if high < 10 * low else NullFormatter())
            axes.set(title=title, xlabel=x_name)
            _clean(axes)
        page.supylabel(y_name, fontsize=9.0)
        # The panels share a legend below them, because a series has the same colour in every panel.
        # The longest name, at about 0.08 inches a character, must fit into a column of the legend.
        fitting = int(page.get_figwidth() / (0.5 + 0.08 * max(map(len, names))))
        columns = max(1, min(len(handles), fitting))
        page.legend(handles=list(handles.values()), loc="outside lower center", ncols=columns, frameon=False)
    return content.getvalue()


def _coloured(curves: Mapping[str, _Content]) -> Iterator[tuple[str, str, _Content]]:
    """Yield a colour, the name and the content of each curve."""
    for place, (name, content) in enumerate(curves.items()):
        # Two curves never share a colour: more curves than colours are an error.
        yield _COLOURS[place], name, content


def _grid(num_panels: int) -> tuple[int, int]:
    """Return the rows and columns of panels: at most four in a row, and rows of equal length if possible."""
    columns = num_panels if num_panels <= 4 else next((width for width in (4, 3, 2) if num_panels % width == 0), 4)
    return -(-num_panels // columns), columns


def _placed(
    page: Page, panels: Mapping[str, _Panel], *, sharey: bool = False
) -> Iterator[tuple[Axes, tuple[str, _Panel]]]:
    """Yield the axes of each panel with title and content; places without a panel stay empty."""
    rows, columns = _grid(len(panels))
    places = page.subplots(rows, columns, sharey=sharey, squeeze=False).ravel().tolist()
    # The last row may be shorter than the others.
    for axes in places[len(panels) :]:
        axes.set_axis_off()
    yield from zip(places, panels.items(), strict=False)


@contextmanager
def _page(width: float, height: float) -> Iterator[tuple[Page, io.BytesIO]]:
    """Give an empty page of this size in inches, and the file that holds the page after the block."""
    content = io.BytesIO()
    # The settings of the user's Matplotlib must not change the pictures.
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(_STYLE)
        page = Page(figsize=(width, height), layout="constrained")
        yield page, content
        # Without a date the same rows give the same file.
        page.savefig(content, format="svg", metadata={"Date": None})


def _clean(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
