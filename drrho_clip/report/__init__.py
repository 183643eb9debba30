"""The report of a demo or a comparison: one HTML file that needs no other file.

Matplotlib draws the charts, jinja2 fills the page and Pillow encodes the pictures (extra `train`). If one of them is
not installed, importing this package raises `MissingExtra`.
"""

from __future__ import annotations

from drrho_clip.report.canvas import Canvas, Chart, css
from drrho_clip.report.charts import Line, lines, round_ticks
from drrho_clip.report.data import GalleryRow, ReportData, RetrievedImage
from drrho_clip.report.page import bar_chart_svg, render_report, write_report
from drrho_clip.report.search import write_search_page
from drrho_clip.report.style import PALETTE, css_class, percent
from drrho_clip.report.suspects import RankedPair, write_suspects_page

__all__ = [
    "PALETTE",
    "Canvas",
    "Chart",
    "GalleryRow",
    "Line",
    "RankedPair",
    "ReportData",
    "RetrievedImage",
    "bar_chart_svg",
    "css",
    "css_class",
    "lines",
    "percent",
    "render_report",
    "round_ticks",
    "write_report",
    "write_search_page",
    "write_suspects_page",
]
