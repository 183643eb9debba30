"""The data of a run: where they are now, and whether their content is that of the run's start.

A run records the fingerprints of its three parts (training, validation and test pairs), which depend on the content
and not on paths. It also records where the files were. So a table may move, and another table under the old name is
refused.
"""

from __future__ import annotations

import filecmp
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from drrho_clip.config import BUILT_IN_DATA, TrainConfig
from drrho_clip.data import DataSplits, PairsDataset
from drrho_clip.data.sources import exists
from drrho_clip.data.splits import open_splits, open_table, swaps_captions, with_captions_of
from drrho_clip.encoders.naming import path_in
from drrho_clip.errors import BadInput
from drrho_clip.run.folder import Run

__all__ = [
    "PLACES",
    "data_are_there",
    "describe_data",
    "open_run_data",
    "open_whole_table",
    "place_of",
    "require_same_data",
    "tables_of",
    "with_places",
]

PLACES = ("data", "validation", "reference", "init", "model")
"""The settings that name files or folders. A run records where these were, because the meaning of a relative path
depends on the folder in which the command was started."""


def describe_data(run: Run, splits: DataSplits) -> Run:
    """Return a new run with the fingerprints of its validation and test pairs, and with the places of its files."""
    held_out = {part: getattr(splits, part).fingerprint() for part in ("validation", "test")}
    places = _places(run.folder, {name: getattr(run.config, name, None) for name in PLACES})
    return replace(run, held_out=held_out, places=places)


def tables_of(config: TrainConfig) -> dict[str, str | None]:
    """Return the values of the settings that name the data of a run."""
    return {name: getattr(config, name, None) for name in ("data", "validation")}


def with_places(run: Run, moved: Mapping[str, str | None]) -> Run:
    """Return a run that records new places of the named files."""
    return replace(run, places={**run.places, **_places(run.folder, moved)})


def open_run_data(run: Run, data: str | None = None, validation: str | None = None) -> DataSplits:
    """Open the data of a run, and check that their content is what it was when the run was started.

    Parameters
    ----------
    run : Run
        The run.
    data, validation : str, optional
        The places where the run's table and its separate validation table are now. By default the recorded places.

    Returns
    -------
    DataSplits
        Training, validation and test pairs.

    Raises
    ------
    BadInput
        If a file is missing or has other content, or if a recorded relative path could mean two different files.
    MissingExtra
        If a library that the data need is not installed.
    """
    given = {"data": data, "validation": validation}
    places: dict[str, Any] = {}
    for name, value in given.items():
        stored = getattr(run.config, name, None)
        if value is not None and (stored is None or {stored, value} & set(BUILT_IN_DATA)):
            if value != stored:
                raise BadInput(f"{name} must be that of the run to resume ({stored!r}), got {value!r}")
        elif stored is not None and stored not in BUILT_IN_DATA:
            places[name] = value or place_of(run, name)
    config = replace(run.config, **places)
    splits = open_splits(config)
    require_same_data(run, splits, config)
    return splits


def open_whole_table(run: Run, table: str | None = None) -> PairsDataset:
    """Read all pairs of a table, by default of the table of a run, whose content is checked as in `open_run_data`.

    The captions of the run's own table are those that the run was trained on, also if some of these were swapped.

    Raises
    ------
    BadInput
        For the reasons of `open_run_data`.
    MissingExtra
        If a library that the data need is not installed.
    """
    if table is None:
        splits = open_run_data(run)
        pairs = open_table(place_of(run, "data"), run.config)
        return with_captions_of(splits, pairs) if swaps_captions(pairs, run.config) else pairs
    pairs = open_table(table, run.config)
    if not swaps_captions(pairs, run.config):
        return pairs
    # The named table may be that of the run, at the same place or at another.
    validation = None if run.config.validation is None else place_of(run, "validation")
    splits = open_splits(replace(run.config, data=table, validation=validation))
    return with_captions_of(splits, pairs) if splits.train.fingerprint() == run.fingerprint else pairs


def require_same_data(run: Run, splits: DataSplits, config: TrainConfig | None = None) -> None:
    """Raise BadInput unless opened data have the fingerprints of a run; `config` names the places for the message."""
    place = (run.config if config is None else config).data
    for part, fingerprint in {"train": run.fingerprint, **run.held_out}.items():
        if getattr(splits, part).fingerprint() != fingerprint:
            name = "training" if part == "train" else part
            # Version 0.1 recorded paths and sizes of files, and divided the images in another way.
            hint = "" if run.held_out else ", or a run of version 0.1, which has to be trained again"
            raise BadInput(
                f"data must be what {run.folder} was trained on, got other content under {place!r} ({name} pairs){hint}"
            )


def data_are_there(run: Run) -> bool:
    """Return whether the files that hold the data of a run exist; built-in data always do."""
    values = {name: value for name, value in tables_of(run.config).items() if value and value not in BUILT_IN_DATA}
    return all(any(exists(path) for path in _candidates(run, name, value)) for name, value in values.items())


def _candidates(run: Run, name: str, typed: str) -> tuple[Path, ...]:
    """Return the paths at which a file may be: the first that exists is the right one."""
    recorded = run.places.get(name)
    # A run of an earlier version has recorded the typed path only.
    return (Path(typed),) if recorded is None else (Path(recorded["path"]), run.folder / recorded["from_run"])


def place_of(run: Run, name: str) -> str:
    """Return the place of a file or folder that a setting names, as a path that holds in the current folder.

    The path of the run's start comes first, then the same path relative to the run's folder, for a project that has
    moved as a whole.

    Raises
    ------
    BadInput
        If the file is not there, or if the current folder has another file under the relative path of the setting.
    """
    typed = str(getattr(run.config, name))
    if name not in run.places:
        return typed
    prefix, path = path_in(typed)
    candidates = _candidates(run, name, typed)
    place = next((path for path in candidates if exists(path)), None)
    if place is None:
        raise BadInput(
            f"{name} must be where {run.folder} has recorded it, got no {candidates[0]}; for a table that has moved, "
            f"say: drrho train --resume --data FILE --out {run.folder}"
        )
    here = Path(path or typed)
    # The user may mean the file in the current folder, so figures of the other file would be misunderstood.
    if not here.is_absolute() and exists(here) and not _same_content(here, place):
        raise BadInput(
            f"{name} must name one file, got {typed!r} of {run.folder}, which is {place}, while the current folder has "
            f"another {typed!r}"
        )
    return prefix + os.path.normpath(place)


def _same_content(here: Path, there: Path) -> bool:
    if os.path.abspath(here) == os.path.abspath(there) or (here.exists() and here.samefile(there)):
        return True
    return here.is_file() and there.is_file() and filecmp.cmp(here, there, shallow=False)


def _places(folder: Path, values: Mapping[str, str | None]) -> dict[str, Mapping[str, str]]:
    """Return, for each name of a file or folder, the absolute path and the path relative to the run's folder."""
    typed = {name: path_in(value)[1] for name, value in values.items() if value and value not in BUILT_IN_DATA}
    # The name of a model that is no path means the same in every folder.
    paths = {name: os.path.abspath(path) for name, path in typed.items() if path is not None}
    start = os.path.abspath(folder)
    return {name: {"path": path, "from_run": os.path.relpath(path, start)} for name, path in paths.items()}
