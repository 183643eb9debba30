"""Each mistake of the formula makes the tests fail that the mistake names, by a wrong number and not by a crash."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from mutants.forks import environment
from mutants.formula import GROUPS, MISTAKES
from mutants.suites import ROOT, source_of
from mutants.syntax import mutated

SOURCE = "def f(x):\n    y = x.max(axis=0)\n    return x - y\n\n\ndef g(x):\n    return x - x.max(axis=0)\n"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a mutant runs in a fork")
@pytest.mark.parametrize("group", GROUPS)
def test_mistakes_of_the_formula_are_seen_by_their_tests(group: str, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    command = [sys.executable, str(Path(__file__).with_name("run_formula.py")), group, str(report)]
    run = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    results: list[dict[str, Any]] = json.loads(report.read_text(encoding="utf-8"))
    assert len(results) == len(GROUPS[group])
    missed = [f"{row['mistake']}: {row['fate']} {row['errors']}" for row in results if not row["wrong_number"]]
    assert missed == []


@pytest.mark.parametrize("number", range(len(MISTAKES)), ids=[f"{m.module}-{m.mistake}" for m in MISTAKES])
def test_a_mistake_is_found_once_in_the_syntax_tree(number: int) -> None:
    entry = MISTAKES[number]
    text = mutated(source_of(entry.module), inside=entry.inside, find=entry.find, put=entry.put)
    compile(text, entry.module, "exec")


def test_mistakes_cover_the_core_and_are_different() -> None:
    modules = Counter(entry.module.partition(".")[0] for entry in MISTAKES)
    assert {"numerics", "ambiguity", "contrastive", "losses", "risk", "selection", "state"} <= set(modules)
    assert 60 <= len(MISTAKES) <= 80
    assert len({entry[:4] for entry in MISTAKES}) == len(MISTAKES)
    for entry in MISTAKES:
        assert list((ROOT / "tests" / "core").glob(f"{entry.tests.partition('::')[0]}*")), entry.tests


@pytest.mark.parametrize(
    ("find", "put", "expected"),
    [
        ("y = x.max(axis=0)", "y = 0", "y = 0\n"),
        ("x.max( axis = 0 )", "x.min(axis=0)", "y = x.min(axis=0)\n"),  # formatting does not matter
        ("__a.max(axis=__b)", "__a.sum(axis=__b)", "y = x.sum(axis=0)\n"),
        ("__a - __b", "__b - __a", "return y - x\n"),
        ("return __a", "return -(__a)", "return -(x - y)\n"),
    ],
)
def test_a_piece_is_replaced_in_one_function(find: str, put: str, expected: str) -> None:
    changed = mutated(SOURCE, inside="f", find=find, put=put)
    assert expected in changed
    assert changed.endswith("def g(x):\n    return x - x.max(axis=0)")


@pytest.mark.parametrize(
    ("inside", "find", "message"),
    [
        ("f", "x + y", r"^f must hold this piece once, got 0 matches: x \+ y$"),
        ("", "x.max(axis=0)", r"^the module must hold this piece once, got 2 matches on lines 2, 7: "),
        ("f", "__a - __a", r"^f must hold this piece once, got 0 matches"),  # both blanks are one expression
        ("h", "x", r"^h must name one function, got 0 times h$"),
    ],
)
def test_a_piece_that_is_out_of_date_says_so(inside: str, find: str, message: str) -> None:
    with pytest.raises(LookupError, match=message):
        mutated(SOURCE, inside=inside, find=find, put="0")


def test_a_replacement_that_changes_nothing_is_refused() -> None:
    with pytest.raises(LookupError, match=r"^f is the same after the change: x - y$"):
        mutated(SOURCE, inside="f", find="x - y", put="x-y")
