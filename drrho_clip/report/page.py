"""The page: ReportData in, one self-contained HTML file out."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from drrho_clip.errors import BadInput
from drrho_clip.report import svg
from drrho_clip.report.data import GalleryRow, ReportData, RetrievedImage
from drrho_clip.report.png import data_uri
from drrho_clip.report.style import (
    UNKNOWN,
    colours,
    css_class,
    escape,
    figures,
    label,
    number,
    ordered,
    percent,
    style_sheet,
    tenths,
)
from drrho_core._validate import describe

_METRICS = {
    "retrieval_r1": "R@1",
    "retrieval_r5": "R@5",
    "retrieval_r10": "R@10",
    "zero_shot_accuracy": "Zero-shot",
}

_HOW_MEASURED = (
    "R@k is the share of queries whose right partner is among the first k answers: the mean of image-to-text and "
    "text-to-image search in galleries of {gallery_size} held-out pairs. Identical captions count as correct, ties "
    "count against. Zero-shot is the share of images whose class prompt is the nearest."
)
_CURVES = {
    "loss": (
        "Objective estimate",
        "Watch this one: it estimates the objective that the method minimises. Methods minimise different objectives "
        "(DRRho's is an excess over the reference model), so each has its own axis: compare shapes, not heights.",
    ),
    "surrogate": (
        "Surrogate",
        "Its gradient is the one that is followed; its value means nothing, and it need not fall.",
    ),
}
_HOW_TO_READ_THE_GALLERY = (
    "A held-out caption is the query; each model shows the images of the gallery that it holds for the nearest, best "
    "first. A framed image with a tick is correct: its caption equals the query. The image beside the query is its own."
)
_HOW_RATES_WERE_CHOSEN = (
    "Every method tried the same learning rates; the one with the best R@1 on the validation split (in per cent, the "
    "best in bold) was kept."
)

# The browser itself then refuses whatever this page would load or run.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def write_report(path: str | os.PathLike[str], data: ReportData, /) -> Path:
    """Write a report as one HTML file that loads nothing and runs no script.

    Parameters
    ----------
    path : path
        The file to write, such as ``DIR/report.html``; its folder must exist. It appears whole or not at all.
    data : ReportData
        What to show; empty parts are left out.

    Returns
    -------
    Path
        The written file.

    Raises
    ------
    BadInput
        If `data` cannot be shown: no results, rows without a method or metrics, several data sets, weights that are
        negative or not finite, an image that is no uint8 picture. Nothing is written then.

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
    page = render_report(data)
    target = Path(path)
    partial = target.with_name(target.name + ".partial")
    partial.write_text(page, encoding="utf-8")
    return partial.replace(target)


def render_report(data: ReportData, /) -> str:
    """Return the text of the page that `write_report` writes, with the same errors."""
    summaries = _summaries(data.results)
    body = "".join(
        [
            _header(data, summaries),
            _results(data, summaries),
            _training_curves(data),
            _gallery(data.gallery),
            _weights(data),
            _fairness(data),
        ]
    )
    style = f"{colours()}\n{style_sheet('page')}{style_sheet('chart')}"
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(data.title)}</title>
<link rel="icon" href="data:,">
<style>
{style}</style>
</head>
<body>
{body}</main>
<footer><p>This page is one file. It loads nothing and runs no script.</p></footer>
</body>
</html>
"""


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
        As `write_report`.

    Examples
    --------
    >>> row = {"method": "clip", "dataset": "digits", "seed": 0, "metrics": {"retrieval_r1": 0.25}}
    >>> bar_chart_svg([row]).startswith('<svg xmlns="http://www.w3.org/2000/svg"')
    True
    """
    summaries = _summaries(results)
    seeds = _seeds(summaries)
    note = f"{summaries[0].dataset}, galleries of {gallery_size} held-out pairs"
    note += f", mean and each of {len(seeds)} seeds" if len(seeds) > 1 else f", seed {seeds[0]}"
    return _bars(summaries).as_file(heading="The right partner is found first (R@1)", note=note)


@dataclass(frozen=True)
class _Summary:
    """One method's rows of results.json, each field with one value per seed."""

    method: str
    dataset: str
    seeds: list[str]
    metrics: dict[str, list[float]]
    samples_seen: list[float]
    seconds: list[float]

    def mean(self, metric: str) -> float:
        values = self.metrics[metric]
        return math.fsum(values) / len(values) if values else math.nan


