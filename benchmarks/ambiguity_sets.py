"""Time and memory of the seven ambiguity sets on many losses, compared with the library's own exponential and sort.

python benchmarks/ambiguity_sets.py [--backend torch] [--losses 10000000] [--threads 2] [--rounds 5] [--json FILE]

The table shows the median and the longest time of the rounds, and the largest growth of memory.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import threading
import time
from typing import Any

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--backend", default="torch", choices=["torch", "numpy"])
parser.add_argument("--losses", type=int, default=10_000_000)
parser.add_argument("--dtype", default="float32", choices=["float32", "float64"])
parser.add_argument("--threads", type=int, default=2)
parser.add_argument("--rounds", type=int, default=5)
parser.add_argument("--json", help="write the figures to this file, too")
options = parser.parse_args()
os.environ.update(OMP_NUM_THREADS=str(options.threads), OPENBLAS_NUM_THREADS=str(options.threads))

import numpy as np  # noqa: E402  (after the number of threads is set)

from drrho_core import (  # noqa: E402
    CappedKLPenalty,
    ChiSquareBall,
    ChiSquarePenalty,
    CressieReadBall,
    CVaR,
    KLBall,
    KLPenalty,
    worst_case,
)

# One instance of each set with usual parameters; the Cressie-Read ball has two, with an order above and below 2.
SETS = (
    CVaR(0.1),
    KLPenalty(0.5),
    CappedKLPenalty(0.5, 0.1),
    KLBall(0.5),
    ChiSquarePenalty(1.0),
    ChiSquareBall(0.5),
    CressieReadBall(3.0, 0.5),
    CressieReadBall(1.5, 0.5),
)


def resident() -> int:
    """Return the bytes of this process that are in memory now."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Watch:
    """Measure wall and processor seconds, and the largest growth of memory, which is sampled every 2 ms."""

    def __enter__(self) -> Watch:
        # The system's peak of the process would include earlier sets, so a thread samples the memory of this set.
        self.base = self.peak = resident()
        self.over = threading.Event()
        self.thread = threading.Thread(target=self.sample_memory)
        self.thread.start()
        self.wall, self.processor = -time.perf_counter(), -time.process_time()
        return self

    def sample_memory(self) -> None:
        while not self.over.wait(0.002):
            self.peak = max(self.peak, resident())

    def __exit__(self, *_: object) -> None:
        self.wall += time.perf_counter()
        self.processor += time.process_time()
        self.over.set()
        self.thread.join()


def main() -> None:
    x: Any = np.random.default_rng(0).standard_normal(options.losses).astype(options.dtype)
    if options.backend == "torch":
        import array_api_compat.torch as xp
        import drrho_torch  # noqa: F401  (registers a faster sort)
        import torch

        torch.set_num_threads(options.threads)
        x = torch.from_numpy(x)
    else:
        import array_api_compat.numpy as xp

    report: dict[str, Any] = {**vars(options), "load": os.getloadavg()[0], "sets": {}}
    # Two operations that every set needs come first, so that the sets can be compared with them.
    rows: list[tuple[str, Any]] = [("exp, once", lambda: xp.exp(x)), ("the library's sort", lambda: xp.sort(x))]
    rows += [(str(each), lambda each=each: worst_case(x, each)) for each in SETS]
    print(f"{options.backend}, {options.losses} losses, {options.threads} threads, load {report['load']:.1f}")
    print(f"{'':40} seconds    worst  processor  memory / input")
    size = options.losses * np.dtype(options.dtype).itemsize
    for name, task in rows:
        # The first round is not left out: it may have to allocate memory, which users also have to wait for.
        watches = []
        for _ in range(options.rounds):
            with Watch() as watch:
                task()
            watches.append(watch)
        seconds, processor = ([getattr(watch, kind) for watch in watches] for kind in ("wall", "processor"))
        # The growth of memory is divided by the memory of the losses.
        growth = max((watch.peak - watch.base) / size for watch in watches)
        report["sets"][name] = {"seconds": seconds, "processor_seconds": processor, "memory_ratio": growth}
        middle, busy = statistics.median(seconds), statistics.median(processor)
        print(f"{name:40} {middle:7.2f}  {max(seconds):7.2f}  {busy:9.2f}  {growth:14.1f}", flush=True)
    if options.json:
        with open(options.json, "w") as file:
            json.dump(report, file, indent=1)


if __name__ == "__main__":
    main()
