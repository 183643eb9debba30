"""A reference model and what it says about the pairs of another run: features, pair losses, and whether to trust it.

The *pair loss* of a pair says how badly image and caption fit together for the model. The module `memorisation` has the
rule that tells whether a model has learnt wrong captions by heart.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from drrho_clip.data import BatchSource, DataSplits, captions_of
from drrho_clip.data.row_source import RowSource
from drrho_clip.encoders import CachedEncoder, open_model
from drrho_clip.encoders.protocol import Floats
from drrho_clip.errors import BadInput
from drrho_clip.features.rows import ArrayRows, FeatureRows
from drrho_clip.files.checkpoint import load_state
from drrho_clip.measure.retrieval import retrieval
from drrho_clip.processes.encoding import shared_encoder
from drrho_clip.processes.protocol import Processes
from drrho_clip.processes.together import together
from drrho_clip.reference.memorisation import (
    PairFeatures,
    Shares,
    pair_losses,
    rows_for_shares,
    shares_of,
    swapped_pair_losses,
)
from drrho_clip.run import Run, read_metrics
from drrho_core.backend import Backend

__all__ = ["Judgement", "UselessReference", "ask_reference", "measure_shares", "recorded_shares"]

# A model is near chance if R@1 on held-out pairs is below this multiple of the R@1 of random answers.
_NEAR_CHANCE: Final = 3.0


class UselessReference(BadInput):
    """A reference model that has memorised its pairs or has learnt too little to judge pairs."""


class Judgement(NamedTuple):
    """The judgement of a reference model on the pairs of a run; n is the number of training pairs.

    Attributes
    ----------
    model : str
        The reference model as the user names it, for messages.
    features : FeatureRows
        Image features and text features of the training pairs.
    losses : ndarray, shape (n,), or None
        Pair losses of the training pairs; None if they were not asked for.
    swapped_losses : ndarray, shape (m,), or None
        Pair losses of training images with captions of random other images; None if they were not asked for.
    shares : Shares
        The shares of hopeless pairs among training pairs and held-out pairs.
    validation_r1 : float
        R@1 on the held-out (validation) pairs.
    chance : float
        R@1 of random answers on these pairs.
    """

    model: str
    features: FeatureRows
    losses: npt.NDArray[np.floating] | None
    swapped_losses: npt.NDArray[np.floating] | None
    shares: Shares
    validation_r1: float
    chance: float

    @property
    def too_little_trained(self) -> bool:
        """Return True if the model answers little better than at random."""
        # In a very small gallery three times chance may be out of reach.
        return self.validation_r1 < min(_NEAR_CHANCE * self.chance, 0.5 * (1.0 + self.chance))

    def summary(self) -> str:
        """Return one line: both shares, and a warning if the model is of little use as a reference."""
        line = f"reference {self.model}: {self.shares.in_words()}"
        trouble = self._trouble()
        return line if trouble is None else f"{line}; warning: {trouble}"

    def refuse_unless_useful(self, setting: str) -> None:
        """Raise UselessReference if this model is of little use as a judge of pairs, which `setting` needs."""
        trouble = self._trouble()
        if trouble is not None:
            raise UselessReference(
                f"{setting} must be used with a reference model that has neither memorised its pairs nor learnt too "
                f"little, got {self.model}: {self.shares.in_words()}, so {trouble}"
            )

    def _trouble(self) -> str | None:
        """Return why the model is of little use as a reference, or None."""
        if self.shares.memorised:
            return "it has learnt wrong captions by heart; train it for fewer epochs, or with --as-reference"
        if self.too_little_trained:
            return (
                f"it is too little trained: R@1 is {self.validation_r1:.3f} on the held-out pairs, and random answers "
                f"would reach {self.chance:.3f}"
            )
        return None


def ask_reference(
    model: str,
    backend: Backend,
    splits: DataSplits,
    processes: Processes | None = None,
    *,
    needs_losses: bool = True,
    needs_swapped: bool = False,
) -> Judgement:
    """Encode training pairs and held-out pairs with a reference model, and compute what it says about them.

    The model is no longer in memory afterwards. The features of a cache stay on the disk.

    Parameters
    ----------
    model : str
        The reference model: the folder of a run, or another word that `drrho_clip.encoders.open_model` takes.
    backend : Backend
        The library that runs the model.
    splits : DataSplits
        The data of the run that the reference model is to help.
    processes : Processes, optional
        The processes that share the encoding; by default this process encodes alone.
    needs_losses : bool
        Compute the pair losses of all training pairs.
    needs_swapped : bool
        Compute the pair losses of images with captions of other images.

    Returns
    -------
    Judgement

    Raises
    ------
    BadInput
        If the model or an image cannot be used, or if a cache lacks a pair.
    """
    opened = together(processes, lambda: open_model(model, backend=backend, name="reference", state="reference"))
    encoder = shared_encoder(opened, processes)
    features: FeatureRows
    if isinstance(opened, CachedEncoder):
        features = together(processes, partial(opened.rows_of, splits.train))
    else:
        features = ArrayRows(*encoder.pairs(splits.train))
    validation = PairFeatures(*encoder.pairs(splits.validation), splits.validation.image_ids)
    train_rows, validation_rows = rows_for_shares(len(splits.train), len(splits.validation))
    measured = retrieval(
        validation.image, validation.text, captions_of(splits.validation), image_ids=validation.image_ids
    )

    def training_pairs(rows: npt.NDArray[np.int64]) -> PairFeatures:
        return PairFeatures(*features[rows], splits.train.image_ids[rows])

    losses = swapped_losses = None
    if needs_losses or needs_swapped:
        every_pair = training_pairs(np.arange(len(splits.train), dtype=np.int64))
        losses = pair_losses(every_pair, temperature=encoder.temperature) if needs_losses else None
        swapped_losses = swapped_pair_losses(every_pair, temperature=encoder.temperature) if needs_swapped else None
    return Judgement(
        model=model,
        features=features,
        losses=losses,
        swapped_losses=swapped_losses,
        shares=shares_of(training_pairs(train_rows), validation.part(validation_rows), temperature=encoder.temperature),
        validation_r1=measured.retrieval_r1,
        chance=1.0 / measured.gallery_size,
    )


def measure_shares(
    features_of: Callable[[BatchSource | RowSource, npt.NDArray[np.int64]], tuple[Floats, Floats]],
    train: BatchSource | RowSource,
    validation: BatchSource | RowSource,
    *,
    temperature: float,
    used_rows: npt.NDArray[np.int64] | None = None,
) -> Shares:
    """Return the shares of hopeless pairs of a model that is being trained.

    Parameters
    ----------
    features_of : callable
        ``features_of(source, rows)`` returns the features of the model for rows of a source.
    train, validation : BatchSource
        Training pairs and held-out pairs, with the model's image size and tokens; a source may keep decoded images.
    temperature : float
        Temperature > 0 of the pair loss: that with which the model is trained.
    used_rows : ndarray of int64, optional
        The training rows from which the training pairs are drawn; by default all rows.
    """
    used = np.arange(len(train), dtype=np.int64) if used_rows is None else used_rows
    positions, held_out = rows_for_shares(len(used), len(validation))
    parts = []
    for source, rows in ((train, used[positions]), (validation, held_out)):
        features = features_of(source, rows)
        parts.append(PairFeatures(*features, source.dataset.image_ids[rows]))
    return shares_of(parts[0], parts[1], temperature=temperature)


def recorded_shares(run: Run, *, state: str = "reference") -> Shares | None:
    """Return the shares of hopeless pairs that a run has logged for a state, or None if there are none.

    Raises
    ------
    BadInput
        If the checkpoint of the state is missing or damaged.
    """
    step = load_state(run.state_file(run.chosen_state(state)), "checkpoint")["step"]
    for record in read_metrics(run.metrics):
        if record.get("step") == step and "hopeless_train" in record:
            return Shares(record["hopeless_train"], record["hopeless_validation"])
    return None
