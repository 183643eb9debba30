"""JAX: the backend of the harness, and the loss as a differentiable function for a loop of one's own."""

import drrho_jax.loops  # noqa: F401  (registers JAX's loop)
from drrho_jax.backend import JaxBackend
from drrho_jax.estimator import DonatingEstimator
from drrho_jax.loss import ContrastiveState, contrastive_loss, drrho_risk, init_state

__all__ = ["ContrastiveState", "DonatingEstimator", "JaxBackend", "contrastive_loss", "drrho_risk", "init_state"]
