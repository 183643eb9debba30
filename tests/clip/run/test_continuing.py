"""Runs that stop early, go on with more epochs, start from another run, or are not finished."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from drrho_clip.cli import main
from drrho_clip.config import TrainConfig
from drrho_clip.encode import Encoder
from drrho_clip.errors import BadInput
from drrho_clip.evaluate import evaluate
from drrho_clip.exchange.start_values import with_start_values
from drrho_clip.files.checkpoint import load_arrays
from drrho_clip.run import Run, open_run, read_metrics
from drrho_clip.train import train

CONFIG = TrainConfig(
    data="digits",
    method="sogclr",
    backend="numpy",
    architecture="mlp",
    image_size=8,
    width=4,
    feature_dim=8,
    batch_size=128,
    warmup_steps=2,
    log_every=1,
    epochs=2,
)
STEPS_PER_EPOCH = 5

FINISHED = [
    "train",
    "--method",
    "sogclr",
    "--data",
    "digits",
    "--backend",
    "numpy",
    "--width",
    "4",
    "--feature-dim",
    "8",
    "--epochs",
    "2",
    "--warmup-steps",
    "2",
    "--log-every",
    "1",
    "--batch-size",
    "128",
]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "run"
    assert main([*FINISHED, "--out", str(folder)]) == 0
    return folder


@pytest.fixture
def finished(original: Path, tmp_path: Path) -> Path:
    """A finished run of two epochs, in a folder of its own for each test."""
    return Path(shutil.copytree(original, tmp_path / "finished"))


def _content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def _arrays(run: Run) -> dict[str, np.ndarray]:
    return load_arrays(run.checkpoint, "checkpoint")[0]


def _assert_equal(first: Run, second: Run) -> None:
    arrays, expected = _arrays(first), _arrays(second)
    assert arrays.keys() == expected.keys()
    assert all(arrays[name].tobytes() == expected[name].tobytes() for name in arrays)
    assert read_metrics(first.metrics) == read_metrics(second.metrics)


# Finished runs, and more epochs ---------------------------------------------------------------------------------------


def test_resuming_a_finished_run_says_so_and_changes_nothing(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = _content(finished)
    capsys.readouterr()
    assert main(["train", "--resume", "--out", str(finished)]) == 0
    output = capsys.readouterr().out
    assert f"{finished} is finished; --epochs with a larger number continues" in output
    assert "sogclr" in output
    assert _content(finished) == before


def test_a_finished_run_goes_on_with_more_epochs(finished: Path, original: Path) -> None:
    assert main(["train", "--resume", "--out", str(finished), "--epochs", "4"]) == 0
    run = open_run(finished)
    assert run.config.epochs == 4
    assert run.earlier_ends == (2,)
    assert run.progress() == (20, 20, True)
    records = [record for record in read_metrics(run.metrics) if "loss" in record]
    assert records[:10] == [record for record in read_metrics(open_run(original).metrics) if "loss" in record]
    assert [record["step"] for record in records] == list(range(1, 21))
    # The added epochs have the learning rates of a run of two epochs, and gamma stays at the end of its cosine.
    rates = [record["learning_rate"] for record in records]
    assert rates[10:] == rates[:10]
    assert {record["gamma"] for record in records[10:]} == {0.5}
    row = json.loads(run.results.read_text())[0]
    assert row["samples_seen"] == 20 * 128


def test_more_epochs_are_deterministic_and_may_be_interrupted(finished: Path, tmp_path: Path) -> None:
    longer = replace(CONFIG, epochs=4)
    other = Path(shutil.copytree(finished, tmp_path / "other"))
    whole = train(longer, finished, resume=True, quiet=True)
    part = train(longer, other, resume=True, quiet=True, stop_after=13)
    assert part.run.progress() == (13, 20, False)
    assert not part.run.results.exists()
    again = train(longer, other, resume=True, quiet=True)
    _assert_equal(again.run, whole.run)
    assert again.row["metrics"] == whole.row["metrics"]


def test_a_crash_right_after_the_change_of_the_epochs_loses_nothing(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = Path(shutil.copytree(finished, tmp_path / "other"))
    whole = train(replace(CONFIG, epochs=3), finished, resume=True, quiet=True)

    def die(run: Run) -> None:
        write(run)
        raise KeyboardInterrupt

    write = Run.write
    monkeypatch.setattr(Run, "write", die)
    with pytest.raises(KeyboardInterrupt):
        train(replace(CONFIG, epochs=3), other, resume=True, quiet=True)
    monkeypatch.undo()
    assert not open_run(other).progress().finished
    assert main(["train", "--resume", "--out", str(other)]) == 0
    _assert_equal(open_run(other), whole.run)


def test_only_a_finished_run_gets_more_epochs(finished: Path, tmp_path: Path, fails: Callable[..., str]) -> None:
    unfinished = tmp_path / "unfinished"
    train(CONFIG, unfinished, quiet=True, stop_after=7)
    for folder, epochs in ((unfinished, "3"), (finished, "1")):
        before = _content(folder)
        message = fails("train", "--resume", "--out", str(folder), "--epochs", epochs)
        assert message == f"drrho: epochs must be that of the run to resume (2), got {epochs}\n"
        assert _content(folder) == before


def test_a_run_without_a_checkpoint_does_not_start_again(finished: Path, fails: Callable[..., str]) -> None:
    (finished / "checkpoint.safetensors").unlink()
    before = _content(finished)
    assert "must hold checkpoint.safetensors" in fails("train", "--resume", "--out", str(finished))
    assert _content(finished) == before


# Early stop -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def validation(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return a function that replaces the measured validation R@1 of the following epochs."""

    def use(*curve: float) -> None:
        values = itertools.chain(curve, itertools.repeat(0.0))

        def figures(encoder: Encoder, dataset: Any, *, zero_shot: bool = True) -> dict[str, float]:
            measured = evaluate(encoder, dataset, zero_shot=zero_shot)
            return measured if zero_shot else measured | {"retrieval_r1": next(values)}

        monkeypatch.setattr("drrho_clip.epoch_end.evaluate", figures)

    return use


