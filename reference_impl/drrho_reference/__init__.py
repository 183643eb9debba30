"""The oracle: every formula of drrho_core once more, as slow float64 loops that a person can read.

It knows NumPy and the standard library only, works in the linear domain (u, g and exp) and in the primal form (look for
the weights, then read off the risk): another form than the core's, so that a mistake is not made twice.

Start with :func:`worst_case`, then :func:`contrastive_step`; ``reference_impl/README.md`` gives the reading order.
"""

from __future__ import annotations

from drrho_reference.ambiguity import (
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
from drrho_reference.contrastive import (
    ContrastiveStep,
    contrastive_objective,
    contrastive_step,
    feature_gradients,
    inner_estimate,
    moving_average,
    pair_exponents,
    pair_similarities,
    pair_weights,
)
from drrho_reference.estimator import cosine_gamma, recommended_gamma_min, scent_gamma
from drrho_reference.losses import PairLoss, cross_entropy, info_nce
from drrho_reference.risk import drrho_risk, excess_loss
from drrho_reference.unimodal import UnimodalStep, unimodal_contrastive_step, unimodal_objective, view_positions

__all__ = [
    "AmbiguitySet",
    "CVaR",
    "ChiSquareBall",
    "ChiSquarePenalty",
    "ContrastiveStep",
    "CressieReadBall",
    "KLBall",
    "KLPenalty",
    "PairLoss",
    "UnimodalStep",
    "WorstCase",
    "contrastive_objective",
    "contrastive_step",
    "cosine_gamma",
    "cross_entropy",
    "drrho_risk",
    "excess_loss",
    "feature_gradients",
    "info_nce",
    "inner_estimate",
    "moving_average",
    "pair_exponents",
    "pair_similarities",
    "pair_weights",
    "recommended_gamma_min",
    "scent_gamma",
    "unimodal_contrastive_step",
    "unimodal_objective",
    "view_positions",
    "worst_case",
]
