"""Run the tests of the repository and the demo on a device."""

from __future__ import annotations

import importlib.util
import os
import re
import tempfile
import time
from pathlib import Path
from typing import Any, ClassVar

from benchmarks.gpu.libraries import Cupy, open_library, require
from benchmarks.gpu.plan import Case
from benchmarks.gpu.processes import FAILED, LEFT_OUT, Report, Row, rounded


class Tests:
    """Run tests in this process, or in several processes if pytest-xdist is installed."""

    CHOICE: ClassVar = {
        "tests of the kernels": ["tests/backends/test_fused_torch.py", "tests/backends/test_fused_jax.py",
                                 "tests/backends/test_fused_cupy.py", "tests/backends/test_fused_ranks.py",
                                 "tests/core/test_fused.py",
                                 "-m", "not slow", "-k", "not stand-in and not tuner and not compiles"],
        "tests marked gpu": ["-m", "gpu", "tests/core", "tests/backends"],
    }  # fmt: skip
    DRY_CHOICE: ClassVar = {
        "tests of the kernels": ["tests/core/test_fused.py"],
        "tests marked gpu": ["-m", "gpu", "tests/backends/test_fused_cupy.py", "tests/backends/test_estimators.py"],
    }

    def __init__(self, first: Case, report: Report, dry_run: bool) -> None:
        require("pytest")
        require("hypothesis")
        self.report, self.dry_run = report, dry_run

    def __call__(self, case: Case) -> Row:
        import pytest

        result: Row = {"passed": 0, "failed": 0, "skipped": 0, "not_collected": 0, "wrong": []}
        reasons: dict[str, int] = {}
        last_report = time.monotonic()

        # The plugin counts outcomes while the tests run. If a time limit ends the run, the counts of the finished tests
        # remain.
        class Plugin:
            def pytest_runtest_logreport(plugin, report: Any) -> None:  # noqa: N805
                nonlocal last_report
                if report.outcome == "passed" and report.when != "call":
                    return
                result[report.outcome] += 1
                if report.failed:
                    result["wrong"] = [*result["wrong"], report.nodeid][:20]
                if report.skipped and isinstance(report.longrepr, tuple):
                    reason = str(report.longrepr[2]).removeprefix("Skipped: ")
                    reasons[reason] = reasons.get(reason, 0) + 1
                if time.monotonic() > last_report + 0.5:
                    last_report = time.monotonic()
                    self.report("progress", result)

            # If a test file cannot be imported because a package is not installed, the package is listed under
            # "lacking". All other files that cannot be imported are counted as broken.
            def pytest_collectreport(plugin, report: Any) -> None:  # noqa: N805
                if report.failed:
                    lacking = re.findall(r"No module named '(\w+)", str(report.longrepr))
                    if lacking and importlib.util.find_spec(lacking[-1]) is None:
                        result["lacking"] = sorted({*result.get("lacking", []), lacking[-1]})
                        return
                    result["not_collected"] += 1
                    result["wrong"] = [*result["wrong"], f"{report.nodeid} (not collected)"][:20]

        chosen = (self.DRY_CHOICE if self.dry_run else self.CHOICE)[case["check"]]
        options = ["-q", "--color=no", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
        if importlib.util.find_spec("pytest_benchmark") is not None:
            # This plugin warns if there are several workers, and warnings are errors here.
            options += ["-p", "no:benchmark"]
        if importlib.util.find_spec("xdist") is not None:
            options += ["-n", "0" if self.dry_run else str(min(8, os.cpu_count() or 1))]
        pytest.main([*options, *chosen], plugins=[Plugin()])
        if reasons:
            result["skipped_most_for"] = max(reasons, key=lambda reason: reasons[reason])
        if result["failed"] or result["not_collected"]:
            count = result["failed"] + result["not_collected"]
            return result | {"status": FAILED, "reason": f"{count} failed, the first: {result['wrong'][0]}"}
        if not result["passed"] + result["skipped"]:
            return result | {"status": FAILED, "reason": "no test was found"}
        if not result["passed"]:
            return result | {
                "status": LEFT_OUT,
                "reason": f"all skipped: {result.get('skipped_most_for', 'no reason')}",
            }
        return result


class Demo:
    """Run the demo with one seed on the device."""

    def __init__(self, first: Case, report: Report, dry_run: bool) -> None:
        for module in ("safetensors", "rich", "tokenizers", "matplotlib", "jinja2"):
            require(module)
        self.library = open_library(first["library"], dry_run=dry_run)
        self.dry_run = dry_run

    def __call__(self, case: Case) -> Row:
        from drrho_clip.demo import run_demo

        # The plan has no demo on CuPy: CuPy's encoders accept only the digits (small images from scikit-learn), but
        # the demo trains on the scenes (larger images that the program renders).
        assert not isinstance(self.library, Cupy)
        # A dry run uses the digits, because JAX needs a minute to compile the convolutions for the scenes on a CPU.
        data = "digits" if self.dry_run and importlib.util.find_spec("sklearn") is not None else "scenes"
        begin = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            rows = run_demo(
                Path(folder) / "demo", backend=self.library.backend(), data=data, quick=self.dry_run, quiet=True
            )
        row: Row = {"data": data, "seconds": rounded(time.perf_counter() - begin)}
        row["retrieval_r1"] = {entry["method"]: rounded(entry["metrics"]["retrieval_r1"]) for entry in rows}
        return row
