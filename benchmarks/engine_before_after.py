"""Time and memory of a contrastive step in two checkouts of this repository, as ratios.

    python benchmarks/engine_before_after.py BEFORE AFTER [--library numpy] [--size 1024] [--repeats 15] [--two-passes]

BEFORE and AFTER are folders that hold a checkout. Each checkout runs in a separate process. The two processes take
steps in turn, so slow changes of the machine's speed affect both equally. The program prints the ratio after / before
of the times of the fastest steps, the same ratio of the medians of processor time, which depends less on other
programs, and the largest memory of each process. Features are float32, 512 wide.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

WIDTH = 512


def step_of(library: str, size: int, reference: bool, options: dict[str, Any]) -> Any:
    """Return a function without arguments that takes one step and waits for its result."""
    import numpy as np

    from drrho_core import contrastive_step

    rng = np.random.default_rng(0)

    def unit() -> Any:
        x = rng.normal(size=(size, WIDTH)).astype(np.float32)
        return x / np.linalg.norm(x, axis=1, keepdims=True)

    arrays = [unit(), unit(), *rng.normal(size=(2, size)).astype(np.float32)]
    references = (unit(), unit()) if reference else None
    if library == "numpy":
        return lambda: contrastive_step(*arrays, temperature=0.07, gamma=0.8, reference_features=references, **options)
    if library == "torch":
        import drrho_torch  # noqa: F401  # registers torch's routines
        import torch

        arrays = [torch.from_numpy(x) for x in arrays]
        references = None if references is None else tuple(map(torch.from_numpy, references))
        return lambda: contrastive_step(*arrays, temperature=0.07, gamma=0.8, reference_features=references, **options)
    import drrho_jax  # noqa: F401  # registers JAX's routines
    import jax

    arrays = [jax.numpy.asarray(x) for x in (*arrays, *(references or ()))]

    @jax.jit
    def jitted(*x: Any) -> Any:
        pair = x[4:] if reference else None
        return contrastive_step(*x[:4], temperature=0.07, gamma=0.8, reference_features=pair, **options)

    return lambda: jax.block_until_ready(jitted(*arrays))


def work(library: str, size: int, reference: bool, options: dict[str, Any]) -> None:
    """For each line of input, take a step and print its seconds, processor seconds and the largest memory so far."""
    step = step_of(library, size, reference, options)
    for _ in sys.stdin:
        began, processor = time.perf_counter(), time.process_time()
        step()
        print(
            time.perf_counter() - began,
            time.process_time() - processor,
            resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
            flush=True,
        )


def start(folder: Path, request: str) -> subprocess.Popen[str]:
    """Start the worker of a checkout."""
    paths = [str(folder), *(str(folder / name) for name in ("backends", "reference_impl"))]
    return subprocess.Popen(
        [sys.executable, __file__, "--work", request],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd="/",
    )  # fmt: skip


def ask(worker: subprocess.Popen[str]) -> tuple[float, float, float]:
    """Return the seconds of one step, its processor seconds, and the largest memory so far in MB."""
    assert worker.stdin is not None
    assert worker.stdout is not None
    worker.stdin.write("\n")
    worker.stdin.flush()
    seconds, processor, kilobytes = map(float, worker.stdout.readline().split())
    return seconds, processor, kilobytes / 1024.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", type=Path)
    parser.add_argument("--library", action="append", choices=["numpy", "torch", "jax"])
    parser.add_argument("--size", action="append", type=int)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--two-passes", action="store_true", help="set memory_budget=0: compute logits twice")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        work(**json.loads(arguments.work))
        return
    if len(arguments.folders) != 2:
        parser.error("two folders are needed, BEFORE and AFTER")
    print(
        "| library | b | reference | fastest step, ms: before, after | fastest step: after / before "
        "| processor time: after / before | first call, s: before, after | memory, MB: before, after |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for library in arguments.library or ["numpy", "torch", "jax"]:
        for size in arguments.size or [1024, 4096]:
            for reference in (False, True):
                options = {"memory_budget": 0} if arguments.two_passes else {}
                request = {"library": library, "size": size, "reference": reference, "options": options}
                workers = [start(folder.resolve(), json.dumps(request)) for folder in arguments.folders]
                first = [ask(worker)[0] for worker in workers]
                times: list[list[float]] = [[], []]
                processor: list[list[float]] = [[], []]
                memory = [0.0, 0.0]
                for turn in range(arguments.repeats):
                    for place in (0, 1) if turn % 2 else (1, 0):
                        seconds, used, memory[place] = ask(workers[place])
                        times[place].append(seconds)
                        processor[place].append(used)
                for worker in workers:
                    worker.communicate()
                fastest, middle = [min(x) for x in times], [statistics.median(x) for x in processor]
                print(
                    f"| {library} | {size:,} | {'yes' if reference else 'no'} "
                    f"| {1e3 * fastest[0]:.1f}, {1e3 * fastest[1]:.1f} | {fastest[1] / fastest[0]:.3f} "
                    f"| {middle[1] / middle[0]:.3f} | {first[0]:.2f}, {first[1]:.2f} "
                    f"| {memory[0]:.0f}, {memory[1]:.0f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
