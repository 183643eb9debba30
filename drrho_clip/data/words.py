"""Captions split into words, in any script; two versions of the rules.

Version 2 is used for new runs. It brings a caption into a *normal form* and reads pieces from left to right:

- The normal form is Unicode's NFKC with straight apostrophes and in lower case, so that different ways to write one
  character are equal. Variation selectors, soft hyphens, byte order marks and signs for the direction of text are left
  out. Control characters and zero-width spaces separate words, as white space does.
- A *word* is a run of letters with their combining marks (UAX 29), so that a vowel sign of Devanagari, Arabic or Hebrew
  belongs to its word. Apostrophes and zero-width joiners inside a word belong to the word.
- Han, Hiragana and Katakana have no spaces between words: each character, with its marks, is a word.
- Thai, Lao, Khmer, Myanmar and related scripts have no spaces either. A run of such letters is divided into
  *clusters*: a letter with its marks, with the letters stacked below it, and with vowels written before or after it.
- A run of digits, an emoji sequence (with skin tones, joiners and flags) and every other character are words too.

Version 1 is that of runs of version 0.1, which stay as they were: combining marks and emoji are divided into single
characters, and a caption without spaces is one word. In captions of letters without combining marks, digits, spaces
and punctuation, for example in Latin script, both versions find the same words.

A cluster of a script without spaces is often no word of its own. `chains` finds the clusters that never occur apart in
the given captions, and `join` puts them together: such clusters carry the information of one token.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import lru_cache
from itertools import islice, pairwise
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from drrho_clip.errors import MissingExtra

__all__ = [
    "VERSION",
    "chains",
    "encoded_in_parts",
    "has_clusters",
    "join",
    "library",
    "normal_form",
    "split",
    "splitter",
]

# Captions that are encoded at a time.
_AT_ONCE: Final = 4096

VERSION: Final = 2
"""The version of the rules for new tokenizers."""

# The ranges are blocks of Unicode, in hexadecimal numbers: Thai and Lao; Myanmar; Khmer; Tai Le and New Tai Lue; Tai
# Tham; Balinese; Javanese and Myanmar Extended-B; Myanmar Extended-A and Tai Viet.
_BLOCKS: Final = ("e00-eff", "1000-109f", "1780-17ff", "1950-19df", "1a20-1aaf", "1b00-1b7f", "a980-a9ff", "aa60-aadf")
_CLUSTERED: Final = re.compile(
    "[" + "".join("-".join(chr(int(end, 16)) for end in block.split("-")) for block in _BLOCKS) + "]"
)

# Regular expressions of Oniguruma, the library that `tokenizers` uses. A letter is a letter or a number that is not a
# decimal digit. A sign is every character that Python does not count as white space.
_LETTER: Final = r"[\p{L}\p{Nl}\p{No}]"
_SIGN: Final = r"[^\t-\r\x1c-\x20\x{85}\x{a0}\x{1680}\x{2000}-\x{200a}\x{2028}\x{2029}\x{202f}\x{205f}\x{3000}]"

_VERSION_1: Final = rf"{_LETTER}+(?:'{_LETTER}+)*|\p{{Nd}}+|{_SIGN}"

_IN_BLOCKS: Final = "".join("-".join(rf"\x{{{end}}}" for end in block.split("-")) for block in _BLOCKS)
# The long-vowel mark (U+30FC) is used in both kinds of Kana, so Unicode assigns it to neither of these scripts.
_SINGLE: Final = r"[\p{Han}\p{Hiragana}\p{Katakana}\x{30fc}]"
_SPACED: Final = rf"(?:(?!{_SINGLE}|[{_IN_BLOCKS}]){_LETTER})"
_RUN: Final = rf"{_SPACED}(?:[\x{{200c}}\x{{200d}}]*(?:{_SPACED}|\p{{M}}))*"
_CLUSTER_LETTER: Final = rf"(?:(?=[{_IN_BLOCKS}]){_LETTER})"
# Vowels that are written before their consonant (Logical_Order_Exception) or after it, and marks that stack the next
# consonant below this one (a Khmer coeng, a virama).
_BEFORE: Final = r"[\x{e40}-\x{e44}\x{ec0}-\x{ec4}\x{19b5}-\x{19b7}\x{19ba}\x{aab5}\x{aab6}\x{aab9}\x{aabb}\x{aabc}]"
_AFTER: Final = r"[\x{e30}\x{e32}\x{e45}\x{eb0}\x{eb2}]"
_STACK: Final = r"[\x{1039}\x{17d2}\x{1a60}\x{1b44}\x{a9c0}]"
# A consonant of Myanmar with an asat (U+103A) has no vowel and ends the syllable before it.
_FINAL: Final = r"[\x{1000}-\x{1021}]\x{103a}"
_CLUSTER: Final = rf"{_BEFORE}?{_CLUSTER_LETTER}(?:{_STACK}{_CLUSTER_LETTER}|\p{{M}}|{_AFTER}|{_FINAL})*"
# A picture with a skin tone, further pictures behind zero-width joiners, and the tags of the flags of regions.
_PICTURE: Final = r"\p{Extended_Pictographic}[\x{1f3fb}-\x{1f3ff}]?"
_EMOJI: Final = rf"{_PICTURE}(?:\x{{200d}}{_PICTURE})*[\x{{e0020}}-\x{{e007f}}]*|[\x{{1f1e6}}-\x{{1f1ff}}]{{2}}"
_JOINER: Final = r"[\x{200c}\x{200d}]"

_VERSION_2: Final = "|".join(
    (
        rf"{_RUN}(?:'{_RUN})*",
        rf"{_SINGLE}\p{{M}}*",
        _CLUSTER,
        _EMOJI,
        r"\p{Nd}+\p{M}*",
        rf"(?!{_JOINER}){_SIGN}\p{{M}}*",
    )
)
_PATTERNS: Final = {1: _VERSION_1, 2: _VERSION_2}

_SURROGATES: Final = re.compile("[\ud800-\udfff]")
# Variation selectors, the soft hyphen, the word joiner, the byte order mark, and signs for the direction of text.
_LEFT_OUT: Final = re.compile(
    "[\ufe00-\ufe0f\U000e0100-\U000e01ef\xad\u2060\ufeff\u200e\u200f\u061c\u202a-\u202e\u2066-\u2069]"
)
_SEPARATORS: Final = re.compile("[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\u200b]")


def normal_form(caption: str, version: int = VERSION) -> str:
    r"""Return a caption in the form in which words are compared.

    Examples
    --------
    >>> normal_form("CAFE\u0301 \ufb01sh, soft\xadhyphen")
    'café fish, softhyphen'
    """
    if version > 1:
        caption = _SEPARATORS.sub(" ", _LEFT_OUT.sub("", caption))
    # Python's functions are used, because those of `tokenizers` have older Unicode tables and no Greek final sigma.
    # `tokenizers` cannot read a surrogate without a partner, so each surrogate is replaced.
    form = unicodedata.normalize("NFKC", caption).replace("\u2019", "'").lower()
    if version > 1:
        # Some letters have a composed form in lower case only, such as j with caron.
        form = unicodedata.normalize("NFKC", form)
    return _SURROGATES.sub("\ufffd", form)


def has_clusters(form: str, version: int = VERSION) -> bool:
    """Return whether `split` divides letters of this normal form into clusters."""
    return version > 1 and _CLUSTERED.search(form) is not None


def split(caption: str, version: int = VERSION) -> list[list[str]]:
    r"""Return the pieces of a caption; the clusters of one run share a list, and every other piece has its own list.

    Raises
    ------
    MissingExtra
        The library `tokenizers` is not installed.

    Examples
    --------
    >>> split("two \u0e0a\u0e32\u0e22")
    [['two'], ['ชา', 'ย']]
    """
    form = normal_form(caption, version)
    pieces = splitter(version).pre_tokenize_str(form)
    if not has_clusters(form, version):
        return [[piece] for piece, _ in pieces]
    runs: list[list[str]] = []
    end_of_run = -1
    for piece, (start, end) in pieces:
        is_cluster = has_clusters(piece, version)
        if is_cluster and start == end_of_run:
            runs[-1].append(piece)
        else:
            runs.append([piece])
        end_of_run = end if is_cluster else -1
    return runs


def chains(runs: Iterable[list[str]]) -> dict[str, str]:
    """Return the pairs of neighbouring clusters that never occur apart, as a dict from the first to the second.

    The first cluster of such a pair is always followed by the second one, which never stands behind another cluster.
    Following the dict from cluster to cluster gives a chain whose members never occur apart.

    Examples
    --------
    >>> chains([["a", "b", "c"], ["a", "b"], ["d"]])
    {'a': 'b'}
    """
    alone: Counter[str] = Counter()
    together: Counter[tuple[str, str]] = Counter()
    for run in runs:
        alone.update(run)
        together.update(pairwise(run))
    return {
        first: second
        for (first, second), count in together.items()
        if first != second and count == alone[first] == alone[second]
    }


def join(run: list[str], vocabulary: Collection[str], longest: int) -> list[str]:
    """Return a run of clusters as words: from left to right the longest words of a vocabulary, else single clusters.

    Parameters
    ----------
    run : list of str
        The clusters of one run.
    vocabulary : collection of str
        The known words.
    longest : int
        Largest number of characters of a known word.

    Examples
    --------
    >>> join(["a", "b", "c"], {"ab", "c"}, 2)
    ['ab', 'c']
    """
    words: list[str] = []
    start = 0
    while start < len(run):
        word, stop = run[start], start + 1
        longer = word
        for end in range(start + 1, len(run)):
            longer += run[end]
            if len(longer) > longest:
                break
            if longer in vocabulary:
                word, stop = longer, end + 1
        words.append(word)
        start = stop
    return words


@lru_cache
def splitter(version: int) -> Any:
    """Return a splitter of the library that yields the pieces of a version and drops all other characters."""
    module = library()
    return module.pre_tokenizers.Split(module.Regex(_PATTERNS[version]), behavior="removed", invert=True)


def library() -> Any:
    """Return the library `tokenizers`; raise MissingExtra if it is not installed."""
    try:
        import tokenizers
    except ImportError:
        raise MissingExtra("splitting captions into words", "tokenizers") from None
    return tokenizers


def encoded_in_parts(
    captions: Iterable[str], encode: Callable[[Sequence[str]], npt.NDArray[np.int32]], context_length: int
) -> npt.NDArray[np.int32]:
    """Return the tokens (n, L) of n captions, of which a few thousand at a time pass through the library.

    The library keeps strings and offsets of every token, a hundred times the memory of the numbers.
    """
    waiting = iter(captions)
    parts = [np.zeros((0, context_length), dtype=np.int32)]
    while part := list(islice(waiting, _AT_ONCE)):
        parts.append(encode(part))
    return np.concatenate(parts)
