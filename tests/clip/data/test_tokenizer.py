"""Captions to words, and words to numbers."""
# ruff: noqa: RUF001 - captions in other scripts have letters that look like Latin ones

from __future__ import annotations

import json
import re
import sys
import unicodedata
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drrho_clip.data.tokenizer import PADDING, UNKNOWN, WordTokenizer, same_text
from drrho_clip.data.words import encoded_in_parts, normal_form
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


# The words of version 1 of the rules, written down from the regular expression of version 0.1: saved runs hold numbers
# of these words.
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
    document = {"format": "drrho-word-tokenizer", "version": 1, "context_length": len(words) + 1}
    tokenizer = WordTokenizer.from_json(document | {"vocabulary": sorted(set(words))})
    numbers = [tokenizer.vocabulary.index(word) + 2 for word in words]
    assert tokenizer.encode([caption]).tolist() == [[*numbers, PADDING]]
    assert tokenizer.words(caption) == words
    assert tokenizer.to_json() == document | {"vocabulary": sorted(set(words))}


# Characters that this Python's Unicode tables do not know may be letters to the library, whose tables are newer.
_KNOWN_TEXT = st.text(st.characters(exclude_categories=["Cs", "Cn"]), max_size=30)


@given(_KNOWN_TEXT)
@settings(max_examples=300)
def test_words_are_the_matches_of_the_regular_expression_of_0_1(caption: str) -> None:
    form = unicodedata.normalize("NFKC", caption).replace("\u2019", "'").lower()
    words = re.findall(r"[^\W\d_]+(?:'[^\W\d_]+)*|\d+|\S", form)
    tokenizer = WordTokenizer(list(dict.fromkeys(words)), 100, version=1)
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
    tokens = WordTokenizer([], max(counts) + 1, version=1).encode(
        captions
    )  # all words are unknown: only their number is seen
    np.testing.assert_array_equal((tokens == UNKNOWN).sum(axis=1), counts)


# Captions and their words by version 2.
_WORDS: dict[str, tuple[str, list[str]]] = {
    "hindi": ("हिन्दी भाषा", ["हिन्दी", "भाषा"]),
    "tamil": ("தமிழ் மொழி", ["தமிழ்", "மொழி"]),
    "bengali with a joiner": ("ক্\u200dষ মা", ["ক্\u200dষ", "মা"]),
    "pointed hebrew": ("שָׁלוֹם עוֹלָם", ["שָׁלוֹם", "עוֹלָם"]),
    "vowelled arabic": ("مُحَمَّد كتاب", ["مُحَمَّد", "كتاب"]),
    "persian with a non-joiner": ("می\u200cخواهم", ["می\u200cخواهم"]),
    "joiners alone": ("a \u200c\u200d b", ["a", "b"]),
    "turkish": ("İstanbul", ["i\u0307stanbul"]),
    "vietnamese in NFD": (unicodedata.normalize("NFD", "Tiếng Việt"), ["tiếng", "việt"]),
    "latin marks without a composed form": ("m\u0300ba x\u0323\u0301y", ["m\u0300ba", "x\u0323\u0301y"]),
    "chinese": ("上红色,下蓝色 3个", ["上", "红", "色", ",", "下", "蓝", "色", "3", "个"]),
    "japanese": ("これはテーブルか\u3099", ["こ", "れ", "は", "テ", "ー", "ブ", "ル", "が"]),
    "half-width katakana": ("\uff83\uff70\uff8c\uff9e\uff99", ["テ", "ー", "ブ", "ル"]),
    "korean in NFD": (unicodedata.normalize("NFD", "사과와 배"), ["사과와", "배"]),
    "mixed scripts": ("iPhone手机abc", ["iphone", "手", "机", "abc"]),
    "thai": ("เด็กกินข้าว น้ำ", ["เด็", "ก", "กิ", "น", "ข้า", "ว", "น้\u0e4dา"]),
    "lao": ("ເດັກກິນ", ["ເດັ", "ກ", "ກິ", "ນ"]),
    "khmer": ("ខ្មែរ ស្រី", ["ខ្មែ", "រ", "ស្រី"]),
    "myanmar": ("မြန်မာ မန္တလေး", ["မြန်", "မာ", "မ", "န္တ", "လေး"]),
    "thai and latin": ("รถbmwสี3", ["ร", "ถ", "bmw", "สี", "3"]),
    "emoji": ("👍🏽👩\u200d⚕\ufe0f🇩🇪🇫🇷 ❤\ufe0f\u200d🔥", ["👍🏽", "👩\u200d⚕", "🇩🇪", "🇫🇷", "❤\u200d🔥"]),
    "keycaps": ("1\ufe0f\u20e32\ufe0f\u20e3 #\ufe0f\u20e3", ["1\u20e3", "2\u20e3", "#\u20e3"]),
    "variation selectors": ("❤ ❤\ufe0f 葛\U000e0100", ["❤", "❤", "葛"]),
    "control characters": ("a\x00b\x1b[31mred\x9f\ufeffx", ["a", "b", "[", "31", "mred", "x"]),
    "zero width": ("y\u200bz soft\xadhyphen wo\u2060rd", ["y", "z", "softhyphen", "word"]),
    "direction of text": ("\u202bשלום\u202c \u200fעולם", ["שלום", "עולם"]),
    "accents of their own": ("a\u00b4b \xa8", ["a", "\u0301", "b", "\u0308"]),
    "a surrogate": ("\ud800.", ["\ufffd", "."]),
}


