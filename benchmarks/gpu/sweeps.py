"""Measure `contrastive_step` with GPU kernels and without, dense autograd, and the kernels of two other programs.

The kernels make two sweeps: two passes over all tiles of the b x b matrix. The plain core is `contrastive_step` without
kernels. Dense autograd differentiates the same formula through b x b matrices.
"""

from __future__ import annotations

import math
import statistics
import time
from typing import Any, ClassVar

import numpy as np

from benchmarks.gpu.libraries import GAMMA, TEMPERATURE, Absent, Cupy, Library, Step, open_library, require
from benchmarks.gpu.plan import Case
from benchmarks.gpu.processes import Report, Row, rounded

SQUARE, DRY_SQUARE = 8192, 256
DENSE_MATRICES = 12
"""Approximate number of b x b float32 matrices that autograd holds; batches that would not fit are skipped."""


class Sweeps:
    """`contrastive_step` on half types: kernels, the plain core, and autograd through b x b matrices."""

    def __init__(self, first: Case, report: Report, dry_run: bool) -> None:
        self.library = open_library(first["library"], dry_run=dry_run)
        self.dry_run = dry_run
        self._rate: float | None = None
        self._arrays: tuple[int, tuple[Any, ...]] | None = None

    def __call__(self, case: Case) -> Row:
        if case["engine"] == "product":
            return self.library.facts() | {"square": self.square, "product_tflops": rounded(self.rate / 1e12)}
        b, d, engine = case["b"], case["d"], case["engine"]
        if engine == "fused" and (reason := self.library.no_kernels()) is not None:
            raise Absent(reason)
        # After an out-of-memory error this process might lose the device, so the memory is estimated first.
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
        """Rate of the library's own product of random matrices. Constant matrices need less power and run faster."""
        # Measured once per process.
        if self._rate is None:
            self._rate = product_rate(self.library, self.square)
        return self._rate

    def arrays(self, b: int, d: int) -> tuple[Any, ...]:
        """Return features of unit norm and a state whose samples were all visited; keep the arrays of the last b."""
        if self._arrays is None or self._arrays[0] != b:
            # The old arrays are freed before the new arrays are made, because both might not fit into memory.
            self._arrays = None
            library = self.library
            features = [library.unit(b, d, seed, library.half) for seed in range(4)]
            state = library.given(np.random.default_rng(b).standard_normal(b), "float32")
            self._arrays = (b, (*features, state))
        return self._arrays[1]

    def step(self, engine: str, has_reference: bool) -> Step:
        """Return the function that is timed."""
        from drrho_core import contrastive_step, fused_kernels

        def ours(images: Any, texts: Any, reference_images: Any, reference_texts: Any, state: Any) -> Any:
            with fused_kernels("always" if engine == "fused" else "never"):
                return contrastive_step(
                    images,
                    texts,
                    state,
                    state,
                    temperature=TEMPERATURE,
                    gamma=GAMMA,
                    reference_features=(reference_images, reference_texts) if has_reference else None,
                )

        def dense(images: Any, texts: Any, reference_images: Any, reference_texts: Any, state: Any) -> Any:
            # CuPy has no autograd, so the plan has no such case.
            assert not isinstance(self.library, Cupy)
            reference = (reference_images, reference_texts) if has_reference else None
            return self.library.dense(images, texts, reference, state)

        return dense if engine == "dense" else ours


def product_rate(library: Library, side: int) -> float:
    """Return the rate of a product of two square matrices, in floating-point operations a second."""
    left, right = (library.unit(side, side, seed, library.half) for seed in (10, 11))
    product = library.prepare(lambda a, c: a @ c, (left, right))
    return 2.0 * side**3 / statistics.median(times(library, product, (left, right), most=20))


def times(library: Library, step: Step, arrays: tuple[Any, ...], *, most: int, seconds: float = 1.0) -> list[float]:
    """Return the seconds of calls until their results are computed, after calls that compile and warm up the device."""
    # The clock rate of a GPU rises under load, so the device is warmed up for 0.3 s.
    begin, calls = time.perf_counter(), 0
    while calls < 2 or (calls < 50 and time.perf_counter() - begin < (0.0 if library.dry_run else 0.3)):
        library.wait(step(*arrays))
        calls += 1
    # At least 3 calls, then until `most` calls or `seconds` are reached.
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
    """Time a step and return the rates of its products, counted in two ways; a product has `work` operations.

    `unavoidable` products are those that every method needs, `made` those that this step computes.
    """
    prepared = library.prepare(step, arrays)
    took = times(library, prepared, arrays, most=3 if quick else 20)
    middle = statistics.median(took)
    row: Row = {"ms": rounded(1e3 * middle), "ms_fastest": rounded(1e3 * min(took)), "calls": len(took)}
    for name, products in (("unavoidable", unavoidable), ("made", made)):
        row[f"products_{name}"] = products
        row[f"tflops_{name}"] = rounded(products * work / middle / 1e12)
        row[f"share_{name}"] = rounded(products * work / middle / rate)
    memory = library.extra_megabytes(prepared, arrays)
    return row | ({} if memory is None else {"extra_mb": rounded(memory)})


class Peers:
    """Measure the kernels of two other programs, forward and backward, on the same features.

    Their losses differ from ours.
    """

    # Numbers of products; memeff computes the logits once in the forward pass and twice in the backward pass.
    MADE: ClassVar = {"siglip-kernel": 3, "memeff": 5}

    def __init__(self, first: Case, report: Report, dry_run: bool) -> None:
        require(first["library"].replace("-", "_"), first["library"])
        if dry_run:
            raise Absent("it runs on a GPU only")
        self.library = open_library("torch", dry_run=dry_run)
        self.sweeps = Sweeps({"library": "torch"}, report, dry_run)

    def __call__(self, case: Case) -> Row:
        b, d = case["b"], case["d"]
        # Peers get the features of the sweeps, but no reference features, because their losses have no reference model.
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
        """Return a peer's loss with gradients; the options are those that the peer's page recommends for half types."""
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
