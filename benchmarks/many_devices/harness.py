"""Runs of the harness with several processes, and the plan of each run: bytes and time of a step.

Each process of torchrun takes all cases, one after another, and measures in rounds: a sum of 4 MB, the exchanges of a
step with a few bytes each, steps that the process takes alone on the whole batch and on as many pairs as its share, and
a step that all processes share. The selection from a super-batch is measured apart. All processes measure at the same
time, so they compete for the cores in every measurement alike. `drrho train --dry-run` gets the bandwidth, the latency,
and speed and overhead of the steps alone, and says how long a shared step takes.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.many_devices.page import figures_of

ROOT = Path(__file__).parents[2]

SETTINGS = shlex.split(
    "--data scenes --train-size 4096 --batch-size 1024 --epochs 4 --backend torch --device cpu --architecture conv "
    "--width 16 --feature-dim 64 --log-every 1000000"
)

CASES = {
    "sogclr": "--method sogclr",
    "sogclr, ring": "--method sogclr --form ring",
    "sogclr, perceptrons": "--method sogclr --architecture mlp --width 256",
    "siglip": "--method siglip",
    "fastclip-v2, split": "--method fastclip-v2 --estimator split",
    "distill:clip": "--method distill:clip --reference REFERENCE",
    "jest-topk": "--method jest-topk --super-batch 2 --batch-size 512 --reference REFERENCE",
}
"""Options of each measured run; REFERENCE is the folder of a run."""

LEFT_OUT = 3
"""First steps of a run, which start threads and fill caches."""


def words_of(case: str, folder: Path) -> list[str]:
    """Return the options of a case for `drrho train`, without the folder of the run."""
    return [*SETTINGS, *(str(folder / "reference") if word == "REFERENCE" else word for word in CASES[case].split())]


def measured_runs(num_ranks: int, folder: Path) -> dict[str, Any]:
    """Train all cases with several processes, and return measured and planned bytes and times of a step by case."""
    words = ["-m", "benchmarks.many_devices.harness_process", "--folder", str(folder)]
    # The launcher chooses a free port.
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    printed = folder / f"{num_ranks}.txt"
    with printed.open("wb") as file:
        launched = subprocess.Popen(
            [sys.executable, *launcher, *words], env=environment, cwd=ROOT, stdout=file, stderr=file
        )
        try:
            code = launched.wait(timeout=1800)
        finally:
            # The launcher ends its processes if it is asked to end.
            launched.terminate()
            launched.wait()
    if code:
        raise SystemExit(f"{num_ranks} processes ended with {code}:\n{printed.read_text(errors='replace')[-3000:]}")
    figures: dict[str, Any] = {}
    for case in CASES:
        files = [folder / str(num_ranks) / f"{case}-{rank}.json" for rank in range(num_ranks)]
        figures[case] = compared(case, [json.loads(file.read_text(encoding="utf-8")) for file in files], folder)
    return figures


def compared(case: str, of_processes: Sequence[dict[str, Any]], folder: Path) -> dict[str, float]:
    """Return measured and planned megabytes and milliseconds of a step, from the figures of all processes."""
    num_ranks, first = len(of_processes), of_processes[0]
    # A round ends when the slowest process has finished; medians do not depend on a single slow round.
    rounds = [
        {name: max(each["rounds"][number][name] for each in of_processes) for name in entry}
        for number, entry in enumerate(first["rounds"])
    ]
    typical = {name: statistics.median(entry[name] for entry in rounds) for name in rounds[0]}
    # A step alone takes the overhead and the time of its pairs, so two sizes of a batch give both. Every process
    # selects from the whole super-batch, so no number of processes divides this time: it is overhead.
    batch, selection = first["batch"], typical["selection"]
    whole, share = typical["alone"] - selection, typical["alone, share"] - typical["selection, share"]
    per_pair = min((whole - share) / (batch - batch / num_ranks), whole / batch)
    rates = {
        "world-size": num_ranks,
        "bandwidth": 2 * (num_ranks - 1) / num_ranks * first["probe"] / typical["large"] / 1e9,
        "latency": 1e6 * typical["few bytes"] / first["exchanges"],
        "pairs-per-second": 1.0 / per_pair,
        "step-overhead": 1e3 * (selection + max(0.0, whole - per_pair * batch)),
    }
    planned = planned_step([*words_of(case, folder), "--out", str(folder / "planned")], rates)
    column = ["reduce", "ring"].index(first["form"])
    return {
        "planned_mb": planned["received, MB: together"][column],
        "counted_mb": max(each["received"] for each in of_processes) / 1e6,
        "loopback_mb": typical["loopback"] / num_ranks / 1e6,
        "planned_ms": planned["a step, ms"][column],
        "measured_ms": 1e3 * typical["step"],
        "alone_ms": 1e3 * typical["alone"],
        "overhead_ms": rates["step-overhead"],
        "exchanges_ms": planned["exchanges, ms"][column],
    }


def planned_step(words: Sequence[str], rates: dict[str, float]) -> dict[str, list[float]]:
    """Return the figures of both forms that a dry run prints for a run with these rates, by the name of the row."""
    from drrho_clip.cli import main as drrho

    options = [word for name, rate in rates.items() for word in (f"--{name}", f"{rate:.12g}")]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        code = drrho(["train", "--dry-run", *words, *options])
    if code:
        raise SystemExit(code)
    return figures_of(printed.getvalue())


def runs_of_harness(sizes: Sequence[int] = (2, 4)) -> dict[str, Any]:
    """Return the figures of all cases by the number of processes."""
    from drrho_clip.cli import main as drrho

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        words = [*SETTINGS, "--method", "clip", "--epochs", "1", "--out", str(folder / "reference")]
        with contextlib.redirect_stdout(io.StringIO()):
            code = drrho(["train", *words])
        if code:
            raise SystemExit(code)
        return {str(size): measured_runs(size, folder) for size in sizes}
