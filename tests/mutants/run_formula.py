"""Meet the mistakes of the formula with their tests: ``python tests/mutants/run_formula.py risks report.json``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mutants.forks import Change, run
from mutants.formula import GROUPS
from mutants.suites import PACKAGE, ROOT, source_of
from mutants.syntax import mutated

TESTS = "tests/core"


def main(group: str, report: str) -> None:
    """Run one group and write what became of every mistake."""
    mistakes = GROUPS[group]
    # Patterns are matched before any test runs: a mistake that is out of date ends the run with its message.
    changes = [
        Change(
            name=one.mistake,
            module=f"{PACKAGE}.{one.module}",
            source=mutated(source_of(one.module), inside=one.inside, find=one.find, put=one.put),
            tests=(f"{TESTS}/{one.tests}",),
        )
        for one in mistakes
    ]
    names = [one.tests.partition("::")[0] for one in mistakes]
    files = sorted(
        {path for name in names for path in (ROOT / TESTS).glob(name if name.endswith(".py") else f"{name}*.py")}
    )
    results = run(changes, [str(path.relative_to(ROOT)) for path in files])
    # One entry per mistake, in the order of the list.
    found = [
        {
            "mistake": f"{one.module}: {one.mistake}",
            "fate": result.fate,
            "killer": result.killer,
            "errors": result.errors,
            "wrong_number": result.wrong_number,
            "seconds": round(result.seconds, 2),
        }
        for one, result in zip(mistakes, results, strict=True)
    ]
    Path(report).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
