"""A matplotlib figure that becomes an SVG chart with the colours of the page: light or dark, as the reader prefers.

Matplotlib writes fixed colours, positions with six decimals, and random ids. Two charts on a page might have the same
id, and a chart of the same data would have other ids each time. `Canvas.chart` therefore rewrites the SVG: each colour
of the palette becomes the CSS variable of that colour, and each element keeps nothing but class, place and style.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, Self
from xml.etree import ElementTree

from drrho_clip.errors import MissingExtra
from drrho_clip.report.style import PALETTE, clean, colours, style_sheet

try:
    import matplotlib
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
except ImportError as error:
    raise MissingExtra("the report", "matplotlib") from error

__all__ = ["FONT_SIZE", "WIDTH", "Canvas", "Chart"]

WIDTH = 480
"""Width of every chart, in units of the SVG. As all widths are equal, all letters have the same size on the page."""

FONT_SIZE = 14

_SVG = "{http://www.w3.org/2000/svg}"
_LINK = "{http://www.w3.org/1999/xlink}href"
_CLASS = "class:"  # prefix of a gid (the id that matplotlib writes for an artist) that names CSS classes

# With 72 dots per inch, matplotlib's point, matplotlib's pixel and the SVG's unit have the same length.
_DOTS_PER_INCH = 72
_SETTINGS: dict[Any, Any] = {
    "font.size": FONT_SIZE,
    "figure.dpi": _DOTS_PER_INCH,
    "lines.scale_dashes": False,
    "path.simplify": False,
    "savefig.transparent": True,
    "svg.fonttype": "none",  # text stays text, which can be read aloud, searched and shown in the page's font
    "text.parse_math": False,  # a dollar sign in a method's name starts no formula
}


@dataclass(frozen=True)
class Chart:
    """A drawn chart.

    Attributes
    ----------
    key : str
        Prefix of the chart's ids, unique on a page.
    title : str
        The chart's name.
    description : str
        Words for screen readers that say what the chart shows.
    height : float
        Height in units; the width is `WIDTH`.
    marks : sequence of Element
        The drawn elements.
    """

    key: str
    title: str
    description: str
    height: float
    marks: tuple[ElementTree.Element, ...]

    def inline(self) -> str:
        """Return the chart as an element for a page that has the style sheets."""
        root = self._root(WIDTH, self.height)
        root.extend(self.marks)
        return ElementTree.tostring(root, encoding="unicode")

    def as_file(self, *, heading: str, note: str) -> str:
        """Return the text of an SVG file: the chart on a card, with a heading, a note and the style sheets."""
        margin, head = 24, 72
        width, height = WIDTH + 2 * margin, self.height + head + margin
        root = self._root(width, height)
        root.attrib = {"xmlns": _SVG.strip("{}"), "width": f"{1.25 * width:g}", **root.attrib}
        # The file itself defines the colour variables, because a picture in a page cannot use the page's style.
        ElementTree.SubElement(root, "style").text = f"{colours()}\n{style_sheet('chart')}"
        card = {"x": "0.5", "y": "0.5", "width": f"{width - 1:g}", "height": f"{height - 1:g}", "rx": "10"}
        ElementTree.SubElement(root, "rect", {"class": "card", **card})
        for text, y, kind in ((heading, 34, "strong"), (note, 54, "soft")):
            place = {"class": kind, "x": str(margin), "y": str(y)}
            ElementTree.SubElement(root, "text", place).text = clean(text)
        body = ElementTree.SubElement(root, "g", {"transform": f"translate({margin} {head})"})
        body.extend(self.marks)
        return ElementTree.tostring(root, encoding="unicode") + "\n"

    def _root(self, width: float, height: float) -> ElementTree.Element:
        title, description = f"{self.key}-title", f"{self.key}-desc"
        root = ElementTree.Element(
            "svg",
            {
                "class": "chart",
                "viewBox": f"0 0 {width:g} {height:g}",
                "role": "img",
                "aria-labelledby": f"{title} {description}",
            },
        )
        ElementTree.SubElement(root, "title", {"id": title}).text = clean(self.title)
        ElementTree.SubElement(root, "desc", {"id": description}).text = clean(self.description)
        return root


class Canvas:
    """A figure for one chart, `WIDTH` by `height` units; y is counted downwards from the top.

    Use a canvas as a context manager: inside the `with` block, matplotlib has the settings of the report instead of the
    user's settings.

    Parameters
    ----------
    height : float
        Height in units.

    Examples
    --------
    >>> with Canvas(100) as canvas:
    ...     canvas.text(0, 14, "a word", color=PALETTE["soft"])
    ...     chart = canvas.chart("example", "An example", "It shows one word.")
    >>> "a word</text></svg>" in chart.inline()
    True
    """

    def __init__(self, height: float) -> None:
        self.height = height
        self._settings = ExitStack()

    def __enter__(self) -> Self:
        """Switch to the settings of the report and make the figure."""
        self._settings.enter_context(matplotlib.rc_context())
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_SETTINGS)
        # pyplot is avoided: it would choose a window system and keep the figure alive.
        self.figure = Figure(figsize=(WIDTH / _DOTS_PER_INCH, self.height / _DOTS_PER_INCH))
        FigureCanvasSVG(self.figure)
        self.figure.patch.set_visible(False)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Go back to the user's settings."""
        self._settings.close()

    def axes(
        self, left: float, right: float, top: float, bottom: float, *, grid: Literal["x", "y"], axis: str = "bottom"
    ) -> Axes:
        """Return axes in a box, with grid lines at the ticks of `grid`, and with a line on the side `axis` only."""
        width, height = WIDTH, self.height
        axes = self.figure.add_axes(
            (left / width, 1 - bottom / height, (right - left) / width, (bottom - top) / height), frameon=True
        )
        axes.patch.set_visible(False)
        axes.margins(0)
        axes.set_axisbelow(True)
        axes.grid(axis=grid, color=PALETTE["rule"], linewidth=1, clip_on=False, solid_capstyle="butt")
        for name, spine in axes.spines.items():
            spine.set(visible=name == axis, color=PALETTE["soft"], linewidth=1)
        # Small marks are drawn on an axis that has a line; an axis without a line has grid lines instead.
        has_marks = axis == "bottom"
        axes.tick_params(
            axis="x", length=5 if has_marks else 0, pad=4.4 if has_marks else 9.4, width=1,
            color=PALETTE["soft"], labelcolor=PALETTE["soft"],
        )  # fmt: skip
        axes.tick_params(axis="y", length=0, pad=8, labelcolor=PALETTE["soft"])
        return axes

    def text(
        self,
        x: float,
        y: float,
        words: str,
        *,
        strong: bool = False,
        color: str = PALETTE["ink"],
        ha: Literal["left", "right"] = "left",
    ) -> None:
        """Write words with the baseline at (x, y) in units; the words begin there, or end there if `ha` is "right"."""
        weight, gid = ("bold", css("strong")) if strong else ("normal", None)
        # Matplotlib would draw a text with a line break as two texts.
        line = re.sub("[\t\r\n]+", " ", clean(words))
        self.figure.text(x / WIDTH, 1 - y / self.height, line, weight=weight, gid=gid, color=color, ha=ha)

    def chart(self, key: str, title: str, description: str) -> Chart:
        """Return the drawn chart; the arguments are those of `Chart`."""
        # Without clipping, a dot on the frame is drawn whole, and the SVG needs no clip paths with ids.
        for axes in self.figure.axes:
            for artist in axes.get_children():
                artist.set_clip_on(False)
        file = io.BytesIO()
        with warnings.catch_warnings():
            # Matplotlib measures texts with a font of its own and warns of letters that this font lacks.
            # The page shows these letters with another font.
            warnings.filterwarnings("ignore", message="Glyph .* missing from font")
            # The file gets no date and no version, so that the same data give the same bytes.
            no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
            self.figure.savefig(file, format="svg", metadata=no_metadata)
        root = ElementTree.fromstring(file.getvalue())
        return Chart(key, title, description, self.height, tuple(_marks(root)))