def _summaries(results: Sequence[Mapping[str, Any]]) -> list[_Summary]:
    """Check the rows of results.json and gather them by method, in the reader's order."""
    if not results:
        raise BadInput("results must hold at least one row, got none")
    for row in results:
        if not isinstance(row, Mapping) or not isinstance(row.get("method"), str):
            raise BadInput(f"results must be mappings with a str under 'method', got {describe(row)}")
        if not isinstance(row.get("metrics"), Mapping):
            raise BadInput(f"results must have a mapping under 'metrics', got {describe(row.get('metrics'))}")
    datasets = sorted({str(row.get("dataset", "")) for row in results})
    if len(datasets) > 1:
        raise BadInput(f"results must be of one dataset, got {', '.join(datasets)}")

    summaries = []
    for method in ordered(row["method"] for row in results):
        rows = [row for row in results if row["method"] == method]
        summaries.append(
            _Summary(
                method=method,
                dataset=datasets[0],
                seeds=[str(row.get("seed", "")) for row in rows],
                metrics={name: _known(row["metrics"].get(name) for row in rows) for name in _METRICS},
                samples_seen=_known(row.get("samples_seen") for row in rows),
                seconds=_known(row.get("seconds") for row in rows),
            )
        )
    return summaries


def _known(values: Iterable[Any]) -> list[float]:
    """Return the values that are finite numbers."""
    return [float(value) for value in values if value is not None and math.isfinite(value)]


def _seeds(summaries: Sequence[_Summary]) -> list[str]:
    return list(dict.fromkeys(seed for summary in summaries for seed in summary.seeds))


def _bars(summaries: Sequence[_Summary]) -> svg.Chart:
    bars = [svg.Bar(summary.method, summary.metrics["retrieval_r1"]) for summary in summaries]
    return svg.bars(bars, key="bars", title="R@1 of every method")


def _header(data: ReportData, summaries: Sequence[_Summary]) -> str:
    seeds = _seeds(summaries)
    named = f"seed {seeds[0]}" if len(seeds) == 1 else f"seeds {', '.join(seeds)}"
    introduction = f"<p>{escape(data.introduction)}</p>" if data.introduction else ""
    return f"""<header>
<p class="eyebrow">{escape(summaries[0].dataset)} · {escape(named)}</p>
<h1>{escape(data.title)}</h1>
<p class="headline">{_headline(summaries)}</p>
{introduction}
</header>
<main>
"""


def _headline(summaries: Sequence[_Summary]) -> str:
    """Say in one sentence who is best at R@1 and by how much: what the figures say, not what was hoped for."""
    known = sorted((s for s in summaries if s.metrics["retrieval_r1"]), key=lambda s: -s.mean("retrieval_r1"))
    if not known:
        return "No retrieval was measured."
    best = percent(known[0].mean("retrieval_r1"))
    leaders = [_in_a_sentence(s) for s in summaries if percent(s.mean("retrieval_r1")) == best]
    others = [f"{_in_a_sentence(s)} ({percent(s.mean('retrieval_r1'))})" for s in known[len(leaders) :]]
    names = _listed(leaders)
    verb = "puts" if len(leaders) == 1 else "put"
    ahead = f", ahead of {_listed(others)}" if others else ""
    sentence = f"{names[0].upper()}{names[1:]} {verb} the right partner first in BEST of the searches{ahead}."
    kind = f' class="{css_class(known[0].method)}"' if len(leaders) == 1 else ""
    return escape(sentence).replace("BEST", f"<strong{kind}>{best}</strong>", 1)


def _in_a_sentence(summary: _Summary) -> str:
    return "the reference model" if summary.method == "reference" else label(summary.method)


def _listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def _results(data: ReportData, summaries: Sequence[_Summary]) -> str:
    best = {
        name: max((round(summary.mean(name), 3) for summary in summaries if summary.metrics[name]), default=math.nan)
        for name in _METRICS
    }
    rows = []
    seconds_form = ",.0f" if all(second >= 10 for summary in summaries for second in summary.seconds) else ",.1f"
    for summary in summaries:
        cells = []
        for name in _METRICS:
            values, mean = summary.metrics[name], summary.mean(name)
            written = tenths(mean)
            if values and round(mean, 3) == best[name] and len(summaries) > 1:
                written = f"<strong>{written}</strong>"
            if len(values) > 1:
                written += f"<small>{tenths(min(values))}\N{EN DASH}{tenths(max(values))}</small>"
            cells.append(f"<td>{written}</td>")
        cells.append(f"<td>{_mean(summary.samples_seen, ',.0f')}</td><td>{_mean(summary.seconds, seconds_form)}</td>")
        rows.append(f"<tr>{_method_cell(summary.method)}{''.join(cells)}</tr>")
    heads = "".join(f'<th scope="col">{name}<small>%</small></th>' for name in _METRICS.values())
    seeds = _seeds(summaries)
    spread = (
        f" Figures are means of {len(seeds)} seeds, with the lowest and the highest below." if len(seeds) > 1 else ""
    )
    table = _table(
        "Results of every method",
        f'<th scope="col">Method</th>{heads}<th scope="col">Samples seen</th><th scope="col">Seconds</th>',
        rows,
    )
    drawn = [_figure(_bars(summaries), "R@1 on the held-out pairs")]
    validation = _curves(data, "validation_r1")
    if validation:
        chart = svg.lines(
            validation,
            key="validation",
            title="Validation R@1 against samples seen",
            x_name="samples seen",
            y_name="R@1 on the validation split",
            share=True,
        )
        drawn.append(_figure(chart, "R@1 while training"))
    note = f'<p class="note">{_HOW_MEASURED.format(gallery_size=data.gallery_size)}{spread}</p>'
    return _section("results", "Results", table + note + _pair(drawn))


