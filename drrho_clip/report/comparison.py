"""The report of several runs: their figures, curves, retrievals and settings on one page."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from drrho_clip.errors import BadInput
from drrho_clip.report import charts
from drrho_clip.report.data import GalleryRow
from drrho_clip.report.html import figure, render, write_page
from drrho_clip.report.results import METRICS, Headline
from drrho_clip.report.runs import HeldOut, ShownRun, differing_settings
from drrho_clip.report.style import UNKNOWN, label, ordered, percent, tenths

__all__ = ["notes_of", "write_comparison"]

_FIGURES = {**METRICS, "retrieval_r1_full": "R@1, all pairs"}
_COUNTS = {"num_pairs": "Pairs", "gallery_size": "Gallery"}


def write_comparison(
    path: str | os.PathLike[str],
    groups: Sequence[HeldOut],
    galleries: Sequence[Sequence[GalleryRow]],
    *,
    notes: Sequence[str] = (),
    command: str = "",
) -> Path:
    """Write the report of several runs as one HTML file that loads nothing and runs no script.

    Parameters
    ----------
    path : path
        The file to write; its folder must exist. The file appears whole or not at all.
    groups : sequence of HeldOut
        The runs; each group was measured on held-out pairs of its own. Figures of different groups are never compared.
    galleries : sequence of sequences of GalleryRow
        The examples of retrieval of each group, by the names of the runs; a group may have none.
    notes : sequence of str
        Sentences about what the reader must know, such as those that `notes_of` returns.
    command : str
        The command line that reproduces the page.

    Returns
    -------
    Path
        The written file.

    Raises
    ------
    BadInput
        If there is no run.
    """
    runs = [shown for group in groups for shown in group.runs]
    if not runs:
        raise BadInput("groups must hold at least one run, got none")
    differing, shared = differing_settings(runs)
    content = {
        "title": f"The run {runs[0].name}" if len(runs) == 1 else f"{len(runs)} runs side by side",
        "eyebrow": " · ".join(dict.fromkeys(Path(group.name).name for group in groups)),
        "headline": _headline(groups),
        "notes": list(notes),
        "groups": [
            _group(group, gallery, number, len(groups))
            for number, (group, gallery) in enumerate(zip(groups, galleries, strict=True))
        ],
        "training": _losses(runs),
        "runs": [{"name": shown.name, "kind": shown.kind} for shown in runs],
        "differing": differing,
        "shared": shared,
        "command": command,
    }
    return write_page(path, render("comparison.html", content, sheets=("page", "chart", "notes", "runs")))


def notes_of(groups: Sequence[HeldOut]) -> list[str]:
    """Return the sentences that keep a reader from a wrong comparison, for the page and for the terminal."""
    notes = []
    if len(groups) > 1:
        names = "; ".join(
            f"{', '.join(shown.name for shown in group.runs)} on {Path(group.name).name}" for group in groups
        )
        notes.append(
            "The runs were measured on different held-out pairs, so figures of different data cannot be compared: "
            f"{names}."
        )
    for group in groups:
        sizes = {shown.metrics.get("gallery_size") for shown in group.runs if shown.finished}
        if len(sizes) > 1:
            notes.append("The galleries have different sizes, and a larger gallery is harder; compare with care.")
        if group.reason:
            notes.append(f"The retrievals are left out, because the data cannot be opened: {group.reason}")
    notes += [
        f"The run {shown.name} is unfinished ({shown.status.partition(', ')[2]}) and has no figures of held-out pairs."
        for group in groups
        for shown in group.runs
        if not shown.finished
    ]
    return notes


def _headline(groups: Sequence[HeldOut]) -> Headline:
    """Return the sentence at the top: the best run, if all runs can be compared."""
    finished = [shown for group in groups for shown in group.runs if "retrieval_r1" in shown.metrics]
    if not finished:
        return Headline("There are no figures of held-out pairs yet.")
    if len(groups) > 1:
        return Headline("These runs were measured on different data and cannot be compared.")
    by_r1 = sorted(finished, key=lambda shown: -shown.metrics["retrieval_r1"])
    best = percent(by_r1[0].metrics["retrieval_r1"])
    leaders = [shown.name for shown in finished if percent(shown.metrics["retrieval_r1"]) == best]
    followers = [f"{shown.name} ({percent(shown.metrics['retrieval_r1'])})" for shown in by_r1[len(leaders) :][:4]]
    verb = "puts" if len(leaders) == 1 else "put"
    return Headline(
        before=f"{_listed(leaders)} {verb} the right partner first in ",
        figure=best,
        after=f" of the searches{f', ahead of {_listed(followers)}' if followers else ''}.",
        kind=by_r1[0].kind if len(leaders) == 1 else "",
    )


def _listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def _group(group: HeldOut, gallery: Sequence[GalleryRow], number: int, count: int) -> dict[str, Any]:
    """Return the content of the sections about the runs that were measured on the same pairs."""
    columns = [name for name in _FIGURES if any(name in shown.metrics for shown in group.runs)]
    counts = [name for name in _COUNTS if any(name in shown.metrics for shown in group.runs)]
    # A figure is the best only among figures of galleries of one size.
    comparable = len({shown.metrics.get("gallery_size") for shown in group.runs if shown.finished}) == 1
    best = {
        name: max((round(shown.metrics[name], 3) for shown in group.runs if name in shown.metrics), default=math.nan)
        for name in columns
    }
    several = sum(shown.finished for shown in group.runs) > 1
    rows = []
    for shown in group.runs:
        cells: list[dict[str, Any]] = [
            {
                "text": tenths(shown.metrics.get(name, math.nan)),
                "error": _error(shown) if name == "retrieval_r1" else "",
                "best": several and comparable and round(shown.metrics.get(name, math.nan), 3) == best[name],
            }
            for name in columns
        ]
        cells += [{"text": _whole(shown.metrics.get(name)), "error": "", "best": False} for name in counts]
        cells += [{"text": _whole(value), "error": "", "best": False} for value in (shown.samples_seen, shown.seconds)]
        note = label(shown.run.config.method) + ("" if shown.finished else f" · {shown.status}")
        rows.append({"name": shown.name, "kind": shown.kind, "note": note, "cells": cells})
    names = {shown.name: {"name": shown.name, "kind": shown.kind} for shown in group.runs}
    return {
        "key": f"data-{number + 1}",
        "heading": "Results" if count == 1 else f"Results on {Path(group.name).name}",
        "gallery_heading": "What each run finds" + ("" if count == 1 else f" in {Path(group.name).name}"),
        "shares": [_FIGURES[name] for name in columns],
        "counts": [*(_COUNTS[name] for name in counts), "Samples seen", "Seconds"],
        "rows": rows,
        "figures": _figures(group, number),
        "gallery": list(gallery),
        "gallery_names": names,
    }


def _error(shown: ShownRun) -> str:
    """Return the standard error of R@1 in per cent, or an empty text if it is not known."""
    error = shown.metrics.get("retrieval_r1_standard_error", math.nan)
    # The estimate is 0 if R@1 stays the same without any single image, and then says nothing about the error.
    return tenths(error) if error > 0 else ""


def _figures(group: HeldOut, number: int) -> list[dict[str, Any]]:
    """Return the charts of R@1: bars of the finished runs, and curves on the validation pairs."""
    drawn = []
    bars = [
        charts.Bar(shown.run.config.method, [shown.metrics["retrieval_r1"]], name=shown.name, kind=shown.kind)
        for shown in group.runs
        if "retrieval_r1" in shown.metrics
    ]
    if bars:
        drawn.append(figure(charts.bars(bars, key=f"bars-{number}", title="R@1 of every run"), "R@1 on held-out pairs"))
    validation = _lines(group.runs, "validation_retrieval_r1")
    if validation:
        chart = charts.lines(
            validation,
            key=f"validation-{number}",
            title="Validation R@1 against steps",
            x_name="step",
            y_name="R@1 on the validation pairs",
            share=True,
        )
        drawn.append(figure(chart, "R@1 while training"))
    return drawn


def _losses(runs: Sequence[ShownRun]) -> list[dict[str, Any]]:
    """Return a chart of the loss for each method, because the losses of different methods cannot be compared."""
    drawn = []
    for number, method in enumerate(ordered(shown.run.config.method for shown in runs)):
        lines = _lines([shown for shown in runs if shown.run.config.method == method], "loss")
        if lines:
            chart = charts.lines(
                lines,
                key=f"loss-{number}",
                title=f"Loss of {label(method)} against steps",
                x_name="step",
                y_name="objective estimate",
            )
            drawn.append(figure(chart, f"Loss of {label(method)}"))
    return drawn


def _lines(runs: Sequence[ShownRun], name: str) -> list[charts.Line]:
    curves = [(shown, *shown.curve(name)) for shown in runs]
    return [
        charts.Line(shown.run.config.method, steps, values, name=shown.name, kind=shown.kind)
        for shown, steps, values in curves
        if steps
    ]


def _whole(value: float | None) -> str:
    return UNKNOWN if value is None or not math.isfinite(value) else f"{value:,.0f}"
