"""The page of suspects: the pairs whose captions fit worst, with the pictures and the captions that fit better."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from drrho_clip.data import Dataset
from drrho_clip.errors import BadInput
from drrho_clip.report.cards import MOST_PICTURES, picture_card, score, shortened
from drrho_clip.report.html import figure, render, write_page
from drrho_clip.report.scores import score_histogram

__all__ = ["RankedPair", "write_suspects_page"]


class RankedPair(Protocol):
    """A pair with the score by which the pairs are ranked, such as `drrho_clip.suspects.Suspect`."""

    @property
    def row(self) -> int:
        """The row of the data set."""
        ...

    @property
    def image(self) -> str:
        """The path of the image as the table writes it."""
        ...

    @property
    def caption(self) -> str:
        """The caption of the row."""
        ...

    @property
    def score(self) -> float:
        """The larger, the worse the caption fits; finite."""
        ...

    @property
    def better_caption(self) -> str:
        """A caption of the same data that fits the image better, or an empty text."""
        ...


def write_suspects_page(
    path: str | os.PathLike[str],
    ranked: Sequence[RankedPair],
    dataset: Dataset,
    *,
    num_wrong: int | None,
    data_name: str,
    run_name: str,
    table_name: str,
    caveat: str | None = None,
) -> Path:
    """Write the ranked pairs of a data set as one HTML file: a histogram of the scores, and the worst pairs.

    Parameters
    ----------
    path : path
        The file to write; its folder must exist. The file appears whole or not at all.
    ranked : sequence of RankedPair
        All pairs, the worst first; at least one.
    dataset : Dataset
        The data of which the pictures are shown.
    num_wrong : int or None
        Number of pairs, from the worst on, whose captions are probably wrong; None if no rule says which are wrong.
    data_name, run_name, table_name : str
        The names, on the page, of the data, of the run and of the table that has all ranked pairs.
    caveat : str, optional
        Why the ranking or the number may be wrong.

    Returns
    -------
    Path
        The written file.

    Raises
    ------
    BadInput
        If there is no pair, or a score is not finite; then no file is written.
    """
    if not ranked:
        raise BadInput("ranked must hold at least one pair, got none")
    scores = np.array([pair.score for pair in ranked], dtype=np.float64)
    if not np.isfinite(scores).all():
        raise BadInput(f"scores must be finite, got {scores[~np.isfinite(scores)][0]}")
    doubtful = None if num_wrong is None else np.arange(len(ranked)) < num_wrong
    chart = score_histogram(
        scores, doubtful=doubtful, key="scores", title="Scores of the captions", x_name="score (larger fits worse)"
    )
    cards = [
        picture_card(
            dataset,
            pair.row,
            place=place,
            value=pair.score,
            caption=pair.caption,
            name=pair.image or f"row {pair.row}",
            better_caption=pair.better_caption,
            doubtful=place <= (num_wrong or 0),
        )
        for place, pair in enumerate(ranked[:MOST_PICTURES], start=1)
    ]
    content = {
        "title": "Captions that are probably wrong",
        "eyebrow": f"{shortened(data_name)} · {shortened(run_name)}",
        "number": f"{len(ranked):,}",
        "wrong": None if num_wrong is None else f"{num_wrong:,}",
        "threshold": score(ranked[num_wrong - 1].score) if num_wrong else None,
        "caveat": caveat,
        "histogram": [figure(chart, "The scores of all captions")],
        "cards": cards,
        "all_shown": len(cards) == len(ranked),
        "table": shortened(table_name),
    }
    return write_page(path, render("suspects.html", content, sheets=("page", "chart", "notes", "cards")))
