"""Fill a template and write the page: one HTML file that loads nothing and runs no script."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from drrho_clip.errors import MissingExtra
from drrho_clip.files.disk import naming, write_atomic
from drrho_clip.report.canvas import Chart
from drrho_clip.report.pictures import thumbnail
from drrho_clip.report.style import clean, colours, css_class, label, style_sheet

try:
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup
except ImportError as error:
    raise MissingExtra("the report", "jinja2") from error

__all__ = ["figure", "render", "write_page"]


def render(template: str, content: Mapping[str, Any], *, sheets: Sequence[str] = ("page", "chart")) -> str:
    """Return a page.

    Parameters
    ----------
    template : str
        Name of a file in the folder templates; the file extends base.html.
    content : mapping
        The values of the template's variables, ``title`` among them. Every text is escaped, and U+FFFD replaces the
        characters that `clean` removes.
    sheets : sequence of str
        Names of the style sheets in the folder templates, without ``.css``.
    """
    environment = Environment(
        loader=PackageLoader("drrho_clip.report"),
        autoescape=True,
        undefined=StrictUndefined,  # a misspelt name in the template is an error, not an empty text
        finalize=_without_control_characters,
        keep_trailing_newline=True,
    )
    environment.filters |= {"css_class": css_class, "label": label, "thumbnail": thumbnail}
    # The style sheets contain no input, so they need no escaping.
    style = Markup(f"{colours()}\n{''.join(map(style_sheet, sheets))}")
    return environment.get_template(template).render(content, style=style)


def write_page(path: str | os.PathLike[str], page: str) -> Path:
    """Write a page; whoever opens `path` meanwhile gets the whole old file or the whole new file."""
    target = Path(path)
    with naming(target.parent):
        target.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(target, page.encode("utf-8"))
    return target


def figure(chart: Chart, heading: str, meaning: str = "") -> dict[str, Any]:
    """Return a chart with a heading and a text for the reader, for the macro `figures` of parts.html."""
    # ElementTree has already escaped the texts of the chart, so jinja2 must not escape them again.
    return {"heading": heading, "meaning": meaning, "svg": Markup(chart.inline())}


def _without_control_characters(value: Any) -> Any:
    return clean(value) if isinstance(value, str) and not isinstance(value, Markup) else value
