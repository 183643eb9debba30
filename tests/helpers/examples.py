"""Examples that change a training loop: load them, and count the lines that the change takes."""

from __future__ import annotations

import runpy
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def load(path: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Return the names of an example, which may import the modules beside it."""
    file = EXAMPLES / path
    monkeypatch.syspath_prepend(str(file.parent))
    return runpy.run_path(str(file))


def changed_lines(before: str, after: str) -> int:
    """Return how many lines must be replaced, inserted or deleted; the first line, which names the file, is free."""
    old, new = ((EXAMPLES / path).read_text(encoding="utf-8").splitlines()[1:] for path in (before, after))
    blocks = SequenceMatcher(a=old, b=new, autojunk=False).get_opcodes()
    return sum(max(a2 - a1, b2 - b1) for kind, a1, a2, b1, b2 in blocks if kind != "equal")
