"""The training methods, in one table: to add a method, add a line to `METHODS`.

An objective takes the features of a batch. It returns the loss, the gradient of the loss in closed form, and the new
inner estimates of the batch (running averages, one per sample and direction). Shapes: batch b, feature_dim d.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from drrho_core import ContrastiveStep, contrastive_step, info_nce
from drrho_core.checks import Array, Namespace

if TYPE_CHECKING:
    from drrho_clip.config import TrainConfig
    from drrho_clip.step import StepBatch

Objective: TypeAlias = "Callable[[Array, Array, StepBatch, Any, TrainConfig, Namespace], ContrastiveStep]"
"""``objective(image_features, text_features, batch, temperature, config, xp)``."""


class Method(NamedTuple):
    """A training method, as the training loop uses it.

    Attributes
    ----------
    summary : str
        A few words about the objective, which the help shows.
    objective : callable
        See `Objective`.
    needs_reference : bool
        The objective reads the features of a reference model.
    keeps_estimates : bool
        The objective updates two inner estimates per sample. Only then may the setting `radius` be above 0, and only
        then may the method learn one temperature per sample.
    """

    summary: str
    objective: Objective
    needs_reference: bool = False
    keeps_estimates: bool = True


def _info_nce(
    image_features: Array, text_features: Array, batch: StepBatch, temperature: Any, _: TrainConfig, xp: Namespace
) -> ContrastiveStep:
    """CLIP's loss, InfoNCE: each sample is compared with all samples of the batch, and no inner estimate is used."""
    plain = info_nce(
        image_features,
        text_features,
        temperature=temperature,
        anchor_weight=batch.anchor_weight,
        pair_mask=batch.pair_mask,
        xp=xp,
    )
    # The surrogate, the scalar whose gradient is returned, is the loss itself, and the inner estimates do not change.
    return ContrastiveStep(
        loss=plain.loss,
        surrogate=plain.loss,
        image_gradient=plain.image_gradient,
        text_gradient=plain.text_gradient,
        temperature_gradient=plain.temperature_gradient,
        log_inner_image=batch.log_inner_image,
        log_inner_text=batch.log_inner_text,
    )


def _global_contrastive(
    image_features: Array, text_features: Array, batch: StepBatch, temperature: Any, config: TrainConfig, xp: Namespace
) -> ContrastiveStep:
    """Return the global contrastive loss, or, if the batch has reference features, the loss of DRRho-CLIP.

    The global loss compares each sample with all samples of the data set; inner estimates stand for those that are not
    in the batch.
    """
    # With sogclr the batch has no reference features, and `contrastive_step` then ignores the reference weight.
    return contrastive_step(
        image_features,
        text_features,
        batch.log_inner_image,
        batch.log_inner_text,
        temperature=temperature,
        gamma=batch.gamma,
        reference_features=batch.reference_features,
        reference_weight=config.reference_weight,
        radius=config.radius,
        eps=config.eps,
        anchor_weight=batch.anchor_weight,
        pair_mask=batch.pair_mask,
        xp=xp,
    )


# The help, the demo and the report list the methods in this order.
METHODS: dict[str, Method] = {
    "clip": Method("InfoNCE of the batch", _info_nce, keeps_estimates=False),
    "sogclr": Method("global contrastive loss", _global_contrastive),
    "drrho": Method("global contrastive loss steered by a reference model", _global_contrastive, needs_reference=True),
}
