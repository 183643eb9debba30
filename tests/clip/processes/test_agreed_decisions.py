"""Decisions that all processes of a run must make alike, although machines differ in places of data and in rounding."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from drrho_clip import epoch_end
from drrho_clip.config import TrainConfig
from drrho_clip.errors import AgreedError
from drrho_clip.processes.facts import facts_of_settings
from drrho_clip.processes.fingerprint import require_equal
from drrho_clip.reference.memorisation import Shares
from drrho_clip.train import train
from drrho_core.backend import get_backend
from helpers.shards import numbered_shard
from helpers.thread_processes import ThreadProcesses


def _config(**options: Any) -> TrainConfig:
    return TrainConfig("digits", method="clip", **options)


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


def test_a_finished_run_whose_data_have_moved_on_one_machine_only_gives_the_results_on_all(tmp_path: Path) -> None:
    shard = numbered_shard(tmp_path / "s.tar", 40, set())
    moved = shutil.copy(shard, tmp_path / "moved.tar")
    config = TrainConfig(
        str(shard),
        method="clip",
        backend="torch",
        architecture="mlp",
        image_size=4,
        width=4,
        epochs=1,
        batch_size=8,
    )
    backend = get_backend("torch")
    row = train(config, tmp_path / "run", backend=backend, quiet=True).row

    def resume(processes: ThreadProcesses) -> dict[str, Any]:
        own = config if processes.is_first else replace(config, data=str(moved))
        return train(own, tmp_path / "run", resume=True, backend=backend, quiet=True, processes=processes).row

    assert ThreadProcesses.run(2, resume) == [row] * 2
