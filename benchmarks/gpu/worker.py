"""What runs in a section's own process: it measures case by case and tells each row as soon as it has it."""

from __future__ import annotations

import gc
import importlib.util
import json
import math
import os
import re
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from benchmarks.gpu.libraries import GAMMA, TEMPERATURE, Absent, Cupy, Library, Step, open_library, require
from benchmarks.gpu.plan import HALF, Case
from benchmarks.gpu.processes import FAILED, LEFT_OUT, NO_MEMORY, OK, Row

SQUARE, DRY_SQUARE = 8192, 256
AGREEMENT = {True: ((64, 32, True), (48, 32, False)), False: ((2048, 768, True), (1500, 768, False))}
"""Batches that are compared with NumPy in float64: b, d, and whether there is a reference. True: in a dry run."""

DENSE_MATRICES = 12
"""How many float32 matrices of b x b autograd holds, about; where they do not fit nothing is tried."""

Report = Callable[[str, Any], None]


def main(part: str, cases: Sequence[Case], descriptor: int, *, dry_run: bool) -> None:
    """Measure cases of one part and report to a file descriptor."""
    os.set_inheritable(descriptor, False)
    with os.fdopen(descriptor, "w", encoding="utf-8", buffering=1) as pipe:

        def report(kind: str, content: Any) -> None:
            pipe.write(json.dumps({kind: content}) + "\n")

        try:
            measure = PARTS[part](cases[0], report, dry_run)
        except Absent as error:
            report("absent", str(error))
            return
        for number, case in enumerate(cases):
            report("begin", number)
            row = measured(measure, case)
            report("row", row)
            if row["status"] not in (OK, LEFT_OUT) and not healthy(getattr(measure, "library", None)):
                return  # the device has lost its context: the next case gets a fresh process
            gc.collect()


