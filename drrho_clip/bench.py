"""``drrho bench``: the contrastive step against what people use today, as ratios within one process.

Every library is measured in a process of its own, with one thread, so that its settings hold from the start. There,
for each batch size, all candidates take turns: a machine whose speed drifts slows them all, and a ratio is the median
of the ratios of neighbours. Products are counted as b x b x d multiply-adds: one pass with a reference needs 4 (two for
the logits, two for the gradients), without one 3; two passes compute the logits twice.

Memory is measured in further processes, one per figure: the peak of what a call holds beyond what was there before it.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from drrho_clip.errors import BadInput
from drrho_core._array_api import Array

SIZES = (256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
FEATURE_DIM = 512
MEMORY_SIZES = (4096, 8192, 16384, 32768)
TEMPERATURE, GAMMA = 0.05, 0.9

DTYPES = {"float32": 4, "float64": 8, "bfloat16": 4, "float16": 4}
"""Bytes of a number of the b x b matrices: half types are widened."""

CANDIDATES = {
    "one pass": "contrastive_step with a reference",
    "two passes": "contrastive_step with a reference, tile_size=1024: no b x b array exists",
    "faster product": "one pass, multiplied by another routine of the library (torch: oneDNN)",
    "no reference": "contrastive_step without a reference",
    "dense autograd": "the same formula on b x b matrices, with a reference, differentiated by the library",
    "released form": "the released DRRho-CLIP program's form of it, autograd: matrices of their own for each direction",
    "cross-entropy": "CLIP's loss, no reference, differentiated by the library",
}

RATIOS = {
    "share": "share of the library's own matrix-product rate, one pass (4 products)",
    "two-pass share": "the same of two passes, still counted as 4 products: 67 % is the most it can be",
    "over dense": "dense autograd's time over one pass",
    "over dense, faster": "dense autograd's time over one pass with the faster product",
    "over released": "the released form's time over one pass",
    "over cross-entropy": "cross-entropy's time over the step without a reference",
}

LARGEST_DENSE = 8192
"""Above it the memory of what others use is not measured: it grows as b^2."""

LONGEST_SECONDS = 60
"""A batch size that takes longer gets no further turn: at 32,768 one turn takes minutes."""

_RATIOS = {
    "share": ("product", "one pass", 4.0),
    "two-pass share": ("product", "two passes", 4.0),
    "over dense": ("dense autograd", "one pass", 1.0),
    "over dense, faster": ("dense autograd", "faster product", 1.0),
    "over released": ("released form", "one pass", 1.0),
    "over cross-entropy": ("cross-entropy", "no reference", 1.0),
}

_SHARES = {
    "share.svg": ("One pass: share of the library's product rate", "share"),
    "two-passes.svg": ("Two passes: share of the library's product rate", "two-pass share"),
}
_OTHERS = {
    "over dense": "dense autograd",
    "over dense, faster": "dense/faster",
    "over released": "released form",
    "over cross-entropy": "cross-entropy",
}
"""What is drawn: the pictures of shares, and a curve's short name for each ratio to others."""

LARGEST_FALL = 0.15
"""``--check`` fails where a ratio falls by more than this."""

_MATRICES_IN_MEMORY = {
    "dense autograd": 8, "released form": 16, "cross-entropy": 6, "one pass": 2, "faster product": 2, "no reference": 2
}  # fmt: skip
"""About how many b x b matrices a candidate holds; one that would not fit is reported and not run."""

_PRODUCT_ROWS, _PRODUCT_COLUMNS = 1024, 4096
"""The product is measured on at most so many rows and columns: its rate is the library's best, without the time that it
takes to get memory for a large result."""

_PRODUCT_CALLS = 5
"""In every turn the product is measured so many times."""

