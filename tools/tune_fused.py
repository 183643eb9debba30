"""Measure the Triton kernels on a GPU with other constants, in at most eight minutes, and say which are the fastest.

    python tools/tune_fused.py [--out tune.json] [--budget 480] [--width 768] [--dry-run]

The kernels compute two sweeps (passes over all tiles of the b x b matrix Z of excess similarities): the first sums over
the negatives of each anchor, the second computes the weights V and the gradients V E2 and V^T E1, where E1 and E2 are
the features of images and texts. The program runs these parts, the most important first:

1. the rate at which the device multiplies two 8192 x 8192 matrices;
2. a comparison with float64, and a test that two runs give equal bits;
3. the speed of cuBLAS for the shapes that the kernels use;
4. both sweeps at 65,536 pairs with the present constants;
5. each sweep alone at 16,384 pairs with other tiles;
6. both sweeps with the fastest constants at 16,384, 32,768 and 65,536 pairs.

Each measurement becomes a row of the file, which is written again after each row. If a part fails, its row gives the
reason and the other parts continue. If no time is left for a part, it is skipped. A share is the rate of the products
of two passes (6 of b x b x width with a reference model, 4 without), divided by the rate of part 1. The program changes
no constant: copy the fastest constants into `PLANS` of `drrho_torch/fused_plans.py` by hand. `--dry-run` runs all parts
in miniature on a CPU; it needs ``TRITON_INTERPRET=1``, and its times mean nothing.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

ROOT = Path(__file__).resolve().parents[1]
# The packages of this clone are used even if they are not installed on the GPU machine.
sys.path[:0] = [str(ROOT), str(ROOT / "backends")]

from drrho_core.extend import Batch  # noqa: E402

LAMBDA = 0.75
TEMPERATURE = 0.05


class Sizes(NamedTuple):
    """Sizes of the measured batches and matrices."""

    # Side of the square matrices whose product gives the device's rate.
    square: int
    # Batches whose results are compared with float64.
    checked: tuple[int, ...]
    # Shapes of V, and shapes of Z for another design, in which cuBLAS computes Z.
    pulls: tuple[tuple[int, int], ...]
    panels: tuple[tuple[int, int], ...]
    # The batch for one sweep alone, and the batches for both sweeps; the most important batch is the last.
    tuned: int
    whole: tuple[int, ...]
    repeats: int


FULL = Sizes(
    square=8192,
    checked=(2048, 1500),
    pulls=((4096, 4096), (5504, 5504), (8192, 8192), (16384, 5504), (11264, 5632)),
    panels=((4096, 8192), (8192, 4096), (8192, 8192)),
    tuned=16384,
    whole=(16384, 32768, 65536),
    repeats=5,
)
MINIATURE = Sizes(32, (48, 35), ((32, 16),), ((16, 32),), 40, (40,), 1)


class Tuner:
    """The rows so far, the time budget, and helpers that all parts use."""

    def __init__(self, fused: Any, options: argparse.Namespace) -> None:
        self.fused = fused
        self.out: Path = options.out
        self.width: int = options.width
        self.budget: float = options.budget
        self.device = torch.device("cpu" if options.dry_run else "cuda")
        self.sizes = MINIATURE if options.dry_run else FULL
        self.begin = time.monotonic()
        self.rows: list[dict[str, Any]] = []
        self.rate = 0.0  # multiplications and additions per second

    def say(self, part: str, **values: Any) -> None:
        """Print a row, and write all rows to the file."""
        row = {"part": part, "second": round(time.monotonic() - self.begin, 1), **values}
        self.rows.append(row)
        self.out.write_text(json.dumps(self.rows, indent=1) + "\n")
        print(f"[{row['second']:5.0f} s] {part:<8}", *(f"{key}={value}" for key, value in values.items()), flush=True)

    def guarded(self, part: str, work: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """Run a part; return None if it fails or if no time is left for it."""
        if time.monotonic() - self.begin > self.budget - 15:
            self.say(part, skipped="no time is left")
            return None
        try:
            return work(self, *arguments, **options)
        # An error of the compiler or the driver is also a result: these constants do not work on this device.
        except Exception as error:
            self.say(part, failed=f"{type(error).__name__}: {str(error)[:300]}")
            try:
                if self.device.type == "cuda":
                    torch.cuda.synchronize()
            # After an illegal memory access nothing else can run in this process.
            except RuntimeError as lost:
                self.say("dead", reason=str(lost)[:300])
                raise SystemExit(1) from lost
            return None

    def milliseconds(self, work: Callable[[], Any], repeats: int | None = None) -> float:
        """Return the median time of one call, after one call that compiles and fills caches."""
        work()
        times = []
        for _ in range(repeats or self.sizes.repeats):
            if self.device.type == "cpu":
                start = time.perf_counter()
                work()
                times.append(1e3 * (time.perf_counter() - start))
                continue
            # Events measure on the device, without the time that Python needs to start the kernels.
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            work()
            end.record()
            torch.cuda.synchronize()
            times.append(begin.elapsed_time(end))
        return statistics.median(times)

    def normal(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        """Draw normal numbers; a GPU multiplies constant numbers faster, because they need less power."""
        return torch.randn(shape, device=self.device, dtype=torch.float32).to(dtype)

    def batch(self, b: int, *, reference: bool, dtype: torch.dtype = torch.bfloat16, spread: bool = False) -> Batch:
        """Draw features of unit norm; with `spread` each anchor has its own temperature."""
        torch.manual_seed(b)

        def unit() -> torch.Tensor:
            return torch.nn.functional.normalize(torch.randn(b, self.width, device=self.device), dim=1).to(dtype)

        t = [torch.full((b,), TEMPERATURE, device=self.device) for _ in range(2)]
        if spread:
            t = [side * (1 + torch.rand(b, device=self.device)) for side in t]
        return Batch(unit(), unit(), (unit(), unit()) if reference else None, LAMBDA, t[0], t[1], None)

    def both_sweeps(self, plan: Any, batch: Batch) -> tuple[Any, Any]:
        """Run both sweeps; each anchor's weights have the sum 1 / (2 b)."""
        sweeps = self.fused.TritonSweeps(plan)
        first = sweeps.sum_negatives(batch)
        weight = torch.full_like(first.log_sum_image, 0.5 / len(first.log_sum_image))
        return first, sweeps.pull_back(batch, first, weight, weight)


