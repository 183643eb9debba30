"""Run every section in a separate process, print one table, write a page and a JSON file.

    make gpu [WHEELS=folder] [GPU_FLAGS="--only kit,sweeps --sizes 4096,65536 --out folder"]
    make gpu GPU_FLAGS=--dry-run      everything in miniature on a CPU; nothing is written into docs/

The exit code is 1 if a measurement has failed. See benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import datetime
import importlib.metadata
import json
import platform
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu import packages, page, plan
from benchmarks.gpu.plan import Case, Section
from benchmarks.gpu.processes import ABSENT, FAILED, LEFT_OUT, NO_TIME, OK, Results, Row, run_group, write

ENDING = 8.0
"""Seconds that are reserved for the time before the first section and after the last."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure; return the exit code."""
    options = _options(arguments)
    if options.worker is not None:
        from benchmarks.gpu import worker

        worker.main(options.worker, json.loads(options.cases), options.descriptor, dry_run=options.dry_run)
        return 0
    begin = time.monotonic()
    usual = "build/gpu-dry-run" if options.dry_run else "docs/benchmarks/gpu"
    out = options.out or packages.ROOT / usual
    rows = out if options.out or options.dry_run else packages.ROOT / "build/gpu"
    # SIGTERM raises an exception, so that the rows so far are written and the child processes end.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with tempfile.TemporaryDirectory() as folder:
        extra = Path(folder)
        if options.wheels is not None:
            try:
                print("\n".join(packages.unpack(options.wheels, extra)), flush=True)
            except ValueError as error:
                print(error, file=sys.stderr)
                return 2
        packages.describe_ourselves(extra)
        sys.path.append(folder)
        print(packages.advice(packages.missing()), flush=True)
        results = Results(rows / "rows.jsonl", lambda row: print(page.table([row]), flush=True))
        groups = plan.schedule(sizes=options.sizes, only=options.only, dry_run=options.dry_run)
        variables = packages.environment(extra, dry_run=options.dry_run)

        def command(section: Section, cases: Sequence[Case], descriptor: int) -> list[str]:
            words = [sys.executable, "-m", "benchmarks.gpu", "--worker", section.part, "--descriptor", str(descriptor)]
            return [*words, "--cases", json.dumps(list(cases)), *(["--dry-run"] if options.dry_run else [])]

        # The sections of a group run at the same time, so the longest section decides.
        shares = [max(section.seconds for section in group) for group in groups]
        total = 60.0 * options.minutes - ENDING
        try:
            for number, group in enumerate(groups):
                # Seconds that a group does not use are added to the next group. A dry run must measure everything.
                part = 1.0 if options.dry_run else sum(shares[: number + 1]) / sum(shares)
                run_group(group, results, command=command, environment=variables, deadline=begin + part * total)
                _publish(out, options, results, begin)
                if not options.dry_run and len(group) > 1 and all(row["status"] == ABSENT for row in results.rows):
                    # No library of the first group could run: each is missing or sees no GPU. No later group can run.
                    break
        finally:
            with contextlib.suppress(KeyboardInterrupt):
                _publish(out, options, results, begin)
    print(f"\n{page.table(results.rows)}\n")
    return _verdict(results.rows, out, options, time.monotonic() - begin)


def _options(arguments: Sequence[str] | None) -> Any:
    def numbers(text: str) -> list[int]:
        sizes = [int(word) for word in text.split(",")]
        if min(sizes) < 2:
            raise ValueError
        return sizes

    def parts(text: str) -> list[str]:
        wrong = [word for word in text.split(",") if word not in plan.PARTS]
        if wrong:
            raise argparse.ArgumentTypeError(f"must be names among {','.join(plan.PARTS)}, got {wrong[0]!r}")
        return text.split(",")

    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dry-run", action="store_true", help="run everything in miniature, on a CPU")
    parser.add_argument("--only", type=parts, default=list(plan.PARTS), metavar="PART,PART", help=",".join(plan.PARTS))
    parser.add_argument("--sizes", type=numbers, metavar="B,B", help="batch sizes of the sweeps and the peers")
    parser.add_argument("--minutes", type=float, help=f"time limit of all sections together; default {plan.MINUTES:g}")
    parser.add_argument("--wheels", type=Path, metavar="FOLDER", help="folder of the wheels of missing packages")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="folder for all files; default docs/benchmarks/gpu")
    for name, kind in (("--worker", str), ("--cases", str), ("--descriptor", int)):
        parser.add_argument(name, type=kind, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    # The defaults depend on another option, so they are set after parsing.
    options.sizes = options.sizes or list(plan.DRY_SIZES if options.dry_run else plan.SIZES)
    options.minutes = options.minutes or (plan.DRY_MINUTES if options.dry_run else plan.MINUTES)
    return options


def _publish(out: Path, options: Any, results: Results, begin: float) -> None:
    """Write the page and the JSON file; without a GPU only in a dry run or if the user has named a folder."""
    if not (options.out or options.dry_run or any("device" in row for row in results.rows)):
        return
    # The command that reproduces the page, without options that have their default.
    words = [page.COMMAND, *(["WHEELS=wheels"] if options.wheels else [])]
    flags = ["--dry-run"] if options.dry_run else []
    flags += [f"--only {','.join(options.only)}"] if options.only != list(plan.PARTS) else []
    usual = list(plan.DRY_SIZES if options.dry_run else plan.SIZES)
    flags += [f"--sizes {','.join(map(str, options.sizes))}"] if options.sizes != usual else []
    setting = {
        "command": " ".join([*words, *([f'GPU_FLAGS="{" ".join(flags)}"'] if flags else [])]),
        "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
        "python": platform.python_version(),
        "numpy": _version("numpy"),
        "seconds": round(time.monotonic() - begin, 1),
    }
    out.mkdir(parents=True, exist_ok=True)
    write(out / "gpu.json", json.dumps({"setting": setting, "rows": results.rows}, indent=1) + "\n")
    write(out / "README.md", page.page(setting, results.rows))


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _verdict(rows: Sequence[Row], out: Path, options: Any, seconds: float) -> int:
    """Print the number of rows by status, and return the exit code."""
    counts = collections.Counter(row["status"] for row in rows)
    print(f"{', '.join(f'{count} {status}' for status, count in counts.items())} after {seconds:.0f} s")
    if not any("device" in row for row in rows) and not (options.dry_run or options.out):
        print("No library sees a GPU, so nothing was written into docs/.")
        return 1
    print(f"The page is {out / 'README.md'}")
    done = {row["part"] for row in rows if row["status"] in (OK, LEFT_OUT)}
    # The peers, two other programs, are optional packages: their absence is no failure.
    silent = [part for part in options.only if part not in done and part != "peers"]
    if silent:
        print(f"Nothing was measured of: {', '.join(silent)}")
    wrong = {FAILED} | ({NO_TIME} if options.dry_run else set())
    return int(bool(silent) or any(row["status"] in wrong for row in rows))


if __name__ == "__main__":
    sys.exit(main())
