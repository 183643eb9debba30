"""Warnings about captions that a model cannot read: unknown words, and words behind the context length.

The vocabulary comes from the training captions. A caption of unknown words only, such as a caption in another language,
gets the same text feature as every other caption of this kind, whatever the figures say.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence

import numpy as np

from drrho_clip.data import DataSplits, Tokenizer, WordTokenizer, captions_of
from drrho_clip.data.hf_preprocessing import HuggingFaceTokenizer
from drrho_clip.data.tokenizer import PADDING, UNKNOWN
from drrho_clip.terminal.printing import say

__all__ = ["caption_warnings", "print_caption_warnings"]


def caption_warnings(
    tokenizer: Tokenizer, captions: Mapping[str, Sequence[str]], *, owner: str = "the run"
) -> list[str]:
    r"""Return at most one line about unknown words and at most one line about captions that are too long.

    Parameters
    ----------
    tokenizer : Tokenizer
        The tokenizer of the model.
    captions : mapping of str to sequence of str
        Captions by the name of their part, such as "validation".
    owner : str
        Who has the tokenizer, for the text of the lines.

    Returns
    -------
    list of str
        The lines, without a line break. A caption counts as unknown if more than half of its words are unknown.

    Examples
    --------
    >>> tokenizer = WordTokenizer.fit(["a red dog", "a cat"])
    >>> print(*caption_warnings(tokenizer, {"test": ["ein roter Hund", "a red cat", "a dog and a red cat"]}), sep="\n")
    warning: more than half of the words are unknown in 1 of 3 test captions: the vocabulary of the run has 4 words
    warning: 1 of 3 test captions have more than 3 words (at most 6): the run does not read the words after number 3
    """
    unknown, cut, longest = [], [], 0
    if isinstance(tokenizer, HuggingFaceTokenizer):
        return _cut_captions(tokenizer, captions, owner)
    if not isinstance(tokenizer, WordTokenizer):
        return []
    length = tokenizer.context_length
    for part, texts in captions.items():
        tokens = tokenizer.encode(texts)
        num_words = np.sum(tokens != PADDING, axis=1)
        num_unknown = int(np.sum(2 * np.sum(tokens == UNKNOWN, axis=1) > num_words))
        # Only captions whose row is full can have more words, so only these captions are counted in full.
        counts = [len(tokenizer.words(texts[row])) for row in np.flatnonzero(num_words == length).tolist()]
        num_cut = sum(count > length for count in counts)
        longest = max(longest, *counts, 0)
        if num_unknown:
            unknown.append(f"{num_unknown:,} of {len(texts):,} {part} captions")
        if num_cut:
            cut.append(f"{num_cut:,} of {len(texts):,} {part} captions")
    lines = []
    if unknown:
        lines.append(
            f"warning: more than half of the words are unknown in {' and '.join(unknown)}: the vocabulary of {owner} "
            f"has {len(tokenizer.vocabulary):,} words"
        )
    if cut:
        lines.append(
            f"warning: {' and '.join(cut)} have more than {length} words (at most {longest:,}): {owner} does not read "
            f"the words after number {length}"
        )
    return lines


def _cut_captions(tokenizer: HuggingFaceTokenizer, captions: Mapping[str, Sequence[str]], owner: str) -> list[str]:
    """Return the line about captions that are too long for a tokenizer of parts of words, which knows every text."""
    cut = []
    for part, texts in captions.items():
        tokens = tokenizer.encode(texts)
        # A row whose last but one place holds padding has room left; all other captions are counted in full.
        full = np.flatnonzero(tokens[:, -2:][:, 0] != tokenizer.number_of(tokenizer.padding))
        num_cut = sum(tokenizer.cut_off(texts[row]) for row in full.tolist())
        if num_cut:
            cut.append(f"{num_cut:,} of {len(texts):,} {part} captions")
    if not cut:
        return []
    return [
        f"warning: {' and '.join(cut)} have more tokens than fit into {tokenizer.context_length} places: {owner} does "
        "not read their ends"
    ]


def print_caption_warnings(tokenizer: Tokenizer, splits: DataSplits, reference: Tokenizer | None) -> None:
    """Print the warnings about the captions of a run on standard error, before training.

    Parameters
    ----------
    tokenizer : Tokenizer
        The tokenizer of the run.
    splits : DataSplits
        The data of the run.
    reference : Tokenizer or None
        The tokenizer of the reference model, which reads the training captions only.
    """
    captions = {part: captions_of(dataset) for part, dataset in zip(splits._fields, splits, strict=True)}
    named = {"training" if part == "train" else part: texts for part, texts in captions.items()}
    lines = caption_warnings(tokenizer, named)
    if reference is not None:
        lines += caption_warnings(reference, {"training": named["training"]}, owner="the reference model")
    for line in lines:
        say(line, stream=sys.stderr)
