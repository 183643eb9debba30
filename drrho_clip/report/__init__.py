"""The report of a demo or a comparison: one HTML file that needs nothing else."""

from __future__ import annotations

from drrho_clip.report.data import GalleryRow, ReportData, RetrievedImage
from drrho_clip.report.page import bar_chart_svg, render_report, write_report

__all__ = ["GalleryRow", "ReportData", "RetrievedImage", "bar_chart_svg", "render_report", "write_report"]
