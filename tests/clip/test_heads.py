"""Heads over stored features: perceptrons or projections whose inputs are rows of a cache, on every backend."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from drrho_clip.cli import main
from drrho_clip.config import TrainConfig
from drrho_clip.data import PairsDataset, read_pairs
from drrho_clip.encode import Encoder
from drrho_clip.encoders import FixedFeatures
from drrho_clip.errors import BadInput
from drrho_clip.features import encode_pairs
from drrho_clip.features.stored import StoredInputs
from drrho_clip.files.checkpoint import load_arrays
from drrho_clip.models import ModelSpec
from drrho_clip.plan.memory import activations_per_pair
from drrho_clip.run import open_run
from drrho_clip.train import train
from drrho_core.backend import get_backend
from helpers.small_pairs import write_two_colours


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pairs")
    write_two_colours(folder, 120, swapped_fraction=0.0)
    return folder / "pairs.csv"


def _write_cache(folder: Path, data: PairsDataset, *, seed: int = 0) -> Path:
    """Write features of 20 and 12 numbers, in which the words of the caption are mixed at random."""
    rng = np.random.default_rng(seed)
    words = [caption.split() for caption in data.captions]
    known = sorted({word for caption in words for word in caption})
    meaning = np.asarray(
        [[caption.index(word) + 1.0 if word in caption else 0.0 for word in known] for caption in words]
    )
    rows = [meaning @ rng.standard_normal((len(known), size)) for size in (20, 12)]
    image, text = (side / np.linalg.norm(side, axis=1, keepdims=True) for side in rows)
    encode_pairs(FixedFeatures("towers", image, text), data, folder)
    return folder


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, table: Path) -> Path:
    return _write_cache(tmp_path_factory.mktemp("caches") / "cache", read_pairs(table))


def _config(table: Path, cache: Path, backend: str = "numpy", **changes: Any) -> TrainConfig:
    settings: dict[str, Any] = {
        "data": str(table),
        "model": f"features:{cache}",
        "method": "sogclr",
        "backend": backend,
        "epochs": 3,
        "batch_size": 16,
        "learning_rate": 1e-2,
        "feature_dim": 8,
        "width": 4,
        "depth": 1,
        "dtype": "float64",
    }
    return TrainConfig(**settings | changes)


def test_heads_learn_to_match_the_features_of_frozen_towers(table: Path, cache: Path, tmp_path: Path) -> None:
    words = ["--data", str(table), "--model", f"features:{cache}", "--method", "sogclr", "--backend", "numpy"]
    words += ["--depth", "0", "--epochs", "40", "--batch-size", "16", "--learning-rate", "0.03"]
    assert main(["train", *words, "--out", str(tmp_path / "run")]) == 0
    run = open_run(tmp_path / "run")
    # Heads of depth 0 are one projection for each side.
    shapes = {name: array.shape for name, array in run.load_parameters("last").items()}
    assert shapes["image/projection/kernel"] == (20, 64)
    assert shapes["text/projection/kernel"] == (12, 64)
    assert len(shapes) == 4
    encoder = Encoder.load(run, get_backend("numpy"))
    image, text = encoder.pairs(read_pairs(table))
    own, other = np.sum(image * text, axis=1), np.sum(image * np.roll(text, 1, axis=0), axis=1)
    assert np.mean(own) > np.mean(other) + 0.3
    # The command that measures a run reads the cache as well.
    assert main(["evaluate", str(tmp_path / "run"), "--split", "validation"]) == 0


@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_heads_are_the_same_on_every_backend(backend: str, table: Path, cache: Path, tmp_path: Path) -> None:
    parameters = []
    for name in ("numpy", backend):
        run = train(
            _config(table, cache, name), tmp_path / name, quiet=True, device=None if name == "numpy" else "cpu"
        ).run
        parameters.append(run.load_parameters("last"))
    for name, array in parameters[0].items():
        np.testing.assert_allclose(parameters[1][name], array, rtol=1e-9, atol=1e-11, err_msg=name)


def test_interrupted_run_of_heads_continues_bit_for_bit(table: Path, cache: Path, tmp_path: Path) -> None:
    config = _config(table, cache)
    train(config, tmp_path / "whole", quiet=True)
    train(config, tmp_path / "parts", quiet=True, stop_after=4)
    train(config, tmp_path / "parts", quiet=True, resume=True)
    whole, parts = (
        load_arrays(tmp_path / name / "checkpoint.safetensors", "checkpoint")[0] for name in ("whole", "parts")
    )
    assert whole.keys() == parts.keys()
    for name, array in whole.items():
        np.testing.assert_array_equal(array, parts[name], err_msg=name)


def test_run_of_heads_refuses_features_of_another_model(table: Path, cache: Path, tmp_path: Path) -> None:
    config = _config(table, cache)
    run = train(config, tmp_path / "run", quiet=True, stop_after=2).run
    other = _write_cache(tmp_path / "other", read_pairs(table), seed=1)
    moved = dataclasses.replace(run, places={**run.places, "model": {"path": str(other), "from_run": "none"}})
    with pytest.raises(BadInput, match=r"^model must be the cache of the features that the heads read, got another"):
        Encoder.load(moved, get_backend("numpy"))


def test_cache_that_lacks_a_pair_is_refused_before_training(table: Path, tmp_path: Path) -> None:
    write_two_colours(tmp_path / "more", 40, swapped_fraction=0.0, seed=1)
    cache = _write_cache(tmp_path / "cache", read_pairs(tmp_path / "more" / "pairs.csv"))
    with pytest.raises(BadInput, match=r"must hold the features of these data"):
        train(_config(table, cache), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


def test_heads_encode_no_new_image_and_no_new_text(table: Path, cache: Path, tmp_path: Path) -> None:
    run = train(_config(table, cache), tmp_path / "run", quiet=True, stop_after=1).run
    encoder = Encoder.load(run, get_backend("numpy", dtype="float64"))
    assert not encoder.reads_new_pairs
    with pytest.raises(BadInput, match=r"must hold the features of every image, got a new image"):
        encoder.images(np.zeros((1, 8, 8, 3), np.uint8))
    with pytest.raises(BadInput, match=r"must hold the features of every text"):
        encoder.texts(["a zeppelin"])


def test_heads_look_up_all_captions_at_once(
    table: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = train(_config(table, cache), tmp_path / "run", quiet=True, stop_after=1).run
    encoder = Encoder.load(run, get_backend("numpy", dtype="float64"))
    captions = read_pairs(table).captions
    expected = encoder.texts(captions)
    looked_up: list[int] = []
    texts = StoredInputs.texts
    monkeypatch.setattr(StoredInputs, "texts", lambda inputs, part: looked_up.append(len(part)) or texts(inputs, part))
    np.testing.assert_allclose(encoder.texts(captions, batch_size=50), expected, rtol=1e-12)
    # A search sorts the whole cache, which may have millions of rows.
    assert looked_up == [120]


def test_depth_zero_is_for_heads_only() -> None:
    with pytest.raises(BadInput, match=r"^depth must be an integer of at least 1 without model features:CACHE, got 0$"):
        TrainConfig(data="digits", method="clip", backend="numpy", depth=0)


def test_plan_of_heads_counts_the_stored_features(table: Path, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = ModelSpec.of_heads(20, 12, model={}, feature_dim=8, width=4, depth=1)
    # Both inputs twice, both hidden layers of 16 units twice, and features and their gradients of both sides.
    assert activations_per_pair(spec) == 2 * 32 + 2 * 2 * 16 + 4 * 8
    words = ["--data", str(table), "--model", f"features:{cache}", "--method", "sogclr", "--backend", "numpy"]
    assert main(["train", *words, "--dry-run", "--out", "nowhere"]) == 0
    assert "heads" in capsys.readouterr().out
