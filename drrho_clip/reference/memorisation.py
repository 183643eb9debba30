"""Has a reference model learnt wrong captions by heart? The rule compares training pairs with held-out pairs.

A reference model tells right captions from wrong captions only as long as it has not memorised its training pairs. The
*pair loss* (`drrho_core.pair_loss`) of a pair is above 0 if the pair fits worse than a random image and a random
caption; such a pair is called *hopeless* for the model. A table with wrong captions has hopeless pairs among its
held-out pairs as well as among its training pairs. A model that has memorised still finds the held-out pairs hopeless,
but none of its training pairs. So the ratio of the two shares of hopeless pairs measures memorisation, and no knowledge
of the truth is needed. docs/how-to-choose.md has the figures behind the numbers of the rule.
"""

from __future__ import annotations

import math
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from drrho_core import pair_loss

__all__ = [
    "LEAST_NOISE",
    "PairFeatures",
    "Shares",
    "groups",
    "hopeless_share",
    "pair_losses",
    "rows_for_shares",
    "serves_better",
    "shares_of",
    "suspect_share",
    "swapped_pair_losses",
]

Floats = npt.NDArray[np.floating[Any]]

# A model has memorised if its training pairs are hopeless less than half as often as held-out pairs.
_MEMORISED: Final = 0.5
# Below a quarter the ratio has never risen again, so further training of a reference model is of no use.
_PAST_HOPE: Final = 0.25
LEAST_NOISE: Final = 0.05
"""Least share of hopeless held-out pairs at which the rule applies: clean held-out pairs would mislead the rule."""
# Leaving out too little costs more than leaving out too much, and a model misses a part of the wrong captions.
_SUSPECTS_PER_HOPELESS: Final = 1.25
# More pairs would make the shares more exact than the rule needs.
_MOST_PAIRS: Final = 2000
# Pairs that are compared with each other; 16,384 keep the time per pair constant and the similarities within memory.
_GROUP: Final = 16_384
# Each image is given other captions at least this often, and together at least that many pairs are made.
_SWAPS: Final = 4
_LEAST_SWAPPED: Final = 4096


class PairFeatures(NamedTuple):
    """Features that one model computed for m pairs, and which pairs show the same image.

    Attributes
    ----------
    image, text : ndarray, shape (m, d)
        Unit norm.
    image_ids : ndarray of integers, shape (m,), or None
        Pairs with equal numbers show the same image; None: all images differ.
    """

    image: Floats
    text: Floats
    image_ids: npt.NDArray[np.integer[Any]] | None = None

    def part(self, rows: npt.NDArray[np.int64]) -> PairFeatures:
        """Return the features of the given rows."""
        return PairFeatures(self.image[rows], self.text[rows], None if self.image_ids is None else self.image_ids[rows])


class Shares(NamedTuple):
    """The shares of hopeless pairs among the training pairs and among the held-out (validation) pairs of a model.

    Attributes
    ----------
    train, validation : float
        Shares in [0, 1] of the pairs with a pair loss above 0.

    Examples
    --------
    >>> Shares(train=0.25, validation=0.28).memorised, Shares(train=0.0, validation=0.28).memorised
    (False, True)

    Clean held-out pairs do not show whether wrong training captions were memorised, so the rule does not apply:

    >>> Shares(train=0.0, validation=0.01).applies
    False
    """

    train: float
    validation: float

    @property
    def applies(self) -> bool:
        """Return True if enough held-out pairs are hopeless, so that the ratio of the shares means something."""
        return self.validation >= LEAST_NOISE

    @property
    def memorised(self) -> bool:
        """Return True if the model has learnt wrong captions by heart."""
        return self.applies and self.train < _MEMORISED * self.validation

    @property
    def past_hope(self) -> bool:
        """Return True if the model has memorised so much that more training cannot give a better reference model."""
        return self.applies and self.train < _PAST_HOPE * self.validation

    def in_words(self) -> str:
        """Return one line with both shares."""
        return (
            f"it finds {self.validation:.0%} of the held-out pairs and {self.train:.0%} of the training pairs hopeless"
        )


def serves_better(r1: float, shares: Shares, best_r1: float | None) -> bool:
    """Return whether the state of an epoch is a better reference model than the state that is kept so far.

    Among the states that have not memorised, the state with the best R@1 serves; of equal states the earliest serves.

    Parameters
    ----------
    r1 : float
        R@1 of the epoch's state on held-out pairs.
    shares : Shares
        The shares of hopeless pairs of this state.
    best_r1 : float or None
        R@1 of the state that is kept so far; None if no state is kept.

    Examples
    --------
    >>> serves_better(0.4, Shares(0.25, 0.28), None), serves_better(0.7, Shares(0.05, 0.28), 0.4)
    (True, False)
    """
    return not shares.memorised and (best_r1 is None or r1 > best_r1)


def hopeless_share(pair_losses: Floats) -> float:
    """Return the share of hopeless pairs: those with a pair loss above 0.

    Parameters
    ----------
    pair_losses : ndarray, shape (n,)
        Pair losses, n >= 1.

    Returns
    -------
    float
        In [0, 1].

    Examples
    --------
    >>> import numpy as np
    >>> hopeless_share(np.asarray([-2.0, 0.5, 0.0, 1.0]))
    0.5
    """
    return float(np.mean(pair_losses > 0))


