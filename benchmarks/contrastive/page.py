"""The page and the plots of a measurement."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from benchmarks.contrastive.candidates import CANDIDATES, DTYPES, RATIOS

# The plots that compare the step's rate of matrix products with the library's own rate: for each file, the heading and
# the ratio that is drawn.
_SHARES = {
    "share.svg": ("One pass: share of the library's product rate", "share"),
    "two-passes.svg": ("Two passes: share of the library's product rate", "two-pass share"),
}
# For each ratio of another program's time to the time of our step, the name of its curve in the plots.
_OTHERS = {
    "over dense": "dense autograd",
    "over dense, faster": "dense/faster",
    "over released": "released form",
    "over cross-entropy": "cross-entropy",
}


def markdown(figures: Mapping[str, Any], command: str) -> str:
    """Return the page of a measurement, in Markdown."""
    setting = figures["setting"]
    libraries = ", ".join(f"{name} {version}" for name, version in setting["libraries"].items())
    lines = [
        "# The contrastive step, measured",
        "",
        f"    {command}",
        "",
        f"{libraries}; {setting['machine']}; {setting['dtype']}, d = r = {setting['feature_dim']}, "
        f"{setting['threads']} thread(s), {setting['device'] or 'the default device'}, Python {setting['python']}. "
        "The command writes this page; the raw figures are in [contrastive.json](contrastive.json).",
        "",
        *(f"- *{name}*: {words}." for name, words in CANDIDATES.items()),
        "",
        "Milliseconds are medians over the rounds. Ratios are medians of the ratios of runs that follow each other:",
        "",
        *(f"- *{name}*: {words}." for name, words in RATIOS.items()),
        "",
        *(line for file, (heading, _) in _charts(figures).items() for line in (f"![{heading}]({file})", "")),
    ]
    # One table of times and ratios per library, then the table of memory.
    for backend in setting["libraries"]:
        rows = [row for row in figures["times"] if row["backend"] == backend]
        lines += [f"## {backend}", "", "| b | product, ms | " + " | ".join([*CANDIDATES, *RATIOS]) + " |"]
        lines.append("|" + "---|" * (2 + len(CANDIDATES) + len(RATIOS)))
        for row in rows:
            cells = [f"{row['batch_size']:,}", f"{row['milliseconds']['product']:.1f}"]
            # A candidate that was skipped has the reason in its cell.
            for name in CANDIDATES:
                value = row["milliseconds"].get(name)
                cells.append(row["left_out"].get(name, "") if value is None else f"{value:.1f}")
            for name in RATIOS:
                value = row["ratios"].get(name)
                form = "{:.0%}" if name.endswith("share") else "{:.2f}"
                cells.append("" if value is None else form.format(value))
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
        memory = [row for row in figures["memory"] if row["backend"] == backend]
        if memory:
            names = list(dict.fromkeys(row["candidate"] for row in memory))
            lines += [
                "Extra memory, MB; the last column is the memory of two b x b matrices:",
                "",
                "| b | " + " | ".join(names) + " | 2 b^2 numbers |",
            ]
            lines.append("|" + "---|" * (2 + len(names)))
            for size in dict.fromkeys(row["batch_size"] for row in memory):
                here = {row["candidate"]: row for row in memory if row["batch_size"] == size}
                cells = [f"{size:,}"]
                for name in names:
                    row = here.get(name, {})
                    value = row.get("megabytes")
                    cells.append(row.get("reason", "") if value is None else f"{value:.0f}")
                cells.append(f"{2 * size * size * DTYPES[setting['dtype']] / 1e6:.0f}")
                lines.append("| " + " | ".join(cells) + " |")
            lines.append("")
    return "\n".join(lines)


def pictures(figures: Mapping[str, Any]) -> dict[str, str]:
    """Return the plots by file name, as SVG."""
    # Matplotlib is imported only if there are plots to draw.
    from drrho_clip.report import Line, lines

    smallest = math.log2(min(row["batch_size"] for row in figures["times"]))
    drawn = {}
    for file, (heading, curves) in _charts(figures).items():
        chart = lines(
            [Line(name, x, y) for name, (x, y) in curves.items()],
            key=file.removesuffix(".svg"),
            title=heading,
            x_name="log2 of the batch size",
            y_name="",
            share=file in _SHARES,
            x_from=smallest,
        )
        drawn[file] = chart.as_file(
            heading=heading, note=f"{figures['setting']['machine']}, {figures['setting']['dtype']}"
        )
    return drawn


def _charts(figures: Mapping[str, Any]) -> dict[str, tuple[str, dict[str, tuple[list[float], list[float]]]]]:
    """Return each plot's heading and its curves, by file name; a curve is a list of x and a list of y."""

    def curves(ratio_of_curve: Mapping[str, tuple[str, str]]) -> dict[str, tuple[list[float], list[float]]]:
        points = {
            name: [
                (math.log2(row["batch_size"]), row["ratios"][ratio])
                for row in figures["times"]
                if row["backend"] == backend and ratio in row["ratios"]
            ]
            for name, (backend, ratio) in ratio_of_curve.items()
        }
        # A curve with a single point would be a dot, so it is left out.
        return {name: ([x for x, _ in pts], [y for _, y in pts]) for name, pts in points.items() if len(pts) > 1}

    libraries = list(figures["setting"]["libraries"])
    charts = {
        file: (heading, curves({library: (library, ratio) for library in libraries}))
        for file, (heading, ratio) in _SHARES.items()
    }
    for library in libraries:
        of_others = curves({name: (library, ratio) for ratio, name in _OTHERS.items()})
        charts[f"ratios-{library}.svg"] = (f"{library}: time of other programs over ours", of_others)
    return {file: chart for file, chart in charts.items() if chart[1]}
