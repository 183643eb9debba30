"""The tokenizer of a CLIP directory that has vocab.json and merges.txt in place of tokenizer.json.

Older directories have these two files only. The rules around them (normal form, division into words, special tokens)
are those of `CLIPTokenizer` in the library `transformers`, with which a test compares the tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from drrho_clip.data.words import library
from drrho_clip.errors import BadInput
from drrho_clip.files.json_files import read_json
from drrho_clip.terminal.safe_text import brief

__all__ = ["clip_tokenizer", "has_vocabulary"]

_START: Final = "<|startoftext|>"
_END: Final = "<|endoftext|>"
_WORDS: Final = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def has_vocabulary(folder: Path) -> bool:
    """Return whether a directory holds vocab.json and merges.txt."""
    return all((folder / name).is_file() for name in ("vocab.json", "merges.txt"))


def clip_tokenizer(folder: Path) -> str:
    """Return the content of tokenizer.json that a CLIP directory with vocab.json and merges.txt lacks.

    Raises
    ------
    BadInput
        If a file is damaged, or if the vocabulary lacks the special tokens.
    MissingExtra
        If the library `tokenizers` is not installed.
    """
    vocabulary: Any = read_json(folder / "vocab.json", "the vocabulary of a CLIP model")
    if not isinstance(vocabulary, Mapping) or not {_START, _END} <= set(vocabulary):
        raise BadInput(f"{folder / 'vocab.json'} must be an object with {_START} and {_END}, got another vocabulary")
    try:
        # The first line names the version of the format, and the last line may be empty.
        lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{folder / 'merges.txt'} must be a text in UTF-8, got: {error}") from None
    pairs = [tuple(line.split()) for line in lines if line.strip() and not line.startswith("#version")]
    for pair in pairs:
        if len(pair) != 2:
            raise BadInput(f"{folder / 'merges.txt'} must have two parts in each line, got {brief(' '.join(pair))}")
    tokenizers = library()
    try:
        model = tokenizers.models.BPE(
            dict(vocabulary), pairs, continuing_subword_prefix="", end_of_word_suffix="</w>", unk_token=_END
        )
    # The library raises a bare Exception, for example for a merge whose result is no token.
    except Exception as error:
        raise BadInput(f"{folder} must hold a vocabulary and merges that fit together, got: {error}") from None
    made = tokenizers.Tokenizer(model)
    normalizers, splits = tokenizers.normalizers, tokenizers.pre_tokenizers
    made.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(tokenizers.Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    made.pre_tokenizer = splits.Sequence(
        [
            splits.Split(tokenizers.Regex(_WORDS), behavior="removed", invert=True),
            splits.ByteLevel(add_prefix_space=False),
        ]
    )
    made.post_processor = tokenizers.processors.RobertaProcessing(
        (_END, vocabulary[_END]), (_START, vocabulary[_START]), trim_offsets=False, add_prefix_space=False
    )
    # A special token inside a caption is one token, as in `transformers`.
    made.add_special_tokens([tokenizers.AddedToken(token, special=True) for token in (_START, _END)])
    return str(made.to_str())
