"""Contrastive losses for comparison, each with its value and closed-form gradients, and weighted sums of them.

Shapes: b pairs in the batch, features (b, d), reference features (b, r). With the image features E1 and the text
features E2, the similarities are S = E1 E2^T (b, b): a row belongs to an image, a column to a text. The diagonal holds
the positives, the pairs that belong together, and all other pairs are negatives. An anchor is an image that is compared
with all texts, or a text that is compared with all images. A loss with image anchors and text anchors averages the two
directions. Every loss is divided by b. The formulas are those of the published papers.

`sigmoid_loss` and `hinge_margin_loss` are sums over pairs, from which a `pair_mask` removes pairs. The softmax of
`info_nce` has a class for each pair of an anchor, and a mask removes classes; `contrastive_step` has a softmax over
negatives and takes the same mask. `distillation_loss` has no `pair_mask`.

Only `contrastive_step` subtracts the similarities of reference features. Its loss allows this, because the loss depends
only on differences between similarities. In contrast, the bias of the sigmoid loss and the margin of the hinge are
absolute amounts of similarity. Their meaning would change if reference similarities were subtracted.
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
