"""JAX: the backend of the harness, and the losses as differentiable functions for your own training loop.

The harness is `drrho_clip`, the training program.
"""

from __future__ import annotations

from drrho_core import extend
from drrho_core.extend import Sweeps
from drrho_jax import loops, products, rolled_tiles
from drrho_jax.backend import JaxBackend
from drrho_jax.estimator import DonatingEstimator
from drrho_jax.loss import ContrastiveState, contrastive_loss, init_state
from drrho_jax.micro_batching import micro_batches
from drrho_jax.risk import drrho_risk

__all__ = [
    "ContrastiveState",
    "DonatingEstimator",
    "JaxBackend",
    "contrastive_loss",
    "drrho_risk",
    "init_state",
    "micro_batches",
]


def _pallas() -> Sweeps | str:
    """Return the fused kernels, or the reason why this machine has none."""
    # Not every build of JAX has Pallas for GPUs.
    try:
        from drrho_jax.fused import PallasSweeps
    except ImportError as error:
        return f"this JAX has no Pallas for GPUs ({error})"
    return PallasSweeps()


extend.register("jax.numpy", loop=loops.loop, matmul=products.choose, tiles=rolled_tiles.choose, sweeps=_pallas)
