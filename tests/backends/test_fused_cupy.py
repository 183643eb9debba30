"""The kernels for CuPy: with CuPy on a GPU; and without either, their CUDA compiled for the CPU and cuBLAS imitated.

The stand-in runs each block of a kernel as so many threads of the CPU, reads cuBLAS's arguments as cuBLAS does, by
columns and through pointers, and is NumPy in everything else. What it cannot show is how fast anything is.
"""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from drrho_cupy import fused as kernels
from drrho_reference import conformance

from drrho_core.extend import Batch
from helpers import fused_sweeps

COMPILER = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
CUDA_ON_THE_CPU = """
#include <cmath>
#include <functional>
#include <pthread.h>
#include <thread>
#include <vector>
#define __global__
#define __device__
#define __shared__ static  // blocks run one after the other
struct Index { int x; };
static thread_local Index blockIdx, threadIdx;
static Index blockDim, gridDim;
static pthread_barrier_t barrier;
static void __syncthreads() { pthread_barrier_wait(&barrier); }
static void run(int blocks, int threads, std::function<void()> kernel) {
    gridDim.x = blocks;
    blockDim.x = threads;
    pthread_barrier_init(&barrier, nullptr, threads);
    std::vector<std::thread> all;
    for (int t = 0; t < threads; ++t)
        all.emplace_back([=] {
            threadIdx.x = t;
            for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x) {
                kernel();
                __syncthreads();
            }
        });
    for (auto& one : all) one.join();
    pthread_barrier_destroy(&barrier);
}
"""
KERNEL = re.compile(r'extern "C" __global__ void (\w+)\(([^)]*)\)')
NAME = re.compile(r"(\w+)(?=,|$)")
TYPES = {0: np.float32, 2: np.float16}


class Module:
    """`cupy.RawModule`, compiled for the CPU."""

    def __init__(self, library: Path, code: str) -> None:
        source = library.with_suffix(".cpp")
        launches = ""
        for name, parameters in KERNEL.findall(code):
            names = ", ".join(NAME.findall(parameters))
            launches += f'extern "C" void run_{name}(int blocks, int threads, {parameters})\n'
            launches += f"{{ run(blocks, threads, [=] {{ {name}({names}); }}); }}\n"
        source.write_text(CUDA_ON_THE_CPU + code + launches)
        assert COMPILER is not None
        flags = ["-std=c++17", "-O1", "-shared", "-fPIC", "-pthread"]
        subprocess.run([COMPILER, *flags, "-o", str(library), str(source)], check=True)
        self._library = ctypes.CDLL(str(library))

    def get_function(self, name: str) -> Any:
        function = getattr(self._library, f"run_{name}")
        function.restype = None

        def run(grid: tuple[int], block: tuple[int], arguments: tuple[Any, ...]) -> None:
            assert grid[0] >= 1
            assert block[0] <= 1024
            function(ctypes.c_int(grid[0]), ctypes.c_int(block[0]), *map(self._argument, arguments))

        return run

    @staticmethod
    def _argument(value: Any) -> Any:
        if isinstance(value, np.ndarray):
            return ctypes.c_void_p(value.ctypes.data)
        if isinstance(value, np.int32):
            return ctypes.c_int(int(value))
        assert isinstance(value, np.float32), type(value)
        return ctypes.c_float(float(value))


class Cublas:
    """The three functions of ``cupy_backends.cuda.libs.cublas`` that are called."""

    mode = 0

    def getPointerMode(self, handle: int) -> int:  # noqa: N802
        return self.mode

    def setPointerMode(self, handle: int, mode: int) -> None:  # noqa: N802
        self.mode = mode

    def gemmEx(  # noqa: N802
        self, handle: int, transa: int, transb: int, m: int, n: int, k: int, alpha: int, a: int, a_type: int, lda: int,
        b: int, b_type: int, ldb: int, beta: int, c: int, c_type: int, ldc: int, compute: int, algorithm: int,
    ) -> None:  # fmt: skip
        assert self.mode == 1
        assert min(m, n, k) > 0  # nothing to sum: nobody has tried that on a device
        assert a_type == b_type
        assert compute == 68
        assert lda >= max(1, k if transa else m)
        assert ldb >= max(1, n if transb else k)
        assert ldc >= max(1, m)
        left = self._matrix(a, a_type, lda, *((k, m) if transa else (m, k)))
        right = self._matrix(b, b_type, ldb, *((n, k) if transb else (k, n)))
        left, right = (left.T if transa else left), (right.T if transb else right)
        out = self._matrix(c, c_type, ldc, m, n)
        one, other = (self._matrix(pointer, 0, 1, 1, 1)[0, 0] for pointer in (alpha, beta))
        old = 0 if other == 0 else other * out  # what is there may be nan
        out[:] = one * (left.astype(np.float32) @ right.astype(np.float32)) + old

    @staticmethod
    def _matrix(pointer: int, kind: int, leading: int, rows: int, columns: int) -> np.ndarray:
        """What BLAS means by a matrix: columns one after the other, `leading` apart."""
        dtype = np.dtype(TYPES[kind])
        if rows * columns == 0:
            return np.zeros((rows, columns), dtype)
        size = (leading * (columns - 1) + rows) * dtype.itemsize
        flat = np.frombuffer((ctypes.c_char * size).from_address(pointer), dtype=dtype)
        step = dtype.itemsize
        return np.lib.stride_tricks.as_strided(flat, (rows, columns), (step, leading * step))


