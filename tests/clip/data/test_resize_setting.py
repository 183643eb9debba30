"""The setting `resize` holds wherever a run reads images: in training, evaluation, zero-shot tasks and a reference."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from drrho_clip.config import TrainConfig
from drrho_clip.data import Dataset, DataSplits, pair_splits
from drrho_clip.encode import Encoder
from drrho_clip.run import open_run
from drrho_clip.train import Trainer, train
from drrho_core.backend import get_backend


def _settings(resize: str, **changes: Any) -> TrainConfig:
    settings: dict[str, Any] = {
        "data": "pairs.csv",
        "method": "clip",
        "backend": "numpy",
        "architecture": "mlp",
        "image_size": 8,
        "width": 4,
        "feature_dim": 4,
        "batch_size": 4,
        "epochs": 1,
        "resize": resize,
    }
    return TrainConfig(**settings | changes)


@pytest.fixture(scope="module")
def splits(tmp_path_factory: pytest.TempPathFactory) -> DataSplits:
    """A table of wide pictures whose colour stands at the left end only, outside the central square."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("wide")
    rows = ["image,caption,label"]
    for number in range(30):
        picture = np.zeros((8, 32, 3), np.uint8)
        picture[:, :8] = 8 * number + 7
        Image.fromarray(picture).save(folder / f"{number}.png")
        rows.append(f"{number}.png,grey number {number},{'dark' if number < 15 else 'light'}")
    (folder / "pairs.csv").write_text("\n".join(rows) + "\n")
    return pair_splits(folder / "pairs.csv")


def _all_equal(features: np.ndarray) -> bool:
    # The rows of a matrix product may differ in the last bits, which depends on the processor.
    return bool(np.allclose(features, features[0], atol=1e-5))


@pytest.mark.parametrize("resize", ["crop", "fit"])
def test_run_reads_images_as_its_setting_says(resize: str, splits: DataSplits, tmp_path: Path) -> None:
    outcome = train(_settings(resize), tmp_path / "run", splits=splits, quiet=True)
    encoder = Encoder.load(open_run(tmp_path / "run"), get_backend("numpy", dtype="float32"))
    # The central square of every picture is black, so only "fit" sees differences.
    black = resize == "crop"
    assert _all_equal(encoder.pairs(splits.train)[0]) == black
    assert _all_equal(encoder.images_of(splits.test, np.arange(len(splits.test)))) == black
    with contextlib.closing(Trainer(outcome.run, get_backend("numpy", dtype="float32"), splits)) as trainer:
        assert _all_equal(trainer.source.gather([0, 1, 2, 3]).images) == black
        assert _all_equal(trainer.encoder.pairs(splits.train)[0]) == black


def test_zero_shot_images_are_read_as_the_mode_says(splits: DataSplits) -> None:
    dataset: Dataset = splits.train
    for resize in ("crop", "fit"):
        task = dataset.zero_shot(image_size=8, resize_mode=resize)
        assert task is not None
        assert _all_equal(task.images) == (resize == "crop")
