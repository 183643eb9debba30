"""The code can be read: files are short, and comments say what the mathematics does."""

from __future__ import annotations

import ast
import io
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = {
    "drrho_core": ["drrho_core"],
    "drrho_clip": ["drrho_clip"],
    "the backends": ["backends"],
    "the oracle": ["reference_impl/drrho_reference"],
}
LONGEST = 520
"""Lines of the longest file that is allowed. From 400 lines on, a file probably holds two ideas."""
COMMENTS = 5.0
"""Full-line comments per 100 lines of code that each package has at least."""

NOT_CODE = {
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.COMMENT,
    tokenize.ENDMARKER,
}


def sources(package: str) -> list[Path]:
    """All Python files of a package."""
    return sorted(path for folder in PACKAGES[package] for path in (ROOT / folder).rglob("*.py"))


def count(source: str) -> tuple[int, int]:
    """Number of full-line comments, and of lines of code: no blank lines, comments or docstrings."""
    docstrings: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            docstrings |= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    code: set[int] = set()
    comments = 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT and token.line.lstrip().startswith("#"):
            comments += 1
        elif token.type not in NOT_CODE:
            code |= set(range(token.start[0], token.end[0] + 1)) - docstrings
    return comments, len(code)


def test_comments_and_code_are_counted() -> None:
    source = '"""Doc\nstring."""\n\n# a comment\nx = 1  # not a full line\ny = (\n    2,\n)\n'
    assert count(source) == (1, 4)


@pytest.mark.parametrize("package", PACKAGES)
def test_no_file_is_too_long(package: str) -> None:
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in sources(package)
    }
    assert lengths
    assert {name: length for name, length in lengths.items() if length > LONGEST} == {}


@pytest.mark.parametrize("package", PACKAGES)
def test_comments_accompany_the_code(package: str) -> None:
    counts = [count(path.read_text(encoding="utf-8")) for path in sources(package)]
    comments, code = (sum(column) for column in zip(*counts, strict=True))
    assert code > 500
    assert 100 * comments / code >= COMMENTS, f"{comments} comments on {code} lines of code"
