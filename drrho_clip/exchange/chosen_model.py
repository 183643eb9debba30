"""The model that the setting `model` names: encoders, tokenizer and the parameters with which the training starts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from drrho_clip.config import TrainConfig
from drrho_clip.data.hf_preprocessing import HuggingFaceTokenizer
from drrho_clip.errors import BadInput
from drrho_clip.exchange.hf_directory import open_hf_directory, read_weights
from drrho_clip.models import ModelSpec
from drrho_clip.terminal.safe_text import brief
from drrho_core.backend import Backend

__all__ = ["HUGGING_FACE", "ChosenModel", "check_model", "choose_model"]

HUGGING_FACE = "hf:"
"""The start of the name of a model that is a Hugging Face directory."""


class ChosenModel(NamedTuple):
    """The model that the setting `model` names.

    Attributes
    ----------
    spec : ModelSpec
        The encoders.
    tokenizer : HuggingFaceTokenizer
        The tokenizer of the text encoder.
    start : mapping or None
        The parameters before the first step; None: random numbers.
    """

    spec: ModelSpec
    tokenizer: HuggingFaceTokenizer
    start: Mapping[str, np.ndarray] | None


def check_model(config: TrainConfig, backend: Backend) -> None:
    """Raise BadInput if the setting `model` is wrong, before the data are read; the weights are not read."""
    if config.model is None:
        return
    spec = open_hf_directory(_folder(config.model)).spec
    if spec.architecture not in backend.architectures:
        raise BadInput(
            f"model {config.model} needs a backend with the architecture {spec.architecture}, got {backend.name}, "
            f"which has {', '.join(backend.architectures)}"
        )


def choose_model(config: TrainConfig) -> ChosenModel | None:
    """Return the model that the setting `model` names, or None without this setting.

    Raises
    ------
    BadInput
        If the directory cannot be used; see `open_hf_directory` and `read_weights`.
    """
    if config.model is None:
        return None
    folder = _folder(config.model)
    directory = open_hf_directory(folder)
    start = None if config.from_scratch else read_weights(folder, directory.spec)
    return ChosenModel(directory.spec, directory.tokenizer, start)


def _folder(model: str) -> str:
    if not model.startswith(HUGGING_FACE):
        raise BadInput(f"model must be hf:DIR, got {brief(model)}")
    return model.removeprefix(HUGGING_FACE)
