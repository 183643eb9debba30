"""The harness runs on every backend, so its code, help, docstrings and data files name no framework."""

from __future__ import annotations

import re
from pathlib import Path

import drrho_clip

FOLDER = Path(drrho_clip.__file__).parent
FRAMEWORKS = re.compile(r"torch|jax|cupy|tensorflow|flax|optax", re.IGNORECASE)
SUFFIXES = {".py", ".json", ".html", ".css"}


def test_no_file_of_the_harness_names_a_framework() -> None:
    files = [path for path in sorted(FOLDER.rglob("*")) if path.suffix in SUFFIXES]
    assert len(files) > 30
    named = [
        f"{path.relative_to(FOLDER)}:{number}: {line.strip()}"
        for path in files
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if FRAMEWORKS.search(line)
    ]
    assert named == []
