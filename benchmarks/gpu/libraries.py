"""Arrays, synchronisation and memory of torch, JAX and CuPy on a GPU, with the same methods; in a dry run on the CPU.

A step is a function of (images, texts, reference images, reference texts, state), all on the device. `prepare` compiles
the step if the library has a compiler.
"""

from __future__ import annotations

import importlib.util
import math
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Step = Callable[..., Any]
TEMPERATURE, GAMMA = 0.05, 0.9
STAND_IN = Path(__file__).parents[2] / "tests/backends/test_fused_cupy.py"


class Absent(Exception):
    """The library, its device or its kernels are missing."""


def require(module: str, package: str | None = None) -> None:
    """Raise `Absent` if a module is not installed."""
    if importlib.util.find_spec(module) is None:
        raise Absent(f"{package or module} is not installed")


class Torch:
    """torch on a GPU, or on the CPU with Triton's interpreter."""

    name, half = "torch", "bfloat16"

    def __init__(self, *, dry_run: bool) -> None:
        require("torch")
        require("array_api_compat", "array-api-compat")
        import torch

        if not dry_run and not torch.cuda.is_available():
            raise Absent("torch sees no GPU")
        import array_api_compat.torch
        import drrho_torch

        self._torch, self.xp, self.dry_run = torch, array_api_compat.torch, dry_run
        self.device = "cpu" if dry_run else "cuda"
        self.kit_device: Any = self.device
        self._backend = drrho_torch.TorchBackend
        # A dry run only checks that everything works; with one thread the other cores stay free for other processes.
        if dry_run:
            torch.set_num_threads(1)

    def facts(self) -> dict[str, Any]:
        versions = f"torch {self._torch.__version__}"
        if importlib.util.find_spec("triton") is not None:
            import triton

            versions += f", triton {triton.__version__}"
        if self.dry_run:
            return {"device": "cpu", "versions": versions}
        # The page names the device, because figures of different devices must not be compared.
        properties = self._torch.cuda.get_device_properties(0)
        return {
            "device": properties.name,
            "memory_gb": round(properties.total_memory / 1e9, 1),
            "compute_capability": f"{properties.major}.{properties.minor}",
            "versions": f"{versions}, CUDA {self._torch.version.cuda}",
        }

    def no_kernels(self) -> str | None:
        if importlib.util.find_spec("triton") is None:
            return "Triton is not installed"
        if self.dry_run:
            from benchmarks.gpu import interpreter

            return interpreter.broken()
        return None

    def backend(self) -> Any:
        return self._backend(self.device, "float32")

    def dtype(self, name: str) -> Any:
        return getattr(self._torch, name)

    def unit(self, b: int, d: int, seed: int, dtype: str) -> Any:
        # The device draws the numbers, because copying the largest batches would take long.
        generator = self._torch.Generator(self.device).manual_seed(seed)
        x = self._torch.randn(b, d, generator=generator, device=self.device)
        return self._torch.nn.functional.normalize(x, dim=1).to(self.dtype(dtype))

    def given(self, values: np.ndarray, dtype: str) -> Any:
        return self._torch.tensor(values, device=self.device).to(self.dtype(dtype))

    def numpy(self, x: Any) -> np.ndarray:
        return np.asarray(x.detach().double().cpu().numpy())

    def prepare(self, step: Step, arrays: tuple[Any, ...]) -> Step:
        return step

    def wait(self, result: Any) -> None:
        if not self.dry_run:
            self._torch.cuda.synchronize()

    def extra_megabytes(self, step: Step, arrays: tuple[Any, ...]) -> float | None:
        if self.dry_run:
            return None
        # The extra memory of a call is its peak minus the memory that was held before.
        cuda = self._torch.cuda
        cuda.synchronize()
        cuda.empty_cache()
        cuda.reset_peak_memory_stats()
        before = cuda.memory_allocated()
        self.wait(step(*arrays))
        return float(cuda.max_memory_allocated() - before) / 1e6

    def free_gigabytes(self) -> float:
        return math.inf if self.dry_run else float(self._torch.cuda.mem_get_info()[0]) / 1e9

    def forget(self) -> None:
        if not self.dry_run:
            self._torch.cuda.empty_cache()

    def dense(self, images: Any, texts: Any, reference: tuple[Any, Any] | None, state: Any) -> Any:
        """Differentiate the step's formula on b x b matrices, in float32 after the products."""
        torch = self._torch
        images, texts = images.detach().requires_grad_(), texts.detach().requires_grad_()
        z = (images @ texts.T).float()
        if reference is not None:
            z = z - (reference[0] @ reference[1].T).float()
        positive, total = z.diagonal(), z.new_zeros(())
        is_positive = torch.eye(len(images), dtype=torch.bool, device=images.device)
        for pairs, axis in ((z - positive[:, None], 1), (z - positive[None, :], 0)):
            # u is the stored estimate of an anchor, g that of this batch, over all pairs but the positive. `own` is
            # log g, `new` is log u' with u' = (1 - gamma) u + gamma g, a constant for autograd.
            logits = (pairs / TEMPERATURE).masked_fill(is_positive, -torch.inf)
            own = torch.logsumexp(logits, dim=axis) - math.log(len(images) - 1)
            new = torch.logaddexp(state + math.log1p(-GAMMA), own.detach() + math.log(GAMMA))
            total = total + TEMPERATURE * torch.exp(own - new).mean() / 2
        # The derivative of this surrogate is the derivative of the objective if u' is a constant.
        return torch.autograd.grad(total, (images, texts))


