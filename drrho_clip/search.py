"""Search the images of a data set by words, with the encoders of a run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from drrho_clip.data import Dataset, Tokenizer, captions_of, first_rows, image_names, readable_rows
from drrho_clip.encoders import PairEncoder
from drrho_clip.errors import BadInput
from drrho_clip.evaluate import nearest
from drrho_clip.terminal.progress import Reporter

__all__ = ["Answer", "Match", "check_queries", "search", "unknown_words"]

_BATCH_SIZE = 256


class Match(NamedTuple):
    """An image that fits a query.

    Attributes
    ----------
    row : int
        The first row of the data set that shows this image.
    image : str
        The path of the image as the table writes it; see `drrho_clip.data.image_names`.
    caption : str
        The caption of the row.
    score : float
        Cosine of the query's feature and the image's feature, in [-1, 1].
    """

    row: int
    image: str
    caption: str
    score: float


class Answer(NamedTuple):
    """The images that fit one query.

    Attributes
    ----------
    query : str
        The words.
    unknown_words : tuple of str
        Words of the query that the vocabulary of the run lacks; the encoder reads all of them as the same word.
    matches : tuple of Match
        The best match first; of equal scores, the lower row first.
    """

    query: str
    unknown_words: tuple[str, ...]
    matches: tuple[Match, ...]


def search(
    encoder: PairEncoder,
    tokenizer: Tokenizer,
    dataset: Dataset,
    queries: Sequence[str],
    *,
    top: int = 10,
    quiet: bool = False,
) -> list[Answer]:
    """Rank the images of a data set by their similarity to each query.

    Parameters
    ----------
    encoder : PairEncoder
        The model.
    tokenizer : Tokenizer
        The tokenizer of the same run.
    dataset : Dataset
        The images to search. An image with several captions counts once.
    queries : sequence of str
        At least one query.
    top : int, default 10
        Largest number of matches per query, at least 1.
    quiet : bool
        Show no progress.

    Returns
    -------
    list of Answer
        One answer per query.

    Raises
    ------
    BadInput
        If there is no query, if a query has no word that the tokenizer knows, or if an image cannot be decoded.
    """
    if top < 1:
        raise BadInput(f"top must be an integer of at least 1, got {top}")
    unknown = check_queries(queries, tokenizer)
    names, captions = image_names(dataset), captions_of(dataset)
    rows = first_rows(dataset)
    with Reporter("encoding the images", math.ceil(len(rows) / _BATCH_SIZE), quiet=quiet) as reporter:
        images = encoder.images_of(dataset, rows, batch_size=_BATCH_SIZE, after_batch=reporter.advance)
    # An unreadable image fits no query.
    readable = np.isin(rows, readable_rows(dataset))
    if not readable.any():
        raise BadInput("data must have an image that can be read, got none")
    rows, images = rows[readable], images[readable]
    texts = encoder.texts(queries)
    ranked = nearest(texts, images, k=min(top, len(rows)))
    answers = []
    for number, query in enumerate(queries):
        matches = []
        for place in ranked[number].tolist():
            row = int(rows[place])
            score = float(np.dot(texts[number].astype(np.float64), images[place].astype(np.float64)))
            matches.append(Match(row, names[row], captions[row], score))
        answers.append(Answer(query, unknown[number], tuple(matches)))
    return answers


def check_queries(queries: Sequence[str], tokenizer: Tokenizer) -> list[tuple[str, ...]]:
    """Return the unknown words of each query.

    Raises
    ------
    BadInput
        If there is no query, or if a query has no known word: such queries would all get the same meaningless answer.
    """
    if not queries:
        raise BadInput("words must hold at least one query, got none")
    unknown = []
    for query in queries:
        words = _words(query, tokenizer)
        unknown.append(unknown_words(query, tokenizer))
        if len(unknown[-1]) == len(words):
            raise BadInput(f"words must have a word that occurs in the training captions of the run, got {query!r}")
    return unknown


def unknown_words(query: str, tokenizer: Tokenizer) -> tuple[str, ...]:
    """Return the words of a query that are not in the vocabulary, each once; punctuation is left out.

    Examples
    --------
    >>> from drrho_clip.data import WordTokenizer
    >>> unknown_words("A red zeppelin!", WordTokenizer(["a", "red"], 5))
    ('zeppelin',)
    """
    return tuple(word for word in _words(query, tokenizer) if not tokenizer.knows(word))


def _words(query: str, tokenizer: Tokenizer) -> list[str]:
    """Return the different words of a query, without punctuation unless the query is made of signs only."""
    words = list(dict.fromkeys(tokenizer.words(query)))
    spoken = [word for word in words if any(sign.isalnum() for sign in word)]
    return spoken or words