def measured(measure: Callable[[Case], Row], case: Case) -> Row:
    """Return a case's row, whatever it raises."""
    try:
        return {"status": OK, **measure(case)}
    except Absent as error:
        return {"status": LEFT_OUT, "reason": str(error)}
    except Exception as error:
        told = f"{type(error).__name__}: {' '.join(str(error).split())}"
        traceback.print_exc()
        status = NO_MEMORY if is_out_of_memory(error) else FAILED
        return {"status": status, "reason": told[:500], "output": "\n".join(traceback.format_exc().splitlines()[-25:])}


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether memory was the reason, in the words of any of the libraries."""
    words = f"{type(error).__name__} {error}".lower().replace("_", " ")
    return isinstance(error, MemoryError) or any(
        sign in words for sign in ("out of memory", "outofmemory", "resource exhausted", "failed to allocate")
    )


# ---------------------------------------------------------------------------------------------------------------------
# The kit: is it right?
# ---------------------------------------------------------------------------------------------------------------------


class Kit:
    """The conformance kit on a device, and half types against NumPy in float64."""

    def __init__(self, first: Case, report: Report, dry_run: bool) -> None:
        self.library = open_library(first["library"], dry_run=dry_run)
        self.report, self.dry_run = report, dry_run
        if self.library.name == "jax":
            import jax

            jax.config.update("jax_enable_x64", True)  # type: ignore[no-untyped-call]  # the kit asks for float64, too

    def __call__(self, case: Case) -> Row:
        facts = self.library.facts()
        if case["engine"] == "fused" and (reason := self.library.no_kernels()) is not None:
            raise Absent(reason)
        if case["check"] == "half types":
            return facts | self.half_types(case["engine"])
        return facts | self.conformance(case["engine"], every="all" in case["check"])

    def conformance(self, engine: str, *, every: bool) -> Row:
        """Run the kit function by function, so that a time limit leaves what was found until then."""
        import drrho_reference.conformance as kit

        import drrho_core

        own = {name: getattr(drrho_core, name) for name in drrho_core.__all__}
        functions = list(dict.fromkeys(problem.function for problem in kit.ordered_problems()))
        wanted = [name for name in functions if (name == "contrastive_step") != every and name in own]
        if self.dry_run and every:
            wanted = ["worst_case", "unimodal_contrastive_step", "info_nce"]
        others = {name: value for name, value in own.items() if name not in functions}  # the ambiguity sets
        dtypes = ["float32"] if engine == "fused" or self.dry_run else ["float64", "float32"]  # kernels have no float64
        found: Row = {"functions": 0, "of": len(wanted), "passed": 0, "fields": 0, "worst_share_of_bound": 0.0}
        wrong: list[str] = []
        for name in wanted:
            with self.kernels(engine):
                checked = kit.check(
                    others | {name: own[name]}, xp=self.library.xp, device=self.library.kit_device, dtypes=dtypes
                )
            fields = [field for case in checked.cases for field in case.fields]
            found["functions"] += 1
            found["fields"] += len(fields)
            found["passed"] += sum(field.verdict == "passed" for field in fields)
            shares = [field.relative / field.bound for field in fields if field.relative is not None]
            found["worst_share_of_bound"] = _figure(max([found["worst_share_of_bound"] or 0.0, *shares]))
            wrong += [
                f"{name}, {case.name}, {case.dtype}: {field.name} {field.verdict} {field.note}".strip()
                for case in checked.cases
                for field in case.fields
                if field.verdict != "passed"
            ]
            if wrong:
                found["wrong"] = wrong[:20]
            self.report("progress", found)
        if found["passed"] != found["fields"]:
            return found | {"status": FAILED, "reason": f"{len(wrong)} fields have not passed, the first: {wrong[0]}"}
        return found

    @contextmanager
    def kernels(self, engine: str) -> Iterator[None]:
        from drrho_core import fused_kernels

        with fused_kernels("always" if engine == "fused" else "never"):
            yield

    def half_types(self, engine: str) -> Row:
        """Compare a step on half types with NumPy's float64 on the same numbers, and with itself."""
        from drrho_core import contrastive_step

        name = HALF[self.library.name]
        unit = {"bfloat16": 2.0**-8, "float16": 2.0**-11}[name]
        # V is rounded (interpreters cut it off: 2 units), then the gradient, at most twice as large: 2 more.
        # Tensor cores add with a few bits less than float32 has: 5e-6 where nothing but the sums are rounded.
        logarithm = 5e-6 if self.dry_run else 2e-5
        bounds = {"gradient": 4 * unit, "state": logarithm, "loss": logarithm}
        worst, reasons = dict.fromkeys(bounds, 0.0), []
        for b, d, has_reference in AGREEMENT[self.dry_run]:
            rng = np.random.default_rng(b)
            drawn = [rng.standard_normal((b, d)) for _ in range(4)]
            given = [self.library.given(x / np.linalg.norm(x, axis=1, keepdims=True), name) for x in drawn]
            exact = [self.library.numpy(x) for x in given]
            unseen = np.full(b, -np.inf)
            state = self.library.given(unseen, "float32")

            def step(arrays: list[Any], state: Any, has_reference: bool = has_reference) -> Any:
                reference = (arrays[2], arrays[3]) if has_reference else None
                return contrastive_step(
                    arrays[0], arrays[1], state, state, temperature=TEMPERATURE, reference_features=reference
                )

            wanted = step(exact, unseen)
            with self.kernels(engine):
                one, other = step(given, state), step(given, state)
            largest = largest_sum_of_weights(exact if has_reference else exact[:2])
            for field, kind in FIELDS.items():
                got, right = self.library.numpy(getattr(one, field)), np.asarray(getattr(wanted, field))
                size = np.maximum(1.0, np.abs(right))
                if kind == "gradient":
                    size = largest / (2 * b) * max(float(np.max(np.abs(x))) for x in exact[:2])
                worst[kind] = max(worst[kind], float(np.max(np.abs(got - right) / size)))  # max passes over nan
                if not np.all(np.isfinite(got)):
                    reasons.append(f"{field} is not finite")
                if not np.array_equal(got, self.library.numpy(getattr(other, field)), equal_nan=True):
                    reasons.append(f"{field} differs from call to call")
        reasons += [
            f"{kind} is off by {worst[kind]:.1e}, allowed {bound:.1e}"
            for kind, bound in bounds.items()
            if not worst[kind] <= bound
        ]
        row: Row = {f"{kind}_error": _figure(value) for kind, value in worst.items()}
        return row | ({"status": FAILED, "reason": "; ".join(reasons)} if reasons else {})


FIELDS = {"image_gradient": "gradient", "text_gradient": "gradient", "log_inner_image": "state",
          "log_inner_text": "state", "loss": "loss"}  # fmt: skip


