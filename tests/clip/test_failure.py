"""A loss that is not finite leaves a dump, from which the step can be taken again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from drrho_clip.cli import main
from drrho_clip.config import TrainConfig
from drrho_clip.errors import BadInput
from drrho_clip.failure import failure_file, replay
from drrho_clip.files.checkpoint import load_arrays
from drrho_clip.train import train
from drrho_core.backend import get_backend

SMALL: dict[str, Any] = {"epochs": 4, "batch_size": 64, "width": 4, "feature_dim": 8, "depth": 1, "warmup_steps": 1,
                         "image_size": 8, "architecture": "mlp", "checkpoint_every": 4, "log_every": 50}  # fmt: skip


@pytest.mark.parametrize("name", ["numpy", "torch", "jax"])
def test_the_dump_holds_the_first_bad_step(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The loss is read only at checkpoints, so the bad step is some steps back when the run notices."""
    config = TrainConfig(data="digits", method="sogclr", backend=name, learning_rate=1e30, **SMALL)
    out = tmp_path / "run"
    with pytest.raises(BadInput, match="the loss must stay finite") as error:
        train(config, out, quiet=True)
    assert str(error.value).endswith(f"drrho replay {out}")
    arrays, numbers = load_arrays(failure_file(out_run(out)), "failure")
    assert numbers["epoch"] == 0
    assert arrays["batch/images/0"].shape == (64, 8, 8, 1)
    assert len(set(arrays["rows"].tolist())) == 64
    found = replay(out, get_backend(name))
    assert found.step == numbers["step"] > 1
    assert not np.isfinite(found.loss)
    assert found.bad_images or found.bad_texts or found.bad_parameters
    # The parameters of the first step are good, so the first bad step was found and not a later step.
    shown = capsys.readouterr()
    assert main(["replay", str(out)]) == 0
    shown = capsys.readouterr()
    assert shown.out.startswith(f"step {found.step}: loss ")
    # The last good state is as it was: no step and no line of metrics is lost.
    assert load_arrays(out / "checkpoint.safetensors", "checkpoint")[1]["step"] < found.step


def out_run(folder: Path) -> Any:
    from drrho_clip.run import open_run

    return open_run(folder)


def test_a_run_without_a_dump_says_so(tmp_path: Path) -> None:
    config = TrainConfig(data="digits", method="clip", backend="numpy", **SMALL)
    train(config, tmp_path / "run", quiet=True, stop_after=1)
    with pytest.raises(BadInput, match=r"must hold failure.safetensors, which a loss that is not finite leaves"):
        replay(tmp_path / "run", get_backend("numpy"))