def measure_rate(tuner: Tuner) -> None:
    """Measure the library's own product of two square matrices."""
    n = tuner.sizes.square
    a, c = tuner.normal(n, n), tuner.normal(n, n)
    ms = tuner.milliseconds(lambda: a @ c, 20)
    tuner.rate = 2e3 * n**3 / ms
    tuner.say("rate", product=n, teraflops=round(tuner.rate / 1e12, 1))


def measure_pulls(tuner: Tuner) -> None:
    """Measure V E2 and V^T E1 in cuBLAS for several shapes of V."""
    for rows, columns in tuner.sizes.pulls:
        v, features = tuner.normal(rows, columns), tuner.normal(max(rows, columns), tuner.width)
        out = torch.zeros(max(rows, columns), tuner.width, device=tuner.device)
        add = tuner.fused.add_product
        upright = tuner.milliseconds(partial(add, out[:rows], v, features[:columns]), 20)
        transposed = tuner.milliseconds(partial(add, out[:columns], v.T, features[:rows]), 20)
        flops = 2e-9 * rows * columns * tuner.width
        tuner.say("pulls", v=(rows, columns), upright=round(flops / upright), transposed=round(flops / transposed))


def measure_panels(tuner: Tuner) -> None:
    """Measure Z as a float32 panel in cuBLAS, for a possible design that stores Z and reads it in a second pass."""
    if tuner.device.type == "cpu":
        tuner.say("panels", skipped="a CPU has no product of half types into float32")
        return
    for rows, columns in tuner.sizes.panels:
        e = tuner.normal(max(rows, columns), tuner.width)
        z = torch.empty(rows, columns, device=tuner.device)
        add = tuner.fused.add_product
        written = tuner.milliseconds(partial(torch.mm, e[:rows], e[:columns].T, out_dtype=torch.float32), 20)
        added = tuner.milliseconds(partial(add, z, e[:rows], e[:columns].T), 20)
        flops = 2e-9 * rows * columns * tuner.width
        tuner.say("panels", z=(rows, columns), set=round(flops / written), added=round(flops / added))


