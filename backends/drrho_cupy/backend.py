"""The backend of the harness for CuPy: NumPy's encoders and optimiser on an NVIDIA or AMD GPU.

The harness is `drrho_clip`, the training program. `drrho_core.backend.Backend` defines what a backend must provide.
CuPy is imported when a backend is built, so that importing this file and checking its types need no CuPy.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from drrho_clip.models import MLPModel, ModelSpec
from drrho_clip.optimizer import AdamW
from drrho_core import InnerEstimator
from drrho_core.backend import Function, Home
from drrho_core.checks import Array, Namespace


class CupyBackend:
    """CuPy on one GPU; see `drrho_core.backend.Backend`.

    Parameters
    ----------
    device : str, optional
        ``"cuda:0"``, ``"cuda:1"`` and so on. Default: CuPy's current device. The device becomes the current one of this
        thread, because CuPy makes new arrays on the current device.
    dtype : {"float32", "float64"}
        The dtype that floating arrays are converted to.

    Raises
    ------
    ValueError
        If there is no such GPU, or `dtype` is neither ``"float32"`` nor ``"float64"``.
    ImportError
        If CuPy is not installed.

    Examples
    --------
    >>> from drrho_core.backend import get_backend
    >>> get_backend("cupy", device="cuda:0").asarray([0.5, 1.5]).dtype                          # doctest: +SKIP
    dtype('float32')
    """

    name = "cupy"
    homes = ("device",)
    architectures: tuple[str, ...] = ("mlp", "heads")
    preference = 0
    has_gpu = True

    def __init__(self, device: str | None = None, dtype: str = "float32") -> None:
        if dtype not in ("float32", "float64"):
            raise ValueError(f"dtype must be 'float32' or 'float64', got {dtype!r}")
        import array_api_compat.cupy
        import cupy

        # Without a driver or a GPU the first call of CUDA fails.
        try:
            devices = [f"cuda:{number}" for number in range(cupy.cuda.runtime.getDeviceCount())]
            self.device = f"cuda:{cupy.cuda.Device().id}" if device is None else device
        except cupy.cuda.runtime.CUDARuntimeError as error:
            received = "None (the current GPU)" if device is None else repr(device)
            raise ValueError(f"device must be a GPU that CuPy can use, got {received}: {error}") from error
        if self.device not in devices:
            raise ValueError(f"device must be {' or '.join(map(repr, devices))} for the cupy backend, got {device!r}")
        # CuPy makes a new array on the current device of the thread, so the chosen device becomes the current one.
        cupy.cuda.Device(devices.index(self.device)).use()
        self.xp: Namespace = array_api_compat.cupy
        self._asnumpy = cupy.asnumpy
        self.dtype = dtype

    def asarray(self, array: Any, /) -> Array:
        """Copy a host array to the device: floating arrays get the backend's dtype, all others keep their dtype."""
        array = np.asarray(array)
        dtype = self.dtype if np.issubdtype(array.dtype, np.floating) else array.dtype
        return self.xp.asarray(array, dtype=dtype, copy=True)

    def to_numpy(self, array: Array, /) -> np.ndarray:
        """Copy an array to a NumPy array on the host."""
        return np.asarray(self._asnumpy(array))

    def model(self, spec: ModelSpec, /) -> MLPModel:
        """Build the MLP towers (encoders) of a `ModelSpec`; raise ValueError for any other architecture."""
        # CuPy has no autograd, and only the MLP towers have a gradient that is written by hand.
        if spec.architecture not in self.architectures:
            raise ValueError(f"architecture must be 'mlp' for the cupy backend, got {spec.architecture!r}")
        return MLPModel(spec, self.xp)

    def adamw(self, *, weight_decay: float, beta1: float = 0.9, beta2: float = 0.98, epsilon: float = 1e-8) -> AdamW:
        """Build AdamW (decoupled weight decay, on parameters with two or more axes only)."""
        return AdamW(self.xp, weight_decay=weight_decay, beta1=beta1, beta2=beta2, epsilon=epsilon)

    def estimator(self, home: str, num_samples: int, /, *, path: Any = None) -> Home:  # noqa: ARG002 (contract)
        """Build an inner estimator in the GPU's memory; this backend has no other home, and `path` is not used."""
        if home not in self.homes:
            raise ValueError(f"home must be one of {', '.join(self.homes)} for the cupy backend, got {home!r}")
        return Home(InnerEstimator(num_samples, like=self.asarray(np.zeros(1))), self.asarray)

    def compile(self, function: Function, /) -> Function:
        """Return the function unchanged: CuPy compiles single kernels, not whole steps."""
        return function
