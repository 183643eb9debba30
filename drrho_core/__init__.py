"""Steer the training of a model with a reference model: DRRho risk minimization on any array library.

Sources: Model Steering / DRRho (arXiv 2505.06699), SogCLR (arXiv 2202.12387), FastCLIP (arXiv 2407.01445).
"""

from drrho_core.contrastive import ContrastiveStep, contrastive_step
from drrho_core.estimator import InnerEstimator, cosine_gamma, recommended_gamma_min, scent_gamma
from drrho_core.losses import LossGradients, info_nce

__all__ = [
    "ContrastiveStep",
    "InnerEstimator",
    "LossGradients",
    "contrastive_step",
    "cosine_gamma",
    "info_nce",
    "recommended_gamma_min",
    "scent_gamma",
]

__version__ = "0.1.0"
