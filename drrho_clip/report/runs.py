"""Runs as the report of several runs shows them: names, figures, curves, settings, and the held-out pairs."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from drrho_clip.config import BUILT_IN_DATA
from drrho_clip.data import Dataset
from drrho_clip.data.splits import open_splits
from drrho_clip.errors import BadInput
from drrho_clip.report.style import LABELS, css_class
from drrho_clip.run import Run, open_run, read_metrics
from drrho_clip.run.data import open_run_data

__all__ = ["HeldOut", "ShownRun", "differing_settings", "grouped", "open_runs", "read_result"]

# The colours if several runs have the same method; a colour then says nothing about the method.
_KINDS = ("sogclr", "drrho", "other-1", "clip", "other-0", "reference", "other-2", "other-3")

# Rendering the training scenes takes long, and the held-out scenes do not depend on their number.
_FEW_SCENES = 2


@dataclass(frozen=True)
class ShownRun:
    """A run with everything that the report shows about it.

    Attributes
    ----------
    name : str
        The shortest end of the folder's path that no other run of the report has.
    kind : str
        The CSS class of the run's colour.
    run : Run
        Folder and settings.
    metrics : mapping of str to float
        The figures of results.json, or those that were measured on other data; empty for an unfinished run.
    samples_seen, seconds : float
        The numbers of results.json; nan for an unfinished run.
    status : str
        "finished", or how far the run is.
    records : sequence of mappings
        The lines of metrics.jsonl.
    """

    name: str
    kind: str
    run: Run
    metrics: Mapping[str, float]
    samples_seen: float
    seconds: float
    status: str
    records: Sequence[Mapping[str, Any]]

    @property
    def finished(self) -> bool:
        """True if the run has results."""
        return bool(self.metrics)

    def curve(self, figure: str) -> tuple[list[float], list[float]]:
        """Return the steps and the values of a figure of the log, without values that are not finite numbers."""
        points = [(_number(record.get("step")), _number(record.get(figure))) for record in self.records]
        known = [(x, y) for x, y in points if not math.isnan(x) and not math.isnan(y)]
        return [x for x, _ in known], [y for _, y in known]


@dataclass(frozen=True)
class HeldOut:
    """Runs whose figures can be compared, because they were measured on the same held-out pairs.

    Attributes
    ----------
    name : str
        The name of the data, as the settings of the first run write it.
    dataset : Dataset or None
        The held-out pairs, or None if they cannot be opened.
    reason : str
        The reason why they cannot be opened, or an empty text.
    runs : sequence of ShownRun
        The runs.
    """

    name: str
    dataset: Dataset | None
    reason: str
    runs: Sequence[ShownRun]


def open_runs(folders: Sequence[Path]) -> list[ShownRun]:
    """Read the runs in these folders; a folder that is named twice counts once.

    Raises
    ------
    BadInput
        If a folder holds no run, or a file in it is damaged.
    """
    different = list({folder.resolve(): folder for folder in reversed(folders)}.values())[::-1]
    runs = [open_run(folder) for folder in different]
    names = _names(different)
    kinds = _kinds([run.config.method for run in runs])
    shown = []
    for run, name, kind in zip(runs, names, kinds, strict=True):
        records = [record for record in read_metrics(run.metrics) if isinstance(record, Mapping)]
        status = _status(run)
        # The results of a run that goes on with more epochs are those of an earlier state.
        figures, samples_seen, seconds = read_result(run.results) if status == "finished" else ({}, math.nan, math.nan)
        shown.append(ShownRun(name, kind, run, figures, samples_seen, seconds, status, records))
    return shown


def _status(run: Run) -> str:
    """Return "finished", or "unfinished" and how far the run is."""
    if not run.checkpoint.is_file():
        return "finished" if run.results.is_file() else "unfinished, without a checkpoint"
    progress = run.progress()
    total = "" if progress.total is None else f" of {progress.total:,}"
    return "finished" if progress.finished else f"unfinished, step {progress.done:,}{total}"


def read_result(path: Path) -> tuple[dict[str, float], float, float]:
    """Return the figures, the samples seen and the seconds of a results.json with one row.

    Raises
    ------
    BadInput
        If the file is not such a file.
    """
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        row = rows[0]
        metrics = {str(name): value for name, value in row["metrics"].items()}
        samples_seen, seconds = float(row["samples_seen"]), float(row["seconds"])
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise BadInput(f"{path} must be the results of a run, got a damaged file ({type(error).__name__})") from None
    metrics = {name: value for name, value in metrics.items() if not math.isnan(_number(value))}
    if len(rows) != 1 or not metrics:
        raise BadInput(f"{path} must be the results of a run, got {len(rows)} rows and {len(metrics)} figures")
    return metrics, samples_seen, seconds


def grouped(runs: Sequence[ShownRun]) -> list[HeldOut]:
    """Divide runs into groups that were measured on the same held-out pairs, whatever their training pairs were.

    A run records the fingerprint of the test pairs. Runs of earlier versions have no record: their pairs are opened,
    and if that fails, pairs count as equal if the runs name the same data with the same fingerprint.
    """
    groups: dict[str, list[ShownRun]] = {}
    pairs_of_group: dict[str, tuple[Dataset | None, str]] = {}
    for shown in runs:
        recorded = shown.run.held_out.get("test")
        if recorded in groups:
            groups[recorded].append(shown)
            continue
        dataset, reason = _held_out(shown.run)
        config = shown.run.config
        opened = (
            f"{config.data} {config.data_seed} {shown.run.fingerprint}" if dataset is None else dataset.fingerprint()
        )
        key = opened if recorded is None else recorded
        groups.setdefault(key, []).append(shown)
        pairs_of_group.setdefault(key, (dataset, reason))
    return [HeldOut(members[0].run.config.data, *pairs_of_group[key], members) for key, members in groups.items()]


def _held_out(run: Run) -> tuple[Dataset | None, str]:
    """Return the test pairs of a run, or None and the reason why they cannot be opened."""
    try:
        if run.config.data in BUILT_IN_DATA:
            return open_splits(replace(run.config, train_size=_FEW_SCENES)).test, ""
        return open_run_data(run).test, ""
    except BadInput as error:
        return None, str(error)


def differing_settings(runs: Sequence[ShownRun]) -> tuple[list[tuple[str, list[str]]], list[tuple[str, str]]]:
    """Return the settings that differ, with one value per run, and the settings that all runs share."""
    settings = [shown.run.config.to_json() for shown in runs]
    differing, shared = [], []
    for name in settings[0]:
        values = [_in_words(setting[name]) for setting in settings]
        if len(set(values)) > 1:
            differing.append((name, values))
        else:
            shared.append((name, values[0]))
    return differing, shared


def _in_words(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _number(value: Any) -> float:
    """Return a value of a file as a number, or nan if the value is not a finite number."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and math.isfinite(value) else math.nan


def _names(folders: Sequence[Path]) -> list[str]:
    """Return, for each folder, the shortest end of the path that differs from the ends of all other paths."""
    parts = [folder.resolve().parts for folder in folders]
    names = []
    for own in parts:
        length = 1
        while sum(other[-length:] == own[-length:] for other in parts) > 1 and length < len(own):
            length += 1
        names.append("/".join(own[-length:]))
    return names


def _kinds(methods: Sequence[str]) -> list[str]:
    """Return a colour for each run: that of the method, if no two runs have the same method."""
    if len(set(methods)) == len(methods) and set(methods) <= set(LABELS):
        return [css_class(method) for method in methods]
    return [_KINDS[number % len(_KINDS)] for number in range(len(methods))]
