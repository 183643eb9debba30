"""PyTorch: the backend of the harness, and the losses as a module and functions for your own training loop.

The harness is `drrho_clip`, the training program.
"""

from __future__ import annotations

from drrho_core import extend
from drrho_core.extend import Sweeps
from drrho_torch import exponential, loops, products, sorting
from drrho_torch.backend import TorchBackend
from drrho_torch.estimator import HostEstimator
from drrho_torch.loss import ContrastiveLoss
from drrho_torch.micro_batching import micro_batches
from drrho_torch.open_clip import OpenClipLoss
from drrho_torch.products import onednn_products
from drrho_torch.ranks import TorchRanks
from drrho_torch.risk import drrho_risk
from drrho_torch.sharded_state import ShardedState
from drrho_torch.token_risk import token_losses, token_risk

__all__ = [
    "ContrastiveLoss",
    "HostEstimator",
    "OpenClipLoss",
    "ShardedState",
    "TorchBackend",
    "TorchRanks",
    "drrho_risk",
    "micro_batches",
    "onednn_products",
    "token_losses",
    "token_risk",
]


def _triton() -> Sweeps | str:
    """Return the fused kernels, or the reason why this machine has none."""
    # torch's wheels for the CPU come without Triton.
    try:
        from drrho_torch.fused import TritonSweeps
    except ImportError as error:
        return f"the kernels need Triton, see docs/fused.md ({error})"
    return TritonSweeps()


extend.register(
    "torch", loop=loops.repeat, sort=sorting.sort, matmul=products.choose, exp=exponential.exp, sweeps=_triton
)