@pytest.mark.parametrize("name", _WORDS)
def test_words_of_every_script(name: str) -> None:
    caption, words = _WORDS[name]
    # A tokenizer without a vocabulary joins no clusters.
    assert WordTokenizer([], 1).words(caption) == words
    tokenizer = WordTokenizer(sorted(set(words)), len(words) + 1)
    assert tokenizer.words(caption) == words
    numbers = [tokenizer.vocabulary.index(word) + 2 for word in words]
    assert tokenizer.encode([caption, caption]).tolist() == [[*numbers, PADDING]] * 2


@pytest.mark.parametrize("caption", ["हिन्दी", "தமிழ்", "ชายหาดที่", "ខ្មែរ", "שָׁלוֹם", "İstanbul", "👩\u200d👩\u200d👧"])
def test_single_word_is_one_token(caption: str) -> None:
    assert len(WordTokenizer.fit([caption]).vocabulary) == 1


@pytest.mark.parametrize(
    ("known", "new"),
    [
        (["上红色下蓝色", "上绿色下白色"], "上红色下白色"),
        (["あかいまる", "あおいしかく"], "あおいまる"),
        (["แมวสีแดง", "หมาสีดำ", "แมวสีดำ", "รถแดง"], "หมาสีแดง"),
        (["ឆ្មាក្រហម", "ឆ្កែខ្មៅ", "ឆ្មាខ្មៅ"], "ឆ្កែក្រហម"),
    ],
    ids=["chinese", "japanese", "thai", "khmer"],
)
def test_new_caption_without_spaces_consists_of_known_words(known: list[str], new: str) -> None:
    tokenizer = WordTokenizer.fit(known)
    tokens = tokenizer.encode([new])[0]
    assert UNKNOWN not in tokens
    assert len(tokens[tokens != PADDING]) > 1


_THAI = st.lists(st.sampled_from(["แมว", "สี", "แดง", "ดำ", "หมา", "น้ำ", "รถ", "a", " "]), max_size=6).map("".join)


@given(st.lists(_THAI, min_size=1, max_size=8).filter(lambda captions: any(c.strip() for c in captions)))
def test_every_cluster_of_the_fitted_captions_is_in_a_known_word(captions: list[str]) -> None:
    tokenizer = WordTokenizer.fit(captions)
    words = [tokenizer.words(caption) for caption in captions]
    assert {word for row in words for word in row} == set(tokenizer.vocabulary)
    assert max(map(len, words)) == tokenizer.context_length
    for caption, row in zip(captions, words, strict=True):
        assert "".join(row) == unicodedata.normalize("NFKC", caption).replace(" ", "")


def test_clusters_that_never_occur_apart_are_one_word() -> None:
    # "cat" stands in front of two colours, and the clusters of each word never occur apart.
    assert set(WordTokenizer.fit(["แมวแดง", "แมวดำ", "รถแดง"]).vocabulary) == {"แมว", "แดง", "ด\u0e4dา", "รถ"}
    # A cluster that is a whole run elsewhere does occur apart.
    assert set(WordTokenizer.fit(["แมว", "แม"]).vocabulary) == {"แม", "ว"}