class Jax:
    """JAX on a GPU, or on the CPU with Pallas interpreted."""

    name, half = "jax", "bfloat16"

    def __init__(self, *, dry_run: bool) -> None:
        require("jax")
        require("array_api_compat", "array-api-compat")
        require("optax")
        import jax

        if not dry_run and jax.default_backend() != "gpu":
            raise Absent("JAX sees no GPU")
        import drrho_jax

        self._jax, self.xp, self.dry_run = jax, jax.numpy, dry_run
        self.kit_device: Any = jax.devices()[0]
        self._backend = drrho_jax.JaxBackend

    def facts(self) -> dict[str, Any]:
        return {"device": self._jax.devices()[0].device_kind, "versions": f"jax {self._jax.__version__}"}

    def no_kernels(self) -> str | None:
        return None

    def backend(self) -> Any:
        return self._backend(dtype="float32")

    def dtype(self, name: str) -> Any:
        return getattr(self.xp, name)

    def unit(self, b: int, d: int, seed: int, dtype: str) -> Any:
        x = self._jax.random.normal(self._jax.random.key(seed), (b, d), dtype="float32")
        return (x / self.xp.linalg.norm(x, axis=1, keepdims=True)).astype(dtype)

    def given(self, values: np.ndarray, dtype: str) -> Any:
        return self.xp.asarray(values, dtype=dtype)

    def numpy(self, x: Any) -> np.ndarray:
        return np.asarray(x).astype(np.float64)

    def prepare(self, step: Step, arrays: tuple[Any, ...]) -> Step:
        # The step is compiled before the first call, so that the first measurement does not include the compiler.
        compiled: Step = self._jax.jit(step).lower(*arrays).compile()
        return compiled

    def wait(self, result: Any) -> None:
        self._jax.block_until_ready(result)  # type: ignore[no-untyped-call]

    def extra_megabytes(self, step: Step, arrays: tuple[Any, ...]) -> float | None:
        """Return the compiler's plan for results and temporaries: the device's peak cannot be reset."""
        # A step that was not compiled ahead has no plan.
        planned = getattr(step, "memory_analysis", lambda: None)()
        if planned is None:
            return None
        size = planned.temp_size_in_bytes + planned.output_size_in_bytes - planned.alias_size_in_bytes
        return float(size) / 1e6

    def free_gigabytes(self) -> float:
        statistics = self._jax.devices()[0].memory_stats() or {}
        if "bytes_limit" not in statistics:
            return math.inf
        return float(statistics["bytes_limit"] - statistics["bytes_in_use"]) / 1e9

    def forget(self) -> None:
        """Do nothing: JAX reuses the free memory of its pool."""

    def dense(self, images: Any, texts: Any, reference: tuple[Any, Any] | None, state: Any) -> Any:
        """Differentiate the step's formula on b x b matrices, in float32 after the products."""
        jnp, jax = self.xp, self._jax

        def surrogate(images: Any, texts: Any) -> Any:
            z = jnp.matmul(images, texts.T, preferred_element_type=jnp.float32)
            if reference is not None:
                z = z - jnp.matmul(reference[0], reference[1].T, preferred_element_type=jnp.float32)
            positive, total = jnp.diagonal(z), jnp.zeros(())
            is_positive = jnp.eye(len(images), dtype=bool)
            for pairs, axis in ((z - positive[:, None], 1), (z - positive[None, :], 0)):
                # u is the stored estimate of an anchor, g that of this batch, over all pairs but the positive. `own` is
                # log g, `new` is log u' with u' = (1 - gamma) u + gamma g, a constant for autograd.
                logits = jnp.where(is_positive, -jnp.inf, pairs / TEMPERATURE)
                own = jax.nn.logsumexp(logits, axis=axis) - math.log(len(images) - 1)
                new = jnp.logaddexp(state + math.log1p(-GAMMA), jax.lax.stop_gradient(own) + math.log(GAMMA))
                total = total + TEMPERATURE * jnp.mean(jnp.exp(own - new)) / 2
            return total

        return jax.grad(surrogate, argnums=(0, 1))(images, texts)


