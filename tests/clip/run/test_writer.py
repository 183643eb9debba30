"""A run has one writer, writes through no link, loses no line of its log, and keeps the last good state."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from drrho_clip.cli import main
from drrho_clip.config import TrainConfig
from drrho_clip.errors import BadInput
from drrho_clip.files.disk import temporary_path, write_atomic
from drrho_clip.run import open_run, read_metrics
from drrho_clip.run.writer import LOCK, only_writer
from drrho_clip.train import train
from drrho_core.backend import backend_names

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
    checkpoint_every=3,
    epochs=2,
)
NEW = ["train", "--method", "sogclr", "--data", "digits", "--backend", "numpy", "--epochs", "1", "--width", "4"]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped at step 7; the last checkpoint is of that step."""
    folder = tmp_path_factory.mktemp("original") / "run"
    train(CONFIG, folder, quiet=True, stop_after=7)
    return folder


@pytest.fixture
def stopped(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "stopped"))


def _content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# One writer -----------------------------------------------------------------------------------------------------------


def test_a_second_writer_is_refused_and_named(stopped: Path, tmp_path: Path, fails: Callable[..., str]) -> None:
    message = f"must be a folder that no other process writes, got {stopped}: process {os.getpid()}\n"
    with only_writer(stopped):
        before = _content(stopped)
        assert fails("train", "--resume", "--out", str(stopped)) == f"drrho: out {message}"
        assert _content(stopped) == before
    # Two new runs: the second process finds the folder without files, but with a lock.
    (tmp_path / "new").mkdir()
    with only_writer(tmp_path / "new"), pytest.raises(BadInput, match="no other process writes"):
        train(CONFIG, tmp_path / "new", quiet=True)
    assert [path.name for path in (tmp_path / "new").iterdir()] == [LOCK]