def _training_curves(data: ReportData) -> str:
    drawn = []
    for name, (heading, meaning) in _CURVES.items():
        curves = _curves(data, name)
        if curves:
            if any(len(curve.x) > svg.MOST_POINTS for curve in curves):
                meaning += " The points are means of neighbouring steps."
            chart = svg.panels(curves, key=name, title=f"{heading} against samples seen", x_name="samples seen")
            drawn.append(_figure(chart, heading, meaning))
    return _section("training", "Training curves", _pair(drawn)) if drawn else ""


def _curves(data: ReportData, name: str) -> list[svg.Line]:
    """Return every method's points that have a value under `name`."""
    lines = []
    for method in ordered(data.curves):
        points = [(point.get("samples_seen"), point.get(name)) for point in data.curves[method]]
        known = [(float(x), float(y)) for x, y in points if x is not None and y is not None and math.isfinite(y)]
        if known:
            lines.append(svg.Line(method, [x for x, _ in known], [y for _, y in known]))
    return lines


def _gallery(gallery: Sequence[GalleryRow]) -> str:
    rows = []
    for row in gallery:
        own = ""
        if row.image is not None:
            own = _picture(row.image, f"the image that belongs to the caption “{row.query}”", "own")
        strips = "".join(_strip(method, row.retrieved[method]) for method in ordered(row.retrieved))
        rows.append(f'<article class="query"><h3>{own}<q>{escape(row.query)}</q></h3>{strips}</article>')
    if not rows:
        return ""
    note = f'<p class="note">{_HOW_TO_READ_THE_GALLERY}</p>'
    return _section("gallery", "What each model finds", f'{note}<div class="queries">{"".join(rows)}</div>')


def _strip(method: str, images: Sequence[RetrievedImage]) -> str:
    items = []
    for rank, found in enumerate(images, start=1):
        told = f"{rank}: “{found.caption}”, {'correct' if found.correct else 'wrong'}"
        items.append(f'<li class="{"hit" if found.correct else "miss"}">{_picture(found.image, told)}</li>')
    return (
        f'<div class="strip"><h4 class="method {css_class(method)}">{escape(label(method))}</h4>'
        f"<ol>{''.join(items)}</ol></div>"
    )


def _picture(image: NDArray[np.uint8], told: str, kind: str = "") -> str:
    height, width = np.shape(image)[:2] if np.ndim(image) >= 2 else (0, 0)
    of_kind = f' class="{kind}"' if kind else ""
    told = escape(told)
    return f'<img{of_kind} src="{data_uri(image)}" width="{width}" height="{height}" alt="{told}" title="{told}">'


