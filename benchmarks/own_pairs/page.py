"""The page docs/examples/own_pairs.md and own_pairs.json beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

# The rows of the table, in this order; a run that was not measured is left out.
_ROWS: Final = {
    "reference": "`runs/reference`: clip, stopped before it learns wrong captions by heart",
    "clip": "`--method clip`",
    "sogclr": "`--method sogclr`",
    "steered": "`runs/steered`: drrho, nothing left out",
    "weighted": "sogclr with `--anchor-weights reference`",
    "cleaned": "`runs/cleaned`: sogclr, suspects left out",
}


# The goals of the recipe: title, run, the run whose R@1 is subtracted (None: no run), and the least value.
_GOALS: Final = (
    ("steered above its reference", "steered", "reference", 0.10),
    ("steered above sogclr", "steered", "sogclr", 0.08),
    ("steered above clip", "steered", "clip", 0.10),
    ("cleaned", "cleaned", None, 0.95),
)


def write_page(folder: Path, figures: Mapping[str, Any]) -> None:
    """Write the page and the figures into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "own_pairs.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    (folder / "own_pairs.md").write_text(_page(figures), encoding="utf-8")


def _page(figures: Mapping[str, Any]) -> str:
    seeds = figures["seeds"]
    names = [name for name in _ROWS if any(name in seed["runs"] for seed in seeds)]
    columns = [f"seed {seed['seed']}" for seed in seeds]
    lines = [
        "# A table of your own, with wrong captions",
        "",
        "The command `python -m benchmarks.own_pairs --work FOLDER` writes this page; the raw figures are in",
        "[`own_pairs.json`](own_pairs.json).",
        "",
        "The data are 3,000 drawn pictures of 64 x 64 pixels. A picture shows a figure on a coloured ground, and the",
        'caption names everything that varies: "a small yellow ring at the bottom right on white". 30 % of the',
        "captions are swapped among the pictures. The command first runs the lines below, which the README",
        "recommends, and then the other runs of the first table, with the defaults of `drrho train`. A tenth of the",
        "pictures is held out for validation and a tenth for test, with their wrong captions.",
        "",
        "```sh",
        *figures["recipe"],
        "```",
        "",
        "## R@1 on clean pairs",
        "",
        "The figures are measured on 600 other pictures with right captions, in galleries of 200, as the mean over",
        "both directions. A *seed* draws other pictures and other swaps.",
        "",
        "| run | " + " | ".join([*columns, "samples seen", "seconds"]) + " |",
        "|" + "---|" * (len(seeds) + 3),
    ]
    for name in names:
        runs = [seed["runs"].get(name) for seed in seeds]
        cells = ["" if run is None else f"{run['retrieval_r1']:.3f}" for run in runs]
        measured = [run for run in runs if run is not None]
        seen = f"{round(sum(run['samples_seen'] for run in measured) / len(measured)):,}"
        seconds = f"{sum(run['seconds'] for run in measured) / len(measured):.0f}"
        lines.append(f"| {_ROWS[name]} | " + " | ".join([*cells, seen, seconds]) + " |")
    lines += [
        "",
        f"Samples seen and seconds in training steps are means over the seeds ({figures['machine']}).",
        "Other programs ran on the machine at the same time. Every run is measured in the epoch with the best R@1 on",
        "its own noisy held-out pairs. An empty cell has not been measured yet.",
        "",
        "| goal | least value | " + " | ".join(columns) + " |",
        "|" + "---|" * (len(seeds) + 2),
        *(
            f"| {title} | {least:.2f} | " + " | ".join(_reached(seed["runs"], name, other) for seed in seeds) + " |"
            for title, name, other, least in _GOALS
        ),
        "",
        "## The suspects",
        "",
        "`drrho suspects runs/reference --data pairs.csv --out suspects.csv` ranks all pairs, without the truth. The",
        "area under the curve is the share of pairs of a wrong and a right caption in which the wrong caption ranks as",
        "worse.",
        "",
        "| | " + " | ".join(columns) + " |",
        "|" + "---|" * (len(seeds) + 1),
        *(
            f"| {title} | " + " | ".join(str(seed["suspects"].get(key, "")) for seed in seeds) + " |"
            for title, key in (
                ("wrong captions", "wrong"),
                ("the command's estimate", "probably_wrong"),
                ("wrong among the 500 worst", "wrong_among_the_worst"),
                ("area under the curve", "area_under_the_curve"),
            )
        ),
        "",
    ]
    return "\n".join(lines)


def _reached(runs: Mapping[str, Any], name: str, other: str | None) -> str:
    """Return R@1 of a run, less that of another run, as a cell; an empty text if a run is missing."""
    if name not in runs or (other is not None and other not in runs):
        return ""
    value = runs[name]["retrieval_r1"]
    return f"{value:.3f}" if other is None else f"{value - runs[other]['retrieval_r1']:.3f}"
