"""`make gpu` without a GPU: what becomes of sections that fail, the page, missing packages, the order of sections."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
import time
import tomllib
import zipfile
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from packaging.tags import sys_tags

from benchmarks.gpu import packages, page, plan, processes
from benchmarks.gpu.plan import Section
from benchmarks.gpu.processes import Results, Row, run_group

ROOT = Path(__file__).parents[2]

WORKER = """
import atexit, json, os, signal, sys, time
from benchmarks.gpu import worker
from benchmarks.gpu.libraries import Absent

class Part:
    def __init__(self, first, report, dry_run):
        self.report = report
        if first["do"] == "absent":
            raise Absent("there is no such library")
        if first["do"] == "cannot start":
            sys.exit("a broken installation")

    def __call__(self, case):
        if case["do"] == "raise":
            raise ValueError("temperature must be > 0, got -1.0")
        if case["do"] == "eat":
            raise RuntimeError("CUDA out of memory. Tried to allocate 64.00 GiB")
        if case["do"] == "die":
            print("an illegal memory access", flush=True)
            os.kill(os.getpid(), signal.SIGSEGV)
        if case["do"] == "hang at the end":
            atexit.register(time.sleep, 60)
        if case["do"] == "hang":
            self.report("progress", {"passed": 7})
            time.sleep(60)
        return {"answer": os.getpid()}

