"""A cache of reference features: written block by block, resumed after a kill, checked when read, used by a run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from drrho_clip import ReferenceFeatures
from drrho_clip.cli import main
from drrho_clip.data import ArrayDataset, read_pairs
from drrho_clip.data.splits import open_splits
from drrho_clip.encoders import CachedEncoder, FixedFeatures
from drrho_clip.errors import BadInput
from drrho_clip.features import encode_pairs
from drrho_clip.files.checkpoint import load_arrays
from drrho_clip.reference import ask_reference
from drrho_clip.run import open_run
from drrho_core.backend import get_backend
from helpers.small_pairs import write_two_colours

SIZES = ["--backend", "numpy", "--image-size", "8", "--width", "8", "--feature-dim", "12", "--batch-size", "16"]
FAST = [*SIZES, "--learning-rate", "0.01", "--epochs", "2"]


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table of 120 pairs."""
    folder = tmp_path_factory.mktemp("pairs")
    write_two_colours(folder, 120, swapped_fraction=0.2)
    return folder / "pairs.csv"


@pytest.fixture(scope="module")
def reference(table: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 40 epochs that can serve as a reference model."""
    out = tmp_path_factory.mktemp("runs") / "reference"
    arguments = [
        "train",
        "--data",
        str(table),
        "--out",
        str(out),
        "--method",
        "clip",
        *FAST,
        "--epochs",
        "40",
        "--width",
        "32",
    ]
    assert main(arguments) == 0
    return out


@pytest.fixture(scope="module")
def cache(table: Path, reference: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The features of the table by that run."""
    out = tmp_path_factory.mktemp("caches") / "reference"
    assert main(["encode", "--model", str(reference), "--data", str(table), "--out", str(out)]) == 0
    return out


@pytest.fixture
def own_cache(cache: Path, tmp_path: Path) -> Path:
    """A copy of the cache that a test may damage."""
    return Path(shutil.copytree(cache, tmp_path / "cache"))


def invented(size: int = 2500, *, seed: int = 0) -> tuple[ArrayDataset, FixedFeatures]:
    """Return made-up pairs and features; 2500 pairs are three blocks."""
    draw = np.random.default_rng(seed)
    images = draw.integers(0, 256, (size, 2, 2, 1), dtype=np.uint8)
    data = ArrayDataset("invented", images, [f"caption {row}" for row in range(size)])
    return data, FixedFeatures("invented", draw.normal(size=(size, 6)), draw.normal(size=(size, 4)))


def test_rows_are_those_of_the_model_in_the_order_that_is_asked_for(table: Path, reference: Path, cache: Path) -> None:
    from drrho_clip.encode import Encoder

    expected = Encoder.load(open_run(reference), get_backend("numpy"), state="reference").pairs(read_pairs(table))
    features = ReferenceFeatures(cache)
    assert len(features) == 120
    index = np.asarray([7, 0, 119, 7])
    for found, side in zip(features[index], expected, strict=True):
        np.testing.assert_array_equal(found, side[index])
        np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1.0, rtol=1e-6)
    image, text = features[3]
    assert image.tolist() == features[[3]][0][0].tolist()
    assert text.shape == (12,)
    for wrong in (-1, 120, [[0]]):
        with pytest.raises(IndexError, match="sample_index must"):
            features[wrong]  # type: ignore[index]
    with pytest.raises(TypeError, match="sample_index must hold whole numbers"):
        features[np.asarray([0.5])]  # type: ignore[index]


def test_float16_halves_the_files_and_keeps_the_norm(tmp_path: Path) -> None:
    data, model = invented()
    encode_pairs(model, data, tmp_path / "whole")
    encode_pairs(model, data, tmp_path / "half", dtype="float16")
    sizes = [(tmp_path / name / "image.npy").stat().st_size for name in ("whole", "half")]
    assert sizes == [128 + 2500 * 6 * 4, 128 + 2500 * 6 * 2]
    rows = np.arange(2500)
    read = [ReferenceFeatures(tmp_path / name)[rows] for name in ("whole", "half")]
    for whole, half in zip(*read, strict=True):
        assert half.dtype == np.float32
        np.testing.assert_allclose(half, whole, atol=1e-3)
        np.testing.assert_allclose(np.linalg.norm(half, axis=1), 1.0, rtol=1e-6)