_LONG_ENOUGH, _MOST_TURNS = 3.0, 50
"""Small batches take more turns than were asked for, until so many seconds have passed or so many turns been taken."""


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
    """Measure and return everything that was found.

    Parameters
    ----------
    backends : sequence of str
        Names of backends.
    device : str, optional
        In the library's own words.
    dtype : str
        ``"float32"``, ``"float64"``, ``"bfloat16"`` or ``"float16"``.
    sizes, memory_sizes : sequence of int
        Batch sizes to time, and to measure the memory of.
    rounds : int
        How often every candidate takes its turn at least, 1 or more; at small batch sizes it is oftener.
    threads : int
        Of the library, at least 1.
    say : callable
        Is given lines of progress.

    Returns
    -------
    dict
        ``setting``, and ``times`` and ``memory``, lists of rows.
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
    found: dict[str, Any] = {"setting": setting, "times": [], "memory": []}
    common = ["--device", device or "", "--dtype", dtype, "--rounds", str(rounds)]
    for backend in backends:
        for row in _worker(["time", backend, *common, "--sizes", *map(str, sizes)], threads):
            if "version" in row:
                setting["libraries"][backend] = row["version"]
                continue
            found["times"].append(row)
            say(f"{backend} b={row['batch_size']}: {_told(row)}")
        for size in memory_sizes:
            for name in ("one pass", "two passes", "dense autograd", "cross-entropy"):
                if not _has(backend, name) or ("pass" not in name and size > LARGEST_DENSE):
                    continue
                task = ["memory", backend, *common, "--sizes", str(size), "--candidate", name]
                for row in _worker(task, threads, reuse=False):
                    found["memory"].append(row)
                    value = row.get("megabytes")
                    told = row["reason"] if value is None else f"{value:.0f} MB"
                    say(f"{backend} b={size} {name}: {told}")
    return found


def ratios(found: Mapping[str, Any]) -> dict[str, float]:
    """Return all ratios by a name such as ``"torch 4096 share"``: what `compare` holds against each other."""
    return {
        f"{row['backend']} {row['batch_size']} {name}": row["ratios"][name]
        for row in found["times"]
        for name in RATIOS
        if name in row["ratios"]
    }


def compare(found: Mapping[str, Any], before: Mapping[str, Any]) -> list[str]:
    """Return a line for every ratio that has fallen by more than `LARGEST_FALL` since `before`.

    Raises
    ------
    BadInput
        If the two have no ratio in common.
    """
    new, old = ratios(found), ratios(before)
    common = [name for name in new if name in old]
    if not common:
        raise BadInput("check must hold figures of these libraries and batch sizes, got none of them")
    return [
        f"{name}: {old[name]:.3g} before, {new[name]:.3g} now"
        for name in common
        if new[name] < old[name] * (1 - LARGEST_FALL)
    ]


def markdown(found: Mapping[str, Any], command: str) -> str:
    """Return the figures as a page."""
    setting = found["setting"]
    libraries = ", ".join(f"{name} {version}" for name, version in setting["libraries"].items())
    lines = [
        "# The contrastive step, measured",
        "",
        f"    {command}",
        "",
        f"{libraries}; {setting['machine']}; {setting['dtype']}, d = r = {setting['feature_dim']}, "
        f"{setting['threads']} thread(s), {setting['device'] or 'the default device'}, Python {setting['python']}. "
        "Written by the command; the raw figures are in [contrastive.json](contrastive.json).",
        "",
        *(f"- *{name}*: {words}." for name, words in CANDIDATES.items()),
        "",
        "Milliseconds are the medians of the rounds. Ratios are medians of the ratios of neighbours:",
        "",
        *(f"- *{name}*: {words}." for name, words in RATIOS.items()),
        "",
        *(line for file, (heading, _) in _charts(found).items() for line in (f"![{heading}]({file})", "")),
    ]
    for backend in setting["libraries"]:
        rows = [row for row in found["times"] if row["backend"] == backend]
        lines += [f"## {backend}", "", "| b | product, ms | " + " | ".join([*CANDIDATES, *RATIOS]) + " |"]
        lines.append("|" + "---|" * (2 + len(CANDIDATES) + len(RATIOS)))
        for row in rows:
            cells = [f"{row['batch_size']:,}", f"{row['milliseconds']['product']:.1f}"]
            for name in CANDIDATES:
                value = row["milliseconds"].get(name)
                cells.append(row["left_out"].get(name, "") if value is None else f"{value:.1f}")
            for name in RATIOS:
                value = row["ratios"].get(name)
                form = "{:.0%}" if name.endswith("share") else "{:.2f}"
                cells.append("" if value is None else form.format(value))
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
        memory = [row for row in found["memory"] if row["backend"] == backend]
        if memory:
            names = list(dict.fromkeys(row["candidate"] for row in memory))
            lines += ["Extra memory, MB:", "", "| b | " + " | ".join(names) + " | 2 b^2 numbers |"]
            lines.append("|" + "---|" * (2 + len(names)))
            for size in dict.fromkeys(row["batch_size"] for row in memory):
                here = {row["candidate"]: row for row in memory if row["batch_size"] == size}
                cells = [f"{size:,}"]
                for name in names:
                    row = here.get(name, {})
                    value = row.get("megabytes")
                    cells.append(row.get("reason", "") if value is None else f"{value:.0f}")
                cells.append(f"{2 * size * size * DTYPES[setting['dtype']] / 1e6:.0f}")
                lines.append("| " + " | ".join(cells) + " |")
            lines.append("")
    return "\n".join(lines)


def pictures(found: Mapping[str, Any]) -> dict[str, str]:
    """Return the plots by file name, as SVG."""
    from drrho_clip.report.svg import Line, lines

    smallest = math.log2(min(row["batch_size"] for row in found["times"]))
    drawn = {}
    for file, (heading, curves) in _charts(found).items():
        chart = lines(
            [Line(name, x, y) for name, (x, y) in curves.items()],
            key=file.removesuffix(".svg"),
            title=heading,
            x_name="log2 of the batch size",
            y_name="",
            share=file in _SHARES,
            x_from=smallest,
        )
        drawn[file] = chart.as_file(heading=heading, note=f"{found['setting']['machine']}, {found['setting']['dtype']}")
    return drawn


def _charts(found: Mapping[str, Any]) -> dict[str, tuple[str, dict[str, tuple[list[float], list[float]]]]]:
    """Return what there is to draw, by file name: a heading, and each curve's x and y by its name."""

    def curves(wanted: Mapping[str, tuple[str, str]]) -> dict[str, tuple[list[float], list[float]]]:
        points = {
            name: [
                (math.log2(row["batch_size"]), row["ratios"][ratio])
                for row in found["times"]
                if row["backend"] == backend and ratio in row["ratios"]
            ]
            for name, (backend, ratio) in wanted.items()
        }
        return {name: ([x for x, _ in its], [y for _, y in its]) for name, its in points.items() if len(its) > 1}

    libraries = list(found["setting"]["libraries"])
    charts = {
        file: (heading, curves({library: (library, ratio) for library in libraries}))
        for file, (heading, ratio) in _SHARES.items()
    }
    for library in libraries:
        of_others = curves({name: (library, ratio) for ratio, name in _OTHERS.items()})
        charts[f"ratios-{library}.svg"] = (f"{library}: time of others over ours", of_others)
    return {file: chart for file, chart in charts.items() if chart[1]}


