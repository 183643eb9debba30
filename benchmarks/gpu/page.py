"""The printed table and the page in docs/benchmarks/gpu."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks.gpu.packages import ROOT
from benchmarks.gpu.processes import OK, Row

COMMAND = "make gpu"
_HARMLESS = str.maketrans(dict(zip("|`<>[]$*", ["/", "'", "(", ")", "(", ")", None, None], strict=True)))


def plain(text: Any, length: int = 160) -> str:
    """Return a text of another program as one line for a Markdown table, without markup and this machine's folders."""
    words = " ".join(str(text).replace(f"{ROOT}/", "").split())
    # Absolute paths lose their folders and keep the file's name.
    words = re.sub(r"(?<![\w.])/(?:[\w.+-]+/)+", "", words)
    words = words.translate(_HARMLESS)
    return words if len(words) <= length else words[: length - 3] + "..."


def summary(row: Row) -> str:
    """Return the result of a row in a few words."""
    # The keys of a row show which part of the plan measured the row.
    if row["status"] != OK:
        partial = f" ({row['passed']} passed until then)" if row.get("passed") else ""
        return plain(f"{row['status']}: {row.get('reason', '')}") + partial
    if "ms" in row:
        memory = f", {row['extra_mb']:,.0f} MB" if row.get("extra_mb") is not None else ""
        return (
            f"{row['ms']:g} ms; {row['tflops_unavoidable']:g} TFLOP/s of {row['products_unavoidable']} products "
            f"({row['share_unavoidable']:.0%}), {row['tflops_made']:g} of {row['products_made']} "
            f"({row['share_made']:.0%}){memory}"
        )
    if "rank_ms" in row:
        memory = f", {row['extra_mb']:,.0f} MB" if "extra_mb" in row else ""
        best = f"{row['ratio']:.2f} times the best possible {row['best_ms']:g} ms"
        off = f"; off by: gradient {row['gradient_off']:.1e}, loss {row['loss_off']:.1e}" if "loss_off" in row else ""
        return f"{row['rank_ms']:g} ms, {best}{memory}{off}"
    if "product_tflops" in row:
        return f"{row['product_tflops']:g} TFLOP/s at {row['square']}^3, {plain(row['device'])}"
    if "gradient_error" in row:
        errors = ", ".join(f"{name} {row[f'{name}_error']:.1e}" for name in ("gradient", "state", "loss"))
        return f"off by: {errors}"
    if "functions" in row:
        worst = f"{row['worst_share_of_bound']:.0%}"
        return f"{row['passed']} of {row['fields']} fields passed, worst error {worst} of its bound"
    if "retrieval_r1" in row:
        scores = ", ".join(f"{name} {score:.3f}" for name, score in row["retrieval_r1"].items())
        return f"{row['data']}, R@1: {scores}; {row['seconds']:g} s"
    if "skipped" in row:
        lacking = f"; files that need {', '.join(row['lacking'])} left out" if row.get("lacking") else ""
        return f"{row['passed']} passed, {row['skipped']} skipped{lacking}"
    return "done"


def case_name(row: Row) -> str:
    """Return the name of a row's case."""
    parts = [str(row[key]) for key in ("engine", "check") if key in row]
    if "ranks" in row:
        parts.append(f"{row['ranks']} {'rank' if row['ranks'] == 1 else 'ranks'}, {row['form']}")
    if "b" in row:
        parts.append(f"b = {row['b']:,}")
        parts.append("with a reference" if row.get("reference") else "no reference")
    return plain(", ".join(parts))


def table(rows: Iterable[Row]) -> str:
    """Return all rows as one table in plain text."""
    # The first two columns get the width of their longest cell.
    cells = [(row["section"], case_name(row), summary(row)) for row in rows]
    widths = [max((len(line[column]) for line in cells), default=0) for column in (0, 1)]
    lines = (f"{section:<{widths[0]}}  {case:<{widths[1]}}  {result}" for section, case, result in cells)
    return "\n".join(line.rstrip() for line in lines)


def page(setting: dict[str, Any], rows: Sequence[Row]) -> str:
    """Return all rows as a page of Markdown."""
    lines = ["# Measurements on a GPU", "", f"    {setting['command']}", ""]
    # One line per library, with versions and device.
    devices = [row for row in rows if "device" in row]
    for library in dict.fromkeys(row["library"] for row in devices):
        row = next(row for row in devices if row["library"] == library)
        more = f", {row['memory_gb']:g} GB" if "memory_gb" in row else ""
        capability = f", compute capability {row['compute_capability']}" if "compute_capability" in row else ""
        lines.append(f"- {library}: {plain(row['versions'])}; {plain(row['device'])}{more}{capability}")
    lines += [
        f"- Python {setting['python']}, NumPy {setting['numpy']}; {setting['date']}; {setting['seconds']:.0f} s in all",
        "",
        "The command writes this page; the raw figures are in [gpu.json](gpu.json). If a measurement failed or ran",
        "out of memory or time, its row gives the reason. *Fused* means that the GPU kernels were used, *plain* that",
        "the core ran without kernels. The case *half types* compares a step on bfloat16 or float16 features with",
        "NumPy in float64; *off by* gives the largest errors, relative to the size of the results. All other cases of",
        "correctness compare our functions with the oracle, the slow NumPy program.",
        "",
    ]
    lines += _section("Correctness", _of(rows, "kit"), ("library", "case", "result"), _simple)
    lines += _speeds(_of(rows, "sweeps"), _of(rows, "peers"))
    lines += _of_ranks(_of(rows, "ranks"))
    lines += _section(
        "Tests", _of(rows, "tests"), ("tests", "result"), lambda row: (case_name(row) or "all", summary(row))
    )
    lines += _section(
        "The demo, one seed", _of(rows, "demo"), ("library", "result"), lambda row: (_library(row), summary(row))
    )
    return "\n".join(lines).rstrip() + "\n"


