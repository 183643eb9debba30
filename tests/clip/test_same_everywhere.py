"""The same numbers on every array library: fifty float64 steps of MLP towers on the digits, from one seed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from drrho_numpy import NumpyBackend

from drrho_clip.config import TrainConfig
from drrho_clip.data import DataSplits
from drrho_clip.data.splits import open_splits
from drrho_clip.run import describe_run
from drrho_clip.table_defaults import preset
from drrho_clip.train import train
from drrho_clip.trainer import Trainer
from drrho_core.backend import get_backend

STEPS = 50
LEARNING_RATES = {"fixed": 1e-4, "global": 1e-3, "per_sample": 1e-2}


def _strict() -> Any:
    import array_api_strict

    return NumpyBackend(dtype="float64", xp=array_api_strict)


BACKENDS: dict[str, Callable[[], Any]] = {
    "numpy": lambda: get_backend("numpy", dtype="float64"),
    "strict": _strict,
    "torch": lambda: get_backend("torch", dtype="float64"),
    "jax": lambda: get_backend("jax", dtype="float64"),
}


@pytest.fixture(scope="module")
def splits() -> DataSplits:
    return open_splits(TrainConfig(data="digits", method="clip"))


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reference run of NumPy, which every backend reads."""
    folder = tmp_path_factory.mktemp("same") / "reference"
    settings = preset("digits") | {"backend": "numpy", "dtype": "float64", "epochs": 4, "width": 8}
    train(TrainConfig(data="digits:reference", method="clip", **settings), folder, quiet=True)
    return folder


def _arrays_after(
    name: str, method: str, scheme: str, splits: DataSplits, reference: Path, folder: Path
) -> dict[str, np.ndarray]:
    """Return parameters, estimator and temperature after `STEPS` steps; drrho also reads reference features."""
    backend = BACKENDS[name]()
    settings = preset("digits") | {"backend": "numpy", "dtype": "float64", "epochs": 10, "width": 16}
    config = TrainConfig(data="digits", method="clip", **settings)
    config = replace(config, method=method, reference=str(reference) if method == "drrho" else None)
    radius = 0.0 if method == "clip" or scheme == "fixed" else 1.0
    config = replace(config, temperature_scheme=scheme, radius=radius, temperature_learning_rate=LEARNING_RATES[scheme])
    folder.mkdir()
    trainer = Trainer(describe_run(folder, config, splits.train), backend, splits)
    assert trainer.total_steps >= STEPS
    trainer.fit(quiet=True, stop_after=STEPS)
    assert trainer.done == STEPS
    found = dict(trainer.state.parameters) | trainer.temperature.state_dict()
    return {name: backend.to_numpy(array) for name, array in found.items()} | trainer.estimator.state_dict()


@pytest.mark.parametrize(
    ("method", "scheme"),
    [
        ("clip", "fixed"),
        ("sogclr", "fixed"),
        ("drrho", "fixed"),
        ("clip", "global"),
        ("drrho", "global"),
        ("drrho", "per_sample"),
    ],
)
def test_fifty_steps_are_equal_on_every_library(
    method: str, scheme: str, splits: DataSplits, reference: Path, tmp_path: Path
) -> None:
    expected = _arrays_after("numpy", method, scheme, splits, reference, tmp_path / "numpy")
    if scheme == "global":
        assert expected["step"] == STEPS
        assert abs(expected["temperature"] - 0.07) > 1e-3
    if scheme == "per_sample":
        assert np.sum(np.abs(expected["temperature_text"] - 0.07) > 1e-4) > len(splits.train) // 2
    if method != "clip":
        assert np.isfinite(expected["log_inner_image"]).sum() > len(splits.train) // 2  # the estimator was used
    for name in ("strict", "torch", "jax"):
        found = _arrays_after(name, method, scheme, splits, reference, tmp_path / name)
        assert found.keys() == expected.keys()
        for key, array in expected.items():
            np.testing.assert_allclose(found[key], array, rtol=0, atol=1e-9, err_msg=f"{name}: {key}")