# ---------------------------------------------------------------------------------------------------------------------
# The worker: one library in one process
# ---------------------------------------------------------------------------------------------------------------------


def _worker(task: Sequence[str], threads: int, *, reuse: bool = True) -> Iterator[dict[str, Any]]:
    """Run a task in a process of its own and yield the rows that it prints."""
    environment = dict(os.environ)
    count = str(threads)
    # The last is JAX's: neither OpenMP's variable nor XLA's flags keep it from using every core.
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "PJRT_NPROC"):
        environment[name] = count
    environment["DRRHO_BENCH_THREADS"] = count
    if not reuse:  # give freed memory back at once, or the next call's would not be seen
        environment |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
    command = [sys.executable, "-m", "drrho_clip.bench", *task]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout or ():
            yield json.loads(line)
    if process.returncode:
        raise BadInput(f"the worker must end with 0, got {process.returncode} from {' '.join(task)}")


class _Library:
    """One backend's arrays and candidates for a batch size."""

    def __init__(self, name: str, device: str | None, dtype: str) -> None:
        from drrho_core.backend import get_backend

        self.backend = get_backend(name, device=device, dtype=dtype if dtype == "float64" else "float32")
        self.name, self.dtype = name, dtype
        self.baselines = _baselines(name)
        threads = int(os.environ.get("DRRHO_BENCH_THREADS", "1"))
        if hasattr(self.backend.xp, "set_num_threads"):
            self.backend.xp.set_num_threads(threads)

    @property
    def version(self) -> str:
        """The library's version."""
        module = importlib.import_module(self.name)
        return str(module.__version__)

    def arrays(self, batch_size: int) -> tuple[Array, ...]:
        """Return unit features of the learner and of the reference model, and a state that was visited."""
        generator = np.random.default_rng(0)
        made = []
        for _ in range(4):
            x = generator.standard_normal((batch_size, FEATURE_DIM), dtype=np.float32)
            x /= np.linalg.norm(x, axis=1, keepdims=True)
            array = self.backend.asarray(x)
            made.append(self.backend.xp.astype(array, getattr(self.backend.xp, self.dtype)))
        state = self.backend.asarray(generator.standard_normal(batch_size).astype(np.float32))
        return (*made, state)

    def candidate(self, name: str) -> Callable[..., Any]:
        """Return a candidate as a function of `arrays`, compiled where the library can."""
        from drrho_core import contrastive_step

        xp = self.backend.xp
        options: dict[str, Any] = {"temperature": TEMPERATURE, "gamma": GAMMA, "xp": xp}
        if name == "two passes":
            options["tile_size"] = 1024

        def ours(images: Array, texts: Array, reference: Array, others: Array, state: Array) -> Any:
            pair = None if name == "no reference" else (reference, others)
            return contrastive_step(images, texts, state, state, reference_features=pair, **options)

        def faster(*arrays: Array) -> Any:
            with self.baselines.faster_products():
                return ours(*arrays)

        def product(images: Array, texts: Array, *_: Array) -> Any:
            return (images[:_PRODUCT_ROWS, :] @ texts[:_PRODUCT_COLUMNS, :].T,)

        if name == "product":
            return self.backend.compile(product)
        baselines = {"dense autograd": "dense_step", "released form": "released_form", "cross-entropy": "cross_entropy"}
        if name in baselines:
            baseline: Callable[..., Any] = getattr(self.baselines, baselines[name])
            return self.backend.compile(baseline)
        return self.backend.compile(faster if name == "faster product" else ours)

    def wait(self, result: Any) -> None:
        """Wait until a result is there."""
        if self.baselines is not None:
            self.baselines.synchronize(result)
        elif hasattr(self.backend.xp, "cuda"):
            self.backend.xp.cuda.Device().synchronize()


