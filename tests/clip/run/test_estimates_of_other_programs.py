"""Inner estimates of LibAUC and of the released code become the first estimates of a run."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from drrho_clip.cli import main
from drrho_clip.config import TrainConfig
from drrho_clip.errors import BadInput
from drrho_clip.exchange.estimates import read_estimates
from drrho_clip.files.checkpoint import load_arrays
from drrho_clip.train import train
from drrho_core.backend import get_backend
from drrho_core.migration import log_inner_from_libauc_v2, log_inner_from_sogclr_loss
from helpers.small_pairs import write_two_colours

PEERS = Path(__file__).parents[2] / "data" / "peers"
CONFIG = TrainConfig(data="digits", method="sogclr", backend="torch", dtype="float64", batch_size=16)


class Pairs:
    """Stands for training pairs: 64, as many as the recordings have."""

    def __len__(self) -> int:
        return 64


def tables(recording: str, *names: str) -> dict[str, np.ndarray]:
    with np.load(PEERS / f"{recording}_f64.npz") as arrays:
        return {name: arrays[f"out_{name}"][-1] for name in names}


@pytest.mark.parametrize("suffix", [".pt", ".npz"])
@pytest.mark.parametrize("individual", [False, True])
def test_recorded_tables_are_recognised_and_converted(tmp_path: Path, suffix: str, individual: bool) -> None:
    names = ("u_im", "u_tt", "bound_im", "bound_tt") if individual else ("u1", "b1", "u2", "b2")
    recording = "official_individual" if individual else "libauc_v2_isogclr"
    saved = tables(recording, *names)
    file = tmp_path / f"epoch_5{suffix}"
    if suffix == ".npz":
        np.savez(file, **saved)
    else:
        # LibAUC's loss is saved inside the checkpoint, the released code's tables lie beside the weights.
        content = {name: torch.from_numpy(table) for name, table in saved.items()}
        torch.save({"epoch": 5, **(content if individual else {"state_dict": {}, "loss": content})}, file)
    estimates = read_estimates(file, Pairs(), CONFIG, get_backend("torch", dtype="float64"))  # type: ignore[arg-type]
    images, texts = (("u_im", "bound_im"), ("u_tt", "bound_tt")) if individual else (("u1", "b1"), ("u2", "b2"))
    for side, (u, b) in (("image", images), ("text", texts)):
        expected = log_inner_from_libauc_v2(saved[u], saved[b])
        assert np.array_equal(estimates[f"log_inner_{side}"], expected)
        assert np.isfinite(expected).sum() > 20


def test_a_global_temperature_takes_batch_size_and_eps_of_the_run(tmp_path: Path) -> None:
    log_u = np.random.default_rng(0).uniform(0.5, 2.0, (64, 1))
    torch.save({"u_im": torch.from_numpy(log_u), "u_tt": torch.from_numpy(log_u + 1)}, tmp_path / "a.pt")
    estimates = read_estimates(tmp_path / "a.pt", Pairs(), CONFIG, get_backend("torch"))  # type: ignore[arg-type]
    expected = log_inner_from_sogclr_loss(log_u + 1, batch_size=16, eps=0.0)
    assert np.array_equal(estimates["log_inner_text"], expected)


def test_a_run_starts_from_the_estimates_of_the_pairs_that_it_trains_on(tmp_path: Path) -> None:
    write_two_colours(tmp_path / "pairs", 60, swapped_fraction=0.0)
    whole = np.arange(60, dtype=np.float64)
    np.savez(tmp_path / "u.npz", log_inner_image=whole, log_inner_text=-whole)
    config = TrainConfig(
        data=str(tmp_path / "pairs" / "pairs.csv"),
        method="sogclr",
        backend="numpy",
        architecture="mlp",
        image_size=8,
        width=4,
        feature_dim=8,
        batch_size=8,
        epochs=1,
        init_estimates=str(tmp_path / "u.npz"),
    )
    outcome = train(config, tmp_path / "run", quiet=True, stop_after=1)
    arrays, _ = load_arrays(outcome.run.checkpoint, "checkpoint")
    stored = arrays["estimator/log_inner_image"]
    # Eight pairs were in the first batch; all others have the estimates of their rows of the table.
    rows = np.flatnonzero(stored == np.round(stored))
    assert len(stored) - len(rows) == 8
    assert len(np.unique(stored[rows])) == len(rows)
    assert np.array_equal(arrays["estimator/log_inner_text"][rows], -stored[rows])


class Harmful:
    """A pickled object that would run code."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (exec, ("raise SystemExit('code of a checkpoint ran')",))


def test_files_that_do_not_fit_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    backend = get_backend("torch")
    contents: dict[str, tuple[Any, str]] = {
        "short.pt": ({name: torch.ones(63, 1) for name in ("u1", "b1", "u2", "b2")}, "must have as many rows"),
        "half.pt": ({name: torch.ones(64, 1) for name in ("u1", "b1")}, "of every text"),
        "empty.pt": ({"epoch": 3}, "no table of a known name"),
        "unimodal.pt": ({"u": torch.ones(64, 1)}, "unimodal"),
        "negative.pt": ({name: -torch.ones(64, 1) for name in ("u1", "b1", "u2", "b2")}, "u must be"),
    }
    for name, (content, message) in contents.items():
        torch.save(content, tmp_path / name)
        with pytest.raises(BadInput, match=message):
            read_estimates(tmp_path / name, Pairs(), CONFIG, backend)  # type: ignore[arg-type]
    (tmp_path / "harmful.pt").write_bytes(pickle.dumps({"u1": Harmful()}))
    torch.save({"u1": Harmful()}, tmp_path / "harmful2.pt")
    (tmp_path / "text.pt").write_text("no checkpoint")
    np.savez(tmp_path / "harmful.npz", u1=np.array([Harmful()], dtype=object))
    for name in ("harmful.pt", "harmful2.pt", "text.pt", "harmful.npz"):
        with pytest.raises(BadInput, match="must be a file of tables"):
            read_estimates(tmp_path / name, Pairs(), CONFIG, backend)  # type: ignore[arg-type]
    with pytest.raises(BadInput, match=r"must be an \.npz file for the numpy backend"):
        read_estimates(tmp_path / "short.pt", Pairs(), CONFIG, get_backend("numpy"))  # type: ignore[arg-type]
    words = ["train", "--data", "digits", "--backend", "numpy", "--init-estimates", "u.npz", "--out", str(tmp_path)]
    assert main([*words, "--method", "clip"]) == 2
    assert "init_estimates must be left out for method clip" in capsys.readouterr().err
