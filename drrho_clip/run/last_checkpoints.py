"""The last checkpoints of a run, beside checkpoint.safetensors, if the setting `keep_last` is above 1."""

from __future__ import annotations

import os
import re
from pathlib import Path

from drrho_clip.files.disk import naming, temporary_path, write_atomic
from drrho_clip.run.folder import Run

__all__ = ["keep_last", "last_checkpoints"]


def last_checkpoints(run: Run) -> dict[int, Path]:
    """Return the files of earlier checkpoints by step, the earliest first; `Run.load_parameters("stepN")` reads one."""
    names = {path: re.fullmatch(r"checkpoint-step(\d+)\.safetensors", path.name) for path in run.folder.iterdir()}
    return dict(sorted((int(match[1]), path) for path, match in names.items() if match is not None))


def keep_last(run: Run, step: int) -> None:
    """Give the checkpoint that was just written a second name with the step, and remove all but the last ones.

    Parameters
    ----------
    run : Run
        The run.
    step : int
        The step of the checkpoint.
    """
    if run.config.keep_last > 1:
        _name_again(run.checkpoint, run.state_file(f"step{step}"))
    # The last checkpoint has both names, so `keep_last` files have a step in the name.
    kept = {number: path for number, path in last_checkpoints(run).items() if number <= step}
    gone = [path for path in last_checkpoints(run).values() if path not in list(kept.values())[-run.config.keep_last :]]
    for path in gone if run.config.keep_last > 1 else ():
        path.unlink()


def _name_again(path: Path, name: Path) -> None:
    """Let a second name stand for a file; the content is copied if the file system has no second names."""
    temporary = temporary_path(name)
    with naming(name):
        temporary.unlink(missing_ok=True)
        try:
            # The checkpoint is never written in place, so the second name keeps the content of this step.
            os.link(path, temporary)
        except OSError:
            write_atomic(name, path.read_bytes())
        else:
            os.replace(temporary, name)