class Cupy:
    """CuPy on a GPU; in a dry run NumPy, with the CUDA code of the kernels compiled for the CPU as in the tests."""

    name, half = "cupy", "float16"
    kit_device: Any = None

    def __init__(self, *, dry_run: bool) -> None:
        require("array_api_compat", "array-api-compat")
        self._cupy: Any
        self.xp: Any
        self.dry_run, self._none = dry_run, None
        if dry_run:
            import array_api_compat.numpy

            self._cupy, self.xp = np, array_api_compat.numpy
            self._none = self._register_stand_in()
            return
        require("cupy")
        import cupy

        # Counting the devices is the first call that fails if there is no driver.
        try:
            cupy.cuda.runtime.getDeviceCount()
        except cupy.cuda.runtime.CUDARuntimeError as error:
            raise Absent(f"CuPy sees no GPU: {error}") from error
        import array_api_compat.cupy
        import drrho_cupy  # noqa: F401  (registers the kernels)

        self._cupy, self.xp = cupy, array_api_compat.cupy

    def _register_stand_in(self) -> str | None:
        """Register CuPy's kernels for NumPy arrays; return why that is impossible, or None."""
        if not any(map(shutil.which, ("c++", "g++", "clang++"))):
            return "there is no C++ compiler for CuPy's kernels"
        if importlib.util.find_spec("pytest") is None:
            return "pytest is not installed, and the stand-in for CuPy lies among the tests"
        from drrho_core import extend

        # The stand-in compiles the CUDA source for the CPU. It is a test module and imports `helpers` from tests/.
        sys.path.append(str(STAND_IN.parents[1]))
        specification = importlib.util.spec_from_file_location("drrho_stand_in_for_cupy", STAND_IN)
        assert specification is not None
        assert specification.loader is not None
        tests: Any = importlib.util.module_from_spec(specification)
        specification.loader.exec_module(tests)
        self._folder = tempfile.TemporaryDirectory()
        stand_in = tests.StandIn(Path(self._folder.name) / "kernels.so")
        tests.kernels.pointer_of = lambda array: array.ctypes.data
        sweeps = tests.kernels.CupySweeps(stand_in, tests.Cublas())
        extend.register("numpy", sweeps=lambda: sweeps)
        return None

    def facts(self) -> dict[str, Any]:
        if self.dry_run:
            return {"device": "cpu", "versions": f"numpy {np.__version__} in CuPy's place"}
        runtime = self._cupy.cuda.runtime
        properties = runtime.getDeviceProperties(0)
        return {
            "device": properties["name"].decode(),
            "versions": f"cupy {self._cupy.__version__}, CUDA {runtime.runtimeGetVersion()}",
        }

    def no_kernels(self) -> str | None:
        return self._none

    def dtype(self, name: str) -> Any:
        return getattr(self.xp, name)

    def unit(self, b: int, d: int, seed: int, dtype: str) -> Any:
        x = self._cupy.random.default_rng(seed).standard_normal((b, d), dtype=np.float32)
        x /= self._cupy.linalg.norm(x, axis=1, keepdims=True)
        return x.astype(dtype)

    def given(self, values: np.ndarray, dtype: str) -> Any:
        return self._cupy.asarray(values).astype(dtype)

    def numpy(self, x: Any) -> np.ndarray:
        return np.asarray(x if self.dry_run else self._cupy.asnumpy(x)).astype(np.float64)

    def prepare(self, step: Step, arrays: tuple[Any, ...]) -> Step:
        return step

    def wait(self, result: Any) -> None:
        if not self.dry_run:
            self._cupy.cuda.Device().synchronize()

    def extra_megabytes(self, step: Step, arrays: tuple[Any, ...]) -> float | None:
        if self.dry_run:
            return None
        # CuPy records no peak. Its pool of memory only grows during a call, so this growth is the peak.
        pool = self._cupy.get_default_memory_pool()
        pool.free_all_blocks()
        before = pool.total_bytes()
        self.wait(step(*arrays))
        return float(pool.total_bytes() - before) / 1e6

    def free_gigabytes(self) -> float:
        return math.inf if self.dry_run else float(self._cupy.cuda.runtime.memGetInfo()[0]) / 1e9

    def forget(self) -> None:
        if not self.dry_run:
            self._cupy.get_default_memory_pool().free_all_blocks()


Library = Torch | Jax | Cupy
LIBRARIES: dict[str, Callable[..., Library]] = {"torch": Torch, "jax": Jax, "cupy": Cupy}


def open_library(name: str, *, dry_run: bool) -> Library:
    """Return a library with a device.

    Raises
    ------
    Absent
        If the library, its device or its kernels are missing.
    """
    with warnings.catch_warnings():
        # CuPy and Triton warn if they do not find optional parts.
        warnings.simplefilter("ignore")
        return LIBRARIES[name](dry_run=dry_run)
