"""An experiment, and the hash of all that determines the result of an experiment."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Final, TypeAlias

from drrho_core.backend import default_backend

__all__ = ["CHOICE_SEED", "LEARNING_RATES", "Experiment", "Settings"]

Settings: TypeAlias = "Mapping[str, Any]"
"""Settings that JSON can hold; groups of settings are nested."""

CHOICE_SEED: Final = 100
"""The seed on which learning rates are chosen; the seeds of the claims are 0, 1, 2 and so on."""

LEARNING_RATES: Final = "learning-rates"
"""The word in place of a claim's name in the trials of learning rates, because all claims share these rows."""

# A change of the code that changes results gets another number, so that old rows are measured again.
_FORMAT: Final = 1


@dataclass(frozen=True)
class Experiment:
    """One training or one measurement with one seed.

    Parameters
    ----------
    claim : str
        Name of the claim, or `LEARNING_RATES`.
    task : str
        The task that is done: a key of `drrho_clip.reproduce.tasks.TASKS`.
    dataset : str
        Name of the world.
    method : str
        A method of `drrho train`, or "reference" for a reference model, or any name that the task knows.
    reference : str or None
        Name of the reference model in the world.
    seed : int
        Seed of data, initial parameters and order of the batches.
    settings : mapping
        All other values that determine the result, defaults of the world included, and no path.
    quick : bool
        The experiment is a small form of the real experiment, without a meaning for the claim.
    label : str
        The name of the settings with which a claim differs from the world, such as "share 0.5"; empty without any.
    scale : int
        How many times as large models and batches are as those of the claim; see `World.scaled`.
    backend : str
        The array library, by default the preferred library of those installed. Two libraries round differently, so
        a row of a library does not stand for another library.

    Examples
    --------
    >>> first = Experiment("variance", "variance", "scenes-30", "drrho", "weak", 0, {"a": 1, "b": 2}, quick=True)
    >>> again = Experiment("variance", "variance", "scenes-30", "drrho", "weak", 0, {"b": 2, "a": 1}, quick=True)
    >>> first.config_hash() == again.config_hash(), len(first.config_hash())
    (True, 64)
    """

    claim: str
    task: str
    dataset: str
    method: str
    reference: str | None
    seed: int
    settings: Settings
    quick: bool
    label: str = ""
    scale: int = 1
    # The search for installed libraries takes ten milliseconds, and a plan has hundreds of experiments.
    backend: str = field(default_factory=functools.cache(default_backend))

    def config_hash(self) -> str:
        """Return the SHA-256 of the canonical JSON of this experiment, in hex."""
        # `asdict` would copy all settings, which takes ten times as long, and a plan needs many hashes.
        content = {each.name: getattr(self, each.name) for each in fields(Experiment)}
        # Rows that were measured before there was a scale keep their hash.
        if self.scale == 1:
            del content["scale"]
        return _hash({"format": _FORMAT, **content})

    def reference_hash(self) -> str | None:
        """Return the hash of the reference model that the experiment needs, or None if none is needed.

        Experiments of several claims that need the same reference model have the same hash here.
        """
        if self.settings.get("reference") is None:
            return None
        parts = {name: getattr(self, name) for name in ("dataset", "seed", "quick", "backend")}
        return _hash({"format": _FORMAT, "reference": self.settings["reference"], **parts})


def _hash(content: Mapping[str, Any]) -> str:
    # Sorted names and fixed separators give one text for equal content, whatever the order in which it was built.
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()
