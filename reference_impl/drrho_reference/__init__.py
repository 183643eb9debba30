"""The oracle: a second implementation of every formula of drrho_core, as slow float64 loops that a person can read.

The oracle uses NumPy and the standard library only. Its form differs from that of drrho_core (the core), so that a
mistake in one implementation is not repeated in the other. The oracle works in the linear domain: with exponentials and
their means (g and u in ``anchor.py``) themselves, not with their logarithms. It solves the primal problem: it searches
for the weights, then computes the risk from the weights.

Start with :func:`worst_case`, then :func:`contrastive_step`; ``reference_impl/README.md`` gives the reading order.
:func:`conformance.check` compares another implementation with the oracle. :func:`vectors.files` returns the problems
and the oracle's answers as files.
"""

from __future__ import annotations

from drrho_reference import conformance, vectors
from drrho_reference.ambiguity import WorstCase, worst_case
from drrho_reference.anchor import (
    feature_gradients,
    inner_estimate,
    moving_average,
    pair_exponents,
    pair_similarities,
    pair_weights,
)
from drrho_reference.anchor_posterior import PosteriorWeights, posterior_anchor_weight
from drrho_reference.anchor_weight import pair_loss, reference_anchor_weight
from drrho_reference.contrastive import ContrastiveStep, contrastive_objective, contrastive_step
from drrho_reference.distributed import sharded_contrastive_step
from drrho_reference.distributed_views import sharded_unimodal_step
from drrho_reference.estimator import InnerEstimator, cosine_gamma, recommended_gamma_min, scent_gamma
from drrho_reference.losses import (
    HingeLoss,
    PairLoss,
    SigmoidLoss,
    cross_entropy,
    distillation_loss,
    hinge_margin_loss,
    info_nce,
    sigmoid_loss,
    soft_cross_entropy,
)
from drrho_reference.risk import MovingAverageKL, drrho_risk, drrho_risk_vjp, excess_loss, moving_average_kl
from drrho_reference.scaling_law import ScalingLaw, fit_scaling_law
from drrho_reference.selection import chunk_sizes, joint_scores, select_jest, select_top_excess
from drrho_reference.sets import (
    AmbiguitySet,
    CappedKLPenalty,
    ChiSquareBall,
    ChiSquarePenalty,
    CressieReadBall,
    CVaR,
    KLBall,
    KLPenalty,
)
from drrho_reference.theory import (
    ExcessVariance,
    LogMeanExpBias,
    effective_sample_size,
    excess_variance,
    expected_log_mean_exp_bias,
    generalization_bound,
    log_mean_exp_bias,
)
from drrho_reference.unimodal import UnimodalStep, unimodal_contrastive_step, unimodal_objective, view_positions
from drrho_reference.weighted_sum import WeightedSum, weighted_sum

__all__ = [
    "AmbiguitySet",
    "CVaR",
    "CappedKLPenalty",
    "ChiSquareBall",
    "ChiSquarePenalty",
    "ContrastiveStep",
    "CressieReadBall",
    "ExcessVariance",
    "HingeLoss",
    "InnerEstimator",
    "KLBall",
    "KLPenalty",
    "LogMeanExpBias",
    "MovingAverageKL",
    "PairLoss",
    "PosteriorWeights",
    "ScalingLaw",
    "SigmoidLoss",
    "UnimodalStep",
    "WeightedSum",
    "WorstCase",
    "chunk_sizes",
    "conformance",
    "contrastive_objective",
    "contrastive_step",
    "cosine_gamma",
    "cross_entropy",
    "distillation_loss",
    "drrho_risk",
    "drrho_risk_vjp",
    "effective_sample_size",
    "excess_loss",
    "excess_variance",
    "expected_log_mean_exp_bias",
    "feature_gradients",
    "fit_scaling_law",
    "generalization_bound",
    "hinge_margin_loss",
    "info_nce",
    "inner_estimate",
    "joint_scores",
    "log_mean_exp_bias",
    "moving_average",
    "moving_average_kl",
    "pair_exponents",
    "pair_loss",
    "pair_similarities",
    "pair_weights",
    "posterior_anchor_weight",
    "recommended_gamma_min",
    "reference_anchor_weight",
    "scent_gamma",
    "select_jest",
    "select_top_excess",
    "sharded_contrastive_step",
    "sharded_unimodal_step",
    "sigmoid_loss",
    "soft_cross_entropy",
    "unimodal_contrastive_step",
    "unimodal_objective",
    "vectors",
    "view_positions",
    "weighted_sum",
    "worst_case",
]
