"""All that a training step reads besides the state: the batch on the device, the inner estimates and the schedules."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from drrho_clip.config import TrainConfig
from drrho_clip.data import HostBatch
from drrho_clip.data.augment import Augmentation
from drrho_clip.encode import model_inputs
from drrho_clip.methods import METHODS
from drrho_clip.reference.guidance import Guidance
from drrho_clip.run import Run
from drrho_clip.sample_numbers import SampleNumbers
from drrho_clip.selection import gumbel_noise
from drrho_clip.step import StepBatch
from drrho_core.backend import Backend

__all__ = ["Schedules", "StepInputs", "augmentation_of", "schedules_at"]


class Schedules(NamedTuple):
    """The numbers of a step that depend only on the number of the step."""

    learning_rate: float
    gamma: float


def schedules_at(config: TrainConfig, step: int, *, steps_per_epoch: int, first_epoch: int = 0) -> Schedules:
    """Return the learning rate of a step (counted from 0) and gamma, the weight of the new value in an inner estimate.

    `first_epoch` is the number of epochs after which the run was last finished, if it has got more epochs since.

    Examples
    --------
    >>> config = TrainConfig(data="digits", method="sogclr", backend="numpy", epochs=4, warmup_steps=2)
    >>> schedules_at(config, 0, steps_per_epoch=3)
    Schedules(learning_rate=0.0005, gamma=1.0)
    """
    # Epochs that were added to a finished run have a warm-up and a cosine of their own. Gamma stays at the end of its
    # cosine, because a larger gamma would forget the estimates.
    before, total = first_epoch * steps_per_epoch, config.epochs * steps_per_epoch
    gamma = config.gamma_min if first_epoch else config.gamma_at(step, steps_per_epoch)
    return Schedules(config.learning_rate_at(step - before, total - before), gamma)


def augmentation_of(config: TrainConfig) -> Augmentation | None:
    """Return the way in which the training images change from epoch to epoch, or None if they stay as they are.

    Examples
    --------
    >>> augmentation_of(TrainConfig(data="digits", method="clip", backend="numpy", augment="crop"))
    Augmentation(seed=0, smallest_area=0.5, flip=False)
    """
    if config.augment is None:
        return None
    return Augmentation(config.seed, config.augment_area, config.augment == "crop-flip")


class StepInputs:
    """Makes the inputs of a step from the batch that the data source has read.

    Parameters
    ----------
    run : Run
        The run, with settings, encoders and tokenizer.
    backend : Backend
        The library of the arrays.
    guidance : Guidance
        The results of the reference model: the features and the weights of the training pairs, if the run uses them.
    """

    def __init__(self, run: Run, backend: Backend, guidance: Guidance) -> None:
        self._run, self._backend, self._features = run, backend, guidance.features
        self._anchor_weight = None if guidance.choice is None else guidance.choice.anchor_weight
        self._draws_noise = METHODS[run.config.method].draws_noise

    def of(
        self,
        batch: HostBatch,
        schedules: Schedules,
        *,
        step: int,
        numbers: SampleNumbers,
    ) -> StepBatch:
        """Return all that a step (counted from 0) reads besides the state, on the device."""
        config, backend = self._run.config, self._backend
        rows = batch.sample_index
        images, texts = model_inputs(batch, self._run.spec, self._run.tokenizer, self._run.image_reading)
        # If the temperature is fixed, the step reads it from the settings.
        log_inner_image, log_inner_text, temperature = numbers.of_batch(batch)
        reference = None
        if self._features is not None:
            image_features, text_features = self._features[rows]
            reference = backend.asarray(image_features), backend.asarray(text_features)
        weight: np.ndarray | None = None if self._anchor_weight is None else self._anchor_weight[rows]
        return StepBatch(
            images=backend.asarray(images),
            texts=backend.asarray(texts),
            log_inner_image=log_inner_image,
            log_inner_text=log_inner_text,
            reference_features=reference,
            learning_rate=schedules.learning_rate,
            gamma=schedules.gamma,
            temperature=temperature,
            anchor_weight=None if weight is None else backend.asarray(weight),
            pair_mask=None if batch.pair_mask is None else backend.asarray(batch.pair_mask),
            gumbel=backend.asarray(gumbel_noise(config, step)) if self._draws_noise else None,
        )
