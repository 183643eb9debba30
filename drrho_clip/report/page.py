"""Make one self-contained HTML page from `ReportData`; templates/page.html has the words and the order of the page."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from drrho_clip.errors import BadInput
from drrho_clip.report import charts
from drrho_clip.report.canvas import Chart
from drrho_clip.report.data import ReportData
from drrho_clip.report.html import figure, render, write_page
from drrho_clip.report.results import METRICS, MethodResults, by_method, headline, seeds_of
from drrho_clip.report.style import UNKNOWN, css_class, figures, label, number, ordered, tenths

__all__ = ["bar_chart_svg", "render_report", "write_report"]

# The curves of the section "Training curves": the key in the data, the heading, and a text for the reader.
_TRAINING_CURVES = (
    (
        "loss",
        "Objective estimate",
        "Watch this one: it estimates the objective that the method minimises. Methods minimise different objectives "
        "(DRRho's is an excess over the reference model), so each has its own axis: compare shapes, not heights.",
    ),
    (
        "surrogate",
        "Surrogate",
        "Training follows the gradient of this scalar. Do not monitor its value, which does not estimate the "
        "objective and need not fall.",
    ),
)


def write_report(path: str | os.PathLike[str], data: ReportData, /) -> Path:
    """Write a report as one HTML file that loads nothing and runs no script.

    Parameters
    ----------
    path : path
        The file to write, such as ``DIR/report.html``; its folder must exist. The file appears whole or not at all.
    data : ReportData
        The content of the report; empty parts are left out.

    Returns
    -------
    Path
        The written file.

    Raises
    ------
    BadInput
        If `data` cannot be shown: there are no results, a row has no method or no metrics, there are several data sets,
        a weight is negative or not finite, or an image is not a uint8 picture. Then no file is written.

    Examples
    --------
    >>> import tempfile
    >>> row = {"method": "clip", "dataset": "digits", "seed": 0, "samples_seen": 1000, "seconds": 2.5,
    ...        "metrics": {"retrieval_r1": 0.25, "retrieval_r5": 0.5, "retrieval_r10": 0.75, "zero_shot_accuracy": 0.5}}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     written = write_report(f"{folder}/report.html", ReportData(title="A first run", results=[row]))
    ...     "CLIP puts the right partner first" in written.read_text(encoding="utf-8")
    True
    """
    return write_page(path, render_report(data))


def render_report(data: ReportData, /) -> str:
    """Return the text of the page that `write_report` writes, with the same errors."""
    return render("page.html", _content(data))


def bar_chart_svg(results: Sequence[Mapping[str, Any]], /, *, gallery_size: int = 200) -> str:
    """Draw the bars of R@1 as a standalone SVG file, for light and dark pages.

    Parameters
    ----------
    results : sequence of mappings
        The rows of results.json, see `ReportData`.
    gallery_size : int, default 200
        Held-out pairs in a gallery, for the text of the picture.

    Returns
    -------
    str
        The file's text.

    Raises
    ------
    BadInput
        If the results cannot be shown, as in `write_report`.

    Examples
    --------
    >>> row = {"method": "clip", "dataset": "digits", "seed": 0, "metrics": {"retrieval_r1": 0.25}}
    >>> bar_chart_svg([row]).startswith('<svg xmlns="http://www.w3.org/2000/svg"')
    True
    """
    methods = by_method(results)
    seeds = seeds_of(methods)
    note = f"{methods[0].dataset}, galleries of {gallery_size} held-out pairs"
    note += f", mean and each of {len(seeds)} seeds" if len(seeds) > 1 else f", seed {seeds[0]}"
    return _bars(methods).as_file(heading="The right partner is found first (R@1)", note=note)


def _content(data: ReportData) -> dict[str, Any]:
    """Return the values of the template's variables."""
    # `by_method` comes first, because it refuses results that cannot be shown, before anything is drawn.
    methods = by_method(data.results)
    seeds = seeds_of(methods)
    return {
        "title": data.title,
        "dataset": methods[0].dataset,
        "seeds_in_words": f"seed {seeds[0]}" if len(seeds) == 1 else f"seeds {', '.join(seeds)}",
        "num_seeds": len(seeds),
        "headline": headline(methods),
        "introduction": data.introduction,
        "metrics": list(METRICS.values()),
        "rows": _result_rows(methods),
        "gallery_size": data.gallery_size,
        "result_figures": _result_figures(data, methods),
        "training_figures": _training_figures(data),
        "gallery": data.gallery,
        "gallery_names": {
            method: {"name": label(method), "kind": css_class(method)}
            for method in ordered(method for row in data.gallery for method in row.retrieved)
        },
        "weights": _weights(data),
        "facts": data.facts,
        "learning_rates": _learning_rates(data),
        "command": data.command,
    }


def _result_rows(methods: Sequence[MethodResults]) -> list[dict[str, Any]]:
    """Return the rows of the table of results: for each metric the mean, the range and whether the mean is best."""
    best = {
        name: max((round(method.mean(name), 3) for method in methods if method.metrics[name]), default=math.nan)
        for name in METRICS
    }
    # If any run took less than ten seconds, all times get a decimal, because whole seconds would hide differences.
    form = ",.0f" if all(second >= 10 for method in methods for second in method.seconds) else ",.1f"
    rows = []
    for method in methods:
        cells = []
        for name in METRICS:
            values, mean = method.metrics[name], method.mean(name)
            spread = f"{tenths(min(values))}\N{EN DASH}{tenths(max(values))}" if len(values) > 1 else ""
            is_best = bool(values) and len(methods) > 1 and round(mean, 3) == best[name]
            cells.append({"mean": tenths(mean), "range": spread, "best": is_best})
        samples, seconds = _mean(method.samples_seen, ",.0f"), _mean(method.seconds, form)
        rows.append({"method": method.method, "cells": cells, "samples_seen": samples, "seconds": seconds})
    return rows


