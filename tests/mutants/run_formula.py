"""Run each mistake of the formula against its tests: ``python tests/mutants/run_formula.py risks report.json``."""

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
    """Run one group and write the result of every mistake to the report."""
    mistakes = GROUPS[group]
    # Patterns are matched before any test runs: if a mistake no longer fits the code, the run ends with a message.
    changes = [
        Change(
            name=entry.mistake,
            module=f"{PACKAGE}.{entry.module}",
            source=mutated(source_of(entry.module), inside=entry.inside, find=entry.find, put=entry.put),
            tests=(f"{TESTS}/{entry.tests}",),
        )
        for entry in mistakes
    ]
    names = [entry.tests.partition("::")[0] for entry in mistakes]
    files = sorted(
        {path for name in names for path in (ROOT / TESTS).glob(name if name.endswith(".py") else f"{name}*.py")}
    )
    results = run(changes, [str(path.relative_to(ROOT)) for path in files])
    # The report has one row per mistake, in the order of the list.
    rows = [
        {
            "mistake": f"{entry.module}: {entry.mistake}",
            "fate": result.fate,
            "killer": result.killer,
            "errors": result.errors,
            "wrong_number": result.wrong_number,
            "seconds": round(result.seconds, 2),
        }
        for entry, result in zip(mistakes, results, strict=True)
    ]
    Path(report).write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
