"""The sizes of a training step of the harness that several ranks, processes that train together, share."""

from __future__ import annotations

from typing import NamedTuple

from drrho_clip.config import TrainConfig
from drrho_clip.epoch_length import pairs_per_step
from drrho_clip.methods import DISTILL, METHODS
from drrho_clip.models import ModelSpec
from drrho_clip.plan.memory import parameter_count
from drrho_clip.plan.selection_traffic import Selection
from drrho_clip.plan.traffic import SharedStep

__all__ = ["StepSizes", "shared_step"]

_TOKEN_BYTES = 4


class StepSizes(NamedTuple):
    """The sizes of a step that depend on the data and on the reference model.

    Attributes
    ----------
    reference_dims : tuple of int
        Numbers of features of an image and of a text by the reference model; 0 and 0 if the step uses none.
    masked : bool
        Some images have several captions, so a step has a mask of pairs that are no negatives.
    """

    reference_dims: tuple[int, int] = (0, 0)
    masked: bool = False


def shared_step(
    config: TrainConfig,
    spec: ModelSpec,
    num_ranks: int,
    form: str,
    sizes: StepSizes,
    *,
    on_host: bool = True,
) -> SharedStep:
    """Return the sizes of a step of the harness that several ranks share.

    Parameters
    ----------
    config : TrainConfig
        The settings; `batch_size` is the batch of all ranks.
    spec : ModelSpec
        The sizes of the encoders.
    num_ranks : int
        Number of ranks, which divides the batch.
    form : {"reduce", "ring"}
        The way in which the ranks share a batch.
    sizes : StepSizes
        The sizes that depend on the data and on the reference model.
    on_host : bool
        The arrays are in the memory of the host, so the ranks compare arguments before each step.
    """
    item = 8 if config.dtype == "float64" else 4
    distilled, name = config.method.startswith(DISTILL), config.method.removeprefix(DISTILL)
    method, per_sample = METHODS[name], config.temperature_scheme == "per_sample"
    loss = "contrastive" if method.keeps_estimates else "sigmoid" if method.has_bias else "info_nce"
    # A method that selects reads the features of the reference model for the selection, not for the loss.
    steered = method.needs_reference and method.select is None
    # Every process knows the rows of the whole batch, so only the estimates travel if each process stores all of them.
    estimates = "split" if config.estimator == "split" else "rows"
    return SharedStep(
        num_ranks=num_ranks,
        num_local=config.batch_size // num_ranks,
        feature_dim=spec.feature_dim,
        feature_bytes=item,
        work_bytes=item,
        state_bytes=item,
        form=form,
        reference_dim=sizes.reference_dims[1] * steered,
        reference_bytes=item,
        per_anchor=per_sample,
        masked=sizes.masked,
        checked=on_host,
        estimates=estimates if method.keeps_estimates else "none",
        num_parameters=parameter_count(spec),
        parameter_bytes=item,
        loss=loss,
        teacher_dim=sizes.reference_dims[1] * distilled,
        temperatures=per_sample,
        selection=None if method.select is None else _selection(config, spec, num_ranks, sizes, item),
    )


def _selection(config: TrainConfig, spec: ModelSpec, num_ranks: int, sizes: StepSizes, item: int) -> Selection:
    """Return the sizes of a super-batch from which the ranks select the pairs of a step."""
    reference = sum(sizes.reference_dims)
    # Beside the inputs, two inner estimates, which such a method does not change, and a weight belong to a pair.
    numbers = reference + 2 + (config.anchor_weights is not None)
    return Selection(
        num_local=pairs_per_step(config) // num_ranks,
        num_chosen=config.batch_size,
        feature_bytes=item * (2 * spec.feature_dim + reference),
        pair_bytes=item * numbers + _input_bytes(spec, item),
        masked=sizes.masked,
    )


def _input_bytes(spec: ModelSpec, item: int) -> int:
    """Return the bytes of the inputs of the encoders for one pair."""
    if spec.stored_features is not None:
        return item * int(spec.stored_features["image"] + spec.stored_features["text"])
    image = item * spec.image_size**2 * spec.channels
    if spec.text_input == "bag_of_words":
        return image + item * spec.vocabulary_size
    return image + _TOKEN_BYTES * spec.context_length