def test_patience_stops_a_run_and_the_run_is_finished(validation: Callable[..., None], tmp_path: Path) -> None:
    validation(0.25, 0.5, 0.5, 0.25, 0.75)
    config = replace(CONFIG, epochs=8, patience=2)
    outcome = train(config, tmp_path / "run", quiet=True)
    # The best epoch is the second; an equal figure is no better one.
    assert outcome.run.progress() == (4 * STEPS_PER_EPOCH, 8 * STEPS_PER_EPOCH, True)
    assert outcome.row["step"] == 2 * STEPS_PER_EPOCH
    # More epochs begin with a new patience, and with the schedule of a run of the added epochs.
    validation(0.25, 0.75, 0.5, 0.5, 1.0)
    outcome = train(replace(config, epochs=9), tmp_path / "run", quiet=True, resume=True)
    assert outcome.run.earlier_ends == (4,)
    assert outcome.run.progress() == (8 * STEPS_PER_EPOCH, 9 * STEPS_PER_EPOCH, True)
    assert outcome.row["step"] == 6 * STEPS_PER_EPOCH
    records = [record for record in read_metrics(outcome.run.metrics) if "loss" in record]
    expected = [config.learning_rate_at(step, 5 * STEPS_PER_EPOCH) for step in range(4 * STEPS_PER_EPOCH)]
    assert [record["learning_rate"] for record in records[4 * STEPS_PER_EPOCH :]] == expected


def test_without_patience_a_run_goes_to_its_end(validation: Callable[..., None], tmp_path: Path) -> None:
    validation(0.5)
    outcome = train(replace(CONFIG, epochs=5), tmp_path / "run", quiet=True)
    assert outcome.run.progress().done == 5 * STEPS_PER_EPOCH


