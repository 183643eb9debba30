"""Captions to words, and words to numbers."""

from __future__ import annotations

import json
import re
import sys
import unicodedata
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drrho_clip.data.tokenizer import PADDING, UNKNOWN, WordTokenizer
from drrho_clip.errors import BadInput, MissingExtra

_CAPTIONS = ["A red circle", "a blue circle!", "the dog's red ball, 12 balls"]


def test_words_are_ordered_by_count_then_alphabet() -> None:
    expected = ("a", "circle", "red", "!", ",", "12", "ball", "balls", "blue", "dog's", "the")
    assert WordTokenizer.fit(_CAPTIONS).vocabulary == expected
    assert WordTokenizer.fit(_CAPTIONS[::-1]).vocabulary == expected
    assert WordTokenizer.fit(_CAPTIONS, max_words=2).vocabulary == expected[:2]


def test_encode_pads_cuts_and_marks_unknown_words() -> None:
    tokenizer = WordTokenizer(["red", "circle"], 3)
    tokens = tokenizer.encode(["red circle", "CIRCLE red red red", "green", "", "  \n"])
    assert tokens.dtype == np.int32
    assert tokens.tolist() == [[2, 3, 0], [3, 2, 2], [1, 0, 0], [1, 0, 0], [1, 0, 0]]
    assert tokenizer.encode([]).shape == (0, 3)


def test_forms_of_one_character_are_one_word() -> None:
    tokenizer = WordTokenizer.fit(["caf\u00e9 na\u00efve \u0436\u0443\u043a 3"])
    same = tokenizer.encode(["CAFE\u0301 NAI\u0308VE \u0416\u0423\u041a \uff13"])
    assert same.tolist() == tokenizer.encode(["caf\u00e9 na\u00efve \u0436\u0443\u043a 3"]).tolist()
    assert UNKNOWN not in same
    assert WordTokenizer.fit(["dog\u2019s"]).vocabulary == ("dog's",)
    assert WordTokenizer.fit(["a_b-c"], context_length=9).vocabulary == ("-", "_", "a", "b", "c")


# The words of version 0.1, written down from its regular expression: saved runs hold numbers of these words.
_WORDS_OF_0_1 = {
    "A red circle, left of 2 blue ones!": ["a", "red", "circle", ",", "left", "of", "2", "blue", "ones", "!"],
    "the dog\u2019s 'own' rock'n'roll": ["the", "dog's", "'", "own", "'", "rock'n'roll"],
    "a_b-c  x\xb2y \xbd cup": ["a", "_", "b", "-", "c", "x", "2", "y", "1", "\u2044", "2", "cup"],
    "\u039f\u0394\u039f\u03a3 \u03a3\u0391\u03a3": ["\u03bf\u03b4\u03bf\u03c2", "\u03c3\u03b1\u03c2"],
    "\u0152UVRE \u0130stanbul stra\xdfe \ufb01n": ["\u0153uvre", "i", "\u0307", "stanbul", "stra\xdfe", "fin"],
    "\u0939\u093f \u05e9\u05b8\u05c1\u05dc\u05d5": ["\u0939", "\u093f", "\u05e9", "\u05b8", "\u05c1", "\u05dc\u05d5"],
    "\u4e0a\u7ea2\u8272 \u32ff": ["\u4e0a\u7ea2\u8272", "\u4ee4\u548c"],
    "e\u0301te\u0301\xa0\xe9t\xe9\u2003\uff11\uff12\uff13": ["\xe9t\xe9", "\xe9t\xe9", "123"],
    "a\x1cb\x85c\ufeffd": ["a", "b", "c", "\ufeff", "d"],
    "\U0001f600\U0001f44d\U0001f3fd C++ #1": ["\U0001f600", "\U0001f44d", "\U0001f3fd", "c", "+", "+", "#", "1"],
    "[padding] \x00 \ud800.": ["[", "padding", "]", "\x00", "\ufffd", "."],  # the surrogate was itself in 0.1
}


@pytest.mark.parametrize(("caption", "words"), _WORDS_OF_0_1.items())
def test_words_are_those_of_saved_runs(caption: str, words: list[str]) -> None:
    tokenizer = WordTokenizer(sorted(set(words)), len(words) + 1)
    numbers = [tokenizer.vocabulary.index(word) + 2 for word in words]
    assert tokenizer.encode([caption]).tolist() == [[*numbers, PADDING]]
    fitted = WordTokenizer.fit([caption])
    assert (set(fitted.vocabulary), fitted.context_length) == (set(words), len(words))


# Characters that this Python's Unicode tables do not know may be letters to the library, whose tables are newer.
_KNOWN_TEXT = st.text(st.characters(exclude_categories=["Cs", "Cn"]), max_size=30)


@given(_KNOWN_TEXT)
@settings(max_examples=300)
def test_words_are_the_matches_of_the_regular_expression_of_0_1(caption: str) -> None:
    form = unicodedata.normalize("NFKC", caption).replace("\u2019", "'").lower()
    words = re.findall(r"[^\W\d_]+(?:'[^\W\d_]+)*|\d+|\S", form)
    tokenizer = WordTokenizer(list(dict.fromkeys(words)), 100)
    expected = [list(dict.fromkeys(words)).index(word) + 2 for word in words] or [UNKNOWN]
    assert tokenizer.encode([caption])[0].tolist() == expected + [PADDING] * (100 - len(expected))


