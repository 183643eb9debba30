"""Run the recipe of the README and the methods that it is compared with, seed by seed, each in a process of its own."""

from __future__ import annotations

import csv
import json
import os
import platform
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import numpy as np

from benchmarks.own_pairs.drawn import write_drawn_pictures

ROOT: Final = Path(__file__).parents[2]
_SECTION: Final = "## Train on your own pairs"
# The methods without a reference model, with their own defaults; the recipe must be better.
_COMPARED: Final = (
    "drrho train --data pairs.csv --method sogclr --out runs/sogclr",
    "drrho train --data pairs.csv --method clip --out runs/clip",
    "drrho train --data pairs.csv --method sogclr --reference runs/reference --anchor-weights reference "
    "--out runs/weighted",
)
# As many of the worst pairs are looked at as a person could check in an evening.
_WORST: Final = 500


def recipe() -> list[str]:
    """Return the lines of the shell block of the README's section on pairs of one's own."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    section = text.partition(_SECTION)[2].partition("\n## ")[0]
    block = re.search(r"^```sh\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    if block is None:
        raise SystemExit(f"README.md must have a shell block in the section {_SECTION!r}")
    return block[1].replace("\\\n", " ").strip().splitlines()


def measure(work: Path, seeds: Sequence[int], *, at_once: int, only_report: bool = False) -> dict[str, Any]:
    """Run everything for every seed that is not finished yet, and return all figures.

    With `only_report` nothing is trained: the figures are those of the runs that are finished.
    """
    if not only_report:
        with ThreadPoolExecutor(at_once) as pool:
            list(pool.map(lambda seed: _train_seed(work / f"seed{seed}", seed), seeds))
    measured = [_measure_seed(work / f"seed{seed}", seed) for seed in seeds]
    return {
        "recipe": recipe(),
        "machine": f"{platform.machine()}, {platform.system()}, Python {platform.python_version()}, one thread per run",
        "seeds": measured,
    }


def _train_seed(folder: Path, seed: int) -> None:
    if not (folder / "truth.csv").exists():
        write_drawn_pictures(folder, seed=seed)
    for line in (*recipe(), *_COMPARED):
        _run(line, folder)


def _measure_seed(folder: Path, seed: int) -> dict[str, Any]:
    runs = {}
    for run in sorted(results.parent for results in folder.glob("runs/*/results.json")):
        figures = folder / f"{run.name}.json"
        if not figures.exists():
            _drrho(["evaluate", f"runs/{run.name}", "--data", "test.csv", "--json", figures.name], folder)
        row = json.loads((run / "results.json").read_text())[0]
        tested = json.loads(figures.read_text())[0]["metrics"]
        runs[run.name] = {
            "retrieval_r1": tested["retrieval_r1"],
            "samples_seen": row["samples_seen"],
            "seconds": row["seconds"],
            "step": row.get("step"),
            "state": row.get("state"),
        }
    if "reference" in runs and not (folder / "suspects.json").exists():
        line = ["suspects", "runs/reference", "--data", "pairs.csv", "--out", "suspects.csv", "--json", "suspects.json"]
        _drrho(line, folder)
    return {"seed": seed, "runs": runs, "suspects": _suspects(folder) if "reference" in runs else {}}


def _run(line: str, folder: Path) -> None:
    """Run a line of the recipe, unless its run is finished; continue an interrupted run."""
    words = shlex.split(line, comments=True)
    if words[:2] != ["drrho", "train"]:
        return
    out = folder / words[words.index("--out") + 1]
    if (out / "results.json").exists():
        return
    resume = (out / "checkpoint.safetensors").exists()
    _drrho(["train", "--resume", "--out", words[words.index("--out") + 1]] if resume else words[1:], folder)


def _drrho(words: Sequence[str], folder: Path) -> None:
    """Run the command line in a process with one thread; its output goes to drrho.log."""
    paths = [str(ROOT), str(ROOT / "backends"), str(ROOT / "reference_impl")]
    variables = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    began = time.monotonic()
    with (folder / "drrho.log").open("a") as log:
        command = [sys.executable, "-m", "drrho_clip.cli", *words]
        subprocess.run(command, cwd=folder, env=os.environ | variables, stdout=log, stderr=log, check=True)
        log.write(f"{shlex.join(words)}: {time.monotonic() - began:.0f} s\n")


def _suspects(folder: Path) -> dict[str, Any]:
    """Compare the ranking of the pairs with the truth."""
    with (folder / "truth.csv").open(encoding="utf-8", newline="") as file:
        wrong = {row["image"]: row["is_swapped"] == "1" for row in csv.DictReader(file)}
    with (folder / "suspects.csv").open(encoding="utf-8", newline="") as file:
        ranked = np.asarray([wrong[row["image"]] for row in csv.DictReader(file)])
    figures = json.loads((folder / "suspects.json").read_text())
    # Area under the curve: the share of pairs (wrong, right) in which the wrong caption comes first.
    positions = np.flatnonzero(ranked)
    right_before = positions - np.arange(len(positions))
    area = 1.0 - float(np.mean(right_before)) / int(np.sum(~ranked))
    return {
        "wrong": int(np.sum(ranked)),
        "probably_wrong": figures["probably_wrong"],
        "wrong_among_the_worst": int(np.sum(ranked[:_WORST])),
        "worst": _WORST,
        "area_under_the_curve": round(area, 4),
    }
