"""The backend of the harness (`drrho_clip`, the training program) for NumPy and similar libraries on the host.

A namespace is a module with the functions of the Array API standard, such as ``numpy`` or ``array_api_strict``.
"""

from __future__ import annotations

from typing import Any

import array_api_compat.numpy
import numpy as np

from drrho_clip.models import MLPModel, ModelSpec
from drrho_clip.optimizer import AdamW
from drrho_core import InnerEstimator
from drrho_core.backend import Function, Home
from drrho_core.checks import Array, Namespace
from drrho_numpy.estimator import MemoryMappedEstimator


class NumpyBackend:
    """NumPy, or another namespace on the host; see `drrho_core.backend.Backend`.

    This backend needs nothing beyond the Array API, so read this file before you write another backend.

    Parameters
    ----------
    device : device, optional
        A device of the namespace (NumPy has ``"cpu"`` only). Default: the namespace's default device.
    dtype : {"float32", "float64"}
        The dtype that floating arrays are converted to.
    xp : namespace, optional
        A namespace on the host, such as ``array_api_strict``. Default: NumPy.

    Raises
    ------
    ValueError
        If the namespace has no such device, or `dtype` is neither ``"float32"`` nor ``"float64"``.

    Examples
    --------
    >>> backend = NumpyBackend(dtype="float64")
    >>> backend.asarray([1, 2]).dtype, backend.asarray([1.0, 2.0]).dtype
    (dtype('int64'), dtype('float64'))
    """

    name = "numpy"
    architectures: tuple[str, ...] = ("mlp", "heads")
    preference = 1  # NumPy is always installed and needs no compiler
    has_gpu = False

    def __init__(self, device: Any = None, dtype: str = "float32", *, xp: Namespace | None = None) -> None:
        self.xp: Namespace = array_api_compat.numpy if xp is None else xp
        info = self.xp.__array_namespace_info__()
        # NumPy reads arrays of the default device only, so `to_numpy` first moves an array to that device.
        self._host = info.default_device()
        self._device = self._host if device is None else device
        if self._device not in info.devices():
            rule = " or ".join(map(repr, info.devices()))
            raise ValueError(f"device must be {rule} for the numpy backend, got {device!r}")
        if dtype not in ("float32", "float64"):
            raise ValueError(f"dtype must be 'float32' or 'float64', got {dtype!r}")
        self.device = str(self._device)
        # `homes` lists the places for estimates. Host and device are the same place here. Only NumPy's own arrays
        # can lie in a file.
        self.homes: tuple[str, ...] = (
            ("device", "host", "file") if self.xp is array_api_compat.numpy else ("device", "host")
        )
        self.dtype = dtype

    def asarray(self, array: Any, /) -> Array:
        """Copy a host array to the device: floating arrays get the backend's dtype, all others keep their dtype."""
        # Another namespace does not accept NumPy's dtypes, but every namespace has attributes such as ``xp.float32``.
        array = np.asarray(array)
        dtype = self.dtype if np.issubdtype(array.dtype, np.floating) else array.dtype.name
        return self.xp.asarray(array, dtype=getattr(self.xp, dtype), device=self._device, copy=True)

    def to_numpy(self, array: Array, /) -> np.ndarray:
        """Copy an array to a NumPy array on the host."""
        return np.array(self.xp.asarray(array, device=self._host))

    def model(self, spec: ModelSpec, /) -> MLPModel:
        """Build the MLP towers (encoders) of a `ModelSpec`; raise ValueError for any other architecture."""
        # NumPy has no autograd, and only the MLP towers have a gradient that is written by hand.
        if spec.architecture not in self.architectures:
            raise ValueError(f"architecture must be 'mlp' for the numpy backend, got {spec.architecture!r}")
        return MLPModel(spec, self.xp)

    def adamw(self, *, weight_decay: float, beta1: float = 0.9, beta2: float = 0.98, epsilon: float = 1e-8) -> AdamW:
        """Build AdamW (decoupled weight decay, on parameters with two or more axes only)."""
        return AdamW(self.xp, weight_decay=weight_decay, beta1=beta1, beta2=beta2, epsilon=epsilon)

    def estimator(self, home: str, num_samples: int, /, *, path: Any = None) -> Home:
        """Build an inner estimator in arrays of the namespace, or in a file."""
        if home not in self.homes:
            raise ValueError(f"home must be one of {', '.join(self.homes)} for the numpy backend, got {home!r}")
        if home == "file":
            return Home(MemoryMappedEstimator(path, num_samples, dtype=self.dtype), np.asarray)
        return Home(InnerEstimator(num_samples, like=self.asarray(np.zeros(1))), self.asarray)

    def compile(self, function: Function, /) -> Function:
        """Return the function unchanged: NumPy has no compiler."""
        return function