def _baselines(name: str) -> Any:
    return importlib.import_module(f"drrho_{name}.baselines") if name in ("torch", "jax") else None


def _has(backend: str, candidate: str) -> bool:
    """Tell whether a library has a candidate: without autograd there is nothing to compare with."""
    if candidate in ("faster product", "released form"):
        return backend == "torch"
    return candidate not in ("dense autograd", "cross-entropy") or backend in ("torch", "jax")


def _too_large(name: str, batch_size: int) -> str | None:
    """Say why a candidate is left out: it would take more than half of the memory that is there."""
    needed = _MATRICES_IN_MEMORY.get(name, 0) * 4 * batch_size**2
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if name in ("one pass", "faster product", "no reference") and 4 * batch_size**2 > 2**30:
        return "above the budget: two passes"
    return f"not run: about {needed / 2**30:.0f} GiB" if needed > available / 2 else None


def _seconds(library: _Library, function: Callable[..., Any], arrays: tuple[Array, ...]) -> float:
    """Return how long one call takes, its result included."""
    start = time.perf_counter()
    library.wait(function(*arrays))
    return time.perf_counter() - start


def _time(library: _Library, batch_size: int, rounds: int) -> dict[str, Any]:
    names = [name for name in ("product", *CANDIDATES) if _has(library.name, name)]
    left_out = {name: reason for name in names if (reason := _too_large(name, batch_size))}
    names = [name for name in names if name not in left_out]
    arrays = library.arrays(batch_size)
    functions = {name: library.candidate(name) for name in names}
    for name, function in functions.items():  # compiles, starts thread pools
        if hasattr(function, "lower"):
            functions[name] = function.lower(*arrays).compile()
        else:
            library.wait(function(*(array[:256, ...] for array in arrays)))
    times: dict[str, list[float]] = {name: [] for name in names}
    scale = max(1.0, batch_size / _PRODUCT_ROWS) * max(1.0, batch_size / _PRODUCT_COLUMNS)
    began = time.perf_counter()
    for turn in range(max(rounds, _MOST_TURNS) + 1):
        for name in names if turn % 2 else reversed(names):
            if name == "product":  # a small part of the whole: one call would say little
                part = statistics.median(_seconds(library, functions[name], arrays) for _ in range(_PRODUCT_CALLS))
                times[name].append(scale * part)
            else:
                times[name].append(_seconds(library, functions[name], arrays))
        elapsed = time.perf_counter() - began
        if elapsed > LONGEST_SECONDS or (turn >= rounds and elapsed > _LONG_ENOUGH):
            break
    if len(times["product"]) > 1:  # the first turn allocates and warms the caches
        times = {name: values[1:] for name, values in times.items()}

    def ratio(above: str, below: str, factor: float) -> float:
        return statistics.median(factor * a / b for a, b in zip(times[above], times[below], strict=True))

    return {
        "backend": library.name,
        "batch_size": batch_size,
        "milliseconds": {name: 1e3 * statistics.median(values) for name, values in times.items()},
        "fastest": {name: 1e3 * min(values) for name, values in times.items()},
        "rounds": len(times["product"]),
        "ratios": {
            name: ratio(above, below, factor)
            for name, (above, below, factor) in _RATIOS.items()
            if above in times and below in times
        },
        "left_out": left_out,
    }


