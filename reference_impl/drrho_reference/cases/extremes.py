"""Problems whose exponentials leave the range of float64; ``extremes.json`` holds the inputs and the answers.

``reference_impl/recipes/extremes.py`` computed the answers with mpmath.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from drrho_reference.cases.problem import Draw, Problem, SetOf, Stored

FILE = Path(__file__).with_name("extremes.json")


def _number(value: Any) -> Any:
    # JSON has no infinity, so the file has the string "-inf", which float() reads.
    return [_number(part) for part in value] if isinstance(value, list) else float(value)


def _argument(value: Any) -> Any:
    if isinstance(value, dict):
        return SetOf(value["set"], value["parameters"]) if "set" in value else np.array(_number(value["array"]))
    return value


def _field(name: str, value: Any) -> Any:
    if name == "dual":
        return tuple(map(np.array, value))
    return np.array(value, dtype=np.int64 if name == "index" else np.float64)


def _always(arguments: tuple[Any, ...]) -> Draw:
    return lambda _: arguments


def _read(entry: dict[str, Any]) -> Problem:
    """Return the problem of one entry of the file."""
    arguments = tuple(map(_argument, entry["positional"])), entry["options"]
    stored = Stored(
        {name: _field(name, value) for name, value in entry["expected"].items()},
        {name: _field(name, value) for name, value in entry["scales"].items()} if "scales" in entry else None,
    )
    rows = tuple(entry["rows"])
    return Problem(entry["function"], entry["name"], entry["sentence"], _always(arguments), rows, stored)


# The file is read once, when the kit is imported.
PROBLEMS = [_read(entry) for entry in json.loads(FILE.read_text(encoding="utf-8"))]