def check(tuner: Tuner, plan: Any, b: int, *, reference: bool, dtype: torch.dtype, spread: bool) -> None:
    """Compare both sweeps with float64, and two runs with each other."""
    batch = tuner.batch(b, reference=reference, dtype=dtype, spread=spread)
    first, second = tuner.both_sweeps(plan, batch)
    # The formula in float64: Z, then for both directions the log-sum-exp, the mean of d with weights p, and V.
    e1, e2 = batch.image_features.double(), batch.text_features.double()
    z = e1 @ e2.T
    if batch.reference_features is not None:
        z -= LAMBDA * batch.reference_features[0].double() @ batch.reference_features[1].double().T
    off = ~torch.eye(b, dtype=torch.bool, device=z.device)
    expected, v = [], torch.zeros_like(z)
    for side, t in ((z, batch.temperature_image), (z.T, batch.temperature_text)):
        d = ((side - side.diagonal()[:, None]) / t.double()[:, None]).masked_fill(~off, -torch.inf)
        p = torch.softmax(d, dim=1)
        expected.append((torch.logsumexp(d, 1), (p * d.masked_fill(~off, 0.0)).sum(1)))
        v = v.T + p / (2 * b)
    v = v.T
    exact_sums = [expected[0][0], expected[1][0], expected[0][1], expected[1][1]]
    sums = [float((x - exact).abs().max()) for x, exact in zip(first[:4], exact_sums, strict=True)]
    exact_pulls = (v @ e2, v.T @ e1)
    pulls = [float((x - exact).norm() / exact.norm()) for x, exact in zip(second, exact_pulls, strict=True)]
    again = tuner.both_sweeps(plan, batch)
    same = all(torch.equal(x, y) for x, y in zip((*first[:4], *second), (*again[0][:4], *again[1]), strict=True))
    good = max(sums) <= 2e-5 and max(pulls) <= 6e-3 and same
    errors = [f"{error:.1e}" for error in (*sums, *pulls)]
    tuner.say(
        "check", b=b, reference=reference, dtype=str(dtype), spread=spread, good=good, same_bits=same, errors=errors
    )


def check_logits(tuner: Tuner, plans: list[Any]) -> None:
    """Check that tiles of all shapes give the same bits of z, by comparing the peaks, which are entries of z."""
    batch = tuner.batch(tuner.sizes.checked[0], reference=True)
    peaks = [tuner.fused.TritonSweeps(plan).sum_negatives(batch).saved[::2] for plan in plans]
    same = [all(torch.equal(x, y) for x, y in zip(peaks[0], other, strict=True)) for other in peaks[1:]]
    tuner.say("logits", tiles=[tuple(plan.sums) for plan in plans], same_bits_as_the_first=same)


def measure_whole(tuner: Tuner, plan: Any, b: int, *, reference: bool) -> None:
    """Measure both sweeps: time, rate divided by the device's own rate, memory beyond the inputs."""
    batch = tuner.batch(b, reference=reference)
    values: dict[str, Any] = {}
    if tuner.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        tuner.both_sweeps(plan, batch)
        torch.cuda.synchronize()
        values["megabytes"] = round((torch.cuda.max_memory_allocated() - before) / 1e6)
    ms = tuner.milliseconds(lambda: tuner.both_sweeps(plan, batch))
    products = 6 if reference else 4
    # Each product has b x b x width multiplications and additions; 2e3 because ms are milliseconds.
    rate = 2e3 * products * b * b * tuner.width / ms
    share = round(rate / tuner.rate, 3) if tuner.rate else None
    tuner.say("whole", b=b, reference=reference, ms=round(ms, 2), share=share, products=products, **values)


def measure_sweep(tuner: Tuner, plan: Any, which: str) -> float:
    """Measure one sweep alone; the second sweep is measured without the products of V with features."""
    b = tuner.sizes.tuned
    batch = tuner.batch(b, reference=True)
    sweeps = tuner.fused.TritonSweeps(plan)
    if which == "sums":
        ms = tuner.milliseconds(lambda: sweeps.sum_negatives(batch))
    else:
        first = sweeps.sum_negatives(batch)
        weight = torch.full_like(first.log_sum_image, 0.5 / b)
        # Without the products V E2 and V^T E1 the time is that of the kernel alone.
        pull, tuner.fused.add_product = tuner.fused.add_product, lambda *_: None
        try:
            ms = tuner.milliseconds(lambda: sweeps.pull_back(batch, first, weight, weight))
        finally:
            tuner.fused.add_product = pull
    blocks = tuple(getattr(plan, which))
    teraflops = round(4e-9 * b * b * tuner.width / ms)
    tuner.say("sweep", which=which, blocks=blocks, shared=plan.shared, ms=round(ms, 3), teraflops=teraflops)
    return ms


