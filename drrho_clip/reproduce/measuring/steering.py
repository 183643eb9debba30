"""A reference model and the target that it steers: how well the model separates wrong captions, and what it gives.

The *pair loss* of a training pair says how badly image and caption fit together for the reference model, see
`drrho_core.pair_loss`. A good judge gives wrong captions a larger pair loss than right captions.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy.typing as npt

from drrho_clip.config import TrainConfig
from drrho_clip.data import DataSplits
from drrho_clip.encoders import open_model
from drrho_clip.errors import BadInput
from drrho_clip.evaluate import evaluate
from drrho_clip.reference.judgement import Judgement, ask_reference
from drrho_clip.reference.pair_choice import choose_pairs
from drrho_clip.reproduce.experiment import Experiment
from drrho_clip.reproduce.measuring.guided import part_of_fold, steered_by_folds
from drrho_clip.reproduce.measuring.training import (
    REFUSED,
    Measured,
    clean_folder,
    measure_target,
    steered_config,
    target_config,
)
from drrho_clip.reproduce.worlds import WORLDS
from drrho_core.backend import Backend

__all__ = ["measure_steering", "measure_steering_by_halves", "measure_steering_by_last_state", "separation"]

_OTHER_STATES: Final = ("checkpoint-best*", "checkpoint-reference*")


def measure_steering(experiment: Experiment, folder: Path) -> Measured:
    """Measure a reference model on the data of the target, then train the target and measure it.

    The figures of the reference model are ``reference_retrieval_r1`` and others of the test pairs,
    ``reference_validation_r1``, ``hopeless_train`` and ``hopeless_validation``, and ``reference_auc`` if the data know
    which captions are wrong. See `drrho_clip.reference.memorisation.Shares` and `separation`.
    """
    config, backend = target_config(experiment, folder)
    return _measure(experiment, config, backend, folder)


def measure_steering_by_last_state(experiment: Experiment, folder: Path) -> Measured:
    """Measure as `measure_steering`, with the last state of the reference model in place of the best state.

    The state with the best validation R@1 comes from before the model has memorised its pairs; the last state does not.
    """
    config, backend = target_config(experiment, folder)
    assert config.reference is not None
    # A run without other states gives its last state.
    copy = clean_folder(experiment, folder / "last")
    shutil.copytree(config.reference, copy, ignore=shutil.ignore_patterns(*_OTHER_STATES))
    measured = _measure(experiment, replace(config, reference=str(copy)), backend, folder)
    shutil.rmtree(copy)
    return measured


def measure_steering_by_halves(experiment: Experiment, folder: Path) -> Measured:
    """Measure as `measure_steering`, with two models that were trained on a half of the target's own pairs each.

    The model that has not seen an image judges it. The figures of the test pairs are those of the first model.
    """
    place = clean_folder(experiment, folder, "-features")
    # The halves are the reference model, so the model of the recipe is not trained on all pairs.
    config, backend = steered_config(experiment, folder, str(place))
    try:
        steered = steered_by_folds(experiment, folder, config, backend, 2, place)
        return _measure(experiment, steered, backend, folder, model=str(part_of_fold(place, 0)))
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _measure(
    experiment: Experiment, config: TrainConfig, backend: Backend, folder: Path, model: str | None = None
) -> Measured:
    """Measure with the reference model of the settings; a model apart is measured on the test pairs in its place."""
    splits = WORLDS[experiment.dataset].open(config, folder)
    assert config.reference is not None
    judgement = ask_reference(config.reference, backend, splits)
    figures = _quality(experiment, model or config.reference, backend, splits, judgement, folder)
    try:
        choose_pairs(config, judgement)
    except BadInput:
        # The refusal is a result: a user would see this message in place of a model.
        return Measured({REFUSED: 1.0, **figures}, 0.0)
    measured = measure_target(experiment, config, backend, folder)
    return Measured({**measured.metrics, **figures}, measured.seconds)


def _quality(
    experiment: Experiment, model: str, backend: Backend, splits: DataSplits, judgement: Judgement, folder: Path
) -> dict[str, float]:
    """Return the figures of the reference model."""
    assert judgement.losses is not None
    encoder = open_model(model, backend=backend, name="reference", state="reference")
    more = WORLDS[experiment.dataset].more_figures(encoder, splits, folder)
    test = {"retrieval_r1": float(evaluate(encoder, splits.test, zero_shot=False)["retrieval_r1"]), **more}
    figures = {
        **{f"reference_{name}": value for name, value in test.items()},
        "reference_validation_r1": judgement.validation_r1,
        "hopeless_train": judgement.shares.train,
        "hopeless_validation": judgement.shares.validation,
    }
    is_swapped = getattr(splits.train, "is_swapped", None)
    if is_swapped is not None and is_swapped.any() and not is_swapped.all():
        figures["reference_auc"] = separation(judgement.losses, is_swapped)
    return figures


def separation(losses: npt.NDArray[Any], is_swapped: npt.NDArray[Any]) -> float:
    """Return the share of pairs (wrong caption, right caption) in which the wrong caption has the larger loss.

    This share is the area under the curve of hits against false alarms (AUC): 1 for a perfect judge, and 0.5 for a
    judge that guesses.

    Parameters
    ----------
    losses : ndarray, shape (n,)
        Pair losses.
    is_swapped : ndarray of bool, shape (n,)
        True for wrong captions, of which there is at least one, as of right captions.

    Examples
    --------
    >>> import numpy as np
    >>> separation(np.asarray([3.0, 1.0, 2.0, 0.0]), np.asarray([True, True, False, False]))
    0.75
    """
    # Training needs no scikit-learn, so it is loaded only here.
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(is_swapped, losses))
