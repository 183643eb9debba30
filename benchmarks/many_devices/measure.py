"""The work, the memory and the messages of a rank, and the time that the plan of a run predicts for a step.

The work of a rank is measured in one process, with a stand-in for the other ranks (`counted_ranks.StandIn`). Steps with
messages run in processes of torch.distributed on gloo; see `process`.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import array_api_compat.numpy
import numpy as np

from benchmarks.many_devices.counted_ranks import CountedRanks, StandIn
from drrho_clip.plan.traffic import SharedStep, received_bytes
from drrho_core import ThreadRanks, contrastive_step, sharded_contrastive_step
from drrho_core.contrastive.ranks import FORMS

ROOT = Path(__file__).parents[2]

# Global batch, features and ranks of the measured step.
BATCH, WIDTH, RANKS = 2048, 256, 4


def features(num_rows: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Return two arrays of rows with norm 1, float32."""
    rows = np.random.default_rng(0).normal(size=(2, num_rows, width))
    image, text = (rows / np.linalg.norm(rows, axis=-1, keepdims=True)).astype(np.float32)
    return image, text


def work_of_a_rank(library: str, rounds: int = 9) -> dict[str, float]:
    """Return the milliseconds of a W-th of one rank's step, and of a rank's work in both forms."""
    if library == "torch":
        import array_api_compat.torch as xp
        import torch

        torch.set_num_threads(1)
        convert: Callable[[Any], Any] = torch.from_numpy
    else:
        xp, convert = array_api_compat.numpy, np.asarray
    num_local = BATCH // RANKS
    whole = [convert(x) for x in (*features(BATCH, WIDTH), *[np.full(BATCH, -1.0, np.float32)] * 2)]
    own = [x[:num_local] for x in whole]
    options: dict[str, Any] = {"temperature": 0.07, "gamma": 0.9}
    actions: dict[str, Callable[[], Any]] = {"one": lambda: contrastive_step(*whole, **options)}
    for form in FORMS:
        actions[form] = lambda form=form: sharded_contrastive_step(*own, ranks=StandIn(RANKS, xp), form=form, **options)
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    for number in range(rounds + 2):
        for name, action in actions.items():
            began = time.perf_counter()
            action()
            if number >= 2:
                seconds[name].append(time.perf_counter() - began)
    # Other programs only make a step longer, so the shortest time is the best estimate.
    best = {name: 1e3 * min(values) for name, values in seconds.items()}
    return {"quarter": best["one"] / RANKS, **{form: best[form] for form in FORMS}}


def memory_of_a_rank(num_ranks: int, num_local: int = 128, width: int = 512) -> dict[str, float]:
    """Return the peak memory of a rank's step in megabytes, in both forms, beyond arguments."""
    own = [*features(num_local, width), *[np.full(num_local, -1.0, np.float32)] * 2]
    peaks = {}
    for form in FORMS:
        ranks = StandIn(num_ranks, array_api_compat.numpy)

        def step(form: str = form, ranks: StandIn = ranks) -> None:
            sharded_contrastive_step(*own, ranks=ranks, form=form, temperature=0.07)

        step()
        tracemalloc.start()
        step()
        peaks[form] = tracemalloc.get_traced_memory()[1] / 1e6
        tracemalloc.stop()
    return peaks


def largest_error_of_bytes() -> float:
    """Return the largest relative error of the traffic model, over ranks, forms and options."""
    worst, num_local, width = 0.0, 8, 6
    for num_ranks in (2, 3, 4):
        for form in FORMS:
            for referenced in (False, True):
                for masked in (False, True):

                    def step(ranks: ThreadRanks, form: str = form, r: bool = referenced, m: bool = masked) -> float:
                        messenger, num_pairs = CountedRanks(ranks), num_local * ranks.size
                        image, text = features(num_local, width)
                        options: dict[str, Any] = {"reference_features": (image, text)} if r else {}
                        options |= {"pair_mask": np.ones((num_local, num_pairs), bool)} if m else {}
                        state = np.full(num_local, -1.0, np.float32)
                        sharded_contrastive_step(
                            image, text, state, state, ranks=messenger, form=form, temperature=0.1, **options
                        )
                        return messenger.total

                    expected = received_bytes(
                        SharedStep(
                            num_ranks, num_local, width, form=form, reference_dim=width * referenced, masked=masked
                        )
                    )
                    worst = max(worst, *(abs(x / expected - 1) for x in ThreadRanks.run(num_ranks, step)))
    return worst


def in_processes(num_ranks: int, rounds: int) -> dict[str, Any]:
    """Return measured and predicted milliseconds and megabytes of a step, in both forms, with several processes."""
    with tempfile.TemporaryDirectory() as folder:
        words = ["-m", "benchmarks.many_devices.process", "--folder", folder, "--rounds", str(rounds)]
        command = [sys.executable, "-W", "error", *words, "--size", str(num_ranks)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        started = [
            subprocess.Popen([*command, "--rank", str(rank)], env=environment, cwd=ROOT) for rank in range(num_ranks)
        ]
        try:
            codes = [process.wait(timeout=300) for process in started]
        finally:
            for process in started:
                process.kill()
        if any(codes):
            raise SystemExit(f"{num_ranks} processes ended with {codes}")
        files = [Path(folder, f"{num_ranks}-{rank}.json") for rank in range(num_ranks)]
        return summarised([json.loads(file.read_text(encoding="utf-8")) for file in files])


def summarised(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the figures of a group from those of its processes."""
    num_ranks, probe = len(found), found[0]["probe"]
    # A round ends when the slowest process has finished; medians do not depend on a single slow round.
    rounds = [
        {name: max(f["rounds"][number][name] for f in found) for name in first}
        for number, first in enumerate(found[0]["rounds"])
    ]
    typical = {name: statistics.median(entry[name] for entry in rounds) for name in rounds[0]}
    bandwidth = 2 * (num_ranks - 1) / num_ranks * probe / typical["large"]
    result: dict[str, Any] = {"bandwidth": bandwidth / 1e9}
    for form in FORMS:
        figures = found[0][form]
        latency = typical[f"{form} few bytes"] / figures["exchanges"]
        predicted = typical[f"{form} alone"] + figures["received"] / bandwidth + figures["exchanges"] * latency
        result[form] = {
            "latency_us": 1e6 * latency,
            "alone_ms": 1e3 * typical[f"{form} alone"],
            "predicted_ms": 1e3 * predicted,
            "measured_ms": 1e3 * typical[f"{form} step"],
            "planned_mb": figures["planned"] / 1e6,
            "received_mb": figures["received"] / 1e6,
            "interface_mb": figures["loopback"] / num_ranks / 1e6,
        }
    return result
