"""The plan of a run: the steps that the real trainer takes, and defaults with which every method can train."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from drrho_clip.cli import main
from drrho_clip.config import TrainConfig
from drrho_clip.data import DataSplits
from drrho_clip.data.splits import open_splits
from drrho_clip.epoch_length import pairs_per_step, steps_per_epoch
from drrho_clip.errors import BadInput
from drrho_clip.methods import METHODS
from drrho_clip.plan.run import plan_run
from drrho_clip.run import open_run
from drrho_clip.table_defaults import defaults_for
from drrho_clip.train import described
from drrho_clip.trainer import Trainer
from drrho_core.backend import get_backend

SMALL = ["--backend", "numpy", "--architecture", "mlp", "--width", "4", "--feature-dim", "8"]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "reference"
    assert main(["train", "--data", "digits", "--method", "clip", "--epochs", "1", *SMALL, "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def splits(reference: Path) -> DataSplits:
    return open_splits(open_run(reference).config)


@pytest.mark.parametrize("method", METHODS)
def test_the_plan_has_the_steps_of_the_trainer_for_every_method(
    method: str, reference: Path, splits: DataSplits, tmp_path: Path
) -> None:
    place = str(reference) if METHODS[method].needs_reference else None
    config = TrainConfig(
        data="digits", method=method, reference=place, backend="numpy", architecture="mlp", image_size=8, width=4,
        feature_dim=8, batch_size=16, epochs=3, reference_temperature=0.1,
    )  # fmt: skip
    backend = get_backend("numpy")
    plan = plan_run(config, backend, splits)
    trainer = Trainer(described(tmp_path, config, splits).run, backend, splits)
    # A super-batch has several batches, so an epoch of a method that selects has fewer steps.
    drawn = 16 * {"rho": 10, "jest": 5, "jest-topk": 5}.get(method.rpartition(":")[2], 1)
    assert (plan.steps_per_epoch, plan.num_steps) == (trainer.steps_per_epoch, trainer.total_steps)
    assert plan.steps_per_epoch == len(splits.train) // drawn


@pytest.mark.parametrize("method", ["rho", "jest", "jest-topk", "distill:rho"])
def test_a_method_that_selects_trains_with_the_defaults(
    method: str, reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", "--data", "digits", "--method", method, "--reference", str(reference), *SMALL]
    assert main([*words, "--dry-run", "--out", str(tmp_path / "run")]) == 0
    steps = capsys.readouterr().out.partition("epochs of ")[2]
    assert int(steps.partition(",")[0]) >= 4
    assert ", chosen from " in steps


@pytest.mark.parametrize("super_batch", [1, 2, 5, 10])
@pytest.mark.parametrize("num_pairs", [48, 700, 2400, 50_000])
@pytest.mark.parametrize("used_share", [0.3, 1.0])
def test_defaults_give_four_steps_per_epoch_as_long_as_there_are_enough_pairs(
    num_pairs: int, super_batch: int, used_share: float
) -> None:
    sized = defaults_for(num_pairs, used_share=used_share, super_batch=super_batch)
    config = TrainConfig(data="pairs.csv", method="clip", backend="numpy", batch_size=sized["batch_size"])
    if super_batch > 1:
        config = replace(config, method="jest", reference="runs/r", super_batch=super_batch)
    used = int(used_share * num_pairs)
    # Two pairs make the smallest batch.
    assert used // pairs_per_step(config) >= 4 or config.batch_size in (2, 3)
    # A method that selects trains on as many samples as another method, up to 60 epochs.
    plain = defaults_for(num_pairs, used_share=used_share)["epochs"]
    assert plain <= sized["epochs"] <= 60
    assert sized["epochs"] >= min(60, plain * super_batch // 8)


def test_too_large_a_super_batch_is_refused_with_both_factors() -> None:
    config = TrainConfig(data="pairs.csv", method="rho", reference="runs/r", backend="numpy", batch_size=32)
    assert steps_per_epoch(config, 320) == 1
    with pytest.raises(BadInput, match=r"batch_size times super_batch must be at most .* \(319\), got 32 times 10"):
        steps_per_epoch(config, 319)
    with pytest.raises(BadInput, match=r"batch_size must be at most the number of samples \(7\), got 32"):
        steps_per_epoch(replace(config, method="clip", reference=None, super_batch=1), 7)


@pytest.mark.parametrize("workers", [0, 1])
def test_the_plan_of_augmentation_counts_the_originals(workers: int, tmp_path: Path) -> None:
    lines = ["image,caption"]
    for row in range(45):
        pixels = np.random.default_rng(row).integers(0, 256, (40, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{row}.png")
        lines.append(f"{row}.png,thing {row}")
    (tmp_path / "pairs.csv").write_text("\n".join(lines))
    config = TrainConfig(
        data=str(tmp_path / "pairs.csv"), method="clip", backend="numpy", architecture="mlp", image_size=8, width=4,
        feature_dim=8, batch_size=4, epochs=1, augment="crop", workers=workers,
    )  # fmt: skip
    splits = open_splits(config)
    sizes = dict(plan_run(config, get_backend("numpy"), splits).memory)
    # The images of 40 x 50 pixels stay in memory as they are; processes keep none.
    assert sizes.get("images") == (None if workers else len(splits.train) * 40 * 50 * 3)