def largest_sum_of_weights(features: Sequence[np.ndarray]) -> float:
    """Return the largest sum over a row or a column of V, at gamma 1: what a gradient's entries are made of."""
    z = features[0] @ features[1].T
    if len(features) > 2:
        z = z - features[2] @ features[3].T
    positive = np.diagonal(z).copy()
    np.fill_diagonal(z, -np.inf)
    v = np.zeros_like(z)
    for axis, positives in ((1, positive[:, None]), (0, positive[None, :])):
        exponents = (z - positives) / TEMPERATURE
        weights = np.exp(exponents - np.max(exponents, axis=axis, keepdims=True))
        v += weights / np.sum(weights, axis=axis, keepdims=True)
    return float(max(np.max(np.sum(v, axis=axis)) for axis in (0, 1)))


# ---------------------------------------------------------------------------------------------------------------------
# The sweeps: how fast?
# ---------------------------------------------------------------------------------------------------------------------


class Sweeps:
    """`contrastive_step` on half types: kernels, the plain core, and autograd through b x b matrices."""

    def __init__(self, first: Case, report: Report, dry_run: bool) -> None:
        self.library = open_library(first["library"], dry_run=dry_run)
        self.dry_run = dry_run
        self._rate: float | None = None
        self._arrays: tuple[int, tuple[Any, ...]] | None = None

    def __call__(self, case: Case) -> Row:
        if case["engine"] == "product":
            return self.library.facts() | {"square": self.square, "product_tflops": _figure(self.rate / 1e12)}
        b, d, engine = case["b"], case["d"], case["engine"]
        if engine == "fused" and (reason := self.library.no_kernels()) is not None:
            raise Absent(reason)
        if engine == "dense":
            needed, free = DENSE_MATRICES * 4e-9 * b * b, self.library.free_gigabytes()
            if needed > free:
                raise Absent(f"b x b matrices take about {needed:.0f} GB, {free:.0f} GB are free")
        rate = self.rate
        try:
            return figures(
                self.library,
                self.step(engine, case["reference"]),
                self.arrays(b, d),
                rate=rate,
                work=2.0 * b * b * d,
                unavoidable=4 if case["reference"] else 3,
                made=6 if case["reference"] else 4,
                quick=self.dry_run,
            )
        finally:
            self.library.forget()

    @property
    def square(self) -> int:
        return DRY_SQUARE if self.dry_run else SQUARE

    @property
    def rate(self) -> float:
        """The library's own product, of random numbers: constant ones draw less power and run faster."""
        if self._rate is None:
            self._rate = product_rate(self.library, self.square)
        return self._rate

    def arrays(self, b: int, d: int) -> tuple[Any, ...]:
        """Features of unit norm on the device, and a state that was visited; the last ones are kept."""
        if self._arrays is None or self._arrays[0] != b:
            self._arrays = None
            library = self.library
            features = [library.unit(b, d, seed, library.half) for seed in range(4)]
            state = library.given(np.random.default_rng(b).standard_normal(b), "float32")
            self._arrays = (b, (*features, state))
        return self._arrays[1]

    def step(self, engine: str, has_reference: bool) -> Step:
        """Return what is timed."""
        from drrho_core import contrastive_step, fused_kernels

        def ours(images: Any, texts: Any, one: Any, other: Any, state: Any) -> Any:
            with fused_kernels("always" if engine == "fused" else "never"):
                return contrastive_step(
                    images,
                    texts,
                    state,
                    state,
                    temperature=TEMPERATURE,
                    gamma=GAMMA,
                    reference_features=(one, other) if has_reference else None,
                )

        def dense(images: Any, texts: Any, one: Any, other: Any, state: Any) -> Any:
            assert not isinstance(self.library, Cupy)  # it has no autograd, and no such case
            return self.library.dense(images, texts, (one, other) if has_reference else None, state)

        return dense if engine == "dense" else ours


def product_rate(library: Library, side: int) -> float:
    """Return the rate of a product of two square matrices, in floating-point operations a second."""
    left, right = (library.unit(side, side, seed, library.half) for seed in (10, 11))
    product = library.prepare(lambda a, c: a @ c, (left, right))
    return 2.0 * side**3 / statistics.median(times(library, product, (left, right), most=20))


