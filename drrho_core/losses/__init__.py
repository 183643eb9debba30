"""Contrastive losses for comparison, each with its value and closed-form gradients, and weighted sums of them.

Shapes: b pairs in the batch, features (b, d), reference features (b, r). The similarities are S = E1 E2^T (b, b), E1
the image features and E2 the text features: a row is an image, a column is a text. The diagonal holds the positives,
the pairs that belong together, and all other pairs are negatives. Every loss is divided by b. A loss with image anchors
and text anchors averages the two directions. The losses are as published.

`sigmoid_loss` and `hinge_margin_loss` are sums over negatives, from which a `pair_mask` removes pairs. `info_nce` and
`distillation_loss` have no `pair_mask`. In their softmax a pair is a class and not a term, and both models of the
distillation must have the same classes. `contrastive_step` has a softmax over negatives with a mask.

Only `contrastive_step` subtracts the similarities of reference features. Its loss depends on differences between
similarities alone. In contrast, the bias of the sigmoid loss and the margin of the hinge are absolute amounts of
similarity, whose meaning would change if reference similarities were subtracted.
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
