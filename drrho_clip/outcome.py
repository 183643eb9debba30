"""The result of a training run: the run, the trained model, and the row of results.json."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from drrho_clip.encode import Encoder
from drrho_clip.errors import BadInput
from drrho_clip.run import Run
from drrho_core.backend import Backend


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
    except (OSError, ValueError, TypeError, LookupError) as error:
        raise BadInput(f"{run.results} must be the results of a run, got: {error}") from None
    return Outcome(run, Encoder.load(run, backend), row)