def times(library: Library, step: Step, arrays: tuple[Any, ...], *, most: int, seconds: float = 1.0) -> list[float]:
    """Return how long calls take, their results included, after some that compile and let the clocks rise."""
    begin, calls = time.perf_counter(), 0
    while calls < 2 or (calls < 50 and time.perf_counter() - begin < (0.0 if library.dry_run else 0.3)):
        library.wait(step(*arrays))
        calls += 1
    took: list[float] = []
    while len(took) < 3 or (len(took) < most and sum(took) < seconds):
        begin = time.perf_counter()
        library.wait(step(*arrays))
        took.append(time.perf_counter() - begin)
    return took


def figures(
    library: Library,
    step: Step,
    arrays: tuple[Any, ...],
    *,
    rate: float,
    work: float,
    unavoidable: int,
    made: int,
    quick: bool,
) -> Row:
    """Time a step and count its products, each of `work` operations, twice."""
    prepared = library.prepare(step, arrays)
    took = times(library, prepared, arrays, most=3 if quick else 20)
    middle = statistics.median(took)
    row: Row = {"ms": _figure(1e3 * middle), "ms_fastest": _figure(1e3 * min(took)), "calls": len(took)}
    for name, products in (("unavoidable", unavoidable), ("made", made)):
        row[f"products_{name}"] = products
        row[f"tflops_{name}"] = _figure(products * work / middle / 1e12)
        row[f"share_{name}"] = _figure(products * work / middle / rate)
    memory = library.extra_megabytes(prepared, arrays)
    return row | ({} if memory is None else {"extra_mb": _figure(memory)})


class Peers:
    """Two other programs' kernels, forward and backward, on the same features; their losses differ from ours."""

    MADE: ClassVar = {"siglip-kernel": 3, "memeff": 5}  # memeff makes the logits once forward and twice backward

    def __init__(self, first: Case, report: Report, dry_run: bool) -> None:
        require(first["library"].replace("-", "_"), first["library"])
        if dry_run:
            raise Absent("it runs on a GPU only")
        self.library = open_library("torch", dry_run=dry_run)
        self.sweeps = Sweeps({"library": "torch"}, report, dry_run)

    def __call__(self, case: Case) -> Row:
        b, d = case["b"], case["d"]
        try:
            images, texts, *_ = self.sweeps.arrays(b, d)
            inputs = tuple(x.detach().requires_grad_() for x in (images, texts))
            return figures(
                self.library,
                self.step(case["library"]),
                inputs,
                rate=self.sweeps.rate,
                work=2.0 * b * b * d,
                unavoidable=3,
                made=self.MADE[case["library"]],
                quick=False,
            )
        finally:
            self.library.forget()

    def step(self, peer: str) -> Step:
        """Return a peer's loss with its gradients, its options as its page recommends them for half types."""
        import torch

        if peer == "siglip-kernel":
            from siglip_kernel import fused_siglip_loss

            scale = torch.tensor(math.log(10.0), device="cuda", requires_grad=True)
            bias = torch.tensor(-10.0, device="cuda", requires_grad=True)

            def siglip(images: Any, texts: Any) -> Any:
                return torch.autograd.grad(fused_siglip_loss(images, texts, scale, bias), (images, texts, scale, bias))

            return siglip
        from memeff import MemoryEfficientCLIPLoss

        loss = MemoryEfficientCLIPLoss(temperature=TEMPERATURE, normalized_inputs=True, stable=False)

        def clip(images: Any, texts: Any) -> Any:
            return torch.autograd.grad(loss(images, texts), (images, texts))

        return clip


# ---------------------------------------------------------------------------------------------------------------------
# The tests and the demo
# ---------------------------------------------------------------------------------------------------------------------


