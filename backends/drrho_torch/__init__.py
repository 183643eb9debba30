"""PyTorch: the backend of the harness, and the losses as a module and functions for your own training loop."""

from __future__ import annotations

import drrho_torch.exponential  # registers a faster exponential
import drrho_torch.loops  # registers torch.compile's loop
import drrho_torch.sorting  # noqa: F401  (registers a faster sort)
from drrho_core._fused import Sweeps, register_sweeps
from drrho_torch.backend import TorchBackend
from drrho_torch.estimator import HostEstimator
from drrho_torch.loss import ContrastiveLoss
from drrho_torch.micro_batching import micro_batches
from drrho_torch.products import onednn_products
from drrho_torch.risk import drrho_risk

__all__ = ["ContrastiveLoss", "HostEstimator", "TorchBackend", "drrho_risk", "micro_batches", "onednn_products"]


def _triton() -> Sweeps | str:
    """Return the fused kernels, which need what is not installed with torch everywhere."""
    try:
        from drrho_torch.fused import TritonSweeps
    except ImportError as error:
        return f"the kernels need Triton, see docs/fused.md ({error})"
    return TritonSweeps()


register_sweeps("torch", _triton)