def css(*classes: str) -> str:
    """Return the gid that gives a matplotlib artist these CSS classes in the chart."""
    return _CLASS + " ".join(classes)


def _marks(root: ElementTree.Element) -> Iterator[ElementTree.Element]:
    """Yield the drawn elements of matplotlib's SVG, without groups; each element has a class, a place and a style."""
    # Matplotlib writes the shape of a marker once and then refers to the shape by id.
    shapes = {shape.get("id"): shape for shape in root.iterfind(f".//{_SVG}defs/{_SVG}path")}

    def walk(element: ElementTree.Element, kind: str) -> Iterator[ElementTree.Element]:
        for child in element:
            gid = child.get("id", "")
            inherited = gid.removeprefix(_CLASS) if gid.startswith(_CLASS) else kind
            if child.tag == f"{_SVG}g":
                yield from walk(child, inherited)
            elif child.tag == f"{_SVG}path":
                yield _mark("path", inherited, child, {"d": _short(child.get("d", ""))})
            elif child.tag == f"{_SVG}use":
                # The shape is copied, because another chart of the page may have the same id.
                shape = shapes[child.get(_LINK, "").removeprefix("#")]
                place = f"translate({_short(child.get('x', '0'))} {_short(child.get('y', '0'))})"
                yield _mark("path", inherited, child, {"d": _short(shape.get("d", "")), "transform": place})
            elif child.tag == f"{_SVG}text":
                place_of_text = {name: _short(child.get(name, "0")) for name in ("x", "y")}
                mark = _mark("text", inherited, child, place_of_text)
                mark.text = child.text
                yield mark

    return walk(root, "")


def _mark(tag: str, kind: str, source: ElementTree.Element, place: dict[str, str]) -> ElementTree.Element:
    """Return an element with the class `kind`, the given place, and the style of an element that matplotlib wrote."""
    declarations = []
    for declaration in filter(None, source.get("style", "").split("; ")):
        name, _, value = declaration.partition(": ")
        if not name.startswith("font"):  # the style sheet sets the font
            declarations.append(f"{name}:{_VARIABLES.get(value, value)}")
    attributes = {"class": kind} if kind else {}
    return ElementTree.Element(tag, {**attributes, **place, "style": ";".join(declarations)})


# Matplotlib draws with the light palette. No two colours of the palette are equal, so each stands for one variable.
_VARIABLES = {colour: f"var(--{name})" for name, colour in PALETTE.items()}


def _short(path: str) -> str:
    """Write a path with at most two decimals per number and without spaces around the letters of the commands."""
    rounded = re.sub(r"-?\d+\.\d+", lambda number: f"{float(number[0]):.2f}".rstrip("0").rstrip("."), path)
    return re.sub(r"\s*([A-Za-z])\s*", r"\1", rounded).strip()
