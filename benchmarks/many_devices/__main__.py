"""Measure, and print the tables of docs/many-devices.md.

python -m benchmarks.many_devices                    # all measurements, about ten minutes
python -m benchmarks.many_devices --only harness     # only runs of the harness; other figures are the last ones
python -m benchmarks.many_devices --write            # the same; the figures go into docs/many-devices.md
python -m benchmarks.many_devices --plans            # only the table of planned runs, which needs no measurement
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

from benchmarks.many_devices.harness import runs_of_harness
from benchmarks.many_devices.measure import in_processes, largest_error_of_bytes, memory_of_a_rank, work_of_a_rank
from benchmarks.many_devices.page import FIGURES, PAGE, harness_table, measured_tables, planned_table, with_block


def main() -> None:
    """Measure, and print the tables."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=25, help="measured rounds of the processes")
    parser.add_argument("--write", action="store_true", help=f"write {FIGURES.name} and the tables of {PAGE.name}")
    parser.add_argument("--plans", action="store_true", help="only the table of planned runs")
    parts: dict[str, Callable[[], Any]] = {
        "work": lambda: {library: work_of_a_rank(library) for library in ("numpy", "torch")},
        "memory": lambda: {str(size): memory_of_a_rank(size) for size in (4, 16, 64)},
        "largest_error_of_bytes": largest_error_of_bytes,
        "processes": lambda: {str(size): in_processes(size, options.rounds) for size in (2, 4)},
        "harness": runs_of_harness,
    }
    parser.add_argument("--only", nargs="+", choices=list(parts), help="parts to measure; default all", metavar="PART")
    options = parser.parse_args()
    tables = {"planned": planned_table()}
    if not options.plans:
        figures = json.loads(FIGURES.read_text(encoding="utf-8")) if options.only else {}
        figures |= {name: parts[name]() for name in options.only or parts}
        tables["measured"], tables["harness"] = measured_tables(figures), harness_table(figures)
        print(json.dumps(figures, indent=1))
        if options.write:
            FIGURES.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    print(*tables.values(), sep="\n\n")
    if options.write:
        page = PAGE.read_text(encoding="utf-8")
        for name, block in tables.items():
            page = with_block(page, name, block)
        PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
