"""The English of the house: names are nouns of the field, and phrases that strangers had to read twice stay away."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ["drrho_core", "drrho_clip", "backends", "reference_impl/drrho_reference"]
NOT_NOUNS = {"its", "some", "told", "found", "wanted", "one", "both"}
"""Names of variables that say nothing about the value they hold."""

BETTER = {
    r"\bg[ia]ve[ns]? back\b": "return",
    r"\bnever what\b": "not the result",
    r"\btold nothing\b": "skipped",
    r"\bis no question\b": "is skipped",
    r"\bmeans nothing\b": "do not monitor it",
    r"\bmeet[s]? (?:it|them|tiles|the tiles)\b": "read",
    r"\bare met in\b": "are read in",
    r"\bas far as a look\b": "if values are visible",
    r"\blook(?:ing)? is free\b": "values are visible",
}
"""Phrases as regular expressions, and a plain phrase instead."""


def python_files(folders: list[str]) -> list[Path]:
    """Python files below some folders of the repository."""
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def names_bound(tree: ast.AST) -> set[tuple[str, int]]:
    """All names that a file binds to a value, as variables or as parameters, with their lines."""
    variables = {(n.id, n.lineno) for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    return variables | {(n.arg, n.lineno) for n in ast.walk(tree) if isinstance(n, ast.arg)}


@pytest.mark.parametrize("package", PACKAGES)
def test_variables_are_nouns(package: str) -> None:
    unclear = [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for path in python_files([package])
        for name, line in sorted(names_bound(ast.parse(path.read_text(encoding="utf-8"))), key=lambda bound: bound[1])
        if name.lstrip("_") in NOT_NOUNS
    ]
    assert unclear == []


def test_phrases_are_plain() -> None:
    pages = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *ROOT.glob("*/README.md")])
    files = [*pages, *python_files([*PACKAGES, "examples", "benchmarks", "tools"])]
    unclear = [
        f"{path.relative_to(ROOT)}:{number}: {match[0]!r}; better: {better!r}"
        for path in files
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        for phrase, better in BETTER.items()
        for match in re.finditer(phrase, line, re.IGNORECASE)
    ]
    assert unclear == []
