"""Measure the README's recipe for a table of one's own on drawn pictures, and write docs/examples/own_pairs.md.

python -m benchmarks.own_pairs --work FOLDER [--seeds 11 12 13] [--at-once 1] [--out docs/examples] [--only-report]

Every run is a process with one thread. A repeated call continues: runs that are finished are not repeated, interrupted
runs go on from their last checkpoint.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.own_pairs.measure import measure
from benchmarks.own_pairs.page import write_page


def main() -> None:
    """Parse the command line, measure, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for data and runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[11, 12, 13], help="seeds of the pictures")
    parser.add_argument("--at-once", type=int, default=1, help="number of seeds that are measured at the same time")
    parser.add_argument("--out", type=Path, default=Path("docs/examples"), help="folder of own_pairs.md and .json")
    parser.add_argument("--only-report", action="store_true", help="train nothing; report the runs that are finished")
    options = parser.parse_args()
    figures = measure(options.work, options.seeds, at_once=options.at_once, only_report=options.only_report)
    write_page(options.out, figures)
    print((options.out / "own_pairs.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
