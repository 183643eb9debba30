"""Contrastive losses for comparison, each with its value and closed-form gradients, and weighted sums of them.

Shapes: b pairs in the batch, features (b, d), reference features (b, r), S = E1 E2^T (b, b), row = image, column =
text, positives on the diagonal. Every loss averages its two directions (1/2) and the batch (1/b). The losses are as
published.

Options. `pair_mask` drops pairs from a sum over negatives: those of `sigmoid_loss` and `hinge_margin_loss`. Under a
softmax (`info_nce`, `distillation_loss`) a pair is a class and not a term, and both models must have the same classes;
the masked softmax over negatives is `contrastive_step`. Only `contrastive_step` subtracts reference features, because
only there the loss depends on differences of similarities alone: the bias of the sigmoid loss and the margin of the
hinge are absolute amounts of similarity, which would change their meaning for an excess similarity.
"""

from drrho_core.losses.distillation import distillation_loss
from drrho_core.losses.hinge import hinge_margin_loss
from drrho_core.losses.info_nce import info_nce
from drrho_core.losses.results import FeatureGradients, LossGradients, SigmoidLossGradients, WeightedSum
from drrho_core.losses.sigmoid import sigmoid_loss
from drrho_core.losses.weighted_sum import weighted_sum

__all__ = [
    "FeatureGradients",
    "LossGradients",
    "SigmoidLossGradients",
    "WeightedSum",
    "distillation_loss",
    "hinge_margin_loss",
    "info_nce",
    "sigmoid_loss",
    "weighted_sum",
]
