"""Cards: pictures with words below, in a grid, for the pages of search results and of suspects."""

from __future__ import annotations

from dataclasses import dataclass

from drrho_clip.data import Dataset
from drrho_clip.errors import BadInput
from drrho_clip.report.pictures import Thumbnail, thumbnail
from drrho_clip.report.style import UNKNOWN

__all__ = ["LONGEST_TEXT", "MOST_PICTURES", "Card", "picture_card", "score", "shortened"]

MOST_PICTURES = 300
"""Largest number of pictures on a page. A thumbnail of a photo has about 10 kB and one of noise 35 kB."""

LONGEST_TEXT = 280
"""Longest caption or path on a card, in characters."""


@dataclass(frozen=True)
class Card:
    """One picture with the words below it; the page escapes all words.

    Attributes
    ----------
    picture : Thumbnail or None
        The picture, or None if the picture cannot be shown.
    flaw : str
        The reason why there is no picture, or an empty text.
    place : int
        The place in the ranking, from 1.
    score : str
        The score as the page shows it.
    caption, name : str
        The caption and the path of the image.
    better_caption : str
        A caption of the same data that fits the picture better, or an empty text.
    doubtful : bool
        True if the caption is probably wrong.
    """

    picture: Thumbnail | None
    flaw: str
    place: int
    score: str
    caption: str
    name: str
    better_caption: str = ""
    doubtful: bool = False


def picture_card(
    dataset: Dataset,
    row: int,
    *,
    place: int,
    value: float,
    caption: str,
    name: str,
    better_caption: str = "",
    doubtful: bool = False,
) -> Card:
    """Return the card of a row; an image that cannot be read leaves one line in place of the picture.

    Parameters
    ----------
    dataset : Dataset
        The data whose image is shown.
    row : int
        The row in the data.
    place : int
        The place in the ranking, from 1.
    value : float
        The score.
    caption, name, better_caption : str
        As in `Card`; texts of more than `LONGEST_TEXT` characters are cut off.
    doubtful : bool
        As in `Card`.
    """
    picture, flaw = None, ""
    try:
        picture = thumbnail(dataset[row].image)
    # The page is written after long work, so a file that has gone in the meantime must not cost the page.
    except (BadInput, OSError) as error:
        flaw = shortened(f"The picture cannot be shown: {error}")
    return Card(
        picture, flaw, place, score(value), shortened(caption), shortened(name), shortened(better_caption), doubtful
    )


def score(value: float) -> str:
    """Write a score with three decimals and a real minus sign.

    Examples
    --------
    >>> score(0.5), score(-1.25)
    ('0.500', '−1.250')
    """
    return f"{value:.3f}".replace("-", "\N{MINUS SIGN}") if value == value else UNKNOWN


def shortened(text: str) -> str:
    """Return a text of at most `LONGEST_TEXT` characters, with an ellipsis in place of the rest."""
    return text if len(text) <= LONGEST_TEXT else f"{text[: LONGEST_TEXT - 1]}…"