class Tests:
    """Tests in this process, or in some beside it where pytest-xdist is installed."""

    CHOICE: ClassVar = {
        "tests of the kernels": ["tests/backends/test_fused_torch.py", "tests/backends/test_fused_jax.py",
                                 "tests/backends/test_fused_cupy.py", "tests/core/test_fused.py",
                                 "-m", "not slow", "-k", "not stand-in and not tuner and not compiles"],
        "tests marked gpu": ["-m", "gpu", "tests/core", "tests/backends"],
    }  # fmt: skip
    DRY_CHOICE: ClassVar = {
        "tests of the kernels": ["tests/backends/test_fused_cupy.py", "tests/core/test_fused.py"],
        "tests marked gpu": ["-m", "gpu", "tests/backends/test_fused_cupy.py", "tests/backends/test_estimators.py"],
    }

    def __init__(self, first: Case, report: Report, dry_run: bool) -> None:
        require("pytest")
        require("hypothesis")
        self.report, self.dry_run = report, dry_run

    def __call__(self, case: Case) -> Row:
        import pytest

        found: Row = {"passed": 0, "failed": 0, "skipped": 0, "not_collected": 0, "wrong": []}
        reasons: dict[str, int] = {}
        told = time.monotonic()

        class Plugin:
            def pytest_runtest_logreport(plugin, report: Any) -> None:  # noqa: N805
                nonlocal told
                if report.outcome == "passed" and report.when != "call":
                    return
                found[report.outcome] += 1
                if report.failed:
                    found["wrong"] = [*found["wrong"], report.nodeid][:20]
                if report.skipped and isinstance(report.longrepr, tuple):
                    reason = str(report.longrepr[2]).removeprefix("Skipped: ")
                    reasons[reason] = reasons.get(reason, 0) + 1
                if time.monotonic() > told + 0.5:
                    told = time.monotonic()
                    self.report("progress", found)

            def pytest_collectreport(plugin, report: Any) -> None:  # noqa: N805
                if report.failed:
                    lacking = re.findall(r"No module named '(\w+)", str(report.longrepr))
                    if lacking and importlib.util.find_spec(lacking[-1]) is None:
                        found["lacking"] = sorted({*found.get("lacking", []), lacking[-1]})
                        return
                    found["not_collected"] += 1
                    found["wrong"] = [*found["wrong"], f"{report.nodeid} (not collected)"][:20]

        chosen = (self.DRY_CHOICE if self.dry_run else self.CHOICE)[case["check"]]
        options = ["-q", "--color=no", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
        if importlib.util.find_spec("pytest_benchmark") is not None:
            options += ["-p", "no:benchmark"]  # beside several workers it warns, and a warning is an error here
        if importlib.util.find_spec("xdist") is not None:
            options += ["-n", "0" if self.dry_run else str(min(8, os.cpu_count() or 1))]
        pytest.main([*options, *chosen], plugins=[Plugin()])
        if reasons:
            found["skipped_most_for"] = max(reasons, key=lambda reason: reasons[reason])
        if found["failed"] or found["not_collected"]:
            count = found["failed"] + found["not_collected"]
            return found | {"status": FAILED, "reason": f"{count} failed, the first: {found['wrong'][0]}"}
        if not found["passed"] + found["skipped"]:
            return found | {"status": FAILED, "reason": "no test was found"}
        if not found["passed"]:
            return found | {"status": LEFT_OUT, "reason": f"all skipped: {found.get('skipped_most_for', 'no reason')}"}
        return found


class Demo:
    """The demo, one seed: does a reference model still help where the steps run on a GPU?"""

    def __init__(self, first: Case, report: Report, dry_run: bool) -> None:
        require("safetensors")
        require("rich")
        self.library = open_library(first["library"], dry_run=dry_run)
        self.dry_run = dry_run

    def __call__(self, case: Case) -> Row:
        from drrho_clip.demo import run_demo

        assert not isinstance(self.library, Cupy)  # no such case: its encoders are for the digits
        # In a dry run the digits: JAX takes a minute to compile the convolutions for the scenes on a CPU.
        data = "digits" if self.dry_run and importlib.util.find_spec("sklearn") is not None else "scenes"
        begin = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            rows = run_demo(
                Path(folder) / "demo", backend=self.library.backend(), data=data, quick=self.dry_run, quiet=True
            )
        row: Row = {"data": data, "seconds": _figure(time.perf_counter() - begin)}
        row["retrieval_r1"] = {one["method"]: _figure(one["metrics"]["retrieval_r1"]) for one in rows}
        return row


def _figure(value: float) -> float | None:
    """Round to what is worth keeping; JSON has no nan."""
    value = float(value)
    return float(f"{value:.4g}") if math.isfinite(value) else None


PARTS: dict[str, Any] = {"kit": Kit, "sweeps": Sweeps, "peers": Peers, "tests": Tests, "demo": Demo}
"""What measures a part: built from its first case, a report and whether it is a dry run, then called case by case."""


def healthy(library: Library | None) -> bool:
    """Try the device once more after something was raised: some errors stay until the process ends."""
    if library is None:
        return True
    try:
        library.forget()
        library.wait(library.unit(8, 8, 0, "float32"))
    except Exception:
        traceback.print_exc(file=sys.stdout)
        return False
    return True
