"""Defaults that depend on the data or the library: by the kind of data, by the size of a table, by the backend."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, Final

from drrho_clip.config import BUILT_IN_DATA, TABLE, TrainConfig
from drrho_clip.options import setting_of
from drrho_core.backend import Backend

__all__ = ["defaults_for", "preferred_architecture", "preset", "selection_defaults"]

_LARGEST_BATCH: Final = 256
# A run trains on about this many samples, but it takes at least 8 and at most 60 epochs.
_SAMPLES: Final = 72_000
_EPOCHS: Final = (8, 60)
# A reference model is trained for a third of the epochs: with more it would learn wrong captions by heart.
_REFERENCE_SHARE: Final = 3
# On drawn pictures a reference model that was trained with the smaller rate told wrong captions from right ones better.
_LEARNING_RATE: Final = 3e-3
_REFERENCE_LEARNING_RATE: Final = 1e-3


def defaults_for(
    num_pairs: int, *, used_share: float = 1.0, as_reference: bool = False, super_batch: int = 1
) -> dict[str, Any]:
    """Return the defaults for a table of a certain number of training pairs, by the name of the setting.

    Parameters
    ----------
    num_pairs : int
        Number of training pairs, at least 2.
    used_share : float
        Share in [0, 1] of the training pairs that the run does not leave out. With fewer pairs a run takes more epochs,
        so that it sees as many samples as a run that leaves out none.
    as_reference : bool
        The run is to become a reference model.
    super_batch : int
        Batches of which a step trains on one, at least 1. A step then needs more pairs, so the batch is smaller; and an
        epoch trains on fewer samples, so there are more epochs.

    Returns
    -------
    dict
        The batch size is the largest power of two, from 2 to 256, with at least four steps per epoch; 2 if the
        table is too small for that. The number of epochs falls from 60 to 8 as the table grows; a reference model
        takes a third, and a third of the learning rate.

    Examples
    --------
    >>> defaults_for(2400)
    {'batch_size': 256, 'epochs': 30, 'learning_rate': 0.003}
    >>> defaults_for(2400, as_reference=True)
    {'batch_size': 256, 'epochs': 10, 'learning_rate': 0.001}
    >>> defaults_for(2400, used_share=0.6)["epochs"]
    50
    >>> defaults_for(2400, super_batch=5)
    {'batch_size': 64, 'epochs': 60, 'learning_rate': 0.003}
    >>> [(sized["batch_size"], sized["epochs"]) for sized in (defaults_for(48), defaults_for(1_000_000))]
    [(8, 60), (256, 8)]
    """
    used = max(1.0, used_share * num_pairs)
    epochs = min(max(round(_SAMPLES * super_batch / used), _EPOCHS[0]), _EPOCHS[1])
    return {
        "batch_size": _batch_size(used, super_batch, largest=_LARGEST_BATCH),
        "epochs": -(-epochs // _REFERENCE_SHARE) if as_reference else epochs,
        "learning_rate": _REFERENCE_LEARNING_RATE if as_reference else _LEARNING_RATE,
    }


def selection_defaults(config: TrainConfig, num_pairs: int) -> dict[str, Any]:
    """Return the defaults that a method changes on built-in data if its steps choose from a super-batch.

    Parameters
    ----------
    config : TrainConfig
        The settings, with the defaults of the data.
    num_pairs : int
        Number of training pairs.

    Returns
    -------
    dict
        Nothing if the steps choose nothing. Otherwise a batch size with at least four steps per epoch, at most 60
        epochs that train on as many samples as the epochs of the settings, and the warm-up as a share of the steps:
        the number of warm-up steps of the settings is made for more steps.

    Examples
    --------
    >>> config = TrainConfig(data="scenes", method="jest", reference="runs/r", backend="numpy", warmup_steps=50)
    >>> selection_defaults(config, 20_000)
    {'batch_size': 256, 'epochs': 40, 'warmup_steps': None}
    """
    if config.super_batch == 1:
        return {}
    return {
        "batch_size": _batch_size(num_pairs, config.super_batch, largest=config.batch_size),
        "epochs": max(config.epochs, min(config.epochs * config.super_batch, _EPOCHS[1])),
        "warmup_steps": None,
    }


def _batch_size(num_pairs: float, super_batch: int, *, largest: int) -> int:
    """Return `largest` or a half, a quarter, ... of it, so that an epoch has at least four steps; at least 2."""
    batch_size = largest
    while batch_size > 3 and batch_size * super_batch * 4 > num_pairs:
        batch_size //= 2
    return batch_size


def preset(data: str) -> dict[str, Any]:
    """Return the defaults that this kind of data changes, by the name of the setting.

    Examples
    --------
    >>> preset("digits:reference")["epochs"], preset("scenes"), preset("pairs.csv")["image_size"]
    (60, {'warmup_steps': 50}, 64)
    """
    # "digits:reference" has the presets of "digits".
    kind = data.partition(":")[0] if data in BUILT_IN_DATA else TABLE
    presets = {option.name: setting_of(option).presets or {} for option in fields(TrainConfig)}
    return {name: by_kind[kind] for name, by_kind in presets.items() if kind in by_kind}


def preferred_architecture(architecture: str, backend: Backend) -> str:
    """Return the architecture if the backend has it, else the backend's preferred architecture."""
    return architecture if architecture in backend.architectures else backend.architectures[0]
