"""Images and captions as the models of Hugging Face read them: the results are those of `transformers`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from drrho_clip.data.hf_preprocessing import HuggingFaceTokenizer, ImageProcessor, read_model_config
from drrho_clip.errors import BadInput
from helpers.hf_directories import SIDE, config_file, image_processor_file, tokenizer_files

CAPTIONS = [
    "a red circle",
    "A  RED, square!",
    "",
    "a" * 40,
    "blue \ud800 ünïcode 12",
    "red red red red red red red red",
]

PROCESSORS: list[tuple[str, dict[str, Any]]] = [
    ("clip", {}),
    ("siglip", {}),
    ("clip", {"size": {"shortest_edge": SIDE + 5}, "resample": 2}),
    ("clip", {"size": {"shortest_edge": SIDE - 5}}),
    ("clip", {"do_resize": False}),
    ("clip", {"size": {"height": 19, "width": 30}, "image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.6, 0.7]}),
    ("siglip", {"resample": 1, "rescale_factor": 1 / 127.5}),
]


@pytest.mark.parametrize(("kind", "changes"), PROCESSORS)
def test_images_are_those_of_transformers(tmp_path: Path, kind: str, changes: dict[str, Any]) -> None:
    theirs = image_processor_file(tmp_path, kind, **changes)
    ours = ImageProcessor.read(tmp_path)
    assert ImageProcessor.from_json(json.loads(json.dumps(ours.to_json()))) == ours
    draw = np.random.default_rng(0)
    for height, width, channels in ((16, 16, 3), (23, 40, 3), (41, 17, 3), (9, 13, 3), (30, 5, 1), (7, 50, 1)):
        image = draw.integers(0, 256, (height, width, channels), dtype=np.uint8)
        colour = np.repeat(image, 3, axis=-1) if channels == 1 else image
        expected = theirs(colour, input_data_format="channels_last")["pixel_values"][0].transpose(1, 2, 0)
        found = ours.normalise(ours.square(image)[None])[0]
        assert found.shape == expected.shape == (SIDE, SIDE, 3)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_tokens_are_those_of_transformers(tmp_path: Path, kind: str) -> None:
    config_file(tmp_path, kind)
    theirs = tokenizer_files(tmp_path, kind)
    ours = HuggingFaceTokenizer.read(tmp_path)
    clean = [caption.replace("\ud800", "?") for caption in CAPTIONS]
    expected = theirs(clean, padding="max_length", truncation=True, max_length=ours.context_length)["input_ids"]
    np.testing.assert_array_equal(ours.encode(CAPTIONS), expected)
    again = HuggingFaceTokenizer.from_json(json.loads(json.dumps(ours.to_json())))
    np.testing.assert_array_equal(again.encode(CAPTIONS), expected)
    assert ours.vocabulary_size == again.vocabulary_size == max(theirs.get_vocab().values()) + 1
    # Words behind the context length count too, so that different captions are never one text.
    assert ours.words("a Red circle") == ours.words("a  red circle") != ours.words("a red square")
    assert len(ours.words("red " * 40)) == 40
    # Unknown words have no token, but captions with different unknown words are different texts.
    assert ours.words("red ZEPPELIN") == ours.words("red zeppelin") != ours.words("red balloon")
    assert ours.knows(ours.words("red")[0])


HARD = [
    *CAPTIONS[:4],
    "It's the dogs' bowl -- we'll eat, they've said!!",
    "naïve café cafe\u0301 ΑΣ İstanbul ﬁne",
    "<|startoftext|>red<|endoftext|> blue",
    "12345 3.14 ½ ٣ 日本語 किताब \U0001f600\u200d",
    " \t tabs\nand\u00a0spaces\u3000 ",
    "red</w> blue",
]


def test_a_clip_directory_with_vocabulary_and_merges_only_has_the_tokens_of_transformers(tmp_path: Path) -> None:
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    config_file(tmp_path, "clip")
    # As in CLIP's own vocabulary, every byte is a token, inside and at the end of a word.
    signs = sorted(ByteLevel.alphabet())
    words = [*signs, *(f"{sign}</w>" for sign in signs), "re", "red</w>", "<|startoftext|>", "<|endoftext|>"]
    (tmp_path / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\nr e\nre d</w>\n", encoding="utf-8")
    theirs = CLIPTokenizer.from_pretrained(tmp_path)
    ours = HuggingFaceTokenizer.read(tmp_path)
    expected = theirs(HARD, padding="max_length", truncation=True, max_length=ours.context_length)["input_ids"]
    np.testing.assert_array_equal(ours.encode(HARD), expected)
    again = HuggingFaceTokenizer.from_json(json.loads(json.dumps(ours.to_json())))
    np.testing.assert_array_equal(again.encode(HARD), expected)
    (tmp_path / "merges.txt").write_text("#version: 0.2\nr e d\n", encoding="utf-8")
    with pytest.raises(BadInput, match=r"merges.txt must have two parts in each line, got 'r e d'"):
        HuggingFaceTokenizer.read(tmp_path)
    (tmp_path / "merges.txt").write_text("#version: 0.2\nre re\n", encoding="utf-8")
    with pytest.raises(BadInput, match="must hold a vocabulary and merges that fit together"):
        HuggingFaceTokenizer.read(tmp_path)
    (tmp_path / "vocab.json").write_text("{}")
    with pytest.raises(BadInput, match=r"vocab.json must be an object with <\|startoftext\|>"):
        HuggingFaceTokenizer.read(tmp_path)


def test_a_part_without_a_token_is_unknown(tmp_path: Path) -> None:
    config_file(tmp_path, "siglip")
    tokenizer_files(tmp_path, "siglip")
    tokenizer = HuggingFaceTokenizer.read(tmp_path)
    words = tokenizer.words("red zeppelin")
    assert words == ["red", "zeppelin"]
    assert [tokenizer.knows(word) for word in words] == [True, False]


def test_one_file_of_image_processor_and_tokenizer_is_read(tmp_path: Path) -> None:
    image_processor_file(tmp_path)
    expected = ImageProcessor.read(tmp_path)
    file = tmp_path / "preprocessor_config.json"
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": json.loads(file.read_text())}))
    file.unlink()
    assert ImageProcessor.read(tmp_path) == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_processor_type": "BlipImageProcessor"}, "image_processor_type must be one of CLIP.*Blip"),
        ({"do_pad": True}, "do_pad must be false"),
        ({"do_normalize": False}, "do_normalize must be true"),
        ({"size": {"longest_edge": 3}}, "size must have shortest_edge"),
        ({"crop_size": {"height": 16, "width": 12}}, "square images"),
        ({"do_center_crop": False}, "square images"),
        ({"image_mean": [0.1, 0.2]}, "must have 3 finite numbers"),
        ({"image_std": [0.1, 0.2, 0.0]}, "image_std must not be 0"),
        ({"resample": 9}, "resample must be"),
        ({"resample": "bicubic"}, "resample must be"),
        ({"rescale_factor": "wide"}, "damaged description"),
    ],
)
def test_an_image_processor_that_cannot_be_followed_is_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    values = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 16}, "crop_size": 16}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(values | changes))
    with pytest.raises(BadInput, match=message):
        ImageProcessor.read(tmp_path)


def test_a_damaged_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="must be the directory of a Hugging Face model"):
        read_model_config(tmp_path / "missing")
    config_file(tmp_path, "clip")
    with pytest.raises(BadInput, match=r"must hold tokenizer\.json"):
        HuggingFaceTokenizer.read(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(BadInput, match=r"tokenizer\.json: tokenizer must be"):
        HuggingFaceTokenizer.read(tmp_path)
    config_file(tmp_path, "bert")
    with pytest.raises(BadInput, match="model_type must be clip or siglip, got 'bert'"):
        HuggingFaceTokenizer.read(tmp_path)
