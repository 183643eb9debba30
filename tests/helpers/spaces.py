"""The array libraries, devices and dtypes that the tests run on.

A space is one array library on one device with one floating dtype. A test draws its problem once, in NumPy float64, and
converts it with the fixture ``space`` or ``eager_space``.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest


@dataclass(frozen=True)
class Space:
    """One array library on one device in one floating dtype, eager or jitted."""

    name: str
    xp: Any
    device: Any
    dtype_name: str
    jit: Callable[..., Any] | None
    to_numpy: Callable[[Any], np.ndarray]

    @property
    def dtype(self) -> Any:
        return getattr(self.xp, self.dtype_name)

    @property
    def unit(self) -> float:
        """The bound of one unit of error: 1e-12 in float64, 5e-6 in float32."""
        return 1e-12 if self.dtype_name == "float64" else 5e-6

    def asarray(self, values: Any, dtype: Any = None) -> Any:
        """Convert values to an array: floating values to this space's dtype, unless `dtype` is given."""
        # Values are rounded in NumPy, so that all libraries get the same numbers.
        values = np.asarray(values)
        if dtype is None and np.issubdtype(values.dtype, np.floating):
            values = values.astype(self.dtype_name)  # cast first: torch cannot copy and cast a 0-d array in one call
        if self.name == "torch" and self.device != "cpu":  # torch 2.11 cannot copy a 0-d array to a GPU in one call
            return self.xp.asarray(values, dtype=dtype, copy=True).to(self.device)
        return self.xp.asarray(values, dtype=dtype, device=self.device, copy=True)

    def rounded(self, values: Any) -> np.ndarray:
        """Round values as `asarray` does, and return float64, for the oracle, which is the NumPy implementation."""
        return np.asarray(values, dtype=self.dtype_name).astype(np.float64)

    def run(self, function: Callable[..., Any], *arrays: Any, **options: Any) -> Any:
        """Call `function(*arrays, **options)`, jitted as a function of the arrays (or None) if this space is jitted."""
        if self.jit is None:
            return function(*arrays, **options)
        return self.jit(lambda *inner: function(*inner, **options))(*arrays)


def _numpy_space(dtype: str) -> Space:
    import array_api_compat.numpy as xp

    return Space("numpy", xp, "cpu", dtype, None, np.asarray)


def _strict_space(dtype: str, device: str) -> Space:
    import array_api_strict as xp

    def to_numpy(array: Any) -> np.ndarray:
        return np.asarray(xp.asarray(array, device=xp.Device("CPU_DEVICE")))

    return Space("strict", xp, xp.Device(device), dtype, None, to_numpy)


def _torch_space(dtype: str, device: str) -> Space:
    import array_api_compat.torch as xp

    return Space("torch", xp, device, dtype, None, lambda array: array.detach().cpu().numpy())


def _jax_space(dtype: str, jitted: bool, platform: str) -> Space:
    import jax

    jax.config.update("jax_enable_x64", True)
    # The space exists eager and jitted; a jitted space compiles once per shape.
    return Space("jax", jax.numpy, jax.devices(platform)[0], dtype, jax.jit if jitted else None, np.asarray)


def _cupy_space(dtype: str) -> Space:
    import array_api_compat.cupy as xp

    return Space("cupy", xp, xp.cuda.Device(0), dtype, None, xp.asnumpy)


SPACES: dict[str, Callable[[str], Space]] = {
    "numpy": _numpy_space,
    "strict": lambda dtype: _strict_space(dtype, "CPU_DEVICE"),
    "strict-device1": lambda dtype: _strict_space(dtype, "device1"),
    "torch": lambda dtype: _torch_space(dtype, "cpu"),
    "jax": lambda dtype: _jax_space(dtype, False, "cpu"),
    "jax-jit": lambda dtype: _jax_space(dtype, True, "cpu"),
    "torch-cuda": lambda dtype: _torch_space(dtype, "cuda"),
    "jax-gpu": lambda dtype: _jax_space(dtype, False, "gpu"),
    "cupy": lambda dtype: _cupy_space(dtype),
}
GPU_SPACES = ("torch-cuda", "jax-gpu", "cupy")
DTYPES = {"strict": ("float64",), "jax": ("float64",)}
"""The dtypes of spaces that run in one dtype only, because other spaces of the same library run in both dtypes.

Code on the second device of array-api-strict has to follow more rules than code on the first device, and jitted JAX
compiles a test once, but eager JAX compiles each operation.
"""

CHOSEN = [name for name in os.environ.get("DRRHO_SPACES", ",".join(SPACES)).split(",") if SPACES[name]]
"""The spaces that the environment variable DRRHO_SPACES names, or all of them. Mutants are tested in NumPy alone."""


def build(name: str, dtype: str) -> Space:
    """Build a space. Skip the test if an accelerator is missing; a missing CPU library is an error in CI."""
    try:
        space = SPACES[name](dtype)
        # The first array shows whether the device exists.
        space.xp.asarray([0.0], device=space.device)
    except Exception as error:
        if name in GPU_SPACES:
            pytest.skip(f"{name} needs an accelerator and its library: {type(error).__name__}: {error}")
        # A test in CI must not be skipped because a library is missing.
        if isinstance(error, ModuleNotFoundError) and not os.environ.get("CI"):
            pytest.skip(f"{name}: {error}")
        raise
    return space


def parameters(names: list[str]) -> list[Any]:
    return [
        pytest.param((name, dtype), id=f"{name}-{dtype}", marks=[pytest.mark.gpu] if name in GPU_SPACES else [])
        for name in names
        if name in CHOSEN
        for dtype in DTYPES.get(name, ("float64", "float32"))
    ]
