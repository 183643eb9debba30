"""The variance of the excess loss and of the loss of a target, after each epoch of the training.

The pair loss of an image anchor i and a caption j is ``S_ij - S_ii``, with S_ij the similarity in the target; for a
text anchor the roles of images and captions are exchanged. The excess loss is the pair loss less the pair loss of the
reference model. Both losses have the unit of a cosine: they are not divided by the temperature.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from drrho_clip.data import Dataset, captions_of
from drrho_clip.encode import Encoder
from drrho_clip.encoders import PairEncoder
from drrho_clip.epoch_length import steps_per_epoch
from drrho_clip.reproduce.experiment import Experiment
from drrho_clip.reproduce.measuring.training import Measured, clean_folder, target_config
from drrho_clip.reproduce.results import Metrics
from drrho_clip.reproduce.worlds import WORLDS
from drrho_clip.run import open_run
from drrho_clip.train import train
from drrho_core import excess_variance

__all__ = ["ANCHORS", "SPREADS", "measure_variances", "variances"]

ANCHORS: Final = ("image", "text")
SPREADS: Final = {"over_pairs": "all pairs", "within_anchors": "pairs of an anchor", "between_anchors": "anchors"}
"""The variances by the name of the field of `drrho_core.diagnostics.ExcessVariance`, in words."""

# Training pairs whose losses are measured: all pairs of these images and captions.
_NUM_PAIRS: Final = 512
# The stream of random numbers that draws these pairs.
_STREAM: Final = 14

Floats = npt.NDArray[np.float64]


def measure_variances(experiment: Experiment, folder: Path) -> Measured:
    """Train a target, and measure the variances on the same training pairs after each epoch.

    The figures have the names ``loss_image_over_pairs``, ``excess_text_between_anchors`` and so on, and one number per
    epoch.
    """
    config, backend = target_config(experiment, folder)
    assert config.reference is not None
    splits = WORLDS[experiment.dataset].open(config, folder)
    path = clean_folder(experiment, folder)
    rng = np.random.default_rng([experiment.seed, _STREAM])
    rows = np.sort(rng.permutation(len(splits.train))[:_NUM_PAIRS])
    reference = _similarities(Encoder.load(open_run(config.reference), backend, state="reference"), splits.train, rows)
    curves: dict[str, list[float]] = {}
    seconds = 0.0
    for epoch in range(1, config.epochs + 1):
        steps = epoch * steps_per_epoch(config, len(splits.train))
        # Each call trains one epoch more.
        outcome = train(config, path, resume=epoch > 1, backend=backend, splits=splits, quiet=True, stop_after=steps)
        seconds = outcome.row["seconds"]
        target = _similarities(Encoder.load(outcome.run, backend, state="last"), splits.train, rows)
        for name, value in variances(target, reference).items():
            curves.setdefault(name, []).append(value)
    shutil.rmtree(path, ignore_errors=True)
    metrics: Metrics = curves
    return Measured(metrics, seconds)


def variances(target: Floats, reference: Floats) -> dict[str, float]:
    """Return the variances of losses and excess losses, by name, from the similarities (n, n) of two models.

    Examples
    --------
    >>> import numpy as np
    >>> target = np.asarray([[1.0, 0.0, 0.5], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    >>> figures = variances(target, target)
    >>> figures["excess_image_over_pairs"], round(figures["loss_image_over_pairs"], 4)
    (0.0, 0.0347)
    """
    others = ~np.eye(len(target), dtype=np.bool_)
    figures: dict[str, float] = {}
    for anchor in ANCHORS:
        # The rows of the transposed matrix belong to captions.
        pair_losses = [(S if anchor == "image" else S.T) - np.diag(S)[:, None] for S in (target, reference)]
        for kind, weight in (("loss", 0.0), ("excess", 1.0)):
            spread = excess_variance(*pair_losses, reference_weight=weight, where=others)
            figures |= {f"{kind}_{anchor}_{name}": float(getattr(spread, name)) for name in SPREADS}
    return figures


def _similarities(encoder: PairEncoder, dataset: Dataset, rows: npt.NDArray[np.int64]) -> Floats:
    """Return the similarities of images (rows) and captions (columns) of some pairs."""
    captions = captions_of(dataset)
    images = encoder.images_of(dataset, rows).astype(np.float64)
    return images @ encoder.texts([captions[row] for row in rows.tolist()]).astype(np.float64).T
