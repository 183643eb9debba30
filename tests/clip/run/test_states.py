"""The states that a run keeps beside the last state, and how far a run is."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from drrho_clip.config import TrainConfig
from drrho_clip.data.splits import open_splits
from drrho_clip.encode import Encoder
from drrho_clip.evaluate import evaluate
from drrho_clip.files.checkpoint import load_arrays
from drrho_clip.run import RunProgress, open_run
from drrho_clip.run.outcome import Outcome
from drrho_clip.train import train
from drrho_clip.trainer import Trainer
from drrho_core.backend import get_backend

CONFIG = TrainConfig(
    data="digits",
    method="clip",
    backend="numpy",
    architecture="mlp",
    image_size=8,
    width=4,
    feature_dim=8,
    batch_size=128,
    epochs=4,
)
# Five batches of 128 pairs; the last, shorter batch is dropped.
STEPS_PER_EPOCH = 5


@pytest.fixture(scope="module")
def curve() -> list[float]:
    """The validation R@1 that the runs of this file see after each epoch: the best comes second, and comes again."""
    return [0.25, 0.5, 0.5, 0.125]


@pytest.fixture
def validated(curve: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the measured validation figures by `curve`; the figures of other data are measured."""

    def figures(encoder: Encoder, dataset: Any, *, zero_shot: bool = True) -> dict[str, float]:
        measured = evaluate(encoder, dataset, zero_shot=zero_shot)
        return measured if zero_shot else measured | {"retrieval_r1": next(values)}

    values = itertools.cycle(curve)  # a second run of a test sees the same curve
    monkeypatch.setattr("drrho_clip.epoch_end.evaluate", figures)


@pytest.fixture
def outcome(validated: None, tmp_path: Path) -> Outcome:
    return train(CONFIG, tmp_path / "run", quiet=True)


def test_the_best_state_is_the_earliest_of_the_best_epochs(outcome: Outcome, tmp_path: Path) -> None:
    run = outcome.run
    stopped = train(CONFIG, tmp_path / "stopped", quiet=True, stop_after=2 * STEPS_PER_EPOCH)
    expected = stopped.run.load_parameters("last")
    best = run.load_parameters("best")
    assert best.keys() == expected.keys()
    assert all(np.array_equal(best[name], expected[name]) for name in best)
    assert any(not np.array_equal(best[name], array) for name, array in run.load_parameters("last").items())
    _, state = load_arrays(run.folder / "checkpoint-best.safetensors", "checkpoint")
    assert state == {"step": 10, "epoch": 1, "retrieval_r1": 0.5}


def test_the_results_are_those_of_the_best_state(outcome: Outcome) -> None:
    run = open_run(outcome.run.folder)
    backend = get_backend("numpy", dtype="float32")
    test = open_splits(CONFIG).test
    row = json.loads(run.results.read_text())[0]
    assert (row["state"], row["step"], row["samples_seen"]) == ("best", 10, 20 * 128)
    assert row["metrics"] == evaluate(Encoder.load(run, backend), test) == evaluate(outcome.encoder, test)
    assert row["metrics"] != evaluate(Encoder.load(run, backend, state="last"), test)


def test_a_state_that_was_not_kept_is_replaced_by_the_next_one(outcome: Outcome) -> None:
    run = outcome.run
    run.state_file("reference").unlink()
    assert [run.chosen_state(state) for state in ("reference", "best", "last")] == ["best", "best", "last"]
    run.state_file("best").rename(run.state_file("reference"))
    assert [run.chosen_state(state) for state in ("reference", "best", "last")] == ["reference", "last", "last"]


def test_progress_says_whether_a_run_is_finished(tmp_path: Path) -> None:
    first = train(CONFIG, tmp_path / "run", quiet=True, stop_after=7)
    assert first.run.progress() == RunProgress(done=7, total=20, finished=False)
    train(CONFIG, tmp_path / "run", quiet=True, resume=True)
    assert first.run.progress() == RunProgress(done=20, total=20, finished=True)
    # A process that died between the last checkpoint and the results has not finished the run.
    first.run.results.unlink()
    assert not first.run.progress().finished


def test_a_state_under_any_name_is_written_with_the_next_checkpoint(tmp_path: Path) -> None:
    run = train(CONFIG, tmp_path / "run", quiet=True, stop_after=3).run
    trainer = Trainer(run, get_backend("numpy", dtype="float32"), open_splits(CONFIG))
    trainer.load()
    trainer.keep_state("reference", {"shares": (0.5, 0.25)})
    assert not run.state_file("reference").exists()
    trainer.save()
    _, state = load_arrays(run.state_file("reference"), "checkpoint")
    assert state == {"shares": [0.5, 0.25], "step": 3}
    # The file is missing after a crash at this moment; the checkpoint of the same step has the same parameters.
    run.state_file("reference").unlink()
    trainer.load()
    _, state = load_arrays(run.state_file("reference"), "checkpoint")
    assert state == {"shares": [0.5, 0.25], "step": 3}


def test_the_bar_shows_the_validation_figure(
    validated: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(CONFIG, tmp_path / "run")
    last = capsys.readouterr().err.splitlines()[-1]
    assert "20/20 loss " in last
    assert last.endswith(", validation R@1 0.125 (best 0.500, epoch 2)")
