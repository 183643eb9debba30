"""Facts that processes must share, and decisions that they make alike although places and rounding differ."""

from __future__ import annotations

import contextlib
import json
import shutil
import threading
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from drrho_clip import epoch_end
from drrho_clip.commands.encode import Encode
from drrho_clip.commands.evaluate import Evaluate
from drrho_clip.config import TrainConfig
from drrho_clip.errors import AgreedError
from drrho_clip.processes import opening
from drrho_clip.processes.facts import facts_of_settings
from drrho_clip.processes.fingerprint import require_equal
from drrho_clip.reference.memorisation import Shares
from drrho_clip.train import train
from drrho_core.backend import get_backend
from helpers.shards import numbered_shard
from helpers.thread_processes import ThreadProcesses


def _config(**options: Any) -> TrainConfig:
    return TrainConfig("digits", method="clip", **options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two tables and two finished runs of the first table."""
    folder = tmp_path_factory.mktemp("decisions")
    for name, num_pairs in (("first", 40), ("second", 60)):
        numbered_shard(folder / f"{name}.tar", num_pairs, set())
    for seed in (0, 1):
        train(_small(folder, seed), folder / f"run{seed}", backend=get_backend("torch"), quiet=True)
    return folder


def _small(folder: Path, seed: int = 0) -> TrainConfig:
    sizes = {"architecture": "mlp", "image_size": 4, "width": 4, "epochs": 1, "batch_size": 8}
    return TrainConfig(str(folder / "first.tar"), method="clip", backend="torch", seed=seed, **sizes)


def _messages(monkeypatch: pytest.MonkeyPatch, commands: list[Any]) -> list[str]:
    """Return the errors of commands that differ between the processes."""
    own = threading.local()

    @contextlib.contextmanager
    def opened(*_: object, facts: Mapping[str, Any] | None = None, **__: object) -> Iterator[ThreadProcesses]:
        require_equal(own.processes, facts or {})
        yield own.processes

    monkeypatch.setattr(opening, "opened_processes", opened)

    def message(processes: ThreadProcesses) -> str:
        own.processes = processes
        with pytest.raises(AgreedError) as caught:
            commands[processes.rank].run()
        return str(caught.value)

    return ThreadProcesses.run(len(commands), message)


@pytest.mark.parametrize(
    ("fact", "other"),
    [
        ("batch_size", {"batch_size": 8}),
        ("dtype", {"dtype": "float16"}),
        ("data", {"data": "second.tar"}),
        ("model.weights", {"model": "run1"}),
    ],
)
def test_processes_that_encode_compare_options_data_and_model(
    fact: str, other: dict[str, Any], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    words: dict[str, Any] = {"model": "run0", "data": "first.tar", "out": tmp_path / "cache", "batch_size": 4}
    messages = _messages(monkeypatch, [Encode(**words), Encode(**words | other)])
    assert messages[0] == messages[1]
    assert messages[0].startswith(f"{fact} must be the same on all processes, got ")
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("fact", "other"),
    [
        ("gallery", {"gallery": 4}),
        ("split", {"split": "validation"}),
        ("templates", {"templates": Path("templates.txt")}),
        ("data", {"data": "second.tar"}),
        ("model.weights", {"model": "run1"}),
    ],
)
def test_processes_that_evaluate_compare_options_data_and_model(
    fact: str, other: dict[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    (folder / "templates.txt").write_text("a {}\n")
    words: dict[str, Any] = {"model": "run0"}
    messages = _messages(monkeypatch, [Evaluate(**words), Evaluate(**words | other)])
    assert messages[0] == messages[1]
    assert messages[0].startswith(f"{fact} must be the same on all processes, got ")


def test_the_first_process_decides_about_the_end_of_the_training(monkeypatch: pytest.MonkeyPatch) -> None:
    # The shares of two machines may round to different sides of the limit at which a reference run stops.
    of_rank = [Shares(train=0.24, validation=1.0), Shares(train=0.26, validation=1.0)]

    def measure(features_of: Any, *_: object, **__: object) -> Shares:
        rank: int = features_of.keywords["processes"].rank
        return of_rank[rank]

    monkeypatch.setattr(epoch_end, "measure_shares", measure)
    monkeypatch.setattr(epoch_end, "evaluate", lambda *_, **__: {"retrieval_r1": 0.5})

    def judge(processes: ThreadProcesses) -> tuple[bool, float]:
        run: Any = SimpleNamespace(config=_config(as_reference=True))
        model: Any = SimpleNamespace(reads_new_pairs=False)
        parts: Any = SimpleNamespace(validation=None)
        end = epoch_end.EpochEnd(run, parts, parts, parts, np.arange(4), processes)
        findings = end.judge(0, model, 0.1, {}, first_epoch=0)
        return findings.stops, findings.lines[1]["hopeless_train"]

    assert ThreadProcesses.run(2, judge) == [(True, 0.24)] * 2


def test_the_form_of_the_exchange_must_be_the_same_and_the_number_of_workers_may_differ() -> None:
    def compare(processes: ThreadProcesses) -> str:
        workers = replace(_config(), workers=processes.rank, rank_timeout=60.0 + processes.rank)
        require_equal(processes, facts_of_settings(workers, resume=True))
        forms = replace(_config(), form=("ring", "reduce")[processes.rank])
        with pytest.raises(AgreedError) as caught:
            require_equal(processes, facts_of_settings(forms, resume=True))
        return str(caught.value)

    message = 'form must be the same on all processes, got "ring" on rank 0, "reduce" on rank 1'
    assert ThreadProcesses.run(2, compare) == [message] * 2


def test_a_finished_run_whose_data_have_moved_on_one_machine_only_gives_the_results_on_all(folder: Path) -> None:
    moved = shutil.copy(folder / "first.tar", folder / "moved.tar")
    config, run = _small(folder), folder / "run0"
    (row,) = json.loads((run / "results.json").read_text())

    def resume(processes: ThreadProcesses) -> dict[str, Any]:
        own = config if processes.is_first else replace(config, data=str(moved))
        return train(own, run, resume=True, backend=get_backend("torch"), quiet=True, processes=processes).row

    assert ThreadProcesses.run(2, resume) == [row] * 2
