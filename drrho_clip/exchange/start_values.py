"""The temperature and the bias that belong to pretrained encoders, as start values of a run with these encoders.

Training spreads the similarities of encoders until they suit the temperature. A run that continues with these encoders
and another temperature would first have to undo this. So a user who names no temperature gets that of the encoders.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from drrho_clip.config import TrainConfig
from drrho_clip.exchange.hf_directory import read_constant
from drrho_clip.methods import METHODS
from drrho_clip.run import Run, open_run
from drrho_clip.run.data import place_of
from drrho_clip.run.temperature_figures import learned_bias_of, temperature_of

__all__ = ["bias_of_start", "with_start_values"]

_DIRECTORY = "hf:"


def with_start_values(config: TrainConfig) -> TrainConfig:
    """Return settings in which a temperature and a bias that the user left out are those of the encoders, if any.

    Encoders of a Hugging Face directory have both in their weights. The encoders of the run after `init` have the
    temperature of that run, fixed or learned, and the bias that it has learned. If the new run learns the temperature,
    the start is moved into the bounds of the settings.

    Raises
    ------
    BadInput
        If a file of the directory or of the run cannot be read.
    """
    if not config.left_out & {"temperature", "bias"}:
        return config
    temperature: float | None = None
    bias: float | None = None
    if config.init is not None:
        source = open_run(config.init)
        # A fixed temperature may come from the encoders with which that run started, and belongs to them all the same.
        temperature = temperature_of(source, "best")
        if METHODS[config.method].has_bias:
            bias = learned_bias_of(source, "best")
    elif config.model is not None and config.model.startswith(_DIRECTORY) and not config.from_scratch:
        folder = Path(config.model.removeprefix(_DIRECTORY))
        logit_scale, bias = (read_constant(folder, name) for name in ("logit_scale", "logit_bias"))
        # The model multiplies cosines by exp(logit_scale), which is one divided by the temperature.
        temperature = None if logit_scale is None else math.exp(-logit_scale)
    if temperature is not None and config.temperature_scheme != "fixed":
        # CLIP's learned temperature is at its bound, 0.01, up to rounding.
        temperature = min(max(temperature, config.temperature_min), config.temperature_max)
    values = {"temperature": temperature, "bias": bias if METHODS[config.method].has_bias else None}
    taken: dict[str, Any] = {
        name: value for name, value in values.items() if value is not None and name in config.left_out
    }
    return replace(config, **taken) if taken else config


def bias_of_start(run: Run) -> float | None:
    """Return the bias of the encoders with which a run started, or None if they have none.

    Only the method siglip learns the bias. After another method the encoders still belong to the bias with which they
    were trained before.

    Raises
    ------
    BadInput
        If the directory or the run with these encoders is no longer there, or cannot be read.
    """
    config = run.config
    if config.init is not None:
        source = open_run(place_of(run, "init"))
        learned = learned_bias_of(source, "best")
        return bias_of_start(source) if learned is None else learned
    if config.model is None or not config.model.startswith(_DIRECTORY) or config.from_scratch:
        return None
    return read_constant(place_of(run, "model").removeprefix(_DIRECTORY), "logit_bias")
