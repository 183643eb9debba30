"""The table of results that the commands print, and lines that say how many pairs the figures come from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from drrho_clip.terminal.printing import Bold, print_cells, say

__all__ = ["print_table", "sample_sizes"]

_TITLES = {
    "retrieval_r1": "R@1",
    "retrieval_r5": "R@5",
    "retrieval_r10": "R@10",
    "retrieval_r1_full": "full",
    "zero_shot_accuracy": "zero-shot",
    "linear_probe_accuracy": "probe",
}


def print_table(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print rows of results.json as a table, with the best figure of every column in bold, and the sample sizes."""
    # A data set without classes has no zero-shot accuracy, so the column is left out.
    columns = [name for name in _TITLES if any(name in row["metrics"] for row in rows)]
    # If a single gallery holds all pairs, its R@1 is in the first column already.
    if all(_has_one_gallery(row["metrics"]) for row in rows):
        columns = [name for name in columns if name != "retrieval_r1_full"]
    best = {name: max(row["metrics"].get(name, 0.0) for row in rows) for name in columns}
    timed = any("seconds" in row for row in rows)
    titles = ["method", "data", "seed", *(_TITLES[name] for name in columns), *(["seen", "secs"] if timed else [])]
    table = []
    for row in rows:
        cells = [str(row[name]) for name in ("method", "dataset", "seed")]
        for name in columns:
            value = row["metrics"].get(name)
            bold = len(rows) > 1 and value == best[name]
            cells.append("" if value is None else Bold(f"{value:.3f}") if bold else f"{value:.3f}")
        if timed:
            cells += [f"{row['samples_seen']:,}", f"{row['seconds']:.1f}"]
        table.append(cells)
    print_cells(titles, table, left=3)
    # Rows of the same data have the same sample sizes, so a line is printed once.
    say(*dict.fromkeys(line for row in rows for line in sample_sizes(row["metrics"])))
    if len(rows) == 1 and "retrieval_r1_standard_error" in rows[0]["metrics"]:
        error = rows[0]["metrics"]["retrieval_r1_standard_error"]
        # The jackknife leaves out one image at a time. If R@1 is the same each time, the estimate is 0 and says nothing
        # about the error.
        known = f"{error:.3f}" if error > 0 else "not known, because R@1 is the same whichever image is left out"
        say(f"standard error of R@1: {known}")


def _has_one_gallery(metrics: Mapping[str, Any]) -> bool:
    # The queries are all images and all captions. Each pair has one caption, so the difference counts the images.
    num_images = metrics.get("num_queries", 0) - metrics.get("num_pairs", 0)
    return metrics.get("num_pairs") == metrics.get("num_pairs_full") and metrics.get("gallery_size") == num_images


def sample_sizes(metrics: Mapping[str, Any]) -> list[str]:
    r"""Return a line for each kind of figure that says how many pairs, queries and classes the figures come from.

    Parameters
    ----------
    metrics : mapping
        The metrics of a row of results.json. The rows of earlier versions have no sample sizes and give no line.

    Examples
    --------
    >>> sizes = {"num_pairs": 400, "num_queries": 800, "gallery_size": 200, "num_pairs_full": 450}
    >>> print(*sample_sizes(sizes), sep="\n")
    R@1, R@5, R@10: 400 pairs, 800 queries, galleries of 200 images
    full: R@1 in a single gallery of all 450 pairs
    >>> print(*sample_sizes({"num_pairs": 7, "num_queries": 14, "gallery_size": 7, "num_pairs_full": 7}), sep="\n")
    R@1, R@5, R@10: 7 pairs, 14 queries, galleries of 7 images
    in so small a gallery every model has R@10 of 1
    """
    lines = []
    if {"num_pairs", "num_queries", "gallery_size"} <= set(metrics):
        size = f"{metrics['num_pairs']:,} pairs, {metrics['num_queries']:,} queries"
        lines.append(f"R@1, R@5, R@10: {size}, galleries of {metrics['gallery_size']:,} images")
        # With one caption per image, the worst possible rank is the size of the gallery.
        certain = [f"R@{k}" for k in (5, 10) if k >= metrics["gallery_size"]]
        if certain and metrics["num_queries"] == 2 * metrics["num_pairs"]:
            lines.append(f"in so small a gallery every model has {' and '.join(certain)} of 1")
    if "num_pairs_full" in metrics and not _has_one_gallery(metrics):
        lines.append(f"full: R@1 in a single gallery of all {metrics['num_pairs_full']:,} pairs")
    if {"num_classes", "num_zero_shot_images"} <= set(metrics):
        lines.append(f"zero-shot: {metrics['num_zero_shot_images']:,} images, {metrics['num_classes']:,} classes")
    if "num_probe_test" in metrics:
        lines.append(
            f"linear probe: {metrics['num_probe_training']:,} images for training, {metrics['num_probe_test']:,} for "
            f"the test, {metrics['num_probe_classes']:,} classes, C = {metrics['linear_probe_strength']:g} chosen on a "
            "fifth of the training images"
        )
    return lines
