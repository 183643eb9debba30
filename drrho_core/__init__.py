"""Steer the training of a model with a reference model: DRRho risk minimization on any array library.

Sources: Model Steering / DRRho (arXiv 2505.06699), SogCLR (arXiv 2202.12387), FastCLIP (arXiv 2407.01445).
"""

from drrho_core.ambiguity import (
    AmbiguitySet,
    ChiSquareBall,
    ChiSquarePenalty,
    CressieReadBall,
    CVaR,
    KLBall,
    KLPenalty,
    WorstCase,
    worst_case,
)
from drrho_core.contrastive import ContrastiveStep, contrastive_step
from drrho_core.estimator import InnerEstimator, cosine_gamma, recommended_gamma_min, scent_gamma
from drrho_core.losses import LossGradients, info_nce
from drrho_core.risk import drrho_risk, excess_loss

__all__ = [
    "AmbiguitySet",
    "CVaR",
    "ChiSquareBall",
    "ChiSquarePenalty",
    "ContrastiveStep",
    "CressieReadBall",
    "InnerEstimator",
    "KLBall",
    "KLPenalty",
    "LossGradients",
    "WorstCase",
    "contrastive_step",
    "cosine_gamma",
    "drrho_risk",
    "excess_loss",
    "info_nce",
    "recommended_gamma_min",
    "scent_gamma",
    "worst_case",
]

__version__ = "0.1.0"
