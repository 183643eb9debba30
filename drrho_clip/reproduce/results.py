"""The files of results: one line of JSON per row, appended as soon as the experiment is over, and no hash twice."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeAlias

from drrho_clip.errors import BadInput
from drrho_clip.files.disk import naming
from drrho_clip.files.json_files import parse_json
from drrho_clip.reproduce.experiment import Experiment, Settings

__all__ = ["Metrics", "Results", "Row", "Rows", "read_rows"]

Metrics: TypeAlias = "Mapping[str, float | list[float]]"
"""Figures by name; a list has one figure per epoch."""


@dataclass(frozen=True)
class Row:
    """The result of an experiment: the fields of `Experiment`, then hash, figures and origin.

    Parameters
    ----------
    config_hash : str
        `Experiment.config_hash`.
    metrics : mapping
        Figures by name; a list has one figure per epoch.
    seconds : float
        Time that the measurement took, without the training of the reference model.
    machine : str
        Kind of machine, system and number of cores; no name of a host.
    versions : mapping
        Versions of the libraries by name.
    commit : str
        The commit of this library, with "+" behind it if files had changed; "unknown" outside a clone.
    """

    claim: str
    task: str
    method: str
    reference: str | None
    dataset: str
    seed: int
    quick: bool
    label: str
    backend: str
    settings: Settings
    config_hash: str
    metrics: Metrics
    seconds: float
    machine: str
    versions: Mapping[str, str]
    commit: str
    scale: int = 1

    @property
    def experiment(self) -> Experiment:
        """The experiment whose result this row is."""
        # A row has all fields of the experiment under the same names.
        names = [option.name for option in fields(Experiment)]
        return Experiment(**{name: getattr(self, name) for name in names})

    @property
    def diverged(self) -> bool:
        """Whether the training diverged; zeros then stand in place of the figures of the model."""
        return "diverged" in self.metrics

    def figure(self, name: str) -> float:
        """Return a figure that is a single number."""
        value = self.metrics[name]
        assert not isinstance(value, list)
        return value

    def curve(self, name: str) -> list[float]:
        """Return a figure that has one number per epoch."""
        values = self.metrics[name]
        assert isinstance(values, list)
        return values


Rows: TypeAlias = "Mapping[str, Row]"
"""Rows by the hash of their experiment."""


class Results:
    """The files CLAIM.jsonl in a folder.

    Parameters
    ----------
    folder : Path
        The folder; it is made at the first row.
    quick : bool
        The rows are those of quick experiments, which never share a folder with others.
    scale : int
        The rows are those of experiments of this scale, which never share a folder with those of another scale.

    Attributes
    ----------
    is_quick : bool
        The rows are those of quick experiments.
    scale : int
        The scale of all rows.
    rows : dict
        The rows of all files by hash, in the order of the files.

    Raises
    ------
    BadInput
        If a file is damaged, or if the folder has rows of the other kind.
    """

    def __init__(self, folder: Path, *, quick: bool, scale: int = 1) -> None:
        self.folder, self.is_quick, self.scale = folder, quick, scale
        self.rows: dict[str, Row] = {}
        for path in sorted(folder.glob("*.jsonl")):
            for row in read_rows(path):
                if row.quick != quick:
                    kind = "without --quick" if quick else "of --quick"
                    raise BadInput(f"out must be a folder of its own, got {folder}, which has results {kind}")
                if row.scale != scale:
                    raise BadInput(
                        f"out must be a folder of its own, got {folder}, which has results of --scale {row.scale}"
                    )
                self.rows[row.config_hash] = row

    def append(self, row: Row) -> None:
        """Write a row behind the others, unless a row with the same hash is there."""
        if row.config_hash in self.rows:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{row.claim}.jsonl"
        with naming(path), path.open("ab+") as file:
            # A process that was killed may have left a part of a line, which the next row would continue.
            _drop_torn_line(file)
            file.write((json.dumps(asdict(row), allow_nan=False) + "\n").encode())
            file.flush()
            # After a power failure the experiment would have to run again.
            os.fsync(file.fileno())
        self.rows[row.config_hash] = row

    def of(self, claim: str) -> list[Row]:
        """Return all rows of a claim, those of former plans included."""
        return [row for row in self.rows.values() if row.claim == claim]


def read_rows(path: Path) -> list[Row]:
    """Read a file of results; a last line that was not written to its end is left out.

    Raises
    ------
    BadInput
        If a line is no row, if a hash does not belong to its row, or if a hash comes twice.
    """
    with naming(path):
        # Behind the last line break there is nothing, or a line that a killed process did not finish.
        *lines, _ = path.read_bytes().split(b"\n")
    rows: dict[str, Row] = {}
    for number, line in enumerate(lines, start=1):
        try:
            row = Row(**parse_json(line))
            sound = row.experiment.config_hash() == row.config_hash
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise BadInput(f"{path} must have one row per line, got in line {number}: {error}") from None
        # A figure that was moved to other settings by hand would otherwise count.
        if not sound or row.config_hash in rows:
            flaw = "a hash that does not belong to the row" if not sound else "a hash for the second time"
            raise BadInput(f"{path} must have one row per experiment, got in line {number} {flaw}")
        rows[row.config_hash] = row
    return list(rows.values())


def _drop_torn_line(file: Any) -> None:
    file.seek(0)
    content = file.read()
    file.truncate(content.rfind(b"\n") + 1)