def run(tuner: Tuner) -> None:
    """Run all parts in the order of the module's docstring."""
    fused, sizes = tuner.fused, tuner.sizes
    plan = fused.plan_for(torch.bfloat16, tuner.device)
    blocks = fused.Blocks
    # A tile's rows, columns and depth, then the numbers of warps and of stages of the pipeline.
    tiles = [
        blocks(256, 128, 64, 8, 3),
        blocks(128, 128, 64, 8, 3),
        blocks(128, 128, 64, 4, 3),
        blocks(256, 128, 64, 8, 4),
        blocks(128, 256, 64, 8, 3),
    ]
    if tuner.device.type == "cpu":
        tiles = [blocks(16, 16, 16, 1, 1), blocks(16, 32, 16, 1, 1)]
        plan = plan._replace(sums=tiles[0], weights=tiles[0], masked=tiles[0], panel=32, rows=32, columns=32)
    tuner.guarded("rate", measure_rate)
    for b, reference, dtype, spread in (
        (sizes.checked[0], True, torch.bfloat16, False),
        (sizes.checked[1], False, torch.bfloat16, True),
        (sizes.checked[1], True, torch.float16, False),
    ):
        own = plan._replace(buffer=dtype)
        tuner.guarded("check", check, own, b, reference=reference, dtype=dtype, spread=spread)
    tuner.guarded("logits", check_logits, [plan._replace(sums=tile) for tile in tiles])
    tuner.guarded("pulls", measure_pulls)
    tuner.guarded("panels", measure_panels)
    for reference in (True, False):
        tuner.guarded("whole", measure_whole, plan, sizes.whole[-1], reference=reference)

    # Each sweep is tuned alone, because the best tiles of one sweep do not depend on the other.
    best = plan
    for which, shared in (("sums", False), ("weights", True), ("weights", False)):
        times = {}
        for tile in tiles:
            ms = tuner.guarded("sweep", measure_sweep, plan._replace(**{which: tile, "shared": shared}), which)
            if ms is not None:
                times[tile] = ms
        # The third variant (two exponentials per pair) is measured but not tuned, because few batches need it.
        if times and (which, shared) != ("weights", False):
            best = best._replace(**{which: min(times, key=times.__getitem__)})
    tuner.say("best", plan=str(best))
    for tried in (best, best._replace(descriptors=not best.descriptors)):
        tuner.guarded("check", check, tried, sizes.checked[1], reference=True, dtype=torch.bfloat16, spread=False)
    for b in sizes.whole:
        for reference in (True, False):
            tuner.guarded("whole", measure_whole, best, b, reference=reference)
    # One constant of the best plan is changed at a time, to measure the effect of this constant.
    for change in ({"shared": False}, {"descriptors": not best.descriptors}, {"columns": 8192}, {"rows": 8192}):
        tuner.say("change", **change)
        tuner.guarded("whole", measure_whole, best._replace(**change), sizes.whole[-1], reference=True)


def main() -> None:
    """Read the arguments, and run the program if there is a GPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("tune.json"), help="file for the rows")
    parser.add_argument("--budget", type=float, default=480.0, help="time limit in seconds")
    parser.add_argument("--width", type=int, default=768, help="width of the features and of the reference features")
    parser.add_argument("--dry-run", action="store_true", help="all parts in miniature on a CPU, in the interpreter")
    options = parser.parse_args()
    try:
        from drrho_torch import fused
    except ImportError as error:
        parser.exit(1, f"not measured: {error}\n")
    if options.dry_run:
        if not fused.interpreted():
            parser.exit(1, "not measured: --dry-run needs the environment variable TRITON_INTERPRET=1\n")
        options.width = min(options.width, 32)
    elif not torch.cuda.is_available():
        parser.exit(1, "not measured: torch sees no GPU\n")
    tuner = Tuner(fused, options)
    name = "CPU" if options.dry_run else torch.cuda.get_device_name()
    tuner.say("device", name=name, torch=torch.__version__, triton=fused.triton.__version__)
    run(tuner)


if __name__ == "__main__":
    main()
