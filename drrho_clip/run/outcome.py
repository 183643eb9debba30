"""The result of a training run: the run, the trained model, and the row of results.json."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from drrho_clip.encode import Encoder
from drrho_clip.errors import BadInput
from drrho_clip.options import TEXT, number
from drrho_clip.run.folder import Run
from drrho_clip.terminal.safe_text import brief
from drrho_core.backend import Backend

_FIGURE = number(">= 0", lambda value: value >= 0)


class Outcome(NamedTuple):
    """The result of a training run.

    Attributes
    ----------
    run : Run
        Folder and description.
    encoder : Encoder
        The trained model, with the parameters of the best state; see `drrho_clip.trainer.Trainer.end_of_epoch`.
    row : dict
        The row of results.json, measured with `encoder`.
    """

    run: Run
    encoder: Encoder
    row: dict[str, Any]


def load_outcome(run: Run, backend: Backend) -> Outcome:
    """Read the result of a finished run.

    Raises
    ------
    BadInput
        If results.json or the checkpoint is missing or damaged.
    """
    try:
        rows = json.loads(run.results.read_text(encoding="utf-8"))
        row = dict(rows[0])
    except (OSError, ValueError, TypeError, LookupError, RecursionError) as error:
        raise BadInput(f"{run.results} must be the results of a run, got: {error}") from None
    _check_row(row, run.results)
    return Outcome(run, Encoder.load(run, backend), row)


def _check_row(row: Mapping[str, Any], file: Path) -> None:
    """Raise BadInput unless the entries that the commands print have the right types."""
    for name in ("method", "dataset"):
        TEXT.check(f"{file}: {name}", row.get(name))
    for name in ("samples_seen", "seconds"):
        _FIGURE.check(f"{file}: {name}", row.get(name))
    metrics = row.get("metrics")
    if not isinstance(metrics, Mapping):
        raise BadInput(f"{file}: metrics must be a JSON object, got {brief(metrics)}")
    for name, value in metrics.items():
        # A figure may be nan, for example the spread of a single value.
        if not isinstance(value, float) or not math.isnan(value):
            _FIGURE.check(f"{file}: {name}", value)
