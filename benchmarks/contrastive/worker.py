"""Measure one library in this process and print the figures as lines of JSON; `drrho bench` starts this program."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.contrastive.candidates import (
    CANDIDATES,
    FEATURE_DIM,
    GAMMA,
    TEMPERATURE,
    TIMES_OF_RATIOS,
    has_candidate,
    reason_to_skip,
)
from drrho_core._array_api import Array

# After this many seconds a batch size gets no further turn, because at 32,768 pairs one turn takes minutes.
_LONGEST_SECONDS = 60

# The library's product is measured on at most this many rows and columns. For a larger result the time would include
# the allocation of new memory, and the measured rate would be lower than the best rate of the library.
_PRODUCT_ROWS, _PRODUCT_COLUMNS = 1024, 4096

# The product is so short that each turn measures it this many times and takes the median.
_PRODUCT_CALLS = 5

# Small batches get more turns than the option says: until 3 seconds have passed or 50 turns were measured.
_LONG_ENOUGH, MOST_TURNS = 3.0, 50


class _Library:
    """The arrays and the candidates of one backend."""

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
        """Return unit features of the learner and of the reference model, and a state in which all rows are visited."""
        # NumPy draws the numbers, so that all libraries get the same numbers.
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
        """Return a candidate as a function of `arrays`, compiled if the library has a compiler."""
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
        """Wait until a result has been computed."""
        if self.baselines is not None:
            self.baselines.synchronize(result)
        elif hasattr(self.backend.xp, "cuda"):
            self.backend.xp.cuda.Device().synchronize()


def _baselines(name: str) -> Any:
    return importlib.import_module(f"benchmarks.contrastive.with_{name}") if name in ("torch", "jax") else None


def _seconds(library: _Library, function: Callable[..., Any], arrays: tuple[Array, ...]) -> float:
    """Return how long one call takes until the result has been computed."""
    start = time.perf_counter()
    library.wait(function(*arrays))
    return time.perf_counter() - start


def _time(library: _Library, batch_size: int, rounds: int) -> dict[str, Any]:
    names = [name for name in ("product", *CANDIDATES) if has_candidate(library.name, name)]
    left_out = {name: reason for name in names if (reason := reason_to_skip(name, batch_size))}
    names = [name for name in names if name not in left_out]
    arrays = library.arrays(batch_size)
    functions = {name: library.candidate(name) for name in names}
    # The first calls compile and start thread pools.
    for name, function in functions.items():
        if hasattr(function, "lower"):
            functions[name] = function.lower(*arrays).compile()
        else:
            library.wait(function(*(array[:256, ...] for array in arrays)))
    times: dict[str, list[float]] = {name: [] for name in names}
    scale = max(1.0, batch_size / _PRODUCT_ROWS) * max(1.0, batch_size / _PRODUCT_COLUMNS)
    began = time.perf_counter()
    for turn in range(max(rounds, MOST_TURNS) + 1):
        for name in names if turn % 2 else reversed(names):
            # The product takes so little time that the measurement of a single call would be imprecise.
            if name == "product":
                part = statistics.median(_seconds(library, functions[name], arrays) for _ in range(_PRODUCT_CALLS))
                times[name].append(scale * part)
            else:
                times[name].append(_seconds(library, functions[name], arrays))
        elapsed = time.perf_counter() - began
        if elapsed > _LONGEST_SECONDS or (turn >= rounds and elapsed > _LONG_ENOUGH):
            break
    # The first turn allocates memory and fills the caches; it is dropped unless it is the only one.
    if len(times["product"]) > 1:
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
            for name, (above, below, factor) in TIMES_OF_RATIOS.items()
            if above in times and below in times
        },
        "left_out": left_out,
    }


def _memory(library: _Library, batch_size: int, name: str) -> dict[str, Any]:
    row: dict[str, Any] = {"backend": library.name, "batch_size": batch_size, "candidate": name}
    reason = reason_to_skip(name, batch_size)
    if reason is None and not Path("/proc/self/clear_refs").exists():
        reason = "not measured: needs Linux"
    if reason is not None:
        return row | {"reason": reason}
    arrays = library.arrays(batch_size)
    function = library.candidate(name)
    # Memory that later calls reuse (compiled code, thread pools) must exist already and is not counted. JAX is only
    # compiled and not run: a run would leave buffers in its pool, and the measured call would seem to need no memory.
    if hasattr(function, "lower"):
        function = function.lower(*arrays).compile()
    else:
        library.wait(function(*arrays))
    on_device = None if library.baselines is None else library.baselines.peak_bytes()
    if on_device is not None:
        held = library.baselines.held_bytes()
        library.wait(function(*arrays))
        return row | {"megabytes": (library.baselines.peak_bytes() - held) / 1e6}
    # Writing 5 makes Linux forget the peak of this process.
    Path("/proc/self/clear_refs").write_text("5")
    held_kilobytes = _status("VmRSS")
    library.wait(function(*arrays))
    return row | {"megabytes": (_status("VmHWM") - held_kilobytes) / 1e3}


def _status(key: str) -> float:
    """Return the value of a line of /proc/self/status in kB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return float(line.split()[1])
    raise KeyError(key)


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
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
