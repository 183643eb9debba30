"""Measure every library in separate processes, and compare two measurements.

A library sets up its threads when it is imported, so every library gets a separate process. In this process all
candidates are timed in turn for each batch size. If the machine becomes slower, all candidates become slower. A ratio
is the median of the ratios of neighbouring turns. Memory is measured in further processes, one per figure. The figure
is the peak memory of a call minus the memory that the process held before the call.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.contrastive.candidates import FEATURE_DIM, RATIOS, has_candidate
from drrho_clip.errors import BadInput

SIZES = (256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
MEMORY_SIZES = (4096, 8192, 16384, 32768)

LARGEST_DENSE = 8192
"""Above this batch size the memory of dense autograd and cross-entropy is not measured: it grows as b^2."""

LARGEST_FALL = 0.15
"""``--check`` fails if a ratio falls by more than this share."""


def run(
    backends: Sequence[str],
    *,
    device: str | None = None,
    dtype: str = "float32",
    sizes: Sequence[int] = SIZES,
    memory_sizes: Sequence[int] = MEMORY_SIZES,
    rounds: int = 5,
    threads: int = 1,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Measure all libraries and return the figures.

    Parameters
    ----------
    backends : sequence of str
        Names of backends.
    device : str, optional
        Device, in the notation of the library, such as ``"cuda:0"``.
    dtype : str
        ``"float32"``, ``"float64"``, ``"bfloat16"`` or ``"float16"``.
    sizes, memory_sizes : sequence of int
        Batch sizes whose time is measured, and batch sizes whose memory is measured.
    rounds : int
        Smallest number of turns of every candidate, at least 1; small batch sizes get more turns.
    threads : int
        Threads of the library, at least 1.
    say : callable
        Called with each line of progress.

    Returns
    -------
    dict
        ``setting`` is a dict; ``times`` and ``memory`` are lists of rows.
    """
    setting: dict[str, Any] = {
        "python": platform.python_version(),
        "machine": _processor(),
        "dtype": dtype,
        "device": device,
        "threads": threads,
        "rounds": rounds,
        "feature_dim": FEATURE_DIM,
        "reference_dim": FEATURE_DIM,
        "libraries": {},
    }
    figures: dict[str, Any] = {"setting": setting, "times": [], "memory": []}
    common = ["--device", device or "", "--dtype", dtype, "--rounds", str(rounds)]
    # Times are measured first: every library has one process for all batch sizes.
    for backend in backends:
        for row in _worker(["time", backend, *common, "--sizes", *map(str, sizes)], threads):
            if "version" in row:
                setting["libraries"][backend] = row["version"]
                continue
            figures["times"].append(row)
            say(f"{backend} b={row['batch_size']}: {_line_of_progress(row)}")
        # Each figure of memory has a separate process: a call could reuse memory that an earlier call has freed.
        for size in memory_sizes:
            for name in ("one pass", "two passes", "dense autograd", "cross-entropy"):
                if not has_candidate(backend, name) or ("pass" not in name and size > LARGEST_DENSE):
                    continue
                task = ["memory", backend, *common, "--sizes", str(size), "--candidate", name]
                for row in _worker(task, threads, reuse=False):
                    figures["memory"].append(row)
                    value = row.get("megabytes")
                    size_or_reason = row["reason"] if value is None else f"{value:.0f} MB"
                    say(f"{backend} b={size} {name}: {size_or_reason}")
    return figures


def ratios(figures: Mapping[str, Any]) -> dict[str, float]:
    """Return all ratios by a name such as ``"torch 4096 share"``, for `compare`."""
    return {
        f"{row['backend']} {row['batch_size']} {name}": row["ratios"][name]
        for row in figures["times"]
        for name in RATIOS
        if name in row["ratios"]
    }


def compare(figures: Mapping[str, Any], before: Mapping[str, Any]) -> list[str]:
    """Return a line for every ratio that has fallen by more than `LARGEST_FALL` since the measurement `before`.

    Raises
    ------
    BadInput
        If the two measurements have no ratio in common.
    """
    # Only ratios are compared, because the two measurements may come from different machines.
    new, old = ratios(figures), ratios(before)
    common = [name for name in new if name in old]
    if not common:
        raise BadInput("check must hold figures of these libraries and batch sizes, got none of them")
    return [
        f"{name}: {old[name]:.3g} before, {new[name]:.3g} now"
        for name in common
        if new[name] < old[name] * (1 - LARGEST_FALL)
    ]


def _worker(task: Sequence[str], threads: int, *, reuse: bool = True) -> Iterator[dict[str, Any]]:
    """Run a task in a separate process and yield the rows that it prints."""
    environment = dict(os.environ)
    # The worker must find this package and all packages that this process can import, from any current folder.
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, sys.path)])
    count = str(threads)
    # PJRT_NPROC is JAX's variable: neither OpenMP's variable nor XLA's flags keep JAX from using every core.
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "PJRT_NPROC"):
        environment[name] = count
    environment["DRRHO_BENCH_THREADS"] = count
    if not reuse:  # otherwise glibc keeps freed memory, and the next call would seem to need no memory
        environment |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
    command = [sys.executable, "-m", "benchmarks.contrastive.worker", *task]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout or ():
            yield json.loads(line)
    if process.returncode:
        raise BadInput(f"the worker must end with 0, got {process.returncode} from {' '.join(task)}")


def _processor() -> str:
    """Return the processor's name."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.machine()


def _line_of_progress(row: Mapping[str, Any]) -> str:
    parts = [f"{name} {value:.1f} ms" for name, value in row["milliseconds"].items()]
    parts += [f"{name} {value:.2f}" for name, value in row["ratios"].items()]
    return ", ".join(parts)
