"""``--learning-rate auto``: short trials on a small table choose the rate, always in the same way."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from drrho_clip.cli import main
from drrho_clip.errors import BadInput
from drrho_clip.files.checkpoint import load_arrays
from drrho_clip.learning_rate_trials import LEARNING_RATES, Trial, best_trial
from drrho_clip.processes.one import OneProcess
from drrho_clip.run import open_run
from drrho_clip.trainer import Trainer
from helpers.small_pairs import write_two_colours

SIZES = ["--method", "clip", "--backend", "numpy", "--image-size", "8", "--width", "8", "--feature-dim", "8"]


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pairs")
    write_two_colours(folder, 200, swapped_fraction=0.0)
    return folder / "pairs.csv"


def train(table: Path, out: Path, *options: str) -> int:
    return main(["train", "--data", str(table), "--out", str(out), "--batch-size", "16", *SIZES, *options])


def test_the_run_has_the_best_rate_and_the_table_of_the_trials(
    table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert train(table, out, "--epochs", "30", "--learning-rate", "auto") == 0
    rows = json.loads((out / "learning_rates.json").read_text())
    assert [row["learning_rate"] for row in rows] == sorted(LEARNING_RATES)
    chosen = best_trial([Trial(**row) for row in rows]).learning_rate
    assert open_run(out).config.learning_rate == chosen
    printed = [line for line in capsys.readouterr().err.splitlines() if line.startswith("learning rate ")]
    assert len(printed) == 3
    assert [line for line in printed if line.endswith(", chosen")] == [
        line for line in printed if line.startswith(f"learning rate {chosen:g}:")
    ]
    # The run itself is the one that the chosen number gives without trials.
    plain = tmp_path / "plain"
    assert train(table, plain, "--epochs", "30", "--learning-rate", str(chosen)) == 0
    first, second = (load_arrays(run / "checkpoint.safetensors", "checkpoint")[0] for run in (out, plain))
    assert all(np.array_equal(second[name], array) for name, array in first.items())


def test_the_trials_take_at_most_a_fifth_of_the_steps(
    table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []
    take_step = Trainer.take_step

    def counted(self: Trainer, *arguments: object, **options: object) -> object:
        steps.append(self.run.folder.name)
        return take_step(self, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Trainer, "take_step", counted)
    assert train(table, tmp_path / "out", "--epochs", "8", "--learning-rate", "auto") == 0
    in_run = steps.count("out")
    assert 0 < len(steps) - in_run <= 0.2 * in_run


def test_the_watch_hears_of_checkpoints_of_the_run_only(
    table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[int] = []
    folders: list[Path] = []
    monkeypatch.setattr(OneProcess, "saved", lambda _, step: saved.append(step))
    take_step = Trainer.take_step

    def noted(self: Trainer, *arguments: object, **options: object) -> object:
        folders.append(self.run.folder)
        return take_step(self, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Trainer, "take_step", noted)
    assert train(table, tmp_path / "out", "--epochs", "15", "--learning-rate", "auto") == 0
    # The three trials save after their only epoch, before the run has a folder with a checkpoint.
    assert saved == list(range(0, 151, 10))
    assert not folders[0].parent.exists()


def test_a_moving_average_does_not_change_the_trials(table: Path, tmp_path: Path) -> None:
    for name, options in (("plain", []), ("average", ["--ema", "0.999"])):
        assert train(table, tmp_path / name, "--epochs", "8", "--learning-rate", "auto", *options) == 0
    plain, average = (
        json.loads((tmp_path / name / "learning_rates.json").read_text()) for name in ("plain", "average")
    )
    assert average == plain


def test_a_rate_whose_loss_does_not_stay_finite_loses(
    table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit = Trainer.fit

    def diverging(self: Trainer, **options: object) -> None:
        if self.run.config.learning_rate == LEARNING_RATES[-1]:
            raise BadInput("the loss must stay finite, got nan")
        fit(self, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Trainer, "fit", diverging)
    assert train(table, tmp_path / "out", "--epochs", "15", "--learning-rate", "auto") == 0
    rows = json.loads((tmp_path / "out" / "learning_rates.json").read_text())
    assert (rows[-1]["validation_r1"], rows[-1]["validation_r10"]) == (0.0, 0.0)
    assert open_run(tmp_path / "out").config.learning_rate != LEARNING_RATES[-1]


def test_if_no_trial_can_be_run_its_error_is_shown(
    table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def failing(self: Trainer, **options: object) -> None:
        raise BadInput("the loss must stay finite, got nan")

    monkeypatch.setattr(Trainer, "fit", failing)
    assert train(table, tmp_path / "out", "--epochs", "15", "--learning-rate", "auto") == 2
    assert "the loss must stay finite" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_same_command_line_resumes_the_run_with_the_chosen_rate(
    table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    options = ("--epochs", "2", "--learning-rate", "auto")
    assert train(table, out, *options) == 0
    chosen = open_run(out).config.learning_rate
    # Neither a finished run nor a run with more epochs makes trials again.
    monkeypatch.setattr("drrho_clip.train.try_learning_rates", None)
    assert train(table, out, *options, "--resume") == 0
    assert train(table, out, "--epochs", "3", "--learning-rate", "auto", "--resume") == 0
    assert (open_run(out).config.learning_rate, open_run(out).config.epochs) == (chosen, 3)
    # A run that was started with a number has no trials, so the word is another setting.
    (out / "learning_rates.json").unlink()
    capsys.readouterr()
    assert train(table, out, *options, "--resume") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"drrho: learning_rate must be that of the run to resume ({chosen}), got 'auto'"
