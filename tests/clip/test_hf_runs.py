"""Runs that start from the directory of a Hugging Face model, and their export to such a directory."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from PIL import Image

from drrho_clip.cli import main
from drrho_clip.config import TrainConfig
from drrho_clip.data import read_pairs
from drrho_clip.encode import Encoder
from drrho_clip.exchange.hf_directory import read_constant
from drrho_clip.files.checkpoint import load_arrays, load_state
from drrho_clip.run import open_run
from drrho_clip.train import train
from drrho_core.backend import get_backend
from helpers.hf_models import write_hf_directory
from helpers.small_pairs import write_two_colours

KINDS = ("clip", "siglip")


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pairs")
    write_two_colours(folder, 60, swapped_fraction=0.0)
    # Pictures that are no squares and larger than the model's images show how a run makes squares of them.
    for file in folder.glob("*.png"):
        Image.open(file).resize((31, 22)).save(file)
    return folder / "pairs.csv"


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("directories")
    for kind in KINDS:
        write_hf_directory(folder / kind, kind)
    return {kind: folder / kind for kind in KINDS}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, table: Path, directories: dict[str, Path]) -> dict[str, Path]:
    """Finished runs, one for each kind."""
    folder = tmp_path_factory.mktemp("runs")
    for kind in KINDS:
        assert main(["train", *_words(table, directories[kind]), "--out", str(folder / kind)]) == 0
    return {kind: folder / kind for kind in KINDS}


def _settings(table: Path, directory: Path) -> dict[str, Any]:
    return {
        "data": str(table),
        "model": f"hf:{directory}",
        "method": "sogclr",
        "backend": "torch",
        "epochs": 2,
        "batch_size": 16,
        "learning_rate": 1e-3,
    }


def _words(table: Path, directory: Path, *more: str) -> list[str]:
    settings = _settings(table, directory)
    return [*(f"--{name.replace('_', '-')}={value}" for name, value in settings.items()), "--device=cpu", *more]


def _transformers_features(directory: Path, kind: str, files: list[Path], captions: list[str]) -> tuple[Any, Any]:
    """Return the unit features that `transformers` alone computes from a directory."""
    import torch
    from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPModel, SiglipImageProcessorPil, SiglipModel

    build_model: Any = {"clip": CLIPModel, "siglip": SiglipModel}[kind]
    build_processor: Any = {"clip": CLIPImageProcessorPil, "siglip": SiglipImageProcessorPil}[kind]
    model = build_model.from_pretrained(directory).eval()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    pixels = build_processor.from_pretrained(directory)([Image.open(file) for file in files], return_tensors="pt")
    length = model.config.text_config.max_position_embeddings
    tokens = tokenizer(captions, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
    with torch.no_grad():
        image = model.get_image_features(**pixels).pooler_output
        # Programs pass on all that the tokenizer returns, so its other outputs must not change the features.
        text = model.get_text_features(**tokens).pooler_output
    return tuple((rows / rows.norm(dim=1, keepdim=True)).numpy() for rows in (image, text))


@pytest.mark.parametrize("kind", KINDS)
def test_exported_run_has_the_same_features_in_transformers(
    kind: str, runs: dict[str, Path], directories: dict[str, Path], table: Path, tmp_path: Path
) -> None:
    assert main(["export", str(runs[kind]), "--to", "hf", "--out", str(tmp_path / "model")]) == 0
    data = read_pairs(table)
    ours = Encoder.load(open_run(runs[kind]), get_backend("torch", device="cpu")).pairs(data)
    files = [table.parent / f"{row}.png" for row in range(len(data))]
    theirs = _transformers_features(tmp_path / "model", kind, files, list(data.captions))
    for mine, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(mine, other, atol=1e-6)
    # A second export would overwrite the first.
    before = (tmp_path / "model" / "model.safetensors").read_bytes()
    assert main(["export", str(runs[kind]), "--out", str(tmp_path / "model")]) == 2
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == before
    # The training has changed the weights, so equal features are no accident of the start.
    start = _transformers_features(directories[kind], kind, files, list(data.captions))
    assert np.abs(start[0] - theirs[0]).max() > 1e-3


@pytest.mark.parametrize("by_command", [True, False])
def test_pretrained_encoders_bring_their_temperature_and_bias(
    by_command: bool, directories: dict[str, Path], table: Path, tmp_path: Path
) -> None:
    """From a directory and from another run; a value that the user names comes first, also if it is the default."""

    def begun(name: str, **options: Any) -> TrainConfig:
        out = tmp_path / name
        settings = {**_settings(table, directories["siglip"]), "method": "siglip", "epochs": 1, **options}
        settings = {key: value for key, value in settings.items() if value is not None}
        if by_command:
            words = [f"--{key.replace('_', '-')}={value}" for key, value in settings.items() if value is not True]
            words += [f"--{key.replace('_', '-')}" for key, value in settings.items() if value is True]
            assert main(["train", *words, "--device=cpu", "--out", str(out)]) == 0
        else:
            train(TrainConfig(**settings), out, quiet=True)
            # The same settings continue the run.
            train(TrainConfig(**settings), out, quiet=True, resume=True)
        return open_run(out).config

    scale, bias = (read_constant(directories["siglip"], name) for name in ("logit_scale", "logit_bias"))
    assert scale is not None
    first = begun("first")
    assert (first.temperature, first.bias) == (pytest.approx(math.exp(-scale)), bias)
    named = begun("named", temperature=0.1, bias=-10.0)
    assert (named.temperature, named.bias) == (0.1, -10.0)
    scratch = begun("scratch", from_scratch=True)
    assert (scratch.temperature, scratch.bias) == (0.1, -10.0)
    next_run = begun("next", model=None, init=str(tmp_path / "first"))
    learned = load_state(tmp_path / "first" / "checkpoint-best.safetensors", "checkpoint")
    assert (next_run.temperature, next_run.bias) == (learned["temperature"], learned["bias"])
    assert learned["bias"] not in (bias, -10.0)


def test_an_export_keeps_the_bias_of_the_start_if_the_method_learns_none(
    table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From a directory, and from another run that started there; without the directory one line warns."""
    directory = tmp_path / "siglip"
    write_hf_directory(directory, "siglip")
    weights = safetensors.numpy.load_file(directory / "model.safetensors")
    weights["logit_bias"] = np.full_like(weights["logit_bias"], -6.5)
    safetensors.numpy.save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    settings: dict[str, Any] = {**_settings(table, directory), "method": "clip", "epochs": 1}
    train(TrainConfig(**settings), tmp_path / "first", quiet=True)
    train(TrainConfig(**settings | {"model": None, "init": str(tmp_path / "first")}), tmp_path / "next", quiet=True)

    def exported_bias(run: str, out: str) -> float | None:
        assert main(["export", str(tmp_path / run), "--out", str(tmp_path / out)]) == 0
        return read_constant(tmp_path / out, "logit_bias")

    assert [exported_bias(run, f"{run}-model") for run in ("first", "next")] == [-6.5, -6.5]
    assert "logit_bias" not in capsys.readouterr().err
    directory.rename(tmp_path / "elsewhere")
    assert exported_bias("next", "later-model") == 0
    assert "warning: logit_bias is 0, because" in capsys.readouterr().err