def test_a_run_that_another_process_has_started_in_the_meantime_is_not_overwritten(
    stopped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other process starts and ends between the first look at the folder and the lock."""

    def start_and_check(*args: object, **kwargs: object) -> None:
        shutil.copytree(stopped, out)

    out = tmp_path / "new"
    monkeypatch.setattr("drrho_clip.train.check_held_out", start_and_check)
    with pytest.raises(BadInput, match="out must be a folder without a run"):
        train(CONFIG, out, quiet=True)
    assert (out / "config.json").read_bytes() == (stopped / "config.json").read_bytes()
    assert (out / "checkpoint.safetensors").read_bytes() == (stopped / "checkpoint.safetensors").read_bytes()


def test_the_lock_of_a_killed_process_is_free(stopped: Path) -> None:
    holder = "import sys, time\nfrom pathlib import Path\nfrom drrho_clip.run.writer import only_writer\n"
    holder += "with only_writer(Path(sys.argv[1])):\n    print('held', flush=True)\n    sys.stdin.read()\n"
    process = subprocess.Popen(
        [sys.executable, "-c", holder, str(stopped)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    with pytest.raises(BadInput, match=f"process {process.pid}"):
        train(CONFIG, stopped, resume=True, quiet=True)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert train(CONFIG, stopped, resume=True, quiet=True).run.progress().finished


def test_a_file_system_without_locks_is_reported_and_used(
    stopped: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_locks(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    assert main(["train", "--resume", "--out", str(stopped)]) == 0
    assert f"nothing keeps a second process out of {stopped}" in capsys.readouterr().err


# Links ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["a file", "nothing"])
@pytest.mark.parametrize(
    "name", ["metrics.jsonl", "checkpoint.safetensors", "checkpoint-best.safetensors", "estimator.bin", LOCK]
)
def test_nothing_is_written_through_a_link(
    name: str, target: str, stopped: Path, tmp_path: Path, fails: Callable[..., str]
) -> None:
    outside = tmp_path / "outside"
    if target == "a file":
        # The content is right, so the link alone is the reason for the refusal.
        outside.write_bytes((stopped / name).read_bytes() if (stopped / name).exists() else b"")
    (stopped / name).unlink(missing_ok=True)
    (stopped / name).symlink_to(outside)
    before = outside.read_bytes() if outside.exists() else None
    assert str(stopped / name) in fails("train", "--resume", "--out", str(stopped))
    assert (outside.read_bytes() if outside.exists() else None) == before
    if name != LOCK:
        (tmp_path / "new").mkdir()
        (tmp_path / "new" / name).symlink_to(outside)
        assert "without a run" in fails(*NEW, "--out", str(tmp_path / "new"))


def test_a_temporary_file_is_not_written_through_a_link(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_text("old")
    temporary_path(tmp_path / "new").symlink_to(outside)
    write_atomic(tmp_path / "new", b"content")
    assert outside.read_text() == "old"
    assert (tmp_path / "new").read_bytes() == b"content"
    assert not (tmp_path / "new").is_symlink()


# The log --------------------------------------------------------------------------------------------------------------


def test_a_resumed_run_has_every_line_of_the_log_once(stopped: Path, tmp_path: Path) -> None:
    whole = train(CONFIG, tmp_path / "whole", quiet=True)
    # Lines of steps after the checkpoint, as a crash leaves them, and a line that was cut short.
    log = stopped / "metrics.jsonl"
    with log.open("a") as file:
        file.write('{"step": 8, "epoch": 1, "loss": 0.5}\n{"step": 9, "epo')
    resumed = train(CONFIG, stopped, resume=True, quiet=True)
    assert read_metrics(resumed.run.metrics) == read_metrics(whole.run.metrics)


def test_a_foreign_line_in_the_log_is_an_error_that_names_the_line(stopped: Path, fails: Callable[..., str]) -> None:
    log = stopped / "metrics.jsonl"
    lines = log.read_text().splitlines(keepends=True)
    log.write_text("".join([*lines[:3], "a note of mine\n", *lines[3:]]))
    before = _content(stopped)
    message = fails("train", "--resume", "--out", str(stopped))
    assert f"{log} " in message
    assert "4" in message
    del before[LOCK]
    assert {name: content for name, content in _content(stopped).items() if name != LOCK} == before


# Runs that diverge ----------------------------------------------------------------------------------------------------

DIVERGING = replace(CONFIG, method="clip", learning_rate=1e20, warmup_steps=0, epochs=3)


@pytest.mark.parametrize("backend", ["numpy", "torch", "jax"])
@pytest.mark.parametrize(("log_every", "checkpoint_every"), [(1, 1), (10, 1), (10, 4), (50, 200)])
def test_a_diverged_run_keeps_its_last_good_state(
    backend: str, log_every: int, checkpoint_every: int, tmp_path: Path
) -> None:
    if backend not in backend_names():
        pytest.skip(f"{backend} is not installed")
    out = tmp_path / "run"
    config = replace(DIVERGING, backend=backend, log_every=log_every, checkpoint_every=checkpoint_every)
    with pytest.raises(BadInput, match=r"the loss must stay finite, .*lower the learning_rate"):
        train(config, out, quiet=True)
    run = open_run(out)
    parameters = run.load_parameters("last")
    assert all(np.abs(array).max() < 10 for array in parameters.values())
    # The next step can be taken from the state: with another learning rate a run starts from it.
    again = replace(config, learning_rate=1e-3, epochs=1, init=str(out))
    assert train(again, tmp_path / "again", quiet=True, allow_unfinished=True).run.progress().finished


def test_a_run_that_diverges_late_keeps_the_last_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    train(CONFIG, out, quiet=True, stop_after=6)
    good = (out / "checkpoint.safetensors").read_bytes()
    document = json.loads((out / "config.json").read_text())
    document["config"]["learning_rate"] = 1e20
    (out / "config.json").write_text(json.dumps(document))
    capsys.readouterr()
    assert main(["train", "--resume", "--out", str(out)]) == 2
    # The first line is the progress at the start.
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert f"{out / 'checkpoint.safetensors'} has the last good state, that of step 6" in lines[1]
    assert (out / "checkpoint.safetensors").read_bytes() == good
