"""Words to numbers."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from drrho_clip.data.tokenizer import PADDING, UNKNOWN, WordTokenizer
from drrho_clip.errors import BadInput

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


def test_unicode_is_brought_to_one_form() -> None:
    tokenizer = WordTokenizer.fit(["caf\u00e9 na\u00efve \u0436\u0443\u043a 3"])
    same = tokenizer.encode(["CAFE\u0301 NAI\u0308VE \u0416\u0423\u041a \uff13"])
    assert same.tolist() == tokenizer.encode(["caf\u00e9 na\u00efve \u0436\u0443\u043a 3"]).tolist()
    assert UNKNOWN not in same
    assert WordTokenizer.fit(["dog\u2019s"]).vocabulary == ("dog's",)
    assert WordTokenizer.fit(["a_b-c"], context_length=9).vocabulary == ("-", "_", "a", "b", "c")


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
def test_json_brings_the_same_tokenizer_back(captions: list[str]) -> None:
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
def test_foreign_json_is_refused(document: object) -> None:
    with pytest.raises(BadInput, match=r"must|version"):
        WordTokenizer.from_json(document)


def test_captions_without_words_are_refused() -> None:
    for captions in ([], ["", "  "]):
        with pytest.raises(BadInput, match="captions must hold at least one word"):
            WordTokenizer.fit(captions)