def _weights(data: ReportData) -> str:
    groups_of: dict[str, dict[str, NDArray[np.float64]]] = {}
    for method in ordered(data.weights):
        groups = {name: _checked_weights(method, name, values) for name, values in data.weights[method].items()}
        groups = {name: values for name, values in groups.items() if values.size}
        if groups:
            groups_of[method] = dict(list(groups.items())[:2])
    if not groups_of:
        return ""
    bins = svg.Bins.shared([values for groups in groups_of.values() for values in groups.values()])
    highest = 1.08 * max(float(bins.shares(v).max()) for groups in groups_of.values() for v in groups.values())
    drawn, rows, sentences = [], [], []
    for method, groups in groups_of.items():
        chart = svg.histogram(
            method,
            groups,
            bins=bins,
            highest=highest,
            key=f"weights-{css_class(method)}",
            title=f"Weights that {label(method)} gives",
            x_name="weight (logarithmic)" if bins.logarithmic else "weight",
        )
        drawn.append(_figure(chart, label(method)))
        for name, values in groups.items():
            rows.append(
                f'<tr>{_method_cell(method)}<td class="word">{escape(name)}</td>'
                f"<td>{values.size:,}</td><td>{figures(float(values.mean()))}</td>"
                f"<td>{figures(float(np.median(values)))}</td></tr>"
            )
        if len(groups) == 2 and next(iter(groups.values())).mean() > 0:
            (first, a), (second, b) = groups.items()
            ratio = figures(float(b.mean() / a.mean()))
            sentences.append(
                f"With {label(method)} the mean weight of a {second} caption is {ratio} times that of a {first} one."
            )
    table = _table(
        "Weights in numbers",
        '<th scope="col">Method</th><th scope="col" class="word">Captions</th><th scope="col">Number</th>'
        '<th scope="col">Mean</th><th scope="col">Median</th>',
        rows,
    )
    note = f'<p class="note">{escape(data.weights_note)}</p>' if data.weights_note else ""
    told = f"<p>{escape(' '.join(sentences))}</p>" if sentences else ""
    return _section("weights", _weights_heading(groups_of), f"{told}{note}{_pair(drawn)}{table}")


def _weights_heading(groups_of: Mapping[str, Mapping[str, Any]]) -> str:
    if all(set(groups) == {"clean", "swapped"} for groups in groups_of.values()):
        return "The weights DRRho gives to swapped and to clean captions"
    return "The weights that the captions get"


def _checked_weights(method: str, group: str, values: Any) -> NDArray[np.float64]:
    array = np.asarray(values, dtype=np.float64).ravel()
    if not np.isfinite(array).all() or (array < 0).any():
        bad = array[~(np.isfinite(array) & (array >= 0))][0]
        raise BadInput(f"weights must be finite and not negative, got {bad} for {method}, {group}")
    return array


def _fairness(data: ReportData) -> str:
    parts = []
    if data.facts:
        facts = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(text)}</dd></div>" for name, text in data.facts)
        parts.append(f"<dl>{facts}</dl>")
    if data.learning_rates:
        parts.append(_learning_rates(data))
    if data.command:
        parts.append(f'<h3>Run it again</h3><pre tabindex="0"><code>{escape(data.command)}</code></pre>')
    return _section("fairness", "What makes the comparison fair", "".join(parts)) if parts else ""


def _learning_rates(data: ReportData) -> str:
    tried = {
        method: {float(rate): float(score) for rate, score in scores.items()}
        for method, scores in data.learning_rates.items()
    }
    rates = sorted({rate for scores in tried.values() for rate in scores})
    rows = []
    for method in ordered(tried):
        scores = tried[method]
        chosen = data.chosen_learning_rates.get(method, max(scores, key=lambda rate: scores[rate], default=math.nan))
        cells = []
        for rate in rates:
            written = tenths(scores.get(rate, math.nan))
            if rate == float(chosen):
                written = f"<strong>{written}</strong><small>chosen</small>"
            cells.append(f"<td>{written}</td>")
        rows.append(f"<tr>{_method_cell(method)}{''.join(cells)}</tr>")
    heads = "".join(f'<th scope="col">{number(rate)}</th>' for rate in rates)
    table = _table("R@1 on the validation split by learning rate", f'<th scope="col">Method</th>{heads}', rows)
    return f'<h3>Learning rates</h3><p class="note">{_HOW_RATES_WERE_CHOSEN}</p>{table}'


def _section(key: str, heading: str, content: str) -> str:
    return f"""<section id="{key}" aria-labelledby="{key}-heading">
<h2 id="{key}-heading">{escape(heading)}</h2>
{content}
</section>
"""


def _pair(drawn: Sequence[str]) -> str:
    return f'<div class="pair">{"".join(drawn)}</div>'


def _figure(chart: svg.Chart, heading: str, meaning: str = "") -> str:
    told = f"<p>{escape(meaning)}</p>" if meaning else ""
    return f"<figure><figcaption><h3>{escape(heading)}</h3>{told}</figcaption>{chart.inline()}</figure>"


def _table(name: str, heads: str, rows: Sequence[str]) -> str:
    return (
        f'<div class="scroll" role="region" aria-label="{escape(name)}" tabindex="0"><table>'
        f"<thead><tr>{heads}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _method_cell(method: str) -> str:
    return f'<th scope="row" class="method {css_class(method)}">{escape(label(method))}</th>'


def _mean(values: Sequence[float], form: str) -> str:
    return format(math.fsum(values) / len(values), form) if values else UNKNOWN
