"""Parts of several commands: the option ``--device``, opening a backend, the table of figures, a file of results."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from drrho_clip.errors import BadInput
from drrho_clip.options import TEXT, setting
from drrho_core.backend import Backend, get_backend

__all__ = ["build_backend", "device_option", "print_table", "write_json"]


def device_option() -> Any:
    """Return the field of the option ``--device``."""
    return setting(
        None,
        rule=TEXT,
        shown="the library's default device",
        help="Device, by the name that the array library gives it, such as cuda:0.",
    )


def build_backend(name: str, device: str | None, dtype: str) -> Backend:
    """Open a backend; raise BadInput if backend, device or dtype is unknown or not installed."""
    try:
        return get_backend(name, device=device, dtype=dtype)
    except (ValueError, ImportError) as error:
        raise BadInput(str(error)) from error


def print_table(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print rows of results.json as a table, with the best figure of every column in bold."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    names = {
        "retrieval_r1": "R@1",
        "retrieval_r5": "R@5",
        "retrieval_r10": "R@10",
        "zero_shot_accuracy": "zero-shot",
    }
    # A data set without classes has no zero-shot accuracy, so the column is left out.
    columns = [name for name in names if any(name in row["metrics"] for row in rows)]
    best = {name: max(row["metrics"].get(name, 0.0) for row in rows) for name in columns}
    timed = any("seconds" in row for row in rows)
    # The padding is narrow, so that the table fits into eighty columns.
    table = Table(box=box.SIMPLE, collapse_padding=True, pad_edge=False)
    for title in ("method", "data", "seed"):
        table.add_column(title)
    for title in [*(names[name] for name in columns), *(["seen", "seconds"] if timed else [])]:
        table.add_column(title, justify="right")
    for row in rows:
        cells = [row["method"], row["dataset"], str(row["seed"])]
        for name in columns:
            value = row["metrics"].get(name)
            bold = len(rows) > 1 and value == best[name]
            cells.append("" if value is None else f"[bold]{value:.3f}[/bold]" if bold else f"{value:.3f}")
        if timed:
            cells += [f"{row['samples_seen']:,}", f"{row['seconds']:.1f}"]
        table.add_row(*cells)
    Console().print(table)


def write_json(path: Path | None, content: Sequence[Mapping[str, Any]] | Mapping[str, Any]) -> None:
    """Write results to a JSON file; do nothing if `path` is None."""
    if path is not None:
        from drrho_clip.checkpoint import write_atomic

        write_atomic(path, (json.dumps(content, indent=1) + "\n").encode())
