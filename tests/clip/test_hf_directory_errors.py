"""Directories of models that cannot be used: one clear line, before training, and no file is written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from drrho_clip.cli import main
from drrho_clip.exchange.hf_directory import open_hf_directory, read_weights
from helpers.hf_models import write_hf_directory
from helpers.small_pairs import write_two_colours


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sound")
    write_hf_directory(folder / "model")
    write_two_colours(folder / "data", 20, swapped_fraction=0.0)
    return folder


def _change_json(name: str, change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        values = json.loads((folder / name).read_text())
        change(values)
        (folder / name).write_text(json.dumps(values))

    return spoil


def _change_weights(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        file = folder / "model.safetensors"
        weights = dict(safetensors.numpy.load_file(file))
        change(weights)
        safetensors.numpy.save_file(weights, file)

    return spoil


def _cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


PROJECTION = "text_projection.weight"
FAULTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no configuration": (lambda folder: (folder / "config.json").unlink(), "config.json must be a part of"),
    "another kind": (_change_json("config.json", lambda c: c.update(model_type="bert")), "model_type must be"),
    "a bad size": (
        _change_json("config.json", lambda c: c["text_config"].update(hidden_size="64")),
        "text_config: hidden_size must be a whole number from 1",
    ),
    "heads that do not divide": (
        _change_json("config.json", lambda c: c["vision_config"].update(num_attention_heads=3)),
        "vision_config: num_attention_heads must divide hidden_size",
    ),
    "grey images": (
        _change_json("config.json", lambda c: c["vision_config"].update(num_channels=1)),
        "vision_config: num_channels must be 3, got 1",
    ),
    "another image size": (
        _change_json("config.json", lambda c: c["vision_config"].update(image_size=24)),
        "the image processor must give images of the size 24 of config.json, got 16",
    ),
    "too small a vocabulary": (
        _change_json("config.json", lambda c: c["text_config"].update(vocab_size=10)),
        "the tokenizer must have at most 10 tokens (vocab_size)",
    ),
    "another end token": (
        _change_json("config.json", lambda c: c["text_config"].update(eos_token_id=5)),
        "the tokenizer must end a text with the token eos_token_id (5), got other tokens",
    ),
    "an unknown activation": (
        _change_json("config.json", lambda c: c["text_config"].update(hidden_act="swish_of_mine")),
        "hf_config must be a configuration that transformers accepts",
    ),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "must hold tokenizer.json"),
    "no image processor": (lambda folder: (folder / "preprocessor_config.json").unlink(), "got no such file"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "must hold the weights, got no such file"),
    "weights that are cut off": (_cut, "must be an undamaged safetensors file"),
    "a missing weight": (_change_weights(lambda w: w.pop(PROJECTION)), f"got no {PROJECTION}"),
    "an unknown weight": (
        _change_weights(lambda w: w.update(classifier=np.zeros(2, np.float32))),
        "must hold the weights of config.json, got another weight 'classifier'",
    ),
    "a weight of another shape": (
        _change_weights(lambda w: w.update({PROJECTION: w[PROJECTION][:4]})),
        f"{PROJECTION} must have shape (12, 16), got (4, 16)",
    ),
    "a weight that is not finite": (
        _change_weights(lambda w: w.update({PROJECTION: w[PROJECTION] * np.float32(np.nan)})),
        f"{PROJECTION} must be finite",
    ),
    "whole numbers as weights": (
        _change_weights(lambda w: w.update({PROJECTION: w[PROJECTION].astype(np.int32)})),
        f"{PROJECTION} must be F64, F32, F16 or BF16, got 'I32'",
    ),
}


@pytest.mark.parametrize("fault", list(FAULTS))
def test_directory_with_a_fault_is_refused_in_one_line(
    fault: str, sound: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil, message = FAULTS[fault]
    shutil.copytree(sound / "model", tmp_path / "model")
    spoil(tmp_path / "model")
    words = ["--data", str(sound / "data" / "pairs.csv"), "--method", "clip", "--backend", "torch", "--device", "cpu"]
    assert main(["train", *words, "--model", f"hf:{tmp_path / 'model'}", "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "huge"], "model must be hf:DIR, features:CACHE, a file that ends in .json or one of tiny, small"),
        (["--model", "ViT-B32"], "did you mean ViT-B-32?"),
        (["--model", "tiny", "--width", "8"], "width must be left out with model, which has it, got 8"),
        (["--model", "tiny", "--backend", "numpy"], "needs a backend with the architecture hf, got numpy"),
        (["--model", "tiny", "--init", "run"], "init must be left out with model"),
        (["--from-scratch"], "from_scratch must be off without model"),
    ],
)
def test_model_setting_with_a_fault_is_refused(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fixed = [] if "--backend" in words else ["--backend", "torch", "--device", "cpu"]
    fixed += ["--data", "digits", "--method", "clip", "--out", str(tmp_path / "run")]
    assert main(["train", *words, *fixed]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_export_refuses_other_encoders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--data", "digits", "--method", "clip", "--backend", "numpy", "--epochs", "1", "--width", "2"]
    assert main(["train", *words, "--out", str(tmp_path / "run")]) == 0
    assert main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "model")]) == 2
    assert "run must have the encoders of a Hugging Face model (drrho train --model)" in capsys.readouterr().err
    assert not (tmp_path / "model").exists()


def test_weights_in_half_precision_and_in_several_files_are_read(sound: Path, tmp_path: Path) -> None:
    import torch
    from transformers import CLIPModel

    spec = open_hf_directory(sound / "model").spec
    whole = read_weights(sound / "model", spec)
    model = CLIPModel.from_pretrained(sound / "model")
    for name, kind in {"bfloat16": torch.bfloat16, "float16": torch.float16}.items():
        model.to(kind).save_pretrained(tmp_path / name, max_shard_size="10KB")
        assert len(list((tmp_path / name).glob("model-*.safetensors"))) > 1
        for key, array in read_weights(tmp_path / name, spec).items():
            assert array.dtype == np.float32
            expected = torch.asarray(whole[key]).to(kind).float().numpy()
            np.testing.assert_array_equal(array, expected, err_msg=f"{name} {key}")
        model = CLIPModel.from_pretrained(sound / "model")
