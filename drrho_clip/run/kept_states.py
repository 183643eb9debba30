"""The states that a run keeps beside the last state: which they are, and their files.

The last checkpoint remembers the kept states and is written before their files. A file that is missing after a crash
can then be written again, because the last checkpoint is of the same step and has the same parameters.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from drrho_clip.errors import BadInput
from drrho_clip.files.checkpoint import load_arrays, save_arrays
from drrho_clip.run.folder import Run


class KeptStates:
    """The kept states of a run.

    Parameters
    ----------
    run : Run
        The run.
    writes : bool
        Write the files of the states; of several processes that train together, only the first writes.

    Attributes
    ----------
    figures : dict
        For each state, by name: the figures given to `add`, and the step.
    """

    def __init__(self, run: Run, *, writes: bool = True) -> None:
        self._run, self._writes = run, writes
        self.figures: dict[str, dict[str, Any]] = {}
        self._unwritten: set[str] = set()

    def add(self, name: str, figures: Mapping[str, Any], step: int) -> None:
        """Choose the current state; `write` will write the file."""
        # The figures pass through JSON, so that they equal the figures that a resumed run reads.
        self.figures[name] = json.loads(json.dumps({**figures, "step": step}))
        self._unwritten.add(name)

    def write(self, parameters: Mapping[str, np.ndarray]) -> None:
        """Write the files of the states that were chosen since the last call; `parameters` are the current ones."""
        for name in sorted(self._unwritten) if self._writes else ():
            arrays = {f"parameters/{parameter}": array for parameter, array in parameters.items()}
            save_arrays(self._run.state_file(name), "checkpoint", arrays, self.figures[name])
        self._unwritten.clear()

    def restore(
        self, remembered: Mapping[str, dict[str, Any]], parameters: Mapping[str, np.ndarray], step: int
    ) -> None:
        """Take over what the checkpoint of a step remembers, and write the files that a crash has prevented.

        Raises
        ------
        BadInput
            If the file of a state is damaged, or is missing although the checkpoint is of a later step.
        """
        missing = {name for name, figures in remembered.items() if not self._holds(name, figures)}
        for name in sorted(missing):
            if remembered[name]["step"] != step:
                raise BadInput(
                    f"{self._run.state_file(name)} must be the state of step {remembered[name]['step']}, which "
                    f"{self._run.checkpoint.name} names, got another file or none"
                )
        self.figures, self._unwritten = dict(remembered), missing
        self.write(parameters)

    def _holds(self, name: str, figures: Mapping[str, Any]) -> bool:
        """Return whether the file of a state is there and has the figures that the checkpoint remembers."""
        file = self._run.state_file(name)
        return file.exists() and load_arrays(file, "checkpoint")[1] == figures
