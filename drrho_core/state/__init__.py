"""State of a training run, one row per sample: inner estimates, rules for gamma, and learned temperatures."""

from __future__ import annotations

from drrho_core.state.gamma import cosine_gamma, recommended_gamma_min, scent_gamma
from drrho_core.state.homes import HOMES, RunEstimator, make_estimator
from drrho_core.state.inner import InnerEstimator
from drrho_core.state.sample_temperatures import PerSampleTemperature
from drrho_core.state.shard_files import load_shards, save_shards
from drrho_core.state.temperature_updates import (
    GlobalTemperatureState,
    TemperatureRows,
    update_global_temperature,
    update_temperature_rows,
)
from drrho_core.state.temperatures import (
    FixedTemperature,
    GlobalTemperature,
    Temperature,
    make_temperature,
)

__all__ = [
    "HOMES",
    "FixedTemperature",
    "GlobalTemperature",
    "GlobalTemperatureState",
    "InnerEstimator",
    "PerSampleTemperature",
    "RunEstimator",
    "Temperature",
    "TemperatureRows",
    "cosine_gamma",
    "load_shards",
    "make_estimator",
    "make_temperature",
    "recommended_gamma_min",
    "save_shards",
    "scent_gamma",
    "update_global_temperature",
    "update_temperature_rows",
]
