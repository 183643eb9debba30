"""JAX: the backend of the harness, and the loss as a differentiable function for a loop of one's own."""

from drrho_jax.backend import JaxBackend
from drrho_jax.loss import ContrastiveState, contrastive_loss, init_state

__all__ = ["ContrastiveState", "JaxBackend", "contrastive_loss", "init_state"]
