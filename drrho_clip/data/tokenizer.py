"""Captions as numbers: a vocabulary of whole words, fitted on the training captions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from drrho_clip.data._checks import whole_number
from drrho_clip.data.protocol import Int32, Tokenizer
from drrho_clip.data.words import (
    VERSION,
    chains,
    encoded_in_parts,
    has_clusters,
    join,
    library,
    normal_form,
    split,
    splitter,
)
from drrho_clip.errors import BadInput

if TYPE_CHECKING:
    import tokenizers

__all__ = ["LONGEST_CONTEXT", "PADDING", "UNKNOWN", "WordTokenizer", "same_text"]

PADDING: Final = 0
UNKNOWN: Final = 1
_FIRST_WORD: Final = 2
LONGEST_CONTEXT: Final = 77
"""Largest number of words of a text that a run reads."""
_FORMAT: Final = "drrho-word-tokenizer"


class WordTokenizer:
    """Split captions into words and turn the words into numbers, with the library `tokenizers` (extra `train`).

    A caption is converted to Unicode form NFKC and to lower case. Then the caption is split into runs of letters (with
    their combining marks and with apostrophes inside), runs of digits, and single other characters; white space is
    dropped. Scripts without spaces are split further: Chinese and Japanese into characters, Thai, Lao, Khmer and
    Myanmar into clusters of a letter with its marks. `drrho_clip.data.words` has the rules.

    Parameters
    ----------
    vocabulary : sequence of str
        The known words; the word at position i has the number i + 2. Number 0 is padding, number 1 is any other word.
    context_length : int
        Length L of every row of tokens, at least 1. Longer captions are cut off at the end.
    version : int
        The version of the rules by which captions are split: 2, or 1 for the rules of runs of version 0.1.

    Attributes
    ----------
    vocabulary : tuple of str
    context_length : int
    version : int
    vocabulary_size : int
        Number of different tokens, `len(vocabulary) + 2`.

    Raises
    ------
    BadInput
        A word is repeated or not a string, the context length is below 1, or the version is unknown.
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

    def __init__(self, vocabulary: Sequence[str], context_length: int, *, version: int = VERSION) -> None:
        self.version = whole_number(version, "version", at_least=1)
        if version > VERSION:
            raise BadInput(f"version must be at most {VERSION}, got {version}")
        self.vocabulary = tuple(vocabulary)
        self.context_length = whole_number(context_length, "context_length", at_least=1)
        if not all(isinstance(word, str) and word for word in self.vocabulary):
            raise BadInput("vocabulary must hold non-empty strings only, got something else")
        numbers = {word: number for number, word in enumerate(self.vocabulary, start=_FIRST_WORD)}
        if len(numbers) != len(self.vocabulary):
            word, count = Counter(self.vocabulary).most_common(1)[0]
            raise BadInput(f"vocabulary must not repeat a word, got {word!r} {count} times")
        # Words of other programs may hold surrogates, which are replaced in captions too.
        self._numbers = {_without_surrogates(word): number for word, number in numbers.items()}
        self._longest = max(map(len, self._numbers), default=0)
        self._tokenizer = self._build()

    def _build(self) -> tokenizers.Tokenizer:
        """Return a tokenizer of the library: it splits captions, looks up the words, and cuts or pads the rows."""
        module = library()
        # The library needs a string that stands for all unknown words. The empty string is never in a vocabulary.
        model = module.models.WordLevel({"": UNKNOWN, **self._numbers}, unk_token="")
        tokenizer: tokenizers.Tokenizer = module.Tokenizer(model)
        tokenizer.pre_tokenizer = splitter(self.version)
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
        clustered = []
        for caption in captions:
            runs = split(caption)
            if has_clusters(caption):
                clustered.append(runs)
                continue
            words = [word for run in runs for word in run]
            counts.update(words)
            longest = max(longest, len(words))
        # Clusters that never occur apart become one word: they carry no more information than one token.
        followers = chains(run for runs in clustered for run in runs)
        for runs in clustered:
            words = [word for run in runs for word in _chained(run, followers)]
            counts.update(words)
            longest = max(longest, len(words))
        if not counts:
            raise BadInput("captions must hold at least one word, got none")
        ordered = sorted(counts, key=lambda word: (-counts[word], word))
        return cls(ordered[:max_words], min(longest, LONGEST_CONTEXT) if context_length is None else context_length)

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
        return encoded_in_parts(captions, self._encoded, self.context_length)

    def _encoded(self, captions: Sequence[str]) -> Int32:
        forms = [normal_form(caption, self.version) for caption in captions]
        encoded = self._tokenizer.encode_batch_fast(forms)
        tokens = np.array([row.ids for row in encoded], dtype=np.int32).reshape(len(encoded), self.context_length)
        for row, form in enumerate(forms):
            # The library divides runs of clusters, but it does not join the clusters to known words.
            if has_clusters(form, self.version):
                numbers = [self._numbers.get(word, UNKNOWN) for word in self.words(captions[row])]
                numbers = numbers[: self.context_length]
                tokens[row] = numbers + [PADDING] * (self.context_length - len(numbers))
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
        runs = split(caption, self.version)
        return [word for run in runs for word in (run if len(run) == 1 else join(run, self._numbers, self._longest))]

    def knows(self, word: str) -> bool:
        """Return whether a word is in the vocabulary.

        Examples
        --------
        >>> WordTokenizer(["red"], 5).knows("zeppelin")
        False
        """
        return word in self._numbers

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
            "version": self.version,
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
        version = document.get("version")
        if isinstance(version, bool) or not isinstance(version, int) or version not in range(1, VERSION + 1):
            raise BadInput(f"tokenizer version must be in 1 .. {VERSION}, got {version!r}")
        vocabulary, context_length = document.get("vocabulary"), document.get("context_length")
        if not isinstance(vocabulary, list) or isinstance(context_length, bool) or not isinstance(context_length, int):
            raise BadInput("tokenizer must have a list 'vocabulary' and a whole number 'context_length'")
        return cls(vocabulary, context_length, version=version)


def same_text(tokenizer: Tokenizer) -> Callable[[str], tuple[str, ...]]:
    """Return a function that maps captions to keys: captions with equal keys count as one text.

    Parameters
    ----------
    tokenizer : Tokenizer
        The tokenizer of the model that is measured.

    Returns
    -------
    callable
        ``key(caption) -> tuple of str``, the words of the caption. The model cannot distinguish captions with equal
        words. All words are compared, also those behind the context length and those that the vocabulary lacks, so
        that captions with different words never count as equal.

    Examples
    --------
    >>> key = same_text(WordTokenizer(["red"], 5))
    >>> key("A red dog.") == key("a RED dog ."), key("a red dog") == key("a red cat")
    (True, False)
    """

    def key(caption: str) -> tuple[str, ...]:
        return tuple(tokenizer.words(caption))

    return key


def _chained(run: list[str], followers: Mapping[str, str]) -> list[str]:
    """Join the clusters of a run that never occur apart."""
    words: list[str] = []
    for position, piece in enumerate(run):
        if position and followers.get(run[position - 1]) == piece:
            words[-1] += piece
        else:
            words.append(piece)
    return words


def _without_surrogates(word: str) -> str:
    return "".join("\ufffd" if "\ud800" <= sign <= "\udfff" else sign for sign in word)
