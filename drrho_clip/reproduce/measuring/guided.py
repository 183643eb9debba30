"""Targets that are steered by a blend of two reference models, or by models that have not seen what they judge."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from drrho_clip.config import TrainConfig
from drrho_clip.data import DataSplits, captions_of
from drrho_clip.encoders import FixedFeatures, PairEncoder, open_model
from drrho_clip.encoders.protocol import Floats
from drrho_clip.features import encode_pairs
from drrho_clip.reference.judgement import UselessReference
from drrho_clip.reproduce.experiment import Experiment
from drrho_clip.reproduce.measuring.training import (
    FIGURES,
    REFUSED,
    Measured,
    clean_folder,
    config_of,
    measure_target,
    reference_run,
    target_config,
)
from drrho_clip.reproduce.packaged.pool import StoredPairs
from drrho_clip.reproduce.worlds import WORLDS
from drrho_clip.train import train
from drrho_core.backend import Backend

__all__ = ["blended", "folds_of", "in_own_columns", "measure_guided", "part_of_fold", "steered_by_folds"]

# The stream of random numbers that divides the training pairs.
_FOLDS: Final = 9


def measure_guided(experiment: Experiment, folder: Path) -> Measured:
    """Train a target and measure the best state; a reference model that `drrho train` refuses gives figures of 0.

    The entry `references` of the settings, if there is one, says which features steer. The entry
    ``{"share": w, "second": recipe}`` blends the reference model of the experiment with a second model, which has the
    share w of the similarity. ``{"folds": k}`` trains k models with the recipe of the reference model on the target's
    own training pairs. Each leaves out one of k parts and judges the images of this part; with k = 1 the model has seen
    all pairs.
    """
    config, backend = target_config(experiment, folder)
    kind = experiment.settings.get("references")
    # Features and models that only this target needs are removed with it.
    features = clean_folder(experiment, folder, "-features")
    if kind is not None:
        config = _steered(experiment, folder, config, backend, kind, features)
    # A refusal is a result: a user of this setting would get no model.
    try:
        return measure_target(experiment, config, backend, folder)
    except UselessReference:
        return Measured(dict.fromkeys(FIGURES, 0.0) | {REFUSED: 1.0}, 0.0)
    finally:
        shutil.rmtree(features, ignore_errors=True)


def _steered(
    experiment: Experiment,
    folder: Path,
    config: TrainConfig,
    backend: Backend,
    kind: Mapping[str, Any],
    place: Path,
) -> TrainConfig:
    """Write the features that steer into a folder, and return the settings that use them."""
    splits = WORLDS[experiment.dataset].open(config, folder)
    if "share" in kind:
        assert config.reference is not None
        second = replace(experiment, settings={**experiment.settings, "reference": kind["second"]})
        models = [_open(config.reference, backend), _open(str(reference_run(second, folder)), backend)]
        (images, texts), (others, other_texts) = (_features(model, splits) for model in models)
        sides = blended(images, others, kind["share"]), blended(texts, other_texts, kind["share"])
        return replace(config, reference=_write(*sides, models[0].temperature, splits, place))
    return steered_by_folds(experiment, folder, config, backend, kind["folds"], place)


def steered_by_folds(
    experiment: Experiment, folder: Path, config: TrainConfig, backend: Backend, folds: int, place: Path
) -> TrainConfig:
    """Train models on the target's own pairs, each without a part, and return the settings of a target they steer.

    Parameters
    ----------
    experiment : Experiment
        The recipe of the models is that of the reference model, and their data are those of the target.
    folder : Path
        The folder of the runs.
    config : TrainConfig
        The settings of the target.
    backend : Backend
    folds : int
        Number of models; the images of a part are judged by the model that has not seen them. A single model has seen
        all pairs.
    place : Path
        The folder of the models (see `part_of_fold`) and of the features that steer.
    """
    splits = WORLDS[experiment.dataset].open(config, folder)
    part_of = folds_of(splits.train.image_ids, folds, experiment.seed)
    settings = {**experiment.settings["reference"], **experiment.settings["data"]}
    recipe = config_of(experiment, folder, settings, "clip", backend)
    models = []
    for part in range(folds):
        # A single model is trained on all pairs.
        rows = np.flatnonzero((part_of != part) | (folds == 1))
        own = splits._replace(train=splits.train.subset(rows))  # type: ignore[attr-defined]  # all worlds have it
        train(recipe, part_of_fold(place, part), backend=backend, splits=own, quiet=True)
        models.append(_open(str(part_of_fold(place, part)), backend))
    # No model has seen the validation pairs, so the first model judges them.
    part_of = np.concatenate([part_of, np.zeros(len(splits.validation), dtype=np.int64)])
    features = [_features(model, splits) for model in models]
    images = in_own_columns([image for image, _ in features], part_of)
    texts = np.concatenate([text for _, text in features], axis=1)
    # The rows of a cache have norm 1, which divides the similarities by sqrt(k). The temperature of the pair losses is
    # divided too, and a larger weight undoes the division in the loss.
    scale = math.sqrt(folds)
    config = replace(config, reference=_write(images, texts, models[0].temperature / scale, splits, place))
    return replace(config, reference_weight=config.reference_weight * scale) if config.method == "drrho" else config


def part_of_fold(place: Path, part: int) -> Path:
    """Return the folder of the model that judges a part."""
    return place / f"part-{part}"


def _open(model: str, backend: Backend) -> PairEncoder:
    return open_model(model, backend=backend, name="reference", state="reference")


def folds_of(image_ids: npt.NDArray[np.int64], folds: int, seed: int) -> npt.NDArray[np.int64]:
    """Return the part of each row, 0 .. folds - 1; rows with the same image are in the same part.

    Examples
    --------
    >>> parts = folds_of(np.asarray([0, 0, 1, 2, 3]), 2, seed=0)
    >>> bool(parts[0] == parts[1]), np.bincount(parts).sum()
    (True, np.int64(5))
    """
    # The model of a part must not have seen the image in another row.
    numbers, place = np.unique(image_ids, return_inverse=True)
    order = np.random.default_rng([seed, _FOLDS]).permutation(len(numbers))
    return (order % folds)[place].astype(np.int64)


def blended(first: Floats, second: Floats, share: float) -> Floats:
    """Return features side by side, so that products of such features blend the products of both.

    Examples
    --------
    >>> x, y = np.asarray([[1.0]]), np.asarray([[0.6, 0.8]])
    >>> (blended(x, y, 0.25) @ blended(-x, y, 0.25).T).round(9).tolist()  # 3/4 of -1 and 1/4 of 1
    [[-0.5]]
    """
    return np.concatenate([math.sqrt(1.0 - share) * first, math.sqrt(share) * second], axis=1)


def in_own_columns(features: Sequence[Floats], part_of: npt.NDArray[np.int64]) -> Floats:
    """Return features of k models side by side, with zeros for all models but that of the row's part.

    Examples
    --------
    >>> in_own_columns([np.asarray([[1.0], [2.0]]), np.asarray([[3.0], [4.0]])], np.asarray([1, 0])).tolist()
    [[0.0, 3.0], [2.0, 0.0]]
    """
    return np.concatenate([x * (part_of == part)[:, None] for part, x in enumerate(features)], axis=1)


def _features(model: PairEncoder, splits: DataSplits) -> tuple[Floats, Floats]:
    """Return image features and text features of the training pairs and then of the validation pairs."""
    parts = [model.pairs(part) for part in (splits.train, splits.validation)]
    return np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts])


def _write(image: Floats, text: Floats, temperature: float, splits: DataSplits, place: Path) -> str:
    """Write a cache of the training pairs and the validation pairs, and return the folder."""
    parts = splits.train, splits.validation
    captions = [caption for part in parts for caption in captions_of(part)]
    digests = np.concatenate([part.image_digests() for part in parts])
    # A cache finds features by the content of image and caption, so no pixels are needed.
    pairs = StoredPairs("pairs", captions, digests, np.full(len(captions), -1, dtype=np.int64))
    cache = place / "cache"
    encode_pairs(FixedFeatures("blend", image, text, temperature=temperature), pairs, cache)
    return str(cache)
