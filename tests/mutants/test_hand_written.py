"""Hand-written mutants of the core: each is a wrong number, and its module's own NumPy suite sees it.

The mutants and the suites stand in hand.toml, how they are run in runner.py.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="a suite runs in a fork")


def _load(name: str) -> Any:
    """Import a file beside this one: test folders are no packages."""
    spec = importlib.util.spec_from_file_location(f"mutants_{name}", Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


runner = _load("runner")
MUTANTS = runner.hand_written()
SUITES = runner.suites()


@pytest.fixture(scope="session")
def server() -> Iterator[Any]:
    with runner.Runner() as started:
        yield started


@pytest.mark.parametrize("module", SUITES)
def test_what_nobody_changed_is_green(server: Any, module: str) -> None:
    # Also the proof that a mutant that changes nothing would be found out: this is one.
    answer = server.try_out(module)
    assert answer.verdict == "green", answer.output


@pytest.mark.parametrize(
    "mutant", MUTANTS, ids=[f"{m['module']}-{number}-{m['what'][:40]}" for number, m in enumerate(MUTANTS)]
)
def test_a_mutant_is_killed(server: Any, mutant: dict[str, str]) -> None:
    change = {name: mutant[name] for name in ("inside", "find", "put")}
    source = runner.mutated(runner.source_of(mutant["module"]), **change)
    answer = server.try_out(mutant["module"], source)
    assert answer.verdict == "red", f"{mutant}: {answer.verdict}\n{answer.output}"


def test_every_module_of_mathematics_has_mutants() -> None:
    count = Counter(mutant["module"] for mutant in MUTANTS)
    assert set(count) == set(SUITES)
    assert min(count.values()) >= 3
    assert sum(count.values()) >= 40
    assert len({tuple(mutant.values()) for mutant in MUTANTS}) == len(MUTANTS)


def test_a_mutant_that_is_out_of_date_says_so() -> None:
    source = "def f(x):\n    y = 1\n    return x + y\n\n\ndef g(x):\n    return x + y\n"
    assert runner.mutated(source, inside="f", find="y = 1", put="y = 2") == source.replace("y = 1", "y = 2")
    with pytest.raises(LookupError, match=r"^f must hold this line once, got it 0 times: y = 3$"):
        runner.mutated(source, inside="f", find="y = 3", put="y = 2")
    with pytest.raises(LookupError, match=r"^h must name one function, got 0 times h$"):
        runner.mutated(source, inside="h", find="y = 1", put="y = 2")


@pytest.mark.parametrize(
    ("source", "verdict"),
    [
        ("import math\n", "does not import"),  # the package's own import of it fails
        ("syntax error", "does not import"),
        ("raise SystemExit", "does not import"),
    ],
)
def test_a_crash_is_no_wrong_number(server: Any, source: str, verdict: str) -> None:
    assert server.try_out("numerics", source).verdict == verdict


def test_a_small_call_that_fails_is_no_wrong_number(server: Any) -> None:
    source = runner.source_of("numerics").replace("return xp.logaddexp(log_x,", "return xp.no_such_function(log_x,")
    assert server.try_out("numerics", source).verdict == "small call fails"