class StandIn:
    """CuPy, as far as the kernels need it."""

    def __init__(self, library: Path) -> None:
        self._library = library
        self.cuda = self
        self.device = self

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)

    def log(self, x: np.ndarray) -> np.ndarray:
        with np.errstate(divide="ignore"):  # CuPy never warns
            return np.log(x)

    def get_cublas_handle(self) -> int:
        return 0

    def RawModule(self, *, code: str) -> Module:  # noqa: N802
        return Module(self._library, code)


def gpu() -> str | None:
    """Why CuPy cannot run, or None."""
    if find_spec("cupy") is None:
        return "CuPy is not installed"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import cupy

        cupy.zeros(1)
    except Exception as error:
        return f"CuPy has no GPU: {type(error).__name__}"
    return None


NO_GPU = gpu()


@pytest.fixture(scope="session", params=["stand-in", pytest.param("cupy", marks=pytest.mark.gpu)])
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """CuPy or the stand-in, and the sweeps made of it."""
    if request.param == "cupy":
        if NO_GPU is not None:
            pytest.skip(NO_GPU)
        import cupy
        from cupy_backends.cuda.libs import cublas

        return cupy, kernels.CupySweeps(cupy, cublas)
    if COMPILER is None:
        pytest.skip("no C++ compiler")
    stand_in = StandIn(tmp_path_factory.mktemp("cuda") / "kernels.so")
    return stand_in, kernels.CupySweeps(stand_in, Cublas())


