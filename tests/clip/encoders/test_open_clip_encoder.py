"""open_clip:NAME as a model, tested against a module with the interface of open_clip."""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from drrho_clip import ReferenceFeatures
from drrho_clip.cli import main
from drrho_clip.encoders import open_model
from drrho_core.backend import get_backend
from helpers.small_pairs import write_two_colours

SIDE, CONTEXT = 6, 8
FAST = ["--backend", "numpy", "--image-size", "8", "--width", "8", "--batch-size", "16", "--epochs", "1"]


class StandIn(torch.nn.Module):
    """Two small towers with the attributes and methods of open_clip's CLIP; the features have any norm."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(seed)
        self.visual = torch.nn.Linear(3 * SIDE * SIDE, 10)
        self.words = torch.nn.Embedding(64, 10)
        with torch.no_grad():
            for parameter in (self.visual.weight, self.words.weight):
                parameter.copy_(torch.randn(parameter.shape, generator=draw))
            self.visual.bias.zero_()
        self.logit_scale = torch.nn.Parameter(torch.tensor(3.0))

    def encode_image(self, image: torch.Tensor, normalize: bool = False) -> torch.Tensor:
        assert image.shape[1:] == (3, SIDE, SIDE)
        return self.visual(image.flatten(1))

    def encode_text(self, text: torch.Tensor, normalize: bool = False) -> torch.Tensor:
        assert text.dtype == torch.int64
        return self.words(text).sum(1)


def _preprocess(picture: Any) -> torch.Tensor:
    assert picture.mode == "RGB"
    pixels = np.asarray(picture.resize((SIDE, SIDE)), dtype=np.float32) / 255 - 0.5
    return torch.from_numpy(pixels.transpose(2, 0, 1).copy())


def _tokenize(texts: list[str]) -> torch.Tensor:
    rows = [[1 + sum(word.encode()) % 62 for word in text.split()][:CONTEXT] for text in texts]
    return torch.tensor([row + [0] * (CONTEXT - len(row)) for row in rows])


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Put the stand-in in the place of open_clip; the seeds of the weights by name are returned."""
    seeds = {"laion": 0, "other": 1, "only": 2}
    tags = {"ViT-B-32": ["laion", "other"], "RN50": ["only"]}

    def create(name: str, pretrained: str | None = None, device: str = "cpu", **_: Any) -> tuple[Any, Any, Any]:
        if pretrained not in seeds:
            raise RuntimeError(f"Pretrained weights ({pretrained})\nnot found for model {name}.")
        return StandIn(seeds[pretrained]).to(device), None, _preprocess

    module = types.ModuleType("open_clip")
    functions = {
        "create_model_and_transforms": create,
        "get_tokenizer": lambda name: _tokenize,
        "list_models": lambda: list(tags),
        "list_pretrained_tags_by_model": tags.__getitem__,
    }
    for name, function in functions.items():
        setattr(module, name, function)
    monkeypatch.setitem(sys.modules, "open_clip", module)
    return seeds


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table of 60 pairs."""
    folder = tmp_path_factory.mktemp("pairs")
    write_two_colours(folder, 60, swapped_fraction=0.2)
    return folder / "pairs.csv"


def test_rows_are_the_normalised_features_of_the_library(library: dict[str, int], table: Path, tmp_path: Path) -> None:
    from PIL import Image

    from drrho_clip.data import read_pairs

    out, model = tmp_path / "cache", "open_clip:ViT-B-32/laion"
    assert main(["encode", "--model", model, "--data", str(table), "--out", str(out), "--batch-size", "13"]) == 0
    data, towers = read_pairs(table), StandIn(0)
    with torch.no_grad():
        pictures = torch.stack([_preprocess(Image.fromarray(data[row].image)) for row in range(60)])
        expected = [towers.encode_image(pictures), towers.encode_text(_tokenize(list(data.captions)))]
    features = ReferenceFeatures(out)
    for found, side in zip(features[np.arange(60)], expected, strict=True):
        np.testing.assert_allclose(found, torch.nn.functional.normalize(side).numpy(), atol=1e-6)
    assert features.temperature == pytest.approx(np.exp(-3.0))
    assert json.loads((out / "manifest.json").read_text())["model"]["name"] == model


def test_it_serves_as_a_reference_and_is_measured(library: dict[str, int], table: Path, tmp_path: Path) -> None:
    run, figures = ["--data", str(table), "--out", str(tmp_path / "run")], tmp_path / "figures.json"
    assert main(["train", *run, "--method", "drrho", "--reference", "open_clip:RN50", *FAST]) == 0
    assert main(["train", "--resume", "--out", str(tmp_path / "run"), "--epochs", "2"]) == 0
    assert main(["evaluate", "open_clip:RN50", "--data", str(table), "--json", str(figures)]) == 0
    assert json.loads(figures.read_text())[0]["method"] == "open_clip:RN50"
    assert main(["search", "open_clip:RN50", "red beside blue", "--data", str(table)]) == 0


def test_other_weights_are_another_model(
    library: dict[str, int], table: Path, tmp_path: Path, fails: Callable[..., str]
) -> None:
    options = ["--data", str(table), "--out", str(tmp_path / "cache")]
    assert main(["encode", "--model", "open_clip:ViT-B-32/laion", *options]) == 0
    words = "another model: open_clip:ViT-B-32/laion in place of open_clip:ViT-B-32/other"
    assert words in fails("encode", "--model", "open_clip:ViT-B-32/other", *options)


def test_equal_weights_with_another_activation_are_another_model(
    library: dict[str, int], table: Path, tmp_path: Path, fails: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = ["encode", "--model", "open_clip:RN50", "--data", str(table), "--out", str(tmp_path / "cache")]
    assert main(encode) == 0
    create = sys.modules["open_clip"].create_model_and_transforms

    def changed(*arguments: Any, **options: Any) -> Any:
        model, *rest = create(*arguments, **options)
        model.activation = torch.nn.GELU()
        return model, *rest

    monkeypatch.setattr(sys.modules["open_clip"], "create_model_and_transforms", changed)
    assert "with another configuration: open_clip:RN50" in fails(*encode)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("open_clip:ViT-B32/laion", "got open_clip:ViT-B32/laion; did you mean ViT-B-32?"),
        ("open_clip:ViT-B-32", "must name the weights, open_clip:NAME/PRETRAINED, such as laion, other, got"),
        ("open_clip:ViT-B-32/x", "can open, got open_clip:ViT-B-32/x: Pretrained weights (x) not found for model"),
    ],
)
def test_a_name_that_the_library_lacks_is_refused(
    library: dict[str, int], table: Path, tmp_path: Path, fails: Callable[..., str], model: str, words: str
) -> None:
    assert words in fails("encode", "--model", model, "--data", str(table), "--out", str(tmp_path / "cache"))


def test_without_the_library_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(ValueError, match="needs the package open_clip_torch"):
        open_model("open_clip:RN50", backend=get_backend("torch"))