def pair_losses(pairs: PairFeatures, *, temperature: float) -> Floats:
    """Return the pair loss of every pair of a data set, in bounded memory.

    A pair is compared with at most 16,384 pairs. More pairs are divided into groups of about equal size, at random but
    always in the same way; a pair is then compared with the pairs of its group. A pair is not compared with other
    captions of its image, as in training: those captions are right as well.

    Parameters
    ----------
    pairs : PairFeatures
        Features of n >= 2 pairs.
    temperature : float
        Temperature > 0; take that with which the model was trained, see `drrho_clip.run.temperature_figures`.

    Returns
    -------
    ndarray, shape (n,)
        Dimensionless; above 0 for hopeless pairs, and 0 for a pair that is compared with no other pair.

    Examples
    --------
    >>> import numpy as np
    >>> images, texts = np.eye(3), np.eye(3)[[0, 2, 1]]            # the second and the third text are swapped
    >>> np.round(pair_losses(PairFeatures(images, texts), temperature=0.5), 1).tolist()
    [-2.0, 1.4, 1.4]
    """
    losses = np.empty(len(pairs.image), dtype=pairs.image.dtype)
    for rows in groups(len(losses)):
        group = pairs.part(rows)
        ids, mask = group.image_ids, None
        # Most tables have one caption per image and need no mask, which would take 256 MiB for the largest group.
        if ids is not None and len(np.unique(ids)) < len(ids):
            mask = ids[:, None] != ids[None, :]
        losses[rows] = pair_loss(group.image, group.text, temperature=temperature, pair_mask=mask)
    return losses


def swapped_pair_losses(pairs: PairFeatures, *, temperature: float) -> Floats:
    """Return the losses of pairs that are wrong for certain: images with captions of random other images.

    Parameters
    ----------
    pairs : PairFeatures
        Features of n >= 2 pairs.
    temperature : float
        Temperature > 0, as in `pair_losses`.

    Returns
    -------
    ndarray, shape (m,)
        The result has at least four losses per image. It has fewer if a caption of the image itself is drawn by chance,
        and none if all pairs show the same image.

    Examples
    --------
    >>> import numpy as np
    >>> losses = swapped_pair_losses(PairFeatures(np.eye(3), np.eye(3)), temperature=0.5)
    >>> len(losses) >= 12, bool(np.all(losses > 0))
    (True, True)
    """
    # The same table always gives the same pairs, so that a repeated run has the same weights.
    rng = np.random.default_rng(len(pairs.image))
    ids = np.arange(len(pairs.image)) if pairs.image_ids is None else pairs.image_ids
    parts = [np.empty(0, dtype=pairs.image.dtype)]
    for _ in range(max(_SWAPS, math.ceil(_LEAST_SWAPPED / len(ids)))):
        for rows in groups(len(ids)):
            # Neighbours in a table often resemble each other, so each image gets the next caption in a random order.
            order = rng.permutation(rows)
            partners = np.roll(order, 1)
            group = pairs.image[order], pairs.text[partners]
            mask = None
            # As in `pair_losses`, other captions of the image are left out. The own caption stays: the caption that
            # belongs to the image of a wrong pair is in the data set as well.
            if len(np.unique(ids[order])) < len(order):
                mask = ids[order][:, None] != ids[partners][None, :]
                mask |= order[:, None] == partners[None, :]
            losses = pair_loss(*group, temperature=temperature, pair_mask=mask)
            parts.append(losses[ids[order] != ids[partners]])
    return np.concatenate(parts)


def groups(size: int) -> list[npt.NDArray[np.int64]]:
    """Return the rows 0 .. size - 1 in groups of at most 16,384 rows that are compared with each other."""
    count = math.ceil(size / _GROUP)
    if count == 1:
        return [np.arange(size, dtype=np.int64)]
    # The groups are random, because neighbours in a table often resemble each other.
    return np.array_split(np.random.default_rng(size).permutation(size).astype(np.int64), count)


def rows_for_shares(num_train: int, num_validation: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return the training rows and the validation rows from which `shares_of` computes the shares.

    Both parts have the same number of rows, at most 2,000, because a pair loss depends on the number of pairs with
    which a pair is compared: the more pairs, the more often a few of them fit well by chance. The rows are drawn at
    random, but the same numbers of pairs always give the same rows, so that the shares of all epochs can be compared.

    Parameters
    ----------
    num_train, num_validation : int
        Sizes of both parts, at least 2.

    Returns
    -------
    tuple of ndarray of int64, shape (m,) each
        Rows in rising order, without repeats.

    Examples
    --------
    >>> [len(rows) for rows in rows_for_shares(100, 30)]
    [30, 30]
    """
    count = min(num_train, num_validation, _MOST_PAIRS)
    train, validation = (
        np.sort(np.random.default_rng(size).choice(size, count, replace=False)) for size in (num_train, num_validation)
    )
    return train, validation


def shares_of(train: PairFeatures, validation: PairFeatures, *, temperature: float) -> Shares:
    """Return the shares of hopeless pairs of both parts.

    Parameters
    ----------
    train, validation : PairFeatures
        Features of the rows that `rows_for_shares` chose.
    temperature : float
        Temperature > 0, as in `pair_losses`.

    Returns
    -------
    Shares
    """
    return Shares(*(hopeless_share(pair_losses(part, temperature=temperature)) for part in (train, validation)))


def suspect_share(shares: Shares) -> float:
    """Return the share of pairs that are probably wrong: 1.25 times the share of hopeless held-out pairs.

    Leaving out too few pairs costs more than leaving out too many, and a model does not find every wrong caption
    hopeless.

    Examples
    --------
    >>> suspect_share(Shares(train=0.25, validation=0.28))
    0.35
    """
    return min(1.0, round(_SUSPECTS_PER_HOPELESS * shares.validation, 6))