def test_every_character_is_split_as_in_0_1() -> None:
    # Without those of private use, which are many and alike.
    characters = [chr(code) for code in range(0x110000) if unicodedata.category(chr(code)) not in ("Cs", "Cn", "Co")]
    captions = [
        " ".join(f"x{character}y1{character}2" for character in characters[start : start + 200])
        for start in range(0, len(characters), 200)
    ]
    forms = [unicodedata.normalize("NFKC", caption).replace("\u2019", "'").lower() for caption in captions]
    counts = [len(re.findall(r"[^\W\d_]+(?:'[^\W\d_]+)*|\d+|\S", form)) for form in forms]
    tokens = WordTokenizer([], max(counts) + 1).encode(captions)  # all words are unknown: only their number is seen
    np.testing.assert_array_equal((tokens == UNKNOWN).sum(axis=1), counts)


def test_missing_library_is_named_with_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    message = r"splitting captions into words needs tokenizers: pip install 'drrho-core\[train\]'"
    with pytest.raises(MissingExtra, match=message):
        WordTokenizer(["red"], 3)


def test_context_length_is_the_longest_caption_but_at_most_77() -> None:
    assert WordTokenizer.fit(_CAPTIONS).context_length == 7
    assert WordTokenizer.fit(["w " * 500]).context_length == 77
    assert WordTokenizer.fit(_CAPTIONS, context_length=2).context_length == 2


@given(st.lists(st.text(max_size=30), max_size=5))
def test_no_row_is_padding_only_and_every_number_is_known(captions: list[str]) -> None:
    tokenizer = WordTokenizer.fit(["one two three"], context_length=4)
    tokens = tokenizer.encode(captions)
    assert tokens.shape == (len(captions), 4)
    assert (tokens[:, 0] != PADDING).all()
    assert tokens.max(initial=0) < tokenizer.vocabulary_size
    # Padding stands at the end only.
    assert (np.diff((tokens == PADDING).astype(int), axis=1) >= 0).all()


@given(st.lists(st.text(min_size=1), min_size=1, max_size=5).filter(lambda texts: any(t.strip() for t in texts)))
def test_tokenizer_survives_json(captions: list[str]) -> None:
    try:
        tokenizer = WordTokenizer.fit(captions, max_words=7)
    except BadInput:
        return  # white space of a kind that strip() does not know
    again = WordTokenizer.from_json(json.loads(json.dumps(tokenizer.to_json())))
    assert again.vocabulary == tokenizer.vocabulary
    np.testing.assert_array_equal(again.encode(captions), tokenizer.encode(captions))


def test_bag_of_words_counts_and_has_norm_one() -> None:
    tokenizer = WordTokenizer(["red", "circle"], 4)
    bag = tokenizer.bag_of_words(tokenizer.encode(["red red red circle", "red green", "circle"]))
    assert bag.dtype == np.float32
    assert bag.shape == (3, 4)
    expected = np.array([[0, 0, 3, 1], [0, 1, 1, 0], [0, 0, 0, 1]]) / np.sqrt([[10], [2], [1]])
    np.testing.assert_allclose(bag, expected, rtol=1e-6)
    np.testing.assert_array_equal(tokenizer.bag_of_words(np.zeros((1, 4), np.int32)), np.zeros((1, 4)))


@pytest.mark.parametrize(
    "tokens", [np.zeros(3, np.int32), np.zeros((1, 3)), np.array([[4]], np.int32), np.array([[-1]], np.int32)]
)
def test_bag_of_words_refuses_other_numbers(tokens: Any) -> None:
    with pytest.raises(BadInput, match="tokens must"):
        WordTokenizer(["red", "circle"], 4).bag_of_words(tokens)


@pytest.mark.parametrize(
    "document",
    [
        None,
        [],
        {},
        {"format": "other", "version": 1, "context_length": 3, "vocabulary": []},
        {"format": "drrho-word-tokenizer", "version": 2, "context_length": 3, "vocabulary": []},
        {"format": "drrho-word-tokenizer", "version": 1, "context_length": True, "vocabulary": []},
        {"format": "drrho-word-tokenizer", "version": 1, "context_length": 0, "vocabulary": []},
        {"format": "drrho-word-tokenizer", "version": 1, "context_length": 3, "vocabulary": "red"},
        {"format": "drrho-word-tokenizer", "version": 1, "context_length": 3, "vocabulary": ["red", "red"]},
        {"format": "drrho-word-tokenizer", "version": 1, "context_length": 3, "vocabulary": ["red", 4]},
        {"format": "drrho-word-tokenizer", "version": 1, "context_length": 3},
    ],
)
def test_other_json_is_refused(document: object) -> None:
    with pytest.raises(BadInput, match=r"must|version"):
        WordTokenizer.from_json(document)


def test_captions_without_words_are_refused() -> None:
    for captions in ([], ["", "  "]):
        with pytest.raises(BadInput, match="captions must hold at least one word"):
            WordTokenizer.fit(captions)