def _memory(library: _Library, batch_size: int, name: str) -> dict[str, Any]:
    row: dict[str, Any] = {"backend": library.name, "batch_size": batch_size, "candidate": name}
    reason = _too_large(name, batch_size)
    if reason is None and not Path("/proc/self/clear_refs").exists():
        reason = "not measured: needs Linux"
    if reason is not None:
        return row | {"reason": reason}
    arrays = library.arrays(batch_size)
    function = library.candidate(name)
    # What stays must be there already: compiled code, thread pools. A run would leave its buffers in JAX's own pool.
    if hasattr(function, "lower"):
        function = function.lower(*arrays).compile()
    else:
        library.wait(function(*arrays))
    on_device = None if library.baselines is None else library.baselines.peak_bytes()
    if on_device is not None:
        held = library.baselines.held_bytes()
        library.wait(function(*arrays))
        return row | {"megabytes": (library.baselines.peak_bytes() - held) / 1e6}
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    held_kilobytes = _status("VmRSS")
    library.wait(function(*arrays))
    return row | {"megabytes": (_status("VmHWM") - held_kilobytes) / 1e3}


def _status(key: str) -> float:
    """Return a line of /proc/self/status in kB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return float(line.split()[1])
    raise KeyError(key)


def _processor() -> str:
    """Return the processor's name."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.machine()


def _told(row: Mapping[str, Any]) -> str:
    parts = [f"{name} {value:.1f} ms" for name, value in row["milliseconds"].items()]
    parts += [f"{name} {value:.2f}" for name, value in row["ratios"].items()]
    return ", ".join(parts)


def _main() -> None:
    parser = argparse.ArgumentParser(description="One library's figures as lines of JSON; `drrho bench` runs this.")
    parser.add_argument("task", choices=("time", "memory"))
    parser.add_argument("backend")
    parser.add_argument("--device", default="")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sizes", type=int, nargs="+", required=True)
    parser.add_argument("--candidate", default="one pass")
    options = parser.parse_args()
    library = _Library(options.backend, options.device or None, options.dtype)
    if options.task == "memory":
        print(json.dumps(_memory(library, options.sizes[0], options.candidate)), flush=True)
        return
    print(json.dumps({"version": library.version}), flush=True)
    for size in options.sizes:
        print(json.dumps(_time(library, size, options.rounds)), flush=True)


if __name__ == "__main__":
    _main()
