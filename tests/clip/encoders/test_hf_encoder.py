"""hf:DIR as a model: its rows are those of transformers, and every command that reads a model takes it."""

from __future__ import annotations

import csv
import gc
import json
import math
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from drrho_clip import ReferenceFeatures
from drrho_clip.cli import main
from drrho_clip.data import read_pairs
from drrho_clip.data.splits import open_splits
from drrho_clip.encode import Encoder
from drrho_clip.encoders import open_model
from drrho_clip.errors import BadInput
from drrho_clip.reference import ask_reference
from drrho_clip.run import open_run
from drrho_core.backend import get_backend
from helpers.hf_models import write_hf_directory
from helpers.small_pairs import write_two_colours

FAST = ["--backend", "numpy", "--image-size", "8", "--width", "8", "--batch-size", "16", "--epochs", "1"]


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table of 60 pairs."""
    folder = tmp_path_factory.mktemp("pairs")
    write_two_colours(folder, 60, swapped_fraction=0.2)
    return folder / "pairs.csv"


@pytest.fixture(scope="module", params=["clip", "siglip"])
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A directory of a small model, and the model of transformers."""
    folder = tmp_path_factory.mktemp(request.param)
    return folder, write_hf_directory(folder, request.param)


def rows_of_transformers(folder: Path, model: Any, table: Path) -> list[np.ndarray]:
    """Return the normalised image features and text features as the documentation of transformers computes them."""
    import torch
    from PIL import Image
    from transformers import AutoImageProcessor, PreTrainedTokenizerFast

    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    pictures = [Image.open(table.parent / row["image"]) for row in rows]
    processor, tokenizer = AutoImageProcessor.from_pretrained(folder), PreTrainedTokenizerFast.from_pretrained(folder)
    length = model.config.text_config.max_position_embeddings
    texts = tokenizer(
        [row["caption"] for row in rows], padding="max_length", truncation=True, max_length=length, return_tensors="pt"
    )
    with torch.no_grad():
        pixels = processor(pictures, return_tensors="pt")["pixel_values"]
        features = [
            model.get_image_features(pixel_values=pixels).pooler_output,
            model.get_text_features(input_ids=texts["input_ids"]).pooler_output,
        ]
    return [(side / side.norm(dim=1, keepdim=True)).numpy() for side in features]


def test_rows_are_those_of_transformers(directory: tuple[Path, Any], table: Path, tmp_path: Path) -> None:
    folder, model = directory
    expected = rows_of_transformers(folder, model, table)
    out = tmp_path / "cache"
    arguments = ["encode", "--model", f"hf:{folder}", "--data", str(table), "--out", str(out), "--batch-size", "17"]
    assert main([*arguments, "--backend", "torch"]) == 0
    features = ReferenceFeatures(out)
    for found, side in zip(features[np.arange(60)], expected, strict=True):
        np.testing.assert_allclose(found, side, rtol=0, atol=1e-5)
    assert features.temperature == pytest.approx(math.exp(-float(model.logit_scale.detach())))
    recorded = json.loads((out / "manifest.json").read_text())["model"]
    assert recorded["name"] == f"hf:{folder}"
    assert {len(recorded[part]) for part in ("weights", "preprocessing", "tokenizer")} == {64}


def test_a_backend_without_such_models_gets_them_from_another(directory: tuple[Path, Any], table: Path) -> None:
    data = read_pairs(table)
    rows = [open_model(f"hf:{directory[0]}", backend=get_backend(name)).pairs(data) for name in ("numpy", "torch")]
    # The other library may be JAX, which has the same models.
    for mine, other in zip(*rows, strict=True):
        np.testing.assert_allclose(mine, other, atol=1e-6)


