"""Several captions of one image are no negatives of each other in training, with every method and library."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from drrho_reference import contrastive_step, info_nce

from drrho_clip.config import TrainConfig
from drrho_clip.data import DataSplits
from drrho_clip.data.arrays import ArrayDataset
from drrho_clip.encode import Encoder
from drrho_clip.run import describe_run, open_run
from drrho_clip.train import train
from drrho_clip.trainer import Trainer
from drrho_core.backend import get_backend

CAPTIONS = 3


def pictures(number: int, seed: int, captions: int = CAPTIONS) -> ArrayDataset:
    """Noise images with several captions each, in random row order."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (number, 8, 8, 1), dtype=np.uint8)
    rows = rng.permutation(number * captions)
    words = [f"image {row // captions} in words {row % captions}" for row in rows]
    return ArrayDataset("several captions", images[rows // captions], words)


def config(method: str, **changes: Any) -> TrainConfig:
    settings: dict[str, Any] = {
        "data": "digits",
        "method": method,
        "backend": "numpy",
        "dtype": "float64",
        "architecture": "mlp",
        "image_size": 8,
        "width": 8,
        "feature_dim": 8,
        "batch_size": 16,
        "epochs": 1,
        "warmup_steps": 0,
        "log_every": 1,
        "temperature": 0.2,
    }
    return TrainConfig(**settings | changes)


def first_loss(folder: Path, settings: TrainConfig, backend: str, data: ArrayDataset) -> tuple[float, Any, Any, Any]:
    """The loss of the first step, and rows and features of its batch before the step."""
    splits = DataSplits(data, pictures(6, 1), pictures(6, 2))
    folder.mkdir()
    trainer = Trainer(describe_run(folder, settings, data), get_backend(backend, dtype="float64"), splits)
    batch = next(trainer.source.epoch(settings.batch_size, seed=settings.seed, epoch=0))
    images, texts = trainer.encoder.pairs(data)
    trainer.take_step(batch, epoch=0)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return json.loads(lines[0])["loss"], batch, images[batch.sample_index], texts[batch.sample_index]


@pytest.mark.parametrize(
    ("method", "backend"),
    [("clip", "numpy"), ("sogclr", "numpy"), ("drrho", "numpy"), ("clip", "torch"), ("sogclr", "jax")],
)
def test_first_step_is_the_loss_without_siblings(method: str, backend: str, tmp_path: Path) -> None:
    data = pictures(16, 0)
    settings, references = config("clip"), None
    if method == "sogclr":
        settings = config(method)
    if method == "drrho":
        splits = DataSplits(data, pictures(6, 1), pictures(6, 2))
        train(settings, tmp_path / "reference", splits=splits, quiet=True)
        settings = config(method, reference=str(tmp_path / "reference"))
    loss, batch, images, texts = first_loss(tmp_path / "run", settings, backend, data)
    siblings = ~batch.pair_mask & ~np.eye(16, dtype=bool)
    assert siblings.any()
    if method == "clip":
        expected = info_nce(images, texts, temperature=0.2, pair_mask=batch.pair_mask).loss
        with_siblings = info_nce(images, texts, temperature=0.2).loss
    else:
        if method == "drrho":
            encoder = Encoder.load(open_run(tmp_path / "reference"), get_backend("numpy", dtype="float64"))
            both = encoder.pairs(data)
            references = both[0][batch.sample_index], both[1][batch.sample_index]
        unseen = np.full(16, -np.inf)
        options: dict[str, Any] = {"temperature": 0.2, "reference_features": references}
        if references is not None:
            options["reference_weight"] = 1.0
        expected = contrastive_step(images, texts, unseen, unseen, pair_mask=batch.pair_mask, **options).loss
        with_siblings = contrastive_step(images, texts, unseen, unseen, **options).loss
    assert loss == pytest.approx(expected, rel=1e-9)
    assert abs(with_siblings - expected) > 1e-3 * abs(expected)


@pytest.mark.parametrize("method", ["clip", "sogclr"])
def test_batch_of_a_single_image_leaves_the_training_finite(method: str, tmp_path: Path) -> None:
    # All 16 rows show one image, so no anchor has a negative: loss 0, no gradient, and no nan.
    data = pictures(1, 0, captions=16)
    loss, batch, _, _ = first_loss(tmp_path / "run", config(method), "numpy", data)
    assert not batch.pair_mask.any()
    assert loss == 0.0