# Letters of European alphabets whose lower case has no combining mark, digits, and signs of ASCII.
_EUROPEAN = st.text(
    st.one_of(
        st.characters(min_codepoint=32, max_codepoint=126),
        st.characters(min_codepoint=0xC0, max_codepoint=0x52F, categories=["Lu", "Ll"], exclude_characters="\u0130"),
        st.sampled_from("\u2019«»¿¡€\xa0\t\n"),
    ),
    max_size=40,
)


@given(_EUROPEAN)
@settings(max_examples=300)
def test_captions_in_european_letters_have_the_words_of_version_1(caption: str) -> None:
    assert WordTokenizer([], 1).words(caption) == WordTokenizer([], 1, version=1).words(caption)


@given(st.text(max_size=40))
@settings(max_examples=300)
def test_encoding_looks_up_the_words_of_every_text(caption: str) -> None:
    for version in (1, 2):
        words = WordTokenizer([], 1, version=version).words(caption)
        tokenizer = WordTokenizer(sorted(set(words)), 50, version=version)
        expected = [tokenizer.vocabulary.index(word) + 2 for word in tokenizer.words(caption)] or [UNKNOWN]
        assert tokenizer.encode([caption])[0].tolist() == expected + [PADDING] * (50 - len(expected))


# Letters, marks and signs of many blocks, so that one text mixes scripts, joiners, emoji and controls.
_MIXED = st.text(
    st.one_of(
        *(
            st.characters(min_codepoint=first, max_codepoint=last)
            for first, last in [(0, 0x24F), (0x300, 0x6FF), (0x900, 0x109F), (0x1780, 0x17FF), (0x2000, 0x206F)]
        ),
        st.characters(min_codepoint=0x3000, max_codepoint=0x30FF),
        st.characters(min_codepoint=0x1F1E6, max_codepoint=0x1F6FF),
        st.sampled_from(" '\u200c\u200d\ufe0f\u6c34\u0e01\u0e40\u0e32"),
        st.characters(),
    ),
    max_size=30,
)


@given(_MIXED)
@settings(max_examples=500)
def test_no_character_is_lost_or_moved_and_words_are_split_no_further(caption: str) -> None:
    tokenizer = WordTokenizer([], 1)
    words = tokenizer.words(caption)
    assert all(words)
    # Only white space and joiners that stand alone are left out of the normal form.
    joiners = {ord("\u200c"): None, ord("\u200d"): None}
    form = "".join(normal_form(caption).translate(joiners).split())
    assert "".join(words).translate(joiners) == form
    assert tokenizer.words(" ".join(words)) == words


def test_letter_with_a_composed_lower_case_only_is_one_word() -> None:
    assert WordTokenizer.fit(["J\u030c", "\u01f0", "j\u030c"]).vocabulary == ("\u01f0",)


def test_texts_are_the_same_if_their_words_are() -> None:
    key = same_text(WordTokenizer(["a", "red"], 2))
    assert key("A RED dog , sleeping") == key("a red  dog, sleeping")
    assert key("cafe\u0301") == key("caf\u00e9")
    # Words that the vocabulary lacks and words behind the context length distinguish captions.
    assert len({key(caption) for caption in ["a red dog", "a red cat", "a red", "a red cat sits", "red a"]}) == 5
    assert key("dog") != key("cat")


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
        {"format": "drrho-word-tokenizer", "version": 3, "context_length": 3, "vocabulary": []},
        {"format": "drrho-word-tokenizer", "version": True, "context_length": 3, "vocabulary": []},
        {"format": "drrho-word-tokenizer", "version": "2", "context_length": 3, "vocabulary": []},
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


def test_captions_pass_through_the_library_in_parts() -> None:
    tokenizer = WordTokenizer(["red", "blue"], 3)
    most = 0

    def captions() -> Iterator[str]:
        nonlocal most
        for number in range(10_000):
            most = max(most, number - sum(sizes))
            yield "red blue" if number % 3 else "blue"

    sizes: list[int] = []

    def encode(part: Sequence[str]) -> np.ndarray:
        sizes.append(len(part))
        return tokenizer.encode(part)

    tokens = encoded_in_parts(captions(), encode, 3)
    assert (sum(sizes), max(sizes), most) == (10_000, 4096, 4095)
    assert np.array_equal(tokens, tokenizer.encode(captions()))
    assert tokens[:2].tolist() == [[3, 0, 0], [2, 3, 0]]
    assert tokenizer.encode([]).shape == (0, 3)
