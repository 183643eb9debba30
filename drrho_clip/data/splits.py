"""Open the data set that the settings of a run name."""

from __future__ import annotations

from typing import Any, Final

import numpy as np

from drrho_clip.config import BUILT_IN_DATA, TrainConfig
from drrho_clip.data import (
    Dataset,
    DataSplits,
    PairsDataset,
    digit_splits,
    digits,
    exchange_captions,
    open_data,
    pair_splits,
    scene_splits,
    scenes,
)
from drrho_clip.data.joined import JoinedDataset
from drrho_clip.data.sources.idx import IdxStore

# The stream of random numbers that draws the swapped captions.
_SWAPS: Final = 12


def open_splits(config: TrainConfig) -> DataSplits:
    """Open the training, validation and test data that the settings name: built-in data, or data of any other kind.

    Raises
    ------
    BadInput
        If the file or an image in it cannot be used.
    MissingExtra
        If a library that the data need is not installed.
    """
    if config.data not in BUILT_IN_DATA:
        splits = pair_splits(
            config.data,
            validation=config.validation,
            seed=config.data_seed,
            image_column=config.image_column,
            caption_column=config.caption_column,
            label_column=config.label_column,
            max_unreadable=config.max_unreadable,
        )
        return _with_swapped_captions(splits, config)
    family, _, stream = config.data.partition(":")
    options: dict[str, Any] = {"seed": config.data_seed, "swapped_fraction": config.swapped_fraction}
    # With "scenes:reference" only the training data differ from those of "scenes"; validation and test data are equal.
    if family == "scenes":
        splits = scene_splits(config.train_size, **options)
        return splits._replace(train=scenes(config.train_size, stream=stream, **options)) if stream else splits
    splits = digit_splits(**options)
    return splits._replace(train=digits(stream, **options)) if stream else splits


def open_all_pairs(config: TrainConfig) -> Dataset:
    """Open all pairs of the data that the settings name; of built-in data training, validation and test pairs in a row.

    Raises
    ------
    BadInput
        If the file or an image in it cannot be used.
    MissingExtra
        If a library that the data need is not installed.
    """
    if config.data in BUILT_IN_DATA:
        return JoinedDataset(config.data, open_splits(config))
    pairs = open_table(config.data, config)
    return with_captions_of(open_splits(config), pairs) if swaps_captions(pairs, config) else pairs


def swaps_captions(pairs: PairsDataset, config: TrainConfig) -> bool:
    """Return whether a run swaps training captions: those of IDX files, which are made from the classes."""
    return pairs.source.store.kind == IdxStore.kind and config.swapped_fraction > 0


def with_captions_of(splits: DataSplits, pairs: PairsDataset) -> PairsDataset:
    """Return all pairs of a source with the captions that its training pairs have in `splits`."""
    train = splits.train
    assert isinstance(train, PairsDataset)
    captions = list(pairs.captions)
    for row, caption in zip(train.source_rows.tolist(), train.captions, strict=True):
        captions[row] = caption
    return pairs.with_captions(captions)


def _with_swapped_captions(splits: DataSplits, config: TrainConfig) -> DataSplits:
    """Swap training captions of IDX files; other captions are those of the user."""
    train = splits.train
    if not isinstance(train, PairsDataset) or not swaps_captions(train, config):
        return splits
    rng = np.random.default_rng([config.data_seed, _SWAPS])
    captions, _ = exchange_captions(train.captions, config.swapped_fraction, rng)
    return splits._replace(train=train.with_captions(captions))


def open_table(path: str, config: TrainConfig) -> PairsDataset:
    """Open all pairs of other data than those of a run; the columns have the names that the run's settings give.

    Raises
    ------
    BadInput
        If the file or an image in it cannot be used.
    MissingExtra
        If a library that the data need is not installed.
    """
    return open_data(
        path,
        image_column=config.image_column,
        caption_column=config.caption_column,
        label_column=config.label_column,
        max_unreadable=config.max_unreadable,
    )