@pytest.mark.parametrize("kind", KINDS)
def test_interrupted_run_of_a_directory_continues_bit_for_bit(
    kind: str, runs: dict[str, Path], directories: dict[str, Path], table: Path, tmp_path: Path
) -> None:
    config = TrainConfig(**_settings(table, directories[kind]))
    train(config, tmp_path / "run", stop_after=4, quiet=True)
    assert main(["train", "--resume", "--out", str(tmp_path / "run")]) == 0
    whole, parts = (
        load_arrays(folder / "checkpoint.safetensors", "checkpoint") for folder in (runs[kind], tmp_path / "run")
    )
    assert whole[0].keys() == parts[0].keys()
    for name, array in whole[0].items():
        np.testing.assert_array_equal(array, parts[0][name], err_msg=name)


@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_new_model_by_size_is_trained_with_a_tokenizer_of_the_captions(
    backend: str, table: Path, tmp_path: Path
) -> None:
    """A configuration in a file is a size as well; the exported directory gives the same features in transformers."""
    tower = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = {
        "text_config": tower | {"max_position_embeddings": 8, "vocab_size": 300},
        "vision_config": tower | {"image_size": 8, "patch_size": 4},
        "projection_dim": 8,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    words = ["--data", str(table), "--model", str(tmp_path / "config.json"), "--backend", backend, "--device", "cpu"]
    words += ["--method", "clip", "--epochs", "1", "--batch-size", "16", "--out", str(tmp_path / "run")]
    assert main(["train", *words]) == 0
    run = open_run(tmp_path / "run")
    assert run.tokenizer.vocabulary_size == run.spec.vocabulary_size <= 300
    # The words of the captions have become tokens.
    assert run.tokenizer.words("red beside green") == ["Ġred", "Ġbeside", "Ġgreen"]
    assert main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "model")]) == 0
    data = read_pairs(table)
    ours = Encoder.load(run, get_backend(backend, device="cpu")).pairs(data)
    files = [table.parent / f"{row}.png" for row in range(len(data))]
    theirs = _transformers_features(tmp_path / "model", "clip", files, list(data.captions))
    for mine, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(mine, other, atol=1e-6 if backend == "torch" else 1e-5)
