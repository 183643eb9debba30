"""The JSON state of a run's checkpoint: how far the run is. The checksum cannot tell whether the values make sense."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from drrho_clip.errors import BadInput
from drrho_clip.options import FLAG, at_least, number
from drrho_clip.terminal.safe_text import brief

__all__ = ["BIAS", "TEMPERATURE", "check_state"]

_STEP = at_least(0, most=2**63 - 1)
TEMPERATURE = number("> 0", lambda value: value > 0)
"""Rule of the learned temperature that the file of a state has beside the parameters."""
BIAS = number("a finite number", lambda _: True)
"""Rule of the learned bias of the method siglip, which the file of a state has beside the parameters."""
_RULES = {
    "step": _STEP,
    "seconds": number(">= 0", lambda value: value >= 0),
    "total": _STEP,
    "epochs": at_least(1),
    "finished": FLAG,
    "stopped": FLAG,
    "temperature": TEMPERATURE,
    "bias": BIAS,
}
# Version 0.1 wrote only these two.
_REQUIRED = ("step", "seconds")


def check_state(state: Mapping[str, Any], file: Path) -> None:
    """Raise BadInput unless the state of a checkpoint has sensible values; the message names the file.

    Examples
    --------
    >>> check_state({"step": -1, "seconds": 2.5}, Path("run/checkpoint.safetensors"))
    Traceback (most recent call last):
        ...
    drrho_clip.errors.BadInput: run/checkpoint.safetensors: step must be an integer of at least 0, got -1
    """
    for name, rule in _RULES.items():
        if name in state or name in _REQUIRED:
            rule.check(f"{file}: {name}", state.get(name))
    if state["step"] > state.get("total", state["step"]):
        raise BadInput(f"{file}: step must be at most total, {state['total']}, got {state['step']}")
    kept = state.get("kept", {})
    if not isinstance(kept, Mapping):
        raise BadInput(f"{file}: kept must be a JSON object, got {brief(kept)}")
    for name, figures in kept.items():
        # The name of a kept state becomes part of the name of a file, so it must not lead to another folder.
        if not name.isidentifier() or not isinstance(figures, Mapping):
            raise BadInput(f"{file}: kept must have an object of figures for each name, got {brief({name: figures})}")
        _STEP.check(f"{file}: step of the state {name}", figures.get("step"))