worker.PARTS["fake"] = Part
worker.main("fake", json.loads(sys.argv[1]), int(sys.argv[2]), dry_run=True)
"""


def section(*does: str, name: str = "fake", seconds: float = 30, needs: str | None = None) -> Section:
    return Section(name, "fake", tuple({"do": do} for do in does), 30, seconds, needs)


def run(tmp_path: Path, *sections: Section, seconds: float = 30, results: Results | None = None) -> list[Row]:
    """Run a group with the real processes and pipes, and read its rows back from the disk."""
    script = tmp_path / "fake_worker.py"
    script.write_text(WORKER)
    results = results or Results(tmp_path / "rows.jsonl")

    def command(_: Section, cases: Sequence[Any], descriptor: int) -> list[str]:
        return [sys.executable, str(script), json.dumps(list(cases)), str(descriptor)]

    environment = dict(os.environ) | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    run_group(sections, results, command=command, environment=environment, deadline=time.monotonic() + seconds)
    rows = [json.loads(line) for line in results.path.read_text().splitlines()]
    assert rows == results.rows
    return rows


def test_every_end_of_a_case_becomes_a_row_and_later_cases_run(tmp_path: Path) -> None:
    rows = run(tmp_path, section("ok", "raise", "ok", "eat", "die", "ok", "hang", "ok", seconds=2))
    assert [(row["do"], row["status"]) for row in rows] == [
        ("ok", "ok"),
        ("raise", "failed"),
        ("ok", "ok"),
        ("eat", "out of memory"),
        ("die", "failed"),
        ("ok", "ok"),
        ("hang", "out of time"),
        ("ok", "ok"),
    ]
    assert rows[1]["reason"] == "ValueError: temperature must be > 0, got -1.0"
    assert "Traceback" in rows[1]["output"]
    assert rows[4]["reason"] == "ended by SIGSEGV: an illegal memory access"
    assert rows[6]["reason"] == "it took longer than 2 s"
    assert rows[6]["passed"] == 7  # what it had said before
    processes = [row["answer"] for row in rows if row["status"] == "ok"]
    assert processes[0] == processes[1]  # what was raised ends no process
    assert len(set(processes)) == 3


def test_section_that_dies_does_not_stop_its_neighbour(tmp_path: Path) -> None:
    rows = run(tmp_path, section("die", name="one"), section("ok", "ok", name="other"))
    assert {(row["section"], row["status"]) for row in rows} == {("one", "failed"), ("other", "ok")}
    assert len(rows) == 3


def test_cases_without_time_are_named(tmp_path: Path) -> None:
    began = time.monotonic()
    rows = run(tmp_path, section("hang", "ok", "raise"), seconds=1)
    assert time.monotonic() - began < 20
    over = "the section's time was over"
    assert [row["status"] for row in rows] == ["out of time"] * 3
    assert [row["reason"] for row in rows] == [over, f"not begun: {over}", f"not begun: {over}"]


def test_hanging_process_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "ENDING_SECONDS", 0.2)
    began = time.monotonic()
    rows = run(tmp_path, section("ok", "hang at the end"))
    assert time.monotonic() - began < 20
    assert [row["status"] for row in rows] == ["ok", "ok"]


def test_failing_start_of_a_process_becomes_a_row(tmp_path: Path) -> None:
    results = Results(tmp_path / "rows.jsonl")

    def command(*_: Any) -> list[str]:
        return [str(tmp_path / "no such program")]

    run_group([section("ok"), section("ok")], results, command=command, environment={}, deadline=time.monotonic() + 9)
    assert [row["status"] for row in results.rows] == ["failed", "failed"]
    assert "no such program" in results.rows[0]["reason"]


def test_absent_library_is_one_row_and_skips_later_sections(tmp_path: Path) -> None:
    results = Results(tmp_path / "rows.jsonl")
    run(tmp_path, section("absent", "ok", needs="torch"), results=results)
    rows = run(tmp_path, section("ok", "ok", name="second", needs="torch"), section("ok", needs="jax"), results=results)
    assert [row["status"] for row in rows] == ["absent", "absent", "ok"]
    assert {row["reason"] for row in rows[:2]} == {"there is no such library"}


def test_process_that_cannot_start_fails_all_cases_at_once(tmp_path: Path) -> None:
    rows = run(tmp_path, section("cannot start", "ok"))
    assert [row["reason"] for row in rows] == ["ended with exit code 1: a broken installation"] * 2


def test_row_is_on_disk_before_it_is_printed(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    heard: list[bool] = []
    results = Results(path, lambda row: heard.append(json.loads(path.read_text().splitlines()[-1]) == row))
    for number in range(3):
        results.add({"number": number})
    assert heard == [True] * 3
    assert [file.name for file in tmp_path.iterdir()] == ["rows.jsonl"]


SPEED: Row = {
    "section": "sweeps, torch", "part": "sweeps", "library": "torch", "engine": "fused", "b": 65536, "reference": True,
    "status": "ok", "ms": 70.5, "products_unavoidable": 4, "tflops_unavoidable": 374.2, "share_unavoidable": 0.474,
    "products_made": 6, "tflops_made": 561.3, "share_made": 0.711, "extra_mb": 615.0,
}  # fmt: skip
LOST: Row = {
    "section": "sweeps, jax", "part": "sweeps", "library": "jax", "engine": "dense", "b": 65536, "reference": False,
    "status": "out of memory", "reason": f"a | b `c` $d$ [e](f)\nin {ROOT}/benchmarks/gpu and /usr/lib/some.so",
}  # fmt: skip
OTHERS: list[Row] = [
    {"section": "kit, cupy", "part": "kit", "library": "cupy", "engine": "plain", "check": "contrastive_step",
     "status": "ok", "functions": 1, "of": 1, "passed": 294, "fields": 294, "worst_share_of_bound": 0.152,
     "device": "NVIDIA H200", "versions": "cupy 14.2.0"},
    {"section": "sweeps, torch", "part": "sweeps", "library": "torch", "engine": "product", "status": "ok",
     "square": 8192, "product_tflops": 789.5, "device": "NVIDIA H200", "versions": "torch 2.11.0", "memory_gb": 150.1},
    {"section": "ranks, torch", "part": "ranks", "library": "torch", "engine": "fused", "ranks": 1, "form": "ring",
     "b": 16384, "reference": True, "status": "ok", "rank_ms": 12.5, "best_ms": 10.0, "ratio": 1.25, "extra_mb": 80.2,
     "gradient_off": 0.0015, "loss_off": 1e-7},
    {"section": "ranks, torch", "part": "ranks", "library": "torch", "engine": "fused", "ranks": 4, "form": "reduce",
     "b": 16384, "reference": True, "status": "out of time", "reason": "it took longer than 45 s"},
    {"section": "tests", "part": "tests", "check": "tests marked gpu", "status": "failed", "passed": 3, "failed": 1,
     "skipped": 0, "reason": "1 failed, the first: tests/core/test_risk.py::test_one"},
    {"section": "demo, jax", "part": "demo", "library": "jax", "status": "ok", "data": "scenes", "seconds": 41.2,
     "retrieval_r1": {"clip": 0.3, "drrho": 0.412}},
    {"section": "peers, memeff", "part": "peers", "status": "absent", "reason": "memeff is not installed"},
]  # fmt: skip
SETTING = {"command": "make gpu", "python": "3.12.3", "numpy": "2.5.2", "date": "2026-11-26", "seconds": 421.0}


def test_page_has_every_row_with_figures() -> None:
    written = page.page(SETTING, [SPEED, LOST, *OTHERS])
    assert "| torch | fused | yes | 65,536 | 70.5 | 374.2 | 47% | 561.3 | 71% | 615 |\n" in written
    lost = "out of memory: a / b 'c' d (e)(f) in benchmarks/gpu and some.so"
    assert f"| jax | dense | no | 65,536 | {lost} |  |  |  |  |  |\n" in written
    assert "| torch | product, 8192^3 |  |  |  | 789.5 |  |  |  |  |\n" in written
    assert "| memeff |  |  |  | absent: memeff is not installed |" in written
    assert "| cupy | plain, contrastive_step | 294 of 294 fields passed, worst error 15% of its bound |\n" in written
    assert "failed: 1 failed, the first: tests/core/test_risk.py::test_one (3 passed until then) |\n" in written
    assert "| jax | scenes, R@1: clip 0.300, drrho 0.412; 41.2 s |\n" in written
    assert "- torch: torch 2.11.0; NVIDIA H200, 150.1 GB\n" in written
    assert "| fused | 1 | ring | 16,384 | 12.5 | 10 | 1.25 | 80 | 1.5e-03 | 1.0e-07 |\n" in written
    assert "| fused | 4 | reduce | 16,384 | out of time: it took longer than 45 s |  |  |  |  |  |\n" in written
    widths = {block.count("|") // len(block.splitlines()) for block in written.split("\n\n") if block.startswith("|")}
    assert widths == {11, 4, 3}
    for block in written.split("\n\n"):
        if block.startswith("|"):
            assert len({line.count("|") for line in block.splitlines()}) == 1, block


def test_table_has_a_line_for_every_row() -> None:
    lines = page.table([SPEED, LOST, *OTHERS]).splitlines()
    assert len(lines) == 9
    assert lines[4].endswith("; off by: gradient 1.5e-03, loss 1.0e-07")
    assert "fused, 4 ranks, reduce, b = 16,384" in lines[5]
    width = len("fused, 4 ranks, reduce, b = 16,384, with a reference")
    case = "fused, b = 65,536, with a reference".ljust(width)
    assert lines[0] == (f"sweeps, torch  {case}  70.5 ms; 374.2 TFLOP/s of 4 products (47%), 561.3 of 6 (71%), 615 MB")
    assert all(line.startswith(row["section"]) for line, row in zip(lines, [SPEED, LOST, *OTHERS], strict=True))


def test_largest_batch_comes_early_and_all_sections_fit_into_the_time() -> None:
    groups = plan.schedule(sizes=plan.SIZES, only=plan.PARTS, dry_run=False)
    assert list(dict.fromkeys(section.part for group in groups for section in group)) == list(plan.PARTS)
    assert all(
        len(group) == 1 for group in groups if group[0].part in ("sweeps", "ranks", "peers")
    )  # what is timed runs alone
    assert sum(max(section.seconds for section in group) for group in groups) <= 60 * plan.MINUTES
    for section in (one for group in groups for one in group if one.part == "sweeps"):
        engines = [(case["engine"], case.get("b")) for case in section.cases]
        assert engines[:3] == [("product", None), ("fused", 4096), ("fused", 4096)]
        assert engines[3:5] == [("fused", 65536)] * 2
        for engine in {engine for engine, _ in engines} - {"product", "fused"}:
            sizes = [b for one, b in engines if one == engine]
            assert sizes == sorted(b for b in plan.SIZES for _ in range(2))  # a large one may eat the memory
    (only,) = plan.schedule(sizes=(64,), only=["demo"], dry_run=True)
    assert [section.name for section in only] == ["demo, torch", "demo, jax"]
    kit = plan.schedule(sizes=(64,), only=["kit"], dry_run=True)  # what is timed comes first, the rest last
    assert [len(group) for group in kit] == [3, 3]


def test_ranks_share_every_batch_of_the_section_evenly_with_kernels_and_without() -> None:
    for dry_run in (True, False):
        cases = plan.rank_cases(dry_run=dry_run)
        assert len(cases) == 8
        assert {(case["engine"], case["ranks"], case["form"]) for case in cases} == {
            (engine, ranks, form) for engine in ("fused", "plain") for ranks in (1, 4) for form in ("reduce", "ring")
        }
        assert all(case["b"] % case["ranks"] == 0 for case in cases)


def test_a_group_that_differs_from_no_group_fails() -> None:
    pytest.importorskip("torch")
    from benchmarks.gpu.ranks import RankSteps

    steps = RankSteps({"library": "torch"}, lambda *_: None, dry_run=True)
    (case,) = (case for case in plan.rank_cases(dry_run=True) if tuple(case.values())[1:4] == ("plain", 4, "ring"))
    row = steps(case)
    assert row["ratio"] == pytest.approx(row["rank_ms"] / row["best_ms"], rel=1e-2)

    def result(gradient: float, loss: float) -> Any:
        arrays = {
            f"{side}_gradient": steps.library.given(np.asarray([gradient, 4.0]), "float32")
            for side in ("image", "text")
        }
        return SimpleNamespace(**arrays, loss=loss)

    assert steps.compared(result(1.0, 0.5), result(1.03, 0.5)).keys() == {"gradient_off", "loss_off"}
    for wrong in (result(1.1, 0.5), result(1.0, 0.51), result(float("nan"), 0.5), result(1.0, float("nan"))):
        assert steps.compared(result(1.0, 0.5), wrong)["status"] == "failed"


def wheel(folder: Path, name: str, module: str, tag: str = "py3-none-any") -> None:
    with zipfile.ZipFile(folder / f"{name}-1.0-{tag}.whl", "w") as file:
        file.writestr(f"{module}/__init__.py", "answer = 42\n")
        file.writestr(f"{name}-1.0.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")


def test_only_wheels_of_missing_packages_are_unpacked(tmp_path: Path) -> None:
    wheels, target = tmp_path / "wheels", tmp_path / "unpacked"
    wheels.mkdir()
    wheel(wheels, "made_up_for_a_test", "made_up_for_a_test")
    wheel(wheels, "numpy", "numpy")
    wheel(wheels, "with_code", "with_code", "cp27-cp27m-manylinux_2_28_x86_64")
    wheel(wheels, "for_this_python", "for_this_python", str(next(sys_tags())))
    assert packages.unpack(wheels, target) == [
        f"for_this_python-1.0-{next(sys_tags())}.whl: unpacked",
        "made_up_for_a_test-1.0-py3-none-any.whl: unpacked",
        "numpy-1.0-py3-none-any.whl: left out, it is installed",
        "with_code-1.0-cp27-cp27m-manylinux_2_28_x86_64.whl: left out, it is not for this Python",
    ]
    assert sorted(path.name for path in target.iterdir()) == [
        "for_this_python", "for_this_python-1.0.dist-info", "made_up_for_a_test", "made_up_for_a_test-1.0.dist-info"
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r"^WHEELS must be a folder, got "):
        packages.unpack(tmp_path / "nowhere", target)


def test_missing_packages_and_their_download_are_named_in_one_line() -> None:
    needs = [
        packages.Need("json", "json", "nothing"),
        packages.Need("made_up_for_a_test", "made-up==1.0", "the tests", ("another",)),
    ]
    absent = packages.missing(needs)
    assert [need.package for need in absent] == ["made-up==1.0"]
    line = packages.advice(absent)
    assert "\n" not in line
    assert line.startswith("missing packages: made-up==1.0 (the tests); ")
    assert " pip download --no-deps --only-binary=:all: --dest wheels made-up==1.0 another; " in line
    assert packages.advice([]) == "missing packages: none"


def test_backends_are_registered_without_an_installation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody(name: str) -> Any:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(packages.importlib.metadata, "distribution", nobody)
    packages.describe_ourselves(tmp_path)
    (found,) = importlib.metadata.distributions(path=[str(tmp_path)])
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert (found.name, found.version) == (project["name"], project["version"])
    points = {point.name: point.value for point in found.entry_points if point.group == "drrho.backends"}
    assert points == project["entry-points"]["drrho.backends"]


def test_no_page_is_written_without_a_gpu(tmp_path: Path) -> None:
    folder = ROOT / "docs/benchmarks/gpu"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    command = [sys.executable, "-m", "benchmarks.gpu", "--only", "peers"]
    environment = dict(os.environ) | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1, done.stderr
    assert "No library sees a GPU, so nothing was written into docs/." in done.stdout
    assert done.stdout.count("peers, siglip-kernel") == 2  # as it came, and in the table
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
