"""The model that the setting `model` names: encoders, tokenizer and the parameters with which the training starts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from drrho_clip.config import TrainConfig
from drrho_clip.data.protocol import Dataset, Tokenizer, captions_of
from drrho_clip.errors import BadInput
from drrho_clip.exchange.hf_directory import open_hf_directory, read_weights
from drrho_clip.exchange.model_sizes import SIZES, new_model, sizes_by_name
from drrho_clip.features.reading import ReferenceFeatures
from drrho_clip.models import ModelSpec
from drrho_clip.options import nearest_name
from drrho_clip.terminal.safe_text import brief
from drrho_core.backend import Backend

__all__ = ["ChosenModel", "check_model", "choose_model", "heads_on"]

_DIRECTORY, _FEATURES = "hf:", "features:"


class ChosenModel(NamedTuple):
    """The model that the setting `model` names.

    Attributes
    ----------
    spec : ModelSpec
        The encoders.
    tokenizer : Tokenizer or None
        The tokenizer of the text encoder; None: the run gets one of whole words.
    start : mapping or None
        The parameters before the first step; None: random numbers.
    """

    spec: ModelSpec
    tokenizer: Tokenizer | None
    start: Mapping[str, np.ndarray] | None


def check_model(config: TrainConfig, backend: Backend) -> None:
    """Raise BadInput if the setting `model` is wrong, before the data are read; weights and features are not read."""
    model = config.model
    if model is None:
        return
    if model.startswith(_DIRECTORY):
        # The files beside the weights are small, so they are read twice: here, and after the data.
        open_hf_directory(model.removeprefix(_DIRECTORY))
    elif model.startswith(_FEATURES):
        if config.from_scratch:
            raise BadInput("from_scratch must be off for heads, which have no weights before the training, got on")
        heads_on(config, ReferenceFeatures(model.removeprefix(_FEATURES), verify=False))
    elif model in SIZES or model.endswith(".json"):
        sizes_by_name(model)
    else:
        names = (*SIZES, _DIRECTORY, _FEATURES)
        raise BadInput(
            f"model must be hf:DIR, features:CACHE, a file that ends in .json or one of {', '.join(SIZES)}, got "
            f"{brief(model)}{nearest_name(model, names)}"
        )
    architecture = "heads" if model.startswith(_FEATURES) else "hf"
    if architecture not in backend.architectures:
        raise BadInput(
            f"model {brief(model)} needs a backend with the architecture {architecture}, got {backend.name}, which has "
            f"{', '.join(backend.architectures)}"
        )


def choose_model(config: TrainConfig, data: Dataset) -> ChosenModel | None:
    """Return the model that the setting `model` names for training data, or None without this setting.

    Raises
    ------
    BadInput
        If the model cannot be used; see `open_hf_directory`, `read_weights` and `sizes_by_name`.
    """
    model = config.model
    if model is None:
        return None
    if model.startswith(_FEATURES):
        # The checksums of the cache are compared once, at the start of the run.
        features = ReferenceFeatures(model.removeprefix(_FEATURES), verify=True)
        return ChosenModel(heads_on(config, features), None, None)
    if not model.startswith(_DIRECTORY):
        # The vocabulary comes from the training captions only; other captions may have other words.
        return ChosenModel(*new_model(sizes_by_name(model), captions_of(data)), None)
    folder = Path(model.removeprefix(_DIRECTORY))
    directory = open_hf_directory(folder)
    start = None if config.from_scratch else read_weights(folder, directory.spec)
    return ChosenModel(directory.spec, directory.tokenizer, start)


def heads_on(config: TrainConfig, features: ReferenceFeatures) -> ModelSpec:
    """Return the spec of heads over stored features; width, depth and feature_dim are settings of the run."""
    image, text = features.manifest.feature_dims
    return ModelSpec.of_heads(
        image,
        text,
        model=features.manifest.model,
        feature_dim=config.feature_dim,
        width=config.width,
        depth=config.depth,
    )
