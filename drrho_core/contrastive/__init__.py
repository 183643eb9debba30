"""The global contrastive loss with a reference model, for images with texts and for two views; weights per anchor."""

from drrho_core.contrastive.anchor_posterior import PosteriorWeights, posterior_anchor_weight
from drrho_core.contrastive.anchor_weights import pair_loss, reference_anchor_weight
from drrho_core.contrastive.ranks import Ranks
from drrho_core.contrastive.step import ContrastiveStep, contrastive_step, sharded_contrastive_step
from drrho_core.contrastive.thread_ranks import ThreadRanks
from drrho_core.contrastive.two_views import UnimodalStep, unimodal_contrastive_step

__all__ = [
    "ContrastiveStep",
    "PosteriorWeights",
    "Ranks",
    "ThreadRanks",
    "UnimodalStep",
    "contrastive_step",
    "pair_loss",
    "posterior_anchor_weight",
    "reference_anchor_weight",
    "sharded_contrastive_step",
    "unimodal_contrastive_step",
]
