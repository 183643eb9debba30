"""The page of search results: the queries, and the pictures that fit each query."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from drrho_clip.data import Dataset
from drrho_clip.report.cards import MOST_PICTURES, picture_card, shortened
from drrho_clip.report.html import render, write_page
from drrho_clip.search import Answer

__all__ = ["write_search_page"]


def write_search_page(
    path: str | os.PathLike[str], answers: Sequence[Answer], dataset: Dataset, *, data_name: str, run_name: str
) -> Path:
    """Write the answers of `drrho_clip.search.search` as one HTML file with the pictures.

    Parameters
    ----------
    path : path
        The file to write; its folder must exist. The file appears whole or not at all.
    answers : sequence of Answer
        The answers, at least one.
    dataset : Dataset
        The data that were searched.
    data_name, run_name : str
        The names of data and run on the page.

    Returns
    -------
    Path
        The written file.
    """
    # Every query gets an equal share of the pictures; if there are more queries than pictures, the last are left out.
    share = max(1, MOST_PICTURES // len(answers))
    queries = [_query(answer, dataset, share) for answer in answers[:MOST_PICTURES]]
    content = {
        "title": "What the words find",
        "eyebrow": f"{data_name} · {run_name}",
        "headline": f"The images of {shortened(Path(data_name).name)} that fit the words best",
        "queries": queries,
        "left_out": [shortened(answer.query) for answer in answers[MOST_PICTURES:]],
    }
    return write_page(path, render("search.html", content, sheets=("page", "cards")))


def _query(answer: Answer, dataset: Dataset, share: int) -> dict[str, Any]:
    shown = answer.matches[:share]
    cards = [
        picture_card(
            dataset, match.row, place=place, value=match.score, caption=match.caption, name=match.image
        )
        for place, match in enumerate(shown, start=1)
    ]  # fmt: skip
    return {
        "words": shortened(answer.query),
        "unknown": [shortened(word) for word in answer.unknown_words],
        "cards": cards,
        "number": len(answer.matches),
    }
