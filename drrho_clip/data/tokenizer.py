"""Captions to numbers: whole words, fitted on the training captions."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from drrho_clip.data._checks import whole_number
from drrho_clip.data.protocol import Int32
from drrho_clip.errors import BadInput

__all__ = ["PADDING", "UNKNOWN", "WordTokenizer"]

PADDING: Final = 0
UNKNOWN: Final = 1
_FIRST_WORD: Final = 2
_LONGEST_CONTEXT: Final = 77
_FORMAT: Final = "drrho-word-tokenizer"
_VERSION: Final = 1

# A run of letters, with apostrophes inside it; or a run of digits; or any single other sign that is no white space.
_PIECES: Final = re.compile(r"[^\W\d_]+(?:'[^\W\d_]+)*|\d+|\S")


class WordTokenizer:
    r"""Split captions into words and number them.

    A caption is brought to Unicode form NFKC and lower case, then cut by ``[^\W\d_]+(?:'[^\W\d_]+)*|\d+|\S``: a run of
    letters (apostrophes inside it stay), a run of digits, or any other single sign. A script without spaces gives long
    "words": such captions want a tokenizer of their own.

    Parameters
    ----------
    vocabulary : sequence of str
        The known words; the word at position i has the number i + 2. Number 0 is padding, 1 an unknown word.
    context_length : int
        Length L of every row of tokens, at least 1. Longer captions are cut off at the end.

    Attributes
    ----------
    vocabulary : tuple of str
    context_length : int
    vocabulary_size : int
        Number of different tokens, `len(vocabulary) + 2`.

    Raises
    ------
    BadInput
        A word is repeated or not a string, or the context length is below 1.

    Examples
    --------
    >>> tokenizer = WordTokenizer.fit(["a red circle", "a blue circle"])
    >>> tokenizer.vocabulary
    ('a', 'circle', 'blue', 'red')
    >>> tokenizer.encode(["a green circle", ""]).tolist()
    [[2, 1, 3], [1, 0, 0]]
    """

    def __init__(self, vocabulary: Sequence[str], context_length: int) -> None:
        self.vocabulary = tuple(vocabulary)
        self.context_length = whole_number(context_length, "context_length", at_least=1)
        if not all(isinstance(word, str) and word for word in self.vocabulary):
            raise BadInput("vocabulary must hold non-empty strings only, got something else")
        self._numbers = {word: number for number, word in enumerate(self.vocabulary, start=_FIRST_WORD)}
        if len(self._numbers) != len(self.vocabulary):
            word, count = Counter(self.vocabulary).most_common(1)[0]
            raise BadInput(f"vocabulary must not repeat a word, got {word!r} {count} times")

    @property
    def vocabulary_size(self) -> int:
        """Number of different tokens, padding and unknown among them."""
        return len(self.vocabulary) + _FIRST_WORD

    @classmethod
    def fit(cls, captions: Iterable[str], *, context_length: int | None = None, max_words: int = 8192) -> WordTokenizer:
        """Take the most frequent words of some captions.

        Parameters
        ----------
        captions : iterable of str
        context_length : int, optional
            The longest caption's number of words when left out, but at most 77.
        max_words : int
            Size of the vocabulary at most, at least 1. Rarer words, then those later in the alphabet, are left out.

        Returns
        -------
        WordTokenizer
            Its words are ordered by count, then by alphabet, so the captions' order does not matter.

        Raises
        ------
        BadInput
            The captions hold no word.
        """
        max_words = whole_number(max_words, "max_words", at_least=1)
        counts: Counter[str] = Counter()
        longest = 0
        for caption in captions:
            pieces = _split(caption)
            counts.update(pieces)
            longest = max(longest, len(pieces))
        if not counts:
            raise BadInput("captions must hold at least one word, got none")
        ordered = sorted(counts, key=lambda word: (-counts[word], word))
        return cls(ordered[:max_words], min(longest, _LONGEST_CONTEXT) if context_length is None else context_length)

    def encode(self, captions: Iterable[str]) -> Int32:
        """Return the tokens of some captions.

        Parameters
        ----------
        captions : iterable of str, length b

        Returns
        -------
        ndarray of int32, shape (b, L)
            Cut off or padded with 0 at the end. An empty caption is one unknown word, so no row is padding only.
        """
        rows = [
            [self._numbers.get(piece, UNKNOWN) for piece in _split(caption)[: self.context_length]] or [UNKNOWN]
            for caption in captions
        ]
        tokens = np.full((len(rows), self.context_length), PADDING, dtype=np.int32)
        for row, numbers in enumerate(rows):
            tokens[row, : len(numbers)] = numbers
        return tokens

    def bag_of_words(self, tokens: Int32) -> npt.NDArray[np.float32]:
        """Return how often each token occurs, for text towers that read no order.

        Parameters
        ----------
        tokens : ndarray of int32, shape (b, L)
            What `encode` returned.

        Returns
        -------
        ndarray of float32, shape (b, V)
            V is `vocabulary_size`; the padding's column is 0. Each row has Euclidean norm 1, so a long caption does not
            drive a tower harder than a short one.

        Raises
        ------
        BadInput
            The tokens are not two-dimensional or not in 0 .. V - 1.

        Examples
        --------
        >>> tokenizer = WordTokenizer(["red", "circle"], 4)
        >>> tokenizer.bag_of_words(tokenizer.encode(["circle circle circle"])).tolist()
        [[0.0, 0.0, 0.0, 1.0]]
        """
        size = self.vocabulary_size
        if tokens.ndim != 2 or tokens.dtype.kind not in "iu":
            raise BadInput(f"tokens must be whole numbers of shape (b, L), got {tokens.dtype} {tokens.shape}")
        if tokens.size and (tokens.min() < 0 or tokens.max() >= size):
            raise BadInput(f"tokens must lie in 0 .. {size - 1}, got {tokens.min()} .. {tokens.max()}")
        rows = np.arange(tokens.shape[0], dtype=np.int64)[:, None]
        counts = np.bincount((rows * size + tokens).ravel(), minlength=tokens.shape[0] * size)
        bag = counts.reshape(tokens.shape[0], size).astype(np.float32)
        bag[:, PADDING] = 0.0
        norms = np.sqrt(np.sum(bag * bag, axis=1, keepdims=True))
        bag /= np.maximum(norms, np.float32(1.0))
        return bag

    def to_json(self) -> dict[str, Any]:
        """Return what `from_json` needs, as an object that `json.dump` takes."""
        return {
            "format": _FORMAT,
            "version": _VERSION,
            "context_length": self.context_length,
            "vocabulary": list(self.vocabulary),
        }

    @classmethod
    def from_json(cls, document: object) -> WordTokenizer:
        """Return the tokenizer that `to_json` described.

        Raises
        ------
        BadInput
            The document is not one of ours, is of another version, or is damaged.

        Examples
        --------
        >>> WordTokenizer.from_json(WordTokenizer(["red"], 5).to_json()).vocabulary
        ('red',)
        """
        if not isinstance(document, Mapping) or document.get("format") != _FORMAT:
            raise BadInput(f"tokenizer must be a JSON object of format {_FORMAT!r}, got something else")
        if document.get("version") != _VERSION:
            raise BadInput(f"tokenizer version must be {_VERSION}, got {document.get('version')!r}")
        vocabulary, context_length = document.get("vocabulary"), document.get("context_length")
        if not isinstance(vocabulary, list) or isinstance(context_length, bool) or not isinstance(context_length, int):
            raise BadInput("tokenizer must have a list 'vocabulary' and a whole number 'context_length'")
        return cls(vocabulary, context_length)


def _split(caption: str) -> list[str]:
    return _PIECES.findall(unicodedata.normalize("NFKC", caption).replace("\u2019", "'").lower())
