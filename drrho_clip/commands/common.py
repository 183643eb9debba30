"""Parts of several commands: the option ``--device``, opening a backend, a file of results."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from drrho_clip.config import TrainConfig
from drrho_clip.errors import BadInput
from drrho_clip.files import outputs
from drrho_clip.options import FLAG, TEXT, setting, setting_of
from drrho_clip.terminal.printing import say
from drrho_core.backend import Backend, get_backend

if TYPE_CHECKING:
    from drrho_clip.data import Dataset
    from drrho_clip.processes.place import Place

__all__ = [
    "allow_unfinished_option",
    "build_backend",
    "check_new_file",
    "check_page",
    "device_option",
    "max_unreadable_option",
    "say_unreadable",
    "train_setting",
    "write_json",
]


# Number of unreadable images that are named.
_NAMED = 10


def device_option() -> Any:
    """Return the field of the option ``--device``."""
    return setting(
        None,
        rule=TEXT,
        shown="a GPU if the array library can use one, otherwise the CPU",
        help="Device, by the name that the array library gives it, such as cpu or cuda:0.",
    )


def allow_unfinished_option(subject: str) -> Any:
    """Return the field of the option ``--allow-unfinished``; `subject` names the run in the help."""
    return setting(False, rule=FLAG, help=f"{subject} need not be finished.")


def max_unreadable_option() -> Any:
    """Return the field of the option ``--max-unreadable`` of the commands that do not train."""
    option = train_setting("max_unreadable")
    return setting(
        None,
        rule=setting_of(option).rule,
        shown=f"that of the run, else {option.default}",
        help="Largest share of the images that may be unreadable. These images are named and left out.",
    )


def say_unreadable(dataset: Dataset, outcome: str = "left out") -> None:
    """Print to standard error how many pairs have an image that could not be read, and name the first ten images."""
    reasons: Mapping[int, str] = getattr(dataset, "unreadable", {})
    if reasons:
        from drrho_clip.data.unreadable import readable_rows

        # An unreadable image may belong to several pairs.
        pairs = f"{len(dataset) - len(readable_rows(dataset)):,} of {len(dataset):,} pairs"
        lines = [f"warning: {reasons[row]}" for row in sorted(reasons)[:_NAMED]]
        say(*lines, f"warning: the images of {pairs} cannot be read; they are {outcome}", stream=sys.stderr)


def train_setting(name: str) -> Any:
    """Return a field like that of a setting of training, with the same default, rule and help."""
    (option,) = (option for option in fields(TrainConfig) if option.name == name)
    return field(default=option.default, metadata=option.metadata)


def build_backend(name: str, device: str | None, dtype: str, place: Place | None = None) -> Backend:
    """Open a backend; raise BadInput if backend, device or dtype is unknown or not installed.

    `place` is the place of this process among all processes, if there are several.
    """
    if place is not None:
        # Not before, because the import takes time.
        from drrho_clip.processes.opening import connect

        connect(name, place)
    try:
        return get_backend(name, device=device, dtype=dtype)
    except (ValueError, ImportError) as error:
        raise BadInput(str(error)) from error


def write_json(path: Path | None, content: Sequence[Mapping[str, Any]] | Mapping[str, Any]) -> None:
    """Write results to a JSON file; do nothing if `path` is None."""
    if path is not None:
        outputs.write_json(path, content)


def check_new_file(name: str, path: Path | None, *others: str | Path | None, run: Path | None = None) -> None:
    """Raise BadInput if a file of results cannot be written, or would replace a file that the command needs.

    Parameters
    ----------
    name : str
        The option, for the message.
    path : Path or None
        The file; None is accepted.
    *others : str, Path or None
        Files that the command reads, or other files that it writes.
    run : Path, optional
        Folder of the run that the command writes. The names of the files of a run are refused there, even if the folder
        is still missing, and in every folder that holds a run.
    """
    outputs.check_file(path, name)
    if path is None:
        return
    # A slip such as `--data pairs.csv --out pairs.csv` would cost the table.
    for other in others:
        if other is not None and os.path.realpath(other) == os.path.realpath(path):
            raise BadInput(
                f"{name} must be a file of its own, got {path}, which the command also uses for another purpose"
            )
    from drrho_clip.run import is_name_in_run

    in_run = run is not None and os.path.realpath(run) == os.path.realpath(path.parent)
    if is_name_in_run(path.name) and (in_run or (path.parent / "config.json").exists()):
        raise BadInput(f"{name} must be a file of its own, got {path}, which is a file of a run")


def check_page(name: str, path: Path | None) -> None:
    """Raise BadInput if a page cannot be written to `path`; the suffix protects other files from a slip of the hand."""
    if path is None:
        return
    if path.suffix.lower() not in (".html", ".htm"):
        raise BadInput(f"{name} must be a file that ends in .html, got {path}")
    outputs.check_file(path, name)
