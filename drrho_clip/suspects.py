"""Rank the pairs of a data set by how badly image and caption fit together: wrong captions come first.

The *pair loss* (`drrho_core.pair_loss`) of a model is the score. The model must not have learnt the captions by heart,
which `drrho_clip.reference.memorisation` checks.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from drrho_clip.data import Dataset, captions_of, readable_rows
from drrho_clip.encoders import PairEncoder
from drrho_clip.errors import BadInput
from drrho_clip.reference.memorisation import PairFeatures, Shares, groups, hopeless_share, pair_losses, suspect_share

__all__ = ["Suspect", "Verdict", "csv_of", "judge_suspects", "rank_suspects"]

# Rows of the similarities that are in memory at the same time.
_TILE: Final = 1024


class Suspect(NamedTuple):
    """A pair and how badly it fits.

    Attributes
    ----------
    row : int
        Position of the pair in the data set; the first pair is row 0.
    image : str
        The image's path as the table writes it; empty for data in memory.
    caption : str
        The caption of the pair.
    score : float
        The pair loss: the higher, the worse. Above 0 the pair fits worse than a random image and a random caption.
    better_caption : str
        The caption, among those of other images, that fits the image best; empty if none fits better than `caption`.
    """

    row: int
    image: str
    caption: str
    score: float
    better_caption: str


class Verdict(NamedTuple):
    """How many of the ranked pairs are probably wrong, and how far that number can be trusted.

    Attributes
    ----------
    num_pairs, num_suspects : int
        Number of ranked pairs, and of those that are probably wrong.
    shares : Shares or None
        The shares of hopeless pairs (score above 0) at the end of the epoch from which the model comes, see `Shares`;
        None if the run has not recorded them.
    caveat : str or None
        Why the ranking or the number may be wrong.
    """

    num_pairs: int
    num_suspects: int
    shares: Shares | None
    caveat: str | None

    def in_words(self) -> str:
        """Return a sentence for the terminal, with the caveat."""
        line = f"{self.num_suspects:,} of {self.num_pairs:,} captions are probably wrong"
        return line if self.caveat is None else f"{line}; caveat: {self.caveat}"


def judge_suspects(suspects: Sequence[Suspect], shares: Shares | None, *, own_data: bool) -> Verdict:
    """Estimate how many pairs are wrong.

    Parameters
    ----------
    suspects : sequence of Suspect
        The result of `rank_suspects`.
    shares : Shares or None
        The shares of hopeless pairs that the run of the model has recorded.
    own_data : bool
        True if the model was trained on a part of these pairs.

    Returns
    -------
    Verdict
        `num_suspects` is the number of pairs times 1.25 times the share of hopeless held-out pairs. If the model has
        not seen the pairs, all of them are held-out pairs.

    Examples
    --------
    >>> pairs = [Suspect(row, "", "a cat", score, "") for row, score in enumerate([2.0, 1.0, -1.0, -2.0, -3.0])]
    >>> judge_suspects(pairs, Shares(train=0.18, validation=0.2), own_data=True).in_words()
    '1 of 5 captions are probably wrong'
    >>> judge_suspects(pairs, Shares(train=0.0, validation=0.2), own_data=True).num_suspects
    1
    """
    scores = np.asarray([suspect.score for suspect in suspects])
    held_out = Shares(0.0, hopeless_share(scores))
    caveat = None
    if own_data:
        if shares is None:
            caveat = (
                "the run has no record of hopeless held-out pairs, so the model may have learnt wrong captions by heart"
            )
        elif shares.memorised:
            caveat = f"the model has learnt wrong captions by heart: {shares.in_words()}"
        held_out = shares or held_out
    if caveat is None and not held_out.applies:
        share = f"the model finds only {held_out.validation:.1%} of the"
        caveat = (
            f"{share} held-out pairs hopeless, so either few captions are wrong, or the held-out captions are cleaner "
            "than the ranked captions"
            if own_data and shares is not None
            else f"{share} pairs hopeless, so probably few captions are wrong"
        )
    return Verdict(len(suspects), round(suspect_share(held_out) * len(suspects)), shares, caveat)


def rank_suspects(
    encoder: PairEncoder, dataset: Dataset, *, temperature: float = 0.07, after_batch: Callable[[], None] | None = None
) -> list[Suspect]:
    """Score all pairs of a data set, the worst pair first.

    Parameters
    ----------
    encoder : PairEncoder
        A model that has not learnt the captions by heart.
    dataset : Dataset
        At least two pairs.
    temperature : float
        Temperature > 0 of the pair loss; take that of the model's training, see `drrho_clip.run.temperature_figures`.
    after_batch : callable, optional
        Called after every 256 pairs that are encoded.

    Returns
    -------
    list of Suspect
        One entry per pair whose image can be read, by falling score; pairs with equal scores keep their order.

    Notes
    -----
    A pair is compared with at most 16,384 pairs, see `drrho_clip.reference.memorisation.pair_losses`, so that the
    time grows in proportion to the number of pairs and the memory does not grow with it.
    """
    captions: Sequence[str] = captions_of(dataset)
    image_features, text_features = encoder.pairs(dataset, after_batch=after_batch)
    # A pair with an unreadable image has no score, and the caption is no better caption of another image.
    rows = readable_rows(dataset)
    if len(rows) < 2:
        raise BadInput(f"data must have at least 2 pairs whose images can be read, got {len(rows)}")
    image_features, text_features, image_ids = image_features[rows], text_features[rows], dataset.image_ids[rows]
    captions = [captions[row] for row in rows.tolist()]
    losses = pair_losses(PairFeatures(image_features, text_features, image_ids), temperature=temperature)
    better = _better_captions(image_features, text_features, captions, image_ids)
    paths: Sequence[str] = getattr(dataset, "paths", ("",) * len(dataset))
    return [
        Suspect(
            int(rows[place]),
            paths[rows[place]],
            captions[place],
            float(losses[place]),
            "" if better[place] < 0 else captions[better[place]],
        )
        for place in np.argsort(-losses, kind="stable").tolist()
    ]


def csv_of(suspects: Sequence[Suspect]) -> str:
    """Return a CSV table with one line per pair; the columns are the attributes of `Suspect`.

    Examples
    --------
    >>> print(csv_of([Suspect(4, "a.png", "a cat, asleep", 1.25, "a dog")]), end="")
    row,image,caption,score,better_caption
    4,a.png,"a cat, asleep",1.2500,a dog
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(Suspect._fields)
    writer.writerows(suspect._replace(score=f"{suspect.score:.4f}") for suspect in suspects)  # type: ignore[arg-type]
    return text.getvalue()


def _better_captions(
    image_features: npt.NDArray[np.floating],
    text_features: npt.NDArray[np.floating],
    captions: Sequence[str],
    image_ids: npt.NDArray[np.int64],
) -> npt.NDArray[np.int64]:
    """Return, for each row, the row of the caption that fits the image best, or -1 if its own caption does."""
    # Equal captions get equal numbers, because an equal caption is not a better caption.
    number_of = {caption: number for number, caption in enumerate(dict.fromkeys(captions))}
    texts = np.asarray([number_of[caption] for caption in captions])
    better = np.full(len(captions), -1, dtype=np.int64)
    for group in groups(len(captions)):
        for start in range(0, len(group), _TILE):
            rows = group[start : start + _TILE]
            similarity = image_features[rows] @ text_features[group].T
            own = np.einsum("id,id->i", image_features[rows], text_features[rows])
            # A caption of the same image cannot be better than another caption of that image.
            same = (texts[rows, None] == texts[group]) | (image_ids[rows, None] == image_ids[group])
            similarity[same] = -np.inf
            best = np.argmax(similarity, axis=1)
            fits_better = similarity[np.arange(len(rows)), best] > own
            better[rows] = np.where(fits_better, group[best], -1)
    return better