class Killed(Exception):
    """The process ends here."""


@pytest.mark.parametrize("rows_before", [256, 1024, 1280, 2500])
def test_a_killed_encoding_continues_after_the_last_block(tmp_path: Path, rows_before: int) -> None:
    data, model = invented()
    encode_pairs(model, data, tmp_path / "whole")

    def kill(rows: int) -> None:
        if rows == rows_before:
            raise Killed

    out = tmp_path / "killed"
    with pytest.raises(Killed):
        encode_pairs(model, data, out, after_rows=kill)
    with pytest.raises(BadInput, match="must be a finished cache, got a cache that is still being written"):
        ReferenceFeatures(out)
    # A power cut may leave a block without its line, and a line that was cut short.
    with (out / "image.npy").open("ab") as file:
        file.write(b"torn")
    with (out / "progress.jsonl").open("ab") as file:
        file.write(b'{"image": "12')
    seen: list[int] = []
    encode_pairs(model, data, out, after_rows=seen.append)
    assert seen[0] == (rows_before - 1) // 1024 * 1024
    for name in ("image.npy", "text.npy", "ids.npy", "manifest.json"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not (out / "progress.jsonl").exists()
    # A finished cache is not encoded again.
    encode_pairs(model, data, out, after_rows=kill)


def test_another_model_or_other_data_are_refused_by_name(tmp_path: Path) -> None:
    data, model = invented(40)
    encode_pairs(model, data, tmp_path / "cache")
    other_data, other_model = invented(40, seed=1)
    with pytest.raises(BadInput, match="another model: invented in place of invented"):
        encode_pairs(other_model, data, tmp_path / "cache")
    with pytest.raises(BadInput, match="other data: invented with other content"):
        encode_pairs(model, other_data, tmp_path / "cache")
    with pytest.raises(BadInput, match="another dtype: float32 in place of float16"):
        encode_pairs(model, data, tmp_path / "cache", dtype="float16")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    with pytest.raises(BadInput, match=r"out must be an empty folder or a cache, got .*thesis\.tex"):
        encode_pairs(model, data, tmp_path / "full")
    with pytest.raises(BadInput, match="features must have one row per pair"):
        encode_pairs(model, invented(41)[0], tmp_path / "longer")


def test_features_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    data, _ = invented(40)
    broken = np.ones((40, 6))
    broken[3, 2] = np.nan
    with pytest.raises(BadInput, match="the features of broken must be finite"):
        encode_pairs(FixedFeatures("broken", broken, np.ones((40, 6))), data, tmp_path / "cache")


def test_a_run_uses_the_rows_of_its_own_pairs(table: Path, reference: Path, cache: Path, tmp_path: Path) -> None:
    splits = open_splits(open_run(reference).config)
    by_model = ask_reference(str(reference), get_backend("numpy"), splits)
    by_cache = ask_reference(str(cache), get_backend("numpy"), splits)
    every = np.arange(len(splits.train))
    for found, expected in zip(by_cache.features[every], by_model.features[every], strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-6)
    assert by_cache.shares == by_model.shares
    assert by_cache.validation_r1 == by_model.validation_r1
    runs = {}
    for name, model in (("model", str(reference)), ("cache", f"features:{cache}")):
        out = tmp_path / name
        arguments = ["train", "--data", str(table), "--out", str(out), "--method", "drrho", "--reference", model]
        assert main([*arguments, "--drop-suspects", "0.1", *FAST]) == 0
        runs[name], _ = load_arrays(out / "checkpoint.safetensors", "checkpoint")
    for key, expected in runs["model"].items():
        np.testing.assert_allclose(runs["cache"][key], expected, rtol=1e-3, atol=1e-4)
    # The features stay in the cache.
    assert not (tmp_path / "cache" / "reference_features.safetensors").exists()
    recorded = json.loads((tmp_path / "cache" / "reference_cache.json").read_text())
    assert recorded["model"]["name"] == str(reference)


def test_a_resumed_run_opens_the_same_cache_and_refuses_another(
    table: Path, reference: Path, own_cache: Path, tmp_path: Path, fails: Callable[..., str]
) -> None:
    from drrho_clip.config import TrainConfig
    from drrho_clip.train import train

    config = TrainConfig.from_json(
        open_run(reference).config.to_json() | {"method": "drrho", "reference": str(own_cache), "epochs": 2}
    )
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    train(config, straight, quiet=True)
    train(config, stopped, quiet=True, stop_after=4)
    shutil.copytree(stopped, tmp_path / "again")
    train(config, stopped, quiet=True, resume=True)
    found, expected = (load_arrays(out / "checkpoint.safetensors", "checkpoint")[0] for out in (stopped, straight))
    assert {name: array.tolist() for name, array in found.items()} == {
        name: array.tolist() for name, array in expected.items()
    }
    shutil.rmtree(own_cache)
    data, resume = read_pairs(table), ["train", "--resume", "--out", str(tmp_path / "again")]
    encode_pairs(FixedFeatures("mine", np.ones((120, 3)), np.ones((120, 3))), data, own_cache)
    assert "reference must be the cache with which" in (line := fails(*resume))
    assert "another model: mine in place of" in line
    shutil.rmtree(own_cache)
    assert "reference must be where" in fails(*resume)


def test_a_resumed_run_refuses_a_cache_that_was_encoded_again_in_another_way(
    table: Path, reference: Path, own_cache: Path, tmp_path: Path, fails: Callable[..., str]
) -> None:
    from drrho_clip.config import TrainConfig
    from drrho_clip.train import train

    settings = {"method": "drrho", "reference": str(own_cache), "epochs": 2}
    config, out = TrainConfig.from_json(open_run(reference).config.to_json() | settings), tmp_path / "run"
    train(config, out, quiet=True, stop_after=4)
    original = ReferenceFeatures(own_cache)
    images, texts = original[np.arange(len(original))]
    resume = ["train", "--resume", "--out", str(out)]
    for dtype, change, words in [
        ("float16", 0.0, "another dtype: float16 in place of float32"),
        ("float32", 1e-3, f"other features: {reference} has encoded the data again"),
    ]:
        shutil.rmtree(own_cache)
        model = FixedFeatures("again", images + np.float32(change), texts)
        encode_pairs(model, read_pairs(table), own_cache, dtype=dtype)
        # The same model with the same weights has written both caches.
        _change(own_cache, model=dict(original.manifest.model))
        assert words in fails(*resume)
    # A run of an earlier version has recorded model and data only.
    recorded = json.loads((out / "reference_cache.json").read_text())
    (out / "reference_cache.json").write_text(json.dumps({name: recorded[name] for name in ("model", "data")}))
    assert main(resume) == 0


def test_a_cache_of_other_data_is_refused(cache: Path, tmp_path: Path, fails: Callable[..., str]) -> None:
    write_two_colours(tmp_path / "other", 60, swapped_fraction=0.0, seed=5)
    other, out = str(tmp_path / "other" / "pairs.csv"), tmp_path / "run"
    line = fails("train", "--data", other, "--out", str(out), "--method", "drrho", "--reference", str(cache), *FAST)
    assert "must hold the features of these data" in line
    assert "which lacks" in line
    assert not out.exists()


def _cut(cache: Path) -> None:
    with (cache / "text.npy").open("r+b") as file:
        file.truncate(2000)


def _flip(cache: Path) -> None:
    with (cache / "image.npy").open("r+b") as file:
        file.seek(1000)
        byte = file.read(1)
        file.seek(1000)
        file.write(bytes([byte[0] ^ 1]))


def _change(cache: Path, **changes: object) -> None:
    manifest = json.loads((cache / "manifest.json").read_text())
    (cache / "manifest.json").write_text(json.dumps(manifest | changes))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_cut, "text.npy must be an undamaged file of features"),
        (_flip, "image.npy must be undamaged, got other content than the manifest says in the rows 0 to 119"),
        (lambda cache: (cache / "ids.npy").unlink(), "ids.npy must be a file of features, got no such file"),
        (lambda cache: (cache / "image.npy").write_bytes(b"\x93NUMPY garbage"), "image.npy must be an undamaged"),
        (lambda cache: np.save(cache / "image.npy", np.zeros((3, 2))), "image.npy must have float32 numbers of shape"),
        (lambda cache: _change(cache, finished=False), "must be a finished cache"),
        (lambda cache: _change(cache, version=2), "manifest.json must have version 1, got 2"),
        (lambda cache: _change(cache, format="zarr"), "must describe a drrho cache of features"),
        (lambda cache: _change(cache, checksums=[]), "must have a checksum for every block"),
        (lambda cache: _change(cache, dtype="int8"), "dtype must be one of float32, float16, got 'int8'"),
        (lambda cache: _change(cache, feature_dims=[12]), "a damaged description"),
        (lambda cache: _change(cache, model={}), "the temperature of the model must be a number > 0"),
        (lambda cache: (cache / "manifest.json").write_text("{"), "manifest.json must be JSON"),
    ],
)
def test_a_damaged_cache_is_refused_in_one_line(
    table: Path,
    own_cache: Path,
    tmp_path: Path,
    fails: Callable[..., str],
    damage: Callable[[Path], object],
    words: str,
) -> None:
    damage(own_cache)
    reference = ["--method", "drrho", "--reference", f"features:{own_cache}"]
    line = fails("train", "--data", str(table), "--out", str(tmp_path / "run"), *reference, *FAST)
    assert words in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("hg:clip", "got 'hg:clip'; did you mean hf:?"),
        ("openclip:ViT-B-32", "did you mean open_clip:?"),
        ("feature:cache", "did you mean features:?"),
        ("hf:", "got 'hf:', which names nothing after the colon"),
        ("missing", "got 'missing', which does not exist"),
        ("features:missing", "got 'features:missing', where no folder has this name"),
    ],
)
def test_an_unknown_model_is_refused_with_the_nearest_name(
    table: Path, tmp_path: Path, fails: Callable[..., str], model: str, words: str
) -> None:
    out = str(tmp_path / "out")
    assert words in fails("encode", "--model", model, "--data", str(table), "--out", out)
    assert words in fails("train", "--data", str(table), "--out", out, "--method", "drrho", "--reference", model, *FAST)
    assert not (tmp_path / "out").exists()


def test_built_in_data_are_encoded_whole(tmp_path: Path, reference: Path) -> None:
    out, options = tmp_path / "cache", ["--data", "scenes", "--train-size", "30"]
    assert main(["encode", "--model", str(reference), "--out", str(out), *options]) == 0
    config = open_run(reference).config
    splits = open_splits(type(config).from_json(config.to_json() | {"data": "scenes", "train_size": 30}))
    features = ReferenceFeatures(out)
    assert len(features) == sum(map(len, splits))
    assert features.rows_of(splits.validation).tolist() == list(range(30, 30 + len(splits.validation)))


def test_a_cache_knows_its_own_images_and_captions_only(table: Path, cache: Path) -> None:
    encoder, data = CachedEncoder(ReferenceFeatures(cache)), read_pairs(table)
    image, text = encoder.pairs(data)
    np.testing.assert_array_equal(encoder.images_of(data, np.asarray([5, 2])), image[[5, 2]])
    np.testing.assert_array_equal(encoder.texts([data.captions[5]]), text[[data.captions.index(data.captions[5])]])
    with pytest.raises(BadInput, match=r"got a cache without 'a zeppelin'; .* name the model itself"):
        encoder.texts(["a zeppelin"])
