"""What the fused kernels reach on a GPU: time, share of the device's matrix-product rate, and memory.

    python benchmarks/fused.py [--library torch --library jax --library cupy] [--batch 4096 --batch 32768] [--check]

Per library and batch: both sweeps with reference features as wide as the learner's (512), bfloat16, float16 where the
library has no bfloat16. `share` is 4 products of b x b x d (two logits, two gradients: what no method can avoid) at the
rate of the library's own product of 8192 x 8192 x 8192, over the time measured; the kernels make 6. `memory` is what is
held at the peak beyond the inputs. Times are medians. With `--check`, a batch of 2,048 is first compared with NumPy in
float64. Without a GPU each line says so, and nothing is measured.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from drrho_core._fused import Batch

WIDTH = 512
SQUARE = 8192
CHECKED = 2048


class Torch:
    dtype = "bfloat16"

    def __init__(self) -> None:
        import torch

        if not torch.cuda.is_available():
            raise RuntimeError("torch sees no GPU")
        from drrho_torch.fused import TritonSweeps

        self._torch, self.sweeps, self.device = torch, TritonSweeps(), torch.cuda.get_device_name()

    def array(self, values: np.ndarray, *, half: bool) -> Any:
        dtype = self._torch.bfloat16 if half else self._torch.float32
        return self._torch.tensor(values, device="cuda").to(dtype)

    def wait(self, _: Any) -> None:
        self._torch.cuda.synchronize()

    def memory(self, work: Callable[[], Any]) -> float:
        self._torch.cuda.empty_cache()
        self._torch.cuda.reset_peak_memory_stats()
        before = self._torch.cuda.memory_allocated()
        self.wait(work())
        return float(self._torch.cuda.max_memory_allocated() - before)

    def numpy(self, x: Any) -> np.ndarray:
        return x.double().cpu().numpy()


class Jax:
    dtype = "bfloat16"

    def __init__(self) -> None:
        import jax

        if jax.default_backend() != "gpu":
            raise RuntimeError("JAX sees no GPU")
        from drrho_jax.fused import PallasSweeps

        self._jax, self.sweeps, self.device = jax, PallasSweeps(), jax.devices()[0].device_kind

    def array(self, values: np.ndarray, *, half: bool) -> Any:
        return self._jax.numpy.asarray(values, dtype="bfloat16" if half else "float32")

    def wait(self, result: Any) -> None:
        self._jax.block_until_ready(result)

    def memory(self, work: Callable[[], Any]) -> float:
        """The peak since the process began: right for batches that grow."""
        device = self._jax.devices()[0]
        before = device.memory_stats()["bytes_in_use"]
        self.wait(work())
        return float(device.memory_stats()["peak_bytes_in_use"] - before)

    def numpy(self, x: Any) -> np.ndarray:
        return np.asarray(x, dtype=np.float64)


class Cupy:
    dtype = "float16"

    def __init__(self) -> None:
        import cupy
        from cupy_backends.cuda.libs import cublas

        try:
            cupy.cuda.runtime.getDeviceCount()
        except cupy.cuda.runtime.CUDARuntimeError as error:
            raise RuntimeError("CuPy sees no GPU") from error
        from drrho_cupy.fused import CupySweeps

        self._cupy, self.sweeps = cupy, CupySweeps(cupy, cublas)
        self.device = cupy.cuda.runtime.getDeviceProperties(0)["name"].decode()

    def array(self, values: np.ndarray, *, half: bool) -> Any:
        return self._cupy.asarray(values, dtype="float16" if half else "float32")

    def wait(self, _: Any) -> None:
        self._cupy.cuda.Device().synchronize()

    def memory(self, work: Callable[[], Any]) -> float:
        pool = self._cupy.get_default_memory_pool()
        pool.free_all_blocks()
        before = pool.total_bytes()
        self.wait(work())
        return float(pool.total_bytes() - before)

    def numpy(self, x: Any) -> np.ndarray:
        return self._cupy.asnumpy(x).astype(np.float64)


LIBRARIES = {"torch": Torch, "jax": Jax, "cupy": Cupy}


def draw(library: Any, b: int) -> Batch:
    rng = np.random.default_rng(b)

    def unit() -> Any:
        features = rng.standard_normal((b, WIDTH), dtype=np.float32)
        return library.array(features / np.linalg.norm(features, axis=1, keepdims=True), half=True)

    temperatures = [library.array(np.full(b, 0.05, dtype=np.float32), half=False) for _ in range(2)]
    return Batch(unit(), unit(), (unit(), unit()), 1.0, temperatures[0], temperatures[1], None)


def both_sweeps(library: Any, batch: Batch) -> Any:
    first = library.sweeps.sum_negatives(batch)
    return first, library.sweeps.pull_back(batch, first.positive, first.log_sum_image, first.log_sum_text)


def seconds(library: Any, work: Callable[[], Any], repeats: int) -> float:
    for _ in range(2):  # compilers, handles, allocators
        library.wait(work())
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        library.wait(work())
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def product_rate(library: Any, repeats: int) -> float:
    """Measure the library's own product, of random numbers: constant ones draw less power and run faster."""
    values = np.random.default_rng(0).standard_normal((SQUARE, SQUARE), dtype=np.float32)
    square = library.array(values, half=True)
    return 2 * SQUARE**3 / seconds(library, lambda: square @ square, repeats)


