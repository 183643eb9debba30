"""The tables of docs/many-devices.md: measured figures, and planned runs, which need no measurement."""

from __future__ import annotations

import contextlib
import io
import shlex
from pathlib import Path
from typing import Any

from drrho_core.contrastive.ranks import FORMS

DOCS = Path(__file__).parents[2] / "docs"
PAGE, FIGURES = DOCS / "many-devices.md", DOCS / "benchmarks" / "many_devices.json"

# A published run: batch, and pairs per second of a GPU, from the GPU hours of 32 epochs of 400 million pairs.
RUNS = {"ViT-B-32": (32_768, 4_600), "ViT-B-16": (33_792, 10_700)}
GPUS = (64, 512)


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


def harness_table(figures: dict[str, Any]) -> str:
    """Return the table of the runs of the harness, in Markdown."""
    lines = [
        "| processes | run | planned, MB | counted, MB | loopback, MB | planned, ms | measured, ms | error |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for size, runs in figures["harness"].items():
        for run, row in runs.items():
            error = row["planned_ms"] / row["measured_ms"] - 1
            lines.append(
                f"| {size} | {run} | {row['planned_mb']:.3f} | {row['counted_mb']:.3f} | {row['loopback_mb']:.3f} | "
                f"{row['planned_ms']:.0f} | {row['measured_ms']:.0f} | {error:+.0%} |"
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
    """Return the table of planned runs on 10^9 pairs, as the command prints them."""
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
