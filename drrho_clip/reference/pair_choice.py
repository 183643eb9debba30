"""Which training pairs a run uses, and with which weight, if a reference model has judged the pairs.

The setting `drop_suspects` leaves out the pairs with the largest pair losses of the reference model, and the setting
`anchor_weights` gives small weights to such pairs. The choice is written into the folder of the run, so that a resumed
run uses the same pairs and needs no reference model. The rows of the data set keep their numbers.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from drrho_clip.config import TrainConfig
from drrho_clip.epoch_length import pairs_per_step
from drrho_clip.errors import BadInput
from drrho_clip.files.checkpoint import load_arrays, save_arrays
from drrho_clip.reference.judgement import Judgement
from drrho_clip.reference.memorisation import suspect_share
from drrho_core import posterior_anchor_weight, reference_anchor_weight

__all__ = ["PairChoice", "choose_pairs", "keep_best_rows", "load_pair_choice", "save_pair_choice"]

_KIND = "pair-choice"


class PairChoice(NamedTuple):
    """The training pairs of a run, out of n pairs.

    Attributes
    ----------
    rows : ndarray of int64, shape (m,)
        The rows that are used, in rising order.
    anchor_weight : ndarray, shape (n,), or None
        Factor of each pair in the loss, with mean 1 over `rows` and 0 elsewhere; None: all factors are 1.
    swapped_share : float or None
        The estimated share of wrong captions among all n pairs; None if no estimate was made in this process.
    """

    rows: npt.NDArray[np.int64]
    anchor_weight: npt.NDArray[np.floating] | None
    swapped_share: float | None = None


def keep_best_rows(losses: npt.NDArray[np.floating], share: float) -> npt.NDArray[np.int64]:
    """Return the rows that remain if the given share of rows with the largest losses is left out.

    Parameters
    ----------
    losses : ndarray, shape (n,)
        Pair losses.
    share : float
        In [0, 1].

    Returns
    -------
    ndarray of int64, shape (n - round(share * n),)
        Rows in rising order. Of rows with equal losses the later rows are left out first.

    Examples
    --------
    >>> keep_best_rows(np.asarray([-3.0, 2.0, -1.0, 0.5]), 0.5).tolist()
    [0, 2]
    """
    kept = len(losses) - round(share * len(losses))
    return np.sort(np.argsort(losses, kind="stable")[:kept]).astype(np.int64)


def choose_pairs(config: TrainConfig, judgement: Judgement) -> PairChoice | None:
    """Return the pairs that the settings `drop_suspects` and `anchor_weights` select, or None if neither is set.

    Raises
    ------
    BadInput
        If the reference model has memorised its pairs or is too little trained, or if too few pairs remain.
    """
    dropped, weights = config.drop_suspects, config.anchor_weights
    if dropped is None and weights is None:
        return None
    judgement.refuse_unless_useful("anchor_weights" if dropped is None else "drop_suspects")
    losses = judgement.losses
    if losses is None:
        raise BadInput("judgement must have the pair losses of the training pairs, got a judgement without")
    rows = np.arange(len(losses), dtype=np.int64)
    if dropped is not None:
        rows = keep_best_rows(losses, suspect_share(judgement.shares) if isinstance(dropped, str) else dropped)
        if len(rows) < pairs_per_step(config):
            limit = "batch_size" if config.super_batch == 1 else "batch_size times super_batch"
            raise BadInput(
                f"drop_suspects must leave at least {limit} ({pairs_per_step(config)}) of {len(losses)} pairs, got "
                f"{dropped!r}, which leaves {len(rows)}"
            )
    if weights is None:
        return PairChoice(rows, None)
    # The weights of the pairs that are used must have mean 1, so that the learning rate keeps its meaning.
    factors = np.zeros_like(losses)
    if weights == "reference":
        factors[rows] = reference_anchor_weight(losses[rows])
        return PairChoice(rows, factors)
    # The share of swapped captions is that of all pairs, so the estimate needs the pairs that are left out as well.
    swapped_losses = judgement.swapped_losses
    if swapped_losses is None or len(swapped_losses) == 0:
        raise BadInput("anchor_weights posterior must have pairs with different images, got one image for all pairs")
    estimate = posterior_anchor_weight(losses, swapped_losses)
    chosen = estimate.anchor_weight[rows]
    if not np.any(chosen):
        raise BadInput("drop_suspects must leave pairs with a weight above 0 for anchor_weights posterior, got none")
    factors[rows] = chosen / np.mean(chosen)
    return PairChoice(rows, factors, float(estimate.swapped_share))


def save_pair_choice(path: Path, choice: PairChoice, fingerprint: str) -> None:
    """Write a choice, with the fingerprint of the training data that it belongs to."""
    arrays: dict[str, np.ndarray] = {"rows": choice.rows}
    if choice.anchor_weight is not None:
        arrays["anchor_weight"] = choice.anchor_weight
    save_arrays(path, _KIND, arrays, {"data": fingerprint, "used": len(choice.rows)})


def load_pair_choice(path: Path, fingerprint: str) -> PairChoice:
    """Read the file that `save_pair_choice` wrote.

    Raises
    ------
    BadInput
        If the file is damaged or belongs to other data.
    """
    arrays, state = load_arrays(path, _KIND)
    if state.get("data") != fingerprint:
        raise BadInput(f"{path} must be made from this run's data ({fingerprint}), got {state.get('data')}")
    return PairChoice(arrays["rows"], arrays.get("anchor_weight"))
