"""A run says before training how many captions its model cannot read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from drrho_clip.config import TrainConfig
from drrho_clip.data import DataSplits, WordTokenizer
from drrho_clip.data.arrays import ArrayDataset
from drrho_clip.data.caption_check import caption_warnings
from drrho_clip.exchange.model_sizes import train_tokenizer
from drrho_clip.train import train


def _data(captions: list[str], seed: int = 0) -> ArrayDataset:
    images = np.random.default_rng(seed).integers(0, 256, (len(captions), 8, 8, 1), dtype=np.uint8)
    return ArrayDataset("captions", images, captions)


def _train(folder: Path, splits: DataSplits, **changes: Any) -> None:
    settings: dict[str, Any] = {"data": "digits", "backend": "numpy", "architecture": "mlp", "method": "clip"}
    settings |= {"image_size": 8, "width": 4, "feature_dim": 4, "batch_size": 4, "epochs": 1}
    train(TrainConfig(**settings | changes), folder, splits=splits)


def test_captions_of_known_words_that_fit_need_no_warning() -> None:
    tokenizer = WordTokenizer.fit(["a red dog", "a blue cat"])
    assert caption_warnings(tokenizer, {"training": ["a red dog", "red cat", "a zebra cat"], "test": []}) == []


def test_half_of_the_words_may_be_unknown_but_not_more() -> None:
    tokenizer = WordTokenizer.fit(["a red dog"], context_length=5)
    parts = {"validation": ["a zebra", "two zebras here", "a"], "test": ["ein Hund", "!"]}
    (line,) = caption_warnings(tokenizer, parts)
    assert line == (
        "warning: more than half of the words are unknown in 1 of 3 validation captions and 2 of 2 test captions: "
        "the vocabulary of the run has 3 words"
    )


def test_captions_longer_than_the_context_are_counted() -> None:
    tokenizer = WordTokenizer.fit(["w " * 100, "w " * 77, "w " * 78])
    (line,) = caption_warnings(tokenizer, {"training": ["w " * 100, "w " * 77, "w " * 78]})
    assert line == (
        "warning: 2 of 3 training captions have more than 77 words (at most 100): the run does not read the words "
        "after number 77"
    )


def test_run_prints_the_warnings_once_on_standard_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    english, german = ["a red dog", "a blue cat"] * 4, ["ein roter Hund", "eine blaue Katze"] * 2
    splits = DataSplits(_data(english), _data(german, 1), _data(["a dog", "a cat"], 2))
    _train(tmp_path / "run", splits)
    written = capsys.readouterr()
    lines = [line for line in written.err.splitlines() if line.startswith("warning")]
    assert lines == [
        "warning: more than half of the words are unknown in 4 of 4 validation captions: the vocabulary of the run has "
        "5 words"
    ]
    assert "warning" not in written.out


def test_reference_model_that_cannot_read_the_captions_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    german = ["ein roter Hund", "eine blaue Katze"] * 4
    splits = DataSplits(_data(["a red dog", "a blue cat"] * 4), _data(["a dog"] * 2, 1), _data(["a cat"] * 2, 2))
    _train(tmp_path / "reference", splits)
    capsys.readouterr()
    others = DataSplits(_data(german, 3), _data(german[:2], 4), _data(german[:2], 5))
    _train(tmp_path / "run", others, method="drrho", reference=str(tmp_path / "reference"))
    lines = capsys.readouterr().err.splitlines()
    expected = "in 8 of 8 training captions: the vocabulary of the reference model has 5 words"
    assert [line for line in lines if "are unknown" in line] == [
        f"warning: more than half of the words are unknown {expected}"
    ]


def test_captions_that_are_too_long_for_parts_of_words_are_counted() -> None:
    tokenizer = train_tokenizer(["a red dog"] * 3, 300, 5)
    # Start, three words and end fill the row; a fourth word does not fit.
    parts = {"training": ["a red dog", "a dog", "a red dog dog"], "test": ["red red red red red"], "none": ["dog"]}
    assert caption_warnings(tokenizer, parts) == [
        "warning: 1 of 3 training captions and 1 of 1 test captions have more tokens than fit into 5 places: the run "
        "does not read their ends"
    ]
    assert caption_warnings(tokenizer, {"training": ["a red dog", "dog"]}) == []
