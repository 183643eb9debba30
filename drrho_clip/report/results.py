"""The rows of results.json, gathered by method, and the headline that sums them up."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from drrho_clip.errors import BadInput
from drrho_clip.report.style import css_class, label, ordered, percent
from drrho_core.checks import describe

__all__ = ["METRICS", "Headline", "MethodResults", "by_method", "headline", "seeds_of"]

METRICS = {
    "retrieval_r1": "R@1",
    "retrieval_r5": "R@5",
    "retrieval_r10": "R@10",
    "zero_shot_accuracy": "Zero-shot",
}
"""Names of the metrics in results.json and in the report's tables."""


@dataclass(frozen=True)
class MethodResults:
    """One method's rows of results.json: each field has one value per seed."""

    method: str
    dataset: str
    seeds: list[str]
    metrics: dict[str, list[float]]
    samples_seen: list[float]
    seconds: list[float]

    def mean(self, metric: str) -> float:
        """Return the mean of a metric over the seeds, or nan if no seed has this metric."""
        values = self.metrics[metric]
        return math.fsum(values) / len(values) if values else math.nan


@dataclass(frozen=True)
class Headline:
    """The sentence at the top of the page: the text `before`, then `figure` in bold, then the text `after`.

    `kind` is the CSS class of the best method, or empty if several methods are equally good.
    """

    before: str
    figure: str = ""
    after: str = ""
    kind: str = ""


def by_method(rows: Sequence[Mapping[str, Any]]) -> list[MethodResults]:
    """Check the rows of results.json and gather them by method; `ordered` gives the order of the methods.

    Raises
    ------
    BadInput
        If there are no rows, a row has no method or no metrics, or the rows are of several data sets.
    """
    if not rows:
        raise BadInput("results must hold at least one row, got none")
    # Another program may have written results.json, so every row is checked before it is used.
    for row in rows:
        if not isinstance(row, Mapping) or not isinstance(row.get("method"), str):
            raise BadInput(f"results must be mappings with a str under 'method', got {describe(row)}")
        if not isinstance(row.get("metrics"), Mapping):
            raise BadInput(f"results must have a mapping under 'metrics', got {describe(row.get('metrics'))}")
    datasets = sorted({str(row.get("dataset", "")) for row in rows})
    if len(datasets) > 1:
        raise BadInput(f"results must be of one dataset, got {', '.join(datasets)}")

    # Each method gets one object. If a method lacks a metric, the list of that metric is empty.
    results = []
    for method in ordered(row["method"] for row in rows):
        rows_of_method = [row for row in rows if row["method"] == method]
        results.append(
            MethodResults(
                method=method,
                dataset=datasets[0],
                seeds=[str(row.get("seed", "")) for row in rows_of_method],
                metrics={name: _finite(row["metrics"].get(name) for row in rows_of_method) for name in METRICS},
                samples_seen=_finite(row.get("samples_seen") for row in rows_of_method),
                seconds=_finite(row.get("seconds") for row in rows_of_method),
            )
        )
    return results


def seeds_of(results: Sequence[MethodResults]) -> list[str]:
    """Return every seed once, in the order of the rows."""
    return list(dict.fromkeys(seed for method in results for seed in method.seeds))


def headline(results: Sequence[MethodResults]) -> Headline:
    """Return the sentence that names the best method at R@1 and lists the R@1 of all methods."""
    known = sorted((r for r in results if r.metrics["retrieval_r1"]), key=lambda r: -r.mean("retrieval_r1"))
    if not known:
        return Headline("No retrieval was measured.")
    # Methods whose percentages look equal on the page share the first place.
    best = percent(known[0].mean("retrieval_r1"))
    leaders = [_in_a_sentence(r) for r in results if percent(r.mean("retrieval_r1")) == best]
    # The other methods follow in the order of their figures.
    followers = [f"{_in_a_sentence(r)} ({percent(r.mean('retrieval_r1'))})" for r in known[len(leaders) :]]
    names = _listed(leaders)
    verb = "puts" if len(leaders) == 1 else "put"
    return Headline(
        before=f"{names[0].upper()}{names[1:]} {verb} the right partner first in ",
        figure=best,
        after=f" of the searches{f', ahead of {_listed(followers)}' if followers else ''}.",
        kind=css_class(known[0].method) if len(leaders) == 1 else "",
    )


def _finite(values: Iterable[Any]) -> list[float]:
    """Return the values that are finite numbers."""
    return [float(value) for value in values if value is not None and math.isfinite(value)]


def _in_a_sentence(result: MethodResults) -> str:
    return "the reference model" if result.method == "reference" else label(result.method)


def _listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
