"""The work, the memory and the messages of a rank, measured, and the time that the plan of a run predicts for a step.

    python -m benchmarks.many_devices                    # all measurements, about a minute
    python -m benchmarks.many_devices --write            # the same; the figures go into docs/many-devices.md
    python -m benchmarks.many_devices --plans            # only the table of planned runs, which needs no measurement

The work of a rank is measured in one process, with a stand-in for the other ranks (`benchmarks.counted_ranks.StandIn`).
Steps with messages run in processes of torch.distributed on gloo; see `benchmarks.many_devices_process`.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import shlex
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

from benchmarks.counted_ranks import CountedRanks, StandIn
from drrho_clip.traffic import SharedStep, received_bytes
from drrho_core import ThreadRanks, contrastive_step, sharded_contrastive_step
from drrho_core.contrastive.ranks import FORMS

ROOT = Path(__file__).parents[1]
PAGE, FIGURES = ROOT / "docs" / "many-devices.md", ROOT / "docs" / "benchmarks" / "many_devices.json"

# Global batch, features and ranks of the measured step.
BATCH, WIDTH, RANKS = 2048, 256, 4

# A published run: batch, and pairs per second of a GPU, from the GPU hours of 32 epochs of 400 million pairs.
RUNS = {"ViT-B-32": (32_768, 4_600), "ViT-B-16": (33_792, 10_700)}
GPUS = (64, 512)


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
        words = ["-m", "benchmarks.many_devices_process", "--folder", folder, "--rounds", str(rounds)]
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


def measured_tables(figures: dict[str, Any]) -> str:
    """Return the tables of the measured figures, in Markdown."""
    lines = [
        "| library | a quarter of one rank's step, ms | reduce, ms | ratio | ring, ms | ratio |",
        "|---|---|---|---|---|---|",
    ]
    for library, row in figures["work"].items():
        ratios = [row[form] / row["quarter"] for form in FORMS]
        cells = " | ".join(f"{row[form]:.1f} | {ratio:.2f}" for form, ratio in zip(FORMS, ratios, strict=True))
        lines.append(f"| {library} | {row['quarter']:.1f} | {cells} |")
    lines += ["", "| ranks | reduce, MB | ring, MB |", "|---|---|---|"]
    lines += [f"| {size} | {row['reduce']:.1f} | {row['ring']:.1f} |" for size, row in figures["memory"].items()]
    lines += [
        "",
        "| processes | form | planned, MB | counted, MB | loopback, MB | planned, ms | measured, ms | error |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for size, group in figures["processes"].items():
        for form in FORMS:
            row = group[form]
            error = row["predicted_ms"] / row["measured_ms"] - 1
            lines.append(
                f"| {size} | {form} | {row['planned_mb']:.3f} | {row['received_mb']:.3f} | {row['interface_mb']:.3f} | "
                f"{row['predicted_ms']:.0f} | {row['measured_ms']:.0f} | {error:+.0%} |"
            )
    return "\n".join(lines)


def plan_command(model: str, num_ranks: int) -> list[str]:
    """Return the words of the command that plans a published run on 10^9 pairs."""
    batch_size, hours = RUNS[model]
    speed = round(32 * 400e6 / (3600 * hours))
    return shlex.split(
        f"train --dry-run --num-pairs 1000000000 --model {model} --method sogclr --batch-size {batch_size} "
        f"--backend torch --device cpu --precision bf16 --world-size {num_ranks} --bandwidth 25 "
        f"--pairs-per-second {speed} --device-memory 40 --out runs/planned"
    )


def figures_of(printed: str) -> dict[str, list[float]]:
    """Return the figures of both forms by the name of the row, from the last table of a dry run."""
    rows = {}
    for line in printed.splitlines():
        words = [word.strip() for word in line.split("  ") if word.strip()]
        if len(words) == 3 and words[1][0].isdigit():
            rows[words[0]] = [float(word.replace(",", "")) for word in words[1:]]
    return rows


def planned_table() -> str:
    """Return the table of planned runs on 10^9 pairs, from what the command prints."""
    from drrho_clip.cli import main as drrho

    lines = [
        "| model | GPUs | pairs per GPU | memory, GB: reduce | ring | received per step, MB: reduce | ring | "
        "a step, ms: reduce | ring | an epoch, hours: reduce | ring |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for model in RUNS:
        for num_ranks in GPUS:
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                code = drrho(plan_command(model, num_ranks))
            if code:
                raise SystemExit(code)
            rows = figures_of(printed.getvalue())
            memory, received = (rows[name] for name in ("memory, MB", "received, MB: together"))
            cells = [
                *(f"{x / 1e3:.1f}" for x in memory),
                *(f"{x:,.0f}" for x in received),
                *(f"{x:,.0f}" for x in rows["a step, ms"]),
                *(f"{x:.2f}" for x in rows["an epoch, hours"]),
            ]
            lines.append(f"| {model} | {num_ranks} | {RUNS[model][0] // num_ranks} | {' | '.join(cells)} |")
    return "\n".join(lines)


def with_block(page: str, name: str, block: str) -> str:
    """Return a page with a new block between the two comments of a name."""
    before, _, rest = page.partition(f"<!-- {name} -->\n")
    _, _, after = rest.partition(f"<!-- end of {name} -->")
    return f"{before}<!-- {name} -->\n\n{block}\n\n<!-- end of {name} -->{after}"


def main() -> None:
    """Measure, and print the tables."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=25, help="measured rounds of the processes")
    parser.add_argument("--write", action="store_true", help=f"write {FIGURES.name} and the tables of {PAGE.name}")
    parser.add_argument("--plans", action="store_true", help="only the table of planned runs")
    options = parser.parse_args()
    tables = {"planned": planned_table()}
    if not options.plans:
        figures = {
            "work": {library: work_of_a_rank(library) for library in ("numpy", "torch")},
            "memory": {str(size): memory_of_a_rank(size) for size in (4, 16, 64)},
            "largest_error_of_bytes": largest_error_of_bytes(),
            "processes": {str(size): in_processes(size, options.rounds) for size in (2, 4)},
        }
        tables["measured"] = measured_tables(figures)
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