def test_a_model_guides_a_run_and_leaves_the_memory(
    directory: tuple[Path, Any], table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[weakref.ref[Encoder]] = []
    load = Encoder.load_hf.__func__  # type: ignore[attr-defined]

    def watched(cls: type[Encoder], *arguments: Any) -> Encoder:
        encoder: Encoder = load(cls, *arguments)
        made.append(weakref.ref(encoder))
        return encoder

    monkeypatch.setattr(Encoder, "load_hf", classmethod(watched))
    out, model = tmp_path / "run", f"hf:{directory[0]}"
    arguments = ["train", "--data", str(table), "--out", str(out), "--method", "drrho", "--reference", model, *FAST]
    assert main(arguments) == 0
    gc.collect()
    assert [reference() for reference in made] == [None]
    # A resumed run reads the rows from its own folder.
    assert main(["train", "--resume", "--out", str(out), "--epochs", "2"]) == 0
    assert len(made) == 1
    run = open_run(out)
    judgement = ask_reference(model, get_backend("numpy"), open_splits(run.config))
    assert judgement.losses is not None
    assert 0.0 <= judgement.shares.train <= 1.0
    assert model in judgement.summary()


def test_commands_take_the_model(
    directory: tuple[Path, Any], table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, figures = f"hf:{directory[0]}", tmp_path / "figures.json"
    assert main(["evaluate", model, "--data", str(table), "--json", str(figures)]) == 0
    assert "no pair is left out, because the training images of hf:" in capsys.readouterr().out
    (row,) = json.loads(figures.read_text())
    assert row["method"] == model
    assert row["metrics"]["num_pairs"] == 60
    suspects = tmp_path / "suspects.csv"
    assert main(["suspects", model, "--data", str(table), "--out", str(suspects)]) == 0
    assert len(suspects.read_text().splitlines()) == 61
    page = tmp_path / "found.html"
    assert main(["search", model, "red beside blue", "--data", str(table), "--top", "2", "--out", str(page)]) == 0
    assert page.exists()


def test_a_cache_of_the_model_gives_the_same_figures(
    directory: tuple[Path, Any], table: Path, tmp_path: Path, fails: Callable[..., str]
) -> None:
    model, cache = f"hf:{directory[0]}", tmp_path / "cache"
    assert main(["encode", "--model", model, "--data", str(table), "--out", str(cache)]) == 0
    rows, ranked = [], []
    for number, word in enumerate((model, f"features:{cache}")):
        figures, suspects = tmp_path / f"{number}.json", tmp_path / f"{number}.csv"
        assert main(["evaluate", word, "--data", str(table), "--json", str(figures)]) == 0
        assert main(["suspects", word, "--data", str(table), "--out", str(suspects)]) == 0
        rows.append(json.loads(figures.read_text())[0]["metrics"])
        ranked.append(suspects.read_text())
    assert rows[0] == pytest.approx(rows[1])
    assert ranked[0] == ranked[1]
    line = fails("search", f"features:{cache}", "red", "--data", str(table))
    assert "model must be able to encode words, got features:" in line


def test_a_changed_model_does_not_continue_a_cache(table: Path, tmp_path: Path, fails: Callable[..., str]) -> None:
    folder, cache = tmp_path / "model", tmp_path / "cache"
    write_hf_directory(folder)
    encode = ["encode", "--model", f"hf:{folder}", "--data", str(table), "--out", str(cache)]
    assert main(encode) == 0
    assert main(encode) == 0
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").write_text(json.dumps(settings | {"resample": 2}))
    assert "with another preprocessing: hf:" in fails(*encode)
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    words = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(words.replace('"NFC"', '"NFKC"', 1))
    assert "with another tokenizer: hf:" in fails(*encode)
    (folder / "tokenizer.json").write_text(words)
    write_hf_directory(folder, seed=1)
    assert "with another model: hf:" in fails(*encode)


@pytest.mark.parametrize(
    ("part", "entry", "value"),
    [
        ("text_config", "hidden_act", "gelu"),
        ("vision_config", "layer_norm_eps", 1e-3),
        ("vision_config", "num_attention_heads", 4),
        ("text_config", "eos_token_id", 2),
        (None, "logit_scale", 3.0),
    ],
)
def test_equal_weights_with_another_configuration_or_temperature_are_another_model(
    table: Path, tmp_path: Path, fails: Callable[..., str], part: str | None, entry: str, value: Any
) -> None:
    from safetensors.numpy import load_file, save_file

    folder, cache = tmp_path / "model", tmp_path / "cache"
    write_hf_directory(folder)
    encode = ["encode", "--model", f"hf:{folder}", "--data", str(table), "--out", str(cache)]
    assert main(encode) == 0
    # The standard deviation of initial values has no effect on a trained model.
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["initializer_range"] = 0.5
    (folder / "config.json").write_text(json.dumps(config))
    assert main(encode) == 0
    if part is None:
        save_file(load_file(folder / "model.safetensors") | {entry: np.array(value, np.float32)}, folder / "w")
        (folder / "w").replace(folder / "model.safetensors")
    else:
        config[part][entry] = value
        (folder / "config.json").write_text(json.dumps(config))
    assert f"with another {'temperature: ' if part is None else 'configuration: hf:'}" in fails(*encode)


@pytest.mark.parametrize("command", ["evaluate", "suspects", "search"])
def test_a_model_without_data_of_its_own_needs_data(tmp_path: Path, fails: Callable[..., str], command: str) -> None:
    more = {"evaluate": [], "suspects": ["--out", str(tmp_path / "a.csv")], "search": ["red"]}[command]
    assert "data must be named for a model that is no run" in fails(command, f"hf:{tmp_path}", *more)


def test_a_directory_that_is_no_model_is_refused(table: Path, tmp_path: Path, fails: Callable[..., str]) -> None:
    assert "config.json must be a part of a Hugging Face model" in fails(
        "encode", "--model", f"hf:{tmp_path}", "--data", str(table), "--out", str(tmp_path / "cache")
    )


def test_a_model_without_a_temperature_is_refused(tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    write_hf_directory(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["logit_scale"]
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(BadInput, match="must hold the weight logit_scale"):
        open_model(f"hf:{tmp_path}", backend=get_backend("torch"))