def _speeds(sweeps: list[Row], peers: list[Row]) -> list[str]:
    rows = [*sweeps, *peers]
    # Sweeps and peers (other programs) are in one table, so that they can be compared column by column.
    if not rows:
        return []
    intended = (
        "Each row is one call of `contrastive_step` with gradients on b pairs. The engine *dense* means autograd of",
        "the same formula through b x b matrices. Milliseconds are medians; each call ends when the device has",
        "computed the result. *TFLOP/s* counts only the matrix products that every method needs (3, with a reference",
        "model 4). *TFLOP/s, made* counts the products of two passes (4, with a reference model 6; also for *dense*,",
        "which computes fewer), and for another program the products that this program computes (3 for siglip-kernel,",
        "5 for memeff). A product has 2 b^2 d operations, with features of width d.",
        "Each share is the rate in the column before, divided by the rate at",
        "which the library multiplies two 8,192 x 8,192 matrices in the same process. *MB* is the peak memory beyond",
        "the inputs; for JAX it is the memory that the compiler plans. siglip-kernel and memeff are other programs:",
        "their losses are those of SigLIP and CLIP, without reference model and state.",
    )
    head = ("library", "engine", "reference", "b", "ms", "TFLOP/s", "share", "TFLOP/s, made", "share, made", "MB")
    lines = ["## Speed", "", *intended, "", *_head(head)]
    # A row of the library's own product has no batch. A row without figures has a reason in the column of the time.
    for row in rows:
        if "product_tflops" in row:
            cells = [_library(row), f"product, {row['square']}^3", *[""] * 3, f"{row['product_tflops']:g}", *[""] * 4]
        else:
            where = [_library(row), str(row.get("engine", "")), _yes(row), f"{row['b']:,}" if "b" in row else ""]
            cells = where + (_speed(row) if row["status"] == OK else [summary(row), "", "", "", "", ""])
        lines.append("| " + " | ".join(cells) + " |")
    return [*lines, ""]


def _of_ranks(rows: list[Row]) -> list[str]:
    if not rows:
        return []
    intended = (
        "Each row is one call of `sharded_contrastive_step` on the own pairs of a rank, a process with a share of a",
        "batch of b pairs, in bfloat16 with a reference model. With 1 rank the call is made in a group of one process",
        "on NCCL (in a dry run on gloo), and *off by* compares the call with `contrastive_step`. With 4 ranks the",
        "other ranks are stand-ins, whose messages never leave the process. *Best* is the time of `contrastive_step`",
        "on all pairs, divided by the number of ranks.",
    )
    head = ("engine", "ranks", "form", "b", "ms", "best, ms", "ratio", "MB", "gradient off by", "loss off by")
    lines = ["## A rank of several", "", *intended, "", *_head(head)]
    for row in rows:
        cells = [str(row.get(name, "")) for name in ("engine", "ranks", "form")] + [
            f"{row['b']:,}" if "b" in row else ""
        ]
        if row["status"] == OK:
            cells += [f"{row['rank_ms']:g}", f"{row['best_ms']:g}", f"{row['ratio']:.2f}"]
            cells += ["" if row.get("extra_mb") is None else f"{row['extra_mb']:,.0f}"]
            cells += [f"{row[name]:.1e}" if name in row else "" for name in ("gradient_off", "loss_off")]
        else:
            cells += [summary(row), *[""] * 5]
        lines.append("| " + " | ".join(cells) + " |")
    return [*lines, ""]


def _speed(row: Row) -> list[str]:
    memory = row.get("extra_mb")
    return [
        f"{row['ms']:g}",
        f"{row['tflops_unavoidable']:g}",
        f"{row['share_unavoidable']:.0%}",
        f"{row['tflops_made']:g}",
        f"{row['share_made']:.0%}",
        "" if memory is None else f"{memory:,.0f}",
    ]


def _simple(row: Row) -> tuple[str, ...]:
    return _library(row), case_name(row), summary(row)


def _library(row: Row) -> str:
    return str(row.get("library") or row["section"].partition(", ")[2])


def _yes(row: Row) -> str:
    return {True: "yes", False: "no"}.get(row.get("reference"), "")  # type: ignore[arg-type]


def _of(rows: Sequence[Row], part: str) -> list[Row]:
    return [row for row in rows if row["part"] == part]


def _head(names: Sequence[str]) -> list[str]:
    return ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]


def _section(title: str, rows: list[Row], names: Sequence[str], cells: Any) -> list[str]:
    if not rows:
        return []
    return [f"## {title}", "", *_head(names), *("| " + " | ".join(cells(row)) + " |" for row in rows), ""]
