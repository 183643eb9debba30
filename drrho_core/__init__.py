"""Steer the training of a model with a reference model: DRRho risk minimization on any array library.

The functions take arrays of any library that follows the array API standard, version 2024.12 or newer (tested: 2024.12
and 2025.12). Arrays must be plain: masked, sparse and object arrays and ``numpy.matrix`` are refused.

Sources: Model Steering / DRRho (arXiv 2505.06699), SogCLR (arXiv 2202.12387), FastCLIP (arXiv 2407.01445).
"""

from drrho_core._routines import fused_kernels
from drrho_core.ambiguity import (
    AmbiguitySet,
    CappedKLPenalty,
    ChiSquareBall,
    ChiSquarePenalty,
    CressieReadBall,
    CVaR,
    KLBall,
    KLPenalty,
    WorstCase,
    worst_case,
)
from drrho_core.contrastive import (
    ContrastiveStep,
    PosteriorWeights,
    Ranks,
    ThreadRanks,
    UnimodalStep,
    contrastive_step,
    pair_loss,
    posterior_anchor_weight,
    reference_anchor_weight,
    sharded_contrastive_step,
    unimodal_contrastive_step,
)
from drrho_core.diagnostics import (
    ExcessVariance,
    LogMeanExpBias,
    effective_sample_size,
    excess_variance,
    generalization_bound,
    log_mean_exp_bias,
)
from drrho_core.losses import (
    FeatureGradients,
    LossGradients,
    SigmoidLossGradients,
    WeightedSum,
    distillation_loss,
    hinge_margin_loss,
    info_nce,
    sigmoid_loss,
    weighted_sum,
)
from drrho_core.migration import (
    log_inner_from_fastclip_loss,
    log_inner_from_libauc_v1,
    log_inner_from_libauc_v2,
    log_inner_from_sogclr_loss,
)
from drrho_core.risk import MovingAverageKL, drrho_risk, excess_loss, moving_average_kl
from drrho_core.scaling_law import ScalingLaw, fit_scaling_law
from drrho_core.selection import select_jest, select_top_excess
from drrho_core.state import (
    GlobalTemperature,
    GlobalTemperatureState,
    InnerEstimator,
    PerSampleTemperature,
    TemperatureRows,
    cosine_gamma,
    load_shards,
    recommended_gamma_min,
    save_shards,
    scent_gamma,
    update_global_temperature,
    update_temperature_rows,
)

__all__ = [
    "AmbiguitySet",
    "CVaR",
    "CappedKLPenalty",
    "ChiSquareBall",
    "ChiSquarePenalty",
    "ContrastiveStep",
    "CressieReadBall",
    "ExcessVariance",
    "FeatureGradients",
    "GlobalTemperature",
    "GlobalTemperatureState",
    "InnerEstimator",
    "KLBall",
    "KLPenalty",
    "LogMeanExpBias",
    "LossGradients",
    "MovingAverageKL",
    "PerSampleTemperature",
    "PosteriorWeights",
    "Ranks",
    "ScalingLaw",
    "SigmoidLossGradients",
    "TemperatureRows",
    "ThreadRanks",
    "UnimodalStep",
    "WeightedSum",
    "WorstCase",
    "contrastive_step",
    "cosine_gamma",
    "distillation_loss",
    "drrho_risk",
    "effective_sample_size",
    "excess_loss",
    "excess_variance",
    "fit_scaling_law",
    "fused_kernels",
    "generalization_bound",
    "hinge_margin_loss",
    "info_nce",
    "load_shards",
    "log_inner_from_fastclip_loss",
    "log_inner_from_libauc_v1",
    "log_inner_from_libauc_v2",
    "log_inner_from_sogclr_loss",
    "log_mean_exp_bias",
    "moving_average_kl",
    "pair_loss",
    "posterior_anchor_weight",
    "recommended_gamma_min",
    "reference_anchor_weight",
    "save_shards",
    "scent_gamma",
    "select_jest",
    "select_top_excess",
    "sharded_contrastive_step",
    "sigmoid_loss",
    "unimodal_contrastive_step",
    "update_global_temperature",
    "update_temperature_rows",
    "weighted_sum",
    "worst_case",
]

__version__ = "0.1.0"
