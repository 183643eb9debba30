"""Import the benchmark that ``drrho bench`` runs: it is in the repository but not in the installed package."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from drrho_clip.errors import BadInput

__all__ = ["contrastive_benchmark"]

_NEEDED = Path("benchmarks") / "contrastive" / "command.py"


def contrastive_benchmark(folders: Sequence[Path] | None = None) -> Any:
    """Return the module `benchmarks.contrastive.command` of a clone of the repository.

    Parameters
    ----------
    folders : sequence of Path, optional
        Folders to search, in this order. By default they are the folder that holds this package and the current folder.

    Returns
    -------
    module
        The module, which has the function ``measure_and_write``.

    Raises
    ------
    BadInput
        If none of the folders is a clone.
    """
    looked_in = [Path(__file__).resolve().parents[1], Path.cwd()] if folders is None else folders
    for folder in looked_in:
        if (folder / _NEEDED).is_file():
            # The folder goes to the front of the path, because an installed package may also be called "benchmarks".
            if str(folder) not in sys.path:
                sys.path.insert(0, str(folder))
            return importlib.import_module("benchmarks.contrastive.command")
    places = " or ".join(dict.fromkeys(map(str, looked_in)))
    raise BadInput(
        f"drrho bench needs a clone of the repository: run it there, got no {_NEEDED.as_posix()} in {places}"
    )
