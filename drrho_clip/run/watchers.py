"""Programs that show the figures of a run while it trains: TensorBoard, and Weights & Biases if it is installed.

Both get the lines of metrics.jsonl, which stays the record of the run. TensorBoard reads event files, which this module
writes with the package `tensorboard` alone.
"""

from __future__ import annotations

import importlib
import numbers
import time
from collections.abc import Mapping
from typing import Any, Protocol

from drrho_clip.errors import BadInput, MissingExtra
from drrho_clip.run.folder import Run

__all__ = ["EventFiles", "Project", "Watcher", "open_watchers", "require_watchers"]

# Entries of a line of metrics.jsonl that say where the run is; all other numbers are figures.
_PLACE = ("step",)


class Watcher(Protocol):
    """A program that shows figures."""

    def log(self, record: Mapping[str, Any]) -> None:
        """Take a line of metrics.jsonl."""
        ...

    def close(self) -> None:
        """Write what is still in memory."""
        ...


def open_watchers(run: Run, *, step: int) -> list[Watcher]:
    """Return the watchers that the settings of a run name; `step` is the number of steps that are done.

    Raises
    ------
    BadInput
        If Weights & Biases cannot be used.
    MissingExtra
        If a library is not installed.
    """
    watchers: list[Watcher] = []
    if run.config.tensorboard:
        watchers.append(EventFiles(run, step=step))
    if run.config.wandb is not None:
        watchers.append(Project(run))
    return watchers


def require_watchers(run: Run) -> None:
    """Raise MissingExtra or BadInput if a library for the watchers of a run is missing; nothing is written."""
    if run.config.tensorboard:
        _tensorboard()
    if run.config.wandb is not None:
        _wandb()


class EventFiles:
    """Event files for TensorBoard, in the folder ``tensorboard`` of a run.

    Parameters
    ----------
    run : Run
        The run.
    step : int
        Number of steps that are done. TensorBoard then forgets the figures of later steps, which a run that was killed
        has written and takes again.
    """

    def __init__(self, run: Run, *, step: int) -> None:
        writer, self._protocol = _tensorboard()
        self._writer = writer(str(run.folder / "tensorboard"))
        event, _ = self._protocol
        start = event.SessionLog(status=event.SessionLog.START)
        self._writer.add_event(event.Event(wall_time=time.time(), step=step, session_log=start))

    def log(self, record: Mapping[str, Any]) -> None:
        """Write the figures of a line."""
        event, summary = self._protocol
        values = [
            summary.Summary.Value(tag=name, simple_value=float(value)) for name, value in _figures(record).items()
        ]
        content = summary.Summary(value=values)
        self._writer.add_event(event.Event(wall_time=time.time(), step=record["step"], summary=content))

    def close(self) -> None:
        """Write what is still in memory, and close the file."""
        self._writer.close()


class Project:
    """A run of Weights & Biases in the project that the setting `wandb` names.

    The name of the folder and the fingerprint of the data give the id, so a resumed run continues the same page.
    """

    def __init__(self, run: Run) -> None:
        wandb = _wandb()
        config = run.config.to_json()
        identity = f"{run.folder.resolve().name}-{run.fingerprint[:8]}-{config['method']}-{config['seed']}"
        try:
            self._run = wandb.init(
                project=run.config.wandb,
                name=run.folder.name,
                id=identity,
                resume="allow",
                dir=str(run.folder),
                config=config,
            )
        # Any error of this service, such as a missing login, would otherwise be a traceback after hours of waiting.
        except Exception as error:
            raise BadInput(f"wandb must be a project that can be opened, got {run.config.wandb!r}: {error}") from error

    def log(self, record: Mapping[str, Any]) -> None:
        """Send the figures of a line."""
        self._run.log(_figures(record), step=record["step"])

    def close(self) -> None:
        """Send what is still in memory."""
        self._run.finish()


def _figures(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the figures of a line; a line may also hold text, such as the name of an unreadable image."""
    return {name: value for name, value in record.items() if name not in _PLACE and isinstance(value, numbers.Real)}


def _tensorboard() -> tuple[Any, tuple[Any, Any]]:
    """Return the writer of event files, and the modules of events and of summaries."""
    try:
        files = importlib.import_module("tensorboard.summary.writer.event_file_writer")
        event, summary = (
            importlib.import_module(f"tensorboard.compat.proto.{name}_pb2") for name in ("event", "summary")
        )
    except ImportError as error:
        raise MissingExtra("the setting tensorboard", "TensorBoard", "tensorboard") from error
    return files.EventFileWriter, (event, summary)


def _wandb() -> Any:
    try:
        return importlib.import_module("wandb")
    except ImportError as error:
        raise BadInput("wandb must be left out unless wandb is installed (pip install wandb), got none") from error
