"""Figures of a run in TensorBoard and Weights & Biases while the run trains, and the last checkpoints."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from drrho_clip.cli import main
from drrho_clip.config import TrainConfig
from drrho_clip.files.checkpoint import load_arrays
from drrho_clip.run import open_run, read_metrics
from drrho_clip.run.watchers import open_watchers
from drrho_clip.train import train

SMALL: dict[str, Any] = {
    "data": "digits",
    "method": "clip",
    "backend": "numpy",
    "architecture": "mlp",
    "image_size": 8,
    "width": 4,
    "feature_dim": 8,
    "batch_size": 128,
    "checkpoint_every": 2,
    "log_every": 1,
}


def events(folder: Path) -> list[Any]:
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    files = sorted((folder / "tensorboard").iterdir(), key=lambda path: path.stat().st_mtime_ns)
    return [event for file in files for event in EventFileLoader(str(file)).Load()]


def test_event_files_have_the_figures_of_the_log_and_a_resumed_run_says_where_it_starts(tmp_path: Path) -> None:
    config = TrainConfig(**SMALL, epochs=2, tensorboard=True)
    train(config, tmp_path, quiet=True, stop_after=4)
    train(config, tmp_path, quiet=True, resume=True)
    figures = {
        (event.step, value.tag): value.tensor.float_val[0]
        for event in events(tmp_path)
        for value in event.summary.value
    }
    lines = read_metrics(tmp_path / "metrics.jsonl")
    expected = {(line["step"], name): value for line in lines for name, value in line.items() if name != "step"}
    assert figures.keys() == expected.keys()
    assert all(figures[key] == pytest.approx(value, rel=1e-6) for key, value in expected.items())
    starts = [event.step for event in events(tmp_path) if event.session_log.status == 1]
    assert starts == [1, 5]


def test_a_project_of_weights_and_biases_gets_the_lines_of_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []
    session = SimpleNamespace(
        log=lambda figures, step: calls.append((step, figures)), finish=lambda: calls.append("finish")
    )

    def init(**arguments: Any) -> Any:
        calls.append(arguments)
        return session

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    train(TrainConfig(**SMALL, epochs=1, wandb="pairs"), tmp_path / "mine", quiet=True)
    first, *lines, last = calls
    assert (first["project"], first["name"], first["resume"]) == ("pairs", "mine", "allow")
    assert first["config"]["batch_size"] == 128
    assert last == "finish"
    records = read_metrics(tmp_path / "mine" / "metrics.jsonl")
    assert lines == [(line.pop("step"), line) for line in records]


def test_lines_with_text_leave_only_their_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The trainer writes such a line for an image that turns out to be unreadable.
    line = {"step": 3, "epoch": 0, "unreadable": "pairs.csv, line 4: cannot decode image a.png"}
    sent: list[Any] = []
    session = SimpleNamespace(log=lambda figures, step: sent.append((step, figures)), finish=lambda: None)
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **_: session))
    train(TrainConfig(**SMALL, epochs=1), tmp_path, quiet=True)
    run = open_run(tmp_path)
    run = replace(run, config=replace(run.config, tensorboard=True, wandb="pairs"))
    for watcher in open_watchers(run, step=0):
        watcher.log(line)
        watcher.close()
    assert [(event.step, value.tag) for event in events(tmp_path) for value in event.summary.value] == [(3, "epoch")]
    assert sent == [(3, {"epoch": 0})]


@pytest.mark.parametrize(("option", "module"), [("--tensorboard", "tensorboard"), ("--wandb", "wandb")])
def test_a_missing_library_is_named_before_the_run_starts(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    option: str,
    module: str,
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == module]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    words = ["train", "--data", "digits", "--method", "clip", "--backend", "numpy", "--out", str(tmp_path / "run")]
    assert main([*words, option, *(["pairs"] if option == "--wandb" else [])]) == 2
    assert "pip install" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_the_last_checkpoints_stay_and_can_be_read_and_continued(tmp_path: Path) -> None:
    config = TrainConfig(**SMALL, epochs=2, keep_last=2)
    train(config, tmp_path, quiet=True)
    run = open_run(tmp_path)
    # 5 steps per epoch; checkpoints at 0, 2, 4, 5, 6, 8, 10.
    assert sorted(path.name for path in tmp_path.glob("checkpoint-step*")) == [
        "checkpoint-step10.safetensors",
        "checkpoint-step8.safetensors",
    ]
    assert load_arrays(run.state_file("step8"), "checkpoint")[1]["step"] == 8
    final = run.load_parameters("last")
    assert all((run.load_parameters("step10")[name] == array).all() for name, array in final.items())
    # An earlier checkpoint takes the place of the last one, and the run ends with the same parameters.
    run.state_file("step8").replace(run.checkpoint)
    train(config, tmp_path, quiet=True, resume=True)
    again = open_run(tmp_path).load_parameters("last")
    assert all((again[name] == array).all() for name, array in final.items())
