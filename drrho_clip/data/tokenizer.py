"""Captions as numbers: a vocabulary of whole words, fitted on the training captions."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from drrho_clip.data._checks import whole_number
from drrho_clip.data.protocol import Int32
from drrho_clip.errors import BadInput, MissingExtra

if TYPE_CHECKING:
    import tokenizers

__all__ = ["PADDING", "UNKNOWN", "WordTokenizer"]

PADDING: Final = 0
UNKNOWN: Final = 1
_FIRST_WORD: Final = 2
_LONGEST_CONTEXT: Final = 77
_FORMAT: Final = "drrho-word-tokenizer"
_VERSION: Final = 1

# `_LETTER` is a letter, or a number that is not a decimal digit (such as a superscript). `_SIGN` is every character
# that Python does not count as white space. A piece is a word, a run of digits or a single sign.
_LETTER: Final = r"[\p{L}\p{Nl}\p{No}]"
_SIGN: Final = r"[^\t-\r\x1c-\x20\x{85}\x{a0}\x{1680}\x{2000}-\x{200a}\x{2028}\x{2029}\x{202f}\x{205f}\x{3000}]"
_PIECES: Final = rf"{_LETTER}+(?:'{_LETTER}+)*|\p{{Nd}}+|{_SIGN}"

_SURROGATES: Final = re.compile("[\ud800-\udfff]")


class WordTokenizer:
    """Split captions into words and turn the words into numbers, with the library `tokenizers` (extra `train`).

    A caption is converted to Unicode form NFKC and to lower case. Then the caption is split into runs of letters (with
    apostrophes inside), runs of digits, and single other characters; white space is dropped. In a script without spaces
    between words, whole sentences would count as words, so captions in such a script need another tokenizer.

    Parameters
    ----------
    vocabulary : sequence of str
        The known words; the word at position i has the number i + 2. Number 0 is padding, number 1 is any other word.
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
    MissingExtra
        The library `tokenizers` is not installed.

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
        numbers = {word: number for number, word in enumerate(self.vocabulary, start=_FIRST_WORD)}
        if len(numbers) != len(self.vocabulary):
            word, count = Counter(self.vocabulary).most_common(1)[0]
            raise BadInput(f"vocabulary must not repeat a word, got {word!r} {count} times")
        self._tokenizer = self._build(numbers)

    def _build(self, numbers: Mapping[str, int]) -> tokenizers.Tokenizer:
        """Return a tokenizer of the library: it splits captions, looks up the words, and cuts or pads the rows."""
        library = _library()
        # The library needs a string that stands for all unknown words. The empty string is never in a vocabulary.
        words = {"": UNKNOWN, **{_SURROGATES.sub("\ufffd", word): number for word, number in numbers.items()}}
        tokenizer: tokenizers.Tokenizer = library.Tokenizer(library.models.WordLevel(words, unk_token=""))
        tokenizer.pre_tokenizer = _splitter()
        tokenizer.enable_truncation(max_length=self.context_length)
        tokenizer.enable_padding(pad_id=PADDING, pad_token="", length=self.context_length)
        return tokenizer

    @property
    def vocabulary_size(self) -> int:
        """Number of different tokens, including those for padding and for unknown words."""
        return len(self.vocabulary) + _FIRST_WORD

    @classmethod
    def fit(cls, captions: Iterable[str], *, context_length: int | None = None, max_words: int = 8192) -> WordTokenizer:
        """Build a tokenizer whose vocabulary is the most frequent words of the captions.

        Parameters
        ----------
        captions : iterable of str
        context_length : int, optional
            By default the number of words of the longest caption, but at most 77.
        max_words : int
            Largest size of the vocabulary, at least 1. The rarest words are left out; of equally rare words, the last
            in alphabetical order are left out first.

        Returns
        -------
        WordTokenizer
            The vocabulary is sorted by falling count, words of equal count alphabetically. So the order of the
            captions does not matter.

        Raises
        ------
        BadInput
            The captions hold no word.
        """
        max_words = whole_number(max_words, "max_words", at_least=1)
        counts: Counter[str] = Counter()
        longest = 0
        for caption in captions:
            words = _words(caption)
            counts.update(words)
            longest = max(longest, len(words))
        if not counts:
            raise BadInput("captions must hold at least one word, got none")
        ordered = sorted(counts, key=lambda word: (-counts[word], word))
        return cls(ordered[:max_words], min(longest, _LONGEST_CONTEXT) if context_length is None else context_length)

    def encode(self, captions: Iterable[str]) -> Int32:
        """Return the tokens of captions.

        Parameters
        ----------
        captions : iterable of str, length b

        Returns
        -------
        ndarray of int32, shape (b, L)
            Rows are cut off or padded with 0 at the end. An empty caption becomes one unknown word, so no row
            consists of padding only.
        """
        encoded = self._tokenizer.encode_batch_fast([_normal_form(caption) for caption in captions])
        tokens = np.array([row.ids for row in encoded], dtype=np.int32).reshape(len(encoded), self.context_length)
        # Every word has a number above that of padding, so a row that begins with padding has no word.
        tokens[tokens[:, 0] == PADDING, 0] = UNKNOWN
        return tokens

    def words(self, caption: str) -> list[str]:
        """Return the words of a caption in the form in which the vocabulary holds words, known or not.

        Examples
        --------
        >>> WordTokenizer(["red"], 5).words("A RED zeppelin!")
        ['a', 'red', 'zeppelin', '!']
        """
        return _words(caption)

    def bag_of_words(self, tokens: Int32) -> npt.NDArray[np.float32]:
        """Return how often each token occurs, for text encoders that ignore the order of words.

        Parameters
        ----------
        tokens : ndarray of int32, shape (b, L)
            Result of `encode`.

        Returns
        -------
        ndarray of float32, shape (b, V)
            V is `vocabulary_size`; the column of padding is 0. Each row has Euclidean norm 1, so that long and short
            captions have the same norm.

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
        # One histogram over row * V + token counts the tokens of all rows at once.
        counts = np.bincount((rows * size + tokens).ravel(), minlength=tokens.shape[0] * size)
        bag = counts.reshape(tokens.shape[0], size).astype(np.float32)
        bag[:, PADDING] = 0.0
        # A row without words has norm 0 and is divided by 1.
        norms = np.sqrt(np.sum(bag * bag, axis=1, keepdims=True))
        bag /= np.maximum(norms, np.float32(1.0))
        return bag

    def to_json(self) -> dict[str, Any]:
        """Return the tokenizer as an object for `json.dump`; `from_json` reads it."""
        return {
            "format": _FORMAT,
            "version": _VERSION,
            "context_length": self.context_length,
            "vocabulary": list(self.vocabulary),
        }

    @classmethod
    def from_json(cls, document: object) -> WordTokenizer:
        """Build the tokenizer from the result of `to_json`.

        Raises
        ------
        BadInput
            The document has another format or version, or is damaged.

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


def _normal_form(caption: str) -> str:
    """Return a caption in the form in which words are compared."""
    # Python's functions are used, because those of `tokenizers` have older Unicode tables and no Greek final sigma.
    # `tokenizers` cannot read a surrogate without a partner, so each surrogate is replaced.
    form = unicodedata.normalize("NFKC", caption).replace("\u2019", "'").lower()
    return _SURROGATES.sub("\ufffd", form)


def _library() -> Any:
    try:
        import tokenizers
    except ImportError:
        raise MissingExtra("splitting captions into words", "tokenizers") from None
    return tokenizers


@lru_cache
def _splitter() -> Any:
    """Return a splitter of the library that yields the matches of `_PIECES` and drops all other characters."""
    library = _library()
    return library.pre_tokenizers.Split(library.Regex(_PIECES), behavior="removed", invert=True)


def _words(caption: str) -> list[str]:
    return [word for word, _ in _splitter().pre_tokenize_str(_normal_form(caption))]