def check(library: Any) -> str:
    """Compare with all pairs at once in NumPy float64; weights of an anchor sum to 1, so errors are absolute."""
    batch = draw(library, CHECKED)
    e1, e2 = map(library.numpy, (batch.image_features, batch.text_features))
    assert batch.reference_features is not None
    r1, r2 = map(library.numpy, batch.reference_features)
    z = e1 @ e2.T - r1 @ r2.T
    positive = np.diagonal(z).copy()
    image, text = (z - positive[:, None]) / 0.05, (z - positive[None, :]) / 0.05
    for d in (image, text):
        np.fill_diagonal(d, -np.inf)
    log_image, log_text = np.logaddexp.reduce(image, axis=1), np.logaddexp.reduce(text, axis=0)
    v = np.exp(image - log_image[:, None]) + np.exp(text - log_text[None, :])
    first, second = both_sweeps(library, batch)
    errors = {
        "log sum": np.max(np.abs(library.numpy(first.log_sum_image) - log_image)),
        "log sum'": np.max(np.abs(library.numpy(first.log_sum_text) - log_text)),
        "V E2": np.max(np.abs(library.numpy(second.image_pull) - v @ e2)),
        "V^T E1": np.max(np.abs(library.numpy(second.text_pull) - v.T @ e1)),
    }
    return ", ".join(f"{name} {error:.1e}" for name, error in errors.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", action="append", choices=sorted(LIBRARIES))
    parser.add_argument("--batch", action="append", type=int)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    print(f"{'library':<8} {'dtype':<9} {'b':>6} {'ms':>9} {'share':>6} {'MB':>7}")
    for name in options.library or list(LIBRARIES):
        try:
            library = LIBRARIES[name]()
        except (ImportError, RuntimeError) as error:
            print(f"{name:<8} not measured: {error}")
            continue
        if options.check:
            print(f"{name:<8} errors at b = {CHECKED}: {check(library)}")
        rate = product_rate(library, options.repeats)
        print(f"{name:<8} {library.device}, {rate / 1e12:.0f} TFLOP/s in its own product")
        for b in sorted(options.batch or [4096, 8192, 16384, 32768]):
            batch = draw(library, b)

            def work(library: Any = library, batch: Batch = batch) -> Any:
                return both_sweeps(library, batch)

            took = seconds(library, work, options.repeats)
            share = 4 * 2 * b * b * WIDTH / rate / took
            memory = library.memory(work) / 1e6
            print(f"{name:<8} {library.dtype:<9} {b:>6} {1e3 * took:>9.2f} {share:>6.0%} {memory:>7.0f}")


if __name__ == "__main__":
    main()