# Starting from another run --------------------------------------------------------------------------------------------


def test_a_run_starts_from_the_best_parameters_of_another(finished: Path, tmp_path: Path) -> None:
    source = open_run(finished)
    config = replace(CONFIG, data="digits:reference", init=str(finished), seed=3)
    outcome = train(config, tmp_path / "run", quiet=True, stop_after=0)
    assert outcome.run.tokenizer.to_json() == source.tokenizer.to_json()
    best = source.load_parameters("best")
    start = outcome.run.load_parameters("last")
    assert all(np.array_equal(start[name], best[name]) for name in best)
    # A resumed run does not need the other run.
    shutil.rmtree(finished)
    outcome = train(config, tmp_path / "run", quiet=True, resume=True)
    assert outcome.run.progress().finished


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--width", "8"], "whose width is 4 instead of 8"),
        (["--feature-dim", "4"], "whose feature_dim is 8 instead of 4"),
        (["--image-size", "16"], "whose image_size is 8 instead of 16"),
    ],
)
def test_other_encoders_cannot_be_started_from(
    option: list[str], message: str, finished: Path, tmp_path: Path, fails: Callable[..., str]
) -> None:
    out = tmp_path / "run"
    arguments = [*FINISHED, *option, "--init", str(finished), "--out", str(out)]
    assert message in fails(*arguments)
    assert not out.exists()


# Unfinished runs ------------------------------------------------------------------------------------------------------


@pytest.fixture
def unfinished(tmp_path: Path) -> Path:
    train(CONFIG, tmp_path / "unfinished", quiet=True, stop_after=7)
    return tmp_path / "unfinished"


def test_an_unfinished_run_is_used_only_on_request(
    unfinished: Path, tmp_path: Path, fails: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new"
    steered = ["train", "--data", "digits", "--method", "drrho", "--backend", "numpy", "--epochs", "1", "--width", "4"]
    commands = [
        [*steered, "--reference", str(unfinished), "--out", str(out)],
        [*FINISHED, "--init", str(unfinished), "--out", str(out)],
        ["evaluate", str(unfinished)],
        ["search", str(unfinished), "--data", "digits", "a nine"],
    ]
    for command in commands:
        message = fails(*command)
        assert "must be a finished run" in message
        assert "is at step 7 of 10" in message
        assert not out.exists()
        assert main([*command, "--allow-unfinished"]) == 0
        shutil.rmtree(out, ignore_errors=True)
    capsys.readouterr()


def test_a_python_caller_must_ask_for_an_unfinished_reference(unfinished: Path, tmp_path: Path) -> None:
    config = replace(CONFIG, method="drrho", reference=str(unfinished))
    with pytest.raises(BadInput, match="reference must be a finished run"):
        train(config, tmp_path / "new", quiet=True)
    assert not (tmp_path / "new").exists()
    assert train(config, tmp_path / "new", quiet=True, allow_unfinished=True).run.progress().finished


def test_encoders_of_a_run_bring_a_fixed_temperature_too(tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "data": "digits", "method": "clip", "backend": "numpy", "architecture": "mlp", "image_size": 8, "width": 4,
        "feature_dim": 8, "batch_size": 128, "epochs": 1,
    }  # fmt: skip
    fixed = TrainConfig(**settings, temperature=0.02, temperature_scheme="fixed")
    train(fixed, tmp_path / "first", quiet=True)
    for scheme in ("fixed", "global"):
        config = TrainConfig(**settings, temperature_scheme=scheme, init=str(tmp_path / "first"))
        assert with_start_values(config).temperature == 0.02
    named = TrainConfig(**settings, temperature_scheme="fixed", init=str(tmp_path / "first"), temperature=0.05)
    assert with_start_values(named).temperature == 0.05