def _bars(methods: Sequence[MethodResults]) -> Chart:
    # The page and the standalone picture show the same chart.
    bars = [charts.Bar(method.method, method.metrics["retrieval_r1"]) for method in methods]
    return charts.bars(bars, key="bars", title="R@1 of every method")


def _result_figures(data: ReportData, methods: Sequence[MethodResults]) -> list[dict[str, Any]]:
    drawn = [figure(_bars(methods), "R@1 on the held-out pairs")]
    validation = _curves(data, "validation_r1")
    if validation:
        chart = charts.lines(
            validation,
            key="validation",
            title="Validation R@1 against samples seen",
            x_name="samples seen",
            y_name="R@1 on the validation split",
            share=True,
        )
        drawn.append(figure(chart, "R@1 while training"))
    return drawn


def _training_figures(data: ReportData) -> list[dict[str, Any]]:
    drawn = []
    for name, heading, meaning in _TRAINING_CURVES:
        curves = _curves(data, name)
        if curves:
            if any(len(curve.x) > charts.MOST_POINTS for curve in curves):
                meaning += " The points are means of neighbouring steps."
            chart = charts.panels(curves, key=name, title=f"{heading} against samples seen", x_name="samples seen")
            drawn.append(figure(chart, heading, meaning))
    return drawn


def _curves(data: ReportData, name: str) -> list[charts.Line]:
    """Return a curve for every method that has values under `name`; points without a value are left out."""
    lines = []
    for method in ordered(data.curves):
        points = [(point.get("samples_seen"), point.get(name)) for point in data.curves[method]]
        # Steps and validations may alternate, so a point need not have a value of this curve.
        known = [(float(x), float(y)) for x, y in points if x is not None and y is not None and math.isfinite(y)]
        if known:
            lines.append(charts.Line(method, [x for x, _ in known], [y for _, y in known]))
    return lines


def _weights(data: ReportData) -> dict[str, Any] | None:
    """Return the content of the section about weights, or None if there are no weights."""
    groups_of: dict[str, dict[str, NDArray[np.float64]]] = {}
    for method in ordered(data.weights):
        groups = {name: _checked_weights(method, name, values) for name, values in data.weights[method].items()}
        groups = {name: values for name, values in groups.items() if values.size}
        if groups:
            groups_of[method] = dict(list(groups.items())[:2])
    if not groups_of:
        return None
    # All histograms have the same bins and the same vertical axis, so that they can be compared by eye.
    bins = charts.Bins.shared([values for groups in groups_of.values() for values in groups.values()])
    highest = 1.08 * max(float(bins.shares(v).max()) for groups in groups_of.values() for v in groups.values())
    drawn, rows, sentences = [], [], []
    for method, groups in groups_of.items():
        chart = charts.histogram(
            method,
            groups,
            bins=bins,
            highest=highest,
            key=f"weights-{css_class(method)}",
            title=f"Weights that {label(method)} gives",
            x_name="weight (logarithmic)" if bins.logarithmic else "weight",
        )
        drawn.append(figure(chart, label(method)))
        rows += [
            {
                "method": method,
                "group": name,
                "number": f"{values.size:,}",
                "mean": figures(float(values.mean())),
                "median": figures(float(np.median(values))),
            }
            for name, values in groups.items()
        ]
        if len(groups) == 2 and next(iter(groups.values())).mean() > 0:
            # A sentence that compares the means needs two groups and a first mean above 0.
            (first, a), (second, b) = groups.items()
            ratio = figures(float(b.mean() / a.mean()))
            sentences.append(
                f"With {label(method)} the mean weight of a {second} caption is {ratio} times that of a {first} one."
            )
    clean_and_swapped = all(set(groups) == {"clean", "swapped"} for groups in groups_of.values())
    return {
        "heading": "The weights DRRho gives to swapped and to clean captions"
        if clean_and_swapped
        else "The weights that the captions get",
        "sentences": " ".join(sentences),
        "note": data.weights_note,
        "figures": drawn,
        "rows": rows,
    }


def _checked_weights(method: str, group: str, values: Any) -> NDArray[np.float64]:
    # A logarithmic axis and a mean need finite weights that are not negative.
    array = np.asarray(values, dtype=np.float64).ravel()
    if not np.isfinite(array).all() or (array < 0).any():
        bad = array[~(np.isfinite(array) & (array >= 0))][0]
        raise BadInput(f"weights must be finite and not negative, got {bad} for {method}, {group}")
    return array


def _learning_rates(data: ReportData) -> dict[str, Any] | None:
    """Return the table of the learning rates that were tried, or None if there are no trials."""
    tried = {
        method: {float(rate): float(score) for rate, score in scores.items()}
        for method, scores in data.learning_rates.items()
    }
    if not tried:
        return None
    rates = sorted({rate for scores in tried.values() for rate in scores})
    rows = []
    for method in ordered(tried):
        scores = tried[method]
        best = max(scores, key=lambda rate: scores[rate], default=math.nan)
        # If no choice is recorded, the rate with the best score counts as chosen.
        chosen = float(data.chosen_learning_rates.get(method, best))
        cells = [{"score": tenths(scores.get(rate, math.nan)), "chosen": rate == chosen} for rate in rates]
        rows.append({"method": method, "cells": cells})
    return {"rates": [number(rate) for rate in rates], "rows": rows}


def _mean(values: Sequence[float], form: str) -> str:
    return format(math.fsum(values) / len(values), form) if values else UNKNOWN