@pytest.fixture
def library(built: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The same, with rectangles so small that a small batch has several."""
    monkeypatch.setattr(kernels, "HEIGHT", 128)
    monkeypatch.setattr(kernels, "WIDTH", 64)
    if isinstance(built[0], StandIn):
        monkeypatch.setattr(kernels, "pointer_of", lambda array: array.ctypes.data)
    return built


def both_sweeps(library: Any, problem: Any, dtype: Any) -> tuple[Any, Any]:
    xp, sweeps = library

    def anchors(x: np.ndarray) -> Any:
        return xp.asarray(x.astype(np.float32))

    batch = problem.given(lambda x: xp.asarray(x.astype(dtype)), anchors, xp.asarray)
    assert sweeps.declines(batch, "always") is None
    first = sweeps.sum_negatives(batch)
    second = sweeps.pull_back(batch, first, anchors(problem.weight_image), anchors(problem.weight_text))
    return first._make([*map(to_numpy, first[:6]), None]), second._make(map(to_numpy, second))


def to_numpy(x: Any) -> np.ndarray:
    return np.asarray(x.get() if hasattr(x, "get") else x, dtype=np.float64)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize(
    "shape",
    [
        {"b": 2, "d": 1},
        {"b": 64, "d": 16, "r": 16},
        {"b": 97, "d": 20, "r": 7},
        {"b": 200, "d": 7, "r": 40, "mask": True},
        {"b": 130, "d": 33, "mask": True},
        {"b": 140, "d": 8, "r": 0, "one_temperature": True},
    ],
    ids=str,
)
def test_both_sweeps_are_the_formula(library: Any, shape: dict[str, Any], dtype: Any) -> None:
    problem = fused_sweeps.draw(**shape, rounded=lambda x: x.astype(dtype).astype(np.float64))
    pull_unit = None if dtype == np.float32 else 2.0**-11  # V is rounded to float16
    fused_sweeps.check(*both_sweeps(library, problem, dtype), problem, unit=5e-6, pull_unit=pull_unit)


def test_cold_temperatures_overflow_nothing(library: Any) -> None:
    problem = fused_sweeps.draw(b=20, d=8, r=8, coldest=0.001)
    fused_sweeps.check(*both_sweeps(library, problem, np.float32), problem, unit=100 * 5e-6)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("temperature", [1e-2, 1e-4, 1e-6, 1e-10])
def test_large_logits_lose_no_digits(library: Any, temperature: float, dtype: Any) -> None:
    problem = fused_sweeps.draw_exact(b=140, d=5, r=3, mask=True, temperature=temperature)
    pull_unit = None if dtype == np.float32 else 2.0**-11
    fused_sweeps.check(*both_sweeps(library, problem, dtype), problem, unit=5e-6, pull_unit=pull_unit)


@pytest.mark.parametrize("temperature", [0.05, 1e-4, 1e-10])
def test_the_weights_of_an_anchor_add_up(library: Any, temperature: float) -> None:
    """Whatever the products round: with a column of ones the pull is the sum of the weights."""
    problem = fused_sweeps.draw(b=140, d=24, r=9, coldest=temperature)
    for side in (problem.image_features, problem.text_features, *problem.reference_features):
        side *= np.sqrt(temperature)  # logits of size 1 / temperature that differ by about 1
    for side in (problem.image_features, problem.text_features):
        side[:, 0] = 1.0
    nothing = np.zeros_like(problem.weight_image)
    for own, pull in (("weight_image", "image_pull"), ("weight_text", "text_pull")):
        other = "weight_text" if own == "weight_image" else "weight_image"
        _, second = both_sweeps(library, type(problem)(**{**vars(problem), other: nothing}), np.float32)
        np.testing.assert_allclose(getattr(second, pull)[:, 0], getattr(problem, own), rtol=2e-6, atol=1e-9)


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
def test_float16_is_rounded_to_nearest(tmp_path: Path) -> None:
    """The kernel that weighs is given numbers as z whose weights are these numbers: exp2(0) times a factor."""
    weigh = Module(tmp_path / "kernels.so", kernels.SOURCE).get_function("weigh")
    every = np.arange(0, 0x7BFF, dtype=np.uint16).view(np.float16).astype(np.float32)
    halfway = (every[:-1] + every[1:]) / 2
    numbers = np.concatenate(
        [every, halfway, np.nextafter(halfway, np.float32(0)), np.nextafter(halfway, np.float32(9e9))]
    )
    n = np.int32(len(numbers))
    z, zeros, v = np.zeros((1, n), np.float32), np.zeros(n + 1, np.float32), np.zeros((1, n), np.float16)
    factors = np.concatenate([[0], numbers]).astype(np.float32)
    ones = [np.int32(x) for x in (n, 1, n, 0, 1)]  # row 0, columns from 1 on: no pair is a positive
    weigh((1,), (256,), (z, *ones, z, np.int32(0), n, zeros, zeros, zeros, zeros, zeros, factors, v, np.int32(1)))
    assert np.array_equal(v[0], numbers.astype(np.float16))


def test_the_same_inputs_give_the_same_bits(library: Any) -> None:
    problem = fused_sweeps.draw(b=140, d=24, r=9, mask=True)
    one, other = (both_sweeps(library, problem, np.float16) for _ in range(2))
    for left, right in zip(one, other, strict=True):
        for first, second in zip(left, right, strict=True):
            assert first is second or np.array_equal(first, second)


def test_the_kit_passes_a_step_that_is_made_of_them(library: Any) -> None:
    xp, sweeps = library
    report = conformance.check(
        {"contrastive_step": fused_sweeps.step(sweeps, to_numpy)},
        xp=np if isinstance(xp, StandIn) else xp,
        dtypes=["float32"],
    )
    assert report.passed, report.table()


@pytest.mark.parametrize(
    ("dtype", "b", "mode", "reason"),
    [
        ("float64", 2, "always", "take float32 and float16, not float64"),
        ("float32", 2, "always", None),
        ("float32", 1024, "auto", "multiply float32 no faster"),
        ("float16", 2047, "auto", "smaller than 2048"),
        ("float16", 2048, "auto", None),
    ],
)
def test_what_they_decline(library: Any, dtype: str, b: int, mode: str, reason: str | None) -> None:
    xp, sweeps = library
    features, ones = xp.zeros((b, 3), dtype=dtype), xp.ones(b, dtype="float32")
    said = sweeps.declines(Batch(features, features, None, 1.0, ones, ones, None), mode)
    assert said is None if reason is None else reason in str(said)


@pytest.mark.skipif(find_spec("cupy") is None, reason="CuPy is not installed")
def test_nvidias_compiler_takes_the_source_without_a_gpu() -> None:
    from cupy.cuda import nvrtc

    try:
        nvrtc.getVersion()
    except Exception as error:
        pytest.skip(f"no NVRTC: {error}")
    program = nvrtc.createProgram(kernels.SOURCE, "kernels.cu", [], [])
    try:
        nvrtc.compileProgram(program, ["--gpu-architecture=compute_90"])
        ptx = nvrtc.getPTX(program)
    finally:
        nvrtc.destroyProgram(program)
    for name in (b"sums", b"merge", b"weigh"):
        assert b".entry " + name in (ptx if isinstance(ptx, bytes) else ptx.encode())


@pytest.mark.skipif(find_spec("cupy") is None, reason="CuPy is not installed")
def test_the_numbers_are_cublas_own() -> None:
    from cupy.cuda import runtime
    from cupy_backends.cuda.libs import cublas

    assert (kernels.TYPES["float32"], kernels.TYPES["float16"]) == (runtime.CUDA_R_32F, runtime.CUDA_R_16F)
    assert (cublas.CUBLAS_OP_N, cublas.CUBLAS_OP_T) == (kernels.NORMAL, kernels.TRANSPOSED)
    assert cublas.CUBLAS_COMPUTE_32F == kernels.COMPUTE_FLOAT32
    assert cublas.CUBLAS_POINTER_MODE_DEVICE == kernels.POINTERS_ON_DEVICE
    assert cublas.CUBLAS_GEMM_DEFAULT == kernels.ANY_ALGORITHM
