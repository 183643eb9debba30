"""CuPy: the backend of the harness (`drrho_clip`, the training program), and fused kernels for NVIDIA GPUs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from drrho_core import extend
from drrho_core.extend import Sweeps

if TYPE_CHECKING:
    from drrho_cupy.backend import CupyBackend

__all__ = ["CupyBackend"]


def __getattr__(name: str) -> Any:
    """Import CuPy when the backend is requested, so that an import error names CuPy and not this package."""
    if name != "CupyBackend":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # This import fails without CuPy; `get_backend` turns the error into a message that names the extra.
    import cupy  # noqa: F401

    from drrho_cupy.backend import CupyBackend

    return CupyBackend


def _kernels() -> Sweeps | str:
    """Return the fused kernels, or the reason why this machine has none."""
    # CuPy also runs on AMD GPUs, but the kernels are written for NVIDIA's compiler and cuBLAS.
    import cupy
    from cupy_backends.cuda.libs import cublas

    from drrho_cupy.fused import CupySweeps

    if cupy.cuda.runtime.is_hip:
        return "the kernels for CuPy need an NVIDIA GPU"
    return CupySweeps(cupy, cublas)


extend.register("cupy", sweeps=_kernels)
